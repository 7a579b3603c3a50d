"""Coefficients of a merge: of the last checkpoints, of a decay, of a learning rate.

A mean of checkpoints stands for a run whose learning rate was decayed: in the mean of
θⱼ = θ₀ − Σ gᵢ an update gᵢ counts with all checkpoints after it, wᵢ = Σ cⱼ over j ≥ i.

Source: Tian et al. 2025, arXiv:2507.17634 (WSM), section 3.
"""

from collections.abc import Sequence

import numpy as np

from ema_optax._decays.decays import DecayLike, as_decay
from ema_optax._messages import arguments
from ema_optax._messages.text import brief


def uniform_coefficients(count: int, *, last: int | None = None) -> np.ndarray:
    """Weighs the last k of `count` checkpoints by 1/k, and the others by 0.

    Args:
        count: Number of checkpoints, ≥ 1.
        last: k in [1, count]; None is all of them.

    Source: Kaddour 2022, arXiv:2209.14981 (LAWA), for the last k.

    >>> uniform_coefficients(4, last=2)
    array([0. , 0. , 0.5, 0.5])
    """
    arguments.one_number(count, "count")
    k = count if last is None else last
    arguments.one_number(k, "last")
    if not 1 <= k <= count:
        raise ValueError(
            f"The last {k} of {count} checkpoints: needs 1 ≤ last ≤ count."
        )
    return np.where(np.arange(count) >= count - k, 1 / k, 0.0)


def decay_coefficients(decay: DecayLike, steps: Sequence[int]) -> np.ndarray:
    """Weighs checkpoints as a decay does that folds them at their steps alone.

    The first checkpoint is what the average starts as, and takes the weight that is
    left; each later one is folded with the product of the decays since the one before.

    Args:
        decay: A decay; a float β means `warmup(β)`, as in `ema_params`.
        steps: Updates at which the checkpoints were saved, ascending, ≥ 0.

    Returns:
        float64[checkpoints], sum 1.

    Raises:
        ValueError: If steps are not ascending.

    >>> import ema_optax
    >>> decay_coefficients(ema_optax.uniform(), [100, 200, 300, 400])
    array([0.25, 0.25, 0.25, 0.25])
    """
    times = arguments.ascending(steps, "steps")
    chosen = as_decay(decay, "decay_coefficients")
    weights = np.zeros(times.size)
    weights[0] = 1.0
    for i in range(1, times.size):
        newest = chosen.newest_weight(int(times[i]), every=int(times[i] - times[i - 1]))
        weights *= 1 - newest
        weights[i] = newest
    return weights


def lr_decay_coefficients(multipliers: Sequence[float]) -> np.ndarray:
    """Weighs checkpoints so that their mean stands for a decay of the learning rate.

    cⱼ = wⱼ − wⱼ₊₁, with w₀ = 1 and 0 after the last: merging checkpoints of a constant
    learning rate with them counts each update as the decay would have scaled it.

    Args:
        multipliers: w of the learning rate between each checkpoint and the next, in
            [0, 1]: one less than there are checkpoints.

    Returns:
        float64[len(multipliers) + 1], sum 1; negative where a multiplier rises.

    Raises:
        ValueError: If a multiplier is outside [0, 1].

    Source: Tian et al. 2025, arXiv:2507.17634 (WSM), theorem 3.1.

    >>> lr_decay_coefficients([0.75, 0.5, 0.25])  # linear decay: the plain mean
    array([0.25, 0.25, 0.25, 0.25])
    """
    w = arguments.numbers(multipliers, "multipliers")
    if w.ndim != 1 or not np.all((w >= 0) & (w <= 1)):
        raise ValueError(
            f"Multipliers of the learning rate are in [0, 1], got {brief(multipliers)}."
        )
    return -np.diff(np.concatenate([[1.0], w, [0.0]]))


def lr_decay(coefficients: Sequence[float] | np.ndarray) -> np.ndarray:
    """Computes the decay of the learning rate that an average stands for.

    wᵢ = Σ cⱼ over j ≥ i: the multiplier of the updates between checkpoints i−1 and i.
    Of a whole run's average, take `[initial_weight, *weights]` of its `profile`.

    Args:
        coefficients: Weights of checkpoints, in the order of their steps.

    Returns:
        float64[len(coefficients) − 1].

    Source: Tian et al. 2025, arXiv:2507.17634 (WSM), section 3.

    >>> lr_decay([0.25, 0.25, 0.25, 0.25])
    array([0.75, 0.5 , 0.25])
    """
    weights = np.atleast_1d(arguments.numbers(coefficients, "coefficients"))
    return np.cumsum(weights[::-1])[::-1][1:]


def noise_gain(coefficients: Sequence[float] | np.ndarray) -> float:
    """Returns the factor ‖c‖₂ by which a merge scales independent noise of its trees.

    1/√n for the plain mean of n, 1 for one checkpoint alone.

    Args:
        coefficients: [checkpoints].

    >>> noise_gain([0.25, 0.25, 0.25, 0.25]), noise_gain([2.0, -1.0]) > 2
    (0.5, True)
    """
    numbers = arguments.numbers(coefficients, "coefficients")
    if numbers.ndim != 1:
        raise ValueError(
            f"coefficients are one number a checkpoint, got {brief(coefficients)}."
        )
    return float(np.linalg.norm(numbers))
