"""Pictures of runs, of the weights and the lag of decays, of widths, of a choice."""

from ema_optax._plots.choices import choice
from ema_optax._plots.lag import lag
from ema_optax._plots.profiles import profiles
from ema_optax._plots.runs import accuracy_over_steps
from ema_optax._plots.widths import accuracy_over_width, error_over_width

__all__ = [
    "accuracy_over_steps",
    "accuracy_over_width",
    "choice",
    "error_over_width",
    "lag",
    "profiles",
]
