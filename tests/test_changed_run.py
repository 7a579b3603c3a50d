"""A run whose model or optimizer changes: what goes on, what starts, what is left."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint import v1

import ema_optax
from ema_optax import checkpoint
from tests.same import assert_same

EMA = ema_optax.ema_params(0.99)
ADAM = optax.chain(optax.adam(0.1), EMA)


def layer(seed, size=2):
    """A layer whose values no other has."""
    kernel = jax.random.normal(jax.random.key(seed), (3, size))
    return {"kernel": kernel, "bias": jnp.full(size, float(seed))}


def trained(optimizer, params, times=3, state=None):
    """Params and state after some updates."""
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(times):
        params, state = step(params, state)
    return params, state


OLD = {"encoder": layer(1), "head": layer(2)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of Adam and an average, its params and its state."""
    folder = tmp_path_factory.mktemp("run")
    params, state = trained(ADAM, OLD)
    checkpoint.save(folder, params, state, step=3)
    return folder, params, state


def started(folder, params, optimizer, **options):
    """Resumes with what fits; says how many leaves there are of all that is told."""
    found = checkpoint.resume(
        folder, params, optimizer.init, missing="start", **options
    )
    changes = found.changes
    leaves = len(jax.tree.leaves((found.params, found.opt_state)))
    assert len(changes.taken) + len(changes.started) == leaves
    assert set(changes.taken) >= {*changes.cast, *changes.moved}
    goes_on(optimizer, *found)
    return found


def goes_on(optimizer, params, state):
    """A step that donates both runs: no two leaves share a buffer."""
    own = jax.tree.map(jnp.copy, params)  # params that start are the caller's own

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    trained(optimizer, own, 1, jax.tree.map(jnp.copy, state))
    shadows = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    places = [x.unsafe_buffer_pointer() for x in shadows if x.size > 1]
    live = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)]
    assert len(set(places)) == len(places)
    assert not set(places) & set(live)


def test_a_run_as_it_was_is_the_same_both_ways(run):
    """Nothing started, nothing left; the pair unpacks and counts its leaves."""
    folder, params, state = run
    exact = checkpoint.resume(folder, OLD, ADAM.init(OLD))
    assert_same(exact, (params, state))
    assert type(exact) is tuple  # which programs map beside their own
    same = started(folder, OLD, ADAM)
    assert_same(same, (params, state))
    changes = same.changes
    assert (dict(changes.started), changes.left) == ({}, ())
    assert len(changes.taken) == len(jax.tree.leaves((params, state)))
    assert str(same.changes).splitlines()[0] == "taken   params: 4 leaves"
    found, kept = same
    assert found is same.params
    assert kept is same.opt_state


def test_a_module_is_renamed(run):
    """Exactly, without anything missing: params, shadow and moments follow."""
    folder, params, state = run
    new = {"trunk": {"dense": OLD["encoder"]}, "head": OLD["head"]}
    rename = {"trunk/dense": "encoder"}

    def renamed(tree):
        return {"trunk": {"dense": tree["encoder"]}, "head": tree["head"]}

    adam, ema = state[0][0], state[1]
    expected = (
        renamed(params),
        (
            (adam._replace(mu=renamed(adam.mu), nu=renamed(adam.nu)), state[0][1]),
            ema._replace(shadow=renamed(ema.shadow)),
        ),
    )
    found = checkpoint.resume(folder, new, ADAM.init(new), rename=rename)
    assert_same(found, expected)
    told = started(folder, new, ADAM, rename=rename)
    assert_same(told, expected)
    moved = told.changes.moved["state: 0/0/mu/trunk/dense/bias"]
    assert moved == "state: 0/0/mu/encoder/bias"
    pattern = {"trunk/dense/**": "encoder/**"}
    shapes = jax.eval_shape(lambda: new)
    blank = jax.eval_shape(ADAM.init, shapes)
    assert_same(checkpoint.resume(folder, shapes, blank, rename=pattern), expected)
    with pytest.raises(ValueError, match=r"lacks 'trunk/dense.*rename=.*missing='st"):
        checkpoint.resume(folder, new, ADAM.init(new))


def test_a_head_is_added_and_another_dropped(run):
    """The rest goes on to the bit, with its counts; even from a state of a tree."""
    folder, params, state = run
    new = {"encoder": layer(8), "policy": layer(9, 5)}
    with pytest.raises(ValueError, match=r"'policy/bias' in the params.*missing='star"):
        checkpoint.resume(folder, new, ADAM.init(new))
    for given in (ADAM.init, ADAM.init(new)):
        found = checkpoint.resume(folder, new, given, missing="start")
        resumed, (adam, ema) = found
        assert_same(resumed, {"encoder": params["encoder"], "policy": new["policy"]})
        shadow = {"encoder": state[1].shadow["encoder"], "policy": new["policy"]}
        assert_same(ema, state[1]._replace(shadow=shadow))
        blank = jax.tree.map(jnp.zeros_like, new["policy"])
        assert_same(adam[0].mu, {"encoder": state[0][0].mu["encoder"], "policy": blank})
        assert_same(adam[0].count, state[0][0].count)
        goes_on(ADAM, *found)
    changes = found.changes
    assert changes.started["shadow: policy/bias"] == "not in the checkpoint"
    assert set(changes.left) == {
        f"{tree}head/{leaf}"
        for tree in ("params: ", "shadow: ", "state: 0/0/mu/", "state: 0/0/nu/")
        for leaf in ("bias", "kernel")
    }
    assert "left    params: head/bias, head/kernel" in str(changes)


