"""The structure of the package: who imports whom, what is public, what import loads."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ema_optax

PACKAGE = pathlib.Path(ema_optax.__file__).parent

# Each module or folder, and what it may import of ours.
HOUSE = {
    "families": set(),
    "decays": {"families"},
    "profiles": {"decays"},
    "trees": set(),
    "selection": set(),
    "fold": {"trees"},
    "placement": {"trees"},
    "states": {"families", "packing", "placement"},
    "packing": {"trees"},
    "update": {"fold", "packing", "placement", "trees"},
    "averaging": {
        "families",
        "decays",
        "fold",
        "packing",
        "placement",
        "selection",
        "states",
        "trees",
        "update",
    },
    "bema": {"fold", "selection", "states", "trees", "update"},
    "shadows": {"bema", "placement", "states", "trees"},
    "monitoring": {"families", "shadows", "states", "trees"},
    "version": set(),
    "reconstruction": {"decays", "selection", "trees"},
    "checkpoint": {
        "bema",
        "families",
        "reconstruction",
        "shadows",
        "states",
        "trees",
        "version",
    },
    "interop": {"checkpoint", "families", "shadows", "trees", "version"},
    "plots": {"decays", "profiles"},
    "digits": {"averaging", "shadows"},
    "demo": {"checkpoint", "digits", "plots", "shadows"},
    "cli": {
        "checkpoint",
        "decays",
        "demo",
        "families",
        "interop",
        "plots",
        "profiles",
        "reconstruction",
        "trees",
    },
    "__main__": {"cli"},
}


def _files(module):
    """Returns the files of a module: one, or those of its folder."""
    folder = PACKAGE / module
    return (
        sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]
    )


def _imported(module):
    """Returns the modules of ours that a module imports, and the others."""
    ours, others = set(), set()
    nodes = [
        n for path in _files(module) for n in ast.walk(ast.parse(path.read_text()))
    ]
    for node in nodes:
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if name == "ema_optax":
                ours |= {alias.name for alias in node.names}
            elif name.startswith("ema_optax."):
                ours.add(name.split(".")[1])
            else:
                others.add(name)
    return ours - {module}, others


def test_every_module_has_its_place():
    """A new file must be written into the house."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert files | folders == set(HOUSE)


@pytest.mark.parametrize("module", HOUSE)
def test_imports_run_one_way(module):
    """A module imports only what the house allows, and nobody's private parts."""
    ours, others = _imported(module)
    assert ours - {"__version__"} <= HOUSE[module]
    assert not [name for name in others if "_src" in name]


@pytest.mark.parametrize("module", sorted(set(HOUSE) - {"checkpoint"}))
def test_only_checkpoint_imports_orbax(module):
    """Orbax changes often: one folder knows its ways."""
    _, others = _imported(module)
    assert not [name for name in others if name.partition(".")[0] == "orbax"]


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
    for path in PACKAGE.rglob("*.py"):
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


def test_rooms_that_load_on_first_use():
    """They are there without an import of their own; a missing extra is named."""
    assert ema_optax.checkpoint.save
    with pytest.raises(AttributeError, match="no attribute 'chekpoint'"):
        ema_optax.chekpoint  # noqa: B018 the access is the test
    code = (
        "import sys; sys.modules['matplotlib'] = None; import ema_optax\n"
        "try: ema_optax.plots\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'ema-optax[plots]'" in done.stdout
