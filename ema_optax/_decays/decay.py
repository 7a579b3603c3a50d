"""The base of all decays: step → β, the weight of a fold, JSON, and their registry.

A decay states log β_t (or, where it telescopes, the log of a product of several β) in
closed form; everything else follows from it. Float32 cannot hold 1 − β for a β near 1
(`1 − float32(0.99999)` is off by 1.3e-3), so β itself is only ever read out at the end.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false
# jax.numpy and numpy leave some types unknown.

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from ema_optax._messages import arguments

Scalar: TypeAlias = float | jax.Array  # an argument: a number, or a traced one
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]] | jax.Array
_Maker = TypeVar("_Maker", bound=Callable[..., "Decay"])

# Classes of decays, and functions that make decays, by the names that users call.
MAKERS: dict[str, Callable[..., "Decay"]] = {}

# The largest float64 below 1: β stays inside [0, 1) even where exp rounds up.
_BELOW_ONE = math.nextafter(1.0, 0.0)
_LARGEST = float(np.finfo(np.float64).max)


def maker(function: _Maker) -> _Maker:
    """Registers a function that makes decays, under its name."""
    MAKERS[function.__name__] = function
    return function


class Decay:
    """Gives the weight β on the old shadow at each step; frozen, and JSON-able.

    `step` is the 1-based number of the optimizer update being folded in. Python and
    NumPy steps are answered in float64, JAX arrays and tracers in JAX's default float;
    so are all steps of a decay whose arguments are arrays of JAX, traced ones included.

    >>> import ema_optax
    >>> decay = ema_optax.warmup(0.98)
    >>> round(decay(5), 12)  # min(0.98, (1 + 5) / (10 + 5))
    0.4
    >>> Decay.from_json(decay.to_json()) == decay
    True
    """

    kind: ClassVar[str]
    _counts: ClassVar[bool] = False  # whether whole steps stay integers in its formula
    _kinds: ClassVar[dict[str, type["Decay"]]] = {}

    def __init_subclass__(
        cls, *, kind: str | None = None, registered: bool = True
    ) -> None:
        """Registers a decay under its `kind`, the class's name unless given."""
        cls.kind = kind or cls.__name__
        if registered:
            Decay._kinds[cls.kind] = MAKERS[cls.kind] = cls

    def __call__(self, step: ArrayLike) -> Any:
        """Returns β at `step`, in [0, 1), with the shape of `step`.

        Raises:
            ValueError: If a concrete `step` is below 1.
        """
        if not isinstance(step, Tracer):
            _check_steps(step)
        logs = self.log_product(step)
        if isinstance(logs, jax.Array):  # +∞ where β is none
            return jnp.where(logs == jnp.inf, jnp.nan, jnp.exp(logs))
        return _plain(np.minimum(np.exp(logs), _BELOW_ONE))

    def newest_weight(self, step: ArrayLike, every: int = 1) -> Any:
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
        logs = self.log_product(step, every)
        if isinstance(logs, jax.Array):
            return jnp.where(logs == jnp.inf, jnp.nan, -jnp.expm1(logs))
        return _plain(-np.expm1(logs))

    def log_product(self, step: ArrayLike, every: int = 1) -> Any:
        """Returns Σ log β over the last `every` updates up to `step`; −inf if one is 0.

        Args:
            step: 1-based number of the newest update, a scalar or an array.
            every: Updates since the last fold, ≥ 1; no more than `step` of them count.

        >>> import ema_optax
        >>> round(ema_optax.half_life(10).log_product(20, every=10), 12)  # log ½
        -0.69314718056
        """
        if isinstance(step, jax.Array) or self._is_on_device():
            # Unchecked: no host sync inside a train step.
            t = _numbers(step, self._counts, jnp)
            return self._log_product(t, every, jnp)
        _check_steps(step)
        with np.errstate(divide="ignore"):  # log 0 = −inf is right: β = 0, a copy
            return _plain(
                self._log_product(_numbers(step, self._counts, np), every, np)
            )

    @property
    def is_json(self) -> bool:
        """Whether `to_json` can write it: no argument is a callable or a JAX array."""
        return all(
            value.is_json
            if isinstance(value, Decay)
            else isinstance(value, (int, float, np.number))
            for value in _arguments(self).values()
        )

    def to_json(self) -> str:
        """Returns a JSON object with the kind of decay and its arguments.

        Raises:
            TypeError: If an argument is a callable or a JAX array.
        """
        return json.dumps(self, default=_as_json)

    @staticmethod
    def from_json(text: str | Mapping[str, Any]) -> "Decay":
        """Returns the decay that `to_json` wrote, from its text or the parsed object.

        Raises:
            ValueError: If it is no such object; the error names the problem.
        """
        try:
            fields: Any = json.loads(text) if isinstance(text, str) else text
        except RecursionError:
            fields = None
        parsed = cast(Mapping[str, Any], fields if isinstance(fields, Mapping) else {})
        kind = parsed.get("kind")
        if not isinstance(kind, str) or kind not in Decay._kinds:
            raise ValueError(
                f"Not a decay: {_brief(text)}. Expected a JSON object whose 'kind' "
                f"is one of {sorted(Decay._kinds)}."
            )
        arguments = {
            name: Decay.from_json(cast(Mapping[str, Any], value))
            if isinstance(value, Mapping)
            else value
            for name, value in parsed.items()
            if name != "kind"
        }
        try:
            _check_types(Decay._kinds[kind], arguments)
            return Decay._kinds[kind](**arguments)
        except TypeError as error:
            raise ValueError(
                f"Not the arguments of {kind}: {_brief(text)} ({error})."
            ) from None

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in _arguments(self).items())
        return f"{self.kind}({arguments})"

    def _set(self, **arguments: object) -> None:
        """Sets frozen fields, for an `__init__` whose arguments are not the fields."""
        for name, value in arguments.items():
            object.__setattr__(self, name, value)

    def _is_on_device(self) -> bool:
        return any(
            value._is_on_device()
            if isinstance(value, Decay)
            else isinstance(value, jax.Array)
            for value in _arguments(self).values()
        )

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        """Returns Σ log β over the updates t−k+1 … t that exist, for float t ≥ 1.

        −inf where a β is 0. A decay has this product in closed form, or `_log`. One
        that counts gets whole steps as integers.
        """
        if k == 1:
            return self._log(t, xp)
        steps = t[..., None] - xp.arange(k, dtype=t.dtype)
        logs = self._log(xp.maximum(steps, 1), xp)
        return xp.sum(xp.where(steps >= 1, logs, 0.0), axis=-1)

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        """Returns log β_t for float steps t ≥ 1; −inf where β is 0."""
        raise NotImplementedError  # for a kind that has `_log_product` instead


