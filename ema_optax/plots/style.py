"""Colours, dashes and axes that all pictures share."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def own_axes() -> Axes:
    """Returns axes in a figure of their own, without pyplot."""
    return Figure(figsize=(8, 4.5), dpi=150, layout="constrained").add_subplot()


def dress(ax: Axes, *, title: str, xlabel: str, ylabel: str) -> None:
    """Gives axes their title and labels, and takes the frame away."""
    ax.set_title(title, loc="left", fontweight="bold")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
