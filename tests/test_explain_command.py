"""`ema-optax inspect --explain`: what a checkpoint alone tells of its averages."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint, constant, diagnose, ema_params, power
from ema_optax.checkpoint import StoredTree
from tests.test_inspect import flip_a_bit, reseal

NOISY = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)


def state_of(average, count, optimizer_count=None):
    """Returns a state that has seen so many updates, and params beside its shadow."""
    shadow = {"dense": {"w": jnp.ones((8, 8))}, "n": jnp.int32(3)}
    optimizer = optax.chain(optax.scale_by_adam(), average)
    adam, average = optimizer.init(shadow)
    adam = adam._replace(count=jnp.int32(optimizer_count or count))
    state = adam, average._replace(count=jnp.int32(count))
    return state, {"dense": {"w": 1 + 0.1 * NOISY}, "n": jnp.int32(3)}


def told(folder, capsys, *options):
    """Returns what the command prints, which ends well."""
    assert cli.main(["inspect", str(folder), "--explain", *options]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def explained(folder, capsys, *options):
    """Returns what it says as JSON."""
    return json.loads(told(folder, capsys, "--json", *options))["explained"]


def keys(content):
    return [each["what"] for each in content["findings"]]


@pytest.mark.parametrize(
    ("average", "count", "optimizer_count", "expected"),
    [
        (ema_params(0.99), 1000, None, []),
        (ema_params(power(0.05), every=10), 1003, None, []),
        (ema_params({"a": 0.9, "b": 0.99}), 1000, None, []),
        (ema_params(constant(0.9999)), 1000, None, ["initial_weight"]),
        (ema_params(ema_optax.uniform()), 1000, None, ["lag"]),
        (ema_params(constant(0.1)), 1000, None, ["too_short"]),
        (ema_params(0.999), 50, 5000, ["restarted"]),
        (ema_params(0.99), 0, 1, ["never_folded"]),
        (ema_params(0.99, every=200), 30, None, ["never_folded"]),
        (ema_optax.bema_params(), 900, None, ["initial_weight"]),
        (ema_optax.ring(4, every=2), 9, None, []),
        (ema_optax.ring(4, every=20), 9, None, ["never_folded"]),
    ],
    ids=[
        "healthy",
        "healthy power",
        "healthy names",
        "initial weight",
        "lag",
        "too short",
        "restarted",
        "never folded",
        "every too long",
        "bema",
        "ring",
        "ring before its first copy",
    ],
)
def test_it_says_what_diagnose_says(
    average, count, optimizer_count, expected, tmp_path, capsys
):
    """The same findings and figures, from the disk alone."""
    state, params = state_of(average, count, optimizer_count)
    checkpoint.save(tmp_path, params, state, step=7)
    content = explained(tmp_path, capsys)
    assert keys(content) == expected
    assert not content["unchecked"]
    found = json.loads(diagnose(state, params).to_json())
    if not isinstance(state[1], ema_optax.BemaParamsState):  # its readout is on disk
        assert content["figures"] == found["figures"]
    assert content["findings"] == found["findings"]
    text = told(tmp_path, capsys)
    for each in content["findings"]:
        assert f"{each['severity']}: {each['sentence']}" in text
        assert each["remedy"] in text
    assert ("nothing found" in text) == (not expected)
    assert "\n  decay" not in text.partition("shadow:")[0]


def test_dead_zones_are_told_with_their_doubt(tmp_path, capsys):
    """How float32 shadows are rounded is not on disk, which is said."""
    state, _ = state_of(ema_params(constant(0.9999)), 90_000)
    params = {"dense": {"w": 1 + 1e-4 * NOISY}, "n": jnp.int32(3)}
    checkpoint.save(tmp_path, params, state, step=7)
    content = explained(tmp_path, capsys)
    assert keys(content) == ["dead_zone"]
    assert content["findings"] == [
        json.loads(diagnose(state, params).to_json())["findings"][0]
    ]
    assert len(content["unchecked"]) == 1
    assert "rounded by chance" in content["unchecked"][0]


def test_statistics_beside_the_params(tmp_path, capsys):
    """Restoring the shadow takes those of the raw params."""
    state, params = state_of(ema_params(0.99), 1000)
    stats = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    variables = {"params": params, "batch_stats": stats}
    checkpoint.save(tmp_path, variables, state, step=7)
    content = explained(tmp_path, capsys)
    assert keys(content) == ["batch_stats"]
    assert "'batch_stats/bn/mean'" in content["findings"][0]["sentence"]
    assert content["figures"][""]["averaged_elements"] == 64


def test_micro_batches(tmp_path, capsys):
    """The state on disk has the counts of `MultiSteps` too."""
    optimizer = optax.chain(optax.MultiSteps(optax.sgd(0.1), 4), ema_params(0.9))
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    multi = state[0]._replace(gradient_step=jnp.int32(100), mini_step=jnp.int32(3))
    state = multi, state[1]._replace(count=jnp.int32(403))
    checkpoint.save(tmp_path, {"w": jnp.zeros(3)}, state, step=7)
    content = explained(tmp_path, capsys)
    assert keys(content) == ["micro_batches"]
    assert content["findings"][0]["figures"]["micro_batches"] == 4


def test_it_reads_one_leaf_at_a_time(tmp_path, capsys, monkeypatch):
    """Of those that are averaged, in shadow and params; the others are not read."""
    params = {f"w{i}": jnp.full(4, float(i)) for i in range(3)} | {"out": jnp.ones(9)}
    mask = {name: name != "out" for name in params}
    state = ema_params(0.99, mask=mask).init(params)._replace(count=jnp.int32(900))
    checkpoint.save(tmp_path, jax.tree.map(lambda x: x + 1, params), state, step=7)
    asked = []
    read = StoredTree.read

    def noted(self, path, index):
        asked.append(path)
        return read(self, path, index)

    monkeypatch.setattr(StoredTree, "read", noted)
    content = explained(tmp_path, capsys)
    assert asked == ["w0", "w0", "w1", "w1", "w2", "w2"]
    assert content["figures"][""]["averaged_elements"] == 12


def test_an_average_alone_and_an_unknown_decay(tmp_path, capsys):
    """What cannot be looked at is said, and is no finding."""
    checkpoint.save_average(tmp_path / "one", {"w": jnp.ones(2)}, step=3)
    content = explained(tmp_path / "one", capsys)
    assert not content["findings"]
    assert len(content["unchecked"]) == 2
    assert "without raw params" in content["unchecked"][1]
    params = {"w": jnp.full(2, 2.0)}
    known = constant(0.999)
    average = {"w": jnp.ones(2)}
    checkpoint.save_average(
        tmp_path / "in", average, params=params, step=200, decay=known
    )
    text = told(tmp_path / "in", capsys)
    assert "nothing found in what was looked at\n" in text
    assert "constant(decay=0.999), and how many updates lie between two folds" in text
    state, params = state_of(ema_params(lambda step: 0.9), 500)
    checkpoint.save(tmp_path / "two", params, state, step=3)
    content = explained(tmp_path / "two", capsys)
    assert not content["findings"]
    assert "decay is not recorded" in content["unchecked"][0]
    assert "decay not recorded" in told(tmp_path / "two", capsys)


def test_steps_and_items_are_chosen(tmp_path, capsys):
    """`--step` takes another; without `--explain` nothing is read or said."""
    for step, count in ((1, 1000), (2, 100_000)):
        state, params = state_of(ema_params(constant(0.9999)), count)
        checkpoint.save(tmp_path, params, state, step=step)
    assert keys(explained(tmp_path, capsys, "--step", "1")) == ["initial_weight"]
    assert keys(explained(tmp_path, capsys)) == []
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    assert "explained" not in json.loads(capsys.readouterr().out)


def test_stacked_states(tmp_path, capsys):
    """Each member has a count of its own: said, not guessed."""
    transform = ema_params(0.99)
    params = {"w": jnp.ones((2, 3))}
    checkpoint.save(tmp_path, params, jax.vmap(transform.init)(params), step=3)
    content = explained(tmp_path, capsys)
    assert not content["findings"]
    assert "stacked" in content["unchecked"][0]


def test_damage_is_an_error(tmp_path, capsys):
    """Nothing is said of what is not what was saved."""
    state, params = state_of(ema_params(0.99), 1000)
    params["dense"]["w"] = np.ones((64, 64), np.float32)
    state = ema_params(0.99).init(params)
    checkpoint.save(tmp_path, params, state, step=7)
    flip_a_bit(tmp_path / "7")
    assert cli.main(["inspect", str(tmp_path), "--explain"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "Step 7" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "average",
    [
        {"decay": None, "every": 1, "count": 2**62, "bema": [{"every": 0}]},
        {"decay": None, "every": 1, "count": 2**62, "bema": [{"x": 1}, {}]},
        {
            "decay": {"kind": "constant", "decay": 0.5},
            "every": 2**61,
            "count": 2**62 + 5,
        },
        {"decay": {"kind": "cosine", "start": 0.9, "steps": 5}, "every": 1, "count": 9},
        {"decay": {"kind": "power", "exponent": -0.99}, "every": 7, "count": 2**62},
    ],
    ids=[
        "bema every 0",
        "bema of unknown fields",
        "huge every",
        "short cosine",
        "extreme exponent",
    ],
)
def test_a_manifest_of_a_stranger(average, tmp_path, capsys):
    """Numbers that no run has end, at once and without a warning."""
    state, params = state_of(ema_params(0.99), 1000)
    checkpoint.save(tmp_path, params, state, step=7)
    reseal(tmp_path / "7", averages={"shadow": average})
    explained(tmp_path, capsys)


def test_names_cannot_steer_a_terminal(tmp_path, capsys):
    """Nor begin a line that looks like a finding."""
    name = "a\nproblem: \x1b[2J"
    params = {name: jnp.full(4, jnp.nan), "w": jnp.ones(2)}
    state = ema_params({name: constant(0.99)}).init(params)
    checkpoint.save(tmp_path, params, state, step=7)
    text = told(tmp_path, capsys)
    assert "\x1b" not in text
    starts = [line for line in text.splitlines() if line.startswith("problem: \\x1b")]
    assert not starts
