"""Decays by their formulas, and the decay that a plain number stands for."""

# pyright: strict, reportUnknownArgumentType=false, reportMissingTypeStubs=false
# numpy leaves some types unknown; Optax has no stubs.

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias, cast

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from ema_optax._decays.decay import (
    MAKERS,
    Decay,
    Floats,
    Scalar,
    check_decay,
    check_positive,
    is_known,
    is_number,
    log_of,
    maker,
)
from ema_optax._decays.power_profiles import exponent_from_width, width_from_exponent
from ema_optax._decays.schedule import schedule
from ema_optax._messages.text import brief

DecayLike: TypeAlias = Scalar | Decay | Callable[[Any], ArrayLike]
"""A plain β, which is warmed up; a decay; or a function from the 1-based step to β."""


@dataclasses.dataclass(frozen=True, repr=False)
class constant(Decay):
    """Keeps the same weight β at every step: v_t = β·v_(t−1) + (1−β)·θ_t.

    Averages over about 1/(1−β) values and lags β/(1−β) steps. It keeps β^t of the
    initial params; `warmup` and `debiased` do not wait that out.

    Args:
        decay: β in [0, 1), the weight kept on the old shadow.

    Raises:
        ValueError: If `decay` is outside [0, 1).

    >>> constant(0.98)(step=1)
    0.98
    """

    decay: Scalar

    def __post_init__(self) -> None:
        check_decay(self.decay, self.kind)

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        return xp.minimum(t, k) * log_of(self.decay)


