"""Pictures of profiles and runs, one function each."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from ema_optax.decays import DecayLike, as_decay
from ema_optax.profiles import Profile, profile

# From the palette of Okabe and Ito, which colour-blind readers can tell apart. They
# differ in lightness too, and the lines in dashes and width: a grey print still reads.
_RAW = {"color": "#D55E00", "linestyle": (0, (4, 1.5)), "linewidth": 1.1}
_SHADOW = {"color": "#0072B2", "linestyle": "-", "linewidth": 2.2}
_CURVES = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": (0, (5, 1.5)), "marker": "s"},
    {"color": "#009E73", "linestyle": (0, (1.2, 1.2)), "marker": "^"},
    {"color": "#000000", "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#E69F00", "linestyle": (0, (10, 3)), "marker": "P"},
)
_FINE = 1000  # parts of a run: more than a picture resolves
_TOO_TALL = 20  # times a typical peak: it would flatten all the others
_FEW = 12  # points; so few are marked, because one alone draws no line
_START = 0.2  # of the run, where accuracies climb far below what is compared


def accuracy_over_steps(
    steps: Sequence[int],
    raw: Sequence[float],
    shadow: Sequence[float],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws the accuracy of the raw params against that of their shadow.

    The y axis leaves out what lies below all values after the first fifth of the run,
    so that the climb does not flatten the rest.

    Args:
        steps: Optimizer updates at which both were measured, ascending; at least one.
        raw: Accuracies of the raw params there, in [0, 1].
        shadow: Accuracies of the shadow there, in [0, 1].
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with the lines `raw params` and `shadow`.

    Raises:
        ValueError: If there are no steps, or not one accuracy of each for every step.

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
    ax = _own_axes() if ax is None else ax
    marker = "o" if len(steps) <= _FEW else None
    ax.plot(steps, raw, label="raw params", marker=marker, **_RAW)
    ax.plot(steps, shadow, label="shadow", marker=marker, **_SHADOW)
    ax.set_title("Test accuracy while training", loc="left", fontweight="bold")
    ax.set_xlabel("Optimizer updates")
    ax.set_ylabel("Test accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlim(left=0)
    ax.set_ylim(*_limits(steps, raw, shadow))
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", frameon=False)
    _label_ends(ax, steps[-1], raw[-1], shadow[-1])
    return ax


def profiles(
    decays: DecayLike | Mapping[str, DecayLike],
    steps: int,
    *,
    every: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws what decays average over: the weight of every part of a run.

    The area under a curve is the weight of those updates, with the whole run one unit
    wide: the plain mean is 1 everywhere. A fold's weight is spread over the updates
    since the fold before it. A marker stands at the mean age. Weight that is still on
    the initial params is outside the curve and told in the legend, as is the height of
    a curve so narrow that all of it would flatten the others.

    Args:
        decays: A decay, or one to six by their labels; a float β means `warmup(β)`.
        steps: Length of the run in updates, ≥ 1.
        every: Updates between folds, ≥ 1, as in `ema_params`.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with one line a decay.

    Raises:
        ValueError: If there is no decay or more than six, or `steps` or `every` is
            below 1.

    >>> import ema_optax
    >>> decays = {"short": ema_optax.half_life(500), "long": ema_optax.power(0.1)}
    >>> ax = profiles(decays, steps=10_000)
    >>> [line.get_label() for line in ax.get_lines()]
    ['short: mean age 721 (7.2%)', 'long: mean age 1,118 (11.2%)']
    """
    named = decays if isinstance(decays, Mapping) else {f"{as_decay(decays)}": decays}
    if not 1 <= len(named) <= len(_CURVES):
        raise ValueError(
            f"profiles draws one to {len(_CURVES)} decays, which dashes and colours "
            f"still tell apart, got {len(named)}. Draw them on several axes."
        )
    ax = _own_axes() if ax is None else ax
    runs = {name: profile(decay, steps, every) for name, decay in named.items()}
    curves = {name: _density(run, every) for name, run in runs.items()}
    top = _top([float(density.max()) for _, density in curves.values()])
    for (name, run), style in zip(runs.items(), _CURVES, strict=False):
        edges, density = curves[name]
        label = f"{name}: {_told(run)}"
        if density.max() > top:
            # Of one fold: the curve holds the mean of several.
            label += f", cut off: reaches {run.weights.max() / every * steps:,.0f}"
        style = {**style, "drawstyle": "steps-pre", "linewidth": 1.8, "markersize": 7}
        (line,) = ax.plot(edges, density, label=label, markevery=[], **style)
        at = steps - run.mean_age
        height = min(density[np.searchsorted(edges, at)], top)
        ax.scatter(
            at,
            height,
            s=49,
            color=line.get_color(),
            marker=style["marker"],
            zorder=3,
            clip_on=False,
        )
    ax.set_title("What the shadow averages over", loc="left", fontweight="bold")
    ax.set_xlabel("Optimizer updates (markers: mean age)")
    ax.set_ylabel("Weight density (plain mean = 1)")
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_xlim(0, steps)
    ax.set_ylim(0, 1.08 * top)
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    # Most averages are of late updates, and leave the left side free.
    early = max(
        density[edges < 0.8 * steps].max() for edges, density in curves.values()
    )
    place = "upper left" if early < 0.5 * top else "best"
    ax.legend(loc=place, edgecolor="none", handlelength=4, fontsize="small")
    return ax


def _top(peaks: Sequence[float]) -> float:
    """Returns the highest peak that leaves the other curves their shape, or 1."""
    typical = sorted(peaks)[(len(peaks) - 1) // 2]
    return max(peak for peak in peaks if peak <= _TOO_TALL * typical) or 1.0


def _told(run: Profile) -> str:
    told = f"mean age {run.mean_age:,.0f} ({run.mean_age / len(run.weights):.1%})"
    initial = f"{run.initial_weight:.1%}"
    return told if initial == "0.0%" else f"{told}, {initial} on the initial params"


def _density(run: Profile, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges, and at each the density of the weight since the edge before."""
    steps = len(run.weights)
    folds = np.arange(every, steps + 1, every)
    until = np.append(0.0, np.cumsum(run.weights[folds - 1]))
    # Whole folds to a part; counted from the end, where most of the weight is.
    picked = np.arange(len(folds), 0, -(len(folds) // _FINE + 1))[::-1]
    picked = np.append(0, picked)
    edges, until = np.append(0, folds)[picked], until[picked]
    if edges[-1] < steps:  # the last updates are in no fold
        edges, until = np.append(edges, steps), np.append(until, until[-1])
    density = np.diff(until) / np.diff(edges) * steps
    return edges.astype(float), np.append(density[0], density)


def _own_axes() -> Axes:
    return Figure(figsize=(8, 4.5), dpi=150, layout="constrained").add_subplot()


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
    for value, other, style in ((raw, shadow, _RAW), (shadow, raw, _SHADOW)):
        above = value > other or (value == other and style is _SHADOW)
        ax.annotate(
            f"{value:.1%}",
            xy=(step, value),
            xytext=(6, 1 if above else -1),
            textcoords="offset points",
            color=style["color"],
            verticalalignment="bottom" if above else "top",
            annotation_clip=False,
        )
