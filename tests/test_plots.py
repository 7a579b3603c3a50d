"""Pictures: what the axes hold."""

import warnings
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import rgb_to_hsv, to_rgb
from matplotlib.figure import Figure

import ema_optax
from ema_optax import plots, reconstruction
from ema_optax._plots import style

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
    ema = plots.accuracy_over_steps(STEPS, RAW, SHADOW, label="EMA, β = 0.99")
    assert [line.get_label() for line in ema.get_lines()][1] == "EMA, β = 0.99"
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


SIX = {f"half-life {n}": ema_optax.half_life(n) for n in (5, 10, 20, 30, 40, 50)}


def areas(line) -> np.ndarray:
    """Returns the area under each step of a curve."""
    x, y = line.get_xdata(), line.get_ydata()
    assert line.get_drawstyle() == "steps-pre"  # y[i] holds from x[i − 1] to x[i]
    return np.diff(x) * y[1:]


@pytest.mark.parametrize("every", [1, 7])
def test_profiles_draws_the_weights_as_areas(every: int):
    """In a run one unit wide the area since the last fold is the weight of a fold."""
    decay = ema_optax.power(0.1)
    (line,) = plots.profiles({"a": decay}, 100, every=every).get_lines()
    run = ema_optax.profile(decay, 100, every)
    folds = np.arange(every, 101, every)
    # 100 updates are 14 folds of 7 and two updates without any weight.
    weights = np.append(run.weights[folds - 1], [0.0] if every == 7 else [])
    edges = np.append(folds, [100] if every == 7 else [])
    np.testing.assert_array_equal(line.get_xdata(), np.append(0, edges))
    np.testing.assert_allclose(areas(line) / 100, weights, rtol=1e-9, atol=1e-15)


def test_profiles_of_a_long_run_stay_small():
    """At most a thousand parts, each with the whole weight of the folds in it."""
    steps, every = 123_456, 10
    decay = ema_optax.half_life(20_000)
    (line,) = plots.profiles(decay, steps, every=every).get_lines()
    run = ema_optax.profile(decay, steps, every)
    until = np.cumsum(run.weights)
    edges = line.get_xdata()
    assert 500 < len(edges) <= 1002
    assert (edges[0], edges[-1]) == (0, steps)
    whole = edges[1:].astype(int) - 1
    np.testing.assert_allclose(np.cumsum(areas(line)) / steps, until[whole], rtol=1e-9)


def test_profiles_marks_and_tells_the_mean_age():
    """A marker of the line's own colour at steps − mean age; figures in the legend."""
    ax = plots.profiles({"a": ema_optax.constant(0.98), "b": 0.9}, 100)
    run = ema_optax.profile(ema_optax.constant(0.98), 100)
    marker, _ = ax.collections
    ((x, y),) = marker.get_offsets()
    assert x == pytest.approx(100 - run.mean_age, rel=1e-12)
    # The curve there: weight of that update of 100.
    assert y == pytest.approx(100 * run.weights[int(np.ceil(x)) - 1], rel=1e-9)
    line, _ = ax.get_lines()
    assert np.allclose(marker.get_facecolor()[0][:3], to_rgb(line.get_color()))
    legend = ax.get_legend()
    assert legend is not None
    first, second = (text.get_text() for text in legend.get_texts())
    # 0.98^100 = 13.26 %; 49·(1 − 0.98^100) = 42.50
    assert first == "a: mean age 43 (42.5%), 13.3% on the initial params"
    assert second.startswith("b: mean age ")
    assert "initial" not in second


def test_profiles_differ_without_colour():
    """Six curves with six dash patterns, markers and colours, and lightnesses apart."""
    ax = plots.profiles(SIX, 1000)
    lines = ax.get_lines()
    assert [line.get_label().split(":")[0] for line in lines] == list(SIX)
    assert len({line.get_marker() for line in lines}) == 6
    assert len({line.get_color() for line in lines}) == 6
    assert len({str(style["linestyle"]) for style in style.CURVES}) == 6
    luminance = [np.dot(to_rgb(ln.get_color()), (0.21, 0.72, 0.07)) for ln in lines]
    assert all(abs(a - b) > 0.02 for a, b in combinations(luminance, 2))
    assert max(luminance) < 0.75  # yellow would vanish on white


