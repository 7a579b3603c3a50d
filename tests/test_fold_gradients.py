"""Gradients through a fold: those of the fold without its rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import metrics, shadow_params
from ema_optax._placement.rules import in_host_memory
from tests import older

BETA = 0.75
DTYPES = {
    "float32": {},
    "float32, by chance": {"rounding": "stochastic"},
    "bfloat16": {"shadow_dtype": "bfloat16"},
}


@pytest.mark.parametrize("options", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("folds", [1, 3])
def test_gradients_pass_the_rounding_straight_through(options, folds):
    """Of Σ c·s after k folds of params p: c·(1−β^k), and c·β^k of the start."""
    average = ema_optax.ema_params(ema_optax.constant(BETA), **options)
    c = jnp.array([1.0, -2.0, 3.0])
    zeros = jnp.zeros(3)

    def loss(p, start):
        state = average.init({"w": start})
        for _ in range(folds):
            _, state = average.update({"w": zeros}, state, {"w": p})
        return jnp.sum(c * state.shadow["w"].astype(jnp.float32))

    p, start = jnp.array([0.3, -0.7, 1.1]), jnp.array([0.5, 0.2, -0.9])
    for transform in (jax.grad, lambda f, argnums: jax.jit(jax.grad(f, argnums))):
        of_params, of_start = transform(loss, argnums=(0, 1))(p, start)
        kept = BETA**folds
        tolerance = 2e-2 if "shadow_dtype" in options else 1e-6
        np.testing.assert_allclose(of_params, c * (1 - kept), rtol=tolerance)
        np.testing.assert_allclose(of_start, c * kept, rtol=tolerance)
    expected = p + kept * (start - p)
    state = average.init({"w": start})
    for _ in range(folds):
        _, state = average.update({"w": zeros}, state, {"w": p})
    np.testing.assert_allclose(state.shadow["w"], expected, rtol=3e-2)


@pytest.mark.long
@older.in_host_memory_or_not
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_derivatives_pass_where_a_fold_is_due(every, host):
    """In both modes; forward alone from the host, where JAX moves no cotangent."""
    c = jnp.array([1.0, -2.0, 3.0])
    place = in_host_memory() if host else None

    def loss(p):
        average = ema_optax.ema_params(
            ema_optax.constant(BETA), every=every, shadow_sharding=place
        )
        state = average.init({"w": jnp.zeros(3)})
        step = jax.jit(lambda state, p: average.update({"w": 0 * p}, state, {"w": p}))
        for _ in range(4):
            state = step(state, p)[1]
        return jnp.sum(c * shadow_params(state, {"w": p})["w"])

    p, expected = jnp.array([0.3, -0.7, 1.1]), c * (1 - BETA**4)
    _, along = jax.jvp(loss, (p,), (c,))
    np.testing.assert_allclose(along, expected @ c, rtol=1e-6)
    if not host:
        np.testing.assert_allclose(jax.grad(loss)(p), expected, rtol=1e-6)


@pytest.mark.long
def test_figures_of_a_stacked_state():
    """One for each member under vmap; without it the error names that call."""
    optimizer = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.99))
    params = {"w": jnp.stack([jnp.ones(3), jnp.arange(3.0)])}
    state = jax.vmap(optimizer.init)(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.vmap(optimizer.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    with pytest.raises(
        ValueError, match=r"shape \(2,\).*jax\.vmap\(ema_optax\.metrics\)"
    ):
        metrics(state, params)
    found = jax.vmap(metrics)(state, params)
    for i in range(2):
        alone = metrics(*jax.tree.map(lambda x, i=i: x[i], (state, params)))
        for key, value in alone.items():
            np.testing.assert_allclose(found[key][i], value, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.9, {"a": 0.9, "b": ema_optax.power(0.1)}])
def test_init_of_abstract_params(decay):
    """As Optax's own: the shapes are those of a concrete start, nothing is averaged."""
    average = ema_optax.ema_params(decay, mask={"w": True, "b": False, "n": True})
    bema = ema_optax.bema_params()
    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2), "n": jnp.int32(0)}
    abstract = jax.eval_shape(lambda: params)
    for transform in (average, bema, optax.chain(optax.adam(0.1), average)):
        found, concrete = transform.init(abstract), transform.init(params)
        assert jax.tree.structure(found) == jax.tree.structure(concrete)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(concrete), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    with pytest.raises((TypeError, ValueError)):
        shadow_params(
            average.init(abstract), params, name="a" if len(decay) > 1 else None
        )
