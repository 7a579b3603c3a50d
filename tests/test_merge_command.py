"""`ema-optax merge`: what it writes, tells and refuses, on a run on disk."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint

STEPS = range(100, 1100, 100)
VALUES = np.random.default_rng(0).normal(size=(len(STEPS), 5, 3)).astype(np.float32)


def at(i: int) -> dict[str, Any]:
    """Params of a step: averaged in two dtypes, and leaves that are not."""
    return {
        "w": jnp.asarray(VALUES[i]),
        "layers": [{"b": jnp.asarray(VALUES[i, 0], jnp.bfloat16)}],
        "n": jnp.int32(i),
        "key": jax.random.key(3),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, each with a shadow that holds twice the params."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    for i, step in enumerate(STEPS):
        params = at(i)
        state = ema_optax.ema_params(0.9).init(params)
        twice = jax.tree.map(
            lambda s: s if isinstance(s, optax.MaskedNode) else 2 * s,
            state.shadow,
            is_leaf=lambda s: isinstance(s, optax.MaskedNode),
        )
        checkpoint.save(folder, params, state._replace(shadow=twice), step=step)
    return folder


def merge(run: Path, *options: object) -> int:
    return cli.main(["merge", str(run), *map(str, options)])


def mean(weights: list[float], first: int, scale: float = 1.0) -> np.ndarray:
    """The weighted sum of w from a step on, in float64."""
    held = VALUES[first : first + len(weights)].astype(np.float64)
    return scale * np.tensordot(weights, held, axes=1)


@pytest.mark.long
def test_several_schedules_in_one_pass(run: Path, tmp_path: Path):
    """Each in a folder of its name, as the float64 sums to 1e-7, the rest kept."""
    out = tmp_path / "out"
    options = ("--last", 4, "--schedule", "linear", "1-sqrt", "ema:0.5", "power:0.1")
    assert merge(run, *options, "--out", out) == 0
    root = [1 - math.sqrt(x) for x in (0, 0.25, 0.5, 0.75, 1)]
    expected = {
        "linear": [0.25] * 4,
        "1-sqrt": [a - b for a, b in itertools.pairwise(root)],
        "ema-0.5": [0.125, 0.125, 0.25, 0.5],
    }
    assert sorted(p.name for p in out.iterdir()) == sorted([*expected, "power-0.1"])
    for name, weights in expected.items():
        for tree in ("params", "shadow"):
            found = checkpoint.restore(out / name, tree, at(9))
            np.testing.assert_allclose(found["w"], mean(weights, 6), atol=1e-7)
            assert found["layers"][0]["b"].dtype == jnp.bfloat16
            assert int(found["n"]) == 9
            assert found["key"] == at(9)["key"]
        origin = checkpoint.describe(out / name).extra["merged"]
        assert origin["steps"] == [700, 800, 900, 1000]
        assert (origin["run"], origin["tree"]) == ("run", "params")
        np.testing.assert_allclose(origin["coefficients"], weights, atol=1e-15)


def test_one_schedule_of_the_shadow(run: Path, tmp_path: Path):
    """It lies in the folder itself; the steps are those of a range and a divisor."""
    options = ("--steps", "200:800:200", "--every-steps", 400, "--tree", "shadow")
    assert merge(run, *options, "--out", tmp_path, "--dtype", "float32") == 0
    found = checkpoint.restore(tmp_path, "shadow", step=800)
    weights = [0.5, 0, 0, 0, 0.5]  # of 400 and 800
    np.testing.assert_allclose(found["w"], mean(weights, 3, 2.0), atol=2e-7)
    assert found["layers"]["0"]["b"].dtype == jnp.float32
    checkpoint.verify(tmp_path)


@pytest.mark.parametrize(
    ("content", "weights"),
    [
        ([2.0, -1.5, 0.5], [2.0, -1.5, 0.5]),
        ({"multipliers": [0.5, 0.25]}, [0.5, 0.25, 0.25]),
    ],
)
def test_coefficients_of_a_file(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: object,
    weights: list[float],
):
    """Themselves, negative ones too, or the multipliers of a learning rate."""
    file = tmp_path / "own.json"
    file.write_text(json.dumps(content))
    options = ("--last", 3, "--schedule", file, "--out", tmp_path / "out", "--json")
    assert merge(run, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == [800, 900, 1000]
    assert told["merges"][0]["coefficients"] == weights
    assert told["merges"][0]["noise_gain"] == pytest.approx(np.linalg.norm(weights))
    found = checkpoint.restore(tmp_path / "out", "params")
    np.testing.assert_allclose(found["w"], mean(weights, 7), atol=5e-7)


def test_a_dry_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It lists steps and coefficients, and writes nothing."""
    out = tmp_path / "out"
    assert merge(run, "--last", 2, "--out", out, "--dry-run") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["1000", "0.50000"] in rows
    assert ["noise", "gain", "0.707"] in rows
    assert not out.exists()


