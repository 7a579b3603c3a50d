"""Folders of odd names work; what Orbax cannot write to is refused in words."""

import pathlib
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint import v1

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import storage

PARAMS = {"w": jnp.arange(3.0)}
STATE = ema_optax.ema_params(0.9).init(PARAMS)


@pytest.mark.parametrize("url", ["s3://b/run", "az://b/run", "hf://b/run"])
def test_other_stores_are_refused_before_anything_is_written(
    url, tmp_path, monkeypatch
):
    """Orbax would write to this machine's disk, and report success."""
    monkeypatch.chdir(tmp_path)
    params, state = PARAMS, STATE
    for call in (
        lambda: checkpoint.save(url, params, state, step=1),
        lambda: checkpoint.save_average(url, params),
        lambda: checkpoint.restore(url),
        lambda: checkpoint.resume(url, params, state),
        lambda: checkpoint.describe(url),
        lambda: checkpoint.snapshots(url),
        lambda: checkpoint.stored(url),
        lambda: checkpoint.verify(url),
    ):
        with pytest.raises(ValueError, match="Mount the store"):
            call()
    with (
        pytest.raises(ValueError, match="Mount the store"),
        ocp.CheckpointManager(epath.Path(url).absolute()) as manager,
    ):
        manager.save(1, args=checkpoint.EmaSave(params, state))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"_CHECKPOINT_METADATA"}  # of Orbax's own manager


def test_orbax_takes_s3_for_a_folder_still():
    """On the day that this fails, s3:// need no longer be refused."""
    info = ocp.type_handlers.ParamInfo(name="w", parent_dir=epath.Path("s3://b/run"))
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=False)
    assert spec["kvstore"]["driver"] == "file"
    info = ocp.type_handlers.ParamInfo(name="w", parent_dir=epath.Path("gs://b/run"))
    spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=False)
    assert spec["kvstore"]["driver"] == "gcs"


def test_without_the_client_of_buckets_its_extra_is_named(monkeypatch):
    """Not an OSError of the network, which somebody would try again."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    storage.bucket.cache_clear()
    for call in (checkpoint.describe, checkpoint.restore, checkpoint.snapshots):
        with pytest.raises(
            ModuleNotFoundError, match=r"pip install 'ema-optax\[gcs\]'"
        ):
            call("gs://bucket/run")
    with pytest.raises(ModuleNotFoundError, match=r"ema-optax\[gcs\]"):
        checkpoint.save("gs://bucket/run", PARAMS, STATE, step=1)


@pytest.mark.parametrize(
    "path",
    [pathlib.Path("gs://b/run"), epath.Path("gs://b/run").absolute()],
    ids=["pathlib", "absolute"],
)
def test_a_url_that_became_a_path(path, tmp_path, monkeypatch):
    """Pathlib makes one slash of two, and `absolute()` a path of this machine."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"was a URL.*gs://bucket/run"):
        checkpoint.save(path, PARAMS, STATE, step=1)
    assert not list(tmp_path.iterdir())


def test_an_uncommitted_step_on_a_disk(tmp_path):
    """Orbax's COMMIT_FILE, its advice for mounts: the name is there from the start."""
    options = pytest.importorskip("orbax.checkpoint.options")
    if not hasattr(options, "AtomicityOptions"):
        pytest.skip("needs Orbax's AtomicityOptions")
    atomicity = options.AtomicityOptions(mode=options.AtomicityMode.COMMIT_FILE)
    of_manager = ocp.CheckpointManagerOptions(atomicity_options=atomicity)
    with ocp.CheckpointManager(tmp_path, options=of_manager) as manager:
        for step in (1, 2, 3):
            manager.save(step, args=checkpoint.EmaSave(PARAMS, STATE))
        manager.wait_until_finished()
    assert checkpoint.describe(tmp_path).steps == (1, 2, 3)
    (tmp_path / "3" / "commit_success.txt").unlink()
    assert checkpoint.describe(tmp_path).step == 2
    assert checkpoint.describe(tmp_path).steps == (1, 2)
    with pytest.raises(FileNotFoundError, match="no step 3; it has 1, 2"):
        checkpoint.restore(tmp_path, "params", step=3)


