"""Soups: means of models, whose members or weights are chosen by a method."""

import dataclasses
import math
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema_optax._messages import arguments
from ema_optax._messages.progress import Progress, shown
from ema_optax._messages.text import brief, nearest, one_line
from ema_optax._reconstruction.merging import merge
from ema_optax._reconstruction.scores import EvaluationWarning, as_score
from ema_optax._reconstruction.slots import Slots
from ema_optax._reconstruction.sums import InMemory, Source
from ema_optax._reconstruction.weights import uniform_coefficients
from ema_optax._trees import trees

Evaluate: TypeAlias = Callable[[Any], Any]
Method: TypeAlias = Literal["greedy", "uniform", "stock"]

_METHODS = ("greedy", "uniform", "stock")


@dataclasses.dataclass(frozen=True)
class Soup:
    """A mean of models, with how it was made.

    Attributes:
        tree: The mean, like the params.
        method: `"greedy"`, `"uniform"` or `"stock"`.
        members: Numbers of the models in it; for `"greedy"` in the order they came in.
        coefficients: Weight of each model; None where leaves have ratios of their own.
        ratios: For `"stock"`, how far each leaf goes from the start to the mean.
        score: Score of the soup; None where it was not evaluated, or that failed.
        scores: Score of each model alone, NaN where that failed; empty where the models
            were not evaluated.
    """

    tree: Any = dataclasses.field(repr=False)
    method: str
    members: tuple[int, ...]
    coefficients: tuple[float, ...] | None
    ratios: Mapping[str, float] = dataclasses.field(repr=False)
    score: float | None
    scores: tuple[float, ...]


def soup(
    models: Sequence[Any],
    evaluate: Evaluate | None = None,
    *,
    method: Method = "greedy",
    params: optax.Params | None = None,
    start: Any = None,
    maximize: bool = False,
    progress: Progress = False,
) -> Soup:
    """Averages models, such as runs that were fine-tuned from one start.

    `"greedy"` goes through the models from the best to the worst by their own score,
    and keeps each with which the mean is no worse. `"uniform"` is the mean of all.
    `"stock"` goes from the start to the mean of all, in each leaf by the ratio
    t = n·cos θ / (1 + (n−1)·cos θ), where cos θ is the mean over all pairs of models
    of the cosine between their offsets from the start; below 0 it counts as 0.

    Sums are taken in float64. Models are read one at a time: memory holds the running
    sum, one candidate and what is evaluated; for `"stock"` one leaf of each.

    Args:
        models: At least two trees of arrays, or what `checkpoint.stored` gives.
        evaluate: A function of a tree like the params, that returns a score, or several
            numbers, whose mean is taken. Only `"greedy"` needs it. A model that it
            fails on, or gives no finite score, is warned of and left out.
        method: `"greedy"`, `"uniform"` or `"stock"`.
        params: What the result should be like, as in `merge`.
        start: The params that the models were trained from, for `"stock"`: a tree or a
            source.
        maximize: Whether a higher score is better, as of an accuracy.
        progress: As in `merge`; of `"greedy"` the evaluations are counted.

    Raises:
        ValueError: If there are fewer than two models, if they or the start do not fit
            each other, if an argument that the method needs is missing, or no
            evaluation gave a score.

    Warns:
        EvaluationWarning: If an evaluation failed.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1; Jang et al. 2024,
    arXiv:2403.19522 (Model Stock), equation 3.

    >>> models = [{"w": jnp.array([x])} for x in (1.0, 2.0, 9.0)]
    >>> mean = soup(models, lambda params: abs(params["w"][0] - 1.6))
    >>> mean.tree, mean.members
    ({'w': Array([1.5], dtype=float32)}, (1, 0))
    """
    if not isinstance(models, (list, tuple)) or len(models) < 2:
        raise ValueError(
            f"soup needs a list of at least two models, got {brief(models)}."
        )
    if method not in _METHODS:
        raise ValueError(
            f"method is one of {', '.join(_METHODS)}, got {brief(method)}. "
            f"{nearest(str(method)[:20], _METHODS)}"
        )
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate is a function of a tree, got {brief(evaluate)}.")
    if (start is None) == (method == "stock"):
        raise ValueError(
            "method='stock' needs start=…, the params that all models were trained "
            f"from; the others take none. Got method={method!r} and "
            f"start={brief(start)}."
        )
    maximize = arguments.flag(maximize, "maximize")
    if method == "greedy":
        if evaluate is None:
            raise ValueError(
                "method='greedy' needs evaluate, a function of a tree that returns a "
                "score. Without one pass method='uniform'."
            )
        return _greedy(models, evaluate, params, progress, maximize=maximize)
    count = len(models)
    weights: tuple[float, ...] | None = (1 / count,) * count
    ratios: Mapping[str, float] = {}
    if method == "uniform":
        mean = merge(
            models, uniform_coefficients(count), params=params, progress=progress
        )
    else:
        mean, ratios = _stock(models, start, params, progress)
        weights = None
    score = None if evaluate is None else _scored(evaluate, mean, "the soup")
    return Soup(
        tree=mean,
        method=method,
        members=tuple(range(count)),
        coefficients=weights,
        ratios=types.MappingProxyType(dict(ratios)),
        score=None if score is None or math.isnan(score) else score,
        scores=(),
    )


