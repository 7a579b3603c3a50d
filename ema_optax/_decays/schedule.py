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
    log_of,
)


@dataclasses.dataclass(frozen=True, repr=False)
class schedule(Decay, registered=False):  # JSON cannot hold a callable
    """β_t from any callable step → β; the one decay that cannot become JSON."""

    function: Callable[[Any], ArrayLike]

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
        decay = jnp.where((decay >= 0) & (decay <= 1), decay, jnp.nan)
        return jnp.log1p(decay - 1).astype(t.dtype)

    def _at(self, step: Any) -> Any:
        value = self.function(step)
        check_wide_enough(value)
        if isinstance(value, (int, float, np.ndarray, np.generic)):
            value = float(value)
            if value != 1.0:  # allowed: a schedule may end at 1, and the shadow stays
                check_decay(value, f"The callable decay, at step {step},")
        return value
