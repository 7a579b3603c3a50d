"""The structure of the package: who imports whom, what is public, what import loads."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ema_optax

PACKAGE = pathlib.Path(ema_optax.__file__).parent

# Each module, and what it may import of ours.
HOUSE = {
    "families": set(),
    "decays": {"families"},
    "profiles": {"decays"},
    "trees": set(),
    "selection": set(),
    "storage": set(),
    "states": {"families"},
    "averaging": {"families", "decays", "selection", "states", "storage", "trees"},
    "shadows": {"states", "trees"},
    "plots": set(),
    "demo": {"averaging", "shadows", "plots"},
    "cli": {"demo"},
    "__main__": {"cli"},
}


def _imported(path):
    """Returns the modules of ours that a file imports, and the others."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module == "ema_optax":
                ours |= {alias.name for alias in node.names}
            elif module.startswith("ema_optax."):
                ours.add(module.removeprefix("ema_optax."))
            else:
                others.add(module)
    return ours, others


def test_every_module_has_its_place():
    """A new file must be written into the house."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files == set(HOUSE)


@pytest.mark.parametrize("module", HOUSE)
def test_imports_run_one_way(module):
    """A module imports only what the house allows, and nobody's private parts."""
    ours, others = _imported(PACKAGE / f"{module}.py")
    assert ours - {"__version__"} <= HOUSE[module]
    assert not [name for name in others if "_src" in name]


def test_the_house_has_no_cycles():
    """Removing modules whose imports are all gone empties the house."""
    left = dict(HOUSE)
    while left:
        free = [name for name, uses in left.items() if not uses & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


def test_every_file_states_its_responsibility_in_one_line():
    """The first line of a module is a docstring that says what it is for."""
    for path in PACKAGE.glob("*.py"):
        first = path.read_text().splitlines()[0]
        assert first.startswith('"""'), path.name
        assert len(first) > 15, path.name


def test_all_is_the_namespace():
    """__all__ is sorted and holds every public name that is no module."""
    names = {
        name
        for name, value in vars(ema_optax).items()
        if not name.startswith("_") and not isinstance(value, type(ast))
    }
    assert list(ema_optax.__all__) == sorted(ema_optax.__all__)
    assert names == set(ema_optax.__all__)


def test_import_is_light():
    """It loads jax, optax and numpy, and none of the heavy extras."""
    code = (
        "import sys, jax, optax, numpy; before = set(sys.modules); import ema_optax;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {"ema_optax", *sys.stdlib_module_names}
