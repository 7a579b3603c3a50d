"""Plans snapshots before training: which averages they will give, at how many bytes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.typing import DTypeLike

from ema_optax._decays.power_profiles import exponent_from_width
from ema_optax._messages import arguments
from ema_optax._reconstruction import projection
from ema_optax._reconstruction.weights import noise_gain
from ema_optax._reconstruction.widths import reachable
from ema_optax._trees import selection

_WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The averages that a schedule of snapshots gives at the last step.

    Attributes:
        steps: Updates at which shadows are saved.
        tracked: Widths that are tracked while training.
        widths: Widths that could be reconstructed.
        profile_errors: Profile error of each width, as in `Reconstruction`.
        noise_gains: Noise gain of each width, as in `Reconstruction`.
        reachable: Narrowest and widest average with a profile error of 1 % or less;
            None if there is none.
        bytes: Size of all snapshots on disk; None where that of the params is unknown.
    """

    steps: tuple[int, ...]
    tracked: tuple[float, ...]
    widths: tuple[float, ...]
    profile_errors: tuple[float, ...]
    noise_gains: tuple[float, ...]
    reachable: tuple[float, float] | None
    bytes: int | None

    def __str__(self) -> str:
        lines = [
            f"{len(self.steps)} snapshots of {len(self.tracked)} widths "
            f"({', '.join(f'{w:g}' for w in self.tracked)})"
            + ("" if self.bytes is None else f", {self.bytes / 1e9:.3g} GB"),
            " width  profile error  noise gain",
        ]
        rows = zip(self.widths, self.profile_errors, self.noise_gains, strict=True)
        lines += [f"{w:6g}  {e:13.2%}  {g:10.2f}" for w, e, g in rows]
        reach = "none"
        if self.reachable is not None:
            reach = "{:.3g} to {:.3g}".format(*self.reachable)
        return "\n".join([*lines, f"widths within 1 %: {reach}"])


def plan(
    steps: int | Sequence[int],
    *,
    snapshots: int = 64,
    tracked: Sequence[float] = (0.05, 0.10),
    widths: Sequence[float] = _WIDTHS,
    dtype: DTypeLike | None = "float16",
    params: optax.Params | int | None = None,
) -> Plan:
    """Plans which widths a schedule of snapshots will give, and at how many bytes.

    Args:
        steps: Length of the run in updates, ≥ 1; or the steps of the snapshots.
        snapshots: Number of snapshots, ≥ 1, evenly spaced over the run.
        tracked: Widths that are tracked, in (0, 0.2886…].
        widths: Widths whose errors are computed, in (0, 0.2886…].
        dtype: The dtype in which `checkpoint.SnapshotSave` writes; None is float32.
        params: Params of the model, abstract or concrete, to count bytes; or the number
            of their elements.

    Raises:
        ValueError: If an argument is outside its interval.

    >>> found = plan(100_000, snapshots=64, params=10**8)
    >>> found.bytes / 1e9, round(found.reachable[0], 3)
    (25.6, 0.021)
    """
    times = _times(steps, snapshots)
    kind = arguments.dtype("float32" if dtype is None else dtype, "dtype")
    ridge = projection.rounding_variance(kind)
    exponents = [exponent_from_width(width) for width in tracked]
    if not exponents:
        raise ValueError("tracked needs at least one width, such as (0.05, 0.10).")
    t = np.repeat(times, len(exponents))
    g = np.tile(exponents, len(times))
    wanted = [exponent_from_width(width) for width in widths]
    x, errors = projection.fit(t, g, wanted, times[-1], ridge=ridge)
    count = _elements(params)
    size = None if count is None else count * kind.itemsize * len(t)
    best = reachable(t, g, times[-1], error=0.01, ridge=ridge)
    return Plan(
        steps=tuple(times),
        tracked=tuple(tracked),
        widths=tuple(widths),
        profile_errors=tuple(errors.tolist()),
        noise_gains=tuple(map(noise_gain, x.T)),
        reachable=best,
        bytes=size,
    )


def _times(steps: int | Sequence[int], snapshots: int) -> list[int]:
    if isinstance(steps, (Sequence, np.ndarray)):
        times = sorted({int(step) for step in arguments.numbers(steps, "steps")})
        if not times:
            raise ValueError("plan needs the length of a run, or steps of snapshots.")
        return times
    length = arguments.whole(steps, "steps", 1, "steps=100_000 is a run so long.")
    snapshots = arguments.whole(snapshots, "snapshots", 1, "64 are usual.")
    if not 1 <= snapshots <= length:
        raise ValueError(
            f"plan needs between 1 and {length} snapshots in {length} updates, got "
            f"{snapshots}."
        )
    return [round(length * i / snapshots) for i in range(1, snapshots + 1)]


def _elements(params: optax.Params | int | None) -> int | None:
    if params is None:
        return None
    if isinstance(params, (int, float, np.number)):
        return int(params)
    averaged = filter(selection.is_averaged, jax.tree.leaves(params))
    return sum(math.prod(np.shape(leaf)) for leaf in averaged)