def test_profiles_says_what_it_shows():
    """Axes from zero to the length of the run, and labels with their units."""
    ax = plots.profiles(ema_optax.power(0.1), 2000)
    assert ax.get_xlim() == (0, 2000)
    assert ax.get_ylim()[0] == 0
    assert ax.get_title(loc="left")
    assert "updates" in ax.get_xlabel()
    assert "plain mean = 1" in ax.get_ylabel()
    (line,) = ax.get_lines()
    assert line.get_label().startswith("power(width=0.1)")


def test_a_profile_too_narrow_to_draw_whole_says_so():
    """It is cut off where the others end, with its height in the legend."""
    decays = {"mean": ema_optax.uniform(), "short": ema_optax.constant(0.9)}
    ax = plots.profiles(decays, 10_000)
    assert ax.get_ylim() == (0, pytest.approx(1.08))
    mean, short = ax.get_lines()
    assert "cut off" not in mean.get_label()
    assert short.get_label().endswith("cut off: reaches 1,000")  # (1 − 0.9)·10,000
    for marker in ax.collections:
        assert marker.get_offsets()[0][1] == pytest.approx(1)
    # One fold of ten updates has 1 − 0.9¹⁰ = 0.651 of the weight.
    _, short = plots.profiles(decays, 10_000, every=10).get_lines()
    assert short.get_label().endswith("cut off: reaches 651")
    # Less than twenty times a typical peak is drawn whole: (1 − 0.9)·150 = 15.
    assert plots.profiles(decays, 150).get_ylim() == (0, pytest.approx(1.08 * 15))


def test_profiles_without_a_fold():
    """All on the initial params: a flat line, and no warning."""
    ax = plots.profiles(0.9, 5, every=10)
    (line,) = ax.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [5, 0]])
    assert line.get_label().endswith("100.0% on the initial params")
    assert plots.profiles({"a": 0.9}, 1).get_xlim() == (0, 1)


def test_profiles_draws_on_axes_passed_in():
    """A caller's own axes come back, with nothing else made in their figure."""
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.profiles(0.9, 10, ax=ax) is ax
    assert figure.axes == [ax]


@pytest.mark.parametrize("decays", [{}, SIX | {"one more": 0.9}])
def test_profiles_refuses_what_cannot_be_told_apart(decays):
    """None at all, or more than six."""
    with pytest.raises(ValueError, match=f"one to 6 decays.*got {len(decays)}"):
        plots.profiles(decays, 10)


WIDTHS = [0.02, 0.05, 0.1, 0.2]
SEEDS = np.array([[0.90, 0.92], [0.94, 0.95], [0.93, 0.97], [0.91, 0.93]])


