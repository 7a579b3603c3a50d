"""An average that is not the last of its chain: said where the state shows it."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

import ema_optax
from ema_optax import OrderWarning, checkpoint, metrics, shadow_params, with_shadow
from ema_optax._averages import averages

PARAMS = {"w": jnp.ones(2)}
EMA = ema_optax.ema_params(0.9)
HYPER = optax.inject_hyperparams(optax.sgd)(0.1)

WRONG = {
    "sgd": (optax.chain(EMA, optax.sgd(0.1)), "EmptyState"),
    "adam": (optax.chain(EMA, optax.adam(0.1)), "ScaleByAdamState"),
    "a rate": (
        optax.chain(optax.scale_by_adam(), EMA, optax.scale(-0.1)),
        "EmptyState",
    ),
    "bema": (optax.chain(ema_optax.bema_params(), optax.adam(0.1)), "ScaleByAdamState"),
    "named": (optax.chain(ema_optax.ema_params({"a": 0.9}), optax.adam(0.1)), "Adam"),
    "masked": (optax.chain(optax.masked(EMA, {"w": True}), optax.adam(0.1)), "Adam"),
    "masked after": (
        optax.chain(EMA, optax.masked(optax.adam(0.1), {"w": True})),
        "ScaleByAdamState",
    ),
    "inside": (optax.chain(optax.chain(optax.clip(1.0), EMA, optax.sgd(0.1))), "Empty"),
    "injected": (optax.chain(EMA, HYPER), "Hyperparams"),
    "in steps": (optax.MultiSteps(optax.chain(EMA, optax.adam(0.1)), 2), "Adam"),
}
WATCHES = optax.snapshot("norm", optax.tree.norm)
RIGHT = {
    "last": optax.chain(optax.adam(0.1), EMA),
    "two averages": optax.chain(optax.adam(0.1), EMA, ema_optax.bema_params()),
    "a masked average": optax.chain(
        optax.adam(0.1), EMA, optax.masked(EMA, {"w": True})
    ),
    "something that watches": optax.chain(optax.adam(0.1), EMA, WATCHES),
    "what changes nothing": optax.chain(optax.adam(0.1), EMA, optax.identity()),
    "alone": EMA,
    "in steps": optax.MultiSteps(optax.chain(optax.adam(0.1), EMA), 2),
    "nested": optax.chain(optax.chain(optax.adam(0.1), EMA)),
}


def read(state, params=PARAMS):
    return shadow_params(state, params)


@pytest.mark.parametrize(("optimizer", "named"), WRONG.values(), ids=WRONG)
def test_an_average_before_the_optimizer_is_told(optimizer, named):
    """It averages params + gradients: where it is read, and where it is saved."""
    state = optimizer.init(PARAMS)
    name = "a" if "named" in str(type(state)) else None
    with pytest.warns(OrderWarning, match=named):
        read(state)
    with pytest.warns(OrderWarning, match="Chain it last"):
        metrics(state, PARAMS, name=name)
    with pytest.warns(OrderWarning, match="comes before a"):
        checkpoint.EmaSave(PARAMS, state)
    with pytest.warns(OrderWarning, match="OrderWarning"):
        with_shadow({"params": PARAMS, "opt_state": state})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", OrderWarning)
        read(state)


@pytest.mark.parametrize("optimizer", RIGHT.values(), ids=RIGHT)
def test_an_average_in_its_place_is_not(optimizer):
    """Nor what only watches, nor optimizers side by side, nor inside a train state."""
    state = optimizer.init(PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = TrainState(0, None, PARAMS, optimizer, state)
        for one in (
            state,
            [state, optax.adam(0.1).init(PARAMS)],
            whole,
            (state, state),
        ):
            averages.find(one)
        jax.jit(averages_of)(state)


def averages_of(state):
    return [average.count for average in averages.find(state)]
