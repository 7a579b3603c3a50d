"""The result of `choose`: the best average and the others, as text and as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ema_optax._reconstruction.scores import Score, are_tied, difference
from ema_optax._reconstruction.searching import Value, best_of
from ema_optax._reconstruction.weights import noise_gain


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One average that `choose` tried.

    Attributes:
        over: The axis of its value: `width`, `last`, `schedule` or `alpha`.
        value: The width, the number of checkpoints, the name of the schedule, or α.
        coefficients: float64[trees], the weight of each tree, with sum 1.
        steps: The step of each tree: snapshots for a width, else checkpoints.
        exponents: γ of each snapshot; None for checkpoints.
        score: What the evaluation returned, or the mean of it; NaN where it failed.
        error: Standard error of the score; None where it is not known.
        samples: The numbers whose mean the score is; None where they are not known.
        failure: Why there is no score; None where there is one.
    """

    over: str
    value: Value
    coefficients: np.ndarray = dataclasses.field(repr=False)
    steps: tuple[float, ...] = dataclasses.field(repr=False)
    exponents: tuple[float, ...] | None = dataclasses.field(repr=False)
    score: float = math.nan
    error: float | None = None
    samples: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)
    failure: str | None = None

    @property
    def noise_gain(self) -> float:
        """‖coefficients‖₂, the factor of noise that the trees do not share."""
        return noise_gain(self.coefficients)

    @property
    def scored(self) -> Score | None:
        """The score with its noise; None where the evaluation failed."""
        if self.failure is not None:
            return None
        return Score(self.score, self.error, self.samples)


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The average that an evaluation chose.

    Attributes:
        points: All points, in the order in which they were tried; names of one average
            have one score.
        best: The point with the best score; of equal ones, the one in their middle.
        ties: The other points that noise hides from the best: they differ from it by at
            most two standard errors of the difference.
        tree: The best average itself, like the params.
        step: Its last step.
        evaluations: How many of the points were evaluated, those of a log among them.
        maximize: Whether greater scores are better.
        origin: Where the trees of the best come from: `run` and `tree`, if from disk.
    """

    points: tuple[Point, ...] = dataclasses.field(repr=False)
    best: Point
    ties: tuple[Point, ...]
    tree: Any = dataclasses.field(repr=False)
    step: int
    evaluations: int
    maximize: bool
    origin: Mapping[str, str]

    def against_best(self, point: Point) -> tuple[float, float]:
        """Compares the score of a point with the best: their difference and its noise.

        Args:
            point: One of the points, with a score.

        Returns:
            The difference, and its standard error, 0 where no noise is known: where
            both have a number for each batch, that of their differences.

        Raises:
            ValueError: If its evaluation failed.
        """
        score, best = point.scored, self.best.scored
        if score is None or best is None:
            raise ValueError(f"{point} has no score: {point.failure}")
        return difference(score, best)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the tree was made and chosen, to save as `extra` beside it."""
        best = _point(self.best, whole=True)
        return {
            "chosen": {
                **self.origin,
                **best,
                "maximize": self.maximize,
                "evaluations": self.evaluations,
                "ties": [{"over": p.over, "value": p.value} for p in self.ties],
            }
        }

    def to_json(self) -> str:
        """Writes the choice as JSON text, without the tree."""
        content = {
            "best": _point(self.best, whole=True),
            "ties": [_point(point) for point in self.ties],
            "points": [_point(point, whole=True) for point in self.points],
            "step": self.step,
            "evaluations": self.evaluations,
            "maximize": self.maximize,
            **self.origin,
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [
            f"{self.evaluations} evaluations, "
            f"{'the greatest' if self.maximize else 'the least'} is best",
            f"{'over':<9} {'value':>12} {'score':>12} {'error':>10} {'noise gain':>10}",
        ]
        for point in ordered(self.points):
            mark = " <- best" if point is self.best else ""
            mark = " tie" if point in self.ties else mark
            if point.failure is not None:
                mark = f" {point.failure}"
            error = "" if point.error is None else f"{point.error:.3g}"
            lines.append(
                f"{point.over:<9} {shown(point.value):>12} {point.score:>12.6g} "
                f"{error:>10} {point.noise_gain:>10.3f}{mark}"
            )
        tried = [p.value for p in self.points if p.over == self.best.over]
        if self._is_at_end(tried):
            lines.append(
                f"The best lies at an end of what was searched, {shown(min(tried))} to "
                f"{shown(max(tried))}: the top may lie beyond."
            )
        return "\n".join(lines)

    def _is_at_end(self, tried: Sequence[Any]) -> bool:
        """Returns whether the best is the least or the greatest of several numbers."""
        value = self.best.value
        if isinstance(value, str) or len(tried) < 2:
            return False
        return value in (min(tried), max(tried))


def shown(value: Value) -> str:
    """Writes a value as text."""
    return value if isinstance(value, str) else f"{value:g}"


def ordered(points: tuple[Point, ...]) -> list[Point]:
    """Sorts points by axis and then by value; names stay as they were tried."""
    names = list(dict.fromkeys(point.over for point in points))

    def key(point: Point) -> tuple[int, float]:
        value = 0.0 if isinstance(point.value, str) else point.value
        return names.index(point.over), value

    return sorted(points, key=key)


def best_point(points: tuple[Point, ...], *, maximize: bool) -> Point | None:
    """Finds the best point; None if no point has a score."""
    good = [point for point in points if point.failure is None]
    if not good:
        return None
    scores = [point.score for point in good]
    top = max(scores) if maximize else min(scores)
    over = next(point.over for point in good if point.score == top)
    of_axis = {p.value: p.scored for p in good if p.over == over}
    value = best_of(
        {v: score for v, score in of_axis.items() if score is not None},
        maximize=maximize,
    )
    return next(p for p in good if (p.over, p.value) == (over, value))


def ties_of(points: tuple[Point, ...], best: Point) -> tuple[Point, ...]:
    """Lists the other points whose difference from the best may be noise."""
    assert best.scored is not None
    return tuple(
        point
        for point in ordered(points)
        if point is not best
        and point.scored is not None
        and are_tied(point.scored, best.scored)
    )


def _point(point: Point, *, whole: bool = False) -> dict[str, Any]:
    """Returns a point as a dict for JSON; `whole` adds its trees and coefficients."""
    failed = point.failure is not None
    content: dict[str, Any] = {
        "over": point.over,
        "value": point.value,
        "score": None if failed else point.score,
        "error": point.error,
    }
    if failed:
        content["failure"] = point.failure
    if whole:
        content["noise_gain"] = point.noise_gain
        content["steps"] = list(point.steps)
        if point.exponents is not None:
            content["exponents"] = list(point.exponents)
        content["coefficients"] = point.coefficients.tolist()
    return content
