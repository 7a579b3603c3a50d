"""Model libraries: the shadow in Flax NNX modules, and BatchNorm's statistics for it.

    with interop.swapped(model, optimizer):
        evaluate(model)

    variables = interop.refresh_batch_stats(apply_fn, variables, batches)

What a library needs is imported when its function is called.
"""

from ema_optax.interop.batch_stats import refresh_batch_stats
from ema_optax.interop.nnx_modules import (
    nnx_split,
    nnx_update,
    refresh_nnx_batch_stats,
    shadow_copy,
    swapped,
)

__all__ = [
    "nnx_split",
    "nnx_update",
    "refresh_batch_stats",
    "refresh_nnx_batch_stats",
    "shadow_copy",
    "swapped",
]
