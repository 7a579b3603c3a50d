"""The example for many hosts: two processes, then one, hold what one run would."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ema_optax
from ema_optax import checkpoint
from tests import launch, scripts

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "many_hosts.py"

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists() or importlib.util.find_spec("rich") is None,
    reason="needs the examples folder and pip install 'ema-optax[cli]'",
)


@pytest.fixture(scope="module")
def example():
    return scripts.loaded(SCRIPT)


def _start(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)],
        env=launch.on_cpu(2),
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.once
def test_two_processes_then_one(example, tmp_path, capsys):
    """The second goes on with the first, as one that never stopped would have."""
    run = tmp_path / "run"
    done = _start(run, "--processes", 2, "--steps", 30)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = (
        "steps 1 to 30 on 2 processes, 4 devices; each holds 256 of the shadow's 1024 "
        "weights\noff the teacher: params "
    )
    assert done.stdout.count(told) == 1  # beside what Gloo writes
    example.train(str(run), 5)  # in this process, which has one device
    assert capsys.readouterr().out.startswith("steps 31 to 35 on 1 processes, 1 dev")
    example.train(str(tmp_path / "whole"), 35)
    for tree in ("params", "shadow"):
        got, expected = (
            checkpoint.restore(folder, tree)["w"]
            for folder in (run, tmp_path / "whole")
        )
        # float32, summed in another order; one step more or less is 1e-2.
        np.testing.assert_allclose(got, expected, atol=2e-5)
    before = checkpoint.restore(run, "shadow", step=30)["w"]
    assert abs(before - expected).max() > 1e-2


@pytest.mark.once
def test_a_process_that_fails_ends_the_others(tmp_path):
    """With its error, and an exit code that says so."""
    params = {"w": np.zeros(3, np.float32)}
    state = ema_optax.ema_params(0.9).init(params)
    checkpoint.save(tmp_path, params, state, step=7)  # of another run
    done = _start(tmp_path, "--processes", 2)
    assert done.returncode == 1
    # Both write the same stderr, each a traceback's last line in pieces.
    assert "ValueError" in done.stderr
    assert "Cannot resume" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: folder"),
        ([""], "needs a path"),
        (["run", "--processes", "0"], "--processes: needs a whole number from 1"),
        (["run", "--steps", "none"], "'none'"),
    ],
)
def test_bad_arguments_are_refused(example, monkeypatch, capsys, arguments, reason):
    """Before any process starts, with what was wrong on the last line."""
    monkeypatch.setattr(example, "start", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as caught:
        example.main()
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert reason in told.err.splitlines()[-1]
