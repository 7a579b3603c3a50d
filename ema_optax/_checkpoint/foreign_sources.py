"""Trees of other programs as sources of sums, read a few leaves at a time."""

import threading
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from ema_optax._checkpoint import pairing
from ema_optax._checkpoint.foreign import Foreign, Leaf
from ema_optax._checkpoint.foreign_steps import opened
from ema_optax._messages import arguments
from ema_optax.reconstruction import Source

# A sixteenth of a tree is read at once, within 1 MiB and 32 MiB: Orbax parses the
# metadata of a step for each call, and the steps of a sum are in memory together.
_SHARE, _LEAST, _MOST = 16, 2**20, 2**25


def stored_by_others(
    directory: epath.PathLike, tree: str | None = None, *, step: int | None = None
) -> "ForeignTree":
    """Opens a tree that another program saved, as a source for `reconstruction.merge`.

    Reads the checkpoints that `adopt` reads, such as steps of Orbax. They keep no
    checksums, so nothing is verified. Only metadata is read until values are needed.

    Args:
        directory: The folder of a run, or of one step of it, also `gs://…`.
        tree: Path of the tree in the step, such as `"params"` or `"state/params"`;
            `"/"` is all of it. None finds the params, if that is unmistakable.
        step: Number of the step; None for the newest that was committed.

    Raises:
        CorruptCheckpointError: Here or on reading, if it is damaged.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is one of ours, or has no such tree.

    >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
    >>> from ema_optax import checkpoint, reconstruction
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:
    ...         for step in (1, 2):
    ...             state = {"params": {"w": jnp.full(2, float(step))}, "step": step}
    ...             _ = manager.save(step, args=ocp.args.StandardSave(state))
    ...     last = [stored_by_others(folder, "params", step=step) for step in (1, 2)]
    ...     reconstruction.merge(last, "uniform")
    {'w': Array([1.5, 1.5], dtype=float32)}
    """
    if tree is not None:
        arguments.a_name(tree, "tree", "state/params")
    source = opened(directory, step)
    return ForeignTree(source, pairing.params_alone(source, tree, argument="tree"))


class ForeignTree(Source):
    """Reads a tree that another program saved, as a source of sums.

    Attributes:
        leaves: Shape and dtype of every leaf that is averaged, by path.
        tree: Its path in the step.
        others: Paths of the leaves that are not averaged.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]

    def __init__(self, found: Foreign, choice: pairing.Choice) -> None:
        self._source, self.tree = found, choice.params
        # In the order in which JAX walks through dicts, in which sums ask for them.
        order = sorted(choice.leaves, key=lambda path: path.split("/"))
        self._leaves = {path: choice.leaves[path] for path in order}
        self.leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self._leaves.items()
            if leaf.is_averaged
        }
        self.others = tuple(path for path in order if path not in self.leaves)
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        size = sum(self._leaves[path].bytes for path in self.leaves)
        self._at_once = min(max(size // _SHARE, _LEAST), _MOST)

    def __repr__(self) -> str:
        return f"ForeignTree({self._source.place!r}, {len(self.leaves)} leaves)"

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a leaf; it is read whole, with the next ones.

        Raises:
            CorruptCheckpointError: If it is damaged or missing.
            OSError: If something else keeps it from being read.
        """
        with self._lock:
            if path not in self._arrays:
                self._arrays = {}  # freed before more is read
                self._arrays = self._read(list(self._from(path)))
            return self._arrays[path][index]

    def read_others(self) -> dict[str, np.ndarray]:
        """Returns the leaves that are not averaged, by path."""
        return self._read(self.others)

    def _from(self, path: str) -> Iterator[str]:
        """Yields a leaf and the next ones in order, as many as are read at once."""
        order = list(self.leaves)
        size = 0
        for each in order[order.index(path) :]:
            size += self._leaves[each].bytes
            if each != path and size > self._at_once:
                return
            yield each

    def _read(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        leaves: dict[str, Leaf] = {path: self._leaves[path] for path in paths}
        names = {leaf.path: path for path, leaf in leaves.items()}
        if not names:
            return {}
        return {names[path]: array for path, array in self._source.read(list(names))}
