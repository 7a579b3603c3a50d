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
    """Returns the weights of θ̄ + α(θ̄ − θ̄'), which goes on from an older mean.

    c + α(c − c'). They sum to 1, some are negative, and the noise gain grows with α.

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


def noise_gain(coefficients: Sequence[float] | np.ndarray) -> float:
    """Returns what a merge multiplies independent noise of the checkpoints by, ‖c‖₂.

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


def _weights(value: object, name: str) -> np.ndarray:
    numbers = arguments.numbers(value, name)
    if numbers.ndim != 1 or not abs(numbers.sum() - 1) <= 1e-6:  # also refuses NaN
        raise ValueError(
            f"{name} are one weight a checkpoint, with sum 1; got {brief(value)}."
        )
    return numbers
