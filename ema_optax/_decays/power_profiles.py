"""Profiles t^γ: the width of an exponent, and the exponent of a width."""

# pyright: strict

import math

import numpy as np

from ema_optax._messages import arguments

_WIDEST = 1 / math.sqrt(12)  # the width of the plain mean, exponent 0


def width_from_exponent(exponent: float) -> float:
    """Converts an exponent to a width: the standard deviation of t^γ over the run.

    Args:
        exponent: γ > −1.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.1.

    >>> round(width_from_exponent(6.94), 4)
    0.1
    """
    arguments.one_number(exponent, "An exponent")
    if not -1 < exponent < math.inf:
        raise ValueError(f"An exponent is above -1 and finite, got {exponent}.")
    g = exponent
    return math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def exponent_from_width(width: float) -> float:
    """Converts a width to the exponent γ ≥ 0 whose profile t^γ has it.

    Args:
        width: Standard deviation over the run's length, in (0, 0.2886…].

    Raises:
        ValueError: If `width` is outside that interval.

    Source: the largest real root of γ³ + 7γ² + (16−σ⁻²)γ + 12 − σ⁻²; Karras et al.
    2024, arXiv:2312.02696, section 3.1.

    >>> round(exponent_from_width(0.05), 2)
    16.97
    """
    arguments.one_number(width, "A width")
    if not 0 < width <= _WIDEST:
        raise ValueError(
            f"A width is in (0, {_WIDEST:.4f}], got {width}: the widest average is the "
            "plain mean, uniform(). For a fixed length in updates use half_life(steps)."
        )
    inverse_square = width**-2
    roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
    return max(float(np.max(roots.real)), 0.0)
