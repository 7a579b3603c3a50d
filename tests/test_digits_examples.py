"""The two whole programs run, resume to the bit, and infer what they trained."""

import importlib.util
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ema_optax import checkpoint
from tests import scripts

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
NAMES = ["digits_nnx", "digits_linen"]

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        not EXAMPLES.exists()
        or any(importlib.util.find_spec(m) is None for m in ("flax", "sklearn")),
        reason="needs the examples folder and pip install 'ema-optax[demo]'",
    ),
]


@pytest.fixture(params=NAMES)
def example(request):
    return scripts.loaded(EXAMPLES / f"{request.param}.py")


def test_a_run_that_stopped_goes_on(example, tmp_path):
    """In two starts as in one; inference gives what training measured."""
    first = example.train(tmp_path / "two", 30)
    found = example.train(tmp_path / "two", 20)
    assert found != first
    assert found == example.train(tmp_path / "one", 50)
    assert example.infer(tmp_path / "two") == found["averaged"] > 0.5
    whole = [checkpoint.restore(tmp_path / name, "shadow") for name in ("one", "two")]
    jax.tree.map(np.testing.assert_array_equal, *whole)
    raw = checkpoint.restore(tmp_path / "two", "params")
    apart = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(raw), strict=True)
    ]
    assert any(apart)
    assert not all(apart)  # the statistics are those of the run
    assert checkpoint.describe(tmp_path / "two").steps == (30, 50)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_a_program(name, tmp_path):
    """Both commands, without a warning of ours."""
    for command in (
        ["train", tmp_path / "run", "--steps", "3"],
        ["infer", tmp_path / "run"],
    ):
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *command],
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "averaged" in done.stdout
