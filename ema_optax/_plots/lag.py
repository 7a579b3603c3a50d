"""Pictures of how far shadows trail behind the values that they average."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ema_optax._decays.decays import DecayLike, as_decay
from ema_optax._decays.profiles import profile
from ema_optax._messages import arguments
from ema_optax._plots import style

_LINE = 0.05  # of the height of the axes: a line of text


def lag(
    values: Sequence[float] | np.ndarray,
    decays: DecayLike | Mapping[str, DecayLike],
    *,
    start: float | None = None,
    every: int = 1,
    at: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws values and the shadows that follow them, with the lag of each.

    The lag is the mean age of the averaged values at the end of the run: β/(1−β)
    updates for a constant decay. The arrow of a lag ends on the shadow. On a straight
    slope the arrow begins on the values, because the shadow is where the values were
    that long ago. After a jump its length is about the time that the shadow takes for
    two thirds of the way.

    Args:
        values: Values of a param, or of anything else, after updates 1, 2, …; at least
            one, and all finite.
        decays: A decay, or one to six by their labels; a float β means `warmup(β)`.
        start: Value that the shadows start from. None is the first of `values`.
        every: Updates between folds, ≥ 1, as in `ema_params`.
        at: The update at which the arrows end, such as one soon after a jump. None is
            the last.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with the line `raw` first, and then a line for each decay.

    Raises:
        ValueError: If there are no values or some are not finite, no decay or more than
            six, or `every` or `at` is no update of the run.

    >>> import ema_optax
    >>> ax = lag(range(1000), {"half-life 50": ema_optax.half_life(50)})
    >>> [line.get_label() for line in ax.get_lines()]
    ['raw', 'half-life 50: lag 71.6']
    """
    raw = np.asarray(values, np.float64)
    named = style.named("lag", decays)
    at = raw.size if at is None else arguments.whole(at, "at", 1, "None is the last.")
    if start is not None:
        arguments.one_number(start, "start")
    _check(raw, at)
    ax = style.axes(ax)
    updates = np.arange(1, raw.size + 1)
    marker = "." if raw.size <= style.FEW else None
    ax.plot(updates, raw, label="raw", marker=marker, color="0.45", linewidth=1.1)
    ends = []
    for (name, decay), look in zip(named.items(), style.CURVES, strict=False):
        mean_age = profile(decay, raw.size, every).mean_age
        text = f"{mean_age:,.1f}" if mean_age < 100 else f"{mean_age:,.0f}"
        shadow = _shadow(raw, decay, raw[0] if start is None else start, every)
        color = look["color"]
        look = {**look, "marker": marker, "linewidth": 2.2}
        label = f"{name}: lag {text}"
        ax.plot(updates, shadow, label=label, **look)
        ends.append((float(shadow[at - 1]), mean_age, text, color))
    style.dress(
        ax,
        title="The shadow trails behind what it averages",
        xlabel="Optimizer updates (arrows: the lag, β/(1−β) at a constant β)",
        ylabel="Value",
        steps=raw.size,
    )
    ax.margins(y=0.08)
    _draw_lags(ax, at, ends)
    ax.legend(loc="best", edgecolor="none", handlelength=4, fontsize="small")
    return ax


def _draw_lags(ax: Axes, at: int, ends: list[tuple[float, float, str, str]]) -> None:
    """Draws an arrow to the end of each shadow, with its length beside it."""
    low, high = ax.get_ylim()
    free = -np.inf  # above this height, nothing is written yet
    for height, length, text, color in sorted(ends):
        look = {"arrowstyle": "<->", "color": color, "linewidth": 1.2}
        ax.annotate(
            "",
            xy=(at, height),
            xytext=(at - length, height),
            arrowprops={**look, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )
        ax.annotate(
            text,
            xy=(at, max(height, free)),
            xytext=(7, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )
        free = max(height, free) + _LINE * (high - low)


def _check(raw: np.ndarray, at: int) -> None:
    if raw.ndim != 1 or raw.size == 0 or not np.all(np.isfinite(raw)):
        bad = int(np.sum(~np.isfinite(raw)))
        raise ValueError(
            "lag needs one finite value for each update, at least one, got an array of "
            f"shape {raw.shape} with {bad} that are not finite. Follow one number, "
            "such as an element of a weight, or its norm."
        )
    if not 1 <= at <= raw.size:
        raise ValueError(
            f"The arrows end at one of the updates 1 to {raw.size}, got at={at}. Leave "
            "it out for the last one."
        )


def _shadow(raw: np.ndarray, decay: DecayLike, start: float, every: int) -> np.ndarray:
    """Returns the shadow after each update, in float64."""
    folds = np.arange(every, raw.size + 1, every)
    weights = as_decay(decay, "lag").newest_weight(folds, every)
    shadow, after = float(start), np.empty(raw.size)
    after[: every - 1] = shadow
    for step, weight in zip(folds, weights, strict=True):
        shadow += weight * (raw[step - 1] - shadow)
        after[step - 1 : step - 1 + every] = shadow
    return after
