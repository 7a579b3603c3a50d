"""Snapshots: shadows with power profiles in the steps of a run, and which to keep."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from orbax.checkpoint import checkpoint_managers

from ema_optax.checkpoint import manifest
from ema_optax.checkpoint.contents import SHADOW
from ema_optax.checkpoint.manifest import CorruptCheckpointError
from ema_optax.checkpoint.reading import Place
from ema_optax.checkpoint.steps import absolute, all_steps, explained
from ema_optax.checkpoint.stored import StoredTree
from ema_optax.decay import Decay
from ema_optax.decays import power
from ema_optax.reconstruction import Snapshot


def snapshots(
    directory: Any, *, names: Sequence[str] | None = None, verify: bool = True
) -> list[Snapshot]:
    """Returns every shadow with a power profile in the steps of a directory.

    Any step saved by this library is one, of `SnapshotSave` as of `EmaSave`. Nothing
    but the manifests is read yet. A snapshot's step is the number of updates that its
    shadow had seen at its last fold, whatever the step's number on disk.

    Args:
        directory: The folder of a run, or of one step of it.
        names: Of the shadows to take, where they have names; None takes all.
        verify: Whether to compare what is read with its checksums.

    Returns:
        For `reconstruction.reconstruct`, in the order of their steps; one where several
        steps have the same shadow, saved between two folds.

    Raises:
        CorruptCheckpointError: Here or on reading, if data is not what was saved.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If no step has a shadow of a power profile.

    >>> import tempfile, ema_optax
    >>> from ema_optax import checkpoint, reconstruction
    >>> transform = ema_optax.ema_params(ema_optax.power(0.1))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = transform.init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in range(1, 9):
    ...         _, state = transform.update({"w": jnp.ones(2)}, state, params)
    ...         checkpoint.save(folder, params, state, step=step)
    ...     found = snapshots(folder)
    ...     narrower = reconstruction.reconstruct(found, width=0.09)
    >>> found[0]
    Snapshot(step=1, exponent=6.93..., dtype=dtype('float32'))
    >>> narrower.tree
    {'w': Array([1., 1.], dtype=float32)}
    """
    if isinstance(names, str):
        names = [names]
    found, others = [], set()
    for item in all_steps(absolute(directory)):
        try:
            described = manifest.read_manifest(item)
        except CorruptCheckpointError as error:
            rescue = "To use the others, move its folder elsewhere."
            raise explained(item, error, rescue) from error
        for tree, average in described["averages"].items():
            name = tree.removeprefix(SHADOW).removeprefix("/")
            decay = Decay.from_json(average["decay"]) if average["decay"] else None
            taken = []
            # A tree that is joined of groups is one average if all of them are.
            asked = not average.get("bema") and (names is None or name in names)
            if asked and isinstance(decay, power):
                taken = _snapshot(item, described, tree, decay, average, verify)
            found += taken
            if not taken:
                count = average["count"]
                others.add(f"{tree}: {decay or 'another average'}, {count} updates")
    if not found:
        named = "" if names is None else f" of the names {', '.join(names)}"
        raise ValueError(
            f"{directory} has no shadows{named} with a power profile, folded at least "
            f"once, to reconstruct averages from; it has {'; '.join(sorted(others))}. "
            "Train with ema_params({'a': ema_optax.power(0.05), 'b': "
            "ema_optax.power(0.1)})."
        )
    return _one_of_each(found)


def _one_of_each(found: Sequence[Snapshot]) -> list[Snapshot]:
    """Returns snapshots in order, the least rounded of those that saw the same folds.

    With `every=10` the shadow saved at update 28 is that of update 25.
    """

    def key(snapshot: Snapshot) -> tuple[float, float]:
        return snapshot.step, snapshot.exponent

    finest: dict[tuple[float, float], Snapshot] = {}
    for snapshot in sorted(found, key=lambda s: float(jnp.finfo(s.dtype).eps)):
        finest.setdefault(key(snapshot), snapshot)
    return sorted(finest.values(), key=key)


def _snapshot(
    item: Any,
    described: dict[str, Any],
    tree: str,
    decay: power,
    average: dict[str, Any],
    verify: bool,
) -> list[Snapshot]:
    """Returns the snapshot that a tree is; none where it was never folded."""
    count = average["count"]
    if not isinstance(count, int):
        raise ValueError(
            f"The {tree} of {item} was averaged under vmap, with counts {count}: "
            "reconstruct each of its members from checkpoints of its own."
        )
    step = count - count % (average["every"] or 1)
    leaves = described["trees"][tree]["leaves"]
    if step == 0 or not leaves:
        return []
    places = {path: Place(tree, path) for path in leaves}
    kinds = {jnp.dtype(leaf["dtype"]) for leaf in leaves.values()}
    coarsest = max(kinds, key=lambda kind: float(jnp.finfo(kind).eps))
    source = StoredTree(item, described, places, verify=verify)
    return [Snapshot(step, float(decay.exponent), source, coarsest)]


@dataclasses.dataclass(frozen=True)
class KeepSnapshots(checkpoint_managers.PreservationPolicy):
    """A retention for a `CheckpointManager` that keeps snapshots evenly over the run.

    Keeps every step while there are at most `at_most` of them; then every second one,
    then every fourth, and always the newest. Averages can so be reconstructed at any
    of the kept steps, however long the run becomes. Where saves are not evenly spaced,
    the last one of each interval is kept.

        options = ocp.CheckpointManagerOptions(
            save_interval_steps=100, preservation_policy=KeepSnapshots(at_most=128)
        )

    Args:
        at_most: ≥ 2; 64 steps give widths from .021 within 1 %, 128 from .012.

    >>> from types import SimpleNamespace
    >>> steps = [SimpleNamespace(step=100 * n) for n in range(1, 6)]
    >>> KeepSnapshots(at_most=4).should_preserve(steps, context=None)
    [False, True, False, True, True]
    """

    at_most: int = 128

    def __post_init__(self) -> None:
        if self.at_most < 2:
            raise ValueError(f"KeepSnapshots needs at_most ≥ 2, got {self.at_most}.")

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """Returns whether each checkpoint, in the order of their steps, is kept."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        if len(steps) < 2:
            return [True] * len(steps)
        # The commonest gap, of saves or of what is left of them, times a power of two:
        # the intervals of one call are then halves of those of a later one, and what
        # was kept stays even. The smallest for which the whole run has few enough.
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        interval = float(statistics.mode(gaps))
        span = steps[-1] - steps[0]
        while span < interval * self.at_most:
            interval /= 2
        while (
            _number(steps[-1], interval) - _number(steps[0], interval) >= self.at_most
        ):
            interval *= 2
        numbers = [_number(step, interval) for step in steps]
        return [a != b for a, b in itertools.pairwise([*numbers, None])]


def _number(step: int, interval: float) -> int:
    """Returns the number of the interval that a step is in, or is the end of."""
    return math.ceil(step / interval)
