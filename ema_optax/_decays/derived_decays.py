"""Decays derived from another decay: later in the run, or for another batch size."""

# pyright: strict

import dataclasses
import math
from types import ModuleType

import jax
import jax.numpy as jnp

from ema_optax._decays.decay import (
    Decay,
    Floats,
    Scalar,
    check_positive,
    is_known,
    is_number,
    maker,
)
from ema_optax._decays.decays import DecayLike, as_decay, fraction, power, warmup
from ema_optax._decays.windows import window


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class start_after(Decay):
    """Copies the params up to and including `step`, then averages with `decay`.

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
    _counts = True

    def __init__(self, decay: DecayLike, step: int | jax.Array) -> None:
        if is_number(step, "start_after's step") and not 0 <= step < math.inf:
            raise ValueError(f"start_after needs a number of updates ≥ 0, got {step}.")
        self._set(decay=as_decay(decay, self.kind), step=step)

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        since = t - _within(self.step, t)
        inner = self.decay.log_product(xp.maximum(since, 1), k)
        # One copied update inside the window makes the whole product 0.
        return xp.where(since >= xp.minimum(t, k), inner, -xp.inf)


@dataclasses.dataclass(frozen=True, repr=False)
class scaled(Decay, kind="scale_to_batch"):
    """What `scale_to_batch` derives from most decays: each β to the power `factor`."""

    decay: Decay
    factor: Scalar
    _counts = True

    def __post_init__(self) -> None:
        check_positive(self.factor, "scale_to_batch's factor")

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        return self.factor * self.decay.log_product(t, k)


@maker
def scale_to_batch(decay: DecayLike, factor: Scalar) -> Decay:
    """Keeps an average over as many samples in batches `factor` as large: β^factor.

    In a `warmup` only the final β is scaled: its ramp is a share of the run so far. Of
    a `window` the length is divided by the factor.

    Args:
        decay: A decay in updates; a float β means `warmup(β)`.
        factor: New batch size over the old one, > 0.

    Raises:
        ValueError: If `factor` is not positive, or `decay` is relative to the run's
            length already (`power`, `uniform`, `fraction`), or a `window` that would
            not be a whole number of updates.

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
    of_all_steps = scaled(inner, factor)  # checks the factor
    if isinstance(inner, window):
        return _scaled_window(inner, factor)
    if _is_later_window(inner):
        raise ValueError(
            f"scale_to_batch scales a window by its length, and {inner!r} starts after "
            "a number of updates, which would stay. Scale both: "
            "start_after(scale_to_batch(window(1000), 8), 500)."
        )
    if isinstance(inner, warmup):
        return warmup(inner.decay**factor, inner.offset)
    return of_all_steps


def _within(step: int | jax.Array, t: Floats) -> int | jax.Array:
    """Clips a number of updates to the integer dtype of steps; as it is for floats."""
    if not isinstance(step, (int, float)) or not jnp.issubdtype(t.dtype, jnp.integer):
        return step
    most = int(jnp.iinfo(t.dtype).max)  # beyond it no step is counted
    return most if step > most else int(step) if step == int(step) else step


def _scaled_window(inner: window, factor: Scalar) -> window:
    """Scales a window to as many samples.

    Raises:
        ValueError: If its length is no whole number of updates.
        TypeError: If the factor is traced.
    """
    if not is_known(factor):
        raise TypeError(
            "scale_to_batch's factor of a window cannot be traced: its length is a "
            "plain number. Call scale_to_batch outside jit and vmap."
        )
    length = min(inner.n / float(factor), 2.0**31)  # window refuses 2³¹
    n = max(round(length), 1)
    if not math.isclose(n, length, rel_tol=1e-12):
        near = dict.fromkeys((max(math.floor(length), 1), math.ceil(length)))
        raise ValueError(
            f"scale_to_batch({inner!r}, {factor}) would be a window of {length:.6g} "
            f"updates, and a window is of whole ones: take "
            f"{' or '.join(f'window({n})' for n in near)}."
        )
    return window(n)


def _is_later_window(decay: Decay) -> bool:
    while isinstance(decay, start_after):
        decay = decay.decay
        if isinstance(decay, window):
            return True
    return False
