"""Colours, dashes and axes that all pictures share."""

from collections.abc import Mapping
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ema_optax._decays.decays import DecayLike, as_decay
from ema_optax._messages.text import brief

Named: TypeAlias = Mapping[str, DecayLike]

# Colours of Okabe and Ito, which colour-blind readers can tell apart. The colours
# differ in lightness too, and the lines in dashes and width: a grey print can still be
# read.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
RAW = {"color": ORANGE, "linestyle": (0, (4, 1.5)), "linewidth": 1.1}
SHADOW = {"color": BLUE, "linestyle": "-", "linewidth": 2.2}
CURVES = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": ORANGE, "linestyle": (0, (5, 1.5)), "marker": "s"},
    {"color": GREEN, "linestyle": (0, (1.2, 1.2)), "marker": "^"},
    {"color": BLACK, "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#E69F00", "linestyle": (0, (10, 3)), "marker": "P"},
)
FEW = 12  # points: so few get markers, because a single point draws no line


def named(caller: str, decays: DecayLike | Named) -> Named:
    """Returns decays by their labels.

    Raises:
        ValueError: If there is no decay, or more than curves can be told apart.
    """
    labelled = (
        decays
        if isinstance(decays, Mapping)
        else {f"{as_decay(decays, caller)}": decays}
    )
    if not 1 <= len(labelled) <= len(CURVES):
        raise ValueError(
            f"{caller} draws one to {len(CURVES)} decays, which dashes and colours "
            f"still tell apart, got {len(labelled)}. Draw them on several axes."
        )
    return labelled


def axes(ax: object) -> Axes:
    """Returns the axes of the caller, or for None the axes of a new figure.

    Raises:
        TypeError: If `ax` is neither None nor axes of Matplotlib.
    """
    if isinstance(ax, Axes):
        return ax
    if ax is not None:
        raise TypeError(f"ax is an Axes of Matplotlib, or None; got {brief(ax)}.")
    # Without pyplot, which would keep the figure in memory until it is closed.
    return Figure(figsize=(8, 4.5), dpi=150, layout="constrained").add_subplot()


def dress(
    ax: Axes, *, title: str, xlabel: str, ylabel: str, steps: int | None = None
) -> None:
    """Gives axes their title and labels, and takes the frame away.

    With `steps` the x axis goes from 0 to the last update of the run.
    """
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if steps is not None:
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.set_xlim(0, steps)


def star(ax: Axes, x: float, y: float, *, label: str) -> None:
    """Marks the best point with a star."""
    ax.plot(
        x,
        y,
        label=label,
        color=GREEN,
        linestyle="none",
        marker="*",
        markersize=15,
        markeredgecolor=BLACK,
        zorder=4,
    )
