"""A run whose averages change, or what lies around its params: which ones go on."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import ema_optax
from ema_optax import checkpoint, placement
from tests import older
from tests.same import assert_same

PARAMS = {"encoder": {"w": jnp.arange(6.0).reshape(2, 3)}, "head": jnp.ones(2)}
FRESH = jax.tree.map(lambda x: x - 50, PARAMS)
SLOW = ema_optax.ema_params({"slow": 0.99})


def chain(*averages):
    return optax.chain(optax.adam(0.1), *averages)


def trained(optimizer, params=PARAMS, times=4):
    state = optimizer.init(params)
    for _ in range(times):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def saved(folder, optimizer, params=PARAMS, times=4):
    params, state = trained(optimizer, params, times)
    checkpoint.save(folder, params, state)
    return params, state


def started(folder, optimizer, params=FRESH, **options):
    return checkpoint.resume(folder, params, optimizer.init, missing="start", **options)


def test_an_average_is_added(tmp_path):
    """The old one goes on at its count; the new one starts as the params that do."""
    params, state = saved(tmp_path, chain(ema_optax.ema_params(0.9)))
    both = chain(ema_optax.ema_params(0.9), SLOW)
    with pytest.raises(
        ValueError, match=r"has shadow, .*has shadow, shadow/slow.*miss"
    ):
        checkpoint.resume(tmp_path, PARAMS, both.init(PARAMS))
    for given in (both.init, both.init(FRESH), jax.eval_shape(both.init, FRESH)):
        found = checkpoint.resume(tmp_path, FRESH, given, missing="start")
        assert_same(found.params, params)
        assert_same(found.opt_state[1], state[1])
        assert_same(found.opt_state[2].shadow["slow"], params)
        assert int(found.opt_state[2].count) == 0
        assert_same(found.opt_state[0], state[0])
        live = found.params["head"].unsafe_buffer_pointer()
        new = found.opt_state[2].shadow["slow"]["head"]
        assert new.unsafe_buffer_pointer() != live
    why = found.changes.started
    assert why["state: 2/count"] == "its average starts"
    assert "rename={'shadow/slow': 'shadow'}" in why["shadow/slow: head"]


def test_a_state_that_has_trained_starts_an_average_at_no_count(tmp_path):
    """What starts is new, whatever the state that was passed has seen."""
    params, _ = saved(tmp_path, chain(ema_optax.ema_params(0.9)))
    used = trained(chain(SLOW), FRESH, 3)[1]
    found = checkpoint.resume(tmp_path, FRESH, used, missing="start")
    assert int(found.opt_state[1].count) == 0
    assert_same(found.opt_state[1].shadow["slow"], params)


def test_an_average_is_dropped(tmp_path):
    """One of two, or the only one: it is left, and said to be."""
    params, state = saved(tmp_path, chain(ema_optax.ema_params(0.9), SLOW))
    found = started(tmp_path, chain(SLOW))
    assert_same(found.opt_state, (state[0], state[2]))
    assert found.changes.left == ("shadow: encoder/w", "shadow: head")
    none = started(tmp_path, chain())
    assert_same(none, (params, (state[0],)))
    assert len(none.changes.left) == 4


def test_an_average_goes_on_under_another_name(tmp_path):
    """Asked for, never guessed; exactly, and with more that changes."""
    params, state = saved(tmp_path, chain(ema_optax.ema_params(0.99)))
    rename = {"shadow/slow": "shadow"}
    for options in ({}, {"missing": "start"}):
        found = checkpoint.resume(
            tmp_path, FRESH, chain(SLOW).init(FRESH), rename=rename, **options
        )
        assert_same(found[1][1].shadow["slow"], state[1].shadow)
        assert int(found[1][1].count) == 4
    assert found.changes.moved["shadow/slow: head"] == "shadow: head"
    assert found.changes.left == ()
    alone = started(tmp_path, chain(SLOW))
    assert_same(alone.opt_state[1].shadow["slow"], params)
    both = ema_optax.ema_params({"slow": 0.99, "new": 0.99})
    found = started(tmp_path, chain(both), rename=rename)
    assert int(found.opt_state[1].count) == 4  # one count for both, and one goes on
    assert_same(found.opt_state[1].shadow["new"], params)
    for wrong, said in {
        "shadow/slo": "has 'shadow/slo', and the optimizer state has 'shadow/slow'",
        "shadow": "has 'shadow', and the optimizer state has 'shadow/slow'",
    }.items():
        with pytest.raises(ValueError, match=said):
            started(tmp_path, chain(SLOW), rename={wrong: "shadow"})
    with pytest.raises(ValueError, match="'shadow/old', and the checkpoint has 'shad"):
        started(tmp_path, chain(SLOW), rename={"shadow/slow": "shadow/old"})


def test_a_param_may_be_called_as_an_average_is(tmp_path):
    """A name of both is an error that says how to name the param."""
    params = {"shadow": jnp.ones(2), "w": jnp.ones(3)}
    saved(tmp_path, chain(ema_optax.ema_params(0.9)), params)
    plain = chain(ema_optax.ema_params(0.9))
    with pytest.raises(ValueError, match=r"write 'shadow/\*\*': 'shadow/\*\*'"):
        started(tmp_path, plain, params, rename={"shadow": "shadow"})
    rename = {"shadow/**": "w/**"}
    found = started(tmp_path, plain, {"shadow": jnp.zeros(3)}, rename=rename)
    assert found.changes.moved["params: shadow"] == "params: w"


@pytest.mark.parametrize("new", [{"decay": 0.9}, {"decay": 0.99, "every": 2}])
def test_another_decay_is_asked_for(tmp_path, new):
    """With what fits as with all of it."""
    _, state = saved(tmp_path, chain(ema_optax.ema_params(0.99)))
    other = chain(ema_optax.ema_params(**new))
    with pytest.raises(ValueError, match="Pass accept_new_decay=True"):
        started(tmp_path, other)
    found = started(tmp_path, other, accept_new_decay=True)
    assert_same(found.opt_state[1].shadow, state[1].shadow)
    assert int(found.opt_state[1].count) == 4


def test_bema_and_back(tmp_path):
    """What was read of BEMA goes on as an EMA, if asked; BEMA itself starts."""
    bema = ema_optax.bema_params(every=1, lag=3)
    params, state = saved(tmp_path / "bema", chain(bema))
    read = ema_optax.shadow_params(state, params)
    plain = chain(ema_optax.ema_params(0.9))
    with pytest.raises(
        ValueError, match=r"'shadow' is of bema_params\(every=1.*accept"
    ):
        started(tmp_path / "bema", plain)
    found = started(tmp_path / "bema", plain, accept_new_decay=True)
    assert_same(found.opt_state[1].shadow, read)
    assert int(found.opt_state[1].count) == 4
    checkpoint.save(tmp_path / "ema", *found)
    for given in (chain(bema).init, chain(bema).init(FRESH)):
        back = checkpoint.resume(tmp_path / "ema", FRESH, given, missing="start")
        assert_same(back.opt_state[1], bema.init(params))
        assert back.changes.left == ("shadow: encoder/w", "shadow: head")
    with pytest.raises(ValueError, match=r"bema_params\(every=1.*go on with bema_par"):
        started(tmp_path / "bema", chain(ema_optax.bema_params(every=2, lag=3)))


@pytest.mark.parametrize("from_tree", [True, False])
def test_bema_goes_on_leaf_by_leaf(tmp_path, from_tree):
    """Average, first params and count; of a new leaf both are its value."""
    bema = ema_optax.bema_params(every=1, lag=3)
    _, state = saved(tmp_path, chain(bema))
    new = FRESH | {"new": jnp.full(2, 3.0)}
    clipped = optax.chain(optax.clip(1.0), optax.adam(0.1), bema)
    given = clipped.init(new) if from_tree else clipped.init
    found = checkpoint.resume(tmp_path, new, given, missing="start")
    ours = found.opt_state[2]
    assert_same(ours.average, state[1].average | {"new": new["new"]})
    assert_same(ours.anchor, state[1].anchor | {"new": new["new"]})
    assert int(ours.count) == 4
    assert found.changes.left == ()


def test_several_averages_with_one_count(tmp_path):
    """Two of different counts cannot share one: the error says how to chain them."""
    fast, slow = ema_optax.ema_params({"fast": 0.9}), SLOW
    params, state = trained(chain(fast))
    state = (*state, slow.init(params))  # added after four updates
    _, state = chain(fast, slow).update(params, state, params)
    checkpoint.save(tmp_path, params, state)
    apart = started(tmp_path, chain(slow, fast))
    assert int(apart.opt_state[1].count) == 1
    assert int(apart.opt_state[2].count) == 5
    assert_same(apart.opt_state[1], state[2])
    with pytest.raises(
        ValueError, match=r"share one count.*'shadow/fast' 5, 'shadow/slow' 1"
    ):
        started(tmp_path, chain(ema_optax.ema_params({"fast": 0.9, "slow": 0.99})))


def test_two_networks_with_counts_of_their_own(tmp_path):
    """One shadow on disk, of two states: each takes the count of its place."""
    ema = chain(ema_optax.ema_params(0.9))
    generator, critic = trained(ema, PARAMS, 2), trained(ema, FRESH, 5)
    params = {"generator": generator[0], "critic": critic[0]}
    state = {"generator": generator[1], "critic": critic[1]}
    checkpoint.save(tmp_path, params, state)
    new = {"generator": PARAMS, "critic": FRESH | {"more": jnp.ones(1)}}

    def init(params):
        return {name: ema.init(part) for name, part in params.items()}

    found = checkpoint.resume(tmp_path, new, init, missing="start")
    assert int(found.opt_state["generator"][1].count) == 2
    assert int(found.opt_state["critic"][1].count) == 5
    assert_same(found.opt_state["generator"], state["generator"])
    mu = found.opt_state["critic"][0][0].mu
    assert_same({k: mu[k] for k in FRESH}, critic[1][0][0].mu)
    one = {"generator": PARAMS}
    alone = checkpoint.resume(tmp_path, one, init, missing="start")
    assert_same(alone.opt_state["generator"], state["generator"])


def variables(params):
    return {"params": params, "batch_stats": {"mean": jnp.full(2, 7.0)}}


def test_params_beside_other_state(tmp_path):
    """Shadow and moments are at paths inside; statistics go on with the params."""
    optimizer = chain(ema_optax.ema_params(0.9))
    params, state = trained(optimizer)
    checkpoint.save(tmp_path, variables(params), state)
    new = variables(FRESH | {"new": jnp.ones(3)})

    def init(variables):
        return optax.chain(optax.clip(1.0), optimizer).init(variables["params"])

    found = checkpoint.resume(tmp_path, new, init, missing="start")
    assert_same(found.params, variables(params | {"new": jnp.ones(3)}))
    adam, ema = found.opt_state[1]
    assert_same(ema.shadow, state[1].shadow | {"new": jnp.ones(3)})
    assert_same(adam[0].mu, state[0][0].mu | {"new": jnp.zeros(3)})
    renamed = variables({"trunk": FRESH["encoder"], "head": FRESH["head"]})
    rename = {"params/trunk": "params/encoder"}
    blank = optimizer.init(renamed["params"])
    _, (adam, ema) = checkpoint.resume(tmp_path, renamed, blank, rename=rename)
    assert_same(adam[0].nu["trunk"], state[0][0].nu["encoder"])
    assert_same(ema.shadow["trunk"], state[1].shadow["encoder"])
    # The params alone, which were saved inside: their optimizer was given them so.
    alone = checkpoint.resume(
        tmp_path, FRESH, optimizer.init, missing="start", rename={"": "params"}
    )
    assert_same(alone, (params, state))
    assert alone.changes.left == ("params: batch_stats/mean",)


@pytest.mark.parametrize("beside", [True, False])
def test_a_step_without_an_optimizer(tmp_path, beside):
    """An average that was imported: params, shadow and count go on, Adam starts."""
    params, shadow = PARAMS, jax.tree.map(lambda x: x + 0.5, PARAMS)
    if beside:
        checkpoint.save_average(tmp_path, shadow, params=params, step=1200)
    else:
        checkpoint.save_average(tmp_path, shadow, step=1200)
    optimizer = chain(ema_optax.ema_params(0.999))
    with pytest.raises(ValueError, match=r"no optimizer state.*missing='start'"):
        checkpoint.resume(tmp_path, FRESH, optimizer.init(FRESH))
    found = started(tmp_path, optimizer)
    assert_same(found.params, params if beside else shadow)
    assert_same(found.opt_state[1].shadow, shadow)
    assert int(found.opt_state[1].count) == 1200
    assert_same(found.opt_state[0], optimizer.init(PARAMS)[0])
    reasons = {x for n, x in found.changes.started.items() if n.startswith("state: 0")}
    assert reasons == {"the checkpoint has no state of count, mu, nu"}
    head = found.opt_state[1].shadow["head"].unsafe_buffer_pointer()
    assert head != found.params["head"].unsafe_buffer_pointer()


@pytest.mark.parametrize("from_tree", [True, False])
def test_shadows_stay_where_they_are_kept(tmp_path, from_tree):
    """Packed with others, in the host's memory, in a narrower dtype."""
    _, state = saved(tmp_path, chain(ema_optax.ema_params(0.9)))
    new = FRESH | {"new": jnp.full(2, 1.5)}
    full = state[1].shadow | {"new": new["new"]}
    for options in (
        {"pack_small": True},
        *([{"shadow_sharding": placement.in_host_memory()}] * older.has_host_memory()),
        {"shadow_dtype": "bfloat16"},
    ):
        optimizer = chain(ema_optax.ema_params(0.9, **options))
        like = optimizer.init(new)
        given = like if from_tree else optimizer.init
        found = checkpoint.resume(tmp_path, new, given, missing="start")
        kept, slots = found.opt_state[1].shadow, like[1].shadow
        for x, slot in zip(jax.tree.leaves(kept), jax.tree.leaves(slots), strict=True):
            assert (x.dtype, x.sharding) == (slot.dtype, slot.sharding)
        read = ema_optax.shadow_params(found.opt_state, new)
        if "shadow_dtype" in options:
            assert found.changes.cast["shadow: head"] == "float32 → bfloat16"
            expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("f4"), full)
        else:
            assert not found.changes.cast
            expected = full
        assert_same(read, expected)


