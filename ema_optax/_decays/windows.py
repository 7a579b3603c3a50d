"""The mean of a window of updates; the next window begins where one ends."""

# pyright: strict

import dataclasses
from types import ModuleType
from typing import Any

from ema_optax._decays.decay import Decay, Floats
from ema_optax._messages import arguments
from ema_optax._messages.text import brief

_LONGEST = 2**31 - 1  # where counts of updates end


@dataclasses.dataclass(frozen=True, repr=False)
class window(Decay):
    """Takes the plain mean since a window of n updates began: (p−1)/p at update p.

    Windows are of n updates, one after the other. The first of each copies, so after
    updates n, 2n, … the shadow is the mean of the params after exactly the last n. In
    between it is the mean of those since the window began. With `start_after(window(n),
    step)` the first window begins after that step.

    With `every=k` each fold stands for the updates of its window since the fold before:
    where k divides n, the shadow is the plain mean of the n/k params that were folded.
    Where it does not, the first fold of a window counts for its share of k updates, and
    no window reaches into another. With k ≥ n each fold copies.

    The position in the window is counted in integers, so it is exact at any step, and
    it follows from the count of updates alone: a run that is saved and resumed inside a
    window goes on with it. For the last k params at every step, see `ring`.

    Args:
        n: Length of a window in updates, a whole number in [1, 2³¹).

    Raises:
        ValueError, TypeError: If `n` is no such number, or is traced.

    Source: the mean of the latest weights, Izmailov et al. 2018, arXiv:1803.05407.

    >>> [round(window(3)(step), 3) for step in range(1, 8)]
    [0.0, 0.5, 0.667, 0.0, 0.5, 0.667, 0.0]
    """

    n: int
    _counts = True

    def __post_init__(self) -> None:
        n: Any = self.n
        n = arguments.whole(n, "window's n", 1, "window(1000) restarts every 1000.")
        if n > _LONGEST:
            raise ValueError(
                f"window's n must be below 2³¹, got {brief(n)}: counts of updates end "
                "there. uniform() is the mean of all."
            )
        self._set(n=n)

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        position = (t - 1) % self.n + 1
        # The product telescopes to (p−k)/p; 0 where the window began inside it.
        return xp.log1p(-xp.minimum(position, k) / position)
