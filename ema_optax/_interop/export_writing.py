"""The files of an export: leaves read one by one, and tensors written file by file."""

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
    """Leaves of a tree, rounded, each read when it is asked for.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        OverflowError: If a value is too large for the dtype.
    """

    def __init__(
        self, found: checkpoint.Description, tree: str, dtype: np.dtype | None
    ) -> None:
        self._found, self._tree, self._dtype = found, tree, dtype
        self._source = checkpoint.stored(found.path, tree)
        self._others: dict[str, np.ndarray] = {}

    def prepare(self, paths: Sequence[str]) -> None:
        """Reads what is no floating number, of one file at once."""
        leaves = self._source.entries
        others = {p: _like(leaves[p]) for p in paths if p not in self._source.leaves}
        self._others = (
            checkpoint.restore(self._found.path, "params", others) if others else {}
        )

    def __call__(self, path: str) -> np.ndarray:
        """Returns a leaf."""
        array = self._others.get(path)
        if array is None:
            array = self._read(path)
        return _rounded(np.asarray(array), self._dtype, path)

    def _read(self, path: str) -> np.ndarray:
        leaf = self._source.entries[path]
        try:
            return self._source.read(path, (slice(None),) * len(leaf.shape))
        except checkpoint.CorruptCheckpointError:
            # Read again by what names the newest step that is whole.
            own = path in self._found.trees[self._tree].leaves
            tree = self._tree if own else "params"
            checkpoint.restore(self._found.path, tree, {path: _like(leaf)})
            raise


def _rounded(array: np.ndarray, dtype: np.dtype | None, path: str) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):  # said below, with the name
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
    done: Callable[[], None],
) -> None:
    """Writes the files of a tree, each when its tensors are read.

    Args:
        save_file: Of safetensors.
        reader: Of the tree.
        plan: Its tensors, in the order of their files.
        folder: That is there.
        metadata: In each file's header.
        done: Called after each tensor.
    """
    for file, group in itertools.groupby(plan, lambda pair: pair[0].file):
        pairs = list(group)
        reader.prepare([path for tensor, _ in pairs for path in tensor.paths])
        tensors: dict[str, np.ndarray] = {}
        leaves: dict[str, np.ndarray] = {}
        for tensor, move in pairs:
            # Those of the tensor before, where it is made of the same.
            leaves = {p: leaves[p] for p in tensor.paths if p in leaves}
            for path in tensor.paths:
                if path not in leaves:
                    leaves[path] = reader(path)
            made = move([leaves[path] for path in tensor.paths])
            # safetensors takes the memory as it lies.
            tensors[tensor.name] = np.asarray(made, order="C")
            done()
        leaves.clear()
        save_file(tensors, folder / file, metadata=dict(metadata))


def write_index(
    tensors: Sequence[Tensor], folder: Path, name: str, metadata: Mapping[str, str]
) -> None:
    """Writes which file holds which tensor, where there are several files."""
    files = {tensor.name: tensor.file for tensor in tensors}
    if len(set(files.values())) == 1:
        return
    size = sum(tensor.bytes for tensor in tensors)
    told = {"metadata": {"total_size": size, **metadata}, "weight_map": files}
    text = json.dumps(told, indent=2)
    (folder / f"{name}{INDEX}").write_text(f"{text}\n", encoding="utf-8")


def _like(leaf: checkpoint.Leaf) -> np.ndarray:
    """Returns a slot for a leaf that takes no memory, and keeps 64 bits."""
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf.dtype)), leaf.shape)
