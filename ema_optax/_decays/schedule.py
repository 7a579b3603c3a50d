"""Decays from callables step → β, such as the schedules of Optax."""

# pyright: strict, reportUnknownMemberType=false
# jax.numpy leaves some types unknown.

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ema_optax._decays.decay import (
    Decay,
    Floats,
    check_decay,
    check_wide_enough,
    is_known,
    log_of,
)
from ema_optax._messages.text import brief


@dataclasses.dataclass(frozen=True, repr=False)
class schedule(Decay, registered=False):  # JSON cannot hold a callable
    """β_t from any callable step → β; the one decay that cannot become JSON."""

    function: Callable[[Any], ArrayLike]

    def __post_init__(self) -> None:
        """Refuses a first decay outside [0, 1], where its value can be known."""
        try:
            with jax.ensure_compile_time_eval():
                value = self.function(jnp.int32(1))
        except Exception:  # whatever it raises is raised again at its first use
            return
        if isinstance(value, jax.Array) and is_known(value) and not np.ndim(value):
            _check(float(value), 1)

    def _log(self, t: Floats, xp: ModuleType) -> Floats:
        if not isinstance(t, jax.Array):
            steps = np.ravel(t).astype(int).tolist()
            logs = np.asarray([log_of(float(self._at(step))) for step in steps])
            return logs.reshape(t.shape)
        steps = jnp.asarray(t, jnp.int32)
        call = self._at
        for _ in range(steps.ndim):
            call = jax.vmap(call)
        decay = call(steps)
        if isinstance(decay, float):  # does not depend on the step
            return jnp.full_like(t, log_of(decay))
        # A decay outside [0, 1] makes the shadow NaN at once, rather than slowly wrong.
        # Its log is +∞: where XLA folds constants, expm1 of NaN is any number.
        inside = (decay >= 0) & (decay <= 1)
        logs = jnp.log1p(jnp.where(inside, decay, 0.5) - 1)
        return jnp.where(inside, logs, jnp.inf).astype(t.dtype)

    def _at(self, step: Any) -> Any:
        try:
            value = self.function(step)
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(
                "The callable decay takes the step for a Python number, with `if`, "
                "min() or float(), and under jit it is traced. Use jnp.where and "
                "jnp.minimum; or a decay of ema_optax: warmup(0.9999) is "
                "min(0.9999, (1+t)/(10+t))."
            ) from error
        if not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
            raise TypeError(
                f"The callable decay returned {brief(value)} at step {step}. It has to "
                "return β, a number in [0, 1], such as 1 - 1 / step."
            )
        check_wide_enough(value)
        if not isinstance(value, jax.Array):
            value = float(value)
            _check(value, step)
        return value


def _check(value: float, step: Any) -> None:
    if value != 1.0:  # allowed: a schedule may end at 1, and the shadow stays
        check_decay(value, f"The callable decay, at step {step},")
