"""Averages of any width from the snapshots of one run."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from ema_optax._decays.power_profiles import exponent_from_width, width_from_exponent
from ema_optax._messages import arguments
from ema_optax._messages.progress import Progress
from ema_optax._messages.text import brief
from ema_optax._reconstruction import projection
from ema_optax._reconstruction.projection import DOUBTFUL, WRONG
from ema_optax._reconstruction.slots import Slots
from ema_optax._reconstruction.sums import Source, weighted_sums
from ema_optax._reconstruction.weights import noise_gain


class ReconstructionWarning(UserWarning):
    """The snapshots give the average that was asked for, but not well."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A shadow with a power profile, saved at a step.

    Attributes:
        step: Updates that the shadow has seen, up to its last fold, > 0.
        exponent: γ of its profile: `ema_optax.exponent_from_width(width)`, or that of
            the decay `power(…)`.
        tree: The shadow: a tree of arrays, or a `Source` that reads them when needed,
            as `checkpoint.snapshots` gives.
        dtype: The dtype that the shadow was rounded to when it was saved, from which
            follows how noisy it is. None is the widest rounding among its leaves.

    >>> Snapshot(step=100, exponent=6.94, tree={"w": np.zeros(2)})
    Snapshot(step=100, exponent=6.94, dtype=None)
    """

    step: float
    exponent: float
    tree: Any = dataclasses.field(repr=False)
    dtype: Any = None


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """An average put together from snapshots.

    Attributes:
        tree: Like the params.
        coefficients: float64[snapshots], the weight of each, in the order given; 0 for
            those that were not needed. Sum 1.
        profile_error: ‖profile − profile wanted‖₂ over the norm of the latter. With D
            the root mean square deviation of a param over the run, that param is at
            most profile_error·D·(γ+1)/√(2γ+1) from the average wanted.
        noise_gain: ‖coefficients‖₂, the factor of the snapshots' rounding errors.
        width: σ_rel of the average.
        step: Last step of the average.
    """

    tree: Any = dataclasses.field(repr=False)
    coefficients: np.ndarray = dataclasses.field(repr=False)
    profile_error: float
    noise_gain: float
    width: float
    step: float


@overload
def reconstruct(
    snapshots: Iterable[Snapshot],
    *,
    width: float,
    step: float | None = None,
    params: optax.Params | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = False,
) -> Reconstruction: ...


@overload
def reconstruct(
    snapshots: Iterable[Snapshot],
    *,
    width: Sequence[float],
    step: float | None = None,
    params: optax.Params | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = False,
) -> list[Reconstruction]: ...


def reconstruct(
    snapshots: Iterable[Snapshot],
    *,
    width: float | Sequence[float],
    step: float | None = None,
    params: optax.Params | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = False,
) -> Reconstruction | list[Reconstruction]:
    """Reconstructs an average of a width that was not tracked, from those that were.

    The snapshots are read once, in parts, whatever the number of widths: memory holds
    the results and two snapshots. Sums are taken in float64.

    Args:
        snapshots: Of one run, in any order, of one or more exponents; two widths, .05
            and .10, are enough for widths from .015 to .25.
        width: σ_rel in (0, 0.2886…], the standard deviation of the weights over the
            run's length; or several.
        step: The last step of the average: one that has snapshots. None is the newest.
        params: With them the result has exactly their structure, dtypes and shardings,
            and the leaves that are not averaged are theirs. They may be abstract
            (`jax.eval_shape`) where all leaves are averaged.
        dtype: Of the result's floating leaves, instead of the params'. None without
            params is float32, or float64 where the snapshots are.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function that is called with the work done and all of it.

    Returns:
        A `Reconstruction`, or a list of them where several widths were asked for.
        Without params their trees have the structure of the newest snapshot's.

    Raises:
        ValueError: If a width or step is outside what these snapshots give, or params
            and snapshots do not fit each other.

    Warns:
        ReconstructionWarning: If the profile error is above 5 %; above 50 % it is a
            ValueError.

    Source: Karras et al. 2024, arXiv:2312.02696, section 3.2.

    >>> import ema_optax
    >>> from ema_optax import reconstruction
    >>> optimizer = ema_optax.ema_params({"a": ema_optax.power(0.05),
    ...                                   "b": ema_optax.power(0.10)})
    >>> params, snapshots = {"w": jnp.zeros(1)}, []
    >>> state = optimizer.init(params)
    >>> update = jax.jit(optimizer.update)
    >>> for step in range(1, 1001):
    ...     _, state = update({"w": jnp.ones(1)}, state, params)
    ...     params = {"w": params["w"] + 1}
    ...     if step % 50 == 0:
    ...         for name, g in (("a", 16.97), ("b", 6.94)):
    ...             tree = ema_optax.shadow_params(state, params, name=name)
    ...             snapshots.append(reconstruction.Snapshot(step, g, tree))
    >>> found = reconstruction.reconstruct(snapshots, width=0.07)
    >>> found.tree["w"].round(), round(found.profile_error, 4)
    (Array([925.], dtype=float32), 0.0025)
    """
    listed = _listed(snapshots)
    widths = [float(w) for w in np.atleast_1d(arguments.numbers(width, "width"))]
    last = _last_step(listed, step)
    order = sorted(range(len(listed)), key=lambda i: listed[i].step)
    used = [i for i in order if listed[i].step <= last]
    steps = [listed[i].step for i in used]
    exponents = [listed[i].exponent for i in used]
    ridge = max(rounding(listed[i]) for i in used)
    x, errors = projection.fit(
        steps, exponents, [exponent_from_width(w) for w in widths], last, ridge=ridge
    )
    for wanted, error in zip(widths, errors.tolist(), strict=True):
        _check_error(error, wanted, steps, exponents, last, ridge)
    slots = Slots([listed[i].tree for i in used], params, dtype)
    trees = slots.filled(
        weighted_sums(slots.sources, x, slots.targets, progress=progress)
    )
    coefficients = np.zeros((len(listed), len(widths)))
    coefficients[used] = x
    results = [
        Reconstruction(
            tree,
            coefficients[:, j],
            float(errors[j]),
            noise_gain(x[:, j]),
            widths[j],
            last,
        )
        for j, tree in enumerate(trees)
    ]
    return results[0] if np.ndim(width) == 0 else results


def _listed(snapshots: object) -> list[Snapshot]:
    listed: list[Any]
    try:
        listed = list(cast(Iterable[Any], snapshots))
    except TypeError:
        listed = [snapshots]
    for other in listed:
        if not isinstance(other, Snapshot):
            raise TypeError(
                "reconstruct takes Snapshots, as checkpoint.snapshots(directory) lists "
                f"them; got {brief(other)}."
            )
    return listed


def reachable(
    steps: projection.Numbers,
    exponents: projection.Numbers,
    step: float,
    *,
    error: float = DOUBTFUL,
    ridge: float = 0.0,
) -> tuple[float, float] | None:
    """Finds the narrowest and the widest average that snapshots give well, to 1 %.

    They give all widths between the two well.

    Args:
        steps: The step of each snapshot, > 0.
        exponents: γ > −½ of each snapshot.
        step: The last step of the average.
        error: Largest profile error, as in `Reconstruction`.
        ridge: As in `coefficients`.

    Returns:
        Two widths, or None if there are none.

    >>> steps, exponents = np.repeat(np.arange(10, 641, 10), 2), [16.97, 6.94] * 64
    >>> low, high = reachable(steps, exponents, 640, error=0.01)
    >>> round(low, 3), round(high, 3)
    (0.021, 0.241)
    """
    arguments.one_number(error, "error")
    grid = np.geomspace(0.002, 0.28, 500)
    wanted = [exponent_from_width(width) for width in grid]
    _, errors = projection.fit(steps, exponents, wanted, step, ridge=ridge)
    pairs = zip(grid.tolist(), (errors <= error).tolist(), strict=True)
    runs = [
        [width for width, _ in group]
        for good, group in itertools.groupby(pairs, key=lambda pair: pair[1])
        if good
    ]
    longest = max(runs, key=len, default=None)
    return (longest[0], longest[-1]) if longest else None


def _last_step(snapshots: Sequence[Snapshot], step: float | None) -> float:
    if not snapshots:
        raise ValueError(
            "There are no snapshots. Save shadows of a power profile while training: "
            "ema_params({'a': power(0.05), 'b': power(0.10)}) with "
            "checkpoint.SnapshotSave, and read them with checkpoint.snapshots(folder)."
        )
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step is None:
        return steps[-1]
    arguments.one_number(step, "step")
    if not steps[0] <= step <= steps[-1]:
        where = "before the first" if step < steps[0] else "after the last"
        raise ValueError(
            f"step {step:g} is {where} snapshot: they reach from step {steps[0]:g} to "
            f"{steps[-1]:g}, and an average can end at any of them."
        )
    return step


def _check_error(
    error: float,
    width: float,
    steps: list[float],
    exponents: list[float],
    last: float,
    ridge: float,
) -> None:
    """Warns of an average that snapshots give badly, and refuses a wrong one."""
    if error <= DOUBTFUL:
        return
    message = (
        f"The average of width {width:g} at step {last:g} has a profile error of "
        f"{error:.0%} from these {len(steps)} snapshots. "
        f"{_advice(steps, exponents, last, ridge)}"
    )
    if error > WRONG:
        raise ValueError(message)
    warnings.warn(message, ReconstructionWarning, stacklevel=3)


def _advice(
    steps: Sequence[float], exponents: Sequence[float], last: float, ridge: float
) -> str:
    if last not in steps:
        near = sorted(set(steps), key=lambda t: abs(t - last))[:1]
        return f"There is none at step {last:g} itself; the nearest is {near[0]:g}."
    tracked = ", ".join(
        f"{width_from_exponent(g):.3g}" for g in sorted(set(exponents), reverse=True)
    )
    ends = reachable(steps, exponents, last, ridge=ridge)
    if ends is None:
        return f"They were tracked at width {tracked}; two widths give many more."
    return (
        f"They were tracked at width {tracked} and give widths from {ends[0]:.3g} to "
        f"{ends[1]:.3g} within {DOUBTFUL:.0%}; snapshots at more steps give narrower "
        "ones, another tracked width wider ones."
    )


def rounding(snapshot: Snapshot) -> float:
    """Computes the mean square of the relative rounding error of a snapshot."""
    if snapshot.dtype is not None:
        return projection.rounding_variance(snapshot.dtype)
    tree = snapshot.tree
    leaves: Iterable[Any] = (
        tree.leaves.values() if isinstance(tree, Source) else jax.tree.leaves(tree)
    )
    kinds = {jnp.result_type(leaf) for leaf in leaves}
    floating = [kind for kind in kinds if jnp.issubdtype(kind, jnp.inexact)]
    return max(map(projection.rounding_variance, floating), default=0.0)
