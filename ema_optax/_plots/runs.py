"""Pictures of accuracies while a run trains."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ema_optax._messages import arguments
from ema_optax._plots import style

_START = 0.2  # of the run: the first climb is far below the accuracies to compare


def accuracy_over_steps(
    steps: Sequence[int],
    raw: Sequence[float],
    shadow: Sequence[float],
    *,
    label: str = "shadow",
    ax: Axes | None = None,
) -> Axes:
    """Draws the accuracy of the raw params against that of their shadow.

    The y axis leaves out what lies below all values after the first fifth of the run,
    so that the climb does not flatten the rest.

    Args:
        steps: Optimizer updates at which both were measured, ascending; at least one.
        raw: Accuracies of the raw params at those steps, in [0, 1].
        shadow: Accuracies of the shadow at those steps, in [0, 1].
        label: Name of the shadow in the legend, such as `"EMA, β = 0.99"`.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with the line `raw params` and the line of the shadow.

    Raises:
        ValueError: If there are no steps, or a step lacks one of the two accuracies.

    >>> ax = accuracy_over_steps([10, 20], [0.91, 0.93], [0.90, 0.96])
    >>> [line.get_label() for line in ax.get_lines()]
    ['raw params', 'shadow']
    """
    if len(steps) == 0 or not len(steps) == len(raw) == len(shadow):
        raise ValueError(
            "accuracy_over_steps needs one accuracy of each kind for every step, got "
            f"{len(steps)} steps, {len(raw)} raw and {len(shadow)} shadow accuracies. "
            "Measure both at the same steps, at least once."
        )
    ax = style.axes(ax)
    at = arguments.numbers(steps, "steps")
    marker = "o" if at.size <= style.FEW else None
    for values, name, look in (
        (raw, "raw params", style.RAW),
        (shadow, label, style.SHADOW),
    ):
        y = arguments.numbers(values, f"accuracies of the {name}")
        ax.plot(at, y, label=name, marker=marker, **look)
    style.dress(
        ax,
        title="Test accuracy while training",
        xlabel="Optimizer updates",
        ylabel="Test accuracy",
    )
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlim(left=0)
    ax.set_ylim(*_limits(steps, raw, shadow))
    ax.legend(loc="lower right", frameon=False)
    _label_ends(ax, steps[-1], raw[-1], shadow[-1])
    return ax


def _limits(
    steps: Sequence[int], raw: Sequence[float], shadow: Sequence[float]
) -> tuple[float, float]:
    settled = np.asarray(steps) >= _START * steps[-1]
    values = np.concatenate([np.asarray(raw)[settled], np.asarray(shadow)[settled]])
    lowest, highest = float(values.min()), float(values.max())
    margin = max(0.1 * (highest - lowest), 0.005)  # a flat line needs some room too
    return lowest - margin, min(highest + margin, 1.005)


def _label_ends(ax: Axes, step: int, raw: float, shadow: float) -> None:
    """Writes the last values beside the line ends, the higher one above."""
    for value, other, look in ((raw, shadow, style.RAW), (shadow, raw, style.SHADOW)):
        above = value > other or (value == other and look is style.SHADOW)
        ax.annotate(
            f"{value:.1%}",
            xy=(step, value),
            xytext=(6, 1 if above else -1),
            textcoords="offset points",
            color=look["color"],
            verticalalignment="bottom" if above else "top",
            annotation_clip=False,
        )