def _fields(decay: type[Decay]) -> dict[str, Any]:
    """Returns the types of a decay's arguments, by name."""
    return {field.name: field.type for field in dataclasses.fields(cast(Any, decay))}


def _arguments(decay: Decay) -> dict[str, Any]:
    return {name: getattr(decay, name) for name in _fields(type(decay))}


def _as_json(value: object) -> Any:
    """Converts a decay to a dict, and NumPy's numbers to Python's, for `json`."""
    if isinstance(value, Decay):
        return {"kind": value.kind, **_arguments(value)}
    if isinstance(value, np.number):
        return cast(Any, value).item()
    raise TypeError(
        f"A decay with {value!r} in it cannot be written as JSON. Use one of "
        "ema_optax's decays with plain numbers, such as warmup(0.9999)."
    )


def _check_types(decay: type[Decay], arguments: Mapping[str, Any]) -> None:
    """Raises TypeError where JSON holds something else than a number or a decay."""
    fields = _fields(decay)
    for name, value in arguments.items():
        if name not in fields:
            raise TypeError(f"it has no {name!r}")
        if fields[name] is Decay:
            if not isinstance(value, Decay):
                raise TypeError(f"{name} is no decay")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is no number")
        elif not abs(value) <= _LARGEST:  # also refuses NaN
            raise TypeError(f"{name} is not finite")


