"""Parameter averaging for Optax: one line after the optimizer keeps the shadow.

>>> import optax, ema_optax
>>> optimizer = optax.chain(optax.adamw(3e-4), ema_optax.ema_params(0.9999))
"""

import importlib
import types

from ema_optax import extras
from ema_optax.averaging import ema_params, update_shadow
from ema_optax.bema import bema_params
from ema_optax.decay import Decay
from ema_optax.decays import (
    constant,
    cosine,
    debiased,
    fraction,
    half_life,
    inverse_power,
    power,
    ramp,
    uniform,
    warmup,
)
from ema_optax.derived_decays import scale_to_batch, start_after
from ema_optax.diagnosis import Diagnosis, Finding, diagnose
from ema_optax.monitoring import metrics
from ema_optax.order import OrderWarning
from ema_optax.power_profiles import exponent_from_width, width_from_exponent
from ema_optax.profiles import Profile, profile
from ema_optax.rings import ring
from ema_optax.shadows import shadow_params, with_shadow
from ema_optax.starting import started_from
from ema_optax.states import (
    BemaParamsState,
    EmaParamsState,
    NamedShadowsState,
    RingState,
)
from ema_optax.version import __version__ as __version__
from ema_optax.windows import window

# Loaded when first used: they import Orbax and matplotlib, or are seldom needed.
_ON_FIRST_USE = ("checkpoint", "interop", "plots", "reconstruction")


def __getattr__(name: str) -> types.ModuleType:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras.needed_by(f"ema_optax.{name}"):
        return importlib.import_module(f"{__name__}.{name}")


__all__ = [
    "BemaParamsState",
    "Decay",
    "Diagnosis",
    "EmaParamsState",
    "Finding",
    "NamedShadowsState",
    "OrderWarning",
    "Profile",
    "RingState",
    "bema_params",
    "constant",
    "cosine",
    "debiased",
    "diagnose",
    "ema_params",
    "exponent_from_width",
    "fraction",
    "half_life",
    "inverse_power",
    "metrics",
    "power",
    "profile",
    "ramp",
    "ring",
    "scale_to_batch",
    "shadow_params",
    "start_after",
    "started_from",
    "uniform",
    "update_shadow",
    "warmup",
    "width_from_exponent",
    "window",
    "with_shadow",
]