@pytest.mark.parametrize("name", ["lr=[0.1,0.2]", "[!a]", "[", "what?*"])
def test_a_folder_whose_name_is_a_pattern(name, tmp_path, monkeypatch):
    """Sweeps write lists into such names, where Orbax would find nothing to merge."""
    folder = tmp_path / name
    checkpoint.save(folder / "run", PARAMS, STATE, step=1)
    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(1, args=checkpoint.EmaSave(PARAMS, STATE))
        manager.wait_until_finished()
    of_v1 = {"default": checkpoint.EmaSave(PARAMS, STATE)}
    v1.save_checkpointables(folder / "v1" / "1", of_v1)
    checkpoint.save_average(folder / "average", PARAMS)
    monkeypatch.chdir(folder)
    checkpoint.save("relative", PARAMS, STATE)
    for each in ("run", "manager", "v1", "average", "relative"):
        checkpoint.verify(folder / each)
        raw = checkpoint.restore(folder / each, "params")
        assert raw["w"].tolist() == [0, 1, 2]


def test_a_folder_with_a_backslash_is_refused(tmp_path, monkeypatch):
    """TensorStore takes it for a slash: the arrays would lie in another folder."""
    folder = tmp_path / "a\\b"
    of_v1 = {"default": checkpoint.EmaSave(PARAMS, STATE)}
    for call in (
        lambda: checkpoint.save(folder, PARAMS, STATE),
        lambda: checkpoint.save_average(folder, PARAMS),
        lambda: checkpoint.restore(folder),
        lambda: checkpoint.resume(folder, PARAMS, STATE),
        lambda: checkpoint.describe(folder),
        lambda: checkpoint.verify(folder),
    ):
        with pytest.raises(ValueError, match=r"a\\b has a backslash.*Rename"):
            call()
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(ValueError, match="has a backslash"),
        ocp.CheckpointManager(folder / "manager") as manager,
    ):
        manager.save(1, args=checkpoint.EmaSave(PARAMS, STATE))
    with pytest.raises(ValueError, match="has a backslash"):
        v1.save_checkpointables(folder / "v1", of_v1)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="has a backslash"):
        checkpoint.save("run", PARAMS, STATE)


def test_a_step_moved_below_a_backslash_is_not_called_damaged(tmp_path):
    """A manager finds the step itself, and hands its folder to the handler."""
    checkpoint.save(tmp_path / "run", PARAMS, STATE, step=1)
    moved = (tmp_path / "run").rename(tmp_path / "a\\b")
    with (
        ocp.CheckpointManager(moved) as manager,
        pytest.raises(ValueError, match="has a backslash"),
    ):
        manager.restore(1, args=checkpoint.EmaRestore("params", like=PARAMS))


def test_a_path_that_begins_with_two_slashes(tmp_path):
    """POSIX allows them, and programs that join paths write them."""
    twice = f"/{tmp_path}"
    checkpoint.save(f"{twice}/run", PARAMS, STATE, step=1)
    with ocp.CheckpointManager(f"{twice}/manager") as manager:
        manager.save(1, args=checkpoint.EmaSave(PARAMS, STATE))
        manager.wait_until_finished()
        manager.restore(1, args=checkpoint.EmaRestore("params", like=PARAMS))
    v1.save_checkpointables(
        f"{twice}/v1/1", {"default": checkpoint.EmaSave(PARAMS, STATE)}
    )
    for each in ("run", "manager", "v1"):
        checkpoint.verify(f"{twice}/{each}")
        raw = checkpoint.restore(f"{twice}/{each}", "params")
        assert raw["w"].tolist() == [0, 1, 2]
