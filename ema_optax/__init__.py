"""Parameter averaging for Optax: one line after the optimizer keeps the shadow.

>>> import optax, ema_optax
>>> optimizer = optax.chain(optax.adamw(3e-4), ema_optax.ema_params(0.9999))
"""

from ema_optax.averaging import ema_params, update_shadow
from ema_optax.decays import (
    constant,
    cosine,
    debiased,
    exponent_from_width,
    fraction,
    half_life,
    inverse_power,
    power,
    ramp,
    scale_to_batch,
    start_after,
    uniform,
    warmup,
    width_from_exponent,
)
from ema_optax.families import Decay
from ema_optax.profiles import Profile, profile
from ema_optax.shadows import shadow_params, with_shadow
from ema_optax.states import EmaParamsState, NamedShadowsState
from ema_optax.version import __version__ as __version__

__all__ = [
    "Decay",
    "EmaParamsState",
    "NamedShadowsState",
    "Profile",
    "constant",
    "cosine",
    "debiased",
    "ema_params",
    "exponent_from_width",
    "fraction",
    "half_life",
    "inverse_power",
    "power",
    "profile",
    "ramp",
    "scale_to_batch",
    "shadow_params",
    "start_after",
    "uniform",
    "update_shadow",
    "warmup",
    "width_from_exponent",
    "with_shadow",
]
