"""The demo: it restores exactly, averages win, and it keeps to its own files."""

import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from ema_optax import checkpoint
from ema_optax._demo import afterwards, demo, digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoRun:
    return demo.run(steps=400, out=tmp_path_factory.mktemp("demo") / "a" / "b", seed=0)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("training started")

    monkeypatch.setattr(demo.digits, "train", fail)


def test_restored_models_are_exactly_the_saved_ones(run: demo.DemoRun):
    """Accuracy and logits after the restore equal those before, to the last bit."""
    assert [c.tree for c in run.comparisons] == ["params", "shadow/ema"]
    for comparison in run.comparisons:
        assert comparison.exact
        assert comparison.before == comparison.after


def test_the_average_does_better(run: demo.DemoRun):
    """After training the EMA has the higher accuracy on held-out digits."""
    raw, ema = run.comparisons
    assert ema.before > raw.before > 0.85  # guessing gets 0.1


def test_averages_made_afterwards_do_better(run: demo.DemoRun):
    """A chosen width and a merge beat the raw params; the EMA is named by its decay."""
    raw, ema, width, merged = run.candidates
    assert ema.name == f"EMA, β = {digits.DECAY}"
    assert re.fullmatch(r"chosen width 0\.\d+, of [3-8] tried", width.name)
    assert merged.name == "mean of the last 10 checkpoints"
    assert max(ema.loss, width.loss, merged.loss) < 0.9 * raw.loss


def test_what_chooses_does_not_report():
    """The halves of the held-out digits share no image, and leave none out."""
    data = digits.load(seed=0)
    first, second = afterwards.halves(data)
    images = [half.test_images for half in (first, second)]
    assert sum(map(len, images)) == len(data.test_images)
    both = np.concatenate(images)
    assert np.array_equal(np.sort(both, axis=0), np.sort(data.test_images, axis=0))
    for half in (first, second):
        assert len(half.test_labels) == len(half.test_images)


@pytest.mark.parametrize(("steps", "made"), [(9, False), (10, True)])
def test_a_short_run_is_no_source_of_averages(steps: int, made: bool, tmp_path: Path):
    """Fewer than ten checkpoints choose nothing, and the rest of the demo runs."""
    run = demo.run(steps=steps, out=tmp_path, seed=0)
    assert bool(run.candidates) == (run.choice is not None) == made
    assert all(c.exact for c in run.comparisons)


def test_both_trees_lie_side_by_side(run: demo.DemoRun):
    """One step holds params and averages, of like shapes and different values."""
    assert run.checkpoint.name == "400"
    items = {
        name: checkpoint.restore(run.checkpoint, name)
        for name in ("params", "shadow/ema")
    }
    params, shadow = map(jax.tree.leaves, items.values())
    assert [p.shape for p in params] == [s.shape for s in shadow]
    assert all(not np.array_equal(p, s) for p, s in zip(params, shadow, strict=True))


def test_a_wrong_restore_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A restored tree that is off by a few ulps does not count as exact."""
    restore = checkpoint.restore

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return jax.tree.map(lambda p: p * (1 + 2**-20), restore(*args, **kwargs))

    monkeypatch.setattr(checkpoint, "restore", wrong)
    run = demo.run(steps=2, out=tmp_path, seed=0)
    assert not any(c.exact for c in run.comparisons)


@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),
        checkpoint.CorruptCheckpointError("leaf 'w' is not what was saved"),
    ],
)
def test_a_failing_disk_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What cannot be saved or read back is a DemoError that says why."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "restore", fail)
    with pytest.raises(demo.DemoError, match=str(error)) as caught:
        demo.run(steps=1, out=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_picture_is_a_png(run: demo.DemoRun):
    """The picture has the signature of a PNG, and colours of both curves in it."""
    assert run.picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(run.picture)[..., :3].reshape(-1, 3)
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        near = np.abs(pixels - np.array(colour) / 255).max(axis=1) < 0.02
        assert near.sum() > 100


def test_the_marker_tells_the_run(run: demo.DemoRun):
    """`demo.json` records the settings and both accuracies."""
    marker = json.loads((run.picture.parent / "demo.json").read_text())
    raw, ema = run.comparisons
    assert marker["steps"] == 400
    assert marker["saved"] == list(range(20, 401, 20))
    assert marker["accuracies"] == {"params": raw.after, "shadow/ema": ema.after}


@pytest.mark.usefixtures("no_training")
def test_an_earlier_demo_is_removed_and_other_files_stay(tmp_path: Path):
    """Its steps, an unfinished save and its pictures go; what else is there stays."""
    marker = {"author": "ema-optax demo", "steps": 3, "saved": [2, 3]}
    (tmp_path / "demo.json").write_text(json.dumps(marker))
    for picture in ("accuracy.png", "choice.png"):
        (tmp_path / picture).write_text("its picture")
    checkpoints = tmp_path / "checkpoints"
    for name in ("2", "3", "3.orbax-checkpoint-tmp"):
        (checkpoints / name / "params").mkdir(parents=True)
    mine = [tmp_path / "notes.txt", checkpoints / "notes.txt"]
    for path in mine:
        path.write_text("mine")
    with pytest.raises(AssertionError, match="training started"):
        demo.run(steps=3, out=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"demo.json", "checkpoints", "notes.txt"}
    assert {path.name for path in checkpoints.iterdir()} == {"notes.txt"}
    assert [path.read_text() for path in mine] == ["mine", "mine"]


@pytest.mark.parametrize("name", ["notes.txt", "demo.json"])
@pytest.mark.usefixtures("no_training")
def test_a_folder_of_somebody_else_is_refused(name: str, tmp_path: Path):
    """A folder with files that are not a demo's is left as it is, untrained."""
    (tmp_path / name).write_text('{"author": "me", "steps": 3}')
    with pytest.raises(demo.DemoError, match="no earlier demo's folder"):
        demo.run(steps=3, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.usefixtures("no_training")
def test_a_step_of_somebody_else_is_refused(tmp_path: Path):
    """A step that the earlier demo did not save is neither overwritten nor used."""
    theirs = tmp_path / "checkpoints" / "7"  # would be one of those that choose
    theirs.mkdir(parents=True)
    (tmp_path / "demo.json").write_text('{"author": "ema-optax demo", "steps": 3}')
    with pytest.raises(demo.DemoError, match="not from a demo"):
        demo.run(steps=5, out=tmp_path)
    assert theirs.is_dir()


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        ("file", "no folder"),
        ("file/inside", "Not a directory"),
        ("n" * 300, "name too long"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_an_impossible_folder_is_refused(below: str, reason: str, tmp_path: Path):
    """A file, a path through a file or one that cannot be made: no training."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(demo.DemoError, match=reason) as caught:
        demo.run(steps=3, out=tmp_path / below)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_training")
def test_a_folder_without_permission_is_refused(tmp_path: Path):
    """A folder that may not be written to is named, before any training."""
    tmp_path.chmod(0o500)
    try:
        for out in (tmp_path, tmp_path / "new"):
            with pytest.raises(demo.DemoError, match="Permission denied"):
                demo.run(steps=3, out=out)
    finally:
        tmp_path.chmod(0o700)
