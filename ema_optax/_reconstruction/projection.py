"""How snapshots with power profiles combine into another power profile.

A snapshot at step tᵢ with exponent γᵢ averages the params with the density
pᵢ(t) = (γᵢ+1)·t^γᵢ / tᵢ^(γᵢ+1) on [0, tᵢ]. A sum Σ xᵢ·snapshotᵢ averages them with
Σ xᵢ·pᵢ, and the best x brings that closest to the profile that is wanted.

Steps are continuous here, and nothing is lost by it: a shadow that is folded at every
k-th update with the product of its decays weighs the params of each fold by exactly the
density's integral over the k updates before it.

Source: Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ema_optax._messages import arguments
from ema_optax._messages.text import brief

Numbers: TypeAlias = Sequence[float] | np.ndarray

# Profile errors above which `reconstruct` warns of an average, and refuses it.
DOUBTFUL, WRONG = 0.05, 0.5


def coefficients(
    steps: Numbers,
    exponents: Numbers | float,
    exponent: float,
    step: float,
    *,
    ridge: float = 0.0,
) -> np.ndarray:
    """Finds the weights of snapshots whose sum is nearest to an average.

    They minimise

        T·∫ (Σ xᵢ·pᵢ(t) − p(t))² dt + ridge·Σ xᵢ²,    Σ xᵢ = 1,    T = step,

    where p is the profile wanted. The first term bounds the squared error of each
    param, in units of its mean square deviation from any constant over the run. With
    the variance of the snapshots' rounding in the same units as `ridge`, the sum is the
    error to be expected: see `rounding_variance`.

    Args:
        steps: The step tᵢ > 0 of each snapshot, in updates.
        exponents: Its γᵢ > −½, or one for all.
        exponent: γ > −½ of the average wanted.
        step: The last step of the average wanted, > 0.
        ridge: ≥ 0.

    Returns:
        float64[snapshots], sum 1. Those later than `step` are used where that helps.

    Raises:
        ValueError: If there are no snapshots, two are the same, or a number is outside
            its interval.

    Source: Karras et al. 2024, arXiv:2312.02696, equation 5 and appendix C.3. There the
    sum is scaled to 1 afterwards; here it is held at 1 in the minimisation.

    >>> steps, exponents = [1000, 2000, 3000, 4000], 6.94
    >>> coefficients(steps, exponents, 6.94, 4000).round(6) + 0.0
    array([0., 0., 0., 1.])
    >>> coefficients(steps, exponents, 16.97, 4000).round(2)  # shorter than any of them
    array([-0.03, -0.05, -0.2 ,  1.27])
    """
    weights, _ = fit(steps, exponents, [exponent], step, ridge=ridge)
    return weights[:, 0]


def fit(
    steps: Numbers,
    exponents: Numbers | float,
    wanted: Numbers,
    step: float,
    *,
    ridge: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Solves for `coefficients` and `profile_error` of several averages at once.

    Args:
        steps: As for `coefficients`.
        exponents: As for `coefficients`.
        wanted: γ > −½ of each average wanted.
        step: As for `coefficients`.
        ridge: As for `coefficients`.

    Returns:
        float64[snapshots, averages] and float64[averages].
    """
    t, g = _checked(steps, exponents)
    wanted_t, wanted_g = _checked([step] * len(wanted), wanted)
    arguments.one_number(ridge, "ridge")
    if not 0 <= ridge < np.inf:
        raise ValueError(f"ridge must be ≥ 0 and finite, got {ridge}.")
    _check_distinct(t, g)
    scale = np.sqrt(_inner(t, g, t, g))  # norms of the profiles, per √T
    gram = _inner(t[:, None], g[:, None], t, g)
    targets = _inner(t[:, None], g[:, None], wanted_t, wanted_g)
    # Unknowns are x·norm: the matrix then has a diagonal of ones, and profiles of all
    # lengths count alike in its rounding.
    matrix = gram / np.outer(scale, scale)
    matrix[np.diag_indices(len(t))] += ridge / (step * scale**2)
    # x = u + λ·v with u free of the constraint and v what holding the sum changes.
    sides = np.concatenate([targets, np.ones((len(t), 1))], axis=1) / scale[:, None]
    solved = np.linalg.solve(matrix, sides) / scale[:, None]
    free, change = solved[:, :-1], solved[:, -1:]
    x = free + change * (1 - free.sum(axis=0)) / change.sum()
    x /= x.sum(axis=0)
    squares = _inner(wanted_t, wanted_g, wanted_t, wanted_g)
    distances = np.sum(x * (gram @ x - 2 * targets), axis=0) + squares
    return x, np.sqrt(np.maximum(distances, 0.0) / squares)


