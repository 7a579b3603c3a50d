"""Arrays that are a folder of zarr each, as axlearn and Levanter write them.

They do so through JAX's own serialization of arrays.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._checkpoint.errors import CorruptCheckpointError, as_cause
from ema_optax._checkpoint.foreign import (
    Foreign,
    Leaf,
    Node,
    is_too_deep,
    leaf_at,
    leaves_of,
    read_json,
)
from ema_optax._checkpoint.opening import key_value_store
from ema_optax._checkpoint.untrusted import refusal

ARRAY = ".zarray"

_AXLEARN = "gda"  # the folder of a step in which axlearn keeps its arrays


class ArrayFolders(Foreign):
    """The arrays below a folder, each by the folders that lead to it."""

    def __init__(self, place: epath.Path, number: int | None) -> None:
        """Reads what arrays there are; see `Foreign`."""
        entries = storage.listed(place) or {}
        root = place / _AXLEARN if entries.get(_AXLEARN) else place
        problem = refusal(root, 0)
        if problem:
            raise CorruptCheckpointError(f"{root} is not read: {problem}.")
        self._root = root
        tree = _tree(root, ()) or {}
        super().__init__(str(place), "a folder of zarr arrays", number, tree)

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the arrays of some paths; see `Foreign`."""
        for path in paths:
            try:
                array = _opened(self._root / path).read().result()
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                what = f"{self._root}: '{path}' cannot be read"
                raise as_cause(error, what) from error
            yield path, np.asarray(array)


def has_arrays(folder: epath.Path) -> bool:
    """Returns whether there is an array below a folder."""
    return next(iter(leaves_of(_tree(folder, (), first=True))), None) is not None


def _tree(folder: epath.Path, keys: tuple[str, ...], first: bool = False) -> Node:
    """Returns the arrays below a folder; with `first` no more than one."""
    entries = storage.listed(folder) or {}
    if ARRAY in entries:
        return _leaf(folder, keys)
    if is_too_deep(keys):
        raise CorruptCheckpointError(f"{folder} lies too deep for a tree of arrays.")
    found: dict[str, Node] = {}
    for name in sorted(entries):
        below = _tree(folder / name, (*keys, name), first) if entries[name] else None
        if below:
            found[name] = below
            if first:
                break
    return found


def _leaf(folder: epath.Path, keys: tuple[str, ...]) -> Leaf:
    told = read_json(folder / ARRAY)
    shape, dtype = told.get("shape"), told.get("dtype")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CorruptCheckpointError(f"{folder} is an array of no shape.")
    try:
        name = dtype if dtype == "bfloat16" else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    return leaf_at(keys, shape, str(name), str(folder))


def _opened(folder: epath.Path) -> Any:
    spec = {"driver": "zarr", "kvstore": key_value_store(folder)}
    return ts.open(spec, open=True, read=True).result()
