"""Computes the length of an average after any number of updates.

Runs of up to a million updates are summed as in `profile`. Longer runs are summed on a
grid: young updates one by one, older ones in blocks of a 4,096th of their age.
"""

import dataclasses

import numpy as np

from ema_optax._decays.decay import Decay
from ema_optax._decays.profiles import profile

_EXACT = 2**20  # updates
_YOUNG = 2**16  # newest updates, or folds, that the grid has one by one
_FIRST = 2**12  # first updates of the run that the grid has one by one
_FINER = 2**12  # blocks for each factor of e in age
_GONE = -800.0  # log of a weight that float64 holds as 0
LAST = 2**31 - 1  # the last count: an int32 counts no further


@dataclasses.dataclass(frozen=True)
class Length:
    """Holds the length of an average, as `Profile` without the weights of the steps.

    Attributes:
        initial_weight: Weight of the initial params.
        mean_age: Mean distance of the averaged params from the last update, in updates.
        effective_size: 1/Σ weights²: a plain mean of so many params is as smooth.
    """

    initial_weight: float
    mean_age: float
    effective_size: float


def length(decay: Decay, count: int, every: int) -> Length:
    """Computes mean age, effective size and initial weight of an average.

    Args:
        decay: The decay of the average.
        count: Updates that the average has seen, ≥ 0.
        every: Updates between folds, ≥ 1.

    >>> import ema_optax
    >>> round(length(ema_optax.constant(0.98), 10_000_000, 1).mean_age, 9)  # β/(1−β)
    49.0
    """
    if count < every:
        return Length(1.0, float(count), 1.0)
    if count <= _EXACT:
        run = profile(decay, count, every)
        return Length(run.initial_weight, run.mean_age, run.effective_size)
    return _on_grid(decay, count, every)


def length_of_mean(copies: int, count: int, every: int) -> Length:
    """Computes the length of the mean of the params at the last folds.

    Args:
        copies: Most params in the mean, ≥ 1.
        count: Updates seen, ≥ 0.
        every: Updates between folds, ≥ 1.

    >>> length_of_mean(3, 11, 2)  # of the params after updates 6, 8 and 10
    Length(initial_weight=0.0, mean_age=3.0, effective_size=3.0)
    """
    filled = min(copies, count // every)
    if not filled:
        return Length(1.0, float(count), 1.0)
    age = count % every + every * (filled - 1) / 2
    return Length(0.0, age, float(filled))


def weight_of_fold(decay: Decay, count: int, every: int) -> float:
    """Returns the weight of the params in the newest fold, at or before `count`.

    >>> import ema_optax
    >>> weight_of_fold(ema_optax.constant(0.98), 10, 2)  # 1 − 0.98²
    0.0396...
    """
    newest = count - count % every
    if every <= _EXACT:
        return float(decay.newest_weight(newest, every))
    steps = np.linspace(newest - every + 1, newest, _EXACT)
    return float(-np.expm1(np.mean(decay.log_product(steps)) * every))


def updates_until(decay: Decay, every: int, initial_weight: float) -> int | None:
    """Finds the first count at which the initial params weigh less than given.

    Returns None where the counts end before.

    >>> import ema_optax
    >>> updates_until(ema_optax.constant(0.9999), 1, 0.01)  # log .01 / log .9999
    46050
    """
    if every > LAST:
        return None
    folds = np.arange(every, _EXACT + 1, every)
    if folds.size:
        log_weights = np.cumsum(decay.log_product(folds, every))
        below = np.flatnonzero(log_weights < np.log(initial_weight))
        if below.size:
            return int(folds[below[0]])
    low, high = 0, max(every, _EXACT)
    while length(decay, high, every).initial_weight >= initial_weight:
        if high == LAST:
            return None
        low, high = high, min(2 * high, LAST)
    while high - low > 1:
        middle = (low + high) // 2
        if length(decay, middle, every).initial_weight >= initial_weight:
            low = middle
        else:
            high = middle
    return high


def _on_grid(decay: Decay, count: int, every: int) -> Length:
    ages = _edges(count, count - _FIRST)
    sizes = np.diff(ages)
    steps = count - ages[:-1] - (sizes - 1) / 2  # in the middle of each block
    steps = np.maximum(steps, 1)  # float64 rounds counts beyond 2⁵³
    logs = np.maximum(decay.log_product(steps) * sizes, _GONE)
    # Log of the weight of all older params, had every update been folded.
    older = np.concatenate([[0.0], np.cumsum(logs)])
    waiting = count % every  # updates since the newest fold
    folds = _edges(count // every)
    older_logs = np.interp(waiting + every * folds, ages, older)
    older_weights = np.exp(older_logs - older_logs[0])
    weights, sizes = -np.diff(older_weights), np.diff(folds)
    fold_ages = waiting + every * (folds[:-1] + (sizes - 1) / 2)
    initial = float(older_weights[-1])
    return Length(
        initial_weight=initial,
        mean_age=float(weights @ fold_ages) + initial * count,
        effective_size=1 / float(weights @ (weights / sizes) + initial**2),
    )


def _edges(end: int, finely_from: int | None = None) -> np.ndarray:
    """Lists the edges of blocks that grow with age, from 0 to `end`."""
    young = np.arange(min(_YOUNG, end) + 1, dtype=np.float64)
    parts = [young, [end]]
    if end > _YOUNG:
        blocks = int(_FINER * np.log(end / _YOUNG)) + 2
        parts.append(np.rint(np.geomspace(_YOUNG, float(end), blocks)))
    if finely_from is not None:
        parts.append(np.arange(finely_from, end + 1, dtype=np.float64))
    return np.unique(np.concatenate(parts))
