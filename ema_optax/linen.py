"""Flax Linen: BatchNorm's statistics for averaged params.

variables = ema_optax.linen.refresh_batch_stats(apply_fn, variables, batches)
"""

from ema_optax._interop.batch_stats import refresh_batch_stats

__all__ = ["refresh_batch_stats"]
