"""Averages put together from snapshots, against least squares and direct tracking."""

import concurrent.futures
import fractions
import functools
import re
import subprocess
import sys
import threading
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import reconstruction
from ema_optax._reconstruction import sums
from ema_optax.reconstruction import ReconstructionWarning, Snapshot, reconstruct
from tests import launch, reference

WIDTHS = {"a": 0.05, "b": 0.10, "c": 0.07, "d": 0.15}
G = {name: ema_optax.exponent_from_width(width) for name, width in WIDTHS.items()}
STEPS = 6400


def _schedule(count, last=20_000, names="ab"):
    """Steps and exponents of evenly spaced snapshots of the tracked widths."""
    steps = np.linspace(last / count, last, count)
    return np.repeat(steps, len(names)), np.tile([G[name] for name in names], count)


def _bound(exponent):
    """‖p‖₂·√T of the profile t^exponent: the error per profile error and deviation."""
    return (exponent + 1) / np.sqrt(2 * exponent + 1)


# --- Coefficients


@pytest.mark.parametrize("count", [16, 32, 64])
@pytest.mark.parametrize("width", [0.015, 0.03, 0.07, 0.15, 0.25])
def test_coefficients_are_the_least_squares(count, width):
    """Found point by point: weights to 1e-9 of 33, the distance to 1e-8."""
    steps, exponents = _schedule(count)
    wanted = ema_optax.exponent_from_width(width)
    x = reconstruction.coefficients(steps, exponents, wanted, 20_000)
    expected, distance = reference.projection(steps, exponents, wanted, 20_000)
    assert x.dtype == np.float64
    assert x.sum() == pytest.approx(1, abs=1e-13)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-9)
    error = reconstruction.profile_error(x, steps, exponents, wanted, 20_000)
    assert error == pytest.approx(distance, abs=1e-8)


def test_an_end_between_snapshots_uses_those_around_it():
    """Uneven steps, several exponents, and a step that no snapshot has."""
    steps = np.array([100.0, 250, 260, 700, 1000, 1000, 1300])
    exponents = np.array([7.0, 17, 3, 7, 7, 17, 7])
    x = reconstruction.coefficients(steps, exponents, 5.0, 900)
    expected, distance = reference.projection(steps, exponents, 5.0, 900, order=40)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-10)
    error = reconstruction.profile_error(x, steps, exponents, 5.0, 900)
    assert error == pytest.approx(distance, abs=1e-10)
    assert abs(x[-1]) > 0.01  # the later one helps


@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_a_snapshot_of_the_wanted_profile_is_taken_alone(ridge):
    """Weight 1 to 1e-5, whichever of the 128 it is, and 0 of the others."""
    steps, exponents = _schedule(64)
    for one in (127, 126, 60, 1):
        x = reconstruction.coefficients(
            steps, exponents, exponents[one], steps[one], ridge=ridge
        )
        np.testing.assert_allclose(x, np.eye(128)[one], rtol=0, atol=1e-5)


def test_the_published_errors():
    """2.3e-2, 6e-3 and 1.5e-3 at width .015; ‖x‖ 20 at .02, at most 1 from .05."""
    wanted = ema_optax.exponent_from_width(0.015)
    for count, published in ((64, 2.3e-2), (128, 6e-3), (256, 1.5e-3)):
        steps, exponents = _schedule(count)
        x = reconstruction.coefficients(steps, exponents, wanted, 20_000)
        error = reconstruction.profile_error(x, steps, exponents, wanted, 20_000)
        assert error == pytest.approx(published, rel=0.02)
    for width, low, high in ((0.02, 19.5, 20.5), (0.05, 0, 1), (0.15, 0, 0.8)):
        g = ema_optax.exponent_from_width(width)
        x = reconstruction.coefficients(steps, exponents, g, 20_000)
        assert low <= np.linalg.norm(x) <= high + 1e-9


@pytest.mark.long
def test_512_snapshots_are_solved_to_six_digits():
    """A condition number of 8e9: against the same equations, refined in longdouble."""
    steps, exponents = _schedule(512)
    wanted = ema_optax.exponent_from_width(0.015)
    t = np.append(steps, 20_000).astype(np.longdouble)
    g = np.append(exponents, wanted).astype(np.longdouble)
    # ∫ t^(a+b) up to the earlier end, of densities scaled to 1 there
    early, late = np.minimum.outer(t, t), np.maximum.outer(t, t)
    of_late = np.where(t[:, None] < t, g, g[:, None])
    inner = np.multiply.outer(g + 1, g + 1) / (np.add.outer(g, g) + 1)
    inner *= (early / late) ** of_late / late * 20_000
    border = np.ones((1025, 1025), np.longdouble)
    border[:-1, :-1], border[-1, -1] = inner[:-1, :-1], 0
    side = np.append(inner[:-1, -1], 1)
    inverse = np.linalg.inv(border.astype(np.float64))
    refined = np.zeros(1025, np.longdouble)
    for _ in range(5):
        refined += inverse @ (side - border @ refined).astype(np.float64)
    x = reconstruction.coefficients(steps, exponents, wanted, 20_000)
    assert x.sum() == pytest.approx(1, abs=1e-13)
    np.testing.assert_allclose(x, refined[:-1].astype(float), rtol=0, atol=1e-6)
    left = np.append(refined[:-1], -1)
    distance = float(np.sqrt(left @ inner @ left / inner[-1, -1]))
    error = reconstruction.profile_error(x, steps, exponents, wanted, 20_000)
    assert error == pytest.approx(distance, rel=1e-6)
    assert error < 1.5e-3 / 3  # that of 256


