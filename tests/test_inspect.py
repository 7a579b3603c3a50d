"""`ema-optax inspect`: what it tells of a checkpoint, and of what is none."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from etils import epath

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax._checkpoint import sealed

MARKUP, CONTROL = "[red]w[link=x]:smile:", "a\x1b[2J\u202eb\n"
LONG = "layer_with_a_long_name_" * 8


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 3 and 7, with names that try to steer what prints them."""
    folder = tmp_path_factory.mktemp("run")
    params = {
        "n": jnp.int32(0),
        "kernel": jnp.ones((64, 64)),
        MARKUP: jnp.ones((), jnp.bfloat16),
        LONG: {CONTROL: jnp.ones(3)},
    }
    opt_state = ema_optax.ema_params(
        {"fast": 0.9, "own": lambda step: 0.5}, every=2
    ).init(params)
    for step in (3, 7):
        extra = {"note": "[b]hi\x1b"} if step == 7 else None
        checkpoint.save(folder, params, opt_state, step=step, extra=extra)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def flip_a_bit(step: Path) -> None:
    """Flips one bit in the middle of the file that holds a shadow's kernel."""
    files = [p for p in (step / "default" / "ema_optax").rglob("*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def reseal(step: Path, **changes: Any) -> None:
    """Changes a manifest and seals it, as anybody can."""
    path = epath.Path(step / "default" / "ema_optax" / "manifest.json")
    sealed.write_sealed(path, sealed.read_sealed(path) | changes)


def fails_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["inspect", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ema-optax inspect: error: ")
    assert line.isprintable()
    return line


def test_the_tables(saved: Path, capsys: pytest.CaptureFixture[str]):
    """The newest step, who wrote it, its trees, and the rest of the state."""
    assert cli.main(["inspect", str(saved)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Step:       7\n" in printed.out
    assert str(saved) in printed.out
    assert f"ema_optax {ema_optax.__version__}, format 1\n" in printed.out
    lines = [re.split(r" {2,}", line.strip()) for line in printed.out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines}
    # 4 + 4·64² + 2 + 4·3 bytes; the shadows are float32 and lack n
    assert rows["params"] == ["4", "16.4 kB", "bfloat16, float32, int32"]
    fast = ["warmup(decay=0.9, offset=10)", "2", "0"]
    assert rows["shadow/fast"] == ["3", "16.4 kB", "float32", *fast]
    own = ["not recorded", "2", "0"]
    assert rows["shadow/own"] == ["3", "16.4 kB", "float32", *own]
    assert rows["state"] == ["1", "4 bytes", "int32"]


def test_names_are_text_and_not_markup(saved: Path, capsys: pytest.CaptureFixture[str]):
    """Brackets and emoji codes stay, control characters are escaped, none is cut."""
    assert cli.main(["inspect", str(saved), "--leaves"]) == 0
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    assert f" {MARKUP} " in text
    assert f" {LONG}/a\\x1b[2J\\u202eb\\n " in text
    assert '{"note": "[b]hi\\u001b"}' in text
    assert "(64, 64)" in text


def test_a_step_by_its_number(saved: Path, capsys: pytest.CaptureFixture[str]):
    """`--step`, or the folder of the step itself."""
    for arguments in ([str(saved), "--step", "3"], [str(saved / "3")]):
        assert cli.main(["inspect", *arguments]) == 0
        text = capsys.readouterr().out
        assert "Step:       3\n" in text
        assert "Extra" not in text


def test_json(saved: Path, capsys: pytest.CaptureFixture[str]):
    """All of it, leaves included, with decays that go back into Python."""
    assert cli.main(["inspect", str(saved), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["format"], found["whole"]) == (7, 1, True)
    assert found["extra"] == {"note": "[b]hi\x1b"}
    fast = found["trees"]["shadow/fast"]
    assert ema_optax.Decay.from_json(fast["decay"]) == ema_optax.warmup(0.9)
    assert (fast["every"], fast["count"], fast["bytes"]) == (2, 0, 4 * (64**2 + 1 + 3))
    assert fast["leaves"]["kernel"] == {"shape": [64, 64], "dtype": "float32"}
    assert found["trees"]["shadow/own"]["decay"] is None
    assert found["state"]["leaves"] == {"count": {"shape": [], "dtype": "int32"}}


def test_a_whole_step(saved: Path, capsys: pytest.CaptureFixture[str]):
    """`--verify` reads all of it, and says so in words."""
    assert cli.main(["inspect", str(saved), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("whole")


def test_a_damaged_step(copied: Path, capsys: pytest.CaptureFixture[str]):
    """One flipped bit: its leaf and the newest whole step, in one line, and code 1."""
    flip_a_bit(copied / "7")
    assert cli.main(["inspect", str(copied)]) == 0  # the manifest is whole
    capsys.readouterr()
    line = fails_in_one_line([str(copied), "--verify"], capsys)
    assert "kernel" in line
    assert "step=3" in line
    assert cli.main(["inspect", str(copied), "--verify", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["whole"] is False
    assert printed.err == f"{line}\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 3, "version": "9.1"}, "pip install 'ema-optax>=9.1'"),
        ({"format": "2"}, "manifest"),
        ({"trees": []}, "manifest"),
        ({"trees": {"state": {"leaves": {"w": 3}}}}, "manifest"),
        ({"averages": {"params": {}}}, "manifest"),
    ],
)
def test_a_manifest_of_somebody_else(
    changes: dict[str, Any],
    says: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
):
    """A newer format, or sealed nonsense: one line, and nothing on stdout."""
    reseal(copied / "7", **changes)
    assert says in fails_in_one_line([str(copied)], capsys)
    assert cli.main(["inspect", str(copied), "--json", "--verify"]) == 1
    assert capsys.readouterr().out == ""


def test_a_damaged_manifest(copied: Path, capsys: pytest.CaptureFixture[str]):
    """A manifest that was cut off is named, with the newest whole step."""
    path = copied / "7" / "default" / "ema_optax" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    line = fails_in_one_line([str(copied)], capsys)
    assert "manifest.json" in line
    assert "step=3" in line


def test_what_is_no_checkpoint(saved: Path, capsys: pytest.CaptureFixture[str]):
    """A missing folder, a file, a folder without steps, and a missing step."""
    empty, file = saved / "empty", saved / "a\nfile"
    empty.mkdir()
    file.touch()
    for arguments, says in [
        ([str(saved / "nowhere")], "does not exist"),
        ([str(file)], "is a file"),
        ([str(empty)], "holds no checkpoint"),
        ([str(saved), "--step", "4"], "no step 4; it has 3, 7"),
    ]:
        assert says in fails_in_one_line(arguments, capsys)


def test_without_rich(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The extra that brings it is named, and exists; `--json` does without."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["inspect", str(saved)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "'ema-optax inspect' needs rich, which is not installed. "
        "Run: pip install 'ema-optax[cli]'\n"
    )
    assert cli.main(["inspect", str(saved), "--json"]) == 0

    project = Path(__file__).parent.parent / "pyproject.toml"
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    assert any(needed.startswith("rich") for needed in extras["cli"])


@pytest.mark.long
def test_a_pipe_that_closes(saved: Path):
    """A reader that has seen enough ends the command without a word on stderr."""
    command = [sys.executable, "-m", "ema_optax", "inspect", str(saved), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_arrays_are_not_read(copied: Path, capsys: pytest.CaptureFixture[str]):
    """Without `--verify` the manifest alone is needed, however large the arrays."""
    item = copied / "7" / "default"
    for path in item.iterdir():
        if path.is_dir() and path.name != "ema_optax":
            shutil.rmtree(path)
    assert cli.main(["inspect", str(copied)]) == 0
    assert capsys.readouterr().out.count("shadow/") == 2


def test_long_lists_are_shown_by_their_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of the coefficients of a merge `--json` has all, to the last digit."""
    extra = {"merged": {"steps": list(range(13)), "coefficients": [1 / 3] * 12}}
    checkpoint.save_average(tmp_path, {"w": jnp.ones(2)}, extra=extra)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert '"steps": [0, 1, 2, "... 9 more ...", 12]' in text
    assert f'"coefficients": [{", ".join(["0.333333"] * 12)}]' in text
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extra"] == extra
