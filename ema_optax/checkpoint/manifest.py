"""The manifest and the checksums: as types, and as sealed files of an item.

`manifest.json` is written by process 0; each process adds the checksums of what it
wrote. Both are JSON objects `{"xxh3": …, "content": …}`, and hold no code.
"""

# pyright: strict

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias, TypeVar, cast

import xxhash
from etils import epath  # pyright: ignore[reportMissingTypeStubs]

from ema_optax.checkpoint.entries import (
    BYTES,
    AverageEntry,
    Json,
    TreeEntry,
    check_place,
    is_list,
    is_object,
    is_whole,
)
from ema_optax.checkpoint.errors import CorruptCheckpointError
from ema_optax.checkpoint.untrusted import (
    DEPTH,
    LIMIT,
    brief,
    is_deep,
    nodes,
    read_text,
)
from ema_optax.families import Decay
from ema_optax.text import brief, one_line

FORMAT = 2  # of everything that this library writes; raised when older ones cannot read
FOLDER = "ema_optax"  # inside the item, beside the raw params
LIBRARY = "ema_optax"
PARAMS, SHADOW, STATE = "params", "shadow", "state"

T = TypeVar("T")
Bounds: TypeAlias = tuple[tuple[int, int], ...]

_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")


class Piece(NamedTuple):
    """A block of a leaf, a (start, stop) for each axis, and the xxh3 of its bytes."""

    bounds: Bounds
    xxh3: str


Sums: TypeAlias = Mapping[str, Mapping[str, tuple[Piece, ...]]]  # tree → path → pieces


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        format: Of what is on disk.
        version: Of the library that wrote it.
        processes: That wrote it.
        trees: `params`, `shadow` or `shadow/NAME`, and `state`.
        extra: What the user gave.
    """

    format: int
    version: str
    processes: int
    trees: Mapping[str, TreeEntry]
    extra: Json

    @property
    def averages(self) -> dict[str, AverageEntry]:
        """The averages by the names of their trees.

        Raises:
            ValueError: If the decay of one cannot be read. The seal says that it is as
                it was written: by a newer version, or a stranger.
        """
        averages = {n: t.average for n, t in self.trees.items() if t.average}
        for name, average in averages.items():
            try:
                Decay.from_json(average.unread) if average.unread is not None else None
            except ValueError as error:
                raise ValueError(
                    f"The decay of {brief(name)} cannot be read: {error} If ema_optax "
                    f"{self.version}, which wrote it, is newer than this version: "
                    f"pip install 'ema-optax>={self.version}'."
                ) from None
        return averages

    def to_json(self) -> dict[str, object]:
        """The content of `manifest.json`."""
        averages = {n: t.average for n, t in self.trees.items() if t.average}
        return {
            "format": self.format,
            "library": LIBRARY,
            "version": self.version,
            "processes": self.processes,
            "extra": self.extra,
            "averages": {name: entry.to_json() for name, entry in averages.items()},
            "trees": {name: entry.to_json() for name, entry in self.trees.items()},
        }

    @classmethod
    def parse(cls, content: object) -> "Manifest":
        """Makes a manifest of a stranger's JSON.

        A decay that cannot be read is refused by `averages`, not here: leaves can be
        restored without it.

        Raises:
            CorruptCheckpointError: If it is malformed, saying how.
            ValueError: If its format is newer. Of such only number and version are
                looked at.
        """
        if not is_object(content) or not is_whole(number := content.get("format")):
            raise CorruptCheckpointError("it states no format")
        if number > FORMAT:
            version = _version(content.get("version"))
            raise ValueError(
                f"has format {number}, this version of ema_optax reads up to {FORMAT}. "
                f"It was written by ema_optax {version}: "
                f"pip install 'ema-optax>={version}'."
            )
        version, processes = (
            _of(content, "version", str),
            _of(content, "processes", int),
        )
        averages: dict[str, object] = _of(content, "averages", dict)
        trees: dict[str, object] = _of(content, "trees", dict)
        if processes < 1:
            raise CorruptCheckpointError(f"'processes' is {brief(processes)}")
        if not trees:
            raise CorruptCheckpointError("it has no trees")
        extra = content.get("extra")
        if is_deep(extra):
            raise CorruptCheckpointError(f"'extra' is nested more than {DEPTH} deep")
        for name in set(averages) - set(trees):
            raise CorruptCheckpointError(
                f"it has an average {brief(name)} and no such tree"
            )
        entries = {name: _tree(name, tree, averages) for name, tree in trees.items()}
        return cls(number, _version(version), processes, entries, cast("Json", extra))


def tree_of(name: str) -> str:
    """Name of a shadow's tree on disk: `shadow/NAME`, or `shadow` without a name."""
    return f"{SHADOW}/{name}" if name else SHADOW


def name_of(tree: str) -> str:
    """Name of the shadow in a tree, as `tree_of` was given."""
    return tree.removeprefix(SHADOW).removeprefix("/")


