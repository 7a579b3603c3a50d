"""Arguments that are something else: each error names what it got and the call."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ema_optax
from ema_optax import checkpoint, metrics, shadow_params, with_shadow
from tests import older

PARAMS = {"dense": {"kernel": jnp.arange(4.0), "bias": jnp.ones(2)}}
OPTIMIZER = optax.chain(optax.adam(0.1), ema_optax.ema_params(0.9))
STATE = OPTIMIZER.init(PARAMS)
WHOLE = TrainState(0, None, PARAMS, OPTIMIZER, STATE)
LARGE = {f"layer_{i}": jnp.zeros((50, 50)) for i in range(200)}


@pytest.fixture(scope="module")
def nnx_pair():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    return model, nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, PARAMS, STATE, step=1)
    return folder


def refused(call, *words, error=(ValueError, TypeError)):
    """Calls something that must be refused in a few lines without arrays."""
    with pytest.raises(error) as caught:
        call()
    told = str(caught.value)
    assert all(word in told for word in words), told
    assert len(told) < 1000
    assert told.count("\n") < 10
    assert not any(word in told for word in ("Array(", "array(", "PyTreeDef", "0., 0."))


SWAPPED = {
    "shadow_params": lambda d: shadow_params(PARAMS, STATE),
    "metrics": lambda d: metrics(PARAMS, STATE),
    "save": lambda d: checkpoint.save(d / "new", STATE, PARAMS),
    "EmaSave": lambda d: checkpoint.EmaSave(STATE, PARAMS),
    "resume": lambda d: checkpoint.resume(d, STATE, PARAMS),
    "with_shadow": lambda d: with_shadow({"params": STATE, "opt_state": PARAMS}),
}


@pytest.mark.parametrize("call", SWAPPED.values(), ids=SWAPPED)
def test_swapped_arguments(run, call):
    """Params for the state and the other way round."""
    refused(lambda: call(run), "swapped", "call ", error=ValueError)
    assert not (run / "new").exists()


OPTIMIZERS = {
    "shadow_params": lambda d: shadow_params(OPTIMIZER, PARAMS),
    "metrics": lambda d: metrics(OPTIMIZER, PARAMS),
    "save": lambda d: checkpoint.save(d / "new", PARAMS, OPTIMIZER),
    "snapshot": lambda d: checkpoint.SnapshotSave(OPTIMIZER),
    "resume": lambda d: checkpoint.resume(d, PARAMS, OPTIMIZER),
    "steps": lambda d: shadow_params(optax.MultiSteps(OPTIMIZER, 2), PARAMS),
}


@pytest.mark.parametrize("call", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_for_its_state(run, call):
    """It says what to pass."""
    refused(lambda: call(run), "optimizer", "not its state", error=TypeError)


def test_the_tree_comes_before_the_model(run):
    """`restore(folder, like)`, of which the model's arrays were printed."""
    for given, told in [
        (LARGE, "got a dict of 200"),
        (PARAMS, "got a dict of 1"),
        ([1], r"got [1]"),
        (None, "got None"),
        (3, "got 3"),
    ]:
        call = lambda given=given: checkpoint.restore(run, given)  # noqa: E731
        refused(call, told, "restore(directory, like=…)", error=TypeError)
    refused(lambda: checkpoint.restore(run, "shadows"), "no tree 'shadows'", "'shadow'")


def test_rename_the_other_way_round(run):
    """Stored paths to slots: the error writes it as it was meant."""
    like = {"head": jnp.zeros(4)}

    def call():
        checkpoint.restore(run, "params", like, rename={"dense/kernel": "head"})

    refused(call, "other way round", "rename={'head': 'dense/kernel'")
    good = checkpoint.restore(run, "params", like, rename={"head": "dense/kernel"})
    np.testing.assert_array_equal(good["head"], PARAMS["dense"]["kernel"])


def test_the_whole_model_for_its_params():
    """Variables with statistics, a train state, a State of all variables."""
    variables = {"params": PARAMS, "batch_stats": {"mean": jnp.ones(2)}}
    for call in (shadow_params, metrics):
        refused(lambda call=call: call(STATE, variables), "variables['params']")
        refused(lambda call=call: call(STATE, (variables, {})), "'0/params'")
        refused(lambda call=call: call(STATE, WHOLE), "does not fit these params")
        refused(lambda call=call: call(STATE, LARGE), "does not fit these params")


