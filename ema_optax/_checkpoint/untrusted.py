"""Bounds on what a stranger wrote: files, paths, dtypes, and how deep JSON is."""

# pyright: strict

import functools
import os
import stat
from collections.abc import Iterator
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from etils import epath  # pyright: ignore[reportMissingTypeStubs]

from ema_optax._checkpoint import storage

LIMIT = 2**26  # bytes of a JSON file: some 300,000 leaves; Python makes 20 times of it
DEPTH = 100  # of nested containers; each costs its reader a few frames

_LONGEST = 4096  # characters of a path
_NUMBERS = "biufc"  # kinds of NumPy's dtypes; those of ml_dtypes are "V" with a name
# Bytes of leaves for each byte on disk. Arrays are stored as they are; only those below
# 1 kB may lie compressed in OCDBT's nodes, beside 30 bytes of a checksum for each.
_FACTOR = 64
_SMALL = 2**20  # bytes of leaves that are never too many


def read_text(path: epath.Path) -> str:
    """Reads a text file of at most `LIMIT` bytes.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no file, is larger, or is no text.
    """
    data = storage.read(path, LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"it has more than {LIMIT:,} bytes")
    return data.decode()


def refusal(folder: epath.Path, claimed: int) -> str | None:
    """Says why the files of a folder must not be read, or None.

    A pipe would never end. A checkpoint that claims far more elements than its files
    have bytes would fill the memory with them.

    Args:
        folder: A local one. Of a remote one nothing is known: it has no pipes.
        claimed: Bytes of the leaves to read.
    """
    if storage.is_remote(folder):
        return None
    size, left = 0, [os.fspath(folder)]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                try:
                    mode = entry.stat()
                except OSError as error:  # such as a link to nothing, or to itself
                    return f"{entry.path} cannot be read: {error.strerror}"
                if stat.S_ISDIR(mode.st_mode):
                    if entry.is_symlink():  # may lead to a folder above
                        return f"{entry.path} is a link to a folder"
                    left.append(entry.path)
                elif stat.S_ISREG(mode.st_mode):
                    size += mode.st_size
                else:
                    return f"{entry.path} is no file"
    if claimed > _FACTOR * size + _SMALL:
        return f"its leaves have {claimed:,} bytes, and its files {size:,}"
    return None


def misplaced(path: str) -> str | None:
    """Says why a path cannot be that of a leaf, or None.

    Keys may hold slashes, as Haiku's do; as a whole a path must not lead elsewhere.
    """
    keys = path.split("/")
    if "\0" in path:
        return "holds a NUL"
    if path.startswith("/") or ".." in keys:
        return "leads out of the checkpoint"
    if len(keys) > DEPTH or len(path) > _LONGEST:
        return f"has more than {DEPTH} keys or {_LONGEST} characters"
    return None


def nodes(value: object) -> Iterator[tuple[object, int]]:
    """Yields a JSON value and all inside it with their depths; stops below `DEPTH`."""
    left = [(value, 0)]
    while left:
        node, depth = left.pop()
        yield node, depth
        below = node.values() if is_object(node) else node if is_list(node) else ()
        if depth <= DEPTH:
            left += [(child, depth + 1) for child in below]


def is_deep(value: object) -> bool:
    """Whether lists and dicts are nested more than `DEPTH` deep."""
    return any(depth > DEPTH for _, depth in nodes(value))


def is_object(value: object) -> TypeGuard[dict[str, object]]:
    """Whether JSON is an object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[object]]:
    """Whether JSON is a list."""
    return isinstance(value, list)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether JSON is a whole number; true is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def itemsize(dtype: str) -> int | None:
    """Bytes of a dtype of numbers by its name; None of anything else."""
    return _itemsize(dtype) if len(dtype) < 64 else None


@functools.lru_cache(maxsize=64)
def _itemsize(dtype: str) -> int | None:
    try:
        known = jnp.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        return None
    is_number = known.kind in _NUMBERS or jnp.issubdtype(known, np.number)
    return known.itemsize if is_number and known.name == dtype else None