def test_close_snapshots_against_exact_fractions():
    """Eight steps in a row: weights in the hundreds, and still the least distance."""
    steps, exponents, wanted = list(range(200, 208)) * 2, [17] * 8 + [7] * 8, 12
    t = [fractions.Fraction(step) for step in [*steps, 207]]
    g = [*exponents, wanted]

    def inner(i, j):
        early, late = (i, j) if t[i] <= t[j] else (j, i)
        powers = (t[early] / t[late]) ** g[late] / t[late]
        return fractions.Fraction((g[i] + 1) * (g[j] + 1), g[i] + g[j] + 1) * powers

    rows = [[inner(i, j) for j in range(16)] + [1, inner(i, 16)] for i in range(16)]
    rows.append([fractions.Fraction(1)] * 16 + [0, 1])
    for k in range(17):  # Gauss–Jordan
        pivot = next(i for i in range(k, 17) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [value / rows[k][k] for value in rows[k]]
        for i in range(17):
            if i != k and rows[i][k]:
                rows[i] = [
                    a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)
                ]
    best = [row[-1] for row in rows[:16]] + [-1]
    x = reconstruction.coefficients(steps, exponents, wanted, 207)
    ours = [*map(fractions.Fraction, x.tolist()), -1]

    def distance(weights):
        square = sum(
            weights[i] * weights[j] * inner(i, j) for i in range(17) for j in range(17)
        )
        return float(square / inner(16, 16)) ** 0.5

    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert distance(ours) == pytest.approx(distance(best), rel=1e-6)
    error = reconstruction.profile_error(x, steps, exponents, wanted, 207)
    assert error == pytest.approx(distance(best), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("width", [0.02, 0.07, 0.25])
def test_a_larger_ridge_never_makes_larger_weights(width):
    """And never a smaller profile error."""
    steps, exponents = _schedule(64)
    wanted = ema_optax.exponent_from_width(width)
    gains, errors = [], []
    for ridge in (0.0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1e-1, 10.0):
        x = reconstruction.coefficients(steps, exponents, wanted, 20_000, ridge=ridge)
        assert x.sum() == pytest.approx(1, abs=1e-12)
        gains.append(np.linalg.norm(x))
        errors.append(reconstruction.profile_error(x, steps, exponents, wanted, 20_000))
    assert np.all(np.diff(gains) <= 1e-9)
    assert np.all(np.diff(errors) >= -1e-9)
    assert gains[-1] < gains[0] / 2


def test_the_ridge_is_in_units_of_the_run_s_length():
    """The minimum of T·∫(…)² + ridge·Σx², by least squares with rows for the ridge."""
    steps, exponents = np.array([300.0, 600, 800, 1000]), np.full(4, 7.0)
    t, w = reference.quadrature(steps, 16)
    root = np.sqrt(1000 * w)[:, None]
    columns = root * reference.power_densities(t, steps, exponents)
    wanted = (root * reference.power_densities(t, [1000], 12.0))[:, 0]
    matrix = np.concatenate([columns, 0.3 * np.eye(4)])
    side = np.append(wanted, np.zeros(4))
    rest, *_ = np.linalg.lstsq(
        matrix[:, :3] - matrix[:, 3:], side - matrix[:, 3], rcond=None
    )
    x = reconstruction.coefficients(steps, exponents, 12.0, 1000, ridge=0.3**2)
    np.testing.assert_allclose(x, np.append(rest, 1 - rest.sum()), rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_ridge_of_a_dtype_lowers_the_whole_error(dtype):
    """Profile error and rounding noise: 5 % lower of 256 bfloat16, nowhere higher."""
    kind = jnp.dtype(dtype)
    rng = np.random.default_rng(0)
    ratios = {}
    for count in (16, 256):
        steps, exponents = _schedule(count)
        values = rng.standard_normal((len(steps), 1000))
        noise = values.astype(kind).astype(np.float64) - values
        for width in (0.015, 0.03, 0.15):
            wanted = ema_optax.exponent_from_width(width)
            found = []
            for ridge in (0.0, reconstruction.rounding_variance(kind)):
                args = (steps, exponents, wanted, 20_000)
                x = reconstruction.coefficients(*args, ridge=ridge)
                error = reconstruction.profile_error(x, *args) * _bound(wanted)
                found.append(np.sqrt(error**2 + np.mean((x @ noise) ** 2)))
            ratios[count, width] = found[1] / found[0]
    assert max(ratios.values()) <= 1.0001
    assert ratios[256, 0.015] < (0.96 if dtype == "bfloat16" else 0.9996)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_rounding_variance_is_that_of_numbers_of_all_sizes(dtype):
    """Within 2 % of what rounding 400,000 normal numbers does."""
    values = np.random.default_rng(0).standard_normal(400_000)
    error = values.astype(jnp.dtype(dtype)).astype(np.float64) - values
    measured = np.mean(error**2) / np.mean(values**2)
    found = reconstruction.rounding_variance(dtype)
    assert found == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("args", "ridge", "message"),
    [
        (([], 7, 5, 2), 0, "at least one"),
        (([1, 2, 1], 7, 5, 2), 0, "same step 1 and exponent 7: leave one of them out"),
        (([-1, 2], 7, 5, 2), 0, "steps > 0"),
        (([0, 2], 7, 5, 2), 0, "steps > 0"),
        (([1, np.nan], 7, 5, 2), 0, "steps > 0"),
        (([1, 2], -0.5, 5, 2), 0, r"above -1/2.*exponent_from_width"),
        (([1, 2], [7, np.nan], 5, 2), 0, "above -1/2"),
        (([1, 2], [7, 8, 9], 5, 2), 0, "one for each snapshot, or one for all"),
        (([1, 2], 7, -0.5, 2), 0, "above -1/2"),
        (([1, 2], 7, np.inf, 2), 0, "above -1/2"),
        (([1, 2], 7, 5, 0), 0, "steps > 0"),
        (([1, 2], 7, 5, np.nan), 0, "steps > 0"),
        (([1, 2], 7, 5, 2), -1e-9, "ridge must be ≥ 0 and finite, got -1e-09"),
        (([1, 2], 7, 5, 2), np.nan, "ridge must be"),
        (([1, 2], 7, 5, 2), np.inf, "ridge must be"),
    ],
)
def test_coefficients_refuse(args, ridge, message):
    """What is no snapshot, no profile or no ridge, with its value."""
    with pytest.raises(ValueError, match=message):
        reconstruction.coefficients(*args, ridge=ridge)


# --- The bound


@pytest.mark.parametrize("seed", range(4))
def test_the_profile_error_is_a_bound(seed):
    """On the error of any run; these come to 29–34 % of it, so that it says a lot."""
    every, count = 10, 32
    rng = np.random.default_rng(seed)
    drift = np.linspace(0, 1, 640)[:, None] ** 3 * rng.uniform(0, 3, 20)
    walk = np.cumsum(rng.standard_normal((640, 20)), axis=0) / 20
    params = 1 + drift + walk + 0.3 * rng.standard_normal((640, 20))
    steps, exponents = _schedule(count, last=640)
    largest = 0.0
    for width in (0.02, 0.07, 0.25):
        wanted = ema_optax.exponent_from_width(width)
        args = (steps, exponents, wanted, 640)
        x = reconstruction.coefficients(*args)
        # What a fold sees stands for the updates since the one before.
        seen = np.repeat(params[every - 1 :: every], every, axis=0)
        deviation = np.sqrt(np.mean((seen - seen.mean(axis=0)) ** 2, axis=0))
        bound = reconstruction.profile_error(x, *args) * _bound(wanted) * deviation

        def track(g):
            return reference.shadows(params, reference.betas("power", 640, g), every)

        tracked = np.stack([track(G["a"])[1::2], track(G["b"])[1::2]], axis=1)
        error = np.abs(x @ tracked.reshape(64, 20) - track(wanted)[-1])
        assert np.all(error <= bound * (1 + 1e-9) + 1e-12)
        largest = max(largest, np.max(error / bound))
    assert largest > 0.2


def test_the_bound_is_reached():
    """By params that go along with what is left of the profile: 99.998 % of it."""
    steps, exponents = _schedule(16, last=6400)
    wanted = ema_optax.exponent_from_width(0.03)
    x = reconstruction.coefficients(steps, exponents, wanted, 6400)
    # Weights of single updates, from folding a unit at each: products of decays.
    weights = []
    for step, g in [*zip(steps, exponents, strict=True), (6400, wanted)]:
        kept = reference.betas("power", int(step), g)
        after = np.append(np.cumprod(kept[:0:-1])[::-1], 1.0)
        weights.append(np.pad((1 - kept) * after, (0, 6400 - int(step))))
    left = np.append(x, -1) @ np.stack(weights)
    error = left @ left  # of params that are `left`, with mean 0
    deviation = np.sqrt(np.mean(left**2))
    bound = reconstruction.profile_error(x, steps, exponents, wanted, 6400)
    assert 0.9999 < error / (bound * _bound(wanted) * deviation) <= 1 + 1e-9


# --- Against direct tracking


@functools.cache
def _run(every):
    """Returns float64[STEPS, 8] params of a drifting run, and the shadows by name."""
    transform = ema_optax.ema_params(
        {name: ema_optax.power(width) for name, width in WIDTHS.items()}, every=every
    )
    rng = np.random.default_rng(0)
    drift = 1 + 4 * np.linspace(0, 1, STEPS + 1)[:, None] ** 3
    path = drift + 0.05 * rng.standard_normal((STEPS + 1, 8))
    path = path.astype(np.float32)

    def step(carry, target):
        params, state = carry
        updates = {"w": target - params["w"]}
        updates, state = transform.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params["w"], state.shadow)

    params = {"w": jnp.asarray(path[0])}
    carry = (params, transform.init(params))
    _, (held, tracked) = jax.jit(lambda c, p: jax.lax.scan(step, c, p))(carry, path[1:])
    return np.asarray(held), {k: np.asarray(v["w"]) for k, v in tracked.items()}


