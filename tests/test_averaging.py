"""The transform: its numbers against float64, its options, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from tests import reference
from tests.runs import drifting, follow

STEPS = 20_000


@pytest.fixture(scope="module")
def path():
    return drifting(STEPS, 64)


@pytest.mark.parametrize(
    ("kind", "args", "decay", "every", "bound"),
    [
        # 2e-6 is a hundred times below what folding one step earlier would change.
        ("warmup", (0.9999,), ema_optax.warmup(0.9999), 1, 2e-6),
        ("power", (16.97,), ema_optax.power(exponent=16.97), 1, 2e-6),
        ("warmup", (0.999,), ema_optax.warmup(0.999), 7, 2e-6),
        ("power", (6.94,), ema_optax.power(exponent=6.94), 10, 2e-6),
        ("constant", (0.9999,), ema_optax.constant(0.9999), 16, 2e-6),
        ("debiased", (0.9999,), ema_optax.debiased(0.9999), 2, 2e-6),
        ("debiased", (0.9999,), ema_optax.debiased(0.9999), 7, 2e-6),
        ("uniform", (), ema_optax.uniform(), 1, 2e-6),
        # Here w·(p − s) is 1e-5 of s: the sum itself rounds. The late one is at 1.4e-5.
        ("constant", (0.99999,), ema_optax.constant(0.99999), 1, 6e-6),
    ],
)
def test_exact_over_20000_noisy_steps(path, kind, args, decay, every, bound):
    """The float32 shadow against float64 folds of the very params the model held."""
    state, held = follow(ema_optax.ema_params(decay, every=every), path)
    decays = reference.betas(kind, STEPS, *args)
    expected = reference.average(held, decays, every, start=path[0])
    assert reference.relative_rms(state.shadow["w"], expected) <= bound
    assert int(state.count) == STEPS
    # The bound has teeth: an average that is one step late lies well outside it.
    late = reference.average(
        np.concatenate([path[:1], held[:-1]]), decays, every, start=path[0]
    )
    assert reference.relative_rms(late, expected) > 2 * bound


@pytest.mark.parametrize("decay", [0.9999, ema_optax.power(0.05), ema_optax.uniform()])
@pytest.mark.parametrize("every", [1, 7])
def test_constant_params_are_a_fixed_point(decay, every):
    """Params that never move are averaged to themselves, within 2e-7."""
    constant = np.tile(np.float32([0.1, -3.7, 1e-8, 1e30, 0.0]), (5001, 1))
    state, _ = follow(ema_optax.ema_params(decay, every=every), constant)
    np.testing.assert_allclose(state.shadow["w"], constant[0], rtol=2e-7, atol=0)


def test_bfloat16_params_have_a_float32_shadow_that_moves():
    """0 → 1 at .999 over 5,000 steps is 1 − .999⁵⁰⁰⁰ = .99328; naive bfloat16: .25."""
    ones = jnp.ones((5001, 8), jnp.bfloat16).at[0].set(0)
    state, _ = follow(ema_optax.ema_params(ema_optax.constant(0.999)), ones)
    assert state.shadow["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.shadow["w"], 1 - 0.999**5000, rtol=2e-6)


@pytest.mark.long
def test_a_bfloat16_shadow_is_right_on_average():
    """Stochastic rounding: the mean over elements is within 4e-3, and none is stuck."""
    ones = jnp.ones((5001, 4096), jnp.bfloat16).at[0].set(0)
    transform = ema_optax.ema_params(
        ema_optax.constant(0.999), shadow_dtype=jnp.bfloat16
    )
    state, _ = follow(transform, ones)
    shadow = np.asarray(state.shadow["w"], np.float64)
    assert state.shadow["w"].dtype == jnp.bfloat16
    assert np.mean(shadow) == pytest.approx(1 - 0.999**5000, abs=4e-3)
    assert np.min(shadow) > 0.95
    assert len(np.unique(shadow)) > 3


def test_a_bfloat16_shadow_of_noisy_params_is_within_two_percent():
    """Relative RMS error of a few 1e-3 to 2e-2, as rounding of two bytes allows."""
    transform = ema_optax.ema_params(0.999, shadow_dtype="bfloat16")
    path = drifting(5000, 256, noise=0.1)
    state, held = follow(transform, path)
    decays = reference.betas("warmup", 5000, 0.999)
    expected = reference.average(held, decays, start=path[0])
    assert reference.relative_rms(state.shadow["w"], expected) < 2e-2


def test_it_folds_what_the_model_holds_after_the_update():
    """bfloat16 params: the rounded sum is averaged, not the exact one."""
    params = {"w": jnp.asarray([1.0], jnp.bfloat16)}
    transform = ema_optax.ema_params(ema_optax.constant(0.5))
    updates = {"w": jnp.asarray([1e-3], jnp.bfloat16)}  # lost: 1 + 1e-3 rounds to 1
    _, state = transform.update(updates, transform.init(params), params)
    assert state.shadow["w"][0] == 1.0


def test_updates_pass_through_untouched():
    """The very arrays come back, so chaining it last changes no training run."""
    params = {"w": jnp.arange(3.0)}
    updates = {"w": jnp.asarray([0.1, jnp.nan, -0.0])}
    transform = ema_optax.ema_params(0.9)
    out, _ = transform.update(updates, transform.init(params), params)
    assert out["w"] is updates["w"]


@pytest.mark.long
def test_several_shadows_are_each_the_one_of_its_own(path):
    """A dict of decays gives the same bits as a transform for each."""
    decays = {"fast": 0.99, "slow": ema_optax.power(0.1)}
    both, _ = follow(ema_optax.ema_params(decays, every=3), path[:200])
    for name, decay in decays.items():
        alone, _ = follow(ema_optax.ema_params(decay, every=3), path[:200])
        np.testing.assert_array_equal(both.shadow[name]["w"], alone.shadow["w"])
        assert int(both.count) == int(alone.count)


def test_the_mask_leaves_leaves_out():
    """A tree of bools, a prefix of one, or a function; placeholders in the state."""
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(2)}, "c": jnp.ones(2)}
    placeholder = optax.MaskedNode()

    def only_c(tree):
        return {"a": jax.tree.map(lambda _: False, tree["a"]), "c": True}

    for mask in (
        {"a": {"w": False, "b": False}, "c": True},
        {"a": False, "c": True},
        only_c,
    ):
        transform = ema_optax.ema_params(0.9, mask=mask)
        state = transform.init(params)
        assert state.shadow["a"] == {"w": placeholder, "b": placeholder}
        updates = jax.tree.map(jnp.ones_like, params)
        _, state = jax.jit(transform.update)(updates, state, params)
        assert state.shadow["a"] == {"w": placeholder, "b": placeholder}
        np.testing.assert_allclose(state.shadow["c"], 1 + (1 - 2 / 11), rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 2, 3])
def test_overwrite_every_makes_params_the_shadow(every):
    """After every N-th update the model holds the shadow; between, nothing changes."""
    path = drifting(12, 32, noise=0.05)
    plain = ema_optax.ema_params(0.9, every=every)
    overwriting = ema_optax.ema_params(0.9, every=every, overwrite_every=6)
    reference_state, held = follow(plain, path[:7])
    state, overwritten = follow(overwriting, path[:7])
    np.testing.assert_array_equal(state.shadow["w"], reference_state.shadow["w"])
    np.testing.assert_array_equal(overwritten[:5], held[:5])
    np.testing.assert_array_equal(overwritten[5], state.shadow["w"])
    _, onward = follow(overwriting, path)
    np.testing.assert_allclose(onward[6], path[7], rtol=1e-6)  # then trains on


def test_complex_params_are_overwritten_too():
    """Both of their parts, and what is not averaged stays."""
    params = {"count": jnp.int32(7), "w": jnp.asarray([1 + 2j, 3 - 4j], jnp.complex64)}
    transform = ema_optax.ema_params(0.5, overwrite_every=1)
    changes = {**params, "count": jnp.int32(0)}
    updates, state = transform.update(changes, transform.init(params), params)
    assert updates["count"] == 0
    held = optax.apply_updates(params, updates)["w"]
    np.testing.assert_array_equal(held, state.shadow["w"])
    assert np.all(np.asarray(held).imag != np.asarray(params["w"]).imag)


def test_a_state_made_by_hand_is_folded_like_its_own():
    """One that does not record what it is made with, as another library makes it."""
    params = {"w": jnp.asarray([1.0, 2.0]), "b": jnp.ones(1)}
    transform = ema_optax.ema_params(0.9, mask={"w": True, "b": False})
    state = transform.init(params)
    plain = ema_optax.EmaParamsState(state.count, state.shadow)
    _, expected = transform.update(params, state, params)
    _, actual = transform.update(params, plain, params)
    np.testing.assert_array_equal(actual.shadow["w"], expected.shadow["w"])
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


@pytest.mark.parametrize("update", [jnp.bfloat16, jnp.float16, float])
def test_narrow_updates_overwrite_to_the_last_bit(update):
    """Updates of bfloat16 gradients could not move float32 params there."""
    transform = ema_optax.ema_params(ema_optax.constant(0.9), overwrite_every=3)
    params = {"w": jnp.float32(1.2345678)}
    state = transform.init(params)
    for _ in range(3):
        updates, state = transform.update({"w": update(-0.31)}, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"].dtype == jnp.float32
    np.testing.assert_array_equal(params["w"], state.shadow["w"])


def test_overwriting_is_within_an_ulp_even_from_far_away():
    """It is exact where s/2 ≤ p ≤ 2s, else within an ulp of the larger part."""
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = {"w": jnp.asarray(rng.standard_normal(2000), dtype)}
        transform = ema_optax.ema_params(0.9, overwrite_every=1)
        state = transform.init({"w": jnp.asarray(rng.standard_normal(2000), dtype)})
        updates, state = transform.update(
            {"w": jnp.zeros_like(params["w"])}, state, params
        )
        held = optax.apply_updates(params, updates)["w"].astype(jnp.float32)
        target = state.shadow["w"].astype(dtype).astype(jnp.float32)
        p = params["w"].astype(jnp.float32)
        scale = np.maximum(np.abs(p), np.abs(target - p))
        assert np.max(np.abs(held - target) / scale) <= jnp.finfo(dtype).eps
        near = np.asarray((p / target >= 0.5) & (p / target <= 2))
        assert near.sum() > 100
        np.testing.assert_array_equal(np.asarray(held)[near], np.asarray(target)[near])


def test_update_shadow_is_one_fold():
    """A given β, concrete or traced; integers stay; β = 0 is the params themselves."""
    shadow = {"w": jnp.asarray([2.0]), "n": jnp.int32(5)}
    params = {"w": jnp.asarray([4.0], jnp.bfloat16), "n": jnp.int32(9)}
    new = ema_optax.update_shadow(shadow, params, 0.75)
    assert new == {"w": jnp.asarray([2.5]), "n": 5}
    traced = jax.jit(ema_optax.update_shadow)(shadow, params, jnp.float32(0.75))
    assert traced["w"] == 2.5
    assert ema_optax.update_shadow(shadow, params, 0)["w"] == 4.0


def test_update_shadow_takes_a_decay_at_a_count():
    """A Decay is exact where its β in float32 is 1.3e-3 off."""
    zeros, ones = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    decay = ema_optax.constant(0.99999)
    fold = jax.jit(lambda t: ema_optax.update_shadow(zeros, ones, decay, count=t))
    np.testing.assert_allclose(fold(jnp.int32(3))["w"], 1e-5, rtol=1e-6)
    with pytest.raises(ValueError, match="count=step"):
        ema_optax.update_shadow(zeros, ones, decay)


def test_update_shadow_rounds_bfloat16_stochastically_with_a_count():
    """With a count the mean moves as it should; without one it is refused."""
    ones = {"w": jnp.ones(4096, jnp.bfloat16)}
    shadow = {"w": jnp.zeros(4096, jnp.bfloat16)}

    def step(shadow, t):
        return ema_optax.update_shadow(shadow, ones, 0.999, count=t), None

    shadow, _ = jax.lax.scan(step, shadow, jnp.arange(1000))
    mean = float(jnp.mean(shadow["w"].astype(jnp.float32)))
    assert mean == pytest.approx(1 - 0.999**1000, abs=4e-3)
    with pytest.raises(ValueError, match=r"bfloat16 shadow at 'w'.*float32"):
        ema_optax.update_shadow(shadow, ones, 0.999)
    half = {"w": jnp.zeros(2, jnp.float16)}
    with pytest.raises(ValueError, match="float16 shadow at 'w'"):
        ema_optax.update_shadow(half, half, 0.999, count=1)


PARAMS = {"dense": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}


def _update(transform, updates=None, state=None, params=PARAMS):
    state = transform.init(PARAMS) if state is None else state
    updates = jax.tree.map(jnp.zeros_like, PARAMS) if updates is None else updates
    return transform.update(updates, state, params)


@pytest.mark.parametrize(
    ("call", "error", "wrong"),
    [
        (lambda: ema_optax.ema_params(1.0), ValueError, r"\[0, 1\), got 1.0"),
        (lambda: ema_optax.ema_params(-0.5), ValueError, r"\[0, 1\), got -0.5"),
        (lambda: ema_optax.ema_params("0.9"), TypeError, "got '0.9'"),
        (
            lambda: ema_optax.ema_params(jnp.bfloat16(0.999)),
            TypeError,
            "bfloat16 array, which cannot tell 0.999 from 1",
        ),
        (lambda: ema_optax.ema_params({}), ValueError, "empty dict"),
        (lambda: ema_optax.ema_params({"a/b": 0.9}), ValueError, "got 'a/b'"),
        (lambda: ema_optax.ema_params({3: 0.9}), ValueError, "got 3"),
        (lambda: ema_optax.ema_params(0.9, every=0), ValueError, "≥ 1, got 0"),
        (lambda: ema_optax.ema_params(0.9, every=2.0), ValueError, "≥ 1, got 2.0"),
        (lambda: ema_optax.ema_params(0.9, every=True), ValueError, "got True"),
        (
            lambda: ema_optax.ema_params(0.9, every=jnp.int32(2)),
            TypeError,
            r"static_args=\('every'",
        ),
        (
            lambda: ema_optax.ema_params(0.9, overwrite_every=0),
            ValueError,
            "^overwrite_every must be .* got 0",
        ),
        (
            lambda: ema_optax.ema_params(
                0.9, shadow_dtype="bfloat16", rounding="nearest"
            ),
            ValueError,
            "^A bfloat16 shadow rounded to nearest does not move",
        ),
        (
            lambda: ema_optax.ema_params({"a": 0.9, "b": 0.99}, overwrite_every=5),
            ValueError,
            "writes one shadow into the params, got 2: a, b",
        ),
        (
            lambda: ema_optax.ema_params(0.9, shadow_dtype="float16"),
            ValueError,
            "got float16.*bfloat16",
        ),
        (
            lambda: ema_optax.ema_params(0.9, shadow_dtype="float64"),
            ValueError,
            "jax_enable_x64",
        ),
        (
            lambda: ema_optax.ema_params(0.9, mask={"dense": 1}).init(PARAMS),
            ValueError,
            "mask must hold bools.*got 1",
        ),
        (
            lambda: ema_optax.ema_params(0.9, mask={"other": True}).init(PARAMS),
            ValueError,
            "mask does not fit the params.*other",
        ),
        (
            lambda: _update(ema_optax.ema_params(0.9), params=None),
            ValueError,
            r"^ema_params averages .*optimizer.update\(updates, state, params\)",
        ),
        (
            lambda: _update(
                ema_optax.ema_params(0.9), params={"dense": {"w": jnp.ones((2, 3))}}
            ),
            ValueError,
            r"'dense/b' is only in the shadow.*optimizer.init\(params\)",
        ),
        (
            lambda: _update(
                ema_optax.ema_params(0.9),
                params={"dense": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}},
            ),
            ValueError,
            r"'dense/w' is float32\[2,3\] in the shadow and float32\[3,2\] in the p",
        ),
        (
            lambda: _update(ema_optax.ema_params(0.9), updates={"w": 0.0}),
            ValueError,
            "Updates and params do not fit",
        ),
        (
            lambda: _update(
                ema_optax.ema_params({"a": 0.9}),
                state=ema_optax.ema_params({"b": 0.9}).init(PARAMS),
            ),
            ValueError,
            r"shadows \['b'\], ema_params was given decays for \['a'\]",
        ),
        (
            lambda: ema_optax.update_shadow(PARAMS, PARAMS, 1.5),
            ValueError,
            r"update_shadow needs a decay in \[0, 1\), got 1.5",
        ),
        (
            lambda: ema_optax.update_shadow(PARAMS, {"dense": jnp.ones(2)}, 0.5),
            ValueError,
            "'dense/b' and 1 more is only in the shadow",
        ),
        (
            lambda: ema_optax.update_shadow([PARAMS], (PARAMS,), 0.5),
            ValueError,
            r"the shadow is built of .*\[\{.* and the params of .*\(\{",
        ),
        (
            lambda: ema_optax.update_shadow({"w": 2.5}, {"w": jnp.ones(2)}, 0.5),
            ValueError,
            r"'w' is 2.5 in the shadow and float32\[2\] in the params",
        ),
        (
            lambda: ema_optax.update_shadow(PARAMS, PARAMS, jnp.bfloat16(0.9)),
            TypeError,
            "bfloat16",
        ),
    ],
)
def test_bad_input_is_an_error_with_the_call_that_works(call, error, wrong):
    """What was found, where, and what to write instead."""
    with pytest.raises(error, match=wrong):
        call()


def test_stochastic_rounding_follows_params_that_settle():
    """From 1 towards 1 + 2e-3 at .99999: nearest never moves (dead zone 6e-3).

    After 200,000 folds 1 − .99999²⁰⁰⁰⁰⁰ = 86.47 % of the way; one e-fold of the decay
    too many or too few would be 5 % off.
    """
    decay, steps = ema_optax.constant(0.99999), 200_000
    start = {"w": jnp.ones(256)}
    zero = {"w": jnp.zeros(256)}
    params = {"w": jnp.full(256, 1.002)}

    def run(**options):
        transform = ema_optax.ema_params(decay, **options)

        def fold(state, _):
            return transform.update(zero, state, params)[1], None

        scan = jax.jit(lambda s: jax.lax.scan(fold, s, None, length=steps)[0])
        return np.asarray(scan(transform.init(start)).shadow["w"], np.float64)

    assert (run() == 1).all()
    moved = run(rounding="stochastic") - 1
    expected = (np.float64(np.float32(1.002)) - 1) * (1 - 0.99999**steps)
    assert abs(moved.mean() / expected - 1) < 3e-3  # noise .5·ulp·√(1/2w)/√256: 6e-4
    assert np.abs(moved / expected - 1).max() < 5e-2


def test_a_mask_is_asked_at_init_alone():
    """A function that looks at values, or at Flax's variables, is never traced."""
    asked = []

    def mask(tree):
        asked.append(1)
        return jax.tree.map(lambda x: bool(jnp.all(x > 0)), tree)

    transform = ema_optax.ema_params(0.9, mask=mask)
    params = {"w": jnp.ones(2), "b": jnp.zeros(2)}
    state = transform.init(params)
    jax.jit(transform.update)(params, state, params)
    assert len(asked) == 1
