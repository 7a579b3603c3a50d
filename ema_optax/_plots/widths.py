"""Pictures of averages of many widths from one run: how good they are, how exact."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from ema_optax._messages import arguments
from ema_optax._messages.text import brief
from ema_optax._plots import style
from ema_optax._reconstruction.projection import DOUBTFUL, WRONG

Accuracy: TypeAlias = float | Sequence[float] | np.ndarray  # one run, or several

_CURVE = {**style.SHADOW, "marker": "o", "markersize": 4}
_TRAINED = {"color": style.BLACK, "linestyle": "none", "marker": "s", "markersize": 8}
_TRAINED |= {"markerfacecolor": "none", "markeredgewidth": 1.4}  # hollow
_TRAINED |= {"elinewidth": 1.2, "capsize": 4}
_GAIN = {"color": style.ORANGE, "linestyle": (0, (4, 1.5)), "linewidth": 1.4}
_MANY = 30  # points, whose markers would run into each other
_TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # in each power of ten
_LEVELS = {"warned of": DOUBTFUL, "refused": WRONG}
_XLABEL = "Width of the average (σ_rel: share of the run, log scale)"
_EXACT = 1e-5  # an error that float16 hides


def accuracy_over_width(
    widths: Sequence[float] | np.ndarray,
    accuracies: Sequence[Accuracy] | np.ndarray,
    *,
    trained: Mapping[float, Accuracy] | None = None,
    raw: Accuracy | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the accuracy of reconstructed averages over their widths.

    A star marks the best width. In place of an accuracy, a sequence may give those of
    several runs with other seeds: then the picture shows their mean and their range.

    Args:
        widths: σ_rel of the reconstructed averages, > 0; at least one.
        accuracies: Accuracy of each average, in [0, 1].
        trained: Accuracies of averages that were tracked in a run, by their widths: the
            curve should run through these points.
        raw: Accuracy of the live params.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with the line `reconstructed` first and the best width last.

    Raises:
        ValueError: If there are no widths, a width is not positive, or a width has no
            accuracy.

    >>> ax = accuracy_over_width([0.02, 0.05, 0.1], [0.91, 0.94, 0.92], raw=0.88)
    >>> [line.get_label() for line in ax.get_lines()]
    ['reconstructed', 'raw params: 88.0%', 'best: width 0.05']
    """
    means, lows, highs = _of_runs("accuracy_over_width", widths, accuracies)
    at = arguments.numbers(widths, "widths")
    order = np.argsort(at)
    best = int(np.argmax(means))
    ax = style.axes(ax)
    look = _CURVE if at.size <= _MANY else style.SHADOW
    ax.plot(at[order], means[order], label="reconstructed", **look)
    if np.any(highs > lows):
        label = "range over the runs"
        shade = {"color": style.BLUE, "alpha": 0.13, "linewidth": 0, "label": label}
        ax.fill_between(at[order], lows[order], highs[order], **shade)
    if trained is not None and not isinstance(trained, Mapping):
        raise TypeError(f"trained maps widths to accuracies, got {brief(trained)}.")
    if trained:
        tracked, values = list(trained), list(trained.values())
        mean, low, high = _of_runs("accuracy_over_width", tracked, values)
        spread = [mean - low, high - mean] if np.any(high > low) else None
        ax.errorbar(tracked, mean, spread, label="tracked in a run", **_TRAINED)
    if raw is not None:
        (level,), (low,), (high,) = _of_runs("accuracy_over_width", [1.0], [raw])
        ax.axhline(level, label=f"raw params: {level:.1%}", **style.RAW)
        if high > low:
            ax.axhspan(low, high, color=style.ORANGE, alpha=0.1, linewidth=0)
    _mark_best(ax, float(at[best]), float(means[best]))
    style.dress(
        ax,
        title="Test accuracy over the width of the average",
        xlabel=_XLABEL,
        ylabel="Test accuracy",
    )
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    _width_axis(ax)
    ax.margins(y=0.12)  # room for the label above the best
    ax.legend(loc="best", edgecolor="none", fontsize="small", handlelength=3)
    return ax


