"""Decays by name: how much of the old average a step keeps."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

from ema_optax.families import (
    Constant,
    Cosine,
    Debiased,
    Decay,
    Fraction,
    HalfLife,
    InversePower,
    Power,
    Ramp,
    Schedule,
    StartAfter,
    Warmup,
    check_wide_enough,
)

DecayLike: TypeAlias = float | jax.Array | Decay | Callable[[Any], Any]

_WIDEST = 1 / math.sqrt(12)  # the width of the plain mean, exponent 0


def constant(decay: float) -> Decay:
    """The same decay at every step: v_t = β·v_(t−1) + (1−β)·θ_t.

    Averages over about 1/(1−β) values and lags β/(1−β) steps. It keeps β^t of the
    initial params; `warmup` and `debiased` do not wait that out.

    Args:
        decay: β in [0, 1), the weight kept on the old shadow.

    Raises:
        ValueError: If `decay` is outside [0, 1).

    >>> constant(0.98)(step=1)
    0.98
    """
    return Constant(decay)


def warmup(decay: float, offset: float = 10) -> Decay:
    """min(β, (1+t)/(offset+t)): short averages while there is little to average.

    Args:
        decay: β in [0, 1) that the warm-up ends at.
        offset: Where the ramp starts, ≥ 1: the first step keeps 2/(offset+1).

    Raises:
        ValueError: If an argument is outside its interval.

    Source: TensorFlow's `ExponentialMovingAverage(decay, num_updates=t)`.

    >>> decay = warmup(0.98)
    >>> round(decay(5), 12), decay(10_000)
    (0.4, 0.98)
    """
    return Warmup(decay, offset)


def debiased(decay: float) -> Decay:
    """β(1−β^(t−1))/(1−β^t): the constant average without any of the initial params.

    The same average as Adam's moments, started at zero and divided by 1−β^t.

    Args:
        decay: β in [0, 1).

    Raises:
        ValueError: If `decay` is outside [0, 1).

    Source: Kingma and Ba 2015, arXiv:1412.6980, section 3.

    >>> debiased(0.9)(step=1)
    0.0
    """
    return Debiased(decay)


def uniform() -> Decay:
    """(t−1)/t: the plain mean of all params so far (Polyak–Ruppert, SWA).

    >>> uniform()(step=4)
    0.75
    """
    return Power(exponent=0.0)


def power(width: float | None = None, *, exponent: float | None = None) -> Decay:
    """(1−1/t)^(γ+1): weights ∝ t^γ, an average that grows with the run.

    Needs no cap and no warm-up: the first fold copies.

    Args:
        width: Standard deviation of the weights over the run's length, in (0, 0.2886].
        exponent: γ > −1 itself, instead of `width`.

    Raises:
        ValueError: If not exactly one is given, or it is outside its interval.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.1 (there σ_rel and γ).

    >>> power(0.05)
    power(exponent=16.97...)
    """
    if (width is None) == (exponent is None):
        raise ValueError(
            f"power needs either a width or an exponent, got {width=} and {exponent=}. "
            "power(0.05) is a usual choice."
        )
    if exponent is None:
        assert width is not None
        exponent = exponent_from_width(width)
    return Power(exponent)


def inverse_power(
    decay: float = 0.9999,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_decay: float = 0.0,
) -> Decay:
    """clip(1 − (1+(t−1)/inv_gamma)^(−power), min_decay, decay); the first step copies.

    Args:
        decay: Largest β, in [0, 1).
        inv_gamma: Time scale of the ramp in updates, > 0.
        power: How fast it approaches 1, > 0; 2/3 for runs of a million steps, 3/4 for
            shorter ones.
        min_decay: Smallest β after the first step, in [0, decay].

    Raises:
        ValueError: If an argument is outside its interval.

    Source: diffusers' `EMAModel(use_ema_warmup=True)`, timm's `ModelEmaV3`,
        ema-pytorch.

    >>> round(inverse_power()(step=8), 4)  # 1 − 8^(−2/3)
    0.75
    """
    return InversePower(decay, inv_gamma, power, min_decay)


def ramp(decay: float, time_constant: float = 2000) -> Decay:
    """β(1 − e^(−t/τ)): an exponential approach to β.

    Args:
        decay: β in [0, 1) that the ramp approaches.
        time_constant: τ in updates, > 0.

    Raises:
        ValueError: If an argument is outside its interval.

    Source: YOLOv5's `ModelEMA`.

    >>> round(ramp(0.9999)(step=2000), 4)
    0.6321
    """
    return Ramp(decay, time_constant)


def cosine(start: float, steps: int) -> Decay:
    """1 − (1−start)(1+cos(πt/steps))/2: from `start` to 1, for target networks.

    Args:
        start: β at the start of the run, in [0, 1).
        steps: Length of the run in updates, > 0; the target stays from there on.

    Raises:
        ValueError: If an argument is outside its interval.

    Source: BYOL, arXiv:2006.07733, section 3.2.

    >>> round(cosine(0.996, 1000)(step=500), 6)
    0.998
    """
    return Cosine(start, steps)


def half_life(steps: float) -> Decay:
    """Halve the weight of a step every `steps` updates: β = 2^(−1/steps).

    Args:
        steps: Half-life in optimizer updates, > 0. For a half-life in samples, divide
            by the batch size.

    Raises:
        ValueError: If `steps` is not positive.

    >>> round(half_life(1000)(step=1), 6)
    0.999307
    """
    return HalfLife(steps)


def fraction(f: float) -> Decay:
    """2^(−1/(f·t)): a half-life that is always the fraction f of the run so far.

    Close to `power(exponent=ln 2/f − 1)`.

    Args:
        f: Share of the run so far, in (0, 1].

    Raises:
        ValueError: If `f` is outside (0, 1].

    Source: torchtitan's EMA (f = 0.05), after Karras et al. 2022, arXiv:2206.00364.

    >>> round(fraction(0.05)(step=100), 4)  # a half-life of 5 updates
    0.8706
    """
    return Fraction(f)


def start_after(decay: DecayLike, step: int) -> Decay:
    """Copy the params up to and including `step`, then average with `decay`.

    The inner decay counts from there: `start_after(uniform(), 1000)` is the mean of
    the params after updates 1001, 1002, … (SWA).

    Args:
        decay: A decay; a float β means `warmup(β)`.
        step: Number of updates that are copied, ≥ 0.

    Raises:
        ValueError: If `step` is negative.

    >>> decay = start_after(uniform(), 10)
    >>> decay(10), decay(11), decay(14)
    (0.0, 0.0, 0.75)
    """
    return StartAfter(as_decay(decay), step)


def scale_to_batch(decay: DecayLike, factor: float) -> Decay:
    """β^factor: the same average over samples after the batch grew by `factor`.

    In a `warmup` only the final β is scaled: its ramp is a share of the run so far.

    Args:
        decay: A decay in updates; a float β means `warmup(β)`.
        factor: New batch size over the old one, > 0.

    Raises:
        ValueError: If `factor` is not positive, or `decay` is relative to the run's
            length already (`power`, `uniform`, `fraction`).

    Source: Busbridge et al. 2023, arXiv:2307.13813.

    >>> round(scale_to_batch(constant(0.999), 8)(step=1), 6)
    0.992028
    """
    inner = as_decay(decay)
    return inner._scaled(factor)


def as_decay(decay: DecayLike) -> Decay:
    """Returns what `ema_params` understands by `decay`: a float β means `warmup(β)`.

    Raises:
        TypeError: If it is no decay, or an array narrower than float32.
        ValueError: If it is a number outside [0, 1).

    >>> as_decay(0.999)
    warmup(decay=0.999, offset=10)
    """
    if isinstance(decay, Decay):
        return decay
    if isinstance(decay, Tracer):
        check_wide_enough(decay)
        return Warmup(decay)  # pyright: ignore[reportArgumentType]
    if isinstance(decay, (float, int)) and not isinstance(decay, bool):
        return Warmup(float(decay))
    if isinstance(decay, (jax.Array, np.ndarray, np.number)):
        check_wide_enough(decay)
        return Warmup(float(decay))
    if callable(decay):
        return Schedule(decay)
    raise TypeError(
        f"A decay is a number β in [0, 1), one of ema_optax's decays, or a callable "
        f"step → β; got {decay!r}. ema_params(0.9999) is a usual choice."
    )


def width_from_exponent(exponent: float) -> float:
    """Returns the width of the profile t^γ: its standard deviation over the run.

    Args:
        exponent: γ > −1.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.1.

    >>> round(width_from_exponent(6.94), 4)
    0.1
    """
    if not -1 < exponent < math.inf:
        raise ValueError(f"An exponent is above -1 and finite, got {exponent}.")
    g = exponent
    return math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))


def exponent_from_width(width: float) -> float:
    """Returns the exponent γ ≥ 0 whose profile t^γ has the given width.

    Args:
        width: Standard deviation over the run's length, in (0, 0.2886…].

    Raises:
        ValueError: If `width` is outside that interval.

    Source: the largest real root of γ³ + 7γ² + (16−σ⁻²)γ + 12 − σ⁻²; Karras et al.
    2024, arXiv:2312.02696, section 3.1.

    >>> round(exponent_from_width(0.05), 2)
    16.97
    """
    if not 0 < width <= _WIDEST:
        raise ValueError(
            f"A width is in (0, {_WIDEST:.4f}], got {width}: the widest average is the "
            "plain mean, uniform(). For a fixed length in updates use half_life(steps)."
        )
    inverse_square = width**-2
    roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
    return max(float(np.max(roots.real)), 0.0)
