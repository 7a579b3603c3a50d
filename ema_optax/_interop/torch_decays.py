"""Decays that PyTorch's libraries write down beside an average, as ours."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from ema_optax._decays import decays, derived_decays
from ema_optax._decays.decay import Decay
from ema_optax._interop.litema_names import LITEMA
from ema_optax._interop.torch_files import Tensors

# The decay, or None where it has no equal here, and where it was found, or why not.
Recorded: TypeAlias = tuple[Decay | None, str]


def diffusers(tensors: Tensors) -> Recorded:
    """EMAModel: a ramp up to decay, at least min_decay, after its first copies."""
    names = ["decay", "min_decay", "update_after_step", "use_ema_warmup"]
    names += ["inv_gamma", "power"]
    values = [tensors.values.get(f"config.{name}") for name in names]
    if not all(isinstance(value, (int, float)) for value in values):
        return None, "its settings in config.json are not all numbers"
    decay, least, after, warm, gamma, power = (float(v) for v in values)  # pyright: ignore[reportArgumentType]
    after = int(after)
    try:
        if warm:
            ramp = decays.inverse_power(decay, gamma, power, least)
            made = derived_decays.start_after(ramp, after) if after else ramp
        elif least <= min(2 / 11, decay):  # 2/11 is the first of the ramp
            made = derived_decays.start_after(decays.warmup(decay), after + 1)
        else:
            return None, f"min_decay={least} in config.json has no equal here"
    except ValueError as error:
        return None, f"config.json: {error}"
    return made, "config.json of the average"


def timm(tensors: Tensors) -> Recorded | None:
    """ModelEmaV3 of timm's train.py, which counts updates from 1."""
    decay = tensors.values.get("args.model_ema_decay")
    warm = tensors.values.get("args.model_ema_warmup")
    if not isinstance(decay, float) or not isinstance(warm, bool):
        return None
    try:
        if warm:
            made = decays.inverse_power(decay)
        else:
            made = derived_decays.start_after(decays.constant(decay), 1)
    except ValueError as error:
        return None, f"args.model_ema_decay: {error}"
    return made, "args.model_ema_decay and args.model_ema_warmup"


def litema(start: str) -> Callable[[Tensors], Recorded | None]:
    """LitEma: min(decay, (1 + t)/(10 + t)), or without num_updates the decay itself."""

    def recorded(tensors: Tensors) -> Recorded | None:
        value = tensors.read(f"{start}{LITEMA}decay")
        number = float(str(np.float32(value.reshape(()))))  # 0.9999, as it was written
        seen = tensors.number(f"{start}{LITEMA}num_updates")
        try:
            kind = decays.constant if seen is None or seen < 0 else decays.warmup
            return kind(number), f"{start}{LITEMA}decay"
        except ValueError as error:
            return None, f"{start}{LITEMA}decay: {error}"

    return recorded
