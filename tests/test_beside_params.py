"""Shadows of a part of what is saved: found, placed, or refused; never raw params."""

import json

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from flax.training.train_state import TrainState

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import manifest
from ema_optax._checkpoint.sealed import write_sealed
from ema_optax._trees import locating, trees
from tests.same import assert_same

HALF = ema_optax.constant(0.5)


def trained(params, average=None, steps=3, size=1.0):
    """Params after some updates, their optimizer state, and the average in float64."""
    optimizer = optax.chain(optax.sgd(1.0), average or ema_optax.ema_params(HALF))
    state = optimizer.init(params)
    shadow = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for _ in range(steps):
        grads = jax.tree.map(lambda x: jnp.full_like(x, size), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        shadow = jax.tree.map(
            lambda s, p: s + 0.5 * (np.asarray(p, np.float64) - s), shadow, params
        )
    return params, state, shadow


def model(seed=0.0):
    return {"dense": {"kernel": jnp.arange(4.0) + seed, "bias": jnp.ones(2) + seed}}


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), actual, expected)


STATISTICS = {"norm": {"mean": jnp.full(2, 7.0), "count": jnp.int32(9)}}
WHOLE = {
    "a dict, as Linen has it": lambda p: {"params": p, "batch_stats": STATISTICS},
    "a pair, as Haiku has it": lambda p: (p, STATISTICS),
    "deeper": lambda p: {"model": {"variables": [STATISTICS, {"params": p}]}},
    "beside each other": lambda p: p | {"statistics": STATISTICS},
    "alone": lambda p: p,
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("average", ["ema", "named", "bema"])
def test_the_average_lies_where_the_params_are(tmp_path, whole, average):
    """Saved, restored, resumed, exported, read as a source: the same average."""
    transforms = {
        "ema": ema_optax.ema_params(HALF),
        "named": ema_optax.ema_params({"half": HALF, "slow": 0.99}),
        "bema": ema_optax.bema_params(every=1, bias_power=0.0, ema_power=0.0),
    }
    params, state, shadow = trained(model(), transforms[average])
    tree = "shadow/half" if average == "named" else "shadow"
    saved = whole(params)
    if average == "bema":
        shadow = ema_optax.shadow_params(state, params)
    expected = whole(shadow)
    checkpoint.save(tmp_path, saved, state, step=3)
    close(checkpoint.restore(tmp_path, tree, like=saved), expected)
    assert_same(checkpoint.restore(tmp_path, "params", like=saved), saved)
    zeros = jax.tree.map(jnp.zeros_like, (saved, state))
    assert_same(checkpoint.resume(tmp_path, *zeros), (saved, state))
    close(checkpoint.restore(tmp_path, tree, like=params), shadow)  # the model's alone
    done = ema_optax.safetensors.export(tmp_path, tmp_path / "m.safetensors", tree=tree)
    assert len(done.names) == len(jax.tree.leaves(saved))
    source = checkpoint.stored(tmp_path, tree)
    for path, leaf in by_path(expected).items():
        if path in source.leaves:
            np.testing.assert_allclose(
                source.read(path, (slice(None),) * np.ndim(leaf)), leaf, 1e-6
            )
    if average == "ema":
        entry = checkpoint.describe(tmp_path).trees["shadow"]
        assert entry.decay == HALF
        assert set(entry.leaves) < set(by_path(saved)) or saved is params


def by_path(tree):
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {trees.path_name(path): leaf for path, leaf in pairs}


@pytest.mark.long
def test_linen_with_batch_norm(tmp_path):
    """The statistics come back as what they are."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    variables = Model().init(jax.random.key(0), jnp.ones((2, 4)))
    params, state, shadow = trained(variables["params"])
    saved = {"params": params, "batch_stats": variables["batch_stats"]}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=checkpoint.EmaSave(saved, state))
        manager.wait_until_finished()
        args = checkpoint.EmaRestore("shadow", like=saved)
        found = manager.restore(1, args=args)
    close(found["params"], shadow)
    assert_same(found["batch_stats"], saved["batch_stats"])


def test_haiku(tmp_path):
    """What transform_with_state gives, as one pair."""

    def net(x):
        x = hk.Linear(3)(x)
        return hk.BatchNorm(True, True, 0.9)(x, is_training=True)

    params, rest = hk.transform_with_state(net).init(
        jax.random.key(0), jnp.ones((2, 4))
    )
    params, state, shadow = trained(params)
    checkpoint.save(tmp_path, (params, rest), state)
    found = checkpoint.restore(tmp_path, like=(params, rest))
    close(found[0], shadow)
    assert_same(found[1], rest)


def test_nnx_with_batch_norm(tmp_path):
    """A state of all variables, of which the optimizer saw the params alone."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    both = nnx.state(Model(nnx.Rngs(0)), (nnx.Param, nnx.BatchStat))
    params, state, shadow = trained(nnx.filter_state(both, nnx.Param))
    saved = nnx.merge_state(params, nnx.filter_state(both, nnx.BatchStat))
    checkpoint.save(tmp_path, saved, state)
    found = checkpoint.restore(tmp_path, like=saved)
    close(nnx.filter_state(found, nnx.Param), shadow)
    assert_same(
        nnx.filter_state(found, nnx.BatchStat), nnx.filter_state(both, nnx.BatchStat)
    )


def test_one_network_of_a_gan(tmp_path):
    """The generator is averaged; the critic has none, and asking for it is refused."""
    generator, state, shadow = trained(model())
    critic = {"dense": {"kernel": jnp.ones(5)}}
    both = {"generator": generator, "critic": critic}
    checkpoint.save(tmp_path, both, state)
    found = checkpoint.restore(tmp_path, like=both)
    close(found["generator"], shadow)
    assert_same(found["critic"], critic)
    with pytest.raises(
        ValueError, match=r"None of the slots .* averaged .*tree='params'"
    ):
        checkpoint.restore(tmp_path, like=critic)


@pytest.mark.parametrize("alike", [False, True])
def test_two_networks_with_an_average_each(tmp_path, alike):
    """Told by their shapes, or by the keys of the state; each comes back as its own."""
    one, one_state, one_shadow = trained(model())
    other = model(seed=50.0) if alike else {"out": jnp.arange(5.0)}
    other, other_state, other_shadow = trained(other, size=3.0, steps=5)
    params = {"generator": one, "critic": other}
    states = {"generator": one_state, "critic": other_state}
    checkpoint.save(tmp_path, params, states)
    found = checkpoint.restore(tmp_path, like=params)
    close(found, {"generator": one_shadow, "critic": other_shadow})
    zeros = jax.tree.map(jnp.zeros_like, (params, states))
    assert_same(checkpoint.resume(tmp_path, *zeros), (params, states))


def test_networks_that_cannot_be_told_apart_are_asked_for(tmp_path):
    """By a place, or by one for each average; a wrong one is refused."""
    params, state, shadow = trained(model())
    both = {"student": params, "teacher": model(seed=9.0)}
    with pytest.raises(ValueError, match=r"several places: 'student', 'teacher'\. Say"):
        checkpoint.save(tmp_path, both, state)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path, both, state, averaged="student")
    found = checkpoint.restore(tmp_path, like=both)
    close(found, {"student": shadow, "teacher": both["teacher"]})
    assert_same(checkpoint.resume(tmp_path, both, state), (both, state))
    with pytest.raises(
        ValueError, match=r"averaged='pupil': there .* missing.*'teacher'"
    ):
        checkpoint.EmaSave(both, state, averaged="pupil")
    pair = (state, state)
    with pytest.raises(ValueError, match=r"has the key 'x', .* at '0/1', '1/1'"):
        checkpoint.EmaSave(both, pair, averaged={"x": "student"})
    crossed = {"0": "student", "1": "student/dense"}
    part = trained(params["dense"])[1]
    with pytest.raises(ValueError, match="two averages"):
        checkpoint.EmaSave(both, (state, part), averaged=crossed)
    args = checkpoint.EmaSave(both, pair, averaged={"0": "teacher", "1": "student"})
    places = args.contents.manifest.averages["shadow"].places
    assert places == {"0/1": "teacher", "1/1": "student"}


