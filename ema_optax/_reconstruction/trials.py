"""Trials of a choice: averages are merged a few at once, evaluated, and logged."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ema_optax._messages.progress import Report
from ema_optax._messages.text import one_line
from ema_optax._reconstruction import choices, scores, searching
from ema_optax._reconstruction.choice_log import Entry, Log
from ema_optax._reconstruction.choices import Point
from ema_optax._reconstruction.ingredients import Ingredients
from ema_optax._reconstruction.searching import Axis, Value

_RAISED = "it raised"


class Trials:
    """Evaluates averages along axes, and keeps the points.

    Attributes:
        points: The averages that were tried, in that order.
        counts: Evaluations of each axis by its name, now or in an earlier run.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], Any],
        given: Mapping[str, Ingredients],
        searched: Mapping[str, Axis],
        *,
        maximize: bool,
        at_once: int,
        log: Any,
    ) -> None:
        """Starts with the points of the log.

        Args:
            evaluate: As in `choose`.
            given: The trees that each name is chosen from.
            searched: The axes by name.
            maximize: As in `choose`.
            at_once: As in `choose`.
            log: As in `choose`.
        """
        self._evaluate, self._given, self._axes = evaluate, given, searched
        self._maximize, self._at_once = maximize, at_once
        self.points: list[Point] = []
        self.counts = dict.fromkeys(searched, 0)
        self._log: Log | None = None
        if log is None:
            return
        prints = {id(each): each.fingerprint() for each in given.values()}
        self._log = Log(log, {name: prints[id(each)] for name, each in given.items()})
        for entry in self._log.entries:
            axis = searched.get(entry.over)
            known = {(point.over, point.value) for point in self.points}
            if (
                axis is not None
                and axis.holds(entry.value)
                and not (entry.failure or "").startswith(_RAISED)  # tried again
                and (entry.over, entry.value) not in known
            ):
                self._add(entry)
                self.counts[entry.over] += 1

    def evaluations(self) -> int:
        """Counts the evaluations of all axes, now or in an earlier run."""
        return sum(self.counts.values())

    def search(self, name: str, share: int, spare: int, report: Report) -> None:
        """Searches an axis.

        Args:
            name: Name of the axis.
            share: Evaluations that it may take, which decide how fine its grid is.
            spare: Further evaluations that it may take.
            report: Called after each evaluation.
        """
        axis = self._axes[name]
        while True:
            known = {p.value: p.scored for p in self.points if p.over == name}
            wanted = searching.ask(axis, known, share, maximize=self._maximize)
            if not wanted:
                break
            different = self._different(name, wanted)
            left = share + spare - self.counts[name]
            if different and left <= 0:
                break
            batch = different[: min(self._at_once, left)]
            for value, average in self._averages(name, batch):
                entry = self._evaluated(name, value, average)
                del average  # or memory holds it while the next ones are made
                self._add(entry)
                self.counts[name] += 1
                if self._log is not None:
                    self._log.append(entry)
                result = entry.failure or f"{self.points[-1].score:.6g}"
                report(self.evaluations(), f"{name} {choices.shown(value)}: {result}")
        places: dict[Value, int] = {
            value: place for place, value in enumerate(axis.names)
        }
        self.points.sort(  # stable: names that share an average were tried together
            key=lambda p: places.get(p.value, 0) if p.over == name else -1
        )

    def _different(self, name: str, values: Sequence[Value]) -> list[Value]:
        """Filters values whose averages were not tried yet, each average once.

        A value whose average was tried becomes a point with its score.
        """
        different: dict[Value, np.ndarray] = {}
        for value in values:
            weights = self._axes[name].coefficients(value)
            if any(searching.are_alike(weights, each) for each in different.values()):
                continue  # `ask` proposes it again, once the other has a score
            for point in self.points:
                same = self._given[point.over] is self._given[name]
                if same and searching.are_alike(point.coefficients, weights):
                    self._add(Entry(name, value, point.scored, point.failure))
                    break
            else:
                different[value] = weights
        return list(different)

    def _averages(
        self, name: str, values: Sequence[Value]
    ) -> Iterator[tuple[Value, Any]]:
        """Yields the average of each value, without keeping it in memory."""
        if not values:
            return
        ingredients = self._given[name]
        weights = np.stack([self._axes[name].coefficients(v) for v in values])
        averages = ingredients.summed(weights)[::-1]
        for value in values:
            yield value, averages.pop()

    def _evaluated(self, name: str, value: Value, average: Any) -> Entry:
        failure = None
        returned: Any = None
        try:
            returned = jax.block_until_ready(self._evaluate(average))
        except Exception as error:  # whatever the user's code raises
            failure = f"{_RAISED} {type(error).__name__}: {one_line(error)}"
        if failure is None:
            score = scores.as_score(returned)
            if math.isfinite(score.value):
                return Entry(name, value, score, None)
            failure = f"it returned {score.value}"
        warnings.warn(
            f"The evaluation of {name} {choices.shown(value)} failed: {failure}",
            scores.EvaluationWarning,
            stacklevel=4,
        )
        return Entry(name, value, None, failure)

    def _add(self, entry: Entry) -> None:
        ingredients = self._given[entry.over]
        score = entry.score
        self.points.append(
            Point(
                entry.over,
                entry.value,
                self._axes[entry.over].coefficients(entry.value),
                ingredients.steps,
                ingredients.exponents,
                math.nan if score is None else score.value,
                None if score is None else score.error,
                None if score is None else score.samples,
                entry.failure,
            )
        )
