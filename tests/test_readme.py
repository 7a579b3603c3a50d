"""The README's Python blocks run, one after the other, as a reader would type them."""

import pathlib
import re

import pytest

from tests import older, versions

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README travels with the source")
def test_python_blocks_run(tmp_path, monkeypatch):
    """In one namespace, in an empty folder; each assertion in them holds."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    assert len(blocks) >= 3
    namespace = {"run_folder": tmp_path / "run"}
    for block in blocks:
        if older.LACKS_NNX and re.search(r"interop\.(swapped|shadow_copy)", block):
            continue
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.skipif(not README.exists(), reason="the README travels with the source")
def test_the_two_commands_are_there():
    """One line sets up and runs the main job, one sets up and passes the tests."""
    lines = README.read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("ema-optax demo")
    assert commands[1].endswith("pytest")


@pytest.mark.skipif(not README.exists(), reason="the README travels with the source")
def test_the_lowest_versions_are_the_declared_ones():
    """A new lower bound in pyproject.toml is a new row of the README's table."""
    (row,) = re.findall(r"^\| lowest \| 3\.11 (.*) \|$", README.read_text(), re.M)
    told = dict(zip(versions.COLUMNS, row.removeprefix("| ").split(" | "), strict=True))
    for name, declared in versions.lowest().items():
        if name in told:
            assert f"{told[name]}.".startswith(f"{declared}."), name
