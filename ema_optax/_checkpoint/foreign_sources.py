"""Trees that other programs saved as sources of sums: a few leaves read at a time."""

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

# Read at once, for Orbax parses the metadata of a step for each call: a share of the
# tree, so that many steps together hold few trees, within bounds.
_SHARE, _LEAST, _MOST = 16, 2**20, 2**25


def stored_by_others(
    directory: epath.PathLike, tree: str | None = None, *, step: int | None = None
) -> "ForeignTree":
    """Returns a tree that another program saved, as a source for merging.

    Read are the checkpoints that `adopt` reads, such as the steps of Orbax. They keep
    no checksums: what is read is not verified. Nothing but metadata is read yet.

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
    found = opened(directory, step)
    return ForeignTree(found, pairing.params_alone(found, tree, argument="tree"))


class ForeignTree(Source):
    """A tree that another program saved.

    Attributes:
        leaves: Shape and dtype of every leaf that is averaged, by path.
        tree: Its path in the step.
        others: Paths of the leaves that are not averaged.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]

    def __init__(self, found: Foreign, choice: pairing.Choice) -> None:
        self._found, self.tree = found, choice.params
        # In the order in which JAX walks through dicts, in which sums ask for them.
        order = sorted(choice.leaves, key=lambda path: path.split("/"))
        self._leaves = {path: choice.leaves[path] for path in order}
        self.leaves = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self._leaves.items()
            if leaf.is_averaged
        }
        self.others = tuple(path for path in order if path not in self.leaves)
        self._held: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        size = sum(self._leaves[path].bytes for path in self.leaves)
        self._at_once = min(max(size // _SHARE, _LEAST), _MOST)

    def __repr__(self) -> str:
        return f"ForeignTree({self._found.place!r}, {len(self.leaves)} leaves)"

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a leaf; it is read whole, with the next ones.

        Raises:
            CorruptCheckpointError: If it is damaged or missing.
            OSError: If something else keeps it from being read.
        """
        with self._lock:
            if path not in self._held:
                self._held = {}  # let go of before more is read
                self._held = self._read(list(self._from(path)))
            return self._held[path][index]

    def read_others(self) -> dict[str, np.ndarray]:
        """Returns the leaves that are not averaged, by path."""
        return self._read(self.others)

    def _from(self, path: str) -> Iterator[str]:
        """Yields a leaf and those that are asked for next, as many as are read."""
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
        return {names[path]: array for path, array in self._found.read(list(names))}
