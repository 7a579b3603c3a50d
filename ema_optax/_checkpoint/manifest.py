"""The manifest and the checksums: as types, and as sealed files of an item.

`manifest.json` is written by process 0; each process adds the checksums of what it
wrote. Both are JSON objects `{"xxh3": …, "content": …}`, and hold no code.
"""

# pyright: strict

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TypeGuard, TypeVar, cast

from etils import epath  # pyright: ignore[reportMissingTypeStubs]

from ema_optax._checkpoint import storage
from ema_optax._checkpoint.entries import (
    AverageEntry,
    Json,
    LeafEntry,
    TreeEntry,
    check_place,
)
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.pieces import Piece, Sums, parse_sums
from ema_optax._checkpoint.sealed import read_sealed, write_sealed
from ema_optax._checkpoint.untrusted import DEPTH, is_deep, is_object, is_whole
from ema_optax._decays.decay import Decay
from ema_optax._messages.text import brief
from ema_optax._trees import naming

FORMAT = 2  # the newest that is read, written where leaves are verified block by block
WITHOUT_BLOCKS = 1  # written where no leaf is cut: earlier versions read it too
FOLDER = "ema_optax"  # inside the item, beside the raw params
LIBRARY = "ema_optax"
PARAMS, SHADOW, STATE = naming.PARAMS, naming.SHADOW, "state"

T = TypeVar("T")

_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")


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
        """The averages by the names of their trees."""
        return {n: t.average for n, t in self.trees.items() if t.average}

    def check_decays(self) -> None:
        """Refuses a manifest with a decay that cannot be read.

        Raises:
            ValueError: If there is one. The seal says that it is as it was written: by
                a newer version, or a stranger.
        """
        for name, average in self.averages.items():
            if average.unread is None:
                continue
            try:
                Decay.from_json(average.unread)
            except ValueError as error:
                raise ValueError(
                    f"The decay of {brief(name)} cannot be read: {error} If ema_optax "
                    f"{self.version}, which wrote it, is newer than this version: "
                    f"pip install 'ema-optax>={self.version}'."
                ) from None

    def leaf(self, place: tuple[str, str]) -> LeafEntry:
        """The entry of a leaf, by its tree and its path there."""
        tree, path = place
        return self.trees[tree].leaves[path]

    def to_json(self) -> dict[str, object]:
        """The content of `manifest.json`."""
        return {
            "format": self.format,
            "library": LIBRARY,
            "version": self.version,
            "processes": self.processes,
            "extra": self.extra,
            "averages": {n: entry.to_json() for n, entry in self.averages.items()},
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
        processes = _of(content, "processes", is_whole, "int")
        averages = _of(content, "averages", is_object, "dict")
        trees = _of(content, "trees", is_object, "dict")
        if processes < 1:
            raise CorruptCheckpointError(f"'processes' is {brief(processes)}")
        if not trees:
            raise CorruptCheckpointError("it has no trees")
        extra = content.get("extra")
        if is_deep(extra):
            raise CorruptCheckpointError(f"'extra' is nested more than {DEPTH} deep")
        entries = {name: _tree(name, tree, averages) for name, tree in trees.items()}
        for name in set(averages) - set(trees):
            raise CorruptCheckpointError(
                f"it has an average {brief(name)} and no such tree"
            )
        version = _version(content.get("version"))
        return cls(number, version, processes, entries, cast("Json", extra))


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
        OSError: If it may be whole, and cannot be read.
    """
    path = manifest_path(item)
    try:
        content = read_sealed(path)
    except CorruptCheckpointError:
        if (storage.listed(item) or {}).get(FOLDER):
            raise
        raise ValueError(
            f"{item} was not saved by ema_optax, or its folder '{FOLDER}' is gone."
        ) from None
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
        OSError: If they may be whole, and cannot be read.
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


def _of(
    content: Mapping[str, object],
    key: str,
    fits: Callable[[object], TypeGuard[T]],
    kind: str,
) -> T:
    value = content.get(key)
    if not fits(value):
        raise CorruptCheckpointError(f"'{key}' is missing or no {kind}")
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