def _snapshots(every=1, offset=0, shift=0, names="ab", count=64, last=STEPS):
    """Shadows that were saved `offset` updates after each of `count` steps."""
    _, tracked = _run(every)
    interval = last // count
    saved = [interval * i + offset for i in range(1, count + 1)]
    saved = [step for step in saved if step <= STEPS]
    return [
        Snapshot(step - step % every + shift, G[name], {"w": tracked[name][step - 1]})
        for step in saved
        for name in names
    ]


def _error(found, every, width):
    """Relative to the float64 average of that width, folded directly."""
    held, _ = _run(every)
    g = ema_optax.exponent_from_width(width)
    betas = reference.betas("power", STEPS, g)
    expected = reference.average(held[: int(found.step)], betas, every)
    return reference.relative_rms(found.tree["w"], expected)


@pytest.mark.parametrize(("every", "offset"), [(1, 0), (10, 0), (10, 7)])
def test_reconstruct_is_direct_tracking(every, offset):
    """.07 and .15 from .05 and .10: within 4e-7 and 6e-7.

    The params drift fivefold: snapshots said to be one step off make it 2.7e-6 and
    1e-5, and the updates seen instead of the last fold, 2e-5 and 7e-5.
    """
    for width in (0.07, 0.15):
        right = reconstruct(_snapshots(every, offset), width=width)
        assert _error(right, every, width) < 1e-6
        assert right.step == STEPS - (0 if offset == 0 else 100)
        for shift in {1, -1, offset} - {0}:
            wrong = reconstruct(_snapshots(every, offset, shift), width=width)
            moved = reference.relative_rms(
                wrong.tree["w"], np.asarray(right.tree["w"], np.float64)
            )
            assert moved > 2e-6


