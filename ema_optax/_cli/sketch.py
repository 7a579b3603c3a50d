"""A profile drawn in characters, for a terminal of 80 columns without colour."""

import dataclasses
import math

import numpy as np

from ema_optax._decays.profiles import Profile

COLUMNS = 64
_ROWS = 6


@dataclasses.dataclass(frozen=True)
class Characters:
    """Characters of a drawing, with `levels` from an empty cell to a full one."""

    levels: str
    side: str
    corner: str
    base: str
    mark: str


BLOCKS = Characters(" ▁▂▃▄▅▆▇█", side="│", corner="└", base="─", mark="▲")
ASCII = Characters(" .:#", side="|", corner="+", base="-", mark="^")


def characters(encoding: str | None) -> Characters:
    """Returns the finest characters that a stream of this encoding can print.

    >>> characters("ascii").levels
    ' .:#'
    """
    try:
        "".join(dataclasses.astuple(BLOCKS)).encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return ASCII
    return BLOCKS


def shares(run: Profile, every: int, bins: int) -> np.ndarray:
    """Computes the share of the average that each part of a run holds, float64[bins].

    A fold's weight is spread over the updates since the fold before it: at the fold's
    own step alone, bins with two folds and bins with three would draw a comb.

    Args:
        run: The profile of a run of `len(run.weights)` updates.
        every: Updates between folds, ≥ 1.
        bins: Number of equal parts, ≥ 1.
    """
    steps = len(run.weights)
    folds = np.arange(every, steps + 1, every)
    cumulative = np.append(0.0, np.cumsum(run.weights[folds - 1]))
    edges = np.linspace(0, steps, bins + 1)
    return np.diff(np.interp(edges, np.append(0, folds), cumulative))


def lines(run: Profile, every: int, using: Characters) -> list[str]:
    """Draws bars over a linear axis from 0 to the length of the run.

    The tallest bar fills the height and is labelled. The mark under the axis stands at
    the mean age. The weight that is still on the initial params is not drawn.

    Args:
        run: The profile of a run of `len(run.weights)` updates.
        every: Updates between folds, ≥ 1.
        using: The characters to draw with.
    """
    steps = len(run.weights)
    bins = min(COLUMNS, steps)
    bar_width = COLUMNS // bins  # columns of one bar
    heights = shares(run, every, bins)
    top = float(heights.max())
    full = len(using.levels) - 1
    # From 0 to all levels of all rows; a height that rounds to 0 is left blank.
    filled = np.rint(heights / top * full * _ROWS).astype(int) if top else 0 * heights
    drawing = []
    for row in range(_ROWS - 1, -1, -1):
        cells = np.clip(filled - row * full, 0, full).astype(int)
        bars = "".join(using.levels[cell] * bar_width for cell in cells).rstrip()
        label = f"{top:.1%}" if row == _ROWS - 1 else ""
        drawing.append(f"{label:>6} {using.side}{bars}".rstrip())

    axis = [using.base] * (bins * bar_width)
    # A bar holds the updates after its left edge up to its right one.
    mark = math.ceil((1 - run.mean_age / steps) * len(axis)) - 1
    axis[max(mark, 0)] = using.mark
    drawing.append(f"{'0%':>6} {using.corner}{''.join(axis)}")
    middle = f"{steps // 2:,}" if steps % 2 == 0 and steps > 2 else ""
    numbers = f"{'0':<{len(axis)}}"
    half = len(axis) // 2 - len(middle) // 2
    numbers = numbers[:half] + middle + numbers[half + len(middle) :]
    end = f"{steps:,}"
    drawing.append(f"{'':>8}{numbers[: len(axis) - len(end)]}{end}")
    return drawing
