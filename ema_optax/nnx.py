"""Flax NNX: the shadow in a live module, in a copy, and in checkpoints.

with ema_optax.nnx.swapped(model, optimizer):
    evaluate(model)

checkpoint.save("run", *ema_optax.nnx.split(model, optimizer), step=10)
"""

from ema_optax._interop.nnx_modules import (
    refresh_batch_stats,
    shadow_copy,
    split,
    swapped,
    update,
)

__all__ = ["refresh_batch_stats", "shadow_copy", "split", "swapped", "update"]
