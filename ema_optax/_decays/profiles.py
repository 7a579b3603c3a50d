"""Profiles of decays: the weight of every step of a run in the shadow."""

import dataclasses
import math

import numpy as np

from ema_optax._decays.decays import DecayLike, as_decay
from ema_optax._messages import arguments


@dataclasses.dataclass(frozen=True)
class Profile:
    """Holds the weights of all past params in a shadow, and what they amount to.

    The initial params count as a step at time 0 in `mean_age`, `width` and
    `effective_size`, so that the weights sum to 1.

    Attributes:
        weights: float64[steps], weight of the params after each update.
        initial_weight: Weight of the initial params.
        mean_age: Mean distance of the averaged params from the last update, in updates.
        width: Standard deviation of that distance over the run's length (σ_rel).
        effective_size: 1/Σ weights²; independent noise has 1/this of its variance.
    """

    weights: np.ndarray
    initial_weight: float
    mean_age: float
    width: float
    effective_size: float


def profile(decay: DecayLike, steps: int, every: int = 1) -> Profile:
    """Computes the weight of every step in the shadow after `steps` updates.

    Args:
        decay: A decay; a float β means `warmup(β)`, as in `ema_params`.
        steps: Length of the run in updates, ≥ 1.
        every: Updates between folds, ≥ 1, as in `ema_params`.

    Returns:
        A `Profile` in float64.

    Raises:
        ValueError: If `steps` or `every` is below 1.

    >>> import ema_optax
    >>> run = ema_optax.profile(ema_optax.constant(0.98), steps=2000)
    >>> round(run.mean_age, 6), round(run.effective_size, 6)  # β/(1−β), (1+β)/(1−β)
    (49.0, 99.0)
    """
    steps = arguments.whole(steps, "profile's steps", 1, "steps=1000 is a run so long.")
    every = arguments.whole(every, "every", 1, "every=1 is every update.")
    folds = np.arange(every, steps + 1, every)
    logs = as_decay(decay, "profile").log_product(folds, every)
    # Log of the share of each fold that the later ones keep: Σ of the logs after it.
    kept_log = np.append(np.cumsum(logs[::-1])[::-1], 0.0)
    weights = np.zeros(steps)
    weights[folds - 1] = -np.expm1(logs) * np.exp(kept_log[1:])
    initial = float(np.exp(kept_log[0]))

    ages = np.arange(steps - 1, -1, -1.0)
    mean_age = float(weights @ ages + initial * steps)
    variance = float(
        weights @ (ages - mean_age) ** 2 + initial * (steps - mean_age) ** 2
    )
    return Profile(
        weights=weights,
        initial_weight=initial,
        mean_age=mean_age,
        width=math.sqrt(variance) / steps,
        effective_size=1 / float(weights @ weights + initial**2),
    )
