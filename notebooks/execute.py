"""Execute the notebooks and compare their text with what is committed, or write it.

    python notebooks/execute.py                     # check all of them
    python notebooks/execute.py --write 01_the_shadow.ipynb

The kernel is the interpreter that runs this script. Pictures are drawn, not compared;
numbers may differ by float32 rounding.
"""

import argparse
import copy
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNEL = "this-interpreter"
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
# Signed, with a fraction or an exponent: steps and sizes must be equal to the digit.
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+(?:e[-+]?\d+)?|\.?e[-+]?\d+)")
# What Orbax logs of a machine that is slow at the moment, and not of the notebook.
SLOW_DISK = "Waiting for previous save to complete took"
RELATIVE_TOLERANCE = 1e-5  # float32 on another processor; the last printed digit


def main(arguments: Sequence[str] | None = None) -> int:
    """Executes the notebooks named on the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the outputs")
    parser.add_argument("notebook", nargs="*", help="file names; all by default")
    options = parser.parse_args(arguments)
    paths = [HERE / Path(name).name for name in options.notebook]
    failures = []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(scratch)
        for path in paths or sorted(HERE.glob("*.ipynb")):
            failures += handle(path, write=options.write)
    print("\n".join(failures) or "The notebooks run and say what they said.")
    return 1 if failures else 0


def prepare(scratch: str) -> None:
    """Points Jupyter at a folder of its own, with this interpreter as its kernel."""
    os.environ |= {
        "IPYTHONDIR": scratch,
        "JUPYTER_CONFIG_DIR": scratch,
        "JUPYTER_DATA_DIR": scratch,
        "JUPYTER_RUNTIME_DIR": scratch,
        "JUPYTER_PLATFORM_DIRS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    os.environ.pop("MPLBACKEND", None)

    import matplotlib.font_manager  # noqa: F401 - builds its cache, before the cells
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(
        Path(scratch, "kernels", KERNEL),
        # Quiet about talking over this machine's own loopback.
        extra_arguments=["--log-level=ERROR"],
    )


def handle(path: Path, *, write: bool) -> list[str]:
    """Executes one notebook; writes it, or returns how it differs from the file."""
    import nbformat
    from nbclient.exceptions import CellExecutionError

    committed = nbformat.read(path, as_version=4)
    try:
        executed = execute(committed)
    except CellExecutionError as error:
        return [f"{path.name}: a cell raises\n{error}"]
    failures = warnings_in(path.name, executed)
    if failures:
        return failures
    if write:
        nbformat.write(executed, path)
        return []
    if committed.metadata != executed.metadata:
        failures.append(f"{path.name}: the metadata are not those of --write")
    cells = zip(committed.cells, executed.cells, strict=True)
    for number, (old, new) in enumerate(cells, start=1):
        if old.metadata != new.metadata:
            failures.append(f"{path.name}, cell {number}: unexpected cell metadata")
        if old.cell_type != "code":
            continue
        if old.execution_count != new.execution_count:
            failures.append(
                f"{path.name}, cell {number}: not run in order from the top"
            )
        before, after = text_of(old.outputs), text_of(new.outputs)
        if not same_text(before, after):
            failures.append(
                f"{path.name}, cell {number}: the output changed; --write accepts it"
                f"\n--- committed\n{before}\n--- now\n{after}"
            )
    return failures


def execute(notebook):
    """Returns a copy of a notebook with fresh outputs and nothing about the machine."""
    from nbclient import NotebookClient

    notebook = copy.deepcopy(notebook)
    NotebookClient(
        notebook,
        kernel_name=KERNEL,
        resources={"metadata": {"path": os.environ["JUPYTER_RUNTIME_DIR"]}},
        timeout=300,
        record_timing=False,
    ).execute()
    notebook.metadata = type(notebook.metadata)(METADATA)
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = without_slow_disk(cell.outputs)
    return notebook


def without_slow_disk(outputs) -> list:
    """Returns the outputs of a cell without the lines that only tell of a slow disk."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr":
            lines = output.text.splitlines(keepends=True)
            output.text = "".join(line for line in lines if SLOW_DISK not in line)
            if not output.text.strip():
                continue
        kept.append(output)
    return kept


def warnings_in(name: str, notebook) -> list[str]:
    """Returns what the cells wrote to stderr, which a clean notebook does not."""
    return [
        f"{name}, cell {number} warns:\n{output.text}"
        for number, cell in enumerate(notebook.cells, start=1)
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]


def text_of(outputs) -> str:
    """Returns what a cell printed, and one line for each picture."""
    parts = []
    for output in outputs:
        if output.output_type == "stream":
            parts.append(output.text)
            continue
        data = output.get("data", {})
        pictured = any(kind.startswith("image/") for kind in data)
        parts.append("<picture>\n" if pictured else data.get("text/plain", "") + "\n")
    return "".join(parts)


def same_text(before: str, after: str) -> bool:
    """Returns whether two texts are equal but for rounding in their numbers."""
    if NUMBER.sub("#", before).split() != NUMBER.sub("#", after).split():
        return False
    pairs = zip(NUMBER.findall(before), NUMBER.findall(after), strict=True)
    return all(
        math.isclose(float(a), float(b), rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-6)
        for a, b in pairs
    )


if __name__ == "__main__":
    sys.exit(main())
