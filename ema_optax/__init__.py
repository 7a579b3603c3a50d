"""Parameter averaging for Optax: one line after the optimizer keeps the shadow.

>>> import optax, ema_optax
>>> optimizer = optax.chain(optax.adamw(3e-4), ema_optax.ema_params(0.9999))
"""

import importlib
import types

from ema_optax._averages.averaging import ema_params, update_shadow
from ema_optax._averages.bema import bema_params
from ema_optax._averages.monitoring import metrics
from ema_optax._averages.order import OrderWarning
from ema_optax._averages.rings import ring
from ema_optax._averages.shadows import shadow_params, with_shadow
from ema_optax._averages.starting import started_from
from ema_optax._averages.states import (
    BemaParamsState,
    EmaParamsState,
    NamedShadowsState,
    RingState,
)
from ema_optax._decays.decay import Decay
from ema_optax._decays.decays import (
    DecayLike,
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
from ema_optax._decays.derived_decays import scale_to_batch, start_after
from ema_optax._decays.power_profiles import exponent_from_width, width_from_exponent
from ema_optax._decays.profiles import Profile, profile
from ema_optax._decays.windows import window
from ema_optax._diagnosis import Diagnosis, Finding, diagnose
from ema_optax._messages import extras
from ema_optax._trees.selection import Mask
from ema_optax._version import __version__ as __version__

# Loaded when first used: they import Orbax or matplotlib, or are seldom needed.
_ON_FIRST_USE = (
    "checkpoint",
    "digits",
    "interop",
    "keras",
    "linen",
    "nnx",
    "placement",
    "plots",
    "reconstruction",
    "safetensors",
    "tensorflow",
    "torch",
)


def __getattr__(name: str) -> types.ModuleType:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras.needed_by(f"ema_optax.{name}"):
        return importlib.import_module(f"{__name__}.{name}")


__all__ = [
    "BemaParamsState",
    "Decay",
    "DecayLike",
    "Diagnosis",
    "EmaParamsState",
    "Finding",
    "Mask",
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
