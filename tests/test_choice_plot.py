"""The picture of a choice: what its axes hold."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ema_optax import plots, reconstruction
from ema_optax.reconstruction import Choice, Point


def point(over: str, value: Any, score: float, **more: Any) -> Point:
    return Point(over, value, np.array([0.5, 0.5]), (1, 2), None, score, **more)


def choice(points: list[Point], best: int, ties: tuple[int, ...] = ()) -> Choice:
    return Choice(
        points=tuple(points),
        best=points[best],
        ties=tuple(points[i] for i in ties),
        tree=None,
        step=2,
        evaluations=len(points),
        maximize=False,
        origin={},
    )


WIDTHS = choice(
    [
        point("width", 0.02, 3.0, error=0.1),
        point("width", 0.05, 1.0, error=0.2),
        point("width", 0.08, 1.1, error=0.3),
        point("width", 0.2, math.nan, failure="it returned nan"),
        point("last", 3, 0.9 + 1),
    ],
    best=1,
    ties=(2,),
)
SEVERAL = choice(
    [
        *(point("schedule", n, s) for n, s in (("uniform", 2.0), ("1-sqrt@4", 1.5))),
        *(point("alpha", a, s) for a, s in ((-1.0, 5.0), (0.0, 1.0), (1.0, 3.0))),
    ],
    best=3,
)


def legend_of(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_what_is_drawn():
    """Points with bars, ties filled, the best starred, failures at the bottom."""
    ax = plots.choice(WIDTHS)
    far, near = (container.lines for container in ax.containers)
    np.testing.assert_array_equal(far[0].get_xydata(), [[0.02, 3.0]])
    np.testing.assert_array_equal(near[0].get_xydata(), [[0.05, 1.0], [0.08, 1.1]])
    assert far[0].get_markerfacecolor() == "none" != near[0].get_markerfacecolor()
    ends = [segment[:, 1].tolist() for segment in near[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[0.8, 1.2], [0.8, 1.4]])
    lines = {line.get_label(): line for line in ax.get_lines()}
    star = lines["best: width 0.05"]
    assert (star.get_marker(), star.get_xydata().tolist()) == ("*", [[0.05, 1.0]])
    failed = lines["failed"]
    assert failed.get_xdata().tolist() == [0.2]
    assert failed.get_transform() == ax.get_xaxis_transform()
    assert lines["best last: 3"].get_ydata() == [1.9, 1.9]
    assert [text.get_text() for text in ax.texts] == ["1"]
    assert legend_of(ax)[-2:] == ["told from the best", "not told from the best"]
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "Score (less is better)"
    assert "σ_rel" in ax.get_xlabel()


def test_names_stand_side_by_side():
    """In the order in which they were given, under their names."""
    ax = plots.choice(SEVERAL, over="schedule")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["uniform", "1-sqrt@4"]
    labels = [line.get_label() for line in ax.get_lines()]
    assert "best of these: schedule 1-sqrt@4" in labels
    assert "best alpha: 0" in labels
    assert plots.choice(SEVERAL).get_xscale() == "linear"


@pytest.mark.parametrize(
    "found",
    [WIDTHS, SEVERAL],
    ids=["widths", "several axes"],
)
def test_it_draws_without_a_warning(found: Choice):
    """On axes of the caller's, too."""
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.choice(found, ax=ax) is ax
    assert figure.axes == [ax]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"what reconstruction\.choose returned"):
        plots.choice(WIDTHS.points)
    with pytest.raises(ValueError, match=r"over='alpha' was not searched; \['width', "):
        plots.choice(WIDTHS, over="alpha")
    assert reconstruction.Choice is Choice


def test_bars_of_batches_are_of_the_difference_from_the_best():
    """What makes a batch hard moves every average alike: that is no noise."""
    hard = np.array([1.0, 5.0, 9.0])
    points = [
        point(
            "last", 1, 5.1, error=2.3, samples=tuple(hard + np.array([0.1, 0.2, 0.0]))
        ),
        point("last", 2, 5.0, error=2.3, samples=tuple(hard)),
    ]
    found = choice(points, best=1)
    apart, noise = found.against_best(points[0])
    assert apart == pytest.approx(0.1)
    assert noise == pytest.approx(np.std([0.1, 0.2, 0.0], ddof=1) / np.sqrt(3))
    ax = plots.choice(found)
    ((low, high),) = (
        segment[:, 1]
        for bars in ax.containers[0].lines[2]
        for segment in bars.get_segments()
    )
    np.testing.assert_allclose([low, high], [5.1 - noise, 5.1 + noise])
    with pytest.raises(ValueError, match="has no score: it returned nan"):
        WIDTHS.against_best(WIDTHS.points[3])


def test_a_best_at_an_end_is_told():
    """In the table: a wider one might be better. Names have no end."""
    points = [point("width", w, s) for w, s in ((0.02, 3.0), (0.1, 2.0), (0.2, 1.0))]
    told = "end of what was searched, 0.02 to 0.2: the top may lie beyond."
    assert told in str(choice(points, best=2))
    assert "end of" not in str(choice(points, best=1))
    named = [point("schedule", n, s) for n, s in (("uniform", 2.0), ("linear", 1.5))]
    assert "end of" not in str(choice(named, best=1))