def legend_of(ax) -> list[str]:
    """Returns what the legend says, from the top."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_accuracy_over_width_draws_the_mean_and_the_range_of_runs():
    """One value a width is a line alone; several are their mean in their range."""
    ax = plots.accuracy_over_width(WIDTHS, SEEDS[:, 0])
    line, best = ax.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), np.stack([WIDTHS, SEEDS[:, 0]], 1))
    assert not ax.collections
    assert best.get_xydata().tolist() == [[0.05, 0.94]]
    assert legend_of(ax) == ["reconstructed", "best: width 0.05"]

    ax = plots.accuracy_over_width(WIDTHS, SEEDS)
    line, best = ax.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [0.91, 0.945, 0.95, 0.92], rtol=1e-12)
    (shade,) = ax.collections
    corners = {(x, round(y, 6)) for x, y in shade.get_paths()[0].vertices}
    assert corners == {
        (w, y) for w, row in zip(WIDTHS, SEEDS, strict=True) for y in row
    }
    assert best.get_xydata()[0].tolist() == [0.1, pytest.approx(0.95)]
    assert [text.get_text() for text in ax.texts] == ["95.0%"]
    assert "range over the runs" in legend_of(ax)


def test_accuracy_over_width_takes_widths_in_any_order():
    """The line goes from the narrowest to the widest."""
    ax = plots.accuracy_over_width(WIDTHS[::-1], SEEDS[::-1])
    other = plots.accuracy_over_width(WIDTHS, SEEDS)
    for mixed, sorted_line in zip(ax.get_lines(), other.get_lines(), strict=True):
        np.testing.assert_array_equal(mixed.get_xydata(), sorted_line.get_xydata())
    ours, theirs = (a.collections[0].get_paths()[0].vertices for a in (ax, other))
    np.testing.assert_array_equal(ours, theirs)


def test_accuracy_over_width_marks_what_was_tracked():
    """Points at their widths, each with the range of its runs, and no line."""
    trained = {0.15: [0.93, 0.96, 0.93], 0.03: [0.91, 0.91, 0.94]}
    ax = plots.accuracy_over_width(WIDTHS, SEEDS, trained=trained)
    (points,) = [line for line in ax.get_lines() if line.get_marker() == "s"]
    np.testing.assert_allclose(points.get_xydata(), [[0.15, 0.94], [0.03, 0.92]])
    assert points.get_linestyle() == "None"
    bars = ax.collections[1].get_segments()
    np.testing.assert_allclose(
        bars, [[[0.15, 0.93], [0.15, 0.96]], [[0.03, 0.91], [0.03, 0.94]]]
    )
    assert "tracked in a run" in legend_of(ax)
    # Of one run there is no range.
    ax = plots.accuracy_over_width(WIDTHS, SEEDS, trained={0.15: 0.93})
    assert len(ax.collections) == 1


def test_accuracy_over_width_shows_the_raw_level():
    """A dashed level at the mean of the runs, told in the legend, with their range."""
    ax = plots.accuracy_over_width(WIDTHS, SEEDS, raw=[0.86, 0.90])
    (level,) = [line for line in ax.get_lines() if "raw" in line.get_label()]
    assert list(level.get_ydata()) == [pytest.approx(0.88)] * 2
    assert level.get_label() == "raw params: 88.0%"
    assert level.is_dashed()
    assert ax.patches[0].get_y() == pytest.approx(0.86)
    assert ax.patches[0].get_height() == pytest.approx(0.04)
    assert not plots.accuracy_over_width(WIDTHS, SEEDS, raw=0.88).patches


def test_accuracy_over_width_differs_without_colour():
    """Marker, dashes and width tell the curve, the level and the points apart."""
    ax = plots.accuracy_over_width(WIDTHS, SEEDS, trained={0.1: 0.9}, raw=0.88)
    curve, points, level, best = (
        next(line for line in ax.get_lines() if line.get_label().startswith(name))
        for name in ("reconstructed", "_", "raw", "best")
    )
    assert curve.get_linewidth() > 1.5 * level.get_linewidth()
    assert len({curve.get_marker(), points.get_marker(), best.get_marker()}) == 3
    assert points.get_markerfacecolor() == "none"  # the curve is seen through them


ERRORS = [0.01, 1e-4, 2e-4, 0.003]


def test_error_over_width_draws_errors_and_what_was_tracked():
    """Two log axes, the errors as given, and markers at the tracked widths."""
    ax = plots.error_over_width(WIDTHS[::-1], ERRORS[::-1], tracked=(0.05, 0.1))
    line, tracked, warned = ax.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), np.stack([WIDTHS, ERRORS], axis=1))
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert list(tracked.get_xdata()) == [0.05, 0.1]
    assert tracked.get_linestyle() == "None"
    assert legend_of(ax) == ["profile error", "tracked widths"]
    assert set(warned.get_ydata()) == {0.05}
    assert len(ax.figure.axes) == 1


@pytest.mark.long
def test_error_over_width_shows_when_reconstruct_warns_and_refuses():
    """The levels are those of the library; one far above all errors is left out."""
    snapshots = [
        reconstruction.Snapshot(step, 6.94, {"w": np.float32(1)})
        for step in np.arange(10, 101, 10)
    ]
    level = {"warned": 0.05, "refused": 0.5}
    errors, told = [], []
    for width in np.geomspace(0.01, 0.09, 40):
        x = [s.step for s in snapshots]
        wanted = ema_optax.exponent_from_width(width)
        found = reconstruction.coefficients(x, 6.94, wanted, 100)
        errors.append(reconstruction.profile_error(found, x, 6.94, wanted, 100))
        with warnings.catch_warnings():
            warnings.simplefilter("error", reconstruction.ReconstructionWarning)
            try:
                reconstruction.reconstruct(snapshots, width=width)
                told.append("")
            except reconstruction.ReconstructionWarning:
                told.append("warned")
            except ValueError:
                told.append("refused")
    for error, what in zip(errors, told, strict=True):
        assert (error > level["warned"]) == (what != "")
        assert (error > level["refused"]) == (what == "refused")
    assert set(told) == {"", "warned", "refused"}
    ax = plots.error_over_width(np.geomspace(0.01, 0.09, 40), errors)
    assert [text.get_text() for text in ax.texts] == ["5%: warned of", "50%: refused"]
    drawn = [line.get_ydata()[0] for line in ax.get_lines()[1:]]
    assert drawn == list(level.values())
    ax = plots.error_over_width(WIDTHS, ERRORS)
    assert [text.get_text() for text in ax.texts] == ["5%: warned of"]


def test_error_over_width_leaves_out_what_is_rounding():
    """An exact average does not stretch the axis; zero is no error and no warning."""
    for exact in (0.0, 1e-12):
        ax = plots.error_over_width(WIDTHS, [0.01, exact, 1e-4, 0.003])
        assert ax.get_ylim()[0] == 1e-5


def test_error_over_width_draws_noise_gains_on_an_axis_of_their_own():
    """At the right, dashed, in the same legend."""
    gains = [20, 1, 0.9, 0.5]
    ax = plots.error_over_width(WIDTHS[::-1], ERRORS[::-1], noise_gains=gains[::-1])
    _, right = ax.figure.axes
    (line,) = right.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), np.stack([WIDTHS, gains], axis=1))
    assert line.is_dashed()
    assert not ax.get_lines()[0].is_dashed()
    assert right.get_yscale() == "log"
    assert right.get_ylabel() == "Noise gain"
    assert legend_of(ax) == ["profile error", "noise gain (right)"]


@pytest.mark.parametrize("draw", [plots.accuracy_over_width, plots.error_over_width])
def test_pictures_over_width_say_what_they_show(draw):
    """Widths stand on a log axis as they are written in code; title and labels."""
    figure = Figure()
    ax = figure.add_subplot()
    assert draw(WIDTHS, ERRORS, ax=ax) is ax
    assert figure.axes == [ax]
    assert ax.get_xscale() == "log"
    figure.draw_without_rendering()
    shown = [text.get_text() for text in ax.get_xticklabels()]
    assert {"0.02", "0.05", "0.1", "0.2"} <= set(shown)
    assert ax.get_title(loc="left")
    assert "σ_rel" in ax.get_xlabel()
    assert ax.get_ylabel()


@pytest.mark.parametrize("draw", [plots.accuracy_over_width, plots.error_over_width])
@pytest.mark.parametrize(
    ("widths", "values", "said"),
    [
        ([], [], "got 0 widths and 0 values"),
        ([0.1, 0.2], [0.5], "got 2 widths and 1 values"),
        ([0.1], [[]], r"got shapes \[\(0,\)\]"),
        ([0.1], [[[0.5]]], r"got shapes \[\(1, 1\)\]"),
        ([0.1, 0.0], [0.5, 0.6], "Widths are above 0"),
        ([0.1, float("nan")], [0.5, 0.6], "Widths are above 0"),
    ],
)
def test_values_that_do_not_fit_the_widths_are_refused(draw, widths, values, said):
    """Nothing to draw, not one value for each, or a width that has no logarithm."""
    with pytest.raises(ValueError, match=said):
        draw(widths, values)


def test_other_values_are_checked_as_well():
    """Those tracked, of the raw params, and the noise gains."""
    with pytest.raises(ValueError, match="Widths are above 0"):
        plots.accuracy_over_width([0.1], [0.5], trained={0: 0.5})
    with pytest.raises(ValueError, match=r"got shapes \[\(0,\)\]"):
        plots.accuracy_over_width([0.1], [0.5], raw=[])
    with pytest.raises(ValueError, match="got 1 widths and 2 values"):
        plots.error_over_width([0.1], [0.5], noise_gains=[1, 2])
