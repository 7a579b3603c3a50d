"""The numbers of a common tutorial on averaged weights, to the last digits printed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax

# A few float32 ulps: the tutorial's own fold takes 1 − β in float32. The slowest of its
# shadows still moves by 2.6e-5 of itself a fold: one fold late or early fails.
CLOSE = {"rtol": 1e-6}

# (w, n) of every fold: the weight, and the step number that the warm-up is told.
JUMP = [(1, 1)] * 3 + [(10, 100)] * 93
CLIMB = [(1, 1), (10, 100), (10, 100)] + [(w, 100) for w in range(11, 102)]

# The shadow after a fold, by the number of the fold.
JUMP_PRINTED = {
    1: 0.8181818,
    2: 0.96694213,
    3: 0.99398947,
    4: 1.7308447,
    6: 3.0286236,
    16: 7.031032,
    26: 8.735577,
    36: 9.461507,
    46: 9.770666,
    56: 9.90233,
    66: 9.958405,
    76: 9.982285,
    86: 9.9924555,
    96: 9.996786,
}
CLIMB_PRINTED = {
    1: 0.8181818,
    2: 1.5694213,
    4: 2.9743524,
    14: 11.1391325,
    24: 20.35755,
    34: 30.024689,
    94: 89.77926,
}
COUNTER_PRINTED = {4: 23.225294, 14: 67.30321, 24: 86.075096}

ADAM_WEIGHTS = [10.1, 10.199972, 10.299898, 10.399759, 10.4995365]
ADAM_SHADOWS = [10, 10.081819, 10.170434, 10.260063, 10.349868]


def follow(folds, decay):
    """Returns the shadow after each fold of (w, n), from 0, by fold number."""
    shadow, after = jnp.float32(0), {}
    for number, (w, n) in enumerate(folds, start=1):
        shadow = ema_optax.update_shadow(shadow, jnp.float32(w), decay, count=n)
        after[number] = float(shadow)
    return after


def by_hand(folds):
    """The same in float64, from the formulas alone."""
    shadow, after = 0.0, {}
    for number, (w, n) in enumerate(folds, start=1):
        beta = min(0.99, (1 + n) / (10 + n))
        shadow = beta * shadow + (1 - beta) * w
        after[number] = shadow
    return after


def check(after, printed):
    values = [after[number] for number in printed]
    np.testing.assert_allclose(values, list(printed.values()), **CLOSE)


def test_without_a_decay_the_shadow_is_the_weight():
    """β = 0 is θ itself, whatever was averaged before."""
    theta = jnp.array([3.25, -7.1, 1e-8], jnp.float32)
    shadow = ema_optax.update_shadow(jnp.float32([1e6, 2, 3]), theta, 0.0)
    np.testing.assert_array_equal(shadow, theta)


def test_one_fold_is_the_formula():
    """The shadow becomes βv + (1−β)θ: 0.98·40 + 0.02·49 = 40.18."""
    shadow = ema_optax.update_shadow(jnp.float32(40), jnp.float32(49), 0.98)
    np.testing.assert_allclose(shadow, 40.18, rtol=2e-7)


@pytest.mark.parametrize(("decay", "length"), [(0.5, 2), (0.9, 10), (0.98, 50)])
def test_it_averages_about_one_over_one_minus_decay_values(decay, length):
    """The last 1/(1−β) values hold 1 − β^(1/(1−β)) of the weight, about two thirds."""
    assert round(1 / (1 - decay)) == length
    weights = ema_optax.profile(ema_optax.constant(decay), 2000).weights
    ages = np.arange(2000)[::-1]
    np.testing.assert_allclose(weights, (1 - decay) * decay**ages, rtol=1e-10)
    np.testing.assert_allclose(weights[-length:].sum(), 1 - decay**length, rtol=1e-12)
    assert 0.63 < weights[-length:].sum() <= 0.75


def test_lag_of_a_constant_decay():
    """On a slope of 1 a step the shadow trails by β/(1−β)."""
    run = ema_optax.profile(ema_optax.constant(0.98), 5000)
    np.testing.assert_allclose(run.mean_age, 49.0, rtol=1e-9)


def test_warmup_at_step_five():
    """min(.98, (1+5)/(10+5)) is 6/15 = .4, and .98 once there is enough to average."""
    warmup = ema_optax.warmup(0.98)
    np.testing.assert_allclose(warmup(5), 0.4, rtol=1e-15)
    # (1+t)/(10+t) reaches .98 at t = 440.
    assert warmup(439) < 0.98
    assert warmup(441) == 0.98


def test_a_plain_number_warms_up():
    """ema_params(.98) is ema_params(warmup(.98)): the first fold weighs 9/11."""
    transform = ema_optax.ema_params(0.98)
    state = transform.init(jnp.float32(0))
    _, state = transform.update(jnp.float32(1), state, jnp.float32(0))
    np.testing.assert_allclose(state.shadow, 9 / 11, rtol=2e-7)


@pytest.mark.parametrize(
    ("folds", "printed"),
    [(JUMP, JUMP_PRINTED), (CLIMB, CLIMB_PRINTED)],
    ids=["the weight jumps", "the weight climbs"],
)
def test_traces_at_decay_99(folds, printed):
    """Every printed shadow, against the tutorial and against float64 by hand."""
    after = follow(folds, ema_optax.warmup(0.99))
    check(after, printed)
    check(by_hand(folds), printed)


def test_the_first_folds_in_closed_form():
    """Three folds of 1 at β = 2/11 leave 1 − (2/11)^k; then 10 at β = 101/110."""
    after = follow(JUMP, ema_optax.warmup(0.99))
    remains = 2 / 11
    expected = [1 - remains, 1 - remains**2, 1 - remains**3]
    expected.append(10 - (10 - expected[-1]) * 101 / 110)
    np.testing.assert_allclose([after[k] for k in (1, 2, 3, 4)], expected, rtol=2e-7)


def test_the_end_of_the_climb_is_the_lag():
    """The weight grows by 1 a fold; β/(1−β) = 101/9 at n = 100, but for β^91 of it."""
    after = follow(CLIMB, ema_optax.warmup(0.99))
    lag = CLIMB[-1][0] - after[len(CLIMB)]
    steady, start = 101 / 9, 10 - after[3]
    remains = (101 / 110) ** 91
    # 2e-5 of 11.2 is 20 ulps of the 90 that it is the difference of.
    np.testing.assert_allclose(lag, steady + (start - steady) * remains, rtol=2e-5)


def test_a_counter_averaged_by_mistake():
    """As a float the counter's shadow is no step; the counter says 100 all along."""
    counter = [(n, n) for _, n in CLIMB]
    check(follow(counter, ema_optax.warmup(0.99)), COUNTER_PRINTED)
    check(by_hand(counter), COUNTER_PRINTED)


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [("int32", None), ("float32", {"step": False, "w": True})],
    ids=["integer", "masked float"],
)
def test_ema_params_leaves_the_counter_alone(dtype, mask):
    """Neither an integer nor a masked counter is averaged; w's trace is the same."""
    after, step_read = run_climb(dtype, mask)
    check(after, CLIMB_PRINTED)
    assert step_read == dict(enumerate((n for _, n in CLIMB), start=1))


