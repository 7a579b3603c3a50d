"""Pictures of a choice: the scores of every value that was tried, with their noise."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from ema_optax._messages.text import brief
from ema_optax._plots import style
from ema_optax.reconstruction import Choice, Point

_LABELS = {
    "width": "Width of the average (σ_rel: share of the run, log scale)",
    "last": "Mean of the last n checkpoints (log scale)",
    "schedule": "Schedule of the merge",
    "alpha": "α of the extrapolation: −1 is the older half's mean, 0 the newer half's",
}
_TICKS = {"width": (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), "last": (1.0, 2.0, 3.0, 5.0, 7.0)}
_TRIED = {"color": style.BLUE, "marker": "o", "linestyle": "none", "capsize": 3}
_FAILED = {"color": style.ORANGE, "marker": "x", "linestyle": "none", "markersize": 8}
_OTHERS = ((0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1, 1.5)))


def choice(found: Choice, *, over: str | None = None, ax: Axes | None = None) -> Axes:
    """Draws the scores of a choice over the values that were tried.

    A bar is a score ± its standard error. Where the evaluation gave a number for each
    batch, the error is that of the difference from the best, on the same batches.
    Points whose difference from the best may be noise are filled, other points are
    hollow, and failures are crosses at the bottom. Where several things were searched,
    a line stands at the best of each of the others.

    Args:
        found: The result of `reconstruction.choose`.
        over: The thing whose values are drawn, such as `"width"`. None is the one with
            the best score.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes.

    Raises:
        TypeError: If `found` is no choice.
        ValueError: If `over` was not searched.

    >>> from ema_optax import reconstruction
    >>> snapshots = [
    ...     reconstruction.Snapshot(step, exponent, {"w": np.float32([step])})
    ...     for step in range(10, 1001, 10) for exponent in (16.97, 6.94)
    ... ]
    >>> found = reconstruction.choose(snapshots, lambda params: float(params["w"][0]))
    >>> choice(found).get_title(loc="left")
    'What the evaluation chose'
    """
    if not isinstance(found, Choice):
        raise TypeError(
            f"choice draws what reconstruction.choose returned, got {brief(found)}."
        )
    over = found.best.over if over is None else over
    points = [point for point in found.points if point.over == over]
    if not points:
        tried = list(dict.fromkeys(point.over for point in found.points))
        raise ValueError(f"over={over!r} was not searched; {tried} were.")
    names = [point.value for point in points if isinstance(point.value, str)]
    ax = style.axes(ax)
    scored = [point for point in points if point.failure is None]
    ties = [point for point in scored if point is found.best or point in found.ties]
    worse = [point for point in scored if point not in ties]
    _draw(ax, found, worse, names, "told from the best", markerfacecolor="none")
    _draw(ax, found, ties, names, "not told from the best")
    best = min(scored, key=_rank(found), default=None)
    if best is not None:
        _mark(ax, best, names, is_best=best is found.best)
    failed = [_at(point, names) for point in points if point.failure is not None]
    if failed:
        ax.plot(
            failed,
            np.full(len(failed), 0.03),
            transform=ax.get_xaxis_transform(),  # y is a share of the height
            label="failed",
            **_FAILED,
        )
    for number, point in enumerate(_best_of_others(found, over)):
        value = point.value if isinstance(point.value, str) else f"{point.value:.3g}"
        ax.axhline(
            point.score,
            label=f"best {point.over}: {value}",
            color=style.ORANGE,
            linewidth=1.1,
            linestyle=_OTHERS[number % len(_OTHERS)],
        )
    style.dress(
        ax,
        title="What the evaluation chose",
        xlabel=_LABELS.get(over, over),
        ylabel=f"Score ({'greater' if found.maximize else 'less'} is better)",
    )
    _dress_values(ax, over, names)
    ax.margins(y=0.15)  # room for the label of the best
    ax.legend(loc="best", edgecolor="none", fontsize="small", handlelength=3)
    return ax


def _draw(
    ax: Axes,
    found: Choice,
    points: Sequence[Point],
    names: Sequence[str],
    label: str,
    **look: str,
) -> None:
    if not points:
        return
    errors = [
        found.against_best(point)[1] if point.samples else point.error or 0.0
        for point in points
    ]
    ax.errorbar(
        [_at(point, names) for point in points],
        [point.score for point in points],
        errors if any(errors) else None,
        label=label,
        **{**_TRIED, **look},
    )


def _mark(ax: Axes, best: Point, names: Sequence[str], *, is_best: bool) -> None:
    value = best.value if isinstance(best.value, str) else f"{best.value:.3g}"
    label = f"{'best' if is_best else 'best of these'}: {best.over} {value}"
    style.star(ax, _at(best, names), best.score, label=label)
    ax.annotate(
        f"{best.score:.4g}",
        xy=(_at(best, names), best.score),
        xytext=(9, 9),
        textcoords="offset points",
        fontweight="bold",
    )


def _at(point: Point, names: Sequence[str]) -> float:
    """Places a point on the x axis: names side by side, in the order of the search."""
    if isinstance(point.value, str):
        return float(names.index(point.value))
    return float(point.value)


def _rank(found: Choice) -> Callable[[Point], tuple[bool, float]]:
    """Returns the key that sorts the best point first."""
    sign = -1 if found.maximize else 1
    return lambda point: (point is not found.best, sign * point.score)


def _best_of_others(found: Choice, over: str) -> list[Point]:
    """Returns the best point of each thing searched, except `over`."""
    others: dict[str, list[Point]] = {}
    for point in found.points:
        if point.over != over and point.failure is None:
            others.setdefault(point.over, []).append(point)
    return [min(points, key=_rank(found)) for points in others.values()]


def _dress_values(ax: Axes, over: str, names: Sequence[str]) -> None:
    if names:
        ax.set_xticks(range(len(names)), names, rotation=25, ha="right")
        ax.margins(x=0.08)
    elif over in _TICKS:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=_TICKS[over]))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
