"""Places a shadow apart from its params: over a mesh axis, or in host memory.

ema_params(0.9999, shadow_sharding=placement.over_axis("data"))
ema_params(0.9999, shadow_sharding=placement.in_host_memory())
"""

from ema_optax._placement.rules import in_host_memory, over_axis

__all__ = ["in_host_memory", "over_axis"]
