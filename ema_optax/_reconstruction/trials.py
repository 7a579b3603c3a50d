"""The averages that a choice tries: made a few at once, evaluated, written down."""

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
    """The points that were tried, and the trying of more.

    Attributes:
        points: In the order in which they were tried.
        counts: How many of them were evaluated, now or in an earlier run, by the name
            of what was searched.
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
        """Takes over what the log holds.

        Args:
            evaluate: As in `choose`.
            given: What each name is chosen from.
            searched: What is searched, by name.
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
        """Returns how many of the points were evaluated, now or in an earlier run."""
        return sum(self.counts.values())

    def search(self, name: str, share: int, spare: int, report: Report) -> None:
        """Searches an axis.

        Args:
            name: Of what is searched.
            share: Evaluations that it may take; they decide how fine its grid is.
            spare: Evaluations that it may take besides.
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
                del average  # else it is held while the next are made
                self._add(entry)
                self.counts[name] += 1
                if self._log is not None:
                    self._log.append(entry)
                told = entry.failure or f"{self.points[-1].score:.6g}"
                report(self.evaluations(), f"{name} {choices.shown(value)}: {told}")
        places: dict[Value, int] = {
            value: place for place, value in enumerate(axis.names)
        }
        self.points.sort(  # stable: names that share an average were tried together
            key=lambda p: places.get(p.value, 0) if p.over == name else -1
        )

    def _different(self, name: str, values: Sequence[Value]) -> list[Value]:
        """Returns values whose averages are not tried yet, each once.

        A value whose average was tried becomes a point with its score.
        """
        found: dict[Value, np.ndarray] = {}
        for value in values:
            weights = self._axes[name].coefficients(value)
            if any(searching.are_alike(weights, others) for others in found.values()):
                continue  # asked for again, when the other has a score
            for point in self.points:
                same = self._given[point.over] is self._given[name]
                if same and searching.are_alike(point.coefficients, weights):
                    self._add(Entry(name, value, point.scored, point.failure))
                    break
            else:
                found[value] = weights
        return list(found)

    def _averages(
        self, name: str, values: Sequence[Value]
    ) -> Iterator[tuple[Value, Any]]:
        """Yields the average of each value, and lets go of it."""
        if not values:
            return
        made_of = self._given[name]
        weights = np.stack([self._axes[name].coefficients(v) for v in values])
        found = made_of.summed(weights)[::-1]
        for value in values:
            yield value, found.pop()

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
        made_of = self._given[entry.over]
        score = entry.score
        self.points.append(
            Point(
                entry.over,
                entry.value,
                self._axes[entry.over].coefficients(entry.value),
                made_of.steps,
                made_of.exponents,
                math.nan if score is None else score.value,
                None if score is None else score.error,
                None if score is None else score.samples,
                entry.failure,
            )
        )
