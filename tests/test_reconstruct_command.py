"""`ema-optax reconstruct`: what it writes, tells and refuses, on runs on disk."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint, reconstruction
from tests import reference, runs
from tests.older import enable_x64

STEPS, TRACKED = 400, (0.05, 0.10)
HELD = runs.drifting(STEPS, 30)  # params after each update


def at(step: int) -> dict[str, Any]:
    """Params after an update: averaged in two dtypes, and leaves that are not."""
    return {
        "w": jnp.asarray(HELD[step]),
        "layers": [{"b": jnp.asarray(HELD[step, :4], jnp.bfloat16)}],
        "n": jnp.int32(step),
        "key": jax.random.key(3),
    }


def tracked(width: float, step: int = STEPS) -> np.ndarray:
    """The average of w as if it had been tracked, in float64."""
    exponent = ema_optax.exponent_from_width(width)
    betas = reference.betas("power", step, exponent)
    return reference.average(HELD[1 : step + 1], betas)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`snapshots` in float16 at every 20th update, `checkpoints` numbered from 0."""
    root = tmp_path_factory.mktemp("run")
    powers = {f"{width}": ema_optax.power(width) for width in TRACKED}
    transform = ema_optax.ema_params(powers)
    state = transform.init(at(0))

    @jax.jit
    def fold(state: Any, params: Any) -> Any:
        still = jax.tree.map(jnp.zeros_like, {**params, "key": None})
        return transform.update({**still, "key": params["key"]}, state, params)[1]

    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with (
        ocp.CheckpointManager(root / "snapshots", options=options) as often,
        ocp.CheckpointManager(root / "checkpoints", options=options) as rarely,
    ):
        for step in range(1, STEPS + 1):
            state = fold(state, at(step))
            if step % 20 == 0:
                often.save(step, args=checkpoint.SnapshotSave(state, dtype="float16"))
            if step in (200, STEPS):
                rarely.save(step - 1, args=checkpoint.EmaSave(at(step), state))
    return root


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run / "snapshots", tmp_path / "snapshots")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a test fail that reads an array of a snapshot."""
    monkeypatch.setattr(checkpoint.StoredTree, "read", None)


def reconstruct(
    capsys: pytest.CaptureFixture[str], *arguments: object, says: str = ""
) -> Any:
    """Runs the command with --json; what it says on stderr is one line, or nothing."""
    assert cli.main(["reconstruct", *map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("\n") == bool(says)
    assert says in printed.err
    return json.loads(printed.out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that cannot do its work, and returns its one line on stderr."""
    assert cli.main(["reconstruct", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("ema-optax reconstruct: error: ")
    assert line.isprintable()
    return line


@pytest.mark.long
def test_whole_models(run: Path, tmp_path: Path, capsys: Any):
    """Params of the step fill what is not averaged, and give the dtypes."""
    folders, out = [run / "snapshots", run / "checkpoints"], tmp_path / "deep" / "out"
    told = reconstruct(capsys, *folders, "--width", 0.03, 0.07, 0.2, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == [
        f"width-{w}" for w in (0.03, 0.07, 0.2)
    ]
    snapshots = checkpoint.snapshots(folders[1])  # float32 where there is a choice
    steps = {snapshot.step for snapshot in snapshots}
    snapshots += [s for s in checkpoint.snapshots(folders[0]) if s.step not in steps]
    for row in told["averages"]:
        width = row["width"]
        assert row["directory"] == f"{out}/width-{width}"
        found = checkpoint.restore(row["directory"], like=at(0))
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
            lambda x: x.dtype, at(0)
        )
        exact = reconstruction.reconstruct(snapshots, width=width, params=at(STEPS))
        assert jax.tree.all(
            jax.tree.map(lambda a, b: (a == b).all(), found, exact.tree)
        )
        # Ending a step early is 1.4e-2, 5.7e-3 and 1.9e-3 off. Noise gain: 4.6 at .03.
        bound = 1e-3 if width > 0.05 else 5e-3
        assert reference.relative_rms(found["w"], tracked(width)) < bound
        assert int(found["n"]) == STEPS
        for figure in ("profile_error", "noise_gain"):
            assert row[figure] == pytest.approx(getattr(exact, figure), rel=1e-6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_what_a_checkpoint_says_of_itself(run: Path, tmp_path: Path, capsys: Any):
    """Its decay and step, how it was made; whole, and plain params for Orbax."""
    folders, out = [run / "snapshots", run / "checkpoints"], tmp_path / "out"
    told = reconstruct(capsys, *folders, "--width", 0.07, 0.070, "--out", out)
    (row,) = told["averages"]
    found = checkpoint.describe(row["directory"])
    assert found.step == STEPS
    assert found.trees["shadow"].decay == ema_optax.power(0.07)
    assert found.trees["shadow"].count == STEPS
    assert found.extra == {
        "width": 0.07,
        # One is solved alone, one among others: rounding differs, by the processor.
        "profile_error": pytest.approx(row["profile_error"], rel=1e-6),
        "noise_gain": pytest.approx(row["noise_gain"], rel=1e-6),
        "snapshots": 40,
        "tracked": [0.05, 0.1],
        "snapshot_dtypes": ["float16", "float32"],
        "whole_model": True,
    }
    checkpoint.verify(row["directory"])
    shadow = checkpoint.restore(row["directory"])
    with ocp.CheckpointManager(row["directory"]) as manager:
        plain = manager.restore(STEPS, args=ocp.args.PyTreeRestore())
    np.testing.assert_array_equal(plain["w"], shadow["w"])


def test_averaged_leaves_alone(run: Path, tmp_path: Path, capsys: Any):
    """Without params there are only those, in float32, and both outputs say so."""
    out = tmp_path / "out"
    command = ["reconstruct", f"{run / 'snapshots'}", "--width", "0.07", "--out"]
    assert cli.main([*command, str(out)]) == 0
    assert "the averaged leaves alone" in capsys.readouterr().out
    found = checkpoint.restore(out / "width-0.07")
    assert set(found) == {"layers", "w"}
    assert found["layers"]["0"]["b"].dtype == jnp.float32
    assert reference.relative_rms(found["w"], tracked(0.07)) < 1e-3
    assert checkpoint.describe(out / "width-0.07").extra["whole_model"] is False
    like = {name: at(0)[name] for name in found}
    assert checkpoint.restore(out / "width-0.07", like=like)["layers"][0]["b"].any()


def test_an_earlier_step(run: Path, tmp_path: Path, capsys: Any):
    """In updates, though its params lie in the folder 199; nothing later is used."""
    folders, out = [run / "checkpoints", run / "snapshots"], tmp_path / "out"
    told = reconstruct(capsys, *folders, "--width", 0.07, "--out", out, "--step", 200)
    assert (told["step"], told["snapshots"]) == (200, 20)
    assert told["snapshot_steps"] == list(range(20, 201, 20))
    assert (out / "width-0.07" / "200").is_dir()
    found = checkpoint.restore(out / "width-0.07", like=at(0))
    assert int(found["n"]) == 200
    # Of 199 or 201 steps it would be 2e-2 off.
    assert reference.relative_rms(found["w"], tracked(0.07, 200)) < 1.5e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(dtype: str, run: Path, tmp_path: Path, capsys: Any):
    """Of all averaged leaves, and of no other."""
    folders = [run / "snapshots", run / "checkpoints"]
    arguments = ["--width", 0.07, "--out", tmp_path, "--dtype", dtype]
    reconstruct(capsys, *folders, *arguments)
    found = checkpoint.describe(tmp_path / "width-0.07").trees["params"].leaves
    dtypes = {path: leaf.dtype for path, leaf in found.items()}
    averaged = {"w": dtype, "layers/0/b": dtype}
    assert dtypes == {**averaged, "n": "int32", "key": "uint32"}


def test_steps_in_several_folders(run: Path, copied: Path, tmp_path: Path, capsys: Any):
    """In any order, some of them in both: the same average as from one folder."""
    rest = tmp_path / "rest"
    rest.mkdir()
    for step in (*range(20, 200, 20), STEPS):
        shutil.move(copied / f"{step}", rest / f"{step}")
    shutil.copytree(rest / "100", copied / "100")
    one, two = tmp_path / "one", tmp_path / "two"
    told = [
        reconstruct(capsys, *folders, "--width", 0.05, 0.2, "--out", out)
        for folders, out in (([run / "snapshots"], one), ([copied, rest], two))
    ]
    assert told[0]["snapshots"] == told[1]["snapshots"] == 40
    for width in ("width-0.05", "width-0.2"):
        a, b = (checkpoint.restore(out / width)["w"] for out in (one, two))
        np.testing.assert_array_equal(a, b)


def test_params_in_float64(tmp_path: Path, capsys: Any):
    """A run with x64 enabled is averaged in float64, though this process is not.

    Steps 2 and 3 hold the same shadow, of the fold at 2; params are the newer ones.
    """
    transform = ema_optax.ema_params(ema_optax.power(0.1), every=2)
    with enable_x64(True):
        params = {"w": jnp.full(3, 1 / 3, jnp.float64), "n": jnp.int64(2**40)}
        state = transform.init(params)
        for step in (1, 2, 3):
            params = {**params, "n": jnp.int64(2**40 + step)}
            still = optax.tree.zeros_like(params)
            _, state = transform.update(still, state, params)
            checkpoint.save(tmp_path / "run", params, state, step=step)
    arguments = [tmp_path / "run", "--width", 0.1, "--out", tmp_path / "out"]
    told = reconstruct(capsys, *arguments)
    assert (told["step"], told["snapshots"], told["whole_model"]) == (2, 1, True)
    found = checkpoint.restore(tmp_path / "out" / "width-0.1")
    np.testing.assert_array_equal(found["w"], np.full(3, 1 / 3))
    assert found["n"] == 2**40 + 3


@pytest.mark.usefixtures("unread")
def test_a_dry_run(run: Path, tmp_path: Path, capsys: Any):
    """Tells what the library would, reads no array and writes nothing."""
    widths, out = (0.03, 0.02, 0.25), tmp_path / "out"
    arguments = [run / "snapshots", "--width", *widths, "--out", out, "--dry-run"]
    told = reconstruct(capsys, *arguments)
    plan = reconstruction.plan(range(20, STEPS + 1, 20), widths=widths)
    assert [row["width"] for row in told["averages"]] == list(widths)
    errors = [row["profile_error"] for row in told["averages"]]
    assert errors == pytest.approx(plan.profile_errors, rel=1e-6)
    gains = [row["noise_gain"] for row in told["averages"]]
    assert gains == pytest.approx(plan.noise_gains, rel=1e-6)
    low, high = told["reachable"]
    assert low < plan.reachable[0] < plan.reachable[1] < high  # 5 %, and there 1 %
    assert not out.exists()
    assert (
        reconstruct(capsys, *arguments[:-3], "--dry-run")["averages"][0]["directory"]
        is None
    )


@pytest.mark.usefixtures("unread")
def test_a_dry_run_without_widths(run: Path, capsys: Any):
    """Tells of the usual ones, in a table of at most 80 columns."""
    assert cli.main(["reconstruct", str(run / "snapshots"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {cells[0]: cells[1:] for cells in map(str.split, lines) if cells}
    assert rows["0.05"] == ["<", "0.01%", "1.00"]
    assert float(rows["0.25"][0].rstrip("%")) == pytest.approx(6.03, abs=0.02)
    assert "Widths from 0.0247 to 0.244" in lines[2]


@pytest.mark.usefixtures("unread")
def test_a_dry_run_fails_where_the_run_would(run: Path, tmp_path: Path, capsys: Any):
    """With the same line, after its table: the profile error is above 50 %."""
    command = ["reconstruct", str(run / "snapshots"), "--width", "0.1", "0.005"]
    command += ["--out", str(tmp_path / "out")]
    line = fails(capsys, *command[1:])
    assert "width 0.005" in line
    assert "give widths from 0.0247 to 0.244" in line
    assert cli.main([*command, "--dry-run"]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"{line}\n"
    assert "0.005" in printed.out


def test_a_doubtful_width(run: Path, tmp_path: Path, capsys: Any):
    """With a profile error up to 50 % it is written, with one line of warning."""
    arguments = [run / "snapshots", "--width", 0.0075, "--out", tmp_path / "out"]
    says = "ema-optax reconstruct: warning: The average of width 0.0075 at step 400 has"
    reconstruct(capsys, *arguments, "--dry-run")
    told = reconstruct(capsys, *arguments, says=says)
    assert told["averages"][0]["profile_error"] == pytest.approx(0.413, abs=0.001)
    checkpoint.verify(tmp_path / "out" / "width-0.0075")
    with pytest.warns(reconstruction.ReconstructionWarning):
        warnings.warn("mine", reconstruction.ReconstructionWarning, stacklevel=1)


@pytest.mark.usefixtures("unread")
def test_nothing_is_overwritten(run: Path, tmp_path: Path, capsys: Any):
    """One average that exists stops all of them, before anything is read."""
    (tmp_path / "width-0.2" / "400").mkdir(parents=True)
    arguments = [run / "snapshots", "--width", 0.1, 0.2, "--out", tmp_path]
    line = fails(capsys, *arguments)
    assert f"{tmp_path}/width-0.2/400 exists, and nothing is overwritten" in line
    assert [p.name for p in tmp_path.iterdir()] == ["width-0.2"]
    assert not any((tmp_path / "width-0.2" / "400").iterdir())


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: it does not exist"),
        (["snapshots", "nowhere"], "nowhere: it does not exist"),
        (["snapshots", "--step", "9"], "they reach from step 20 to 400"),
        (["snapshots", "--step", "401"], "they reach from step 20 to 400"),
        (["empty"], "holds no checkpoint"),
        (["other"], "no shadows with a power profile"),
        (["snapshots", "--out", "snapshots"], "holds the steps of a run"),
        (["snapshots/400", "--out", "other"], "holds the steps of a run"),
        (["snapshots", "--out", "a\x1bfile/out"], "a\\x1bfile is a file"),
    ],
)
def test_what_cannot_be_done(arguments, says, run, tmp_path, monkeypatch, capsys):
    """Code 1 and one line with what would do; nothing is read, nothing written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshots").symlink_to(run / "snapshots")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a\x1bfile").touch()
    params = {"w": jnp.ones(2)}
    checkpoint.save("other", params, ema_optax.ema_params(0.9).init(params), step=3)
    before = sorted(tmp_path.rglob("*"))
    assert says in fails(capsys, "--out", "out", *arguments, "--width", "0.07")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RUN"),
        (["run"], "needs --width and --out, or --dry-run"),
        (["run", "--width", "0.1"], "needs --out, or --dry-run"),
        (["run", "--out", "a"], "needs --width, or --dry-run"),
        (["run", "--width", "0.3"], "(0, 0.2886], got '0.3'"),
        (["run", "--width", "0"], "(0, 0.2886], got '0'"),
        (["run", "--width", "nan"], "(0, 0.2886], got 'nan'"),
        (["run", "--width", "1e-320"], "(0, 0.2886], got '1e-320'"),
        (["--width", "0.1", "run", "--out", "a"], "got 'run'; write RUN before it"),
        (["run", "--width"], "--width"),
        (["run", "--step", "0"], "--step"),
        (["run", "--dtype", "int8"], "--dtype"),
        (["run", "--out", ""], "needs a path"),
        ([""], "needs a path"),
    ],
)
def test_wrong_arguments(arguments, says, capsys):
    """Code 2, and one line that names the option and where help is."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["reconstruct", *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert says in line
    assert line.endswith("--help")


def test_a_damaged_snapshot(copied: Path, tmp_path: Path, capsys: Any):
    """Its step and leaf, and what to do; without that step it goes on."""
    files = [p for p in (copied / "200").rglob("d/*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    arguments = [copied, "--width", 0.07, "--out", tmp_path / "out"]
    line = fails(capsys, *arguments)
    assert f"Step 200 of {copied} is damaged" in line
    assert re.search("leaf '(w|layers/0/b)' of the shadow/0", line)
    assert "Remove that step" in line
    assert "step=" not in line  # the library's advice to who restores
    assert not (tmp_path / "out").exists()
    shutil.rmtree(copied / "200")
    assert reconstruct(capsys, *arguments)["snapshots"] == 38


def test_a_damaged_manifest(copied: Path, tmp_path: Path, capsys: Any):
    """Is named with its step, before anything is read."""
    (manifest,) = (copied / "60").rglob("manifest.json")
    manifest.write_text(manifest.read_text()[:-9])
    line = fails(capsys, copied, "--dry-run")
    assert f"Step 60 of {copied} is damaged" in line
    assert "Remove that step" in line


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk(run: Path, tmp_path: Path, capsys: Any, caplog: Any):
    """One line, nothing of the average is left, and it works once there is room."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = [run / "snapshots", "--width", 0.07, "--out", tmp_path / "a" / "out"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        line = fails(capsys, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Could not write step 400" in line
    assert not caplog.records  # Orbax's threads would log pages of tracebacks
    assert not any(tmp_path.iterdir())
    reconstruct(capsys, *arguments)


def test_a_disk_that_fills_up(run: Path, tmp_path: Path, monkeypatch, capsys: Any):
    """What was written before is whole, and named; the rest can be asked for."""
    save = checkpoint.save_average

    def fill(folder: Any, *args: Any, **more: Any) -> None:
        if "0.1" in str(folder):
            Path(folder).mkdir()  # as Orbax does first
            raise OSError("Could not write: no room.")
        save(folder, *args, **more)

    arguments = [run / "snapshots", "--width", 0.07, 0.1, 0.2, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_average", fill)
        line = fails(capsys, *arguments)
    assert line.endswith("no room. Written before it: width 0.07.")
    assert [p.name for p in tmp_path.iterdir()] == ["width-0.07"]
    checkpoint.verify(tmp_path / "width-0.07")


@pytest.mark.usefixtures("unread")
def test_a_disk_without_room(run: Path, tmp_path: Path, monkeypatch, capsys: Any):
    """Is told before hours of reading: 34 float32 numbers for each width."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9999, 0, 2 * 136 - 1))
    command = [run / "snapshots", "--out", tmp_path / "out", "--width", 0.07, 0.1]
    assert "0.000 MB, and the disk has" in fails(capsys, *command)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{tmp_path} is read-only" in fails(capsys, *command)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    reconstruct(capsys, *command, "--dry-run")


def test_room_enough(run: Path, tmp_path: Path, monkeypatch, capsys: Any):
    """To the byte; a file system that tells nothing of its size is not judged."""
    usage = namedtuple("usage", "total used free")
    command = [run / "snapshots", "--out", tmp_path / "a", "--width", 0.07, 0.1]
    for told in (usage(9999, 0, 136), usage(0, 0, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, told=told: told)
        dtype = "bfloat16" if told.total else "float32"
        reconstruct(capsys, *command, "--dry-run", "--dtype", dtype)


def test_progress_on_a_terminal(run: Path, tmp_path: Path, monkeypatch, capsys: Any):
    """A bar on stderr alone, where it is a terminal and rich is installed."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    command = ["reconstruct", str(run / "snapshots"), "--width", "0.07", "--out"]
    for name, rich in (("with", True), ("without", False)):
        with monkeypatch.context() as patch:
            terminal = Terminal()
            patch.setattr(sys, "stderr", terminal)
            if not rich:
                for module in [m for m in sys.modules if m.startswith("rich")]:
                    patch.delitem(sys.modules, module)
                patch.setitem(sys.modules, "rich", None)
            assert cli.main([*command, str(tmp_path / name)]) == 0
        drawn = terminal.getvalue()
        assert ("averaging" in drawn) == ("writing" in drawn) == rich
        assert (drawn == "") != rich
        out = capsys.readouterr().out
        assert "averaging" not in out
        assert f"{tmp_path / name}/width-0.07/400" in out


@pytest.mark.long
def test_as_a_user_runs_it(run: Path, tmp_path: Path):
    """In a process of its own: a table on stdout, stderr empty, and on the CPU."""
    command = [str(run / "snapshots"), "--width", "0.05", "0.15", "--out", "averages"]
    script = (
        "import sys, jax\n"
        "from ema_optax._cli import main\n"
        "code = main()\n"
        "assert jax.config.values['jax_platforms'] == 'cpu'\n"
        "sys.exit(code)\n"
    )
    without = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", script, "reconstruct", *command],
        cwd=tmp_path,
        env=without,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Averages at step 400, from 40 snapshots"
    row = re.split(" {2,}", lines[-3].strip())
    assert (row[0], row[-1]) == ("0.15", "averages/width-0.15/400")


def test_help(capsys: pytest.CaptureFixture[str]):
    """ASCII of at most 80 columns, RUN before the widths, and examples that parse."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["reconstruct", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("usage: ema-optax reconstruct RUN")
    examples = text.partition("examples:")[2].replace("\\\n", "").splitlines()
    for example in filter(None, examples):
        line = fails(capsys, *example.split()[2:])
        assert "run/snapshots: it does not exist" in line
