"""Pictures of the weight that decays give to every part of a run."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ema_optax._decays.decays import DecayLike
from ema_optax._decays.profiles import Profile, profile
from ema_optax._messages.text import percent
from ema_optax._plots import style

_FINE = 1000  # parts of a run: a picture resolves no more
_TOO_TALL = 20  # times a typical peak: it would flatten all the others


def profiles(
    decays: DecayLike | Mapping[str, DecayLike],
    steps: int,
    *,
    every: int = 1,
    ax: Axes | None = None,
) -> Axes:
    """Draws the weight that decays give to every part of a run.

    The area under a curve is the weight of the updates below it, with the whole run one
    unit wide: the plain mean is 1 everywhere. The weight of a fold is spread over the
    updates since the fold before. A marker stands at the mean age. The legend gives the
    weight that is still on the initial params, which no curve shows. A peak so high
    that it would flatten the other curves is cut off, and the legend gives its height.

    Args:
        decays: A decay, or one to six by their labels; a float β means `warmup(β)`.
        steps: Length of the run in updates, ≥ 1.
        every: Updates between folds, ≥ 1, as in `ema_params`.
        ax: Where to draw. None makes a figure of its own, without pyplot: save it with
            `ax.figure.savefig(path)`.

    Returns:
        The axes, with one line for each decay.

    Raises:
        ValueError: If there is no decay or more than six, or `steps` or `every` is
            below 1.

    >>> import ema_optax
    >>> decays = {"short": ema_optax.half_life(500), "long": ema_optax.power(0.1)}
    >>> ax = profiles(decays, steps=10_000)
    >>> [line.get_label() for line in ax.get_lines()]
    ['short: mean age 721 (7.2%)', 'long: mean age 1,118 (11.2%)']
    """
    named = style.named("profiles", decays)
    ax = style.axes(ax)
    runs = {name: profile(decay, steps, every) for name, decay in named.items()}
    curves = {name: _density(run, every) for name, run in runs.items()}
    top = _top([float(density.max()) for _, density in curves.values()])
    for (name, run), look in zip(runs.items(), style.CURVES, strict=False):
        edges, density = curves[name]
        label = f"{name}: {_described(run)}"
        if density.max() > top:
            # The height of one fold: a point of the curve is the mean of several.
            label += f", cut off: reaches {run.weights.max() / every * steps:,.0f}"
        look = {**look, "drawstyle": "steps-pre", "linewidth": 1.8, "markersize": 7}
        (line,) = ax.plot(edges, density, label=label, markevery=[], **look)
        at = steps - run.mean_age
        height = min(density[np.searchsorted(edges, at)], top)
        ax.scatter(
            at,
            height,
            s=49,
            color=line.get_color(),
            marker=look["marker"],
            zorder=3,
            clip_on=False,
        )
    style.dress(
        ax,
        title="What the shadow averages over",
        xlabel="Optimizer updates (markers: mean age)",
        ylabel="Weight density (plain mean = 1)",
        steps=steps,
    )
    ax.set_ylim(0, 1.08 * top)
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


def _described(run: Profile) -> str:
    age = f"mean age {run.mean_age:,.0f} ({run.mean_age / len(run.weights):.1%})"
    initial = percent(run.initial_weight)
    return f"{age}, {initial} on the initial params" if initial else age


def _density(run: Profile, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes edges, and at each the density of the weight since the edge before."""
    steps = len(run.weights)
    folds = np.arange(every, steps + 1, every)
    until = np.append(0.0, np.cumsum(run.weights[folds - 1]))
    # A part has whole folds, counted from the end, where most of the weight is.
    picked = np.arange(len(folds), 0, -(len(folds) // _FINE + 1))[::-1]
    picked = np.append(0, picked)
    edges, until = np.append(0, folds)[picked], until[picked]
    if edges[-1] < steps:  # the last updates are in no fold
        edges, until = np.append(edges, steps), np.append(until, until[-1])
    density = np.diff(until) / np.diff(edges) * steps
    return edges.astype(float), np.append(density[0], density)
