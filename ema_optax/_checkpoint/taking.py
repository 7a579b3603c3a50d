"""Which stored leaf each slot of a changed run takes, what starts, and what is left."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ema_optax._checkpoint.changes import Changes, called
from ema_optax._checkpoint.checksums import whole
from ema_optax._checkpoint.entries import LeafEntry
from ema_optax._checkpoint.leaves import Place, read
from ema_optax._checkpoint.manifest import PARAMS, STATE, Manifest
from ema_optax._checkpoint.restoring import check_fits
from ema_optax._checkpoint.targets import place_all, target_of

_MOST = 2**31 - 1  # where a count stays


class Slot(NamedTuple):
    """A leaf of this run: the name of its tree, its path there, and of which average.

    Several averages, of disjoint params, may be one tree.
    """

    tree: str
    path: str
    average: int = 0

    def __str__(self) -> str:
        return called(self.tree, self.path)


class Taking:
    """What becomes of each slot; first decided for all, then read.

    Attributes:
        started: Why a slot starts.
        leaves: What was read, or is known, by slot.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._takes: dict[Slot, tuple[Place, Any]] = {}
        self._counts: dict[Slot, str] = {}
        self._cast: dict[str, str] = {}
        self.started: dict[Slot, str] = {}
        self.leaves: dict[Slot, Any] = {}

    def offer(self, slot: Slot, leaf: Any, place: Place) -> bool:
        """Returns whether a slot takes a stored leaf: it does where shapes fit.

        Args:
            slot: Of this run.
            leaf: Of this run, concrete or abstract.
            place: Of the stored leaf, if there is one.

        Raises:
            ValueError: If floats and other numbers would be cast to each other. In the
                optimizer's own state such a leaf starts.
        """
        tree = self._manifest.trees.get(place.tree)
        entry = tree.leaves.get(place.path) if tree else None
        if entry is None:
            self.started[slot] = "not in the checkpoint"
            return False
        if entry.shape != tuple(np.shape(leaf)):
            self.started[slot] = f"{entry.shape} in the checkpoint"
            return False
        try:
            check_fits(entry, leaf, str(slot), exact=False)
        except ValueError:
            if slot.tree != STATE:
                raise
            self.started[slot] = f"{entry.dtype} in the checkpoint"
            return False
        self._takes[slot] = place, leaf
        dtype = str(getattr(leaf, "dtype", entry.dtype))
        if dtype != entry.dtype and not entry.is_key:
            self._cast[str(slot)] = f"{entry.dtype} → {dtype}"
        return True

    def takes(self, slot: Slot) -> bool:
        """Returns whether a slot takes a stored leaf."""
        return slot in self._takes

    def goes_on(self, tree: str, average: int) -> bool:
        """Returns whether a shadow takes any of its leaves."""
        return any(s.tree == tree and s.average == average for s in self._takes)

    def count(self, slot: Slot, leaf: Any, value: object, stored: str | None) -> None:
        """Sets the count of an average.

        Args:
            slot: Of the count.
            leaf: Of this run, concrete or abstract.
            value: The number of updates, or as many as states are stacked.
            stored: Name of the stored average that goes on; None where it starts.
        """
        shape, dtype = tuple(np.shape(leaf)), np.dtype(leaf.dtype)
        counts = np.minimum(np.asarray(value, np.int64), _MOST).astype(dtype)
        try:
            data = np.array(np.broadcast_to(counts, shape))
        except ValueError:
            raise ValueError(
                f"The count of '{stored}' is of shape {counts.shape} in the checkpoint "
                f"and of {shape} in '{slot}'. Stack as many states as were saved."
            ) from None
        target = target_of(leaf, LeafEntry(shape, dtype.name))
        (self.leaves[slot],) = place_all([(target, {whole(shape): data}, shape)])
        if stored is None:
            self.started[slot] = "its average starts"
        else:
            self._counts[slot] = f"the count of {stored}"

    def read(self, item: epath.Path, meshes: Sequence[Mesh], *, verify: bool) -> None:
        """Reads what was decided on and is not read yet."""
        wanted = {
            slot: (place, target_of(leaf, self._manifest.leaf(place), meshes))
            for slot, (place, leaf) in self._takes.items()
            if slot not in self.leaves
        }
        self.leaves |= read(item, self._manifest, wanted, verify=verify)

    def changes(self, known: Collection[Place]) -> Changes:
        """Returns what became of all leaves.

        Args:
            known: Stored leaves that are not left although no slot takes them: counts,
                and what is computed anew.
        """
        used = {place for place, _ in self._takes.values()} | set(known)
        return Changes(
            taken=tuple(map(str, [*self._takes, *self._counts])),
            started={str(slot): reason for slot, reason in self.started.items()},
            left=tuple(
                called(name, path)
                for name, tree in self._manifest.trees.items()
                for path in tree.leaves
                if Place(name, path) not in used
            ),
            cast=dict(self._cast),
            moved={
                str(slot): called(*place)
                for slot, (place, _) in self._takes.items()
                if (slot.tree, slot.path) != place
            },
        )


def check_concrete(leaf: Any, slot: Slot) -> Any:
    """Returns a leaf that starts with the value that it has.

    Raises:
        ValueError: If it has none.
    """
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        return leaf
    what = (
        "params with values, such as model.init(key, …), instead of jax.eval_shape's"
        if slot.tree == PARAMS
        else "optimizer.init itself, or the concrete state"
    )
    raise ValueError(
        f"'{slot}' is not in the checkpoint as it is here, and has no value to start "
        f"with: it is abstract. Pass {what}."
    )
