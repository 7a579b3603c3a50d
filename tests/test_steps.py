"""Which folder of a run is a step, which item of it is meant, and what is asked."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint import v1

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import steps
from ema_optax._cli import main
from tests.same import assert_same

TRANSFORM = ema_optax.ema_params(ema_optax.power(0.05))


def made(value, shape=9):
    params = {"w": jnp.full(shape, float(value))}
    state = TRANSFORM.init(params)._replace(shadow={"w": jnp.full(shape, value + 0.5)})
    return params, state._replace(count=jnp.int32(40))


def saved(folder, numbers=(100, 300), **options):
    """A run whose steps hold their numbers as params."""
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(**options)
    ) as manager:
        for number in numbers:
            manager.save(number, args=checkpoint.EmaSave(*made(number)), force=True)
        manager.wait_until_finished()
        return manager.latest_step()


# Folders.


@pytest.mark.parametrize(
    "other", ["logs-2026", "version_999", "eval_500", "run.2026", "0.07", "v2/1999"]
)
@pytest.mark.parametrize(
    "options", [{}, {"step_prefix": "ckpt"}, {"step_format_fixed_length": 8}]
)
def test_the_newest_step_is_that_of_the_manager(tmp_path, other, options):
    """Not a folder of logs or of another library, whose name ends in a number."""
    newest = saved(tmp_path, **options)
    (tmp_path / other / "inside").mkdir(parents=True)
    (tmp_path / "2027").write_text("a file")
    assert checkpoint.describe(tmp_path).step == newest == 300
    assert checkpoint.describe(tmp_path).steps == (100, 300)
    assert checkpoint.restore(tmp_path, like=made(0)[0])["w"][0] == 300.5
    params, _ = checkpoint.resume(tmp_path, *made(0), step=100)
    assert params["w"][0] == 100


def test_a_step_of_another_form_is_no_step(tmp_path):
    """As a manager of plain numbers has it; alone, two forms are asked for."""
    saved(tmp_path)
    shutil.copytree(tmp_path / "300", tmp_path / "best_900")
    assert checkpoint.describe(tmp_path).step == 300
    assert checkpoint.describe(tmp_path / "best_900").step == 900
    for number in (100, 300):
        (tmp_path / str(number)).rename(tmp_path / f"ckpt_{number}")
    with pytest.raises(ValueError, match=r"several prefixes: 'best_', 'ckpt_'\. Pass"):
        checkpoint.restore(tmp_path)
    shutil.rmtree(tmp_path / "best_900")
    assert checkpoint.describe(tmp_path).steps == (100, 300)


def test_a_step_that_lost_its_folder_is_not_passed_over(tmp_path):
    """The older one is never taken in silence."""
    saved(tmp_path)
    shutil.rmtree(tmp_path / "300" / "default" / "ema_optax")
    with pytest.raises(ValueError, match=r"Step 300 .* that were: 100; pass step="):
        checkpoint.restore(tmp_path)
    shutil.rmtree(tmp_path / "100")
    with pytest.raises(ValueError, match="No step there was"):
        checkpoint.restore(tmp_path)


def test_a_run_one_folder_deeper_is_named(tmp_path, capsys):
    """By every function; `inspect` takes it where it is the only one."""
    saved(tmp_path / "outer" / "checkpoints")
    (tmp_path / "outer" / "logs-7").mkdir()
    with pytest.raises(FileNotFoundError, match=r"such as .*/outer/checkpoints"):
        checkpoint.restore(tmp_path / "outer")
    assert main(["inspect", str(tmp_path / "outer")]) == 0
    told = capsys.readouterr().out
    assert "2: 100, 300" in told
    assert "power(width=0.05)" in told
    assert "exponent" not in told
    saved(tmp_path / "outer" / "others")
    assert main(["inspect", str(tmp_path / "outer")]) == 1
    assert "/outer/checkpoints" in capsys.readouterr().err


def test_no_step_is_invented(tmp_path, capsys):
    """A number at the end of a name that is a fraction is none."""
    assert steps.number_of(epath.Path("width-0.07")) is None
    assert steps.number_of(epath.Path("ckpt-0007")) == 7
    checkpoint.save_average(tmp_path / "width-0.07", made(1)[0], step=12)
    assert checkpoint.describe(tmp_path / "width-0.07").step == 12
    assert main(["inspect", str(tmp_path / "width-0.07"), "--leaves"]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["shadow", "w", "(9,)", "float32"] in told


# Items.


@pytest.fixture
def two(tmp_path):
    """Steps of two networks, an item each."""
    with ocp.CheckpointManager(tmp_path) as manager:
        for number in (1, 2):
            items = {
                "teacher": checkpoint.EmaSave(*made(10 * number)),
                "critic": checkpoint.EmaSave(*made(number)),
                "config": ocp.args.JsonSave({"rate": 0.1}),
            }
            manager.save(number, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    return tmp_path


CALLS = {
    "restore": lambda d, **k: checkpoint.restore(d, "params", **k)["w"][0],
    "resume": lambda d, **k: checkpoint.resume(d, *made(0), **k)[0]["w"][0],
    "describe": lambda d, **k: checkpoint.describe(d, **k).path.rpartition("/")[2],
    "stored": lambda d, **k: checkpoint.stored(d, "params", **k).read(
        "w", (slice(0, 1),)
    )[0],
    "snapshots": lambda d, **k: checkpoint.snapshots(d, **k)[0].tree.read(
        "w", (slice(0, 1),)
    )[0],
    "export": lambda d, **k: (
        ema_optax.safetensors.export(d, d / "m.safetensors", overwrite=True, **k).step
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_of_several_items_one_is_asked_for(two, call):
    """None is chosen by the alphabet; a name that is none is refused with those."""
    with pytest.raises(
        ValueError, match=r"items: 'critic', 'teacher'\. Say .* item='cri"
    ):
        call(two)
    with pytest.raises(
        ValueError, match=r"no item 'tutor'; it has 'critic', 'teacher'"
    ):
        call(two, item="tutor")
    assert call(two, item="teacher") in (20, "teacher", 10.5, 2)
    assert call(two, item="critic") in (2, "critic", 1.5)
    with pytest.raises(ValueError, match="Say which"):
        call(two / "2")
    assert call(two / "2" / "teacher") in (20, "teacher", 20.5, 2)


def damage(item):
    """Flips a byte in the middle of the largest file of data."""
    file = max((item / "..").resolve().glob(f"{item.name}/**/d/*"), key=size_of)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def size_of(file):
    return file.stat().st_size


@pytest.mark.parametrize("item", ["critic", "teacher"])
def test_a_step_is_whole_if_all_of_its_items_are(two, item, capsys):
    """And the step to go back to is one whose same item is."""
    damage(two / "2" / item)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="whole is 1: pass"):
        checkpoint.verify(two)
    other = {"critic": "teacher", "teacher": "critic"}[item]
    checkpoint.verify(two, item=other)
    checkpoint.verify(two, step=1)
    assert main(["inspect", str(two), "--verify"]) == 1
    captured = capsys.readouterr()
    assert f"/2/{item}" in captured.err
    assert captured.out.count("Path") == 2
    assert main(["inspect", str(two), "--verify", "--item", other]) == 0
    capsys.readouterr()
    assert main(["inspect", str(two), "--json", "--step", "1"]) == 0
    paths = [each["path"] for each in json.loads(capsys.readouterr().out)]
    assert [path[-7:] for path in paths] == ["/critic", "teacher"]


# A bare restore.


def check_all(manager, params, state):
    """What else a manager does, after a bare restore."""
    shadow = manager.restore(1, args=checkpoint.EmaRestore("shadow", like=params))
    np.testing.assert_array_equal(shadow["w"], state.shadow["w"])
    assert_same(
        manager.restore(1, args=checkpoint.EmaResume(params, state)), (params, state)
    )
    manager.save(2, args=checkpoint.EmaSave(params, state))
    manager.wait_until_finished()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # Orbax's own load
def test_a_bare_restore_gives_the_raw_params(tmp_path):
    """On the manager that saved, a fresh one, one with our handler, and in v1."""
    params, state = made(3)
    params |= {"layers": [jnp.ones(2), jnp.zeros(1)], "none": None}
    state = TRANSFORM.init(params)._replace(
        shadow={**params, "w": state.shadow["w"], "none": None}
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=checkpoint.EmaSave(params, state))
        manager.wait_until_finished()
        assert_same(manager.restore(1), params)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert_same(manager.restore(1), params)
    given = {"item_handlers": checkpoint.EmaHandler()}
    with ocp.CheckpointManager(tmp_path, **given) as manager:
        assert_same(manager.restore(1), params)
        check_all(manager, params, state)
    with ocp.CheckpointManager(tmp_path) as manager:
        shadow = manager.restore(1, args=checkpoint.EmaRestore("shadow", like=params))
        assert shadow["w"][0] == 3.5
        assert_same(manager.restore(1), params)
    found = v1.load_checkpointables(tmp_path / "1")
    assert_same(found["default"], params)
    assert_same(
        checkpoint.EmaHandler().restore(epath.Path(tmp_path / "1/default")), params
    )