def test_params_of_another_container():
    """Leaves are told by their paths, whatever the containers and their order."""
    Pair = collections.namedtuple("Pair", "z a")
    params = {
        "layers": [jnp.ones(2), jnp.zeros(3)],
        "pair": Pair(jnp.ones(4), jnp.ones(5)),
    }
    state = OPTIMIZER.init(params)
    other = {
        "layers": (jnp.ones(2), jnp.zeros(3)),
        "pair": {"a": jnp.ones(5), "z": jnp.ones(4)},
    }
    found = shadow_params(state, other)
    assert jax.tree.structure(found) == jax.tree.structure(other)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, other)
    assert float(metrics(state, other)["distance"]) == 0


@pytest.mark.long
@older.needs_nnx
def test_objects_of_nnx(nnx_pair, run, tmp_path):
    """What each function takes of a module and its optimizer."""
    model, optimizer = nnx_pair
    split = "*ema_optax.nnx.split(model, optimizer)"
    for call in (
        lambda: checkpoint.save(tmp_path, model, optimizer),
        lambda: checkpoint.EmaSave(nnx.state(model), optimizer),
        lambda: checkpoint.save(tmp_path, model, optimizer.opt_state),
        lambda: checkpoint.resume(run, model, optimizer),
        lambda: checkpoint.SnapshotSave(optimizer),
    ):
        refused(call, "Flax NNX", split)
    refused(
        lambda: checkpoint.EmaSave(nnx.state(model), nnx.state(optimizer)),
        "State of Flax NNX",
        split,
    )
    refused(lambda: shadow_params(optimizer, model), "optimizer.opt_state")
    refused(lambda: metrics(optimizer, model), "nnx.state(model, nnx.Param)")
    params = nnx.state(model, nnx.Param)
    found = metrics(optimizer.opt_state, params)
    assert float(found["distance"]) == 0
    assert jax.tree.structure(shadow_params(optimizer.opt_state, params)) == (
        jax.tree.structure(params)
    )
    checkpoint.save(tmp_path, *ema_optax.nnx.split(model, optimizer))


@older.needs_nnx
def test_a_name_is_asked_for_by_the_call_that_was_made():
    """Each names itself, not another function."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    chain = optax.chain(optax.sgd(0.1), ema_optax.ema_params({"a": 0.9, "b": 0.99}))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    opt_state = chain.init(PARAMS)
    refused(
        lambda: ema_optax.nnx.swapped(model, optimizer).__enter__(),
        "Call ema_optax.nnx.swapped(model, optimizer) with name='a'",
    )
    refused(
        lambda: ema_optax.nnx.shadow_copy(model, optimizer, name="c"),
        "Call ema_optax.nnx.shadow_copy(",
    )
    refused(lambda: metrics(opt_state, PARAMS, name="c"), "Call metrics(")
    refused(lambda: shadow_params(opt_state, PARAMS), "Call shadow_params(")
    whole = {"params": PARAMS, "opt_state": opt_state}
    refused(lambda: with_shadow(whole), "Call with_shadow(")


@pytest.mark.parametrize(
    "given",
    ["adam", OPTIMIZER, PARAMS, [0.9], ema_optax.warmup, 99.9],
    ids=["text", "optimizer", "params", "list", "constructor", "number above 1"],
)
def test_what_is_no_decay(given):
    """The neighbouring types of a decay."""
    refused(lambda: ema_optax.ema_params(given), "ema_params")


@pytest.mark.parametrize(
    "given",
    [lambda step: step, "state", max],
    ids=["function", "text", "builtin"],
)
def test_what_is_no_state(given):
    """A function, a text."""
    refused(lambda: shadow_params(given, PARAMS), "not an optimizer state")


def test_a_flax_that_is_too_old(monkeypatch):
    """NNX modules need what it lacks: the error says which version has it."""
    model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    monkeypatch.delattr(nnx, "as_pure", raising=False)
    for call in (
        lambda: ema_optax.nnx.swapped(model, optimizer).__enter__(),
        lambda: ema_optax.nnx.shadow_copy(model, optimizer),
        lambda: ema_optax.nnx.split(model, optimizer),
        lambda: ema_optax.nnx.update(model, optimizer, {}, {}),
        lambda: ema_optax.nnx.refresh_batch_stats(model, [jnp.ones((2, 1))]),
    ):
        refused(call, "flax.nnx.as_pure", "'flax>=0.12.7'", error=ImportError)
