"""Coefficients of a merge by the name of the learning-rate decay that it stands for."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ema_optax._decays.decay import Decay
from ema_optax._decays.decays import constant
from ema_optax._messages import arguments
from ema_optax._messages.text import brief, nearest
from ema_optax._reconstruction.weights import decay_coefficients, lr_decay_coefficients

# From the share of the window that is over, in (0, 1), to the multiplier of the rate.
Multiplier: TypeAlias = Callable[[float], float]

SCHEDULES: Mapping[str, Multiplier] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}
UNIFORM = "uniform"


def schedule_coefficients(
    schedule: str | Decay | Multiplier, steps: Sequence[int]
) -> np.ndarray:
    """Weighs checkpoints so that their mean stands for a decay of the learning rate.

    The window begins one distance before the first checkpoint and ends at the last.
    cⱼ = wⱼ − wⱼ₊₁, where wⱼ₊₁ is the multiplier w(x) at checkpoint j, w₀ = 1, and the
    last is followed by 0. Where the steps are evenly spaced, x = j/n, and `"linear"` is
    the plain mean.

    Args:
        schedule: `"linear"`, 1 − x; `"1-sqrt"`, 1 − √x; `"cosine"`, (1 + cos πx)/2;
            `"uniform"`, 1/n whatever the steps; a function w of x in (0, 1) with values
            in [0, 1]; or a decay, which weighs the checkpoints as if it had folded them
            alone: see `decay_coefficients`.
        steps: Updates at which the checkpoints were saved, ascending, ≥ 0.

    Returns:
        float64[checkpoints], sum 1; negative where a multiplier rises.

    Raises:
        ValueError: If there is no such schedule, if steps are not ascending, or a
            multiplier is outside [0, 1].

    Source: Tian et al. 2025, arXiv:2507.17634 (WSM); for 1 − √x Hägele et al. 2024,
    arXiv:2405.18392.

    >>> schedule_coefficients("linear", [100, 200, 300, 400])
    array([0.25, 0.25, 0.25, 0.25])
    >>> schedule_coefficients("1-sqrt", [100, 200, 300, 400]).round(3)
    array([0.5  , 0.207, 0.159, 0.134])
    """
    times = arguments.ascending(steps, "steps")
    if isinstance(schedule, Decay):
        return decay_coefficients(schedule, steps)
    if schedule == UNIFORM:
        return np.full(times.size, 1 / times.size)
    if isinstance(schedule, str):
        names = [*SCHEDULES, UNIFORM]
        if schedule not in SCHEDULES:
            raise ValueError(
                f"There is no schedule {brief(schedule)}. {nearest(schedule, names)} "
                f"Known are {', '.join(names)}; or pass a decay, or a function of the "
                "share of the window that is over."
            )
        schedule = SCHEDULES[schedule]
    if not callable(schedule):
        raise TypeError(
            "schedule is a name such as '1-sqrt', a decay, or a function of the share "
            f"of the window that is over; got {brief(schedule)}."
        )
    distance = (times[-1] - times[0]) / max(times.size - 1, 1)
    over = (times[:-1] - times[0] + distance) / (times[-1] - times[0] + distance or 1)
    return lr_decay_coefficients([float(schedule(x)) for x in over.tolist()])


def checkpoint_ema(name: str) -> Callable[[int], np.ndarray] | None:
    """Reads `ema:β`, an average that keeps the share β at each checkpoint.

    Returns:
        From a number of checkpoints to their coefficients; None for other names.

    Raises:
        ValueError: If β is not in [0, 1).

    >>> checkpoint_ema("ema:0.5")(3)
    array([0.25, 0.25, 0.5 ])
    """
    kind, _, beta = name.partition(":")
    if kind != "ema":
        return None
    decay = constant(float(beta))
    return lambda count: decay_coefficients(decay, range(1, count + 1))
