"""States record what made them, and stay plain pytrees."""

import copy
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest

import ema_optax
from ema_optax.states import record_of

PARAMS = {"w": jnp.ones(2)}


@pytest.mark.parametrize("decay", [0.9, {"a": 0.9, "b": ema_optax.uniform()}])
def test_the_record_survives_what_states_go_through(decay):
    """Updates, jit, tree_map, eval_shape, copies and pickles keep decays and every."""
    transform = ema_optax.ema_params(decay, every=3)
    state = transform.init(PARAMS)
    record = record_of(state)
    assert record.every == 3
    assert set(record.decays.values()) >= {ema_optax.warmup(0.9)}
    for other in (
        transform.update(PARAMS, state, PARAMS)[1],
        jax.jit(transform.init)(PARAMS),
        jax.tree.map(jnp.copy, state),
        jax.eval_shape(transform.init, PARAMS),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        ema_optax.ema_params(decay, every=3).init(PARAMS),
    ):
        assert record_of(other) == record
        assert jax.tree.structure(other) == jax.tree.structure(state)


def test_states_have_two_fields():
    """Count and shadow, whatever is recorded; repr and equality are a NamedTuple's."""
    state = ema_optax.ema_params(0.9).init({})
    count, shadow = state
    assert (int(count), shadow) == (0, {})
    assert state._fields == ("count", "shadow")
    assert repr(state).startswith("EmaParamsState(count=")
    assert isinstance(state, ema_optax.EmaParamsState)
    assert record_of(ema_optax.EmaParamsState(count, shadow)) is None


def test_what_cannot_be_written_down_is_recorded_as_none():
    """Callables and injected arrays; their states keep one type through scan."""
    nested = ema_optax.start_after(lambda t: 0.5, 3)
    for decay in (lambda t: 0.5, nested, jnp.float32(0.5)):
        state = ema_optax.ema_params(decay).init(PARAMS)
        assert record_of(state).decays == {"": None}
    injected = optax.inject_hyperparams(
        ema_optax.ema_params, static_args=("every", "overwrite_every")
    )(decay=0.5)

    def step(state, _):
        return injected.update(PARAMS, state, PARAMS)[1], None

    state, _ = jax.lax.scan(step, injected.init(PARAMS), None, length=3)
    assert int(state.inner_state.count) == 3