def test_reconstruct_says_what_it_did():
    """Weights in the order given, what they cost, and what they are of."""
    snapshots = _snapshots()[::-1]
    found = reconstruct(snapshots, width=0.15)
    trees = np.stack([snapshot.tree["w"] for snapshot in snapshots]).astype(np.float64)
    np.testing.assert_allclose(found.coefficients @ trees, found.tree["w"], rtol=1e-7)
    assert found.tree["w"].dtype == jnp.float32
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-13)
    norm = np.sqrt(np.sum(found.coefficients**2))
    assert found.noise_gain == pytest.approx(norm, rel=1e-12)
    assert (found.width, found.step) == (0.15, STEPS)
    steps, exponents = _schedule(64, last=STEPS)
    _, distance = reference.projection(steps, exponents, G["d"], STEPS)
    assert found.profile_error == pytest.approx(distance, rel=1e-6)


def test_an_earlier_step_ignores_what_came_later():
    """As if the run had ended there: other snapshots get 0."""
    for step in (1600, 4000):
        found = reconstruct(_snapshots(), width=0.07, step=step)
        alone = reconstruct(_snapshots(count=step // 100, last=step), width=0.07)
        np.testing.assert_array_equal(found.tree["w"], alone.tree["w"])
        assert not np.any(found.coefficients[step // 50 :])
        assert found.step == step
    assert _error(found, 1, 0.07) < 1e-6


def test_what_was_tracked_comes_back():
    """A width that has a snapshot is that snapshot, to its rounding."""
    snapshots = _snapshots()
    for i, width in ((-2, 0.05), (-1, 0.10)):
        found = reconstruct(snapshots, width=width)
        np.testing.assert_allclose(found.tree["w"], snapshots[i].tree["w"], rtol=2e-7)
        assert found.noise_gain == pytest.approx(1, abs=1e-4)


def test_snapshots_come_in_any_order():
    """The coefficients are in the order given."""
    given = _snapshots()
    expected = reconstruct(given, width=0.07)
    order = np.random.default_rng(0).permutation(len(given))
    found = reconstruct([given[i] for i in order], width=0.07)
    np.testing.assert_allclose(
        found.coefficients, expected.coefficients[order], atol=1e-11
    )
    np.testing.assert_allclose(found.tree["w"], expected.tree["w"], rtol=1e-6)


def test_an_average_may_end_at_any_snapshot():
    """From the first to the last, and no further."""
    given = _snapshots(count=4)
    for step in (given[0].step, given[-1].step):
        assert reconstruct(given, width=0.05, step=step).step == step
    for step, wrong in (
        (given[0].step - 1, f"step {given[0].step - 1} is before the first"),
        (given[-1].step + 1, f"step {given[-1].step + 1} is after the last"),
    ):
        with pytest.raises(ValueError, match=f"^{wrong} snapshot: they reach from "):
            reconstruct(given, width=0.05, step=step)
    with pytest.raises(ValueError, match="is after the last snapshot"):
        reconstruct(given[-1:], width=0.05, step=STEPS + 1)


def test_several_widths_are_single_calls():
    """To the last digit but one, in the order asked for, from one pass."""
    widths = [0.15, 0.03, 0.07]
    together = reconstruct(_snapshots(), width=widths)
    assert [found.width for found in together] == widths
    for found, width in zip(together, widths, strict=True):
        alone = reconstruct(_snapshots(), width=width)
        np.testing.assert_allclose(found.tree["w"], alone.tree["w"], rtol=2e-7)
        np.testing.assert_allclose(found.coefficients, alone.coefficients, atol=1e-8)
        assert found.profile_error == pytest.approx(alone.profile_error, rel=1e-6)
    assert len(reconstruct(_snapshots(), width=[0.07])) == 1


def test_what_snapshots_were_rounded_to_is_regarded():
    """The `dtype` of a snapshot, or else that of its leaves, makes the ridge."""
    plain = _snapshots()
    halves = [
        Snapshot(s.step, s.exponent, {"w": jnp.asarray(s.tree["w"], jnp.bfloat16)})
        for s in plain
    ]
    named = [Snapshot(s.step, s.exponent, s.tree, "bfloat16") for s in plain]
    steps, exponents = _schedule(64, last=STEPS)
    for given, kind in ((plain, "float32"), (halves, "bfloat16"), (named, "bfloat16")):
        ridge = reconstruction.rounding_variance(kind)
        x = reconstruction.coefficients(steps, exponents, G["d"], STEPS, ridge=ridge)
        found = reconstruct(given, width=WIDTHS["d"])
        np.testing.assert_array_equal(found.coefficients, x)


def test_a_doubtful_average_warns():
    """From 5 % profile error on, naming what these snapshots give; from 50 % never."""
    few = _snapshots(count=16)
    steps, exponents = [s.step for s in few], [s.exponent for s in few]
    ridge = reconstruction.rounding_variance("float32")
    low, high = reconstruction.reachable(steps, exponents, STEPS, ridge=ridge)
    message = re.escape(
        "The average of width 0.02 at step 6400 has a profile error of 12% from these "
        "32 snapshots. They were tracked at width 0.05, 0.1 and give widths from "
        f"{low:.3g} to {high:.3g} within 5%; snapshots at more"
    )
    with pytest.warns(ReconstructionWarning, match=message) as caught:
        found = reconstruct(few, width=0.02)
    assert caught[0].filename == __file__
    assert found.profile_error == pytest.approx(0.12, abs=0.005)
    with pytest.raises(ValueError, match=r"profile error of \d\d%.* narrower ones"):
        reconstruct(few, width=0.005)
    near = [s for s in few if s.step not in (3200, 3600)]
    message = "none at step 3200 itself; the nearest is 2800"
    with pytest.raises(ValueError, match=message):
        reconstruct(near, width=0.05, step=3200)
    close = _snapshots()
    with pytest.warns(ReconstructionWarning, match="none at step 6310 itself"):
        reconstruct(close, width=0.25, step=6310)


def _check_ends(ends, error, distance):
    """Asserts that 1 % inside of two widths the error is met, and 1 % outside not."""
    for width, inward in zip(ends, (1.01, 0.99), strict=True):
        for factor in (1.01, 0.99):
            g = ema_optax.exponent_from_width(width * factor)
            assert (distance(g) <= error) == (factor == inward)


def test_what_is_said_to_be_reachable_is():
    """`reachable` ends where the profile error crosses the one asked for."""
    steps, exponents = _schedule(32)
    ends = reconstruction.reachable(steps, exponents, 20_000, error=0.02)
    _check_ends(
        ends, 0.02, lambda g: reference.projection(steps, exponents, g, 20_000)[1]
    )
    assert reconstruction.reachable([10], [7.0], 20_000) is None


def test_noise_narrows_what_is_reachable():
    """With a ridge it is where the profile of those coefficients crosses the error."""
    steps, exponents = _schedule(32)
    ridge = 0.01
    ends = reconstruction.reachable(steps, exponents, 20_000, error=0.02, ridge=ridge)

    def left(g):
        x = reconstruction.coefficients(steps, exponents, g, 20_000, ridge=ridge)
        return reconstruction.profile_error(x, steps, exponents, g, 20_000)

    _check_ends(ends, 0.02, left)
    plain = reconstruction.reachable(steps, exponents, 20_000, error=0.02)
    assert plain[0] < ends[0] < ends[1] < plain[1]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {"width": 0.05}, r"no snapshots\. Save shadows.*SnapshotSave"),
        (None, {"width": 0.05, "step": 99}, r"99 is before the first.*100 to 6400"),
        (None, {"width": 0.05, "step": 6401}, r"6401 is after the last.*100 to 6400"),
        (None, {"width": 0.3}, r"\(0, 0\.2887\], got 0\.3: the widest average"),
        (None, {"width": 0.0}, r"got 0\.0"),
        (None, {"width": np.nan}, "got nan"),
        (None, {"width": [0.07, 0.3]}, r"got 0\.3"),
        (None, {"width": 0.07, "params": {"v": np.ones(8)}}, "no leaf 'w'"),
        (
            None,
            {"width": 0.07, "params": {"w": np.ones(9, np.float32)}},
            r"'w' is float32\[9\] in the params and float32\[8\] in the trees",
        ),
        (
            None,
            {"width": 0.07, "params": {"w": np.ones(8, np.complex64)}},
            r"'w' is complex64\[8\] in the params and float32\[8\]",
        ),
        (None, {"width": 0.07, "dtype": "int8"}, "floating one, got int8"),
    ],
)
def test_reconstruct_refuses(given, options, message):
    """What these snapshots do not have, with what they do."""
    with pytest.raises(ValueError, match=message):
        reconstruct(_snapshots() if given is None else given, **options)


def test_snapshots_of_other_models_are_refused():
    """By the first leaf that differs, and the number of the tree."""
    one = Snapshot(10, 7.0, {"w": np.ones(2, np.float32)})
    for tree, message in (
        ({"v": np.ones(2)}, "number 1 also has 'v'"),
        ({"w": np.ones(2), "v": np.ones(2)}, "number 1 also has 'v'"),
        ({}, "number 1 lacks 'w'"),
        ({"w": np.ones(3, np.float32)}, r"'w' is float32\[2\] in the first and float"),
        ({"w": np.ones(2, np.complex64)}, r"'w' is float32\[2\].*complex64\[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruct([one, Snapshot(20, 7.0, tree)], width=0.1)
    with pytest.raises(ValueError, match="same step 10 and exponent 7"):
        reconstruct([one, one], width=0.1)


# --- Trees


class Layer(NamedTuple):
    kernel: Any
    bias: Any


def _params():
    """Every kind of leaf: narrow, complex, 0-d, empty, None, integer and masked."""
    key = jax.random.key(0)
    return {
        "layers": [
            Layer(jax.random.normal(key, (3, 4), jnp.bfloat16), None),
            Layer(jax.random.normal(key, (4,)), jnp.arange(3)),
        ],
        "phase": jnp.asarray([1 + 2j, 3 - 1j], jnp.complex64),
        "scale": jnp.float32(2.5),
        "empty": jnp.zeros((0, 3)),
        "masked": jnp.ones(2),
        "flag": True,
    }


def _tree_snapshots(params, mask):
    """Twelve snapshots whose shadows are noise, in the structure of a real state."""
    shadow = ema_optax.ema_params(ema_optax.power(0.1), mask=mask).init(params).shadow
    rng = np.random.default_rng(0)

    def noise(leaf):
        values = rng.standard_normal((2, *leaf.shape))
        values = (
            values[0] + 1j * values[1] if leaf.dtype == jnp.complex64 else values[0]
        )
        return jnp.asarray(values, leaf.dtype)

    return [
        Snapshot(10.0 * i, g, jax.tree.map(noise, shadow))
        for i in range(1, 7)
        for g in (16.97, 6.94)
    ]


def _mask(params):
    return {
        name: jax.tree.map(lambda _, name=name: name != "masked", part)
        for name, part in params.items()
    }


def _sums(found, snapshots):
    """The leaves of Σ coefficient·tree, in the widest precision of NumPy."""
    return [
        sum(
            x * np.asarray(leaf, np.complex128)
            for x, leaf in zip(found.coefficients, leaves, strict=True)
        )
        for leaves in zip(*(jax.tree.leaves(s.tree) for s in snapshots), strict=True)
    ]


def test_with_params_it_is_like_the_params():
    """Structure, dtypes, and what is not averaged: theirs, in buffers of its own."""
    params = _params()
    snapshots = _tree_snapshots(params, _mask)
    found = reconstruct(snapshots, width=0.09, params=params)
    assert jax.tree.structure(found.tree) == jax.tree.structure(params)
    for ours, theirs in zip(
        jax.tree.leaves(found.tree), jax.tree.leaves(params), strict=True
    ):
        assert jnp.result_type(ours) == jnp.result_type(theirs)
        assert jnp.shape(ours) == jnp.shape(theirs)
    np.testing.assert_array_equal(found.tree["layers"][1].bias, [0, 1, 2])
    np.testing.assert_array_equal(found.tree["masked"], [1, 1])
    assert found.tree["flag"] is True
    jax.tree.map(lambda x: x.delete(), (params["masked"], params["layers"][1].bias))
    assert found.tree["masked"][0] == 1  # not the buffer that was donated
    averaged = {k: found.tree[k] for k in ("empty", "layers", "phase", "scale")}
    averaged["layers"][1] = averaged["layers"][1]._replace(bias=None)
    for ours, expected in zip(
        jax.tree.leaves(averaged), _sums(found, snapshots), strict=True
    ):
        # One rounding: to half the last digit of bfloat16 or float32.
        rtol = 2**-8 if ours.dtype == jnp.bfloat16 else 2**-23
        np.testing.assert_allclose(
            np.asarray(ours, np.complex128), expected, rtol=rtol, atol=1e-7
        )


def test_without_params_it_is_like_the_newest_snapshot():
    """Placeholders stay; narrow leaves widen to float32."""
    params = _params()
    snapshots = _tree_snapshots(params, _mask)
    found = reconstruct(snapshots[::-1], width=0.09)
    newest = snapshots[-1].tree
    assert jax.tree.structure(found.tree) == jax.tree.structure(newest)
    assert found.tree["masked"] == optax.MaskedNode()
    narrow = [
        Snapshot(s.step, s.exponent, jax.tree.map(lambda x: x.astype("bfloat16"), t))
        for s in snapshots
        for t in [{"w": s.tree["layers"][0].kernel}]
    ]
    assert reconstruct(narrow, width=0.09).tree["w"].dtype == jnp.float32
    half = reconstruct(narrow, width=0.09, dtype="float16").tree["w"]
    assert half.dtype == jnp.float16
    listed = [  # the same paths, in a list since the last step
        Snapshot(s.step, s.exponent, list(w) if s.step == 60 else {"0": w[0]})
        for s in narrow
        for w in [list(s.tree.values())]
    ]
    assert isinstance(reconstruct(listed[::-1], width=0.09).tree, list)


def test_dtype_is_of_floating_leaves_alone():
    """Complex ones stay complex, integers what they are."""
    params = _params()
    snapshots = _tree_snapshots(params, None)
    tree = reconstruct(snapshots, width=0.09, params=params, dtype="float16").tree
    assert {leaf.dtype for leaf in (*tree["layers"][0][:1], tree["scale"])} == {
        jnp.dtype("float16")
    }
    assert tree["phase"].dtype == jnp.complex64
    assert tree["layers"][1].bias.dtype == jnp.int32


def test_abstract_params_do_where_all_is_averaged():
    """And elsewhere the leaf is named that they cannot give."""
    params = _params()
    snapshots = _tree_snapshots(params, None)
    with pytest.raises(ValueError, match="'flag' was not averaged"):
        reconstruct(snapshots, width=0.09, params=jax.eval_shape(lambda: params))
    params["layers"][1] = params["layers"][1]._replace(bias=None)
    del params["flag"]
    abstract = jax.eval_shape(lambda: params)
    found = reconstruct(snapshots, width=0.09, params=abstract)
    concrete = reconstruct(snapshots, width=0.09, params=params)
    jax.tree.map(np.testing.assert_array_equal, found.tree, concrete.tree)
    assert jax.tree.map(jnp.result_type, found.tree) == jax.tree.map(
        lambda x: x.dtype, abstract
    )
    # Of what was left out of the average, an array of no elements needs no values.
    empty = {**abstract, "vacant": jax.ShapeDtypeStruct((0, 3), jnp.int8)}
    kept = reconstruct(snapshots, width=0.09, params=empty).tree["vacant"]
    assert (kept.shape, kept.dtype) == ((0, 3), jnp.int8)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ema_optax import reconstruction
from ema_optax._reconstruction import sums
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
spec = {"w": P("x", "y"), "b": P(("y", "x")), "r": P(), "s": P(None, "x")}
where = {name: NamedSharding(mesh, p) for name, p in spec.items()}
shapes = {"w": (8, 6), "b": (16,), "r": (3,), "s": (5, 4)}
rng = np.random.default_rng(0)
trees = [
    {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    for _ in range(3)
]
weights = [0.5, -1.0, 1.5]
plain = reconstruction.merge(trees, weights)
params = jax.device_put(trees[0], where)
sharded = [jax.device_put(tree, where) for tree in trees]
def check(found, like, atol=0):
    for name in shapes:
        assert found[name].sharding == like[name].sharding, name
        np.testing.assert_allclose(found[name], plain[name], rtol=0, atol=atol)
check(reconstruction.merge(trees, weights, params=params), params)
check(reconstruction.merge(sharded, weights), params)
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
)
check(reconstruction.merge(sharded, weights, params=abstract), params)

class Partly:  # as where other processes hold devices: part by part
    is_fully_addressable = False
    def __init__(self, sharding):
        self.addressable_devices_indices_map = sharding.addressable_devices_indices_map
whole = sums._parts
sums._parts = lambda sharding, shape: whole(Partly(sharding), shape)
sums._SMALL = 0  # in batches, whose partial sums are kept in float32
seen = []
check(reconstruction.merge(
    sharded, weights, params=params, progress=lambda *done: seen.append(done)
), params, atol=1e-6)
assert len(seen) >= 8 + 8 + 1 + 4, len(seen)  # replicas are summed once
check(reconstruction.merge(trees, weights, params=params), params, atol=1e-6)
print("all the same")
"""


@pytest.mark.long
def test_with_shardings_it_is_placed_like_the_params():
    """On eight devices, whole or part by part, from host arrays or sharded ones."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED],
        env=launch.on_cpu(8),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "all the same\n", done.stderr[-2000:]


# --- Reading


class Log:
    """What sources were asked for, and the bytes of theirs that are alive."""

    def __init__(self):
        self.reads, self.held, self.most, self._lock = [], 0, 0, threading.Lock()

    def add(self, read, part):
        with self._lock:
            self.reads.append(read)
            self.held += part.nbytes
            self.most = max(self.most, self.held)
        weakref.finalize(part, self._release, part.nbytes)

    def _release(self, size):
        with self._lock:
            self.held -= size


class Counted(reconstruction.Source):
    """A source of two leaves, or others, that tells a log what is read."""

    def __init__(self, seed, log=None, shapes=(("v", (300, 700)), ("w", (50,)))):
        rng = np.random.default_rng(seed)
        self.data = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes}
        self.leaves = {
            n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in self.data.items()
        }
        self._log, self._seed = log or Log(), seed

    def read(self, path, index):
        part = np.array(self.data[path][index])  # a copy; of 0-d ones as well
        self._log.add((self._seed, path, part.nbytes), part)
        return part


@pytest.mark.parametrize("small", [None, 1, 10_000_000])
def test_every_leaf_is_read_once_whatever_the_batches(small, monkeypatch):
    """Blocks, batches and reading ahead do not change the sums, to one rounding."""
    if small is not None:
        monkeypatch.setattr(sums, "_SMALL", small)
        monkeypatch.setattr(sums, "_BLOCK", 1000)
    log = Log()
    sources = [Counted(seed, log) for seed in range(20)]
    snapshots = [Snapshot(10 * i + 10, 6.94, s) for i, s in enumerate(sources)]
    found = reconstruct(snapshots, width=[0.1, 0.08])
    assert sorted(log.reads) == sorted(
        (seed, name, leaf.nbytes)
        for seed, source in enumerate(sources)
        for name, leaf in source.data.items()
    )
    for one in found:
        for name in ("v", "w"):
            terms = np.stack([s.data[name] for s in sources]).astype(np.float64)
            expected = np.tensordot(one.coefficients, terms, axes=1)
            # 3e-8 is one rounding to float32. Where a leaf is as large as the model and
            # summed in batches, partial sums are kept in float32 too.
            bound = 3e-7 if small == 1 and name == "v" else 3e-8
            assert reference.relative_rms(one.tree[name], expected) < bound
    # Two items: of a leaf that is nearly the whole model, one each.
    model = sum(leaf.nbytes for leaf in sources[0].data.values())
    assert log.held == 0
    assert 0 < log.most <= max(2 * model, sums._SMALL)


def test_one_model_is_held_while_many_are_read(monkeypatch):
    """Of 40 sources of 40 leaves: 20 leaves, and the next 20 as soon as they can be."""
    monkeypatch.setattr(sums, "_SMALL", 0)
    start = sums._Reader._start

    def read_first(self, item):
        waiting = start(self, item)
        concurrent.futures.wait(waiting)
        return waiting

    monkeypatch.setattr(sums._Reader, "_start", read_first)
    log = Log()
    shapes = [(f"{i:02}", (100,)) for i in range(40)]
    sources = [Counted(seed, log, shapes) for seed in range(40)]
    reconstruction.merge(sources, reconstruction.uniform_coefficients(40))
    assert len(log.reads) == 40 * 40
    assert log.held == 0
    assert log.most == 40 * 400


def test_an_error_while_reading_is_passed_on():
    """As it was raised, and no thread is left."""

    class Broken(Counted):
        def read(self, path, index):
            if path == "w":
                raise OSError("the disk is gone")
            return super().read(path, index)

    sources = [Counted(0), Broken(1), Counted(2)]
    with pytest.raises(OSError, match="the disk is gone"):
        reconstruction.merge(sources, reconstruction.uniform_coefficients(3))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("ema_optax")]


def test_sources_without_params_give_nested_dicts():
    """Leaf by leaf, as their paths say."""
    shapes = [("a/0", (2,)), ("a/b", (3,)), ("c", ())]
    sources = [Counted(seed, None, shapes) for seed in range(2)]
    tree = reconstruction.merge(sources, [0.0, 1.0])
    np.testing.assert_array_equal(tree["a"]["0"], sources[1].data["a/0"])
    np.testing.assert_array_equal(tree["a"]["b"], sources[1].data["a/b"])
    assert tree["c"] == sources[1].data["c"]


def test_progress_counts_to_the_end():
    """A function gets the work done and all of it."""
    seen = []
    reconstruct(_snapshots(), width=0.07, progress=lambda *done: seen.append(done))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_progress_true_prints_a_bar(capsys, monkeypatch):
    """With rich; without it the extra is named that brings it."""
    found = reconstruct(_snapshots(), width=0.07, progress=True)
    assert found.width == 0.07
    assert "100%" in capsys.readouterr().err
    reconstruct(_snapshots(), width=0.07)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ema-optax\[cli\]'"):
        reconstruct(_snapshots(), width=0.07, progress=True)


# --- Planning


def test_a_plan_is_what_coefficients_give():
    """At the last step, with the ridge of the dtype; the bytes of all shadows."""
    plan = reconstruction.plan(20_000, snapshots=32, widths=(0.03, 0.15), params=1000)
    steps, exponents = _schedule(32)
    assert plan.steps == tuple(range(625, 20_001, 625))
    for width, error, gain in zip(
        plan.widths, plan.profile_errors, plan.noise_gains, strict=True
    ):
        wanted = ema_optax.exponent_from_width(width)
        x, distance = reference.projection(steps, exponents, wanted, 20_000)
        assert error == pytest.approx(distance, rel=1e-3)
        assert gain == pytest.approx(np.linalg.norm(x), rel=1e-3)
        ridge = reconstruction.rounding_variance("float16")
        args = (steps, exponents, wanted, 20_000)
        ridged = reconstruction.coefficients(*args, ridge=ridge)
        assert gain == pytest.approx(np.linalg.norm(ridged), rel=1e-9)
        again = reconstruction.profile_error(ridged, *args)
        assert error == pytest.approx(again, rel=1e-6)
    assert plan.bytes == 32 * 2 * 1000 * 2
    assert plan.reachable is not None
    low, high = plan.reachable
    for width in (low * 1.01, high * 0.99):
        g = ema_optax.exponent_from_width(width)
        assert reference.projection(steps, exponents, g, 20_000)[1] < 0.0101


def test_a_plan_counts_what_is_averaged():
    """Of params or abstract params; a number is taken as it is, 7e9 as well."""
    params = _params()
    count = 12 + 4 + 2 + 1 + 0 + 2
    few = {"snapshots": 2, "widths": (0.1,), "tracked": (0.1,), "dtype": None}
    for given, expected in (
        (params, count),
        (
            jax.eval_shape(lambda: {k: v for k, v in params.items() if k != "flag"}),
            count,
        ),
        (7, 7),
        (np.int64(7), 7),
        (7e9, 7 * 10**9),
    ):
        assert reconstruction.plan(100, params=given, **few).bytes == expected * 2 * 4
    assert reconstruction.plan(np.int64(100), **few).bytes is None
    assert reconstruction.plan([30, 10, 20, 10], **few).steps == (10, 20, 30)


@pytest.mark.long
def test_a_plan_knows_the_rounding_of_what_it_saves():
    """bfloat16 narrows what is reachable; a snapshot at every step is the most."""
    for dtype in ("bfloat16", "float32"):
        found = reconstruction.plan(512, snapshots=512, dtype=dtype)
        assert found.steps == tuple(range(1, 513))
        ridge = reconstruction.rounding_variance(dtype)
        steps = np.repeat(found.steps, 2)
        exponents = [ema_optax.exponent_from_width(w) for w in found.tracked] * 512
        assert found.reachable == reconstruction.reachable(
            steps, exponents, 512, error=0.01, ridge=ridge
        )
    assert reconstruction.plan(40, snapshots=1).steps == (40,)
    with pytest.raises(ValueError, match="between 1 and 40 snapshots"):
        reconstruction.plan(40, snapshots=41)


def test_a_plan_reads_as_a_table():
    """One line a width, the sizes above, the reach below."""
    found = reconstruction.plan(100_000, widths=(0.02, 0.15), params=10**8)
    assert str(found).splitlines() == [
        "64 snapshots of 2 widths (0.05, 0.1), 25.6 GB",
        " width  profile error  noise gain",
        "  0.02          1.08%       17.30",
        "  0.15          0.06%        0.80",
        "widths within 1 %: 0.0207 to 0.241",
    ]
    lone = reconstruction.plan([5], tracked=(0.1,), widths=(0.1,))
    assert "1 snapshots of 1 widths (0.1)\n" in str(lone)
    poor = reconstruction.plan([5], tracked=(0.2886,), widths=(0.1,))
    assert str(poor).endswith("\nwidths within 1 %: none")


@pytest.mark.parametrize(
    ("steps", "options", "error", "message"),
    [
        (10, {"snapshots": 11}, ValueError, "between 1 and 10 snapshots in 10"),
        (10, {"snapshots": 0}, ValueError, "got 0"),
        ([], {}, ValueError, "the length of a run, or steps of snapshots"),
        ([-5, 5], {}, ValueError, "steps > 0"),
        (100, {"tracked": ()}, ValueError, r"such as \(0\.05, 0\.10\)"),
        (100, {"tracked": (0.1, 0.1)}, ValueError, "same step"),
        (100, {"tracked": (0.3,)}, ValueError, r"got 0\.3"),
        (100, {"widths": (0.3,)}, ValueError, r"got 0\.3"),
        (100.5, {}, TypeError, "whole number"),
    ],
)
def test_a_plan_refuses(steps, options, error, message):
    """Schedules that are none."""
    with pytest.raises(error, match=message):
        reconstruction.plan(steps, **options)