def _brief(value: object) -> str:
    try:
        return str(value)[:200]
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return f"a {type(value).__name__}"


def _numbers(step: ArrayLike, counted: bool, xp: ModuleType) -> Any:
    """Converts steps for a formula: to floats, or to integers where it counts.

    Float32, JAX's default, does not tell step 2²⁴ + 1 from the one before.
    """
    dtype = getattr(step, "dtype", None) or np.asarray(step).dtype
    if not counted or not np.can_cast(dtype, np.int64):
        return xp.asarray(step, float)  # JAX: float64 only where x64 is enabled
    if xp is jnp and not isinstance(step, jax.Array):
        step = np.minimum(step, jnp.iinfo(int).max)  # counts stay where int32 ends
    return xp.asarray(step, int)


def _check_steps(step: ArrayLike) -> None:
    steps = np.asarray(step)
    if steps.size and not np.min(steps) >= 1:
        raise ValueError(
            f"A decay's step is the 1-based number of the update, got {np.min(steps)}. "
            "optax.inject_hyperparams calls every callable with a count from 0: pass "
            "it static_args=('decay', 'every')."
        )


def _plain(value: Any) -> Any:
    return float(value) if np.ndim(value) == 0 else value


def is_known(*values: object) -> bool:
    """Whether no value is traced: the host can check those that are not."""
    return not any(isinstance(value, Tracer) for value in values)


def is_number(value: Scalar, what: str) -> bool:
    """Checks that a value is one number; whether its value is known, not traced.

    Raises:
        TypeError: If it is no number, or several.
    """
    arguments.one_number(value, what)
    return is_known(value)


def check_decay(decay: Scalar, call: str) -> None:
    """Raises ValueError unless 0 ≤ decay < 1, saying what to call instead.

    Raises:
        TypeError: If it is an array narrower than float32.
    """
    known = is_number(decay, f"The decay of {call}")
    check_wide_enough(decay)
    if known and not 0.0 <= decay < 1.0:  # also refuses NaN
        cause = (
            "At 1 the average never moves (bfloat16 rounds 0.999 to 1)."
            if decay == 1
            else "It is the weight kept on the old shadow, such as 0.9999."
        )
        raise ValueError(
            f"{call} needs a decay in [0, 1), got {decay}. {cause} "
            "For a length in updates use half_life(steps)."
        )


def check_wide_enough(decay: object) -> None:
    """Raises TypeError for a decay array narrower than float32."""
    dtype = getattr(decay, "dtype", None)
    if dtype is None:
        return
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"The decay came as a {dtype} array, which has no β between 0 and 1: the "
            "shadow would never move, or be the params. Take floats, such as 0.9999."
        )
    if jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"The decay came as a {dtype} array, which cannot tell 0.999 from 1: the "
            "shadow would never move. optax.inject_hyperparams does this to bfloat16 "
            "params: pass it hyperparam_dtype=jnp.float32, or "
            "static_args=('decay', 'every')."
        )


def check_positive(value: Scalar, what: str) -> None:
    """Raises ValueError unless 0 < value < ∞."""
    if is_number(value, what) and not 0 < value < math.inf:
        raise ValueError(f"{what} must be positive and finite, got {value}.")


def log_of(decay: Scalar) -> Scalar:
    """Returns log β, −inf for 0: exact to float32 where β is an array of it."""
    if isinstance(decay, jax.Array):
        return jnp.log1p(decay - 1)  # the subtraction is exact for β in [½, 1]
    return math.log(decay) if decay > 0 else -math.inf
