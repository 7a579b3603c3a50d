"""Python blocks of README and MIGRATING run in order, as a reader would type them."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from ema_optax import _cli as cli
from ema_optax import checkpoint
from tests import older, versions

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
MIGRATING = ROOT / "MIGRATING.md"
THEIRS = "theirs"  # blocks of other libraries, which few have installed


def _blocks(page, kind=""):
    """Returns the Python blocks of a page, those of a kind."""
    fence = f"```python {kind}".rstrip()
    return re.findall(rf"^{fence}\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.once
@pytest.mark.parametrize("page", [README, MIGRATING], ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In one namespace, in an empty folder; each assertion in them holds."""
    if not page.exists():
        pytest.skip(f"{page.name} travels with the source")
    monkeypatch.chdir(tmp_path)
    blocks = _blocks(page)
    assert len(blocks) >= 3
    namespace = {"run_folder": tmp_path / "run"}
    if page == MIGRATING:  # what its commands make of a run
        params = {"w": np.zeros(3, np.float32)}
        checkpoint.save_average("imported", params, params=params, step=300_000)
    for block in blocks:
        if older.LACKS_NNX and re.search(r"interop\.(swapped|shadow_copy)", block):
            continue
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.skipif(not MIGRATING.exists(), reason="it travels with the source")
def test_blocks_of_other_libraries_are_python():
    """Three lines or four each; they are compiled, as the libraries are not here."""
    blocks = _blocks(MIGRATING, THEIRS)
    assert len(blocks) >= 15
    for block in blocks:
        compile(block, MIGRATING.name, "exec")


@pytest.mark.skipif(not MIGRATING.exists(), reason="it travels with the source")
def test_commands_of_the_migration_page_parse():
    """Each is one that the command line takes, its decays too."""
    shell = re.findall(r"^```sh\n(.*?)^```", MIGRATING.read_text(), re.S | re.M)
    lines = "".join(shell).replace("\\\n", " ").splitlines()
    assert len(lines) >= 12
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "ema-optax"
        assert cli._parser().parse_args(arguments).name == arguments[0]


@pytest.mark.skipif(not MIGRATING.exists(), reason="it travels with the source")
def test_the_table_of_the_migration_page_leads_to_its_sections():
    """Each link is a heading of the page, and each heading is linked."""
    text = MIGRATING.read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert anchors == set(re.findall(r"\]\(#([^)]*)\)", text))


@pytest.mark.skipif(not README.exists(), reason="the README travels with the source")
def test_the_two_commands_are_there():
    """One line sets up and runs the main job, one sets up and passes the tests."""
    lines = README.read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("ema-optax demo")
    assert commands[1].endswith("pytest -n 2")


@pytest.mark.skipif(not README.exists(), reason="the README travels with the source")
def test_the_lowest_versions_are_the_declared_ones():
    """A new lower bound in pyproject.toml is a new row of the README's table."""
    (row,) = re.findall(r"^\| lowest \| 3\.11 (.*) \|$", README.read_text(), re.M)
    told = dict(zip(versions.COLUMNS, row.removeprefix("| ").split(" | "), strict=True))
    for name, declared in versions.lowest().items():
        if name in told:
            assert f"{told[name]}.".startswith(f"{declared}."), name