def test_a_leaf_of_another_shape_starts(run):
    """As does all that belongs to it; its neighbour in the layer goes on."""
    folder, params, state = run
    new = {"encoder": layer(7), "head": layer(2) | {"bias": jnp.arange(4.0)}}
    with pytest.raises(ValueError, match=r"'params: head/bias' is \(2,\).*missing='s"):
        checkpoint.resume(folder, new, ADAM.init(new))
    found = started(folder, new, ADAM)
    assert found.changes.started["params: head/bias"] == "(2,) in the checkpoint"
    assert_same(found.params["head"]["bias"], jnp.arange(4.0))
    assert_same(found.opt_state[1].shadow["head"]["bias"], jnp.arange(4.0))
    assert_same(found.opt_state[0][0].nu["head"]["bias"], jnp.zeros(4))
    assert_same(found.params["head"]["kernel"], params["head"]["kernel"])
    assert_same(found.opt_state[0][0].nu["encoder"], state[0][0].nu["encoder"])


SCHEDULE = optax.cosine_decay_schedule(0.1, 10)
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE), EMA)


def test_clipping_and_a_schedule_are_added(run):
    """Adam's moments and count are found in their new place; the schedule starts."""
    folder, params, state = run
    found = started(folder, OLD, ADAMW)
    assert_same(found.params, params)
    assert_same(found.opt_state[1][0], state[0][0])
    assert_same(found.opt_state[2], state[1])
    assert dict(found.changes.started) == {
        "state: 1/2/count": "the checkpoint has no state of count"
    }
    assert found.changes.left == ()
    assert "state: 1 from 0 (9 leaves)" in str(found.changes)


@pytest.mark.long
def test_around_it_all_several_steps_of_gradients_are_added_up(run):
    """MultiSteps around Adam: what it adds starts as zeros, what it wraps goes on."""
    folder, _, state = run
    optimizer = optax.chain(
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        EMA,
    )
    found = started(folder, OLD, optimizer)
    steps = found.opt_state[0]
    assert_same(steps.inner_opt_state[0], state[0][0])
    assert_same(steps.acc_grads, jax.tree.map(jnp.zeros_like, OLD))
    assert_same(found.opt_state[1], state[1])


@pytest.mark.long
def test_another_optimizer(tmp_path):
    """From SGD to Adam: params and average go on, moments start, momentum is left."""
    before = optax.chain(optax.sgd(0.1, momentum=0.9), EMA)
    params, state = trained(before, OLD)
    checkpoint.save(tmp_path, params, state)
    found = started(tmp_path, OLD, ADAM)
    assert_same(found.params, params)
    assert_same(found.opt_state[1], state[1])
    assert_same(found.opt_state[0], ADAM.init(OLD)[0])
    assert {name for name in found.changes.left if "trace" not in name} == set()
    assert len(found.changes.left) == 4
    with pytest.raises(ValueError, match=r"Pass optimizer\.init itself"):
        checkpoint.resume(tmp_path, OLD, ADAM.init(OLD), missing="start")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: optax.contrib.schedule_free(inner, 0.1),
        lambda inner: optax.chain(inner, ema_optax.ema_params({"new": 0.9})),
    ],
    ids=["schedule-free", "a new average"],
)
def test_copies_of_params_are_copies_of_those_that_go_on(run, wrap):
    """With optimizer.init; from a tree they would be those of the fresh params."""
    folder, params, _ = run
    fresh = jax.tree.map(lambda x: x + 100, OLD)
    optimizer = wrap(optax.sgd(0.1))
    found = checkpoint.resume(folder, fresh, optimizer.init, missing="start")
    copies = (
        found.opt_state.z
        if hasattr(found.opt_state, "z")
        else found.opt_state[1].shadow["new"]
    )
    assert_same(copies, params)
    if hasattr(found.opt_state, "z"):
        with pytest.raises(ValueError, match=r"'z/encoder/bias'.*Pass optimizer\.init"):
            checkpoint.resume(folder, fresh, optimizer.init(fresh), missing="start")
    else:  # an average of ours is known to be a copy
        again = checkpoint.resume(folder, fresh, optimizer.init(fresh), missing="start")
        assert_same(again, tuple(found))


