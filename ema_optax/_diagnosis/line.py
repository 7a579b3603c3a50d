"""Evaluates the loss along s + λ(p − s), and reads from it what is wrong."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ema_optax._diagnosis.findings import Finding, percent
from ema_optax._diagnosis.leaf_pairs import REFRESH
from ema_optax._diagnosis.records import Record, shorter
from ema_optax._messages.text import one_line, some
from ema_optax._reconstruction.scores import NOISE, Score, as_score, difference

# 0 is the shadow and 1 the params. These two come first: they alone say whether there
# is anything to explain.
POINTS = (0.0, 1.0, 0.5, 0.25, 0.75, -0.25, 1.25)

_RIDGE = 0.05  # of the loss: a lower bump is no barrier where the noise is not known
_GAIN = 0.05  # of the spread along the line: a smaller gain is not worth a change


@dataclasses.dataclass(frozen=True)
class Point:
    """Holds the evaluation of one s + λ(p − s).

    Attributes:
        at: λ.
        value: Value that `evaluate` returned; None where `evaluate` raised.
        standard_error: Standard error of the value, where it is known.
        problem: Why there is no finite value; empty where there is one.
        samples: Numbers whose mean is the value, where they are known.
    """

    at: float
    value: float | None
    standard_error: float | None = None
    problem: str = ""
    samples: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)


def evaluated(evaluate: Callable[[Any], Any], params: Any, at: float) -> Point:
    """Evaluates a point, which keeps an error that `evaluate` raises.

    Raises:
        TypeError: If `evaluate` returns something that is no score.
    """
    try:
        result = evaluate(params)
    except Exception as error:
        return Point(at, None, None, one_line(f"{type(error).__name__}: {error}"))
    score = as_score(result)
    problem = "" if math.isfinite(score.value) else f"it returned {score.value}"
    return Point(at, score.value, score.error, problem, score.samples)


def check(
    record: Record, points: list[Point], *, maximize: bool, norms: list[str]
) -> Iterator[Finding]:
    """Yields the findings on the points of one shadow.

    Args:
        record: The record of the average.
        points: Evaluated points, with those at λ = 0 and 1.
        maximize: Whether larger values are better.
        norms: Paths of batch norms whose statistics are not among the params.
    """
    line = _Line(record, points, maximize)
    yield from line.failures()
    if not {0.0, 1.0} <= set(line.loss):
        return
    worse = line.loss[0.0] - line.loss[1.0] > line.noise(0.0, 1.0)
    if worse and norms:
        yield record.finding(
            "batch_stats",
            "warning",
            "The average is worse than the params, and the model has batch norms "
            f"({some(map(repr, norms), 2)}), whose running statistics belong to the "
            "raw params.",
            REFRESH,
            leaves=len(norms),
        )
    yield from line.verdict(worse)


class _Line:
    """Holds the losses along the line, where smaller is better.

    Attributes:
        loss: Finite losses by λ.
    """

    def __init__(self, record: Record, points: list[Point], maximize: bool) -> None:
        sign = -1 if maximize else 1
        self._record, self._points = record, points
        finite = [p for p in points if p.value is not None and not p.problem]
        self.loss = {p.at: sign * float(p.value or 0.0) for p in finite}
        # The λ of points whose standard error is known.
        self._known = {p.at for p in finite if p.standard_error is not None}
        # An accuracy goes in steps of one example: without standard errors, its scatter
        # around a smooth curve is its noise.
        scatter = self._scatter()
        self._scores = {
            p.at: Score(
                self.loss[p.at],
                scatter if p.standard_error is None else p.standard_error,
                p.samples,
            )
            for p in finite
        }

    def failures(self) -> Iterator[Finding]:
        """Yields the finding on the points where `evaluate` failed, if any."""
        failed = [p for p in self._points if p.problem]
        if failed:
            yield self._record.finding(
                "evaluation",
                "problem" if any(p.at in (0, 1) for p in failed) else "note",
                f"Evaluating failed at {len(failed)} of {len(self._points)} points of "
                f"s + λ(p − s), first at λ = {failed[0].at:g}: {failed[0].problem}.",
                "See that it gives a finite number for the shadow (λ = 0) and the "
                "params (λ = 1).",
                failed=[p.at for p in failed],
            )

    def noise(self, a: float, b: float) -> float:
        """Returns how much the losses at two λ may differ by chance."""
        return NOISE * difference(self._scores[a], self._scores[b])[1]

    def _scatter(self) -> float:
        """Computes the standard deviation of the losses around a cubic; 0 for few."""
        freedom = len(self.loss) - 4  # a cubic has four coefficients
        if freedom < 2:
            return 0.0
        at, loss = np.array(list(self.loss.items())).T
        residuals = loss - np.polyval(np.polyfit(at, loss, 3), at)
        return math.sqrt(float(residuals @ residuals) / freedom)

    def verdict(self, worse: bool) -> Iterator[Finding]:
        """Yields the finding on where along the line the loss is lowest.

        Args:
            worse: Whether the loss at the average is higher than at the params, by more
                than the noise.
        """
        loss, find = self.loss, self._record.finding
        best = min(loss, key=lambda at: (loss[at], abs(at)))
        low, high = min(loss.values()), max(loss.values())
        figures = {
            "shadow": self._value(0.0),
            "params": self._value(1.0),
            "best_at": best,
            "best": self._value(best),
        }
        if low == high:
            yield find(
                "flat",
                "note",
                f"The evaluation gives {self._value(0.0):.6g} at all points: it does "
                "not tell the average from the params.",
                "Evaluate on more examples, or with a loss in place of an accuracy.",
                **figures,
            )
            return
        if barrier := self._barrier():
            at, height = barrier
            yield find(
                "barrier",
                "problem",
                f"Between the average and the params the loss is higher than at both, "
                f"by {height:.3g} at λ = {at:g}: they are not in one basin, and what "
                "lies between is averaged.",
                "Start the average anew after what moved the params so far (a new "
                "head, units in another order, a jump of the learning rate): "
                "start_after(decay, step), or a shorter one.",
                **figures,
                height=height,
                height_at=at,
            )
            return
        gain = min(loss[0.0], loss[1.0]) - low
        noise = self.noise(0.0, 1.0)
        within = abs(loss[0.0] - loss[1.0]) <= noise and gain <= self.noise(best, 0.0)
        # Reported where the noise is known, or where the average looks worse by less
        # than the noise.
        is_in_question = 0.0 in self._known or loss[0.0] > loss[1.0]
        if within and is_in_question and noise > 0:
            yield find(
                "within_noise",
                "note",
                f"The average ({self._value(0.0):.6g}) and the params "
                f"({self._value(1.0):.6g}) differ by less than the noise of the "
                f"evaluation, {noise:.2g}.",
                "Evaluate on more examples, or compare the two example by example, "
                "before choosing between them.",
                **figures,
                noise=noise,
            )
            return
        spread = max(loss[0.0], loss[1.0]) - low
        clear = gain > max(self.noise(best, 0.0 if not worse else 1.0), _GAIN * spread)
        if 0 < best < 1 and clear:
            yield self._too_long(best, figures)
        elif best < 0 and clear:
            yield find(
                "longer",
                "note",
                f"The loss is lower yet at λ = {best:g}, beyond the average as seen "
                "from the params: a longer average may do better.",
                "Take a larger β, or a larger width or fraction.",
                **figures,
            )
        elif worse:
            yield self._moving(best, clear, figures)

    def _barrier(self) -> tuple[float, float] | None:
        """Finds the highest λ between the ends, and its height above both."""
        end = max(0.0, 1.0, key=lambda at: self.loss[at])
        between = [at for at in self.loss if 0 < at < 1]
        if not between:
            return None
        at = max(between, key=lambda at: self.loss[at])
        height = self.loss[at] - self.loss[end]
        known = {at, end} <= self._known
        least = self.noise(at, end) if known else _RIDGE * abs(self.loss[end])
        slope = 2 * _GAIN * abs(self.loss[0.0] - self.loss[1.0])
        return (at, height) if height > max(least, slope) else None

    def _too_long(self, best: float, figures: Mapping[str, Any]) -> Finding:
        at = self._refined(best)
        known = self._record.length
        remedy = "Take a shorter average: a smaller β, width or fraction."
        if known:
            age = (1 - at) * known.mean_age
            remedy = (
                f"Take a shorter average, of a mean age of {max(1, round(age)):,} "
                f"updates instead of {round(known.mean_age):,}: {shorter(age)}; or "
                "choose its width after training, with ema_optax.reconstruction."
            )
        return self._record.finding(
            "too_long",
            "warning",
            f"The loss is lowest about {percent(round(at, 2))} of the way from the "
            "average to the params: the average is too long, it lags.",
            remedy,
            **figures,
            refined=at,
        )

    def _moving(self, best: float, clear: bool, figures: Mapping[str, Any]) -> Finding:
        if best > 1 and clear:
            return self._record.finding(
                "still_falling",
                "warning",
                "The loss falls from the average to the params and on beyond them: the "
                "run still goes downhill, where an average can only lag.",
                "Train on, or decay the learning rate; average what comes after.",
                **figures,
            )
        return self._record.finding(
            "params_best",
            "warning",
            "The loss falls all the way from the average to the params: its lag costs "
            "more than the noise that it takes away.",
            "Take a much shorter average, such as power(0.02); where the learning rate "
            "has been decayed to nothing there is little left to average.",
            **figures,
        )

    def _value(self, at: float) -> float:
        return next(float(p.value or 0.0) for p in self._points if p.at == at)

    def _refined(self, best: float) -> float:
        """Finds the minimum of the parabola through the best λ and its neighbours."""
        lambdas = sorted(self.loss)
        i = lambdas.index(best)
        if not 0 < i < len(lambdas) - 1:
            return best
        xs = np.array(lambdas[i - 1 : i + 2])
        a, b, _ = np.polyfit(xs, [self.loss[x] for x in xs], 2)
        return float(np.clip(-b / (2 * a), xs[0], xs[2])) if a > 0 else best
