"""Lets an evaluation choose the average: its width, window, schedule, or extrapolation.

Candidates are sums of the same trees, so that one pass over the disk gives several.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import optax

from ema_optax._decays.decays import power
from ema_optax._messages import arguments
from ema_optax._messages.progress import Progress, shown
from ema_optax._messages.text import brief
from ema_optax._reconstruction import axes, choices, ingredients
from ema_optax._reconstruction.choices import Choice
from ema_optax._reconstruction.ingredients import Ingredients
from ema_optax._reconstruction.searching import Axis, are_alike
from ema_optax._reconstruction.trials import Trials
from ema_optax._reconstruction.widths import Snapshot

_LEAST = 3  # evaluations of an axis: its ends, and one between them


def choose(
    source: Any,
    evaluate: Callable[[Any], Any],
    *,
    over: str | Sequence[str] = "width",
    budget: int = 12,
    maximize: bool = False,
    between: tuple[float, float] | None = None,
    among: axes.Among = None,
    tree: str = "params",
    item: str | None = None,
    params: optax.Params | None = None,
    at_once: int = 3,
    log: Any = None,
    out: Any = None,
    progress: Progress = False,
) -> Choice:
    """Chooses the average with the best evaluation, of those that a source can give.

    An interval is searched by a coarse grid, even in the logarithm of a width, and
    then by halving the gaps beside the best. The search ends where noise hides the
    differences that are left, or with the budget. One pass over the disk makes
    `at_once` averages, in float64 and checked against checksums; memory holds them and
    one tree of the source.

    Args:
        source: `reconstruction.Snapshot`s, for `over="width"`; or the folder of a run,
            whose steps this library saved.
        evaluate: A function from params to a score: a number; two numbers or more, such
            as one for each batch, whose mean is the score and whose spread its noise;
            or a `Score(value, error)`. If it raises, or its score is not finite, the
            average stays among the points without a score.
        over: What is chosen, or several of them:
            `"width"`: σ_rel, of the snapshots; as far as their profile error is ≤ 5 %.
            `"last"`: n of the plain mean of the last n checkpoints.
            `"schedule"`: one of `among`.
            `"alpha"`: α of θ̄ + α·(θ̄ − θ̄'), where θ̄ and θ̄' are the means of the newer
            and of the older half of the checkpoints; from −1, which is θ̄', to 1.
        budget: Largest number of evaluations, ≥ 3; those of a log count.
        maximize: Whether greater scores are better.
        between: (low, high) to search, instead of all that the source gives.
        among: Schedules, as `schedule_coefficients` takes them by name or as decays;
            `"ema:β"`, which keeps the share β at each checkpoint; `"NAME@N"` of the
            last N checkpoints. None is the usual ones, of all and of the last half.
        tree: Which tree of a run's steps is averaged: `"params"`, `"shadow"`, or the
            name of a shadow: `"fast"`, in full `"shadow/fast"`. Not for widths.
        item: Name of the item, where steps hold several.
        params: What the averages should be like, as in `reconstruct`. None is nested
            dicts as `checkpoint.restore` gives them, of a run; else like the snapshots.
        at_once: Averages in memory, ≥ 1.
        log: A file for the evaluations, appended after each. With the file of an
            earlier run of the same source, it goes on from there: nothing is evaluated
            again but what raised. It cannot know whether `evaluate` is the same.
        out: A new folder, where the chosen average is saved as a checkpoint.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function that is called with the evaluations done and the budget.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved, with the step.
        FileExistsError: If `out` has steps, before anything is evaluated.
        TypeError: If `evaluate` returns something that is no score.
        ValueError: If there is nothing to choose from, an argument is outside what the
            source gives, the log is that of another choice, or no average could be
            evaluated.

    Warns:
        EvaluationWarning: For each evaluation that failed, with the reason.

    >>> snapshots = [
    ...     Snapshot(step, exponent, {"w": np.float32([(exponent + 1) * step / 1000])})
    ...     for step in range(10, 1001, 10) for exponent in (16.97, 6.94)
    ... ]
    >>> found = choose(snapshots, lambda params: float(abs(params["w"][0] - 14.0)))
    >>> found.best.over, found.evaluations, found.ties
    ('width', 12, ())
    """
    names = axes.checked_over(over)
    if not callable(evaluate):
        raise TypeError(
            "evaluate is a function from params to a score, got "
            f"{brief(evaluate)}. Such as lambda params: float(loss(params))."
        )
    budget = arguments.whole(budget, "budget", _LEAST, "budget=12 is usual.")
    at_once = arguments.whole(at_once, "at_once", 1, "at_once=3 is usual.")
    maximize = arguments.flag(maximize, "maximize")
    opened = _opened(source, names, tree, item, params)
    searched = _axes(opened, names, between, among)
    shares = _shares(searched, budget)
    sources = {name: of_name for name, (of_name, _) in opened.items()}
    for of_name in sources.values():
        of_name.check()
    step = int(max(max(of_name.steps) for of_name in sources.values()))
    if out is not None:
        ingredients.check_free(arguments.path(out, "out", "chosen"), step)
    trials = Trials(
        evaluate, sources, searched, maximize=maximize, at_once=at_once, log=log
    )
    with shown(progress, "choosing", budget) as report:
        spare = 0  # evaluations that searches which ended early leave to the next
        for name, share in shares.items():
            trials.search(name, share, spare, report)
            spare += share - trials.counts[name]
    points = tuple(trials.points)
    best = choices.best_point(points, maximize=maximize)
    if best is None:
        raise ValueError(
            f"None of {len(points)} averages could be evaluated. The first, "
            f"{points[0].over} {choices.shown(points[0].value)}: {points[0].failure}"
        )
    chosen_from = sources[best.over]
    choice = Choice(
        points=points,
        best=best,
        ties=choices.ties_of(points, best),
        tree=chosen_from.summed(best.coefficients[None])[0],
        step=int(max(chosen_from.steps)),
        evaluations=trials.evaluations(),
        maximize=maximize,
        origin=chosen_from.origin,
    )
    if out is not None:
        decay = power(cast(float, best.value)) if best.over == "width" else None
        ingredients.save(
            out, choice.tree, step=choice.step, decay=decay, extra=choice.provenance
        )
    return choice


_Opened = dict[str, tuple[Ingredients, list[Snapshot]]]


def _opened(
    source: object,
    names: Sequence[str],
    tree: str,
    item: str | None,
    params: optax.Params | None,
) -> _Opened:
    """Opens the trees that each name is chosen from, and the snapshots of a width."""
    if not isinstance(source, (list, tuple)):
        run = arguments.path(source, "source", "run/checkpoints")
        tree = arguments.a_name(tree, "tree", "params")
        opened: _Opened = {}
        if "width" in names:
            snapshots, summed = ingredients.snapshots_of(run, item, params)
            opened["width"] = summed, snapshots
        others = [name for name in names if name != "width"]
        if others:
            summed = ingredients.checkpoints_of(run, tree, item, params)
            opened |= {name: (summed, []) for name in others}
        return {name: opened[name] for name in names}
    listed = cast(Sequence[Any], source)
    odd = [each for each in listed if not isinstance(each, Snapshot)]
    if odd or not listed:
        raise TypeError(
            "choose takes the folder of a run, or Snapshots, as "
            "checkpoint.snapshots(folder) lists them; got "
            f"{brief(odd[0]) if odd else 'an empty list'}."
        )
    if tuple(names) != ("width",):
        raise ValueError(
            f"Snapshots are averages already: over='width' chooses among them, and "
            f"over={brief(list(names))} needs the folder of a run with its params."
        )
    return {"width": (ingredients.of_snapshots(listed, params), list(listed))}


def _axes(
    opened: _Opened, names: Sequence[str], between: Any, among: axes.Among
) -> dict[str, Axis]:
    lines = [name for name in names if name != "schedule"]
    if between is not None and len(lines) != 1:
        raise ValueError(
            f"between={brief(between)} narrows one of width, last and alpha, and over "
            f"has {len(lines)} of them."
        )
    if among is not None and "schedule" not in names:
        raise ValueError(
            f"among={brief(among)} are schedules, and over={brief(list(names))} has "
            "no 'schedule'."
        )
    searched: dict[str, Axis] = {}
    for name in names:
        checkpoints, snapshots = opened[name]
        if name == "width":
            searched[name] = axes.widths(snapshots, between)
        elif name == "last":
            searched[name] = axes.windows(checkpoints, between)
        elif name == "alpha":
            searched[name] = axes.extrapolations(checkpoints, between)
        else:
            searched[name] = axes.schedules(checkpoints, among)
    return searched


def _shares(searched: Mapping[str, Axis], budget: int) -> dict[str, int]:
    """Shares the budget of evaluations among the axes.

    Raises:
        ValueError: If the budget is too small for all of them.
    """
    least = {name: _least(axis) for name, axis in searched.items()}
    spare = budget - sum(least.values())
    if spare < 0:
        parts = " and ".join(f"{count} for {name}" for name, count in least.items())
        raise ValueError(
            f"budget={budget} is too small: it takes {parts}. Pass "
            f"budget={sum(least.values())}, or fewer in over= or among=."
        )
    lines = [name for name, axis in searched.items() if not axis.names]
    for number, name in enumerate(lines):
        least[name] += spare // len(lines) + (number < spare % len(lines))
    return least


def _least(axis: Axis) -> int:
    """Counts the evaluations that an axis needs: for names, one a different average."""
    if not axis.names:
        return min(_LEAST, len(axis.grid(_LEAST)))
    different: list[np.ndarray] = []
    for name in axis.names:
        weights = axis.coefficients(name)
        if not any(are_alike(weights, others) for others in different):
            different.append(weights)
    return len(different)
