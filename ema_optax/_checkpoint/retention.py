"""Which snapshots of a run are kept: a retention for Orbax's CheckpointManager."""

# pyright: strict, reportMissingTypeStubs=false

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from orbax.checkpoint import checkpoint_managers

from ema_optax._messages import arguments


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
        arguments.one_number(self.at_most, "KeepSnapshots' at_most")
        if not self.at_most >= 2:
            raise ValueError(f"KeepSnapshots needs at_most ≥ 2, got {self.at_most}.")

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: object,
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