def test_paths_that_collide(tmp_path):
    """A leaf of the same path and shape that belongs to another network."""
    params, state, _ = trained({"w": jnp.zeros(3)})
    saved = {"w": jnp.full(3, 5.0), "generator": params}
    with pytest.raises(ValueError, match="several places: 'generator', the whole"):
        checkpoint.save(tmp_path, saved, state)
    checkpoint.save(tmp_path, saved, state, averaged="generator")
    found = checkpoint.restore(tmp_path, like=saved)
    np.testing.assert_array_equal(found["w"], 5.0)
    np.testing.assert_allclose(found["generator"]["w"], [-2.125] * 3)


def test_train_states_and_wrappers_are_refused(tmp_path):
    """What was not given to the optimizer as it is; nothing is written."""
    params, state, _ = trained(model())
    whole = TrainState(0, None, params, optax.sgd(1.0), state)
    refused = [
        (whole, state, r"EmaSave\(train_state\.params, train_state\.opt_state\)"),
        ({"kernel": jnp.ones(4)}, state, "does not sit in these params"),
        (jax.tree.map(lambda x: x[:1], params), state, "'dense/.*' of shape"),
    ]
    for wrap in (optax.flatten, optax.contrib.split_real_and_imaginary):
        numbers = {"w": jnp.ones(2, complex), "v": jnp.ones(3)}
        wrapped = wrap(optax.chain(optax.sgd(1.0), ema_optax.ema_params(HALF)))
        refused.append(
            (numbers, wrapped.init(numbers), "goes around the optimizer alone")
        )
    for number, (tree, opt_state, message) in enumerate(refused):
        with pytest.raises(ValueError, match=message) as error:
            checkpoint.save(tmp_path, tree, opt_state, step=number)
        assert len(str(error.value)) < 900
    assert not list(tmp_path.iterdir())
    inside = optax.chain(optax.flatten(optax.sgd(1.0)), ema_optax.ema_params(HALF))
    checkpoint.save(tmp_path, params, inside.init(params))


