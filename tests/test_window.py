"""window(n): the mean of a window at every update, late in a run, and resumed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import Decay, checkpoint, ema_params, scale_to_batch, start_after, window
from ema_optax._averages.starting import settled_count
from tests.older import enable_x64
from tests.reference import relative_rms
from tests.runs import drifting, follow
from tests.same import assert_same

BOUND = 2e-7  # of the mean; params one update late change at least 1e-3 of it


def means(held, n, start=0):
    """Returns the float64 mean after each update since its window began."""
    held = np.asarray(held, np.float64)
    steps = range(1, 1 + len(held))
    first = [t - (t - 1 - start) % n if t > start else t for t in steps]
    return [held[a - 1 : t].mean(axis=0) for t, a in enumerate(first, start=1)]


def shadows(transform, path, state=None):
    """Returns the shadow after each update, and the params the model held then."""
    step = jax.jit(transform.update)
    state = transform.init({"w": path[0]}) if state is None else state
    found, held = [], []
    for old, new in itertools.pairwise(path):
        updates = {"w": new - old}
        _, state = step(updates, state, {"w": old})
        held.append(optax.apply_updates({"w": old}, updates)["w"])
        found.append(state.shadow["w"])
    return found, held


@pytest.fixture(scope="module")
def path():
    return jnp.asarray(drifting(50, 16), jnp.float32)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 60])
def test_the_mean_since_the_window_began_at_every_update(path, n):
    """In float64, at every t; the first of a window is a copy, to the last bit."""
    found, held = shadows(ema_params(window(n)), path)
    for t, (shadow, expected) in enumerate(zip(found, means(held, n), strict=True), 1):
        assert relative_rms(shadow, expected) <= BOUND
        if t % n == 0:  # exactly the last n
            last = np.asarray(held[t - n : t], np.float64).mean(axis=0)
            assert relative_rms(shadow, last) <= BOUND
        if (t - 1) % n == 0:
            np.testing.assert_array_equal(shadow, held[t - 1])
    late = [path[0], *held[:-1]]
    for wrong in (means(late, n), means(held, n, start=1), means(held, n + 1)):
        if 1 < n < 60:
            assert max(map(relative_rms, found, wrong)) > 100 * BOUND


@pytest.mark.parametrize(("n", "every"), [(6, 2), (6, 3), (6, 6), (10, 3), (3, 5)])
def test_a_fold_stands_for_the_updates_of_its_window_since_the_last(path, n, every):
    """Where `every` divides n a plain mean; else its share; never another window."""
    found, held = shadows(ema_params(window(n), every=every), path)
    for t in range(every, len(found) + 1, every):
        began = t - (t - 1) % n
        folds = range(t - (t - began) // every * every, t + 1, every)
        shares = [min(every, fold - began + 1) for fold in folds]
        params = np.asarray([held[fold - 1] for fold in folds], np.float64)
        expected = np.average(params, axis=0, weights=shares)
        assert relative_rms(found[t - 1], expected) <= BOUND
        if n % every == 0:
            np.testing.assert_allclose(expected, params.mean(axis=0), rtol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("before", [2**24, 10 * 2**24, 2**31 - 40])
@pytest.mark.parametrize("n", [5, 2**20 + 1])
def test_exact_where_float32_cannot_count(before, n):
    """From 2²⁴ on float32 knows every second update; the position is an integer."""
    steps = np.arange(before - 4, before + 9)
    position = (steps - 1) % n + 1
    for every in (1, 3):
        weights = np.minimum(every / position, 1)
        for decay, at in (
            (window(n), steps),
            (start_after(window(n), 7), steps + 7),
            (start_after(window(n), 7.0), steps + 7),
        ):
            for call in (
                decay.newest_weight,
                jax.jit(decay.newest_weight, static_argnums=1),
            ):
                for given in (
                    at,
                    jnp.asarray(at, jnp.int32),
                    jnp.asarray(at, jnp.uint32),
                ):
                    np.testing.assert_allclose(call(given, every), weights, rtol=3e-7)
    later = start_after(window(5), jnp.int32(before))  # counted on the device
    np.testing.assert_array_equal(
        jax.jit(lambda t: later(t))(jnp.int32(before) + jnp.arange(-1, 8)) == 0,
        [True, True, True, False, False, False, False, True, False],
    )
    assert later(before + 3) == pytest.approx(2 / 3)


def test_a_run_goes_over_the_end_of_float32(path):
    """The shadow itself, in a state that has seen 2²⁴ − 3 updates."""
    transform = ema_params(window(4))
    state = transform.init({"w": path[0]})
    state = state._replace(count=jnp.int32(2**24 - 4))
    found, held = shadows(transform, path[:13], state)
    for shadow, expected in zip(found, means(held, 4), strict=True):
        assert relative_rms(shadow, expected) <= BOUND


def test_windows_may_start_later(path):
    """The first one begins after the step; until there the params are copied."""
    found, held = shadows(ema_params(start_after(window(6), 8)), path)
    for shadow, expected in zip(found, means(held, 6, start=8), strict=True):
        assert relative_rms(shadow, expected) <= BOUND
    np.testing.assert_array_equal(found[8], held[8])


@pytest.mark.long
def test_steps_of_any_kind():
    """Floats that are whole, and integers that float64 cannot hold."""
    for step in (13.0, np.float32(13), np.uint8(13), 5 * 10**30 + 3, 5 * 2**60 + 3):
        assert 0 <= window(5)(step) < 1
    assert window(5)(13.0) == window(5)(np.uint8(13))
    # To an ulp: exp and log1p are those of the processor.
    assert window(5)(13.0) == pytest.approx(2 / 3, rel=3e-16)
    assert window(5)(5 * 2**60 + 3) == window(5)(13.0)
    byte = jnp.asarray([253, 255], jnp.uint8)
    np.testing.assert_allclose(window(254)(byte), [252 / 253, 0], rtol=1e-6)
    assert start_after(window(5), 10**300)(99) == 0
    with enable_x64(True):
        assert window(5).newest_weight(jnp.int64(5 * 2**40 + 3)) == pytest.approx(1 / 3)


def test_for_another_batch_its_length_is_divided():
    """As many samples; where that is no whole number of updates, the two next to it."""
    assert scale_to_batch(window(96), 8) == window(12)
    assert scale_to_batch(window(3), 0.1) == window(30)
    near = r"of 12\.5 updates.*take window\(12\) or window\(13\)"
    with pytest.raises(ValueError, match=near):
        scale_to_batch(window(100), 8)
    with pytest.raises(ValueError, match=r"of 0\.375 updates.*take window\(1\)\.$"):
        scale_to_batch(window(3), 8)
    with pytest.raises(ValueError, match=r"below 2³¹"):
        scale_to_batch(window(3), 5e-324)
    with pytest.raises(ValueError, match=r"Scale both: start_after\(scale_to_batch"):
        scale_to_batch(start_after(start_after(window(8), 1), 3), 2)
    with pytest.raises(TypeError, match=r"cannot be traced.*outside jit"):
        jax.jit(lambda factor: scale_to_batch(window(8), factor)(3))(2.0)


@pytest.mark.parametrize("n", [2.0, 2.5, True, None, "3", float("inf"), np.ones(2)])
def test_a_length_of_another_kind_is_refused(n):
    with pytest.raises(TypeError, match=r"window's n must be a whole number ≥ 1, got"):
        window(n)


def test_a_length_is_a_plain_number():
    """NumPy's and JAX's integers become Python's; a traced one is refused."""
    for n in (np.int64(5), jnp.int32(5)):
        assert window(n).to_json() == '{"kind": "window", "n": 5}'
    with pytest.raises(TypeError, match="got an array int32"):
        jax.jit(lambda n: window(n)(3))(5)
    with pytest.raises(ValueError, match=r"Not the arguments of window.* got 5\.0"):
        Decay.from_json('{"kind": "window", "n": 5.0}')


