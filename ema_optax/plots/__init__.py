"""Pictures of runs, of what decays average over, of lag, and of many widths."""

from ema_optax.plots.lag import lag
from ema_optax.plots.profiles import profiles
from ema_optax.plots.runs import accuracy_over_steps
from ema_optax.plots.widths import accuracy_over_width, error_over_width

__all__ = [
    "accuracy_over_steps",
    "accuracy_over_width",
    "error_over_width",
    "lag",
    "profiles",
]