def _greedy(
    models: Sequence[Any],
    evaluate: Evaluate,
    params: optax.Params | None,
    progress: Progress,
    *,
    maximize: bool,
) -> Soup:
    slots = Slots(models, params, None)
    sign = -1.0 if maximize else 1.0
    scores = [math.nan] * len(models)
    with shown(progress, "evaluating", 2 * len(models) - 1) as report:
        for i, source in enumerate(slots.sources):
            tree = _placed(slots, _read(slots, source))
            scores[i] = _scored(evaluate, tree, f"model {i}")
            del tree
            report(i + 1)
        order = [i for i in range(len(models)) if not math.isnan(scores[i])]
        order.sort(key=lambda i: sign * scores[i])  # the first of those that are equal
        if not order:
            raise ValueError(
                f"evaluate gave none of the {len(models)} models a finite score, so "
                "that none can be chosen. The warnings say what happened."
            )
        members = [order[0]]
        score = scores[order[0]]
        total = dict(_read(slots, slots.sources[order[0]]))
        for done, i in enumerate(order[1:], len(models) + 1):
            with_it = (
                (path, total[path] + array)
                for path, array in _read(slots, slots.sources[i])
            )
            tree = _placed(slots, with_it, len(members) + 1)
            new_score = _scored(evaluate, tree, f"the mean with model {i}")
            del tree
            if sign * new_score <= sign * score:  # False for NaN
                members.append(i)
                score = new_score
                # It is read again: to keep it would be one tree more in memory.
                for path, array in _read(slots, slots.sources[i]):
                    total[path] += array
            report(done)
    weights = [1 / len(members) if i in members else 0.0 for i in range(len(models))]
    return Soup(
        tree=_placed(slots, total.items(), len(members)),
        method="greedy",
        members=tuple(members),
        coefficients=tuple(weights),
        ratios=types.MappingProxyType({}),
        score=score,
        scores=tuple(scores),
    )


def _stock(
    models: Sequence[Any], start: Any, params: optax.Params | None, progress: Progress
) -> tuple[Any, dict[str, float]]:
    """Computes the Model Stock, and the ratio of each leaf."""
    slots = Slots(models, params, None)
    origin = start if isinstance(start, Source) else InMemory(start)
    _check_start(origin, slots.sources[0])
    count = len(models)
    ratios: dict[str, float] = {}
    leaves: dict[str, jax.Array] = {}
    with shown(progress, "averaging", len(slots.targets)) as report:
        for done, path in enumerate(slots.targets, 1):
            first = _double(origin, path)
            mean, directions, moved = np.zeros_like(first), np.zeros_like(first), 0
            for source in slots.sources:
                offset = _double(source, path) - first
                mean += offset / count
                norm = np.linalg.norm(offset)
                if norm:  # one that did not move has no direction: its cosines are 0
                    directions += offset / norm
                    moved += 1
            # |sum of n unit vectors|² = n + the sum of the cosines of all n(n−1) pairs.
            cosines = np.linalg.norm(directions) ** 2 - moved
            cosine = min(max(float(cosines) / (count * (count - 1)), 0.0), 1.0)
            ratios[path] = count * cosine / (1 + (count - 1) * cosine)
            leaves[path] = _leaf(slots, path, first + ratios[path] * mean)
            report(done)
    return slots.filled([leaves])[0], ratios


def _check_start(start: Source, model: Source) -> None:
    odd = sorted(set(start.leaves) ^ set(model.leaves))
    if odd:
        which = "lacks" if odd[0] in model.leaves else "also has"
        raise ValueError(
            f"start is not of the models' kind: it {which} '{odd[0]}'. Pass the params "
            "that all of them were trained from."
        )
    for path, leaf in start.leaves.items():
        other = model.leaves[path]
        kinds = [jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (leaf, other)]
        if leaf.shape != other.shape or kinds[0] != kinds[1]:
            raise ValueError(
                f"start is not of the models' kind: '{path}' is {trees.describe(leaf)} "
                f"in it and {trees.describe(other)} in the models."
            )


def _double(source: Source, path: str) -> np.ndarray:
    """Reads a leaf as a copy in float64."""
    shape, dtype = source.leaves[path].shape, source.leaves[path].dtype
    array = source.read(path, (slice(None),) * len(shape))
    return array.astype(np.promote_types(trees.wide(dtype), np.float64)).reshape(shape)


def _read(slots: Slots, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    for path in slots.targets:
        yield path, _double(source, path)


def _leaf(slots: Slots, path: str, array: np.ndarray) -> jax.Array:
    target = slots.targets[path]
    return jax.device_put(array.astype(target.dtype), target.sharding)


def _placed(
    slots: Slots, sums: Iterable[tuple[str, np.ndarray]], count: int = 1
) -> Any:
    """Builds the mean of sums of `count` models, like the params."""
    leaves = {path: _leaf(slots, path, array / count) for path, array in sums}
    return slots.filled([leaves])[0]


def _scored(evaluate: Evaluate, tree: Any, what: str) -> float:
    """Evaluates a tree; NaN with a warning where that fails."""
    score = math.nan
    try:
        score = as_score(evaluate(tree)).value
        problem = f"gave {score}"
    except Exception as error:  # whatever the user's function raises
        problem = f"raised {type(error).__name__}: {one_line(error)}"
    if math.isfinite(score):
        return score
    warnings.warn(
        f"evaluate {problem} for {what}: it counts as without a score.",
        EvaluationWarning,
        stacklevel=4,
    )
    return math.nan