def test_moments_in_another_dtype_are_cast(tmp_path):
    """Floats to floats, as restore casts them, and listed; others start."""
    half = optax.chain(optax.adam(0.1, mu_dtype="bfloat16"), ema_optax.ema_params(0.9))
    _, state = saved(tmp_path, half)
    optimizer = chain(ema_optax.ema_params(0.9))
    with pytest.raises(ValueError, match="missing='start' casts"):
        checkpoint.resume(tmp_path, FRESH, optimizer.init(FRESH))
    found = started(tmp_path, optimizer)
    assert found.changes.cast == {
        f"state: 0/0/mu/{leaf}": "bfloat16 → float32" for leaf in ("encoder/w", "head")
    }
    expected = jax.tree.map(lambda x: x.astype("float32"), state[0][0].mu)
    assert_same(found.opt_state[0][0].mu, expected)
    whole = jax.tree.map(lambda x: x.astype("int32"), FRESH)
    with pytest.raises(ValueError, match="Only floats are cast"):
        started(tmp_path, optax.adam(0.1), whole)


def test_a_layer_is_averaged_or_not(tmp_path):
    """What a mask leaves out is left; let in again it starts as the param is."""
    plain = chain(ema_optax.ema_params(0.9))
    mask = {"encoder": {"w": True}, "head": False}
    masked = chain(ema_optax.ema_params(0.9, mask=mask))
    params, state = saved(tmp_path / "plain", plain)
    found = started(tmp_path / "plain", masked)
    assert found.changes.left == ("shadow: head",)
    assert_same(found.opt_state[1].shadow["encoder"], state[1].shadow["encoder"])
    checkpoint.save(tmp_path / "masked", *found)
    back = started(tmp_path / "masked", plain)
    assert dict(back.changes.started) == {"shadow: head": "not in the checkpoint"}
    shadow = {"encoder": state[1].shadow["encoder"], "head": params["head"]}
    assert_same(back.opt_state[1], state[1]._replace(shadow=shadow))


