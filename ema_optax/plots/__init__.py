"""Pictures of runs, of what decays average over, and of averages of many widths."""

from ema_optax.plots.profiles import profiles
from ema_optax.plots.runs import accuracy_over_steps
from ema_optax.plots.widths import accuracy_over_width, error_over_width

__all__ = [
    "accuracy_over_steps",
    "accuracy_over_width",
    "error_over_width",
    "profiles",
]
