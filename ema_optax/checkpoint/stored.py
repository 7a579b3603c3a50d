"""A tree on disk whose leaves are read one by one, when they are needed.

For sums over many checkpoints, which Orbax would read whole. TensorStore reads what
Orbax wrote: one OCDBT store a folder, one zarr array a leaf, its keys joined by dots.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ema_optax.checkpoint import arrays, checksums, files, manifest
from ema_optax.checkpoint.manifest import CorruptCheckpointError
from ema_optax.checkpoint.reading import Place, claimed, stored_leaf
from ema_optax.checkpoint.restoring import sources_of
from ema_optax.checkpoint.steps import explained, find_step
from ema_optax.reconstruction import Source

# Nothing is searched for: one process alone may have met the damage.
_RESCUE = "Leave this step out of what is summed; the others are not affected."


def stored(
    directory: Any,
    tree: str = "shadow",
    *,
    step: int | None = None,
    verify: bool = True,
) -> "StoredTree":
    """Returns a tree of a checkpoint as a source for `reconstruction.merge`.

    Nothing but the manifest is read yet. A shadow is the whole model: leaves that are
    not averaged are those of the params.

    Args:
        directory: The folder of a run, or of one step of it.
        tree: `"params"`, `"shadow"`, or `"shadow/NAME"`.
        step: Number of the step; None for the newest that was committed.
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
    item = find_step(directory, step).item
    try:
        described = manifest.read_manifest(item)
    except CorruptCheckpointError as error:
        raise explained(item, error, _RESCUE) from error
    places = sources_of(described, tree)
    return StoredTree(item, described, places, verify=verify)


class StoredTree(Source):
    """Floating and complex leaves on disk, as `stored` and `snapshots` give them.

    Attributes:
        leaves: Shape and dtype of each, by path.
    """

    def __init__(
        self,
        item: epath.Path,
        described: Mapping[str, Any],
        places: Mapping[str, Place],
        *,
        verify: bool,
    ) -> None:
        self._item, self._described, self._verify = item, described, verify
        self._places = {}
        self.leaves = {}
        for path, place in places.items():
            leaf = stored_leaf(described, place)
            if jnp.issubdtype(jnp.dtype(leaf["dtype"]), jnp.inexact):
                self._places[path] = place
                self.leaves[path] = jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])

    def __repr__(self) -> str:
        return f"StoredTree({str(self._item)!r}, {len(self.leaves)} leaves)"

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of a leaf, verified.

        A piece that the checksums cover is read whole where the part cuts through it.

        Raises:
            CorruptCheckpointError: If it cannot be read, or is not what was saved.
        """
        place = self._places[path]
        try:
            return self._read(place, index)
        except CorruptCheckpointError as error:
            raise explained(self._item, error, _RESCUE) from error
        except (ValueError, OSError) as error:  # TensorStore's, of several pages
            text = " ".join(str(error).split())[:300]
            wrong = self._wrong(place, f"it cannot be read: {text}")
            raise explained(self._item, wrong, _RESCUE) from error

    def _read(self, place: Place, index: tuple[slice, ...]) -> np.ndarray:
        if self._files_wrong:
            raise self._wrong(place, self._files_wrong)
        array = self._open(place)
        stored = stored_leaf(self._described, place)
        unlike = arrays.unlike(array.spec().to_json()["metadata"], stored)
        if unlike:
            raise self._wrong(place, unlike)
        if not self._verify:
            return np.asarray(array[index].read().result())
        whole = (slice(None),) * len(stored["shape"])
        pieces = self._sums[place.tree].get(place.path, [])
        within = checksums.part(pieces, index, stored["shape"])
        chosen, expected = (index, within) if within else (whole, pieces)
        data = np.asarray(array[chosen].read().result())
        wrong = checksums.mismatch(data, stored["dtype"], expected)
        if wrong:
            raise self._wrong(place, wrong)
        return data if within else data[index]

    def _wrong(self, place: Place, wrong: str) -> CorruptCheckpointError:
        leaf = f"leaf '{place.path}' of the {place.tree}"
        return CorruptCheckpointError(f"{self._item}: {leaf}: {wrong}.")

    @functools.cached_property
    def _sums(self) -> Mapping[str, Any]:
        return manifest.read_checksums(self._item, self._described)

    def _open(self, place: Place) -> Any:
        keys = self._names[place.tree][place.path]
        return arrays.opened(self._item, place.tree, keys, self._context).result()

    @functools.cached_property
    def _files_wrong(self) -> str | None:
        places = set(self._places.values())
        return files.wrong(self._item, claimed(self._described, places))

    @functools.cached_property
    def _context(self) -> Any:
        return arrays.context()

    @functools.cached_property
    def _names(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Tree → path → the keys that Orbax nests the leaf under."""
        described = self._described["trees"].items()
        return {name: arrays.names(tree["structure"]) for name, tree in described}
