"""Axes that `choose` searches: widths, window lengths, schedules, extrapolations."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from ema_optax._decays.decay import Decay
from ema_optax._decays.power_profiles import exponent_from_width, width_from_exponent
from ema_optax._messages import arguments
from ema_optax._messages.text import brief, nearest
from ema_optax._reconstruction import projection
from ema_optax._reconstruction.extrapolation import extrapolated
from ema_optax._reconstruction.ingredients import Ingredients
from ema_optax._reconstruction.schedules import checkpoint_ema, schedule_coefficients
from ema_optax._reconstruction.searching import Axis, Value
from ema_optax._reconstruction.weights import decay_coefficients, uniform_coefficients
from ema_optax._reconstruction.widths import Snapshot, reachable, rounding

OVER = ("width", "last", "schedule", "alpha")
AMONG = ("uniform", "linear", "1-sqrt", "cosine", "ema:0.8")
_ALPHA = (-1.0, 1.0)

Between = tuple[float, float] | None
Among = Sequence[str | Decay] | None


def widths(snapshots: Sequence[Snapshot], between: Between) -> Axis:
    """Builds the axis of the widths that snapshots give with a profile error ≤ 5 %.

    Raises:
        ValueError: If there are none, or `between` is outside them.
    """
    ordered = sorted(snapshots, key=lambda s: (s.step, s.exponent))
    steps = [s.step for s in ordered]
    exponents = [s.exponent for s in ordered]
    ridge = max(map(rounding, ordered))
    ends = reachable(steps, exponents, steps[-1], ridge=ridge)
    if ends is None or ends[0] == ends[1]:
        tracked = sorted({round(width_from_exponent(g), 3) for g in exponents})
        raise ValueError(
            f"These {len(ordered)} snapshots, tracked at width "
            f"{', '.join(f'{w:g}' for w in tracked)}, give no range of widths to "
            "choose from. Track two widths, and save more snapshots: see "
            "reconstruction.plan."
        )
    low, high = _inside(between, *ends, "widths that these snapshots give")

    def coefficients(width: Value) -> np.ndarray:
        exponent = exponent_from_width(cast(float, width))
        return projection.coefficients(
            steps, exponents, exponent, steps[-1], ridge=ridge
        )

    return Axis("width", coefficients, _up(low), -_up(-high), log=True)


def windows(checkpoints: Ingredients, between: Between) -> Axis:
    """Builds the axis of the plain means of the last n checkpoints.

    Raises:
        ValueError: If there are fewer than two, or `between` is outside them.
    """
    count = _several(checkpoints, "last")
    low, high = _inside(between, 1, count, "numbers of checkpoints")
    if low % 1 or high % 1:
        raise ValueError(
            f"between={brief(between)} of over='last' are whole numbers of checkpoints."
        )

    def coefficients(last: Value) -> np.ndarray:
        return uniform_coefficients(count, last=cast(int, last))

    return Axis("last", coefficients, int(low), int(high), log=True, whole=True)


def extrapolations(checkpoints: Ingredients, between: Between) -> Axis:
    """Builds the axis of θ̄ + α·(θ̄ − θ̄'), the means of the newer and the older half.

    With an odd number of checkpoints the one in the middle is in the newer half.

    Raises:
        ValueError: If there are fewer than two, or `between` is no interval.
    """
    count = _several(checkpoints, "alpha")
    newer = uniform_coefficients(count, last=(count + 1) // 2)
    older = uniform_coefficients(count // 2)
    older = np.concatenate([older, np.zeros(count - older.size)])
    low, high = _inside(between, -np.inf, np.inf, "numbers") if between else _ALPHA

    def coefficients(alpha: Value) -> np.ndarray:
        return extrapolated(newer, older, cast(float, alpha))

    return Axis("alpha", coefficients, low, high)


def schedules(checkpoints: Ingredients, among: Among) -> Axis:
    """Builds the axis of the schedules of a merge, by their names.

    `NAME` is over all checkpoints, `NAME@N` over the last N.

    Raises:
        ValueError: If a name is no schedule, or N is not of these checkpoints.
    """
    steps = [int(step) for step in checkpoints.steps]
    count = _several(checkpoints, "schedule")
    if among is None:
        half = [f"{name}@{(count + 1) // 2}" for name in AMONG if count > 3]
        among = [*AMONG, *half]
    if isinstance(among, str) or not isinstance(among, Sequence) or not among:
        raise TypeError(
            f"among is a list of schedules, such as ['uniform', '1-sqrt@10'], got "
            f"{brief(among)}."
        )
    weights = {_named(each): _weights(each, steps) for each in among}

    def coefficients(name: Value) -> np.ndarray:
        return weights[cast(str, name)]

    return Axis("schedule", coefficients, names=tuple(weights))


def _named(schedule: object) -> str:
    if isinstance(schedule, (str, Decay)):
        return str(schedule)
    raise TypeError(
        f"among holds names of schedules, or decays; got {brief(schedule)}."
    )


def _weights(schedule: str | Decay, steps: Sequence[int]) -> np.ndarray:
    """Computes the weights of a schedule, 0 before its window."""
    if isinstance(schedule, Decay):
        return decay_coefficients(schedule, steps)
    name, at, number = schedule.partition("@")
    last = int(number) if number.isdecimal() else 0
    if at and not 1 <= last <= len(steps):
        raise ValueError(
            f"{schedule!r} in among: {name}@N is of the last N checkpoints, from 1 to "
            f"{len(steps)}."
        )
    window = steps[-last:]
    try:
        average = checkpoint_ema(name)
    except ValueError as error:
        raise ValueError(
            f"{schedule!r} in among: ema:β keeps the share β of the mean so far at "
            f"each checkpoint. {error}"
        ) from None
    inside = average(len(window)) if average else schedule_coefficients(name, window)
    return np.concatenate([np.zeros(len(steps) - len(window)), inside])


def checked_over(over: object) -> tuple[str, ...]:
    """Checks `over`, one name or several, and returns the names.

    Raises:
        TypeError: If it is neither a name nor several.
        ValueError: If there is no such name, or one twice.
    """
    names = (over,) if isinstance(over, str) else over
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise TypeError(f"over is one of {OVER}, or several; got {brief(over)}.")
    checked = tuple(map(str, names))
    for name in checked:
        if name not in OVER:
            raise ValueError(f"over={name!r} is none of {OVER}. {nearest(name, OVER)}")
    if len(set(checked)) < len(checked):
        raise ValueError(f"over={brief(over)} has a name twice.")
    return checked


def _several(checkpoints: Ingredients, over: str) -> int:
    count = len(checkpoints.steps)
    if count < 2:
        raise ValueError(
            f"over={over!r} chooses among means of checkpoints, and needs two steps at "
            f"least; there is {count}, {checkpoints.steps[0]:g}."
        )
    return count


def _inside(between: object, low: float, high: float, what: str) -> tuple[float, float]:
    if between is None:
        return low, high
    numbers = arguments.numbers(between, "between")
    if numbers.shape != (2,) or not numbers[0] < numbers[1]:
        raise ValueError(
            f"between is (low, high) with low < high, got {brief(between)}."
        )
    if not (low <= numbers[0] and numbers[1] <= high and np.isfinite(numbers).all()):
        limits = f": from {low:.4g} to {high:.4g}" if np.isfinite(high) else ""
        raise ValueError(f"between={brief(between)} is outside the {what}{limits}.")
    return float(numbers[0]), float(numbers[1])


def _up(number: float) -> float:
    """Rounds a number up to four digits."""
    neat = float(f"{number:.4g}")
    step = 10.0 ** (np.floor(np.log10(abs(number))) - 3)
    return neat if neat >= number else float(f"{neat + step:.4g}")
