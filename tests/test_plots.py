"""Pictures: what the axes hold."""

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.figure import Figure

from ema_optax import plots

STEPS, RAW, SHADOW = [10, 20, 30], [0.90, 0.95, 0.93], [0.91, 0.94, 0.97]


def test_accuracy_over_steps_draws_both_curves():
    """Two labelled lines hold the data that was given."""
    ax = plots.accuracy_over_steps(STEPS, RAW, SHADOW)
    raw, shadow = ax.get_lines()
    assert (raw.get_label(), shadow.get_label()) == ("raw params", "shadow")
    assert np.array_equal(raw.get_xydata(), np.stack([STEPS, RAW], axis=1))
    assert np.array_equal(shadow.get_xydata(), np.stack([STEPS, SHADOW], axis=1))


def test_accuracy_over_steps_says_what_it_shows():
    """Title, axes and legend are there, and the last values stand at the line ends."""
    ax = plots.accuracy_over_steps(STEPS, RAW, SHADOW)
    assert ax.get_title(loc="left")
    assert ax.get_xlabel() == "Optimizer updates"
    assert ax.get_ylabel() == "Test accuracy"
    legend = ax.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["raw params", "shadow"]
    assert [t.get_text() for t in ax.texts] == ["93.0%", "97.0%"]


def test_curves_differ_without_colour():
    """Dashes, width and lightness tell the curves apart in a grey print."""
    raw, shadow = plots.accuracy_over_steps(STEPS, RAW, SHADOW).get_lines()
    assert raw.get_linestyle() != shadow.get_linestyle()
    assert shadow.get_linewidth() > 1.5 * raw.get_linewidth()
    values = [rgb_to_hsv(to_rgb(line.get_color()))[2] for line in (raw, shadow)]
    assert abs(values[0] - values[1]) > 0.1


def test_axes_passed_in_are_drawn_on_and_returned():
    """A caller's own axes come back, with nothing else made in their figure."""
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.accuracy_over_steps(STEPS, RAW, SHADOW, ax=ax) is ax
    assert figure.axes == [ax]


def test_the_climb_at_the_start_is_cut_off():
    """The y axis spans what comes after the first fifth, and all of that."""
    steps = list(range(10, 110, 10))
    raw, shadow = [0.1, 0.92] + 8 * [0.94], [0.1, 0.93] + 8 * [0.97]
    low, high = plots.accuracy_over_steps(steps, raw, shadow).get_ylim()
    assert 0.9 < low < 0.92
    assert 0.97 < high < 1


@pytest.mark.parametrize(("raw", "shadow"), [(0.9, 0.95), (0.95, 0.9), (0.9, 0.9)])
def test_end_labels_do_not_overlap(raw: float, shadow: float):
    """Of two labels at like heights, one hangs below its point and one stands above."""
    ax = plots.accuracy_over_steps([1], [raw], [shadow])
    aligned = [text.get_verticalalignment() for text in ax.texts]
    assert sorted(aligned) == ["bottom", "top"]
    assert aligned[0] == ("bottom" if raw > shadow else "top")


def test_one_measurement_is_visible():
    """A single point, which draws no line, is marked."""
    for line in plots.accuracy_over_steps([1], [0.5], [0.5]).get_lines():
        assert line.get_marker() == "o"


@pytest.mark.parametrize(
    ("steps", "raw", "shadow"),
    [([], [], []), ([1, 2], [0.5], [0.5, 0.6]), ([1], [0.5], [0.5, 0.6])],
)
def test_values_that_do_not_fit_the_steps_are_refused(steps, raw, shadow):
    """Nothing to draw, or not one value of each kind a step, is an error."""
    with pytest.raises(ValueError, match="one accuracy of each kind"):
        plots.accuracy_over_steps(steps, raw, shadow)
