"""What a checkpoint says of itself on disk, sealed against damage.

`manifest.json` is written by process 0; each process adds the checksums of what it
wrote. Both are JSON objects `{"xxh3": …, "content": …}`, and hold no code.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash
from etils import epath

from ema_optax.checkpoint import files
from ema_optax.checkpoint.wellformed import malformed, malformed_sums

FORMAT = 1  # of everything that this library writes; raised when older ones cannot read
FOLDER = "ema_optax"  # inside the item, beside the raw params
LIBRARY = "ema_optax"


class CorruptCheckpointError(ValueError):
    """Data on disk is not what was saved: flipped bits, missing or truncated files."""


def manifest_path(item: epath.Path) -> epath.Path:
    """Returns where the manifest of an item lies."""
    return item / FOLDER / "manifest.json"


def checksums_path(item: epath.Path, process: int) -> epath.Path:
    """Returns where one process writes its checksums."""
    return item / FOLDER / "checksums" / f"{process}.json"


def write_sealed(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON with a checksum of its own, and the folders above it.

    Raises:
        ValueError: If it is larger than what is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, sort_keys=True)
    sealed = json.dumps({"xxh3": _seal(text), "content": content})
    if len(sealed) > files.LIMIT:  # ASCII
        raise ValueError(
            f"{path} would have {len(sealed):,} bytes, and at most {files.LIMIT:,} are "
            "read. There are too many leaves to describe, or extra is too large: save "
            "what is large as arrays in params."
        )
    path.write_text(sealed)


def read_sealed(path: epath.Path) -> Any:
    """Returns what `write_sealed` wrote.

    Raises:
        CorruptCheckpointError: If it is missing, damaged, or was edited.
    """
    try:
        sealed = json.loads(files.text(path))
        content = sealed["content"]
        if _seal(json.dumps(content, sort_keys=True)) != sealed["xxh3"]:
            raise ValueError("its own checksum does not match")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{path} cannot be trusted: {str(error)[:300]}."
        ) from error
    return content


def read_manifest(item: epath.Path) -> dict[str, Any]:
    """Returns the manifest of an item.

    Raises:
        CorruptCheckpointError: If it is missing or damaged.
        ValueError: If a newer version of this library wrote it, or another one.
    """
    if not (item / FOLDER).is_dir():
        raise ValueError(
            f"{item} was not saved by ema_optax, or its folder '{FOLDER}' is gone."
        )
    manifest = read_sealed(manifest_path(item))
    wrong = malformed(manifest, FORMAT)
    if wrong:
        raise CorruptCheckpointError(
            f"{manifest_path(item)} is no manifest of ema_optax: {wrong}."
        )
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{item} has format {manifest['format']}, this version of ema_optax reads "
            f"up to {FORMAT}. It was written by ema_optax {manifest['version']}: "
            f"pip install 'ema-optax>={manifest['version']}'."
        )
    return manifest


def read_checksums(item: epath.Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checksums of all processes: tree → path → pieces of that leaf.

    Raises:
        CorruptCheckpointError: If they are missing, damaged, or of other trees.
    """
    merged: dict[str, Any] = {name: {} for name in manifest["trees"]}
    for process in range(manifest["processes"]):
        file = checksums_path(item, process)
        content = read_sealed(file)
        wrong = malformed_sums(content)
        if wrong is None and not set(content) <= set(merged):
            wrong = "they are of trees that the manifest has not"
        if wrong:
            raise CorruptCheckpointError(f"{file} holds no checksums: {wrong}.")
        for name, leaves in content.items():
            for path, pieces in leaves.items():
                merged[name].setdefault(path, []).extend(pieces)
    return merged


def _seal(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
