"""Optax's wrappers: of what the average is, read back, and a checkpoint and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import ema_optax
from ema_optax import checkpoint, shadow_params
from tests import older
from tests.same import assert_same

DECAY = 0.5
TARGET = np.random.default_rng(0).standard_normal(4).astype(np.float32)


def _average():
    return ema_optax.ema_params(ema_optax.constant(DECAY))


def _gradient(step):
    """The same noise for every optimizer, so that a path depends on it alone."""
    return np.random.default_rng(step).standard_normal(4).astype(np.float32)


def _run(optimizer, params, gradient, steps, state=None, first=0):
    """Params after each update and the state after each, the first ones included."""
    update = jax.jit(optimizer.update)
    state = optimizer.init(params) if state is None else state
    path, states = [params], [state]
    for step in range(first, first + steps):
        updates, state = update(gradient(step, params), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
        states.append(state)
    return path, states


def _expected(path):
    """The average of a path in float64: 1e-6 from it, where one step late is 1e-2."""
    shadow = np.asarray(path[0], np.float64)
    for new in path[1:]:
        shadow = shadow + (1 - DECAY) * (np.asarray(new, np.float64) - shadow)
    return shadow


def _assert_close(found, expected):
    np.testing.assert_allclose(np.float64(found), expected, rtol=1e-6, atol=1e-6)


def _assert_round_trip(folder, optimizer, gradient, path, states):
    """The shadow comes back whole, and a resumed run goes on bit for bit."""
    params, state = path[-1], states[-1]
    checkpoint.save(folder, params, state, step=len(path))
    fresh = jax.tree.map(jnp.zeros_like, path[0])
    read = checkpoint.restore(folder, "shadow", like=fresh)
    assert_same(read, shadow_params(state, params))
    resumed, resumed_state = checkpoint.resume(folder, fresh, optimizer.init(fresh))
    assert_same(resumed, params)
    goes_on = [
        _run(optimizer, p, gradient, 3, s, len(path))
        for p, s in ((params, state), (resumed, resumed_state))
    ]
    assert_same(goes_on[1], goes_on[0])


@pytest.mark.long
def test_lora_adapters_alone_are_averaged_and_the_whole_model_is_read(tmp_path):
    """multi_transform: the base is in no shadow, in no state, and once on disk."""
    params = {
        "layer": {
            "kernel": jnp.arange(12.0).reshape(3, 4),
            "lora_a": jnp.full((3, 1), 0.1),
            "lora_b": jnp.zeros((1, 4)),
        },
        "frozen_bias": jnp.ones(4, jnp.bfloat16),
    }
    labels = {
        "layer": {"kernel": "frozen", "lora_a": "adapter", "lora_b": "adapter"},
        "frozen_bias": "frozen",
    }
    optimizer = optax.multi_transform(
        {
            "adapter": optax.chain(optax.adam(0.05), _average()),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )

    def gradient(step, params):
        def loss(params):
            layer = params["layer"]
            kernel = layer["kernel"] + layer["lora_a"] @ layer["lora_b"]
            out = jnp.array([0.1, 0.2, 0.3 + step]) @ kernel + params["frozen_bias"]
            return jnp.mean((out - TARGET) ** 2)

        return jax.grad(loss)(params)

    path, states = _run(optimizer, params, gradient, 6)
    found = shadow_params(states[-1], path[-1])
    for name in ("lora_a", "lora_b"):
        assert np.any(path[-1]["layer"][name] != params["layer"][name])
        expected = _expected([p["layer"][name] for p in path])
        _assert_close(found["layer"][name], expected)
    assert_same(found["layer"]["kernel"], params["layer"]["kernel"])
    assert_same(found["frozen_bias"], params["frozen_bias"])

    _assert_round_trip(tmp_path, optimizer, gradient, path, states)
    stored = checkpoint.describe(tmp_path).trees
    assert set(stored["shadow"].leaves) == {"layer/lora_a", "layer/lora_b"}
    assert set(stored["params"].leaves) == {*stored["shadow"].leaves, *_FROZEN}


_FROZEN = ("layer/kernel", "frozen_bias")


def _noise(step, params):
    return _gradient(step)


def test_multi_steps_inside_folds_once_per_real_update(tmp_path):
    """Of the params after every third micro-batch; outside it would fold at each."""
    older.skip_without_one_array()
    optimizer = optax.MultiSteps(optax.chain(optax.adam(0.05), _average()), 3)
    path, states = _run(optimizer, jnp.zeros(4), _noise, 9)
    found = shadow_params(states[-1], path[-1])
    _assert_close(found, _expected(path[::3]))
    assert np.max(np.abs(found - _expected(path))) > 1e-2
    # Between two real updates as well: the gradients so far are part of the state.
    part = [path[:9], states[:9]]
    _assert_round_trip(tmp_path, optimizer, _noise, *part)


def test_lookahead_fast_and_slow_params_are_averaged(tmp_path):
    """Each as it is after synchronisation; evaluate with the slow ones."""
    lookahead = optax.lookahead(optax.sgd(0.1), sync_period=3, slow_step_size=0.5)
    optimizer = optax.chain(lookahead, _average())

    def gradient(step, params):
        return _gradient(step)  # of the fast params

    params = optax.LookaheadParams.init_synced(jnp.zeros(4))
    path, states = _run(optimizer, params, gradient, 7)
    found = shadow_params(states[-1], path[-1])
    assert isinstance(found, optax.LookaheadParams)
    _assert_close(found.fast, _expected([p.fast for p in path]))
    _assert_close(found.slow, _expected([p.slow for p in path]))
    assert np.max(np.abs(found.fast - found.slow)) > 1e-2
    _assert_round_trip(tmp_path, optimizer, gradient, path, states)


def test_lookahead_slow_params_alone():
    """A mask halves the memory; reading fills the fast ones from the params."""
    lookahead = optax.lookahead(optax.sgd(0.1), sync_period=3, slow_step_size=0.5)
    mask = optax.LookaheadParams(fast=False, slow=True)
    average = ema_optax.ema_params(ema_optax.constant(DECAY), mask=mask)
    params = optax.LookaheadParams.init_synced(jnp.zeros(4))
    path, states = _run(optax.chain(lookahead, average), params, _noise, 7)
    assert sum(x.size for x in jax.tree.leaves(states[-1][1].shadow)) == 4
    found = shadow_params(states[-1], path[-1])
    _assert_close(found.slow, _expected([p.slow for p in path]))
    assert_same(found.fast, path[-1].fast)


def test_inside_lookahead_params_before_synchronisation_are_averaged():
    """At a synchronisation nobody holds them any more; the docs warn of it."""
    fast = optax.chain(optax.sgd(0.1), _average())
    optimizer = optax.lookahead(fast, sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jnp.zeros(4))
    path, states = _run(optimizer, params, _noise, 7)
    found = shadow_params(states[-1])
    stepped = [params.fast] + [
        p.fast - np.float32(0.1) * _gradient(step) for step, p in enumerate(path[:-1])
    ]
    _assert_close(found, _expected(stepped))
    assert np.max(np.abs(found - _expected([p.fast for p in path]))) > 1e-2


B1 = 0.9


def _schedule_free(base):
    return optax.contrib.schedule_free(base, learning_rate=0.1, b1=B1)


def _quadratic(step, params):
    return 2 * (params - TARGET) + _gradient(step)


def _x(state, params):
    return optax.contrib.schedule_free_eval_params(state, params)


def test_schedule_free_outside_averages_y(tmp_path):
    """The params are y, where gradients are taken; x is the average to evaluate."""
    older.skip_without_one_array()
    optimizer = optax.chain(_schedule_free(optax.sgd(0.1)), _average())
    path, states = _run(optimizer, jnp.zeros(4), _quadratic, 20)
    found = shadow_params(states[-1], path[-1])
    _assert_close(found, _expected(path))
    # x is untouched by the average behind it.
    alone = _run(_schedule_free(optax.sgd(0.1)), jnp.zeros(4), _quadratic, 20)
    x = _x(alone[1][-1], alone[0][-1])
    np.testing.assert_allclose(_x(states[-1][0], path[-1]), x, rtol=1e-6)
    _assert_round_trip(tmp_path, optimizer, _quadratic, path, states)


@pytest.mark.long
def test_schedule_free_x_is_the_better_average():
    """After 3,000 noisy steps x has the lowest loss, and y alone the highest."""
    base = optax.contrib.schedule_free(optax.sgd(0.3), learning_rate=0.3, b1=B1)
    optimizer = optax.chain(base, ema_optax.ema_params(0.99))
    curvature = jnp.array([2.0, 1.0, 0.5, 0.1])

    def losses(key):
        def step(carry, key):
            params, state = carry
            gradient = curvature * (params - TARGET)
            gradient += 2 * jax.random.normal(key, (4,))
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.zeros(4), optimizer.init(jnp.zeros(4))
        (y, state), _ = jax.lax.scan(step, start, jax.random.split(key, 3000))
        read = jnp.stack([_x(state[0], y), shadow_params(state, y), y])
        return jnp.sum(curvature * (read - TARGET) ** 2, axis=1) / 2

    keys = jax.random.split(jax.random.key(0), 200)
    x, average_of_y, y = jax.jit(jax.vmap(losses))(keys).mean(0)
    # 0.050, 0.081 and 0.159; after 300 steps the average of y is as good as x.
    assert x < 0.75 * average_of_y
    assert average_of_y < 0.75 * y


def test_the_average_of_x_follows_from_those_of_y_and_z():
    """Averaging is linear: x = (y − (1−b1)·z)/b1 holds for the shadows too."""
    optimizer = _schedule_free(optax.sgd(0.1))
    path, states = _run(optimizer, jnp.zeros(4), _quadratic, 10)
    xs = [_x(s, p) for s, p in zip(states, path, strict=True)]
    zs = [s.z for s in states]
    combined = (_expected(path) - (1 - B1) * _expected(zs)) / B1
    _assert_close(combined, _expected(xs))


def test_inside_schedule_free_nothing_that_exists_is_averaged():
    """It is y + the base's step, which neither y nor z take; the docs warn of it."""
    optimizer = _schedule_free(optax.chain(optax.sgd(0.1), _average()))
    path, states = _run(optimizer, jnp.zeros(4), _quadratic, 10)
    found = shadow_params(states[-1])
    stepped = [path[0]] + [
        y - np.float32(0.1) * _quadratic(step, y) for step, y in enumerate(path[:-1])
    ]
    _assert_close(found, _expected(stepped))
    for held in (path, [s.z for s in states]):
        assert np.max(np.abs(found - _expected(held))) > 1e-2


