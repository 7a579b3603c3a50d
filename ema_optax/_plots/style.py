"""Colours, dashes and axes that all pictures share."""

from collections.abc import Mapping
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ema_optax._decays.decays import DecayLike, as_decay
from ema_optax._messages.text import brief

Named: TypeAlias = Mapping[str, DecayLike]

# From the palette of Okabe and Ito, which colour-blind readers can tell apart. They
# differ in lightness too, and the lines in dashes and width: a grey print still reads.
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
FEW = 12  # points; so few are marked, because one alone draws no line


def named(caller: str, decays: DecayLike | Named) -> Named:
    """Returns decays by their labels.

    Raises:
        ValueError: If there is none, or more than curves can be told apart.
    """
    found = (
        decays
        if isinstance(decays, Mapping)
        else {f"{as_decay(decays, caller)}": decays}
    )
    if not 1 <= len(found) <= len(CURVES):
        raise ValueError(
            f"{caller} draws one to {len(CURVES)} decays, which dashes and colours "
            f"still tell apart, got {len(found)}. Draw them on several axes."
        )
    return found


def axes(given: object) -> Axes:
    """Returns the axes that were given, or some in a figure of their own.

    Raises:
        TypeError: If what was given are no axes of Matplotlib.
    """
    if isinstance(given, Axes):
        return given
    if given is not None:
        raise TypeError(f"ax is an Axes of Matplotlib, or None; got {brief(given)}.")
    # Without pyplot, which would keep it.
    return Figure(figsize=(8, 4.5), dpi=150, layout="constrained").add_subplot()


def dress(
    ax: Axes, *, title: str, xlabel: str, ylabel: str, steps: int | None = None
) -> None:
    """Gives axes their title and labels, and takes the frame away.

    With `steps` the x axis is of the updates of a run so long.
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
    """Marks the best of what is drawn."""
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
