"""Merging of checkpoints: their weighted mean, in one pass over them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from ema_optax._decays.decay import Decay
from ema_optax._messages import arguments
from ema_optax._messages.progress import Progress
from ema_optax._messages.text import brief
from ema_optax._reconstruction.schedules import Multiplier, schedule_coefficients
from ema_optax._reconstruction.slots import Slots
from ema_optax._reconstruction.sums import weighted_sums


def merge(
    trees: Sequence[Any],
    coefficients: ArrayLike | str | Decay | Multiplier,
    *,
    steps: Sequence[int] | None = None,
    params: optax.Params | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = False,
) -> Any:
    """Merges trees into their weighted mean Σ coefficientsᵢ·treesᵢ.

    The trees are read once, in parts, whatever the number of results; those whose
    coefficients are all 0 are not read. A tree of coefficient 0 counts for nothing,
    even where it is not finite. Sums are taken in float64.

    Args:
        trees: Trees of arrays, or what `checkpoint.stored` gives.
        coefficients: float[trees], with sum 1; or float[results, trees], for several
            results in one pass. Or a schedule, as `schedule_coefficients` takes it:
            `"1-sqrt"`, a decay, a function.
        steps: Of the trees, ascending, for a schedule; None is evenly spaced.
        params: What the result should be like, as in `reconstruct`. None is like the
            last of the trees, in float32 or wider, with its leaves that are not
            averaged.
        dtype: Of the result's floating leaves, instead of the params'.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function that is called with the work done and all of it.

    Returns:
        A tree, or a list of them for several results.

    Raises:
        ValueError: If coefficients do not sum to 1, if there is no such schedule, or
            trees do not fit each other.

    >>> merge([{"w": 1.0}, {"w": 3.0}], [0.25, 0.75])
    {'w': Array(2.5, dtype=float32)}
    >>> merge([{"w": 1.0}, {"w": 3.0}], "linear", steps=[100, 200])
    {'w': Array(2., dtype=float32)}
    """
    if not isinstance(trees, Sequence) or isinstance(trees, (str, bytes)):
        raise TypeError(
            f"merge takes a list of trees, such as [params, …]; got {brief(trees)}."
        )
    weights = _weights(coefficients, steps, len(trees))
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(trees) or not len(trees):
        raise ValueError(
            f"merge needs one coefficient for each of the {len(trees)} trees, got "
            f"{weights.shape}. uniform_coefficients({len(trees)}) is their plain mean."
        )
    totals = np.ravel(weights.sum(axis=-1))
    if not np.allclose(totals, 1, rtol=0, atol=1e-6):
        raise ValueError(
            f"coefficients must sum to 1, or the params would be scaled; got a sum of "
            f"{totals[np.argmax(np.abs(totals - 1))]:.6g}."
        )
    slots = Slots(trees, params, dtype)
    columns = np.atleast_2d(weights).T
    used = np.flatnonzero(np.any(columns != 0, axis=1))
    sources = [slots.sources[i] for i in used.tolist()]
    sums = weighted_sums(sources, columns[used], slots.targets, progress=progress)
    merged = slots.filled(sums)
    return merged[0] if weights.ndim == 1 else merged


def _weights(
    coefficients: ArrayLike | str | Decay | Multiplier,
    steps: Sequence[int] | None,
    count: int,
) -> np.ndarray:
    """Checks coefficients that are numbers, or computes those of a schedule."""
    if not isinstance(coefficients, str) and not callable(coefficients):
        if steps is not None:
            raise ValueError(
                f"steps={brief(steps)} are for a schedule such as '1-sqrt', and "
                "coefficients are numbers here, one a tree. Leave steps out."
            )
        return arguments.numbers(coefficients, "coefficients")
    steps = range(1, count + 1) if steps is None else steps
    if not count:
        return np.zeros(0)
    weights = schedule_coefficients(coefficients, steps)
    if weights.size != count:
        raise ValueError(
            f"merge needs a step for each of the {count} trees, got {weights.size}: "
            f"steps={brief(steps)}."
        )
    return weights