def test_what_it_averages_over():
    """All of the weight on the last n at the end of a window, equally."""
    run = ema_optax.profile(window(10), 30)
    np.testing.assert_allclose(run.weights, [0] * 20 + [0.1] * 10, rtol=1e-14)
    assert (run.initial_weight, run.mean_age) == (0, pytest.approx(4.5))
    assert run.effective_size == pytest.approx(10)
    middle = ema_optax.profile(window(10), 33)
    np.testing.assert_allclose(middle.weights, [0] * 30 + [1 / 3] * 3, rtol=1e-14)


@pytest.mark.long
def test_figures_of_a_window(path):
    """β of the newest update, and nothing of the initial params."""
    state, held = follow(ema_params(window(5)), path[:9])
    figures = ema_optax.metrics(state, {"w": jnp.asarray(held[-1])})
    assert figures["decay"] == pytest.approx(2 / 3)
    assert figures["initial_weight"] == 0
    assert figures["dead_zone"] == pytest.approx(3 * 2**-24)


@pytest.mark.parametrize("decay", [window(2), window(3), start_after(window(3), 9)])
def test_a_window_never_settles(decay):
    """Whatever remainder the powers of two happen to leave; one of 1 is a copy."""
    with pytest.raises(ValueError, match="depends on the count for ever"):
        settled_count(decay)
    assert settled_count(window(1)) == 1


OPTIMIZER = optax.chain(optax.adam(0.1), ema_params(window(5)))


@jax.jit
def train(params, state):
    updates, state = OPTIMIZER.update(jax.tree.map(jnp.sin, params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("saved_at", range(5, 11))
def test_a_resumed_window_goes_on_to_the_bit(tmp_path, saved_at):
    """Saved after each update of a window, and resumed there: the same next window."""
    params = {"w": jnp.linspace(-1, 1, 8)}
    run = params, OPTIMIZER.init(params)
    runs = [run := train(*run) for _ in range(16)]
    checkpoint.save(tmp_path, *runs[saved_at - 1], step=saved_at)
    blank = jax.eval_shape(OPTIMIZER.init, params)
    again = checkpoint.resume(tmp_path, params, blank)
    for expected in runs[saved_at - 1 :]:
        assert_same(again, expected)
        again = train(*again)


def test_a_checkpoint_knows_the_window(tmp_path):
    """Its decay is described, and another length is not resumed unasked."""
    params = {"w": jnp.ones(2)}
    checkpoint.save(tmp_path, *train(params, OPTIMIZER.init(params)))
    assert checkpoint.describe(tmp_path).trees["shadow"].decay == window(5)
    other = optax.chain(optax.adam(0.1), ema_params(window(6)))
    with pytest.raises(ValueError, match=r"window\(n=5\).*window\(n=6\)"):
        checkpoint.resume(tmp_path, params, other.init(params))
