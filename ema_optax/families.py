"""The families of decays: the exact log β of every step, and the weight of a fold.

A family states log β_t (or, where it telescopes, the log of a product of several β) in
closed form; everything else follows from it. Float32 cannot hold 1 − β for a β near 1
(`1 − float32(0.99999)` is off by 1.3e-3), so β itself is only ever read out at the end.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# The largest float64 below 1: β stays inside [0, 1) even where exp rounds up.
_BELOW_ONE = math.nextafter(1.0, 0.0)
_LARGEST = float(np.finfo(np.float64).max)


class Decay:
    """The weight β kept on the old shadow at each step; frozen, comparable, JSON-able.

    `step` is the 1-based number of the optimizer update being folded in. Python and
    NumPy steps are answered in float64, JAX arrays and tracers in JAX's default float.

    >>> import ema_optax
    >>> decay = ema_optax.warmup(0.98)
    >>> round(decay(5), 12)  # min(0.98, (1 + 5) / (10 + 5))
    0.4
    >>> Decay.from_json(decay.to_json()) == decay
    True
    """

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type["Decay"]]] = {}

    def __init_subclass__(cls) -> None:
        if cls.kind != "schedule":  # a callable is never made from JSON
            Decay._kinds[cls.kind] = cls

    def __call__(self, step: Any) -> Any:
        """Returns β at `step`, in [0, 1), with the shape of `step`.

        Raises:
            ValueError: If a concrete `step` is below 1.
        """
        if not isinstance(step, Tracer):
            _check_steps(step)
        if isinstance(step, jax.Array):
            return jnp.exp(self._log_product(_traced(step), 1, jnp))
        return _concrete(
            np.minimum(np.exp(self._logs_on_host(step, 1)), _BELOW_ONE), step
        )

    def newest_weight(self, step: Any, every: int = 1) -> Any:
        """Returns 1 − Πβ over the last `every` updates up to `step`: a fold's weight.

        Args:
            step: 1-based number of the newest update, a scalar or an array.
            every: Updates since the last fold, ≥ 1; no more than `step` of them count.

        Returns:
            The weight of the new params in [0, 1], computed as −expm1(Σ log β).

        >>> import ema_optax
        >>> round(ema_optax.constant(0.9).newest_weight(20, every=2), 12)  # 1 − 0.9²
        0.19
        """
        if isinstance(step, jax.Array):  # unchecked: no host sync inside a train step
            return -jnp.expm1(self._log_product(_traced(step), every, jnp))
        _check_steps(step)
        return _concrete(-np.expm1(self._logs_on_host(step, every)), step)

    @property
    def is_json(self) -> bool:
        """Whether `to_json` can write it: not where it is, or holds, a callable."""
        inner = self._arguments().values()
        return all(value.is_json for value in inner if isinstance(value, Decay))

    def to_json(self) -> str:
        """Returns a JSON object with the kind of decay and its arguments.

        Raises:
            TypeError: If the decay is, or holds, a plain callable.
        """
        return json.dumps(self._to_dict())

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> "Decay":
        """Returns the decay that `to_json` wrote, from its text or the parsed object.

        Raises:
            ValueError: If it is not such an object, naming what is wrong with it.
        """
        try:
            fields = json.loads(text) if isinstance(text, str) else text
        except RecursionError:
            fields = None
        kind = fields.get("kind") if isinstance(fields, Mapping) else None
        if not isinstance(kind, str) or kind not in Decay._kinds:
            raise ValueError(
                f"Not a decay: {_brief(text)}. Expected a JSON object whose 'kind' "
                f"is one of {sorted(Decay._kinds)}."
            )
        assert isinstance(fields, Mapping)
        family = Decay._kinds[kind]
        arguments = {
            name: Decay.from_json(value) if isinstance(value, Mapping) else value
            for name, value in fields.items()
            if name != "kind"
        }
        try:
            _check_types(family, arguments)
            return family(**arguments)
        except TypeError as error:
            raise ValueError(
                f"Not the arguments of {family.kind}: {_brief(text)} ({error})."
            ) from None

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self._arguments().items())
        return f"{self.kind}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        fields = dataclasses.fields(cast(Any, self))
        return {field.name: getattr(self, field.name) for field in fields}

    def _to_dict(self) -> dict[str, Any]:
        arguments = {
            name: value._to_dict() if isinstance(value, Decay) else value
            for name, value in self._arguments().items()
        }
        return {"kind": self.kind, **arguments}

    def _logs_on_host(self, step: Any, every: int) -> Any:
        with np.errstate(divide="ignore"):  # log 0 = −inf is meant: β = 0, a copy
            return self._log_product(np.asarray(step, np.float64), every, np)

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        """Returns Σ log β over the updates t−k+1 … t that exist, for float t ≥ 1.

        −inf where a β is 0. A family has this product in closed form, or `_log`.
        """
        if k == 1:
            return self._log(t, xp)
        steps = t[..., None] - xp.arange(k, dtype=t.dtype)
        logs = self._log(xp.maximum(steps, 1), xp)
        return xp.sum(xp.where(steps >= 1, logs, 0.0), axis=-1)

    def _log(self, t: Any, xp: Any) -> Any:
        """Returns log β_t for float steps t ≥ 1; −inf where β is 0."""
        raise NotImplementedError

    def _scaled(self, factor: float) -> "Decay":
        return Scaled(self, factor)


def _check_types(family: type[Decay], arguments: Mapping[str, Any]) -> None:
    """Raises TypeError for what JSON may hold in place of a number or a decay."""
    for name, value in arguments.items():
        if family in (StartAfter, Scaled) and name == "decay":
            if not isinstance(value, Decay):
                raise TypeError(f"{name} is no decay")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is no number")
        elif not abs(value) <= _LARGEST:  # also refuses NaN
            raise TypeError(f"{name} is not finite")


def _brief(value: Any) -> str:
    try:
        return str(value)[:200]
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return f"a {type(value).__name__}"


def _check_steps(step: Any) -> None:
    steps = np.asarray(step)
    if steps.size and not np.min(steps) >= 1:
        raise ValueError(
            f"A decay's step is the 1-based number of the update, got {np.min(steps)}. "
            "optax.inject_hyperparams calls every callable with a count from 0: pass "
            "it static_args=('decay', 'every')."
        )


def _traced(step: jax.Array) -> jax.Array:
    return jnp.asarray(step, float)  # float32, or float64 where x64 is enabled


def _concrete(value: Any, step: Any) -> Any:
    return float(value) if np.ndim(step) == 0 else value


def check_decay(decay: float, call: str) -> None:
    """Raises ValueError unless 0 ≤ decay < 1, saying what to call instead."""
    if isinstance(decay, Tracer):
        return  # its value is only known on the device
    if not 0.0 <= decay < 1.0:  # also refuses NaN
        cause = (
            "At 1 the average never moves (bfloat16 rounds 0.999 to 1)."
            if decay == 1
            else "It is the weight kept on the old shadow, such as 0.9999."
        )
        raise ValueError(
            f"{call} needs a decay in [0, 1), got {decay}. {cause} "
            "For a length in updates use half_life(steps)."
        )


def _check_positive(value: float, what: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive and finite, got {value}.")


def _log_of(decay: Any) -> Any:
    if isinstance(decay, jax.Array):
        return jnp.log1p(decay - 1)  # the subtraction is exact for β in [½, 1]
    return math.log(decay) if decay > 0 else -math.inf


def _log_one_minus_exp(x: Any, xp: Any) -> Any:
    """log(1 − e^−x) for x ≥ 0, to full relative precision at both ends."""
    safe = xp.maximum(x, 1e-30)  # keeps the branch not taken finite
    near_zero = xp.log(-xp.expm1(-safe))
    return xp.where(x > math.log(2.0), xp.log1p(-xp.exp(-safe)), near_zero)


@dataclasses.dataclass(frozen=True, repr=False)
class Constant(Decay):
    """β_t = β."""

    kind: ClassVar[str] = "constant"
    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay, "constant")

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        return xp.minimum(t, k) * _log_of(self.decay)


@dataclasses.dataclass(frozen=True, repr=False)
class HalfLife(Decay):
    """β_t = 2^(−1/steps)."""

    kind: ClassVar[str] = "half_life"
    steps: float

    def __post_init__(self) -> None:
        if not 0 < self.steps < math.inf:
            raise ValueError(
                f"half_life needs a positive number of updates, got {self.steps}. "
                "For a plain decay such as 0.999 use constant(0.999)."
            )

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        return xp.minimum(t, k) * (-math.log(2.0) / self.steps)


@dataclasses.dataclass(frozen=True, repr=False)
class Warmup(Decay):
    """β_t = min(β, (1+t)/(offset+t))."""

    kind: ClassVar[str] = "warmup"
    decay: float
    offset: float = 10

    def __post_init__(self) -> None:
        check_decay(self.decay, "warmup")
        if not 1 <= self.offset < math.inf:
            raise ValueError(
                f"warmup needs an offset ≥ 1, got {self.offset}: (1+t)/(offset+t) must "
                "stay at or below 1. TensorFlow's is 10."
            )

    def _log(self, t: Any, xp: Any) -> Any:
        ramp = xp.log1p(-(self.offset - 1) / (self.offset + t))
        return xp.minimum(ramp, _log_of(self.decay))

    def _scaled(self, factor: float) -> Decay:
        # The ramp is a share of the run so far, whatever the batch; the cap is not.
        return Warmup(self.decay**factor, self.offset)


@dataclasses.dataclass(frozen=True, repr=False)
class Debiased(Decay):
    """β_t = β(1−β^(t−1))/(1−β^t), so that a product over k telescopes."""

    kind: ClassVar[str] = "debiased"
    decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay, "debiased")

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        log = _log_of(self.decay)
        # The newest weight is (1−β^k)/(1−β^t).
        return xp.log1p(-xp.expm1(xp.minimum(t, k) * log) / xp.expm1(t * log))


@dataclasses.dataclass(frozen=True, repr=False)
class Power(Decay):
    """β_t = (1−1/t)^(γ+1); a product over k is (1−k/t)^(γ+1)."""

    kind: ClassVar[str] = "power"
    exponent: float

    def __post_init__(self) -> None:
        if not -1 < self.exponent < math.inf:
            raise ValueError(
                f"power needs an exponent above -1, got {self.exponent}. An exponent "
                "of 0 is the plain mean; power(width=0.05) takes the width instead."
            )

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        return (self.exponent + 1) * xp.log1p(-xp.minimum(t, k) / t)

    def _scaled(self, factor: float) -> Decay:
        raise _already_relative(self)


@dataclasses.dataclass(frozen=True, repr=False)
class InversePower(Decay):
    """β_t = clip(1−(1+(t−1)/γ)^(−p), min_decay, decay), and 0 at the first update."""

    kind: ClassVar[str] = "inverse_power"
    decay: float
    inv_gamma: float
    power: float
    min_decay: float

    def __post_init__(self) -> None:
        check_decay(self.decay, "inverse_power")
        _check_positive(self.inv_gamma, "inverse_power's inv_gamma")
        _check_positive(self.power, "inverse_power's power")
        if not 0 <= self.min_decay <= self.decay:
            raise ValueError(
                f"inverse_power needs 0 ≤ min_decay ≤ decay, got {self.min_decay} and "
                f"{self.decay}."
            )

    def _log(self, t: Any, xp: Any) -> Any:
        newest = xp.exp(-self.power * xp.log1p((t - 1) / self.inv_gamma))
        log = xp.minimum(xp.log1p(-newest), _log_of(self.decay))
        log = xp.maximum(log, _log_of(self.min_decay))
        return xp.where(t > 1, log, -xp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class Ramp(Decay):
    """β_t = β(1−e^(−t/τ))."""

    kind: ClassVar[str] = "ramp"
    decay: float
    time_constant: float

    def __post_init__(self) -> None:
        check_decay(self.decay, "ramp")
        _check_positive(self.time_constant, "ramp's time_constant")

    def _log(self, t: Any, xp: Any) -> Any:
        return _log_of(self.decay) + _log_one_minus_exp(t / self.time_constant, xp)


@dataclasses.dataclass(frozen=True, repr=False)
class Cosine(Decay):
    """β_t = 1−(1−start)·cos²(πt/2T), which reaches 1 at t = T and stays there."""

    kind: ClassVar[str] = "cosine"
    start: float
    steps: int

    def __post_init__(self) -> None:
        check_decay(self.start, "cosine")
        _check_positive(self.steps, "cosine's steps")

    def _log(self, t: Any, xp: Any) -> Any:
        # cos(πt/2T) from the steps left: exact near the end, where it vanishes.
        left = xp.maximum(self.steps - t, 0) / self.steps
        return xp.log1p(-(1 - self.start) * xp.sin(math.pi / 2 * left) ** 2)


@dataclasses.dataclass(frozen=True, repr=False)
class Fraction(Decay):
    """β_t = 2^(−1/(f·t))."""

    kind: ClassVar[str] = "fraction"
    f: float

    def __post_init__(self) -> None:
        if not 0 < self.f <= 1:
            raise ValueError(
                f"fraction needs a share of the run in (0, 1], got {self.f}. "
                "For a half-life in updates use half_life(steps)."
            )

    def _log(self, t: Any, xp: Any) -> Any:
        return -math.log(2.0) / self.f / t

    def _scaled(self, factor: float) -> Decay:
        raise _already_relative(self)


@dataclasses.dataclass(frozen=True, repr=False)
class StartAfter(Decay):
    """β_t = 0 up to `step`, then the inner decay counted from there."""

    kind: ClassVar[str] = "start_after"
    decay: Decay
    step: int

    def __post_init__(self) -> None:
        if not 0 <= self.step < math.inf:
            raise ValueError(
                f"start_after needs a number of updates ≥ 0, got {self.step}."
            )

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        since = t - self.step
        inner = self.decay._log_product(xp.maximum(since, 1), k, xp)
        # One copied update inside the window makes the whole product 0.
        return xp.where(since >= xp.minimum(t, k), inner, -xp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class Scaled(Decay):
    """β_t = (inner β_t)^factor."""

    kind: ClassVar[str] = "scale_to_batch"
    decay: Decay
    factor: float

    def __post_init__(self) -> None:
        _check_positive(self.factor, "scale_to_batch's factor")

    def _log_product(self, t: Any, k: int, xp: Any) -> Any:
        return self.factor * self.decay._log_product(t, k, xp)


@dataclasses.dataclass(frozen=True, repr=False)
class Schedule(Decay):
    """β_t from any callable step → β; the one family that cannot become JSON."""

    kind: ClassVar[str] = "schedule"
    function: Callable[[Any], Any]

    @property
    def is_json(self) -> bool:
        """False: a callable cannot be written."""
        return False

    def _to_dict(self) -> dict[str, Any]:
        raise TypeError(
            f"A decay given as a callable ({self.function!r}) cannot be written as "
            "JSON. Use one of ema_optax's decays, such as warmup(0.9999)."
        )

    def _log(self, t: Any, xp: Any) -> Any:
        if xp is np:
            values = [self._at(step) for step in np.ravel(t).astype(int).tolist()]
            return np.reshape([_log_of(float(v)) for v in values], np.shape(t))
        steps = jnp.asarray(t, jnp.int32)
        call = self._at
        for _ in range(steps.ndim):
            call = jax.vmap(call)
        decay = call(steps)
        if isinstance(decay, float):  # does not depend on the step
            return jnp.full_like(t, _log_of(decay))
        # A decay outside [0, 1] turns the shadow into NaN at once, not slowly wrong.
        decay = jnp.where((decay >= 0) & (decay <= 1), decay, jnp.nan)
        return jnp.log1p(decay - 1).astype(t.dtype)

    def _at(self, step: Any) -> Any:
        value = self.function(step)
        check_wide_enough(value)
        if isinstance(value, (int, float, np.ndarray, np.generic)):
            value = float(value)
            if value != 1.0:  # a schedule may end at 1: the shadow then stays
                check_decay(value, f"The callable decay, at step {step},")
        return value


def check_wide_enough(decay: Any) -> None:
    """Raises TypeError for a decay array narrower than float32."""
    dtype = getattr(decay, "dtype", None)
    if dtype is None:
        return
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"The decay came as a {dtype} array, which cannot tell 0.999 from 1: the "
            "shadow would never move. optax.inject_hyperparams does this to bfloat16 "
            "params: pass it hyperparam_dtype=jnp.float32, or "
            "static_args=('decay', 'every')."
        )


def _already_relative(decay: Decay) -> ValueError:
    return ValueError(
        f"{decay!r} is relative to the length of the run, which changes with the batch "
        "by itself: use it unscaled. scale_to_batch is for decays in updates."
    )
