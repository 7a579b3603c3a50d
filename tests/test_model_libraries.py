"""Linen, Equinox, Haiku: what is averaged, how it is read, a checkpoint and back."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import ema_optax
from ema_optax import checkpoint, shadow_params, with_shadow
from tests.same import assert_same

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((8, 2)).astype(np.float32)


def _optimizer():
    return optax.chain(
        optax.adam(0.05), ema_optax.ema_params(ema_optax.constant(0.5), every=2)
    )


def _average(path):
    """The shadow that is folded at every second update at β = .5, in float64."""
    shadow = _wide(path[0])
    for new in path[2::2]:
        shadow = jax.tree.map(lambda s, p: s + 0.75 * (p - s), shadow, _wide(new))
    return shadow


def _wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _assert_close(found, expected):
    """Within float32's rounding: 1e-6 where one update late is off by 1e-2."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
        _wide(found),
        _wide(expected),
    )


def _trained(loss, params, steps):
    """Params and optimizer state after so many steps, and the params on the way."""
    optimizer = _optimizer()

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, path = optimizer.init(params), [params]
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        path.append(params)
    return params, opt_state, path, step


def _round_trip(folder, loss, params, fresh):
    """Saves, restores the shadow into fresh slots, and goes on bit for bit."""
    params, opt_state, path, step = _trained(loss, params, 5)
    shadow = shadow_params(opt_state, params)
    _assert_close(shadow, _average(path))
    checkpoint.save(folder, params, opt_state, step=5)
    assert_same(checkpoint.restore(folder, "shadow", like=fresh), shadow)
    assert_same(checkpoint.restore(folder, "params", like=fresh), params)
    resumed = checkpoint.resume(folder, fresh, _optimizer().init(fresh))
    assert_same(step(*resumed), step(params, opt_state))
    return shadow


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))


@pytest.mark.long
def test_linen(tmp_path):
    """Params are a dict of dicts; TrainState swaps its own with with_shadow."""
    model = Linen()

    def new(seed):
        variables = model.init(jax.random.key(seed), X)
        return TrainState.create(
            apply_fn=model.apply, params=variables["params"], tx=_optimizer()
        )

    def loss(params):
        return jnp.mean((model.apply({"params": params}, X) - Y) ** 2)

    state, path = new(0), [new(0).params]
    step = jax.jit(
        lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params))
    )
    for _ in range(5):
        state = step(state)
        path.append(state.params)
    averaged = with_shadow(state)
    assert isinstance(averaged, TrainState)
    _assert_close(averaged.params, _average(path))
    assert averaged.opt_state is state.opt_state
    assert loss(averaged.params) != loss(state.params)

    checkpoint.save(tmp_path, state.params, state.opt_state, step=int(state.step))
    fresh = new(7)
    read = checkpoint.restore(tmp_path, "shadow", like=fresh.params)
    assert_same(read, averaged.params)
    params, opt_state = checkpoint.resume(tmp_path, fresh.params, fresh.opt_state)
    resumed = fresh.replace(params=params, opt_state=opt_state, step=state.step)
    for name in ("params", "opt_state", "step"):
        assert_same(getattr(step(resumed), name), getattr(step(state), name))


class Equinox(eqx.Module):
    """With a function, a counter and an absent bias among its leaves."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    activation: object
    calls: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, use_bias=False, key=keys[0])
        self.second = eqx.nn.Linear(4, 2, key=keys[1])
        self.activation = jax.nn.tanh
        self.calls = jnp.int32(3)

    def __call__(self, x):
        return self.second(self.activation(self.first(x)))


@pytest.mark.long
def test_equinox(tmp_path):
    """The part that is arrays is averaged; what was filtered out stays None."""

    def parts(seed):
        return eqx.partition(Equinox(jax.random.key(seed)), eqx.is_inexact_array)

    params, static = parts(0)

    def loss(params):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(X) - Y) ** 2)

    shadow = _round_trip(tmp_path, loss, params, parts(1)[0])
    assert isinstance(shadow, Equinox)
    assert shadow.activation is None
    assert shadow.calls is None
    assert shadow.first.bias is None
    model = eqx.combine(shadow, static)
    assert model.calls == 3
    assert np.mean((jax.vmap(model)(X) - Y) ** 2) == pytest.approx(loss(shadow))


def test_equinox_slots_may_be_a_filtered_model(tmp_path):
    """eqx.filter_eval_shape makes slots that cost no memory."""
    params, _ = eqx.partition(Equinox(jax.random.key(0)), eqx.is_inexact_array)
    checkpoint.save(tmp_path, params, _optimizer().init(params))
    model = eqx.filter_eval_shape(Equinox, jax.random.key(1))
    slots = eqx.filter(model, lambda x: hasattr(x, "dtype") and x.dtype == jnp.float32)
    assert_same(checkpoint.restore(tmp_path, "shadow", like=slots), params)


@pytest.mark.long
def test_haiku(tmp_path):
    """Params are keyed by module paths with slashes in them."""

    def forward(x):
        return hk.nets.MLP([4, 2], activation=jnp.tanh)(x)

    model = hk.without_apply_rng(hk.transform(forward))

    def loss(params):
        return jnp.mean((model.apply(params, X) - Y) ** 2)

    params, fresh = (model.init(jax.random.key(seed), X) for seed in (0, 1))
    shadow = _round_trip(tmp_path, loss, params, fresh)
    assert set(shadow) == {"mlp/~/linear_0", "mlp/~/linear_1"}
    assert model.apply(shadow, X).shape == (8, 2)
