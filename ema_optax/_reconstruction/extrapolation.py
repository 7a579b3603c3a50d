"""Extrapolation beyond a mean of checkpoints, as coefficients of the checkpoints."""

from collections.abc import Sequence

import numpy as np

from ema_optax._messages import arguments
from ema_optax._messages.text import brief


def extrapolated(
    coefficients: Sequence[float] | np.ndarray,
    origin: Sequence[float] | np.ndarray,
    alpha: float,
) -> np.ndarray:
    """Extrapolates from an older mean of checkpoints through a newer: θ̄ + α(θ̄ − θ̄').

    The weights c + α(c − c') sum to 1. Some are negative, and the noise gain grows with
    α.

    Args:
        coefficients: c, the weights of θ̄, [checkpoints], with sum 1.
        origin: c', the weights of θ̄', of the same checkpoints, with sum 1.
        alpha: α, how far to go; 0 is θ̄ itself, and −1 is θ̄'.

    Returns:
        float64[checkpoints], sum 1.

    Raises:
        ValueError: If the two are not of the same checkpoints, do not sum to 1, or a
            number is not finite.

    Source: Zheng et al. 2024, arXiv:2404.16792 (ExPO), equation 1, where θ̄ and θ̄' are
    single checkpoints.

    >>> extrapolated([0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], 0.5)
    array([0.125, 0.125, 0.375, 0.375])
    """
    c = _weights(coefficients, "coefficients")
    start = _weights(origin, "origin")
    if c.shape != start.shape:
        raise ValueError(
            f"origin has weights for {start.size} checkpoints, and coefficients for "
            f"{c.size}: give those that θ̄' leaves out the weight 0."
        )
    arguments.one_number(alpha, "alpha")
    if not np.isfinite(float(alpha)):
        raise ValueError(f"alpha is how far to go, such as 0.3; got {float(alpha)}.")
    return c + float(alpha) * (c - start)


def _weights(value: object, name: str) -> np.ndarray:
    numbers = arguments.numbers(value, name)
    if numbers.ndim != 1 or not abs(numbers.sum() - 1) <= 1e-6:  # also refuses NaN
        raise ValueError(
            f"{name} are one weight a checkpoint, with sum 1; got {brief(value)}."
        )
    return numbers
