"""Trees on disk as sources of sums: parts of leaves are read when they are needed."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ema_optax._checkpoint.checksums import bounds_of
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.leaves import Place, Reader
from ema_optax._checkpoint.manifest import PARAMS, Manifest, read_manifest, read_sums
from ema_optax._checkpoint.rescue import explained
from ema_optax._checkpoint.restoring import chosen, sources_of
from ema_optax._checkpoint.steps import find_step
from ema_optax._messages import arguments
from ema_optax.reconstruction import Source

# Nothing is searched for: one process alone may have met the damage.
_RESCUE = "Leave this step out of what is summed; the others are not affected."


def stored(
    directory: epath.PathLike,
    tree: str = "shadow",
    *,
    step: int | None = None,
    item: str | None = None,
    verify: bool = True,
) -> "StoredTree":
    """Returns a tree of a checkpoint as a source for `reconstruction.merge`.

    Nothing but the manifest is read yet. A shadow is the whole model: leaves that are
    not averaged are those of the params.

    Args:
        directory: The folder of a run, or of one step of it.
        tree: `"params"`, `"shadow"`, or the name of a shadow: `"fast"`, in full
            `"shadow/fast"`.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several.
        verify: Whether to compare what is read with its checksums.

    Raises:
        CorruptCheckpointError: Here or on reading, if data is not what was saved.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it has no such tree.

    >>> import tempfile, ema_optax
    >>> from ema_optax import checkpoint, reconstruction
    >>> params = {"w": jnp.zeros(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder, params, opt_state, step=1)
    ...     checkpoint.save(folder, {"w": jnp.ones(2)}, opt_state, step=2)
    ...     last = [stored(folder, "params", step=step) for step in (1, 2)]
    ...     reconstruction.merge(last, reconstruction.uniform_coefficients(2))
    {'w': Array([0.5, 0.5], dtype=float32)}
    """
    arguments.a_name(tree, "tree", "shadow")
    verify = arguments.flag(verify, "verify")
    found = find_step(directory, step, item).item
    try:
        described = read_manifest(found)
    except CorruptCheckpointError as error:
        raise explained(found, error, _RESCUE) from error
    places = sources_of(described, chosen(described, tree))
    return StoredTree(found, described, places, verify=verify)


class StoredTree(Source):
    """Floating and complex leaves on disk, as `stored` and `snapshots` give them.

    Attributes:
        leaves: Shape and dtype of each, by path.
        entries: What is on disk of each leaf of the model, others among them.
        averaged: Paths of the leaves that a shadow has itself; the others are those of
            the params.
    """

    def __init__(
        self,
        item: epath.Path,
        manifest: Manifest,
        places: Mapping[str, Place],
        *,
        verify: bool,
    ) -> None:
        self._item, self._manifest, self._verify = item, manifest, verify
        self._places = {}
        self.leaves = {}
        self.entries = {path: manifest.leaf(place) for path, place in places.items()}
        self.averaged = frozenset(
            path for path, place in places.items() if place.tree != PARAMS
        )
        for path, place in places.items():
            entry = self.entries[path]
            if jnp.issubdtype(jnp.dtype(entry.dtype), jnp.inexact):
                self._places[path] = place
                self.leaves[path] = jax.ShapeDtypeStruct(entry.shape, entry.dtype)

    def __repr__(self) -> str:
        return f"StoredTree({str(self._item)!r}, {len(self.leaves)} leaves)"

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a leaf, verified.

        A piece that the checksums cover is read whole where the part cuts through it.

        Raises:
            CorruptCheckpointError: If it is not what was saved.
            MemoryError, PermissionError, OSError: If something else keeps it from
                being read.
        """
        place = self._places[path]
        part = bounds_of(index, self.leaves[path].shape)
        try:
            ((_, parts),) = self._reader.stream({place: [part]})
        except CorruptCheckpointError as error:
            raise explained(self._item, error, _RESCUE) from error
        return parts[part]

    def fingerprint(self) -> bytes:
        """Returns what tells its leaves from those of others: their checksums."""
        sums = read_sums(self._item, self._manifest)
        known = [
            (path, leaf.dtype, leaf.shape, sums[place.tree].get(place.path))
            for path, leaf in sorted(self.leaves.items())
            for place in [self._places[path]]
        ]
        return repr(known).encode()

    def check_size(self) -> None:
        """Compares the bytes that its leaves should have with those of its files.

        Raises:
            CorruptCheckpointError: If the files cannot hold them.
        """
        try:
            _ = self._reader
        except CorruptCheckpointError as error:
            raise explained(self._item, error, _RESCUE) from error

    @functools.cached_property
    def _reader(self) -> Reader:
        places = list(self._places.values())
        return Reader(self._item, self._manifest, places, verify=self._verify)
