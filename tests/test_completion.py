"""Completion, in the shell itself: it runs nothing of ours."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ema_optax import _cli as cli


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ins"], ["inspect"]),
        (["rec"], ["reconstruct"]),
        (["inspect", "--ver"], ["--verify"]),
        (["export", "--dtype", "b"], ["bfloat16"]),
        (["completion", "z"], ["zsh"]),
        (["inspect", "ru"], ["runs"]),  # a folder, not the file beside it
        (["export", "--rename", "ru"], ["run.json", "runs"]),
    ],
)
def test_bash(
    typed: list[str],
    offered: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """What is offered for what was typed, in a folder with a file and a folder."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    (tmp_path / "runs").mkdir()
    (tmp_path / "run.json").touch()
    words = " ".join(["ema-optax", *typed])
    ask = (
        f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; COMP_TYPE=9\n"
        "compopt() { :; }\n"  # bash has it within a completion alone
        "declare -f _shtab_ema_optax > /dev/null || exit 3\n"
        "_shtab_ema_optax; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        [bash, "--norc", "-c", f"{script('bash', capsys)}\n{ask}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str]):
    """All commands are in the script."""
    text = script(shell, capsys)
    commands = (
        "choose",
        "demo",
        "export",
        "import-tf",
        "import-torch",
        "inspect",
        "profile",
    )
    for command in (*commands, "reconstruct"):
        assert command in text


def test_no_other_shell(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        cli.main(["completion", "fish"])
    assert caught.value.code == 2
    assert "'bash', 'zsh', 'tcsh'" in capsys.readouterr().err