def rewritten(tmp_path, change):
    """Saves variables, and changes what the manifest says."""
    params, state, shadow = trained(model())
    saved = {"params": params, "batch_stats": STATISTICS}
    checkpoint.save(tmp_path, saved, state)
    item = tmp_path / "0" / "default"
    path = manifest.manifest_path(epath.Path(item))
    content = json.loads(path.read_text())["content"]
    change(content)
    write_sealed(path, content)
    return saved, shadow


def test_a_shadow_that_sits_nowhere_is_not_filled_up_with_params(tmp_path):
    """Of an earlier version or a stranger: its own leaves, or an error."""

    def elsewhere(content):
        content["averages"]["shadow"]["places"] = {"1": "params"}
        leaves = content["trees"]["shadow"]["leaves"]
        leaves["other/kernel"] = leaves.pop("params/dense/kernel")
        structure = content["trees"]["shadow"]["structure"]["params"]["dense"]
        structure["kernel"] = "other/kernel"

    saved, _ = rewritten(tmp_path, elsewhere)
    with pytest.raises(ValueError, match="There is no leaf 'batch_stats/norm/count'"):
        checkpoint.restore(tmp_path, like=saved)


@pytest.mark.parametrize("place", [3, None, ["a"], {"1": 2}, {"1": None}])
def test_places_of_a_manifest_are_texts(tmp_path, place):
    """Anything else is refused, as the rest of a stranger's JSON is."""

    def malformed(content):
        content["averages"]["shadow"]["places"] = place

    saved, _ = rewritten(tmp_path, malformed)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="has the places"):
        checkpoint.restore(tmp_path, like=saved)


@pytest.mark.parametrize(
    ("averaged", "others", "leaves", "expected"),
    [
        ({"w": 1}, (), {"w": 1}, [""]),
        ({"w": 1}, ("b",), {"w": 1, "b": 2}, [""]),
        ({"w": 1}, ("b",), {"w": 1, "b/c": 2, "x/w": 1}, ["", "x"]),
        ({"w": 1}, ("b", "x"), {"w": 1, "b/c": 2, "x/w": 1}, [""]),
        ({"": 1}, (), {"": 1}, [""]),
        ({"": 1}, (), {"a": 1, "b": 1, "c": 2}, ["a", "b"]),
        ({"w": 1, "v": 2}, (), {"a/w": 1, "a/v": 2, "b/w": 1, "b/v": 1}, ["a"]),
        ({"w": 1}, (), {"raw": 1, "aw": 1}, []),
        ({}, (), {"w": 1}, [""]),
    ],
)
def test_places(averaged, others, leaves, expected):
    """Shapes are told apart, and keys are whole."""
    outline = locating.Outline(
        {path: (n,) for path, n in averaged.items()}, frozenset(others)
    )
    shapes = {path: (n,) for path, n in leaves.items()}
    assert locating.places_of(outline, shapes) == expected