def profile_error(
    weights: np.ndarray,
    steps: Numbers,
    exponents: Numbers | float,
    exponent: float,
    step: float,
) -> float:
    """Measures how far a combined profile is from the one wanted, over its norm.

    ‖Σ xᵢ·pᵢ − p‖₂ / ‖p‖₂ bounds the error of the average: with D the root mean square
    deviation of a param from any constant over the run, the combined average differs
    from the one wanted by at most profile_error·D·(γ+1)/√(2γ+1). Below 1e-7 it is
    rounding.

    Args:
        weights: float64[snapshots], as `coefficients` gives them.
        steps: As for `coefficients`.
        exponents: As for `coefficients`.
        exponent: As for `coefficients`.
        step: As for `coefficients`.

    >>> profile_error(np.array([1.0]), [1000], 6.94, 6.94, 1000)
    0.0
    """
    t, g = _checked(steps, exponents)
    wanted_t, wanted_g = _checked([step], exponent)
    square = _inner(wanted_t, wanted_g, wanted_t, wanted_g)[0]
    gram = _inner(t[:, None], g[:, None], t, g)
    cross = _inner(t, g, wanted_t, wanted_g)
    distance = weights @ gram @ weights - 2 * (weights @ cross) + square
    return float(np.sqrt(max(distance, 0.0) / square))


def rounding_variance(dtype: DTypeLike) -> float:
    """Computes the mean square of a relative rounding error to a floating dtype.

    The mean is over numbers of all sizes: an error is uniform within ±½ of the last
    digit, and that is eps/m of a number m·2ᵏ whose 1 ≤ m < 2 is spread as 1/m.

    As a `ridge`, it stands for params whose deviation over the run is about as large as
    they are themselves, as it is for weights that start near zero.

    >>> round(rounding_variance("float16") ** 0.5, 6)
    0.000207
    """
    kind = arguments.dtype(dtype, "dtype")
    if not jnp.issubdtype(kind, jnp.inexact):
        raise TypeError(f"dtype must be a floating one, got {kind}.")
    eps = float(jnp.finfo(kind).eps)
    return eps**2 / 12 * 3 / (8 * math.log(2))  # the mean of 1/m² is 3/(8·ln 2)


def _inner(
    ta: np.ndarray, ga: np.ndarray, tb: np.ndarray, gb: np.ndarray
) -> np.ndarray:
    """Integrates ∫ p_a·p_b dt of the profiles that end at ta and tb."""
    early = np.minimum(ta, tb)
    late = np.maximum(ta, tb)
    late_exponent = np.where(ta <= tb, gb, ga)
    # A difference of logs: (early/late)^γ underflows to 0 for far ones, as it should.
    ratio = np.exp(late_exponent * (np.log(early) - np.log(late)))
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * ratio / late


def _checked(steps: object, exponents: object) -> tuple[np.ndarray, np.ndarray]:
    t = arguments.numbers(steps, "steps")
    if t.ndim != 1 or not t.size or not np.all((t > 0) & np.isfinite(t)):
        raise ValueError(
            f"Snapshots have steps > 0, in a sequence of at least one; got "
            f"{brief(steps)}."
        )
    g = arguments.numbers(exponents, "exponents")
    if g.shape not in ((), t.shape):
        raise ValueError(
            f"There are {t.size} steps and exponents of shape {g.shape}: give one for "
            "each snapshot, or one for all."
        )
    g = np.broadcast_to(g, t.shape)
    if not np.all((g > -0.5) & np.isfinite(g)):
        raise ValueError(
            f"Profiles can be combined if their exponents are above -1/2, got "
            f"{brief(exponents)}. exponent_from_width(0.05) gives that of a width."
        )
    return t, g


def _check_distinct(t: np.ndarray, g: np.ndarray) -> None:
    order = np.lexsort((g, t))
    same = (np.diff(t[order]) == 0) & (np.diff(g[order]) == 0)
    if np.any(same):
        i = order[np.flatnonzero(same)[0]]
        raise ValueError(
            f"Two snapshots are of the same step {t[i]:g} and exponent {g[i]:g}: "
            "leave one of them out."
        )