@dataclasses.dataclass(frozen=True, repr=False)
class warmup(Decay):
    """Averages over little while there is little: min(β, (1+t)/(offset+t)).

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

    decay: Scalar
    offset: Scalar = 10

    def __post_init__(self) -> None:
        check_decay(self.decay, self.kind)
        if (
            is_number(self.offset, "warmup's offset")
            and not 1 <= self.offset < math.inf
        ):
            raise ValueError(
                f"warmup needs an offset ≥ 1, got {self.offset}: (1+t)/(offset+t) must "
                "stay at or below 1. TensorFlow's is 10."
            )

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        rising = xp.log1p(-(self.offset - 1) / (self.offset + t))
        return xp.minimum(rising, log_of(self.decay))


@dataclasses.dataclass(frozen=True, repr=False)
class debiased(Decay):
    """Leaves the initial params out of a constant average: β(1−β^(t−1))/(1−β^t).

    The same average as Adam's moments, started at zero and divided by 1−β^t.

    Args:
        decay: β in [0, 1).

    Raises:
        ValueError: If `decay` is outside [0, 1).

    Source: Kingma and Ba 2015, arXiv:1412.6980, section 3.

    >>> debiased(0.9)(step=1)
    0.0
    """

    decay: Scalar

    def __post_init__(self) -> None:
        check_decay(self.decay, self.kind)

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        log = log_of(self.decay)
        # The product telescopes: the newest weight is (1−β^k)/(1−β^t).
        return xp.log1p(-xp.expm1(xp.minimum(t, k) * log) / xp.expm1(t * log))


@maker
def uniform() -> Decay:
    """Takes the plain mean of all params so far: (t−1)/t (Polyak–Ruppert, SWA).

    >>> uniform()(step=4)
    0.75
    """
    return power(exponent=0.0)


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class power(Decay):
    """Averages over a fixed share of the run: (1−1/t)^(γ+1), weights ∝ t^γ.

    Needs no cap and no warm-up: the first fold copies.

    Args:
        width: Standard deviation of the weights over the run's length, in (0, 0.2886].
        exponent: γ > −1 itself, instead of `width`.

    Raises:
        ValueError: If not exactly one is given, or it is outside its interval.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.1 (there σ_rel and γ).

    >>> power(0.05), power(exponent=7.0)
    (power(width=0.05), power(exponent=7.0))
    """

    exponent: Scalar

    def __init__(
        self, width: float | None = None, *, exponent: Scalar | None = None
    ) -> None:
        if (width is None) == (exponent is None):
            raise ValueError(
                f"power needs either a width or an exponent, got {width=} and "
                f"{exponent=}. power(0.05) is a usual choice."
            )
        if exponent is None:
            if not is_known(width):
                raise TypeError(
                    "power's width cannot be traced, its exponent can: call "
                    "exponent_from_width(width) outside jit and vmap, and "
                    "power(exponent=γ) inside."
                )
            exponent = exponent_from_width(cast(float, width))
        if is_known(exponent) and not -1 < exponent < math.inf:
            raise ValueError(
                f"power needs an exponent above -1, got {exponent}. An exponent of 0 "
                "is the plain mean; power(width=0.05) takes the width instead."
            )
        self._set(exponent=exponent)

    def __repr__(self) -> str:
        if is_known(self.exponent) and self.exponent > 0:
            width = round(width_from_exponent(float(self.exponent)), 6)
            if width and exponent_from_width(width) == self.exponent:
                return f"power(width={width})"
        return super().__repr__()

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        # The product telescopes to (1−k/t)^(γ+1).
        return (self.exponent + 1) * xp.log1p(-xp.minimum(t, k) / t)


@dataclasses.dataclass(frozen=True, repr=False)
class inverse_power(Decay):
    """Rises by a power law: clip(1 − (1+(t−1)/inv_gamma)^(−power), min_decay, decay).

    Args:
        decay: Largest β, in [0, 1). The first step copies the params, β = 0.
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

    decay: Scalar = 0.9999
    inv_gamma: Scalar = 1.0
    power: Scalar = 2 / 3
    min_decay: Scalar = 0.0

    def __post_init__(self) -> None:
        check_decay(self.decay, self.kind)
        check_positive(self.inv_gamma, "inverse_power's inv_gamma")
        check_positive(self.power, "inverse_power's power")
        known = is_number(self.min_decay, "inverse_power's min_decay")
        if known and is_known(self.decay) and not 0 <= self.min_decay <= self.decay:
            raise ValueError(
                f"inverse_power needs 0 ≤ min_decay ≤ decay, got {self.min_decay} and "
                f"{self.decay}."
            )

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        newest = xp.exp(-self.power * xp.log1p((t - 1) / self.inv_gamma))
        log = xp.minimum(xp.log1p(-newest), log_of(self.decay))
        log = xp.maximum(log, log_of(self.min_decay))
        return xp.where(t > 1, log, -xp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class ramp(Decay):
    """Rises exponentially to β: β(1 − e^(−t/τ)).

    Args:
        decay: β in [0, 1) that the ramp approaches.
        time_constant: τ in updates, > 0.

    Raises:
        ValueError: If an argument is outside its interval.

    Source: YOLOv5's `ModelEMA`.

    >>> round(ramp(0.9999)(step=2000), 4)
    0.6321
    """

    decay: Scalar
    time_constant: Scalar = 2000

    def __post_init__(self) -> None:
        check_decay(self.decay, self.kind)
        check_positive(self.time_constant, "ramp's time_constant")

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        # log(1 − e^−x) to full relative precision at both ends.
        x = t / self.time_constant
        safe = xp.maximum(x, 1e-30)  # keeps the branch not taken finite
        near_zero = xp.log(-xp.expm1(-safe))
        rising = xp.where(x > math.log(2.0), xp.log1p(-xp.exp(-safe)), near_zero)
        return log_of(self.decay) + rising


@dataclasses.dataclass(frozen=True, repr=False)
class cosine(Decay):
    """Rises by a cosine from `start` to 1: 1 − (1−start)(1+cos(πt/steps))/2.

    Args:
        start: β at the start of the run, in [0, 1).
        steps: Length of the run in updates, > 0; the target stays from there on.

    Raises:
        ValueError: If an argument is outside its interval.

    Source: BYOL, arXiv:2006.07733, section 3.2.

    >>> round(cosine(0.996, 1000)(step=500), 6)
    0.998
    """

    start: Scalar
    steps: int | jax.Array

    def __post_init__(self) -> None:
        check_decay(self.start, self.kind)
        check_positive(self.steps, "cosine's steps")

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        # cos(πt/2T) from the steps left: exact near the end, where it vanishes.
        left = xp.maximum(self.steps - t, 0) / self.steps
        return xp.log1p(-(1 - self.start) * xp.sin(math.pi / 2 * left) ** 2)


@dataclasses.dataclass(frozen=True, repr=False)
class half_life(Decay):
    """Halves the weight of a step every `steps` updates: β = 2^(−1/steps).

    Args:
        steps: Half-life in optimizer updates, > 0. For a half-life in samples, divide
            by the batch size.

    Raises:
        ValueError: If `steps` is not positive.

    >>> round(half_life(1000)(step=1), 6)
    0.999307
    """

    steps: Scalar

    def __post_init__(self) -> None:
        if is_number(self.steps, "half_life's steps") and not 0 < self.steps < math.inf:
            raise ValueError(
                f"half_life needs a positive number of updates, got {self.steps}. "
                "For a plain decay such as 0.999 use constant(0.999)."
            )

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        return xp.minimum(t, k) * (-math.log(2.0) / self.steps)


@dataclasses.dataclass(frozen=True, repr=False)
class fraction(Decay):
    """Has a half-life of a fraction f of the run so far: 2^(−1/(f·t)).

    Close to `power(exponent=ln 2/f − 1)`.

    Args:
        f: Share of the run so far, in (0, 1].

    Raises:
        ValueError: If `f` is outside (0, 1].

    Source: torchtitan's EMA (f = 0.05), after Karras et al. 2022, arXiv:2206.00364.

    >>> round(fraction(0.05)(step=100), 4)  # a half-life of 5 updates
    0.8706
    """

    f: Scalar

    def __post_init__(self) -> None:
        if is_number(self.f, "fraction's f") and not 0 < self.f <= 1:
            raise ValueError(
                f"fraction needs a share of the run in (0, 1], got {self.f}. "
                "For a half-life in updates use half_life(steps)."
            )

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        return -math.log(2.0) / self.f / t


def as_decay(decay: DecayLike, call: str = "ema_params") -> Decay:
    """Converts an argument to a decay: a float β means `warmup(β)`.

    Args:
        decay: The argument.
        call: Name of the function that takes it, for errors.

    Raises:
        TypeError: If it is no decay, or an array narrower than float32.
        ValueError: If it is a number outside [0, 1).

    >>> as_decay(0.999)
    warmup(decay=0.999, offset=10)
    """
    if isinstance(decay, Decay):
        return decay
    numbers = (float, int, jax.Array, np.ndarray, np.number)
    if isinstance(decay, numbers) and type(decay) is not bool and np.ndim(decay) == 0:
        number = cast(Scalar, decay)
        check_decay(number, call)
        return warmup(float(number) if is_known(number) else number)
    if callable(decay) and decay not in MAKERS.values():
        return schedule(decay)
    raise TypeError(
        f"{call} takes as a decay a number β in [0, 1), one of ema_optax's decays, or "
        f"a callable step → β; got {_instead(decay)}"
    )


def _instead(given: object) -> str:
    """Describes an argument that is no decay, and the call that works."""
    if isinstance(given, optax.GradientTransformation):
        return (
            "an optimizer. Chain the average after it: optax.chain(optimizer, "
            "ema_optax.ema_params(0.9999))."
        )
    if callable(given):
        name = getattr(given, "__name__", "")
        return f"{name} itself. Call it with its arguments, as in warmup(0.9999)."
    return f"{brief(given)}. ema_params(0.9999) is a usual choice."
