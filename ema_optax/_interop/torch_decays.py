"""Decays that PyTorch's libraries write down beside an average, as ours."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ema_optax._decays import decays, derived_decays
from ema_optax._decays.decay import Decay
from ema_optax._interop.litema_names import LITEMA
from ema_optax._interop.torch_files import Tensors

# The decay and where it was found, or None and why the decay has no equal here.
Recorded: TypeAlias = tuple[Decay | None, str]


def diffusers(tensors: Tensors) -> Recorded:
    """Reads EMAModel: a ramp up to decay, at least min_decay, after first copies."""
    names = ["decay", "min_decay", "update_after_step", "use_ema_warmup"]
    names += ["inv_gamma", "power"]
    values = [tensors.values.get(f"config.{name}") for name in names]
    if not all(isinstance(value, (int, float)) for value in values):
        return None, "its settings in config.json are not all numbers"
    decay, lowest, after, has_warmup, gamma, power = (float(v) for v in values)  # pyright: ignore[reportArgumentType]
    after = int(after)
    try:
        if has_warmup:
            ramp = decays.inverse_power(decay, gamma, power, lowest)
            equal = derived_decays.start_after(ramp, after) if after else ramp
        elif lowest <= min(2 / 11, decay):  # 2/11 is the ramp's first value
            equal = derived_decays.start_after(decays.warmup(decay), after + 1)
        else:
            return None, f"min_decay={lowest} in config.json has no equal here"
    except ValueError as error:
        return None, f"config.json: {error}"
    return equal, "config.json of the average"


def timm(tensors: Tensors) -> Recorded | None:
    """Reads ModelEmaV3 of timm's train.py, which counts updates from 1."""
    decay = tensors.values.get("args.model_ema_decay")
    has_warmup = tensors.values.get("args.model_ema_warmup")
    if not isinstance(decay, float) or not isinstance(has_warmup, bool):
        return None
    try:
        if has_warmup:
            equal = decays.inverse_power(decay)
        else:
            equal = derived_decays.start_after(decays.constant(decay), 1)
    except ValueError as error:
        return None, f"args.model_ema_decay: {error}"
    return equal, "args.model_ema_decay and args.model_ema_warmup"


def litema(start: str) -> Callable[[Tensors], Recorded | None]:
    """Reads LitEma: min(decay, (1 + t)/(10 + t)), or decay without num_updates."""

    def recorded(tensors: Tensors) -> Recorded | None:
        value = tensors.read(f"{start}{LITEMA}decay")
        number = float(str(np.float32(value.reshape(()))))  # 0.9999, as it was written
        updates = tensors.number(f"{start}{LITEMA}num_updates")
        try:
            kind = decays.constant if updates is None or updates < 0 else decays.warmup
            return kind(number), f"{start}{LITEMA}decay"
        except ValueError as error:
            return None, f"{start}{LITEMA}decay: {error}"

    return recorded
