"""States record what made them without leaves, and stay plain pytrees."""

import copy
import json
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import ema_optax
from ema_optax._placement.rules import in_host_memory
from tests import older

PARAMS = {"w": jnp.ones(2)}
TRANSFORMS = {
    "one": ema_optax.ema_params(0.9, every=3),
    "two": ema_optax.ema_params({"a": 0.9, "b": ema_optax.uniform()}, every=3),
    "bema": ema_optax.bema_params(every=3),
}


def _average_state(state):
    """The state of the average, wherever it is."""
    kinds = ema_optax.EmaParamsState, ema_optax.BemaParamsState
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    [found] = [node for node in leaves if isinstance(node, kinds)]
    return found


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_record_survives_what_states_go_through(name, tmp_path):
    """Updates, transformations of JAX, copies, pickles, Orbax and Flax keep it."""
    transform = TRANSFORMS[name]
    state = transform.init(PARAMS)
    assert state.made_by.every == 3

    def step(state, _):
        return transform.update(PARAMS, state, PARAMS)[1], None

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    for other in (
        step(state, None)[0],
        jax.jit(transform.init)(PARAMS),
        jax.lax.scan(step, state, None, length=2)[0],
        jax.tree.map(jnp.copy, state),
        jax.eval_shape(transform.init, PARAMS),
        copy.copy(state),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)),
        optax.tree.map_params(transform, lambda x: 2 * x, state),
        restored,
    ):
        assert other.made_by == state.made_by
        assert jax.tree.structure(other) == jax.tree.structure(state)
        assert not jax.tree.leaves(other.made_by)
    stacked = jax.vmap(transform.init)({"w": jnp.ones((4, 2))})
    assert stacked.made_by == state.made_by
    assert stacked.count.shape == (4,)


@pytest.mark.long
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_record_passes_through_the_wrappers_of_optax(name):
    """And NNX: it is found inside them, after an update, as it was made."""
    transform = TRANSFORMS[name]
    chain = optax.chain(optax.sgd(0.1), transform)
    wrapped = {
        "chain": chain,
        "MultiSteps": optax.MultiSteps(chain, 2).gradient_transformation(),
        "masked": optax.masked(transform, {"w": True}),
        "multi_transform": optax.multi_transform(
            {"x": transform, "y": optax.sgd(0.1)}, {"w": "x"}
        ),
        "inject_hyperparams": optax.chain(
            optax.inject_hyperparams(optax.sgd)(0.1), transform
        ),
    }
    for optimizer in wrapped.values():
        state = optimizer.init(PARAMS)
        state = jax.jit(optimizer.update)(PARAMS, state, PARAMS)[1]
        assert _average_state(state).made_by == transform.init(PARAMS).made_by
    count = optax.tree.get(chain.init(PARAMS), "count")
    assert count.shape == ()
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    made_by = _average_state(optimizer.opt_state).made_by
    assert made_by == transform.init(PARAMS).made_by


def test_states_are_named_tuples():
    """Count, shadow and record; made by hand they have none."""
    state = ema_optax.ema_params(0.9).init({})
    count, shadow, made_by = state
    assert (int(count), shadow) == (0, {})
    assert state._fields == ("count", "shadow", "made_by")
    assert state.shadow is state[1]
    assert repr(state).startswith("EmaParamsState(count=")
    assert type(state) is ema_optax.EmaParamsState
    assert json.loads(made_by.decays) == {"": json.loads(made_by.decay("").to_json())}
    assert ema_optax.EmaParamsState(count, shadow).made_by is None


def test_decays_that_are_mixed_up_are_both_named():
    """States of two decays have two structures, and JAX's error shows both."""
    one, other = (ema_optax.ema_params(d).init(PARAMS) for d in (0.9, 0.99))
    with pytest.raises(ValueError, match=r"(?s)0\.9\b.*0\.99\b|0\.99\b.*0\.9\b"):
        jax.tree.map(jnp.add, one, other)
    with pytest.raises(TypeError, match=r"(?s)0\.9\b.*0\.99\b|0\.99\b.*0\.9\b"):
        jax.lax.cond(True, lambda: one, lambda: other)


@older.in_host_memory_or_not
def test_where_shadows_live_is_kept_beside_the_record():
    """Compared and copied; what cannot be written is dropped, and found again."""
    transform = ema_optax.ema_params(0.9, shadow_sharding=in_host_memory())
    state = transform.init(PARAMS)
    plain = ema_optax.ema_params(0.9).init(PARAMS)
    assert tuple(state.made_by) == tuple(plain.made_by)
    assert state.made_by != plain.made_by
    assert copy.deepcopy(state).made_by == state.made_by
    for other in (
        pickle.loads(pickle.dumps(state)),
        flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)),
    ):
        assert other.made_by.shardings is None
        other = other._replace(shadow=state.shadow)
        updated = transform.update(PARAMS, other, PARAMS)[1]
        assert updated.made_by == state.made_by
        np.testing.assert_array_equal(
            updated.shadow["w"], transform.update(PARAMS, state, PARAMS)[1].shadow["w"]
        )


def test_what_cannot_be_written_down_is_recorded_as_none():
    """Callables and injected arrays; their states keep one type through scan."""
    nested = ema_optax.start_after(lambda t: 0.5, 3)
    for decay in (lambda t: 0.5, nested, jnp.float32(0.5)):
        state = ema_optax.ema_params(decay).init(PARAMS)
        assert state.made_by.decays == '{"": null}'
        assert state.made_by.decay("") is None
    injected = optax.inject_hyperparams(
        ema_optax.ema_params, static_args=("every", "overwrite_every")
    )(decay=0.5)

    def step(state, _):
        return injected.update(PARAMS, state, PARAMS)[1], None

    state, _ = jax.lax.scan(step, injected.init(PARAMS), None, length=3)
    assert int(state.inner_state.count) == 3
