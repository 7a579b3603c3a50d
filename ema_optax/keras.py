"""Keras on JAX: variables as trees, the optimizer's average, and other params put in.

params, rest = ema_optax.keras.split(model)
with ema_optax.keras.swapped(model, shadow_params(opt_state, params)):
    model.evaluate(images, labels)
"""

from ema_optax._interop.keras_models import (
    KerasAverage,
    average,
    split,
    swapped,
    update,
)

__all__ = ["KerasAverage", "average", "split", "swapped", "update"]