@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16])
def test_schedule_free_state_is_not_mistaken_for_a_shadow(state_dtype):
    """Its z is an iterate; without an average there is none."""
    optimizer = optax.contrib.schedule_free(
        optax.sgd(0.1), learning_rate=0.1, state_dtype=state_dtype
    )
    with pytest.raises(ValueError, match="There is no shadow"):
        shadow_params(optimizer.init(jnp.zeros(4)))


def _numbers(steps):
    """Params of a quadratic under sharpness-aware steps, in float64, after each."""
    rate, radius = 0.1, 0.05
    w = np.array([1.0, -2.0])
    after = []
    for _ in range(steps):
        gradient = w * np.array([1.0, 3.0])
        probe = w + radius * gradient / np.linalg.norm(gradient)
        w = w - rate * probe * np.array([1.0, 3.0])
        after.append(w)
    return after


@pytest.mark.parametrize("opaque", [False, True])
def test_sharpness_aware_steps(tmp_path, opaque):
    """Inside `sam` the params of real steps; behind it the perturbed ones too."""
    beta, steps = 0.5, 6
    curvature = jnp.array([1.0, 3.0])
    inner = optax.chain(optax.sgd(0.1), ema_optax.ema_params(ema_optax.constant(beta)))
    around = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    optimizer = optax.contrib.sam(
        inner, around, sync_period=2, opaque_mode=opaque, reset_state=True
    )
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)

    def gradient(params, _=None):
        return {"w": params["w"] * curvature}

    step = jax.jit(
        functools.partial(optimizer.update, grad_fn=gradient)
        if opaque
        else optimizer.update
    )
    for _ in range(steps if opaque else 2 * steps):
        updates, state = step(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    shadow = np.array([1.0, -2.0])
    after = _numbers(steps)
    for w in after:
        shadow = shadow + (1 - beta) * (w - shadow)
    np.testing.assert_allclose(params["w"], after[-1], rtol=1e-5)
    found = ema_optax.shadow_params(state, params)
    np.testing.assert_allclose(found["w"], shadow, rtol=1e-5)
    checkpoint.save(tmp_path, params, state)
    np.testing.assert_allclose(
        checkpoint.restore(tmp_path, like=params)["w"], shadow, rtol=1e-5
    )
