"""Which value to try next on an axis: a coarse grid, then halving around the best.

This is a bracketing search, as golden section is, with three differences. It halves
both sides of the best at once, because one pass over the disk gives several averages.
It goes on from whatever was tried, so that it resumes. It leaves a side alone where
noise already hides its difference from the best, so that a plateau ends the search.
`scipy.optimize.minimize_scalar` asks for one value at a time and knows of no noise.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ema_optax._reconstruction.scores import Score, are_tied

_COARSE = 9  # values of a grid at most; its neighbours then differ by a third or so
_CLOSE = 0.02  # of a value, or of the whole interval: values so close count as one
_DIGITS = 4  # of a value: people read it and type it again

Value = float | int | str


@dataclasses.dataclass(frozen=True)
class Axis:
    """One thing to search: an interval, or names without an order.

    Attributes:
        over: Its name: `width`, `last`, `alpha` or `schedule`.
        coefficients: From a value to the weight of each tree, with sum 1.
        low: Least value.
        high: Greatest value.
        log: Whether values are compared by their ratio.
        whole: Whether they are whole numbers.
        names: The names, for an axis without an interval.
    """

    over: str
    coefficients: Callable[[Value], np.ndarray]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    names: Sequence[str] = ()

    def holds(self, value: Value) -> bool:
        """Whether a value lies on the axis."""
        if self.names or isinstance(value, str):
            return value in self.names
        return self.low <= value <= self.high

    def grid(self, count: int) -> list[Value]:
        """Returns about so many values, evenly spaced, both ends among them."""
        if self.names:
            return list(self.names)
        space = np.geomspace if self.log else np.linspace
        values = space(self.low, self.high, count).tolist()
        return sorted({self._neat(value) for value in values})

    def middle(self, a: float, b: float) -> float | None:
        """Returns the value between two, or None where they are too close."""
        if self.whole:
            if abs(a - b) < 2:
                return None
        elif self.log:
            if max(a, b) < min(a, b) * (1 + _CLOSE):
                return None
        elif abs(a - b) < (self.high - self.low) * _CLOSE:
            return None
        value = self._neat((a * b) ** 0.5 if self.log else (a + b) / 2)
        if self.whole:
            value = min(max(value, min(a, b) + 1), max(a, b) - 1)
        return value

    def _neat(self, value: float) -> float:
        """Rounds a value to few digits, for people to read and to write again."""
        if self.whole:
            return round(value)
        neat = float(f"{value:.{_DIGITS}g}") if self.log else round(value, _DIGITS)
        return min(max(neat, self.low), self.high) + 0.0  # no −0


def are_alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two sets of coefficients give one average."""
    return np.allclose(a, b, rtol=0, atol=1e-12)


def coarse(share: int) -> int:
    """Counts the evaluations for a grid: an odd number, so that 0 is in ±α."""
    return min(max(share * 3 // 5 | 1, 3), _COARSE)


def best_of(scores: Mapping[Value, Score], *, maximize: bool) -> Value:
    """Finds the value with the best score; of equal ones, the one in their middle."""
    values = [score.value for score in scores.values()]
    best = max(values) if maximize else min(values)
    tops = [value for value, score in scores.items() if score.value == best]
    if not any(isinstance(value, str) for value in tops):
        tops.sort()
    return tops[(len(tops) - 1) // 2]


def ask(
    axis: Axis,
    scores: Mapping[Value, Score | None],
    share: int,
    *,
    maximize: bool,
) -> list[Value]:
    """Proposes the values to try next; none where the search is at its end.

    Args:
        axis: What is searched.
        scores: Of the values that were tried; None where there is no score.
        share: Evaluations in all.
        maximize: Whether greater scores are better.
    """
    missing = [value for value in axis.grid(coarse(share)) if value not in scores]
    good = {value: score for value, score in scores.items() if score is not None}
    if missing or axis.names or not good:
        return missing
    best = best_of(good, maximize=maximize)
    ordered = sorted(scores)  # pyright: ignore[reportArgumentType] no names, as above
    place = ordered.index(best)
    proposals: list[tuple[float, Value]] = []
    for i in (place - 1, place + 1):
        if not 0 <= i < len(ordered):
            continue
        score = scores[ordered[i]]
        if score is not None and are_tied(score, good[best]):
            continue
        beside = axis.middle(best, ordered[i])  # pyright: ignore[reportArgumentType]
        if beside is not None and beside not in scores:
            a, b = float(best), float(ordered[i])
            gap = abs(np.log(a / b)) if axis.log else abs(a - b)
            proposals.append((-float(gap), beside))
    return [value for _, value in sorted(proposals)]  # the widest gap first
