"""Writes the files of an export: reads leaf by leaf, and writes file by file."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ema_optax import checkpoint
from ema_optax._interop.appearing import INDEX
from ema_optax._interop.export_plan import Tensor
from ema_optax._interop.moves import Move


class Reader:
    """Reads leaves of a tree, each when it is asked for, and rounds them.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        OverflowError: If a value is too large for the dtype.
    """

    def __init__(
        self, description: checkpoint.Description, tree: str, dtype: np.dtype | None
    ) -> None:
        self._description, self._tree, self._dtype = description, tree, dtype
        self._source = checkpoint.stored(description.path, tree)
        self._others: dict[str, np.ndarray] = {}

    def prepare(self, paths: Sequence[str]) -> None:
        """Reads the leaves of one file that are not floating numbers, all at once."""
        leaves = self._source.entries
        others = {p: _like(leaves[p]) for p in paths if p not in self._source.leaves}
        self._others = (
            checkpoint.restore(self._description.path, "params", others)
            if others
            else {}
        )

    def __call__(self, path: str) -> np.ndarray:
        """Returns a leaf by its path."""
        array = self._others.get(path)
        if array is None:
            array = self._read(path)
        return _rounded(np.asarray(array), self._dtype, path)

    def _read(self, path: str) -> np.ndarray:
        leaf = self._source.entries[path]
        try:
            return self._source.read(path, (slice(None),) * len(leaf.shape))
        except checkpoint.CorruptCheckpointError:
            # The error of `restore` names the newest step that is whole.
            is_own = path in self._description.trees[self._tree].leaves
            tree = self._tree if is_own else "params"
            checkpoint.restore(self._description.path, tree, {path: _like(leaf)})
            raise


def _rounded(array: np.ndarray, dtype: np.dtype | None, path: str) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):  # the error below names the leaf
        cast = array.astype(dtype)
    if not (np.isfinite(cast) | ~np.isfinite(array)).all():
        raise OverflowError(
            f"'{path}' does not fit {dtype.name}: it holds values beyond "
            f"{float(jnp.finfo(dtype).max):g}. Pass dtype='bfloat16', or none at all."
        )
    return cast


def write(
    save_file: Callable[..., None],
    reader: Reader,
    plan: Sequence[tuple[Tensor, Move]],
    folder: Path,
    metadata: Mapping[str, str],
    report: Callable[[], None],
) -> None:
    """Writes the files of a tree, each when its tensors are read.

    Args:
        save_file: `safetensors.numpy.save_file`.
        reader: Reads the leaves of the tree.
        plan: Tensors of the tree, in the order of their files.
        folder: A folder that exists.
        metadata: Texts for each file's header.
        report: Called after each tensor.
    """
    for file, group in itertools.groupby(plan, lambda pair: pair[0].file):
        pairs = list(group)
        reader.prepare([path for tensor, _ in pairs for path in tensor.paths])
        tensors: dict[str, np.ndarray] = {}
        leaves: dict[str, np.ndarray] = {}
        for tensor, move in pairs:
            # Tensors split from one leaf follow each other: one reading serves all.
            leaves = {p: leaves[p] for p in tensor.paths if p in leaves}
            for path in tensor.paths:
                if path not in leaves:
                    leaves[path] = reader(path)
            array = move([leaves[path] for path in tensor.paths])
            # safetensors writes the memory as it lies, whatever the strides.
            tensors[tensor.name] = np.asarray(array, order="C")
            report()
        leaves.clear()
        save_file(tensors, folder / file, metadata=dict(metadata))


def write_index(
    tensors: Sequence[Tensor], folder: Path, name: str, metadata: Mapping[str, str]
) -> None:
    """Writes an index of which file holds which tensor, where there are several."""
    files = {tensor.name: tensor.file for tensor in tensors}
    if len(set(files.values())) == 1:
        return
    size = sum(tensor.bytes for tensor in tensors)
    index = {"metadata": {"total_size": size, **metadata}, "weight_map": files}
    text = json.dumps(index, indent=2)
    (folder / f"{name}{INDEX}").write_text(f"{text}\n", encoding="utf-8")


def _like(leaf: checkpoint.Leaf) -> np.ndarray:
    """Makes a slot for a leaf that takes no memory, and keeps 64 bits."""
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf.dtype)), leaf.shape)