def error_over_width(
    widths: Sequence[float] | np.ndarray,
    errors: Sequence[float] | np.ndarray,
    *,
    noise_gains: Sequence[float] | np.ndarray | None = None,
    tracked: Sequence[float] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draws how exactly snapshots give the averages of many widths.

    One line stands at the profile error from which `reconstruct` warns, and one at the
    error from which `reconstruct` refuses. Errors below 1e-5 are not in the picture.

    Args:
        widths: σ_rel of the averages, > 0; at least one.
        errors: Profile error of each average, as in `Plan` and `Reconstruction`.
        noise_gains: Noise gain of each average, ≥ 0, on its own axis at the right.
        tracked: Widths of the averages that were tracked for the snapshots.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with the line `profile error` first.

    Raises:
        ValueError: If there are no widths, a width is not positive, or a width has no
            error or no noise gain.

    >>> from ema_optax import reconstruction
    >>> found = reconstruction.plan(100_000, snapshots=64)
    >>> ax = error_over_width(
    ...     found.widths, found.profile_errors, tracked=found.tracked
    ... )
    >>> ax.get_lines()[0].get_label()
    'profile error'
    """
    values, _, _ = _of_runs("error_over_width", widths, errors)
    at = np.asarray(widths, np.float64)
    order = np.argsort(at)
    ax = style.axes(ax)
    ax.set_yscale("log")
    look = _CURVE if at.size <= _MANY else style.SHADOW
    lines = ax.plot(at[order], values[order], label="profile error", **look)
    tracked_widths = arguments.numbers(tracked, "tracked")
    if tracked_widths.size:
        lines += ax.plot(
            tracked_widths,
            np.zeros(tracked_widths.size),
            transform=ax.get_xaxis_transform(),  # y is a share of the height
            label="tracked widths",
            color=style.BLACK,
            linestyle="none",
            marker="^",
            markersize=9,
            clip_on=False,
        )
    style.dress(
        ax,
        title="What the snapshots give",
        xlabel=_XLABEL,
        ylabel="Profile error",
    )
    low, high = float(values.min()), float(values.max())
    ax.set_ylim(max(low / 2, _EXACT), max(high * 2, 2 * DOUBTFUL))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    ax.yaxis.set_minor_locator(NullLocator())
    _width_axis(ax)
    for name, level in _LEVELS.items():
        if level < ax.get_ylim()[1]:
            ax.axhline(level, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
            ax.text(
                0.5,  # where the errors are smallest
                level,
                f"{level:.0%}: {name}",
                transform=ax.get_yaxis_transform(),
                color="0.35",
                fontsize="small",
                ha="center",
                va="bottom",
            )
    if noise_gains is not None:
        gains, _, _ = _of_runs("error_over_width", widths, noise_gains)
        right = ax.twinx()
        right.set_yscale("log")
        label = "noise gain (right)"
        lines += right.plot(at[order], gains[order], label=label, **_GAIN)
        right.set_ylabel("Noise gain", color=style.ORANGE)
        right.tick_params(axis="y", which="both", colors=style.ORANGE)
        right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        right.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        right.yaxis.set_minor_locator(NullLocator())
        right.spines[["top", "left"]].set_visible(False)
        right.spines["right"].set(visible=True, color=style.ORANGE)
    ax.legend(
        handles=lines, loc="best", edgecolor="none", fontsize="small", handlelength=3
    )
    return ax


def _of_runs(
    caller: str,
    widths: Sequence[float] | np.ndarray,
    values: Sequence[Accuracy] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checks the arguments, and computes mean, least and greatest value per width."""
    at = np.asarray(widths, np.float64)
    if at.ndim != 1 or at.size == 0 or len(values) != at.size:
        raise ValueError(
            f"{caller} needs one value for each width, or one sequence of those of "
            f"several runs, got {at.size} widths and {len(values)} values. Measure at "
            "every width, at least once."
        )
    if not np.all((at > 0) & np.isfinite(at)):
        raise ValueError(
            f"Widths are above 0, a log scale has no room for others; got {widths}."
        )
    runs = [np.atleast_1d(np.asarray(value, np.float64)) for value in values]
    if any(run.ndim != 1 or run.size == 0 for run in runs):
        raise ValueError(
            f"{caller} needs a number for each width, or a sequence of at least one: "
            f"got shapes {[run.shape for run in runs]}. Several runs are the columns: "
            "[widths, runs]."
        )
    mean, low, high = ([f(run) for run in runs] for f in (np.mean, np.min, np.max))
    return np.array(mean), np.array(low), np.array(high)


def _mark_best(ax: Axes, width: float, accuracy: float) -> None:
    style.star(ax, width, accuracy, label=f"best: width {width:.2g}")
    ax.annotate(
        f"{accuracy:.1%}",
        xy=(width, accuracy),
        xytext=(0, 11),
        textcoords="offset points",
        ha="center",
        fontweight="bold",
    )


def _width_axis(ax: Axes) -> None:
    """Makes the x axis logarithmic, with ticks as plain numbers such as 0.05."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=_TICKS))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
