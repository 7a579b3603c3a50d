"""`ema-optax choose`: what it writes, tells and refuses, on a run on disk."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from tests.older import enable_x64

STEPS = range(4, 81, 4)
MODULE = """
import jax.numpy as jnp

calls = []


def off(params):
    calls.append(1)
    print("evaluated")
    return float(jnp.abs(params["w"][0] - 72.0))


def batches(params):
    return -jnp.abs(params["w"] - 72.0)


def fails(params):
    raise RuntimeError("no data")


def text(params):
    return "0.5"


class Model:
    def loss(params):
        return float(params["w"][0]) if params["w"][0] > 70 else float("nan")


number = 3
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Params that count the steps, with two tracked widths beside them."""
    folder = tmp_path_factory.mktemp("choose") / "run"
    optimizer = ema_optax.ema_params(
        {"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}
    )
    params: Any = {"w": jnp.zeros(2), "n": jnp.int32(0)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1, STEPS[-1] + 1):
        _, state = update({"w": jnp.ones(2), "n": jnp.int32(0)}, state, params)
        params = {"w": params["w"] + 1, "n": jnp.int32(step)}
        if step in STEPS:
            checkpoint.save(folder, params, state, step=step)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "scores_of_mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("x = 1\nimport no_such_thing_of_theirs\n")
    (tmp_path / "raising.py").write_text("\n\n1 / 0\n")
    for name in ("scores_of_mine", "broken", "raising"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def choose(run: Path, function: str, *options: object) -> int:
    evaluate = ("--evaluate", f"scores_of_mine:{function}")
    return cli.main(["choose", str(run), *evaluate, *map(str, options)])


@pytest.mark.long
def test_a_width(run: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    """Found, written as a checkpoint with its decay, drawn, and told as JSON."""
    files = ("--out", here / "out", "--plot", here / "a.png", "--json")
    assert choose(run, "off", *files) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert printed.err.splitlines() == ["evaluated"] * told["evaluations"]
    assert told["best"]["over"] == "width"
    assert len(told["points"]) == told["evaluations"] <= 12
    assert told["directory"] == f"{here / 'out'}/80"
    assert (here / "a.png").stat().st_size > 10_000
    restored = checkpoint.restore(here / "out", "shadow")
    assert float(restored["w"][0]) == pytest.approx(72, abs=1)
    assert int(restored["n"]) == 80
    found = checkpoint.describe(here / "out")
    assert found.trees["shadow"].decay == ema_optax.power(told["best"]["value"])
    assert found.extra["chosen"]["coefficients"] == told["best"]["coefficients"]
    assert len(found.extra["chosen"]["exponents"]) == 2 * len(STEPS)
    assert cli.main(["inspect", str(here / "out")]) == 0
    assert '"over": "width"' in capsys.readouterr().out
    assert choose(run, "off", *files) == 1
    assert "out holds the steps of a run" in capsys.readouterr().err


def test_several_and_a_table(run: Path, capsys: pytest.CaptureFixture[str]):
    """Windows, schedules and extrapolations; batches have a noise."""
    names = ("uniform", "1-sqrt@3", "power:0.1", "ema:0.5")
    options = ("--over", "last", "schedule", "alpha", "--among", *names)
    assert choose(run, "batches", *options, "--budget", 20, "--maximize") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert "the greatest is best" in lines[0]
    rows = [line.split()[:2] for line in lines]
    assert ["last", "20"] in rows
    assert ["schedule", "1-sqrt@3"] in rows
    assert ["schedule", "power(width=0.1)"] in rows
    assert ["alpha", "-1"] in rows
    assert sum(line.endswith("<- best") for line in lines) == 1
    assert lines[-1].startswith("Best: ")
    assert "trees that end at step 80" in lines[-1]


def test_what_was_stopped_goes_on(run: Path, here: Path, capsys: Any):
    """With the log, nothing is evaluated again."""
    options = ("--over", "last", "--budget", 6, "--log", here / "log", "--json")
    assert choose(run, "off", *options) == 0
    first = json.loads(capsys.readouterr().out)
    calls = sys.modules["scores_of_mine"].calls
    before = len(calls)
    assert before == first["evaluations"]
    assert choose(run, "off", *options) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert len(calls) == before
    assert choose(run, "off", "--log", here / "log") == 1
    assert "the log of another choice, over last" in capsys.readouterr().err


def test_failures_are_lines(run: Path, capsys: pytest.CaptureFixture[str]):
    """One for each evaluation that fails; where all do, an error with the first."""
    assert choose(run, "Model.loss", "--over", "last") == 0
    printed = capsys.readouterr()
    start = "ema-optax choose: warning: The evaluation of last "
    assert printed.err
    assert all(line.startswith(start) for line in printed.err.splitlines())
    assert "it returned nan" in printed.out
    assert choose(run, "fails", "--over", "last") == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("ema-optax choose: error: None of ")
    assert error.endswith("last 1: it raised RuntimeError: no data")


@pytest.mark.parametrize(
    ("evaluate", "options", "error"),
    [
        ("scores_of_mine:of", (), "has no 'of'. The nearest are 'off'"),
        ("scores_of_mine:number", (), "is no function but int"),
        ("scores_of_min:off", (), "no module 'scores_of_min': no scores_of_min.py in "),
        ("no_such.thing:off", (), "There is no module 'no_such'"),
        ("broken:off", (), "broken.py, line 2)"),
        ("raising:off", (), "ZeroDivisionError: division by zero ("),
        ("scores_of_mine:text", (), "It returned '0.5'"),
        ("scores_of_mine:off", ("--between", "0.5:0.6"), "outside the widths"),
        (
            "scores_of_mine:off",
            ("--over", "last", "--tree", "shdow"),
            "no tree 'shdow'",
        ),
        ("scores_of_mine:off", ("--item", "other"), "no item 'other'"),
        ("scores_of_mine:off", ("--over", "last", "alpha", "schedule"), "is too small"),
        ("scores_of_mine:off", ("--out", "run"), "holds the steps of a run"),
    ],
)
def test_what_is_refused(
    run: Path, evaluate: str, options: tuple[str, ...], error: str, capsys: Any
):
    """In one line, with code 1, and nothing is written."""
    options = tuple(str(run) if option == "run" else option for option in options)
    before = sorted(run.parent.rglob("*"))
    assert cli.main(["choose", str(run), "--evaluate", evaluate, *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ema-optax choose: error: ")
    assert error in line
    assert line.isprintable()
    assert sorted(run.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "required: --evaluate"),
        (("--evaluate", "off"), "needs module:function, such as evaluation:loss"),
        (("--evaluate", "../a:off"), "needs module:function"),
        (("--evaluate", "a:b", "--over", "widths"), "'widths'"),
        (("--evaluate", "a:b", "--budget", "2"), "from 3 to"),
        (("--evaluate", "a:b", "--between", "1"), "needs two numbers, such as 0.02"),
        (("--evaluate", "a:b", "--between", "a:b"), "needs two numbers"),
        (("--evaluate", "a:b", "--among", "uniform"), "needs --over schedule"),
        (
            ("--evaluate", "a:b", "--over", "schedule", "--among", "powr:0.1"),
            "is no decay",
        ),
        (("--evaluate", "a:b", "--plot", "a.txt"), "ends in .png, .svg, .pdf"),
    ],
)
def test_wrong_arguments(run: Path, options: Any, error: str, capsys: Any):
    with pytest.raises(SystemExit) as caught:
        cli.main(["choose", str(run), *options])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line


def test_a_run_in_64_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Is read as such, and one in 32 bits is evaluated in 32."""
    with enable_x64():
        for step in (1, 2, 3):
            params = {"w": jnp.full(2, 72 + step * 1e-12, jnp.float64)}
            state = ema_optax.ema_params(0.9).init(params)
            checkpoint.save(tmp_path / "wide", params, state, step=step)
    assert choose(tmp_path / "wide", "batches", "--over", "last", "--json") == 0
    scores = [p["score"] for p in json.loads(capsys.readouterr().out)["points"]]
    np.testing.assert_allclose(scores, [-3e-12, -2.5e-12, -2e-12], rtol=0.05)
    assert not jax.config.read("jax_enable_x64")


def test_help(capsys: pytest.CaptureFixture[str]):
    """It says that code is run, and has commands to copy."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["choose", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "that runs the code in it" in text
    assert "ema-optax choose run --evaluate evaluation:loss" in text
