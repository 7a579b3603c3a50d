"""The picture of the lag: values, the shadows behind them, and arrows as long."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import ema_optax
from ema_optax import plots
from tests.test_article import CLIMB, CLIMB_PRINTED, JUMP, JUMP_PRINTED

TWO = {"short": ema_optax.constant(0.9), "long": ema_optax.constant(0.98)}


def told_lags(ax):
    """Returns the numbers beside the arrows."""
    return [float(text.get_text()) for text in ax.texts if text.get_text()]


def arrows(ax):
    """Returns (where it begins, where it ends, its height) of each arrow."""
    drawn = [text for text in ax.texts if text.arrow_patch]
    assert all(text.xyann[1] == text.xy[1] for text in drawn)
    return [(text.xyann[0], *text.xy) for text in drawn]


@pytest.mark.parametrize(
    ("folds", "printed"),
    [(JUMP, JUMP_PRINTED), (CLIMB, CLIMB_PRINTED)],
    ids=["the weight jumps", "the weight climbs"],
)
def test_lag_draws_the_traces_of_the_tutorial(folds, printed):
    """The weight as given, and a shadow through every number that is printed."""
    decay = ema_optax.warmup(0.99)
    told = [n for _, n in folds]
    ax = plots.lag(
        [w for w, _ in folds], lambda fold: decay(told[int(fold) - 1]), start=0
    )
    raw, shadow = ax.get_lines()
    assert list(raw.get_ydata()) == [w for w, _ in folds]
    assert list(shadow.get_xdata()) == list(range(1, len(folds) + 1))
    drawn = [shadow.get_ydata()[number - 1] for number in printed]
    # As in the tests of the numbers themselves: one fold late or early fails.
    np.testing.assert_allclose(drawn, list(printed.values()), rtol=1e-6)
    # β/(1−β) = 101/9 = 11.2 at β = 101/110
    assert told_lags(ax) == [11.2]


def test_on_a_slope_the_arrow_spans_the_lag():
    """From the values to the shadow: it is where they were β/(1−β) updates ago."""
    values = 3 + 0.5 * np.arange(1, 2001)
    ax = plots.lag(values, TWO)
    for (begin, end, height), late in zip(sorted(arrows(ax)), (49, 9), strict=True):
        assert end == 2000
        # 0.98^2000 of the start is left, 3e-18
        assert end - begin == pytest.approx(late, rel=1e-12)
        assert height == pytest.approx(np.interp(begin, range(1, 2001), values))
    labels = [line.get_label() for line in ax.get_lines()]
    assert labels == ["raw", "short: lag 9.0", "long: lag 49.0"]
    assert sorted(told_lags(ax)) == [9.0, 49.0]
    # A lag of more than a hundred is told without a fraction.
    (_, line) = plots.lag(values, ema_optax.constant(0.995)).get_lines()
    assert line.get_label() == "constant(decay=0.995): lag 199"


def test_at_puts_the_arrows_elsewhere():
    """They end on the shadow there; after a jump that is two thirds of the way."""
    values = np.append(np.zeros(500), np.ones(500))
    ax = plots.lag(values, ema_optax.constant(0.98), at=550)
    _, shadow = ax.get_lines()
    (arrow,) = arrows(ax)
    assert arrow == (
        pytest.approx(550 - 49 * (1 - 0.98**1000)),
        550,
        shadow.get_ydata()[549],
    )
    assert arrow[2] == pytest.approx(1 - 0.98**50)  # .636


@pytest.mark.parametrize("every", [1, 7])
def test_the_shadow_is_that_of_ema_params(every: int):
    """For any decay and interval, from where the params started."""
    values = np.random.default_rng(0).normal(size=50).cumsum()
    decay = ema_optax.power(0.1)
    _, line = plots.lag(values, decay, start=2.0, every=every).get_lines()
    transform = ema_optax.ema_params(decay, every=every)
    params = jnp.float32(2)
    state = transform.init(params)
    for value, drawn in zip(values, line.get_ydata(), strict=True):
        _, state = transform.update(jnp.float32(value) - params, state, params)
        params = jnp.float32(value)
        np.testing.assert_allclose(state.shadow, drawn, rtol=2e-6, atol=2e-6)
    # Without a start, the first value is one.
    _, line = plots.lag(values, ema_optax.constant(0.9), every=every).get_lines()
    assert line.get_ydata()[0] == values[0]


def test_lags_alike_are_written_one_above_the_other():
    """Their numbers keep a line apart, in the order of the ends of the arrows."""
    decays = {f"{n}": ema_optax.half_life(n) for n in (30, 31, 32)}
    ax = plots.lag(range(400), decays)
    heights = [text.xy[1] for text in ax.texts if text.get_text()]
    assert told_lags(ax) == [45.7, 44.2, 42.8]
    low, high = ax.get_ylim()
    assert np.all(np.diff(heights) >= 0.049 * (high - low))


def test_lag_differs_without_colour():
    """Shadows have dashes of their own, and twice the width of the values."""
    raw, first, second = plots.lag(range(100), TWO).get_lines()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_linewidth() == 2 * raw.get_linewidth()
    assert len({line.get_color() for line in (raw, first, second)}) == 3


def test_lag_says_what_it_shows_on_axes_passed_in():
    """Title, labels and limits; the caller's axes come back, and no others."""
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.lag(range(100), TWO, ax=ax) is ax
    assert figure.axes == [ax]
    assert ax.get_title(loc="left")
    assert "β/(1−β)" in ax.get_xlabel()
    assert ax.get_ylabel() == "Value"
    assert ax.get_xlim() == (0, 100)
    assert ax.get_legend() is not None


def test_a_single_value_is_visible():
    """One point, which draws no line, is marked."""
    for line in plots.lag([1.0], 0.9).get_lines():
        assert line.get_marker() == "."


@pytest.mark.parametrize(
    ("values", "decays", "options", "said"),
    [
        ([], 0.9, {}, r"shape \(0,\) with 0 that are not finite"),
        ([[1.0]], 0.9, {}, r"shape \(1, 1\)"),
        ([1.0, float("nan")], 0.9, {}, "with 1 that are not finite"),
        ([1.0], {}, {}, "one to 6 decays.*got 0"),
        ([1.0], {str(n): 0.9 for n in range(7)}, {}, "one to 6 decays.*got 7"),
        ([1.0, 2.0], 0.9, {"at": 3}, "updates 1 to 2, got at=3"),
        ([1.0, 2.0], 0.9, {"at": 0}, "at must be a whole number ≥ 1, got 0"),
        ([1.0, 2.0], 0.9, {"every": 0}, "every must be a whole number ≥ 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(values, decays, options, said):
    """No values, none that are one number each, too many decays, no such update."""
    with pytest.raises(ValueError, match=said):
        plots.lag(values, decays, **options)