def test_ema_params_averages_a_float_counter_that_is_not_masked():
    """The mistake, made with ema_params: a float is a weight unless a mask says no."""
    after, step_read = run_climb("float32", None)
    check(after, CLIMB_PRINTED)
    check(step_read, COUNTER_PRINTED)


def run_climb(dtype, mask):
    """Returns what `shadow_params` reads of w and of the counter after each fold."""
    warmup = ema_optax.warmup(0.99)
    transform = ema_optax.ema_params(
        lambda fold: warmup(jnp.where(fold == 1, 1, 100)), mask=mask
    )
    params = {"step": jnp.zeros([], dtype), "w": jnp.float32(0)}
    state = transform.init(params)

    @jax.jit
    def update(state, params, target):
        updates = jax.tree.map(jnp.subtract, target, params)
        updates, state = transform.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        return state, params, ema_optax.shadow_params(state, params)

    shadows, steps = {}, {}
    for number, (w, n) in enumerate(CLIMB, start=1):
        target = {"step": jnp.asarray(n, dtype), "w": jnp.float32(w)}
        state, params, read = update(state, params, target)
        shadows[number], steps[number] = float(read["w"]), float(read["step"])
        assert read["step"].dtype == dtype
    return shadows, steps


def adam_run(optimizer):
    """Yields (weights before, weights after, state) of five steps of the optimizer."""
    target = jnp.array([20.0, 30.0, 40.0])
    w = jnp.array([10.0, 20.0, 30.0])
    state = optimizer.init(w)
    for _ in range(5):
        grads = jax.grad(lambda w: jnp.mean((w - target) ** 2))(w)
        updates, state = optimizer.update(grads, state, w)
        before, w = w, optax.apply_updates(w, updates)
        yield before, w, state


def test_adam_walks_as_in_the_tutorial():
    """Adam(0.1) from 10 towards 20; its steps do not depend on the loss's scale."""
    weights = [w[0] for _, w, _ in adam_run(optax.adam(0.1))]
    np.testing.assert_allclose(weights, ADAM_WEIGHTS, **CLOSE)


def test_folding_before_the_step_gives_the_tutorials_shadow():
    """Its fold number n = 0, 1, … meets the weights before the step: one step late."""
    warmup = ema_optax.warmup(0.6)
    shadow, shadows = jnp.array([10.0, 20.0, 30.0]), []
    for n, (before, _, _) in enumerate(adam_run(optax.adam(0.1))):
        # Ours counts from 1; fold 0 meets what the shadow started from, at any decay.
        decay = warmup(n) if n else 0.1
        shadow = ema_optax.update_shadow(shadow, before, decay)
        shadows.append(shadow[0])
    np.testing.assert_allclose(shadows, ADAM_SHADOWS, **CLOSE)


def test_ema_params_folds_after_the_step():
    """Chained after Adam, the same shadow is there one step earlier."""
    optimizer = optax.chain(optax.adam(0.1), ema_optax.ema_params(0.6))
    shadows = [ema_optax.shadow_params(s, w)[0] for _, w, s in adam_run(optimizer)]
    np.testing.assert_allclose(shadows[:-1], ADAM_SHADOWS[1:], **CLOSE)
    expected = 10.0
    for step, weight in enumerate(ADAM_WEIGHTS, start=1):
        beta = min(0.6, (1 + step) / (10 + step))
        expected = beta * expected + (1 - beta) * weight
    np.testing.assert_allclose(shadows[-1], expected, **CLOSE)
