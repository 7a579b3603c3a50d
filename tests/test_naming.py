"""One way to name a tree, of a training state in memory and of a step on disk."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import bema_params, checkpoint, ema_params, reconstruction, shadow_params
from ema_optax._trees import naming

PARAMS = {"w": jnp.zeros(2)}
RAW, NAMES = 100.0, ("fast", "slow", "shadow", "params")
BOTH = "may be the shadow without a name or the one of that name"


def _state(decay):
    """Returns the state of an average, with a number for each name in its shadow."""
    state = ema_params(decay).init(PARAMS)
    if not isinstance(decay, dict):
        return state._replace(shadow={"w": jnp.full(2, 7.0)})
    shadow = {name: {"w": jnp.full(2, _number(name))} for name in decay}
    return state._replace(shadow=shadow)


def _number(name):
    return float(NAMES.index(name))


def _in_memory(state, name):
    params = {"w": jnp.full(2, RAW)}
    return shadow_params(state, params, name=name)


def _in_a_train_state(state, name):
    train_state = {"params": {"w": jnp.full(2, RAW)}, "opt_state": state}
    return ema_optax.with_shadow(train_state, name=name)["params"]


@pytest.fixture
def ways(tmp_path):
    """Each way to ask for a tree of a state, all of which have to give the same."""

    def asked(state, name):
        raw = {"w": jnp.full(2, RAW)}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        checkpoint.save(folder, raw, state, step=1)
        item = folder / "1" / "default"
        return [
            lambda: _in_memory(state, name),
            lambda: _in_a_train_state(state, name),
            lambda: checkpoint.restore(folder, name),
            lambda: checkpoint.EmaRestore(name, like=raw).read(item),
            lambda: reconstruction.merge([checkpoint.stored(folder, name)], [1.0]),
        ]

    return asked


def _same(ways, state, name, expected):
    for way in ways(state, name):
        np.testing.assert_array_equal(way()["w"], expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fast", 0.0),
        ("shadow/fast", 0.0),
        ("slow", 1.0),
        ("shadow", 2.0),
        ("shadow/shadow", 2.0),
        ("params", RAW),
        ("shadow/params", 3.0),
    ],
)
def test_a_name_means_the_same_in_memory_and_on_disk(ways, name, expected):
    """Also of shadows that are called as a tree is: `params` are the raw params."""
    _same(ways, _state(dict.fromkeys(NAMES, 0.9)), name, expected)


@pytest.mark.parametrize(
    ("decay", "expected"), [(0.9, 7.0), ({"slow": 0.9}, 1.0), ({"params": 0.9}, 3.0)]
)
def test_an_only_shadow_is_the_shadow(ways, decay, expected):
    """Whatever its name."""
    _same(ways, _state(decay), "shadow", expected)


@pytest.mark.parametrize(
    ("decay", "name", "names"),
    [
        (0.9, "fast", "'params', 'shadow'"),
        (0.9, "shadow/fast", "'params', 'shadow'"),
        ({"fast": 0.9, "slow": 0.9}, "fsat", "'params', 'fast', 'slow'"),
        ({"fast": 0.9, "slow": 0.9}, "shadow", "'params', 'fast', 'slow'"),
        ({"fast": 0.9, "slow": 0.9}, "", "'params', 'fast', 'slow'"),
        ({"fast": 0.9, "slow": 0.9}, "shadow/", "'params', 'fast', 'slow'"),
        ({"fast": 0.9, "slow": 0.9}, "state", "'params', 'fast', 'slow'"),
        ({"params": 0.9, "slow": 0.9}, "fast", "'params', 'shadow/params', 'slow'"),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_those_there_are(
    ways, decay, name, names
):
    """In the same words, and in an order that does not depend on the place."""
    for way in ways(_state(decay), name):
        with pytest.raises(ValueError, match="no tree") as caught:
            way()
        assert f"There is no tree {name!r}; there are {names}." in str(caught.value)


def test_a_shadow_without_a_name_beside_one_of_that_name(ways):
    """Neither is taken for the other: the error says how each is called."""
    state = (_state({"shadow": 0.9}), bema_params(every=1).init(PARAMS))
    for way in ways(state, "shadow"):
        with pytest.raises(ValueError, match=BOTH) as caught:
            way()
        assert "'shadow/'" in str(caught.value)
        assert "'shadow/shadow'" in str(caught.value)
    _same(ways, state, "shadow/shadow", 2.0)
    memory = _in_memory(state, "shadow/")["w"]
    for way in ways(state, "shadow/"):
        np.testing.assert_array_equal(way()["w"], memory)
    assert memory[0] != _number("shadow")


@pytest.mark.parametrize("name", ["a/b", "shadow/x", ""])
def test_a_shadow_is_not_called_by_a_path(name):
    """Or `shadow/x` would be two."""
    with pytest.raises(ValueError, match="without '/'"):
        ema_params({name: 0.9, "fast": 0.9})


def test_raw_params_are_not_in_an_optimizer_state():
    with pytest.raises(ValueError, match="Pass them: shadow_params"):
        shadow_params(_state(0.9), name="params")


def test_what_is_of_a_shadow_takes_no_raw_params():
    """Not even where a shadow is called so; its full name is."""
    state = _state({"params": 0.9, "slow": 0.9})
    for call in (
        lambda name: ema_optax.metrics(state, PARAMS, name=name),
        lambda name: ema_optax.diagnose(state, PARAMS, name=name),
        lambda name: ema_optax.started_from(state, PARAMS, count=1, name=name),
    ):
        with pytest.raises(ValueError, match="are the raw params"):
            call("params")
        assert call("shadow/params")


@pytest.mark.parametrize("name", ["fast", "shadow/fast"])
def test_figures_are_of_the_shadow_that_is_named(name):
    state = _state({"fast": 0.9, "slow": 0.9})
    params = {"w": jnp.ones(2)}
    every = ema_optax.metrics(state, params)
    figures = ema_optax.metrics(state, params, name=name)
    for key, value in figures.items():
        np.testing.assert_array_equal(value, every[f"fast/{key}"])
    started = ema_optax.started_from(state, {"w": jnp.full(2, 5.0)}, count=0, name=name)
    np.testing.assert_array_equal(started.shadow["fast"]["w"], 5.0)
    np.testing.assert_array_equal(started.shadow["slow"]["w"], 1.0)


@pytest.mark.parametrize("name", ["a", "shadow/a"])
def test_snapshots_are_chosen_by_either_name(tmp_path, name):
    decays = {"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}
    transform = optax.chain(optax.sgd(0.1), ema_params(decays))
    updates, state = transform.update(PARAMS, transform.init(PARAMS), PARAMS)
    checkpoint.save(tmp_path, optax.apply_updates(PARAMS, updates), state, step=1)
    (snapshot,) = checkpoint.snapshots(tmp_path, names=[name])
    assert snapshot.exponent == pytest.approx(decays["a"].exponent)


@pytest.mark.parametrize("name", ["slow", "shadow/slow"])
def test_commands_take_either_name(tmp_path, name, capsys):
    """To merge and to export; what is written says the name of the tree in full."""
    numpy = pytest.importorskip("safetensors.numpy")
    run, state = tmp_path / "run", _state({"fast": 0.9, "slow": 0.9})
    for step in (1, 2):
        checkpoint.save(run, PARAMS, state, step=step)
    merged, file = tmp_path / "merged", tmp_path / "slow.safetensors"
    merge = ["merge", str(run), "--last", "2", "--tree", name, "--out", str(merged)]
    assert cli.main(merge) == 0
    np.testing.assert_array_equal(checkpoint.restore(merged)["w"], _number("slow"))
    assert cli.main(["export", str(run), "--out", str(file), "--tree", name]) == 0
    assert "shadow/slow" in capsys.readouterr().out
    np.testing.assert_array_equal(numpy.load_file(file)["w"], _number("slow"))
    assert cli.main(["export", str(run), "--out", f"{file}2", "--tree", "slwo"]) != 0
    assert "There is no tree 'slwo'" in capsys.readouterr().err


def test_spelled_names_mean_their_trees():
    trees = ["params", "shadow", "shadow/fast", "shadow/params"]
    names = naming.spelled(trees)
    assert names == ["params", "shadow", "fast", "shadow/params"]
    assert [naming.chosen(name, trees, "Pass ") for name in names] == trees