@older.needs_nnx
def test_nnx(tmp_path):
    """A module of Flax NNX with a layer more, its own state among what goes on."""

    def build(*names):
        layers = {
            name: nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i, name in enumerate(names)
        }
        model = nnx.Dict(layers)
        return model, nnx.Optimizer(
            model, chain(ema_optax.ema_params(0.9)), wrt=nnx.Param
        )

    model, optimizer = build("a", "b")
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    state, opt_state = ema_optax.nnx.split(model, optimizer)
    checkpoint.save(tmp_path, state, opt_state)
    new, its_optimizer = build("a", "b", "c")
    c = ema_optax.nnx.split(new, its_optimizer)[0]["c"]
    found = checkpoint.resume(
        tmp_path, *ema_optax.nnx.split(new, its_optimizer), missing="start"
    )
    ema_optax.nnx.update(new, its_optimizer, *found)
    resumed, resumed_state = ema_optax.nnx.split(new, its_optimizer)
    assert_same(resumed["a"], state["a"])
    assert int(resumed_state["step"]) == 1
    ema = its_optimizer.opt_state[1]
    assert int(ema.count[...]) == 1
    shadow = ema_optax.nnx.shadow_copy(new, its_optimizer)
    assert_same(nnx.as_pure(nnx.state(shadow, nnx.Param))["c"], c)
    assert all("/c/" in name or ": c/" in name for name in found.changes.started)


