"""`ema-optax adopt`: what it prints, and its exit codes."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax._messages import layout_names
from tests import foreign

STATE = foreign.state(ema_params=foreign.average())


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on a train state, and returns code, stdout and stderr."""

    def call(*options, tree=STATE, source="theirs"):
        if source == "theirs" and not (tmp_path / "theirs").exists():
            foreign.save(tmp_path / "theirs", tree)
        options = [str(option) for option in options]
        out = ["--out", str(tmp_path / "ours")]
        code = cli.main(["adopt", str(tmp_path / source), *options, *out])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def test_it_tells_what_became_of_a_run(run, tmp_path):
    """Paths, count and decay, and what is left out; then the rest can be done."""
    code, said, error = run("--decay", "constant:0.9")
    assert (code, error) == (0, "")
    assert f"From:        {tmp_path / 'theirs' / '300'}, an Orbax step\n" in said
    assert "Layout:      flax\n" in said
    assert "Count:       300, the step's number: it is not recorded\n" in said
    assert "Decay:       constant(decay=0.9)\n" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["params", "params", "5", "108", "bytes"] in rows
    assert ["shadow", "ema_params", "4", "96", "bytes"] in rows
    assert ["left", "out", "opt_state", "220", "bytes"] in rows
    found = checkpoint.restore(tmp_path / "ours", "shadow", like=foreign.params())
    assert np.array_equal(found["dense"]["bias"], foreign.average()["dense"]["bias"])
    assert cli.main(["inspect", str(tmp_path / "ours")]) == 0


def test_json_is_for_programs(run):
    code, said, _ = run("--json", "--shadow", "none")
    told = json.loads(said)
    assert (code, told["shadow"], told["count"], told["step"]) == (0, None, 0, 300)
    code, said, _ = run("--json", "--dry-run", "--decay", "power:0.1", "--count", "9")
    told = json.loads(said)
    assert ema_optax.Decay.from_json(json.dumps(told["decay"])) == ema_optax.power(0.1)
    assert (told["count"], told["shadow"]) == (9, "ema_params")


def test_a_dry_run_writes_nothing(run, tmp_path):
    code, said, _ = run("--dry-run")
    assert code == 0
    assert said.endswith("Nothing was written: a dry run.\n")
    assert "Distance" not in said
    assert not (tmp_path / "ours").exists()


def test_what_needs_a_look_is_said(run):
    """Raw leaves, narrow averages, a decay beside, and what is far from the params."""
    mean = {"w": jnp.ones(2, jnp.bfloat16) * -9}
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    tree = {"params": params, "ema_params": mean, "ema_decay": jnp.float32(0.5)}
    code, said, _ = run("--partial", tree=tree)
    assert code == 0
    assert "1 params have no average and are raw in both trees: b\n" in said
    assert "1 params have an average narrower than float32, which " in said
    assert "Lies beside: ema_decay = 0.5\n" in said
    assert "an average of params is nearer, look what it is" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--params", "parms"],
            "no arrays at --params 'parms'. The nearest are 'params'",
        ),
        (["--shadow", "opt_state/0/mu"], "the params by --shadow none."),
        (["--like", "flaks"], "There is no layout 'flaks'. The nearest are 'flax',"),
        (["--count", "stepp"], "has no number at --count 'stepp'. The nearest are"),
        (["--step", "7"], "has no committed step 7; it has 300."),
        (["--zero-started"], "needs its --decay constant:0.9999 or whichever"),
        (["--zero-started", "--decay", "constant:0.9"], "Pass --count 300 if it saw"),
    ],
)
def test_errors_are_one_line_with_options(options, said, run, tmp_path):
    """And nothing is written."""
    code, out, error = run(*options)
    assert (code, out) == (1, "")
    assert error.startswith("ema-optax adopt: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


def test_a_partial_average_is_told_by_its_option(run):
    tree = {"params": {"a": jnp.ones(1), "b": jnp.ones(1)}}
    tree["ema_params"] = {"a": jnp.ones(1)}
    code, _, error = run(tree=tree)
    assert code == 1
    assert "pass --partial: they are raw in both trees." in error


def test_a_source_that_is_not_there(run):
    code, _, error = run(source="nowhere")
    assert code == 1
    assert "it does not exist" in error


def test_help_lists_the_layouts(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["adopt", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name, about in layout_names.LAYOUTS.items():
        assert f"{name:9}  {about}\n" in said
