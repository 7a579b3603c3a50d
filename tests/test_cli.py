"""The command line: exit codes, and one clear line where something is wrong."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax._demo import demo

MODULE = [sys.executable, "-m", "ema_optax"]


def test_version(capsys: pytest.CaptureFixture[str]):
    """`--version` prints the version and ends well."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ema-optax {ema_optax.__version__}\n"


def test_help_has_examples(capsys: pytest.CaptureFixture[str]):
    """`demo --help` names the options and shows whole commands."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--steps N", "--out DIR", "--seed S", "ema-optax demo --steps 300"):
        assert part in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["demo", "--steps", "0"],
        ["demo", "--steps=-3"],
        ["demo", "--steps", "1.5"],
        ["demo", "--steps", "many"],
        ["demo", "--steps", "2147483648"],
        ["demo", "--seed=-1"],
        ["demo", "--out", ""],
        ["inspect", ""],
        ["inspect", "--step=-1"],
    ],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    """Code 2, and one line on stderr that names what was wrong and where help is."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.endswith("--help")
    assert all(a.lstrip("-").partition("=")[0] in line for a in arguments[1:2])


def test_a_bad_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Code 1 and one line on stderr that names the folder."""
    out = tmp_path / "file"
    out.write_text("mine")
    assert cli.main(["demo", "--steps", "3", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert str(out) in line
    assert out.read_text() == "mine"


def test_a_restore_that_is_not_exact(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Code 1: the table is printed, and stderr says that the models differ."""
    found = demo.DemoRun(
        comparisons=(
            demo.Comparison("params", "raw", before=0.9, after=0.9, exact=True),
            demo.Comparison("shadow/ema", "EMA", before=0.9, after=0.8, exact=False),
        ),
        candidates=(),
        picture=Path("accuracy.png"),
        choice=None,
        checkpoint=Path("checkpoints/3"),
    )
    monkeypatch.setattr(demo, "run", lambda **settings: found)
    assert cli.main(["demo"]) == 1
    printed = capsys.readouterr()
    assert "80.00%" in printed.out
    assert "DIFFERENT" in printed.out
    assert "not answer exactly" in printed.err


@pytest.mark.once
def test_the_module_runs_the_demo(tmp_path: Path):
    """`python -m ema_optax demo` prints the table and names the files it wrote."""
    command = [*MODULE, "demo", "--steps", "3", "--seed", "7", "--out", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("identical") == 2
    assert "raw params" in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "accuracy.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="a job in the background ignores Ctrl-C, and so do its children",
)
def test_ctrl_c_while_training(tmp_path: Path):
    """Code 130 and one line on stderr, nothing else."""
    command = [*MODULE, "demo", "--steps", "2000000000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "demo.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "ema-optax: interrupted\n")


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="a job in the background ignores Ctrl-C, and so do its children",
)
def test_ctrl_c_in_a_destructor():
    """From where Python cannot raise it: 130 and one line all the same."""
    code = (
        "import os, signal, sys, time\n"
        "from ema_optax import _cli as cli\n"
        "class Lost:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "def work(*args):\n"
        "    lost = Lost(); del lost\n"
        "    while True: time.sleep(0.01)\n"
        "cli.profile.profile = work\n"
        "sys.argv = ['ema-optax', 'profile', '--decay', '0.9', '--steps', '9']\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "ema-optax: interrupted\n")


@pytest.mark.long
def test_a_missing_extra(tmp_path: Path):
    """Without one of the demo's packages: code 1, and the pip command, in one line."""
    script = (
        "import sys\n"
        "from ema_optax._cli import main\n"
        "for name in ('rich', 'flax', 'matplotlib', 'sklearn'):\n"
        "    assert name not in sys.modules, name\n"
        "for name in ('rich', 'flax', 'matplotlib', 'sklearn'):\n"
        "    sys.modules[name] = None\n"  # what a failed import looks like
        "    print(main(['demo']))\n"
        "    del sys.modules[name]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["1"] * 4, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for line, name in zip(
        lines, ("rich", "flax", "matplotlib", "sklearn"), strict=True
    ):
        assert f"needs {name}," in line
        assert "pip install 'ema-optax[demo]'" in line
    assert not [*tmp_path.iterdir()]  # nothing was made before it failed
