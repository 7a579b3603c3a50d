"""The committed notebooks run, and say what they said."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SCRIPT = FOLDER / "execute.py"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What a notebook needs beyond ema-optax[dev]; a stage of .ci/run has it.
NEEDS = {"05_from_pytorch_and_back": ("einops", "safetensors", "torch")}

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists()
    or any(importlib.util.find_spec(m) is None for m in ("nbclient", "ipykernel")),
    reason="needs the notebooks folder and pip install 'ema-optax[dev]'",
)


@pytest.mark.once
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_says_what_it_said(notebook):
    """Every cell runs without a warning, and its text is the committed text."""
    for module in NEEDS.get(notebook.stem, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}; a stage of .ci/run has it")
    # In a process of its own: Jupyter's event loops and sockets warn in this one.
    done = subprocess.run(
        [sys.executable, SCRIPT, notebook.name],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_nothing_about_the_machine(notebook):
    """No paths and no times: only code, words, numbers and pictures are committed."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["metadata"]["language_info"] == {"name": "python"}
    for cell in content["cells"]:
        assert cell["metadata"] == {}
        for output in cell.get("outputs", []):
            pictures = output.pop("data", {})
            text = json.dumps([output, pictures.get("text/plain")])
            assert not re.search(r"/(home|root|tmp|usr|Users|var)/|[A-Z]:\\", text)


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_the_comparison_forgives_rounding_only(script):
    """float32 may round elsewhere; a step, a word or a digit more is a difference."""
    assert script.same_text("fold 4: 1.730845\n", "fold 4:  1.730846\n")
    assert not script.same_text("fold 4: 1.730845", "fold 4: 1.731")
    assert not script.same_text("fold 4: 1.730845", "fold 5: 1.730845")
    assert not script.same_text("fold 4: 1.730845", "step 4: 1.730845")
    assert not script.same_text("", "fold 4: 1.730845")


def test_a_slow_disk_is_no_warning_of_the_notebook(script):
    """Orbax's line on a wait is dropped; another line of the same output stays."""
    nbformat = pytest.importorskip("nbformat")
    slow = f"WARNING:absl:{script.SLOW_DISK} 1.965476 seconds. If this is high\n\n"

    def outputs(*texts):
        new = nbformat.v4.new_output
        return [new("stream", name="stderr", text=text) for text in texts]

    assert script.without_slow_disk(outputs(slow, slow * 2)) == []
    (kept,) = script.without_slow_disk(outputs(slow + "UserWarning: x\n"))
    assert "UserWarning" in kept.text
    assert script.SLOW_DISK not in kept.text
    printed = nbformat.v4.new_output("stream", name="stdout", text=slow)
    assert script.without_slow_disk([printed]) == [printed]


@pytest.mark.once
def test_a_changed_output_and_a_raising_cell_fail(script, tmp_path):
    """The check fails where it should: a copy of the script beside bad notebooks."""
    nbformat = pytest.importorskip("nbformat")
    for name, source in [("changed", "print('now')"), ("raises", "1 / 0")]:
        cell = nbformat.v4.new_code_cell(
            source,
            id="one",
            execution_count=1,
            outputs=[nbformat.v4.new_output("stream", name="stdout", text="then\n")],
        )
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata=script.METADATA)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    copied = tmp_path / SCRIPT.name
    copied.write_bytes(SCRIPT.read_bytes())
    done = subprocess.run(
        [sys.executable, copied], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "changed.ipynb, cell 1: the output changed" in done.stdout
    assert "raises.ipynb: a cell raises" in done.stdout
