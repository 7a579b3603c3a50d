"""How long an average is after any number of updates: mean age, size, what is left.

Runs of up to a million updates are summed as `profile` does. Longer ones are summed on
a grid: update by update where they are young, in blocks of a 4,096th of their age else.
"""

import dataclasses

import numpy as np

from ema_optax._decays.decay import Decay
from ema_optax._decays.profiles import profile

_EXACT = 2**20  # updates
_YOUNG = 2**16  # updates, or folds, that are looked at one by one on the grid
_FIRST = 2**12  # updates of the run that are looked at one by one on the grid
_FINER = 2**12  # blocks for each factor of e
_GONE = -800.0  # log of a weight that float64 holds as 0
LAST = 2**31 - 1  # where a count stays


@dataclasses.dataclass(frozen=True)
class Length:
    """The length of an average, as in `Profile`, without the weight of each step.

    Attributes:
        initial_weight: Weight of the initial params.
        mean_age: Mean distance of the averaged params from the last update, in updates.
        effective_size: 1/Σ weights²: of so many params it is the plain mean.
    """

    initial_weight: float
    mean_age: float
    effective_size: float


def length(decay: Decay, count: int, every: int) -> Length:
    """Computes how long an average is.

    Args:
        decay: Its decay.
        count: Updates it has seen, ≥ 0.
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
    """Finds the smallest count at which less of the initial params is left.

    None if counts end before.

    >>> import ema_optax
    >>> updates_until(ema_optax.constant(0.9999), 1, 0.01)  # log .01 / log .9999
    46050
    """
    if every > LAST:
        return None
    folds = np.arange(every, _EXACT + 1, every)
    if folds.size:
        left = np.cumsum(decay.log_product(folds, every))
        gone = np.flatnonzero(left < np.log(initial_weight))
        if gone.size:
            return int(folds[gone[0]])
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
    # Log of the weight of all that is older, had every update been folded.
    older = np.concatenate([[0.0], np.cumsum(logs)])
    waiting = count % every  # updates since the newest fold
    folds = _edges(count // every)
    left = np.interp(waiting + every * folds, ages, older)
    left = np.exp(left - left[0])
    weights, sizes = -np.diff(left), np.diff(folds)
    fold_ages = waiting + every * (folds[:-1] + (sizes - 1) / 2)
    initial = float(left[-1])
    return Length(
        initial_weight=initial,
        mean_age=float(weights @ fold_ages) + initial * count,
        effective_size=1 / float(weights @ (weights / sizes) + initial**2),
    )


def _edges(end: int, finely_from: int | None = None) -> np.ndarray:
    """Returns where blocks of growing size begin, from 0, and the end."""
    young = np.arange(min(_YOUNG, end) + 1, dtype=np.float64)
    parts = [young, [end]]
    if end > _YOUNG:
        blocks = int(_FINER * np.log(end / _YOUNG)) + 2
        parts.append(np.rint(np.geomspace(_YOUNG, float(end), blocks)))
    if finely_from is not None:
        parts.append(np.arange(finely_from, end + 1, dtype=np.float64))
    return np.unique(np.concatenate(parts))
