"""Decays made from another decay: later in the run, or for another batch size."""

# pyright: strict

import dataclasses
import math
from types import ModuleType

import jax

from ema_optax.decay import Decay, Floats, Scalar, check_positive, is_number, maker
from ema_optax.decays import DecayLike, as_decay, fraction, power, warmup


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class start_after(Decay):
    """Copy the params up to and including `step`, then average with `decay`.

    The inner decay counts from there: `start_after(uniform(), 1000)` is the mean of
    the params after updates 1001, 1002, … (SWA).

    Args:
        decay: A decay; a float β means `warmup(β)`.
        step: Number of updates that are copied, ≥ 0.

    Raises:
        ValueError: If `step` is negative.

    >>> import ema_optax
    >>> decay = start_after(ema_optax.uniform(), 10)
    >>> decay(10), decay(11), decay(14)
    (0.0, 0.0, 0.75)
    """

    decay: Decay
    step: int | jax.Array

    def __init__(self, decay: DecayLike, step: int | jax.Array) -> None:
        if is_number(step, "start_after's step") and not 0 <= step < math.inf:
            raise ValueError(f"start_after needs a number of updates ≥ 0, got {step}.")
        self._set(decay=as_decay(decay, self.kind), step=step)

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        since = t - self.step
        inner = self.decay.log_product(xp.maximum(since, 1), k)
        # One copied update inside the window makes the whole product 0.
        return xp.where(since >= xp.minimum(t, k), inner, -xp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class scaled(Decay, kind="scale_to_batch"):
    """The decay that `scale_to_batch` makes of most: each β to the power `factor`."""

    decay: Decay
    factor: Scalar

    def __post_init__(self) -> None:
        check_positive(self.factor, "scale_to_batch's factor")

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        return self.factor * self.decay.log_product(t, k)


@maker
def scale_to_batch(decay: DecayLike, factor: Scalar) -> Decay:
    """β^factor: the same average over samples after the batch grew by `factor`.

    In a `warmup` only the final β is scaled: its ramp is a share of the run so far.

    Args:
        decay: A decay in updates; a float β means `warmup(β)`.
        factor: New batch size over the old one, > 0.

    Raises:
        ValueError: If `factor` is not positive, or `decay` is relative to the run's
            length already (`power`, `uniform`, `fraction`).

    Source: Busbridge et al. 2023, arXiv:2307.13813.

    >>> import ema_optax
    >>> round(scale_to_batch(ema_optax.constant(0.999), 8)(step=1), 6)
    0.992028
    """
    inner = as_decay(decay, "scale_to_batch")
    if isinstance(inner, (power, fraction)):
        raise ValueError(
            f"{inner!r} is relative to the length of the run, which changes with the "
            "batch by itself: use it unscaled. scale_to_batch is for decays in updates."
        )
    whole = scaled(inner, factor)
    if isinstance(inner, warmup):
        return warmup(inner.decay**factor, inner.offset)
    return whole