def parse_sums(content: object) -> Sums:
    """Makes checksums of a stranger's JSON, or raises `CorruptCheckpointError`."""
    if not is_object(content):
        raise CorruptCheckpointError("it holds no trees")
    sums: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for tree, leaves in content.items():
        if not is_object(leaves):
            raise CorruptCheckpointError(f"its tree {brief(tree)} has no leaves")
        sums[tree] = {}
        for path, pieces in leaves.items():
            parsed = _pieces(pieces)
            if parsed is None:
                raise CorruptCheckpointError(
                    f"the pieces of {brief(path)} are not bounds and a checksum"
                )
            sums[tree][path] = parsed
    return sums


def manifest_path(item: epath.Path) -> epath.Path:
    """Where the manifest of an item lies."""
    return item / FOLDER / "manifest.json"


def checksums_path(item: epath.Path, process: int) -> epath.Path:
    """Where one process writes its checksums."""
    return item / FOLDER / "checksums" / f"{process}.json"


def write_manifest(item: epath.Path, manifest: Manifest) -> None:
    """Writes the manifest of an item.

    Raises:
        ValueError: If it is larger than what is read.
        TypeError: If a decay is, or holds, a plain callable.
    """
    write_sealed(manifest_path(item), manifest.to_json())


def write_sums(item: epath.Path, process: int, sums: Sums) -> None:
    """Writes the checksums of one process.

    Raises:
        ValueError: If they are larger than what is read.
    """
    write_sealed(checksums_path(item, process), sums)


def read_manifest(item: epath.Path) -> Manifest:
    """Reads the manifest of an item.

    Raises:
        CorruptCheckpointError: If it is missing or damaged.
        ValueError: If a newer version of this library wrote it, or another one.
    """
    if not (item / FOLDER).is_dir():
        raise ValueError(
            f"{item} was not saved by ema_optax, or its folder '{FOLDER}' is gone."
        )
    path = manifest_path(item)
    content = read_sealed(path)
    try:
        return Manifest.parse(content)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(
            f"{path} is no manifest of ema_optax: {error}."
        ) from None
    except ValueError as error:
        raise ValueError(f"{item} {error}") from None


def read_sums(item: epath.Path, manifest: Manifest) -> Sums:
    """Reads the checksums of all processes.

    Raises:
        CorruptCheckpointError: If they are missing, damaged, or of other trees.
    """
    merged: dict[str, dict[str, tuple[Piece, ...]]] = {t: {} for t in manifest.trees}
    for process in range(manifest.processes):
        path = checksums_path(item, process)
        content = read_sealed(path)
        try:
            sums = parse_sums(content)
            if not set(sums) <= set(merged):
                raise CorruptCheckpointError(
                    "they are of trees that the manifest has not"
                )
        except CorruptCheckpointError as error:
            raise CorruptCheckpointError(
                f"{path} holds no checksums: {error}."
            ) from None
        for tree, leaves in sums.items():
            for leaf, pieces in leaves.items():
                merged[tree][leaf] = merged[tree].get(leaf, ()) + pieces
    return merged


def write_sealed(path: epath.Path, content: object) -> None:
    """Writes JSON with a checksum of its own, and the folders above it.

    Raises:
        ValueError: If it is larger than what is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, sort_keys=True)
    sealed = json.dumps({"xxh3": _seal(text), "content": content})
    if len(sealed) > LIMIT:  # ASCII
        raise ValueError(
            f"{path} would have {len(sealed):,} bytes, and at most {LIMIT:,} are "
            "read. There are too many leaves to describe, or extra is too large: save "
            "what is large as arrays in params."
        )
    path.write_text(sealed)


def read_sealed(path: epath.Path) -> object:
    """Reads what `write_sealed` wrote.

    Raises:
        CorruptCheckpointError: If it is missing, damaged, or was edited.
    """
    try:
        sealed = json.loads(read_text(path))
        content = sealed["content"]
        if _seal(json.dumps(content, sort_keys=True)) != sealed["xxh3"]:
            raise ValueError("its own checksum does not match")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{path} cannot be trusted: {one_line(error)}."
        ) from error
    return content


def _seal(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _of(content: Mapping[str, object], key: str, kind: type[T]) -> T:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CorruptCheckpointError(f"'{key}' is missing or no {kind.__name__}")
    return value


def _version(value: object) -> str:
    # Users see it in a command that they may copy into a shell.
    if isinstance(value, str) and _VERSION.fullmatch(value):
        return value
    raise CorruptCheckpointError(f"'version' is no version: {brief(value)}")


def _tree(name: str, tree: object, averages: Mapping[str, object]) -> TreeEntry:
    average, what = None, "tree"
    try:
        check_place(name)
        if name in averages:
            what = "average"
            average, what = AverageEntry.parse(averages[name]), "tree"
        return TreeEntry.parse(tree, average)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"its {what} {brief(name)} {error}") from None


def _pieces(value: object) -> tuple[Piece, ...] | None:
    if not is_list(value):
        return None
    pieces: list[Piece] = []
    for piece in value:
        match piece:
            case [[*bounds], str(xxh3)] if all(map(_is_pair, bounds)):
                pairs = cast("list[list[int]]", bounds)
                pieces.append(Piece(tuple((a, b) for a, b in pairs), xxh3))
            case _:
                return None
    return tuple(pieces)


def _is_pair(value: object) -> bool:
    match value:
        case [a, b] if is_whole(a) and is_whole(b):
            return 0 <= a <= b < BYTES
        case _:
            return False
