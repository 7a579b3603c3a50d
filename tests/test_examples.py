"""The examples run, and what they teach is what happens."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests import reference, scripts

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "byol_digits.py"
STEPS = 120

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists()
    or any(importlib.util.find_spec(m) is None for m in ("flax", "rich", "sklearn")),
    reason="needs the examples folder and pip install 'ema-optax[demo]'",
)


@pytest.fixture(scope="module")
def byol():
    return scripts.loaded(SCRIPT)


@pytest.fixture(scope="module")
def trained(byol):
    """A short run of the example, with the weights after every step."""
    online, target, nets = [], [], []
    train = byol.train

    def record(step, new, averaged):
        assert step == len(online) + 1
        online.append(jax.tree.map(np.asarray, new))
        target.append(jax.tree.map(np.asarray, averaged))

    def recorded(images, **settings):
        nets.append(train(images, **settings, on_step=record))
        return nets[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byol, "train", recorded)
        table = byol.run(steps=STEPS, seed=3)
    return SimpleNamespace(online=online, target=target, nets=nets[0], table=table)


@pytest.mark.long
@pytest.mark.parametrize("part", ["encoder", "projector"])
@pytest.mark.parametrize("layer", ["in", "out"])
def test_the_target_is_the_average_of_the_online_weights(byol, trained, part, layer):
    """In float64, from the online weights after each step, and from the first ones."""
    online = [net[part][layer] for net in trained.online]
    start = np.asarray(trained.nets.untrained[part][layer])
    betas = reference.betas("cosine", STEPS, byol.TARGET_START, STEPS)
    late = np.concatenate([[byol.TARGET_START], betas[:-1]])
    for step in (1, 10, STEPS // 2, STEPS):
        found = trained.target[step - 1][part][layer]
        expected = reference.average(online[:step], betas[:step], start=start)
        assert reference.relative_rms(found, expected) < 1e-6
        # What the bound catches: weights folded before their update; and β taken one
        # step late, but for the first step, where the cosine is flat.
        before = [start, *online[: step - 1]]
        off = [reference.average(before, betas[:step], start=start)]
        if step > 1:
            off.append(reference.average(online[:step], late[:step], start=start))
        assert min(reference.relative_rms(wrong, expected) for wrong in off) > 1e-5


@pytest.mark.long
def test_the_weights_of_the_last_step_are_returned(trained):
    """Untrained, online and target all differ in the end."""
    same = np.testing.assert_array_equal
    jax.tree.map(same, trained.nets.online, trained.online[-1])
    jax.tree.map(same, trained.nets.target, trained.target[-1])
    for leaves in zip(*map(jax.tree.leaves, trained.nets), strict=True):
        assert len({np.asarray(leaf).tobytes() for leaf in leaves}) == 3


@pytest.mark.long
def test_features_have_not_collapsed(byol, trained):
    """Normalised features of different images differ; of one answer they do not."""
    assert all(0.3 < spread <= 1 for _, spread in trained.table.values())
    images = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None], 5, axis=0)
    features = byol.encode(trained.nets.online, images)
    assert float(features.std(axis=0).max()) < 1e-5
    assert np.allclose(np.square(features).mean(axis=1), 1, atol=1e-3)


@pytest.mark.long
def test_training_without_labels_helps_the_probe(trained):
    """With two labels a digit, trained features tell more digits than untrained."""
    accuracy = {name: accuracy for name, (accuracy, _) in trained.table.items()}
    assert accuracy["online"] > accuracy["untrained"] + 0.04
    assert accuracy["target"] > accuracy["untrained"] + 0.04
    assert accuracy["untrained"] > 0.5  # guessing gets 0.1: the margin is no artefact


@pytest.mark.once
def test_the_example_runs_as_a_program():
    """A table of three networks, and no warning."""
    command = [sys.executable, "-W", "error", SCRIPT, "--steps", "50", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert header == ["encoder", "probe", "spread"]
    assert [row[0] for row in rows] == ["untrained", "online", "target"]
    for _, accuracy, spread in rows:
        assert 50 < float(accuracy.removesuffix("%")) < 100
        assert 0.3 < float(spread) < 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--steps", "0"], "--steps: needs a whole number from 1"),
        (["--steps", "1e3"], "'1e3'"),
        (["--seed"], "--seed: expected one argument"),
        (["50"], "unrecognized arguments: 50"),
    ],
)
def test_bad_arguments_are_refused(byol, monkeypatch, capsys, arguments, reason):
    """Before any training, with what was wrong on the last line."""
    monkeypatch.setattr(byol, "run", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as caught:
        byol.main()
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert reason in told.err.splitlines()[-1]
    assert told.out == ""