def test_a_flipped_bit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It is an error that names the step, and nothing is written."""
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    held = np.asarray(at(8)["w"]).tobytes()
    files = [p for p in (damaged / "900").rglob("*") if p.is_file()]
    for data in files:
        content = bytearray(data.read_bytes())
        if (start := content.find(held)) >= 0:
            content[start + 7] ^= 1
            data.write_bytes(content)
    assert merge(damaged, "--out", tmp_path / "out") == 1
    assert "Step 900 of" in (line := capsys.readouterr().err)
    assert "Leave this step out" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--last", "11"], "10 of the steps in .* and 11 are needed: it has 100, 200"),
        (["--steps", "150:190"], "0 of the steps in .* and 1 are needed"),
        (["--tree", "shadw"], "no tree 'shadw'"),
        (["--item", "other"], "other"),
        (["--schedule", "{own}"], "has coefficients for 2 checkpoints, and 10 are"),
        (["--schedule", "{unfit}"], "must sum to 1"),
    ],
)
def test_what_is_refused(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    error: str,
):
    """In one line, and nothing is written."""
    own, unfit = tmp_path / "own.json", tmp_path / "unfit.json"
    own.write_text("[0.5, 0.5]")
    unfit.write_text(json.dumps([0.2] * 10))
    given = [option.format(own=own, unfit=unfit) for option in options]
    assert merge(run, *given, "--out", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ema-optax merge: error: ")
    assert re.search(error, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--schedule", "1-sqr"], "'1-sqr' is no schedule. Known: uniform, linear"),
        (["--schedule", "ema:2"], "'ema:2': "),
        (["--schedule", "missing.json"], "cannot read missing.json: No such file"),
        (["--steps", "5"], "needs A:B or A:B:K"),
        (["--steps", "1:9:0"], "needs A:B or A:B:K"),
        (["--last", "0"], "needs a whole number from 1"),
        ([], "needs --out, or --dry-run"),
    ],
)
def test_arguments_that_are_wrong(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], error: str
):
    """They end the command with the code of a wrong call."""
    with pytest.raises(SystemExit, match="2"):
        merge(run, *options)
    assert error in capsys.readouterr().err


def test_nothing_is_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Neither a merge nor the run itself."""
    assert merge(run, "--out", tmp_path / "out") == 0
    before = sorted(tmp_path.rglob("*"))
    assert merge(run, "--out", tmp_path / "out") == 1
    assert merge(run, "--out", run) == 1
    capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [(), ("--last", 3), ("--every-steps", 2)])
def test_the_folder_above_is_no_checkpoint(options, run: Path, tmp_path: Path, capsys):
    """The error says what it holds, whatever steps are asked for."""
    above = tmp_path / "above"
    (above / "snapshots").mkdir(parents=True)
    shutil.copytree(run, above / "checkpoints")
    assert merge(above, *options, "--out", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert "holds no checkpoint that is known" in told
    assert "'checkpoints', 'snapshots'" in told