def test_what_is_abstract_cannot_start(tmp_path):
    """Params, or what the optimizer would start with; shadows start as copies."""
    params, _ = saved(tmp_path, chain(SLOW))
    shapes = jax.eval_shape(lambda: FRESH | {"new": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"'params: new'.*abstract.*model\.init\("):
        started(tmp_path, chain(SLOW), shapes)
    few = jax.eval_shape(lambda: FRESH)
    optimizer = optax.chain(optax.sgd(optax.constant_schedule(0.1)), SLOW)
    blank = jax.eval_shape(optimizer.init, few)
    with pytest.raises(
        ValueError, match=r"'state: 0/1/count'.*abstract.*optimizer\.in"
    ):
        checkpoint.resume(tmp_path, few, blank, missing="start")
    assert_same(started(tmp_path, optimizer, few).params, params)


def test_refused_in_words(tmp_path):
    """Nothing that fits, another choice, snapshots, an optimizer for its state."""
    saved(tmp_path / "run", chain(SLOW))
    for wrong in ("x", "", None, True, ["start"]):
        with pytest.raises(ValueError, match=r"missing is 'refuse'.*'start'"):
            checkpoint.resume(tmp_path / "run", FRESH, SLOW.init, missing=wrong)
    with pytest.raises(
        ValueError, match=r"Nothing .*fits.*'heads' is not.*nearest are"
    ):
        started(tmp_path / "run", chain(SLOW), {"heads": jnp.ones(2)})
    new = {"encoder": PARAMS["encoder"], "top": PARAMS["head"]}
    with pytest.raises(ValueError, match=r"other way round: .*\{'top': 'head'"):
        started(tmp_path / "run", chain(SLOW), new, rename={"head": "top"})
    for options in ({}, {"missing": "start"}):
        with pytest.raises(ValueError, match=r"'head', and the checkpoint has no"):
            checkpoint.resume(
                tmp_path / "run",
                FRESH,
                chain(SLOW).init(FRESH),
                rename={"head": "haed"},
                **options,
            )
    with pytest.raises(TypeError, match=r"function.*missing='start'"):
        checkpoint.resume(tmp_path / "run", FRESH, chain(SLOW).init)
    with pytest.raises(TypeError, match="This is an optimizer"):
        checkpoint.resume(tmp_path / "run", FRESH, chain(SLOW), missing="start")
    with pytest.raises(ValueError, match="swapped"):
        checkpoint.resume(
            tmp_path / "run", chain(SLOW).init(FRESH), FRESH, missing="start"
        )
    state = trained(chain(SLOW))[1]
    with ocp.CheckpointManager(tmp_path / "snapshots") as manager:
        manager.save(1, args=checkpoint.SnapshotSave(state))
        manager.wait_until_finished()
    with pytest.raises(ValueError, match="no params"):
        started(tmp_path / "snapshots", chain(SLOW))