FROZEN = {
    "masked": lambda inner: optax.masked(inner, {"encoder": False, "head": True}),
    "multi_transform": lambda inner: optax.multi_transform(
        {"train": inner, "freeze": optax.set_to_zero()},
        {"encoder": "freeze", "head": "train"},
    ),
}


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
def test_a_layer_is_frozen_and_unfrozen(run, tmp_path, freeze):
    """Its moments are left; unfrozen they start; the others go on both times."""
    folder, params, state = run
    frozen = optax.chain(freeze(optax.adam(0.1)), EMA)
    found = started(folder, OLD, frozen)
    mu = {n: x for n, x in found.changes.moved.items() if "/mu/head/" in n}
    assert sorted(mu.values()) == [
        "state: 0/0/mu/head/bias",
        "state: 0/0/mu/head/kernel",
    ]
    assert not found.changes.started
    assert all("/encoder/" in name for name in found.changes.left)
    [adam] = [
        x
        for x in jax.tree.leaves(
            found.opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
        )
        if isinstance(x, optax.ScaleByAdamState)
    ]
    assert_same(adam.mu["head"], state[0][0].mu["head"])
    assert_same(adam.count, state[0][0].count)
    params, state = trained(frozen, *found[:1], 2, found.opt_state)
    checkpoint.save(tmp_path, params, state)
    back = started(tmp_path, OLD, ADAM)
    assert_same(back.params, params)
    assert_same(back.opt_state[1], state[1])
    assert int(back.opt_state[0][0].count) == 5
    zeros = jax.tree.map(jnp.zeros_like, OLD["encoder"])
    assert_same(back.opt_state[0][0].nu["encoder"], zeros)
    with pytest.raises(ValueError, match=r"Pass optimizer\.init"):
        checkpoint.resume(tmp_path, OLD, ADAM.init(OLD), missing="start")


def test_a_count_goes_on_with_what_it_counts(tmp_path):
    """Adam of a head that is new in every leaf: its bias correction starts too."""
    head_only = optax.masked(optax.adam(0.1), {"encoder": False, "head": True})
    optimizer = optax.chain(head_only, EMA)
    params, state = trained(optimizer, OLD)
    checkpoint.save(tmp_path, params, state)
    new = {"encoder": OLD["encoder"], "head": layer(4, 5)}
    found = started(tmp_path, new, optimizer)
    assert_same(found.opt_state[0], optimizer.init(new)[0])
    count = "state: 0/inner_state/0/count"
    assert found.changes.started[count] == "nothing that it counts goes on"
    assert int(found.opt_state[1].count) == 3  # of the encoder's shadow


def test_groups_with_an_optimizer_each_take_their_moments(run):
    """One Adam becomes two, of disjoint params: each finds its own."""
    folder, _, state = run
    two = optax.multi_transform(
        {"slow": optax.adam(0.01), "fast": optax.adam(0.1)},
        {"encoder": "slow", "head": "fast"},
    )
    found = started(folder, OLD, optax.chain(two, EMA))
    assert not found.changes.started
    slow = found.opt_state[0].inner_states["slow"].inner_state[0]
    assert_same(slow.mu["encoder"], state[0][0].mu["encoder"])
    assert_same(slow.count, state[0][0].count)


def test_two_alike_are_not_guessed(run):
    """Two states of one kind and of the same params, one saved: both start."""
    folder, _, _ = run
    twice = optax.chain(optax.scale_by_adam(), optax.scale_by_adam(), EMA)
    found = started(folder, OLD, twice)
    reasons = {x for n, x in found.changes.started.items() if n.startswith("state")}
    assert reasons == {
        "of the states of count, mu, nu here are 2 and in the checkpoint 1, and which "
        "is which is not known"
    }


def test_adapters_are_added_and_merged(run, tmp_path):
    """LoRA: the frozen base goes on under its new name, and merged it goes back."""
    folder, params, state = run
    base = {"encoder": {"base": OLD["encoder"], "lora": {"a": jnp.ones((3, 1))}}}
    new = base | {"head": OLD["head"]}
    labels = {"encoder": {"base": "freeze", "lora": "train"}, "head": "train"}
    optimizer = optax.chain(
        optax.multi_transform(
            {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, labels
        ),
        EMA,
    )
    found = started(folder, new, optimizer, rename={"encoder/base": "encoder"})
    assert_same(found.params["encoder"]["base"], params["encoder"])
    shadow = found.opt_state[1].shadow["encoder"]
    assert_same(
        shadow, {"base": state[1].shadow["encoder"], "lora": {"a": jnp.ones((3, 1))}}
    )
    checkpoint.save(tmp_path, *found)
    back = started(tmp_path, OLD, ADAM, rename={"encoder": "encoder/base"})
    assert_same(back.params, params)
    assert_same(back.opt_state[1], state[1])


def test_a_managers_restore_and_v1(run, tmp_path):
    """The same through both interfaces of Orbax, with what became of the leaves."""
    _, params, state = run
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=checkpoint.EmaSave(params, state))
        manager.wait_until_finished()
        args = checkpoint.EmaResume(OLD, ADAMW.init, missing="start")
        found = manager.restore(1, args=args)
    assert "state: 1/2/count" in found.changes.started
    assert_same(found.opt_state[1][0], state[0][0])
    again = v1.load_checkpointables(tmp_path / "1", {"default": args})["default"]
    assert_same(again, tuple(found))
    assert again.changes == found.changes
