"""The structure of the package: who imports whom, what is public, what import loads."""

import ast
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import ema_optax
from ema_optax._messages import extras

DOOR = pathlib.Path(ema_optax.__file__)
PACKAGE = DOOR.parent
ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
EXAMPLES, NOTEBOOKS = ROOT / "examples", ROOT / "notebooks"

# The public modules, and the private room whose names each shows.
FACES = {
    "checkpoint": "_checkpoint",
    "digits": "_demo",
    "interop": "_interop",
    "keras": "_interop",
    "linen": "_interop",
    "nnx": "_interop",
    "placement": "_placement",
    "plots": "_plots",
    "reconstruction": "_reconstruction",
    "safetensors": "_interop",
    "tensorflow": "_interop",
    "torch": "_interop",
}
# What each room may import, and imports nothing of ours.
EVERYWHERE = {"_messages", "_version"}
# Each private room, and what else it may import of ours.
HOUSE = {
    **{name: set() for name in sorted(EVERYWHERE)},
    "_trees": set(),
    "_decays": set(),
    "_placement": {"_trees"},
    "_averages": {"_decays", "_placement", "_trees"},
    "_reconstruction": {"_decays", "_placement", "_trees"},
    "_checkpoint": {"_averages", "_decays", "_placement", "_trees", "reconstruction"},
    "_diagnosis": {"_averages", "_decays", "_reconstruction", "_trees"},
    "_interop": {
        "_averages",
        "_checkpoint",
        "_decays",
        "_trees",
        "checkpoint",
        "reconstruction",
    },
    "_plots": {"_decays", "_reconstruction", "reconstruction"},
    "_demo": {"_averages", "_decays", "checkpoint", "plots", "reconstruction"},
    "_cli": {
        "_averages",
        "_checkpoint",
        "_decays",
        "_demo",
        "_diagnosis",
        "_interop",
        "_reconstruction",
        "_trees",
        "checkpoint",
        "interop",
        "plots",
        "reconstruction",
        "safetensors",
        "tensorflow",
        "torch",
    },
    "__main__": {"_cli"},
}

# The same inside the rooms: each file, and what it may import of its neighbours.
ROOMS = {
    "_messages": {
        "arguments": {"text"},
        "disk": set(),
        "extras": set(),
        "layout_names": set(),
        "progress": {"arguments", "extras"},
        "text": set(),
    },
    "_trees": {
        "locating": {"trees"},
        "mistaken": {"locating", "trees"},
        "naming": set(),
        "renaming": set(),
        "selection": set(),
        "trees": set(),
    },
    "_decays": {
        "decay": set(),
        "decays": {"decay", "power_profiles", "schedule"},
        "derived_decays": {"decay", "decays", "windows"},
        "power_profiles": set(),
        "profiles": {"decays"},
        "schedule": {"decay"},
        "windows": {"decay"},
    },
    "_placement": {
        "leaf_placement": {"memories", "set_mesh"},
        "memories": set(),
        "rules": {"leaf_placement"},
        "set_mesh": set(),
        "transfers": {"leaf_placement"},
    },
    "_averages": {
        "average": {"states"},
        "averages": {"average", "bema", "order", "packing", "rings", "states"},
        "averaging": {"fold", "overwriting", "packing", "states", "update"},
        "bema": {"average", "fold", "states", "update"},
        "due": set(),
        "fold": set(),
        "monitoring": {"average", "averages"},
        "order": set(),
        "overwriting": set(),
        "packing": set(),
        "rings": {"average", "due", "states", "update"},
        "shadows": {"averages"},
        "starting": {"average", "averages"},
        "states": set(),
        "update": {"due", "fold", "packing"},
    },
    "_reconstruction": {
        "axes": {
            "extrapolation",
            "ingredients",
            "projection",
            "schedules",
            "searching",
            "weights",
            "widths",
        },
        "choice_log": {"scores", "searching"},
        "choices": {"scores", "searching", "weights"},
        "choosing": {"axes", "choices", "ingredients", "searching", "trials", "widths"},
        "extrapolation": set(),
        "ingredients": {"merging", "slots", "sums", "widths"},
        "merging": {"schedules", "slots", "sums"},
        "planning": {"projection", "weights", "widths"},
        "projection": set(),
        "schedules": {"weights"},
        "scores": set(),
        "searching": {"scores"},
        "slots": {"sums"},
        "souping": {"merging", "scores", "slots", "sums", "weights"},
        "sums": set(),
        "trials": {"choice_log", "choices", "ingredients", "scores", "searching"},
        "weights": set(),
        "widths": {"projection", "slots", "sums", "weights"},
    },
    "_checkpoint": {
        "adopted_arrays": {"foreign", "layouts", "pairing"},
        "adopting": {
            "adopted_arrays",
            "directory",
            "foreign",
            "foreign_steps",
            "layouts",
            "pairing",
            "paths",
            "steps",
        },
        "background": {"processes"},
        "changed_run": {
            "changes",
            "kept_averages",
            "kept_state",
            "leaves",
            "manifest",
            "restoring",
            "same_averages",
            "slots",
            "stored_names",
            "taking",
        },
        "changes": set(),
        "checksums": {"pieces"},
        "counts": {"entries", "errors", "leaves", "manifest", "rescue", "steps"},
        "directory": {
            "background",
            "entries",
            "errors",
            "handlers",
            "manifest",
            "paths",
            "processes",
            "rescue",
            "shadows",
            "step",
            "steps",
            "storage",
        },
        "entries": {"errors", "untrusted"},
        "errors": set(),
        "exact_run": {
            "leaves",
            "manifest",
            "restoring",
            "same_averages",
            "slots",
            "state_nodes",
            "stored_names",
            "targets",
        },
        "foreign": {"entries", "errors", "untrusted"},
        "foreign_arrays": {"errors", "foreign", "opening", "storage", "untrusted"},
        "foreign_msgpack": {"errors", "foreign", "untrusted"},
        "foreign_orbax": {"errors", "foreign", "storage", "untrusted"},
        "foreign_sources": {"foreign", "foreign_steps", "pairing"},
        "foreign_steps": {
            "foreign",
            "foreign_arrays",
            "foreign_msgpack",
            "foreign_orbax",
            "paths",
            "steps",
            "storage",
        },
        "handlers": {
            "changed_run",
            "errors",
            "exact_run",
            "manifest",
            "paths",
            "rescue",
            "restoring",
            "saving",
            "step",
            "storage",
            "stored_names",
        },
        "host_arrays": set(),
        "kept_averages": {
            "leaves",
            "manifest",
            "same_averages",
            "slots",
            "state_nodes",
            "stored_names",
            "taking",
            "targets",
        },
        "kept_state": {
            "entries",
            "kept_averages",
            "leaves",
            "manifest",
            "slots",
            "state_nodes",
            "step",
            "stored_names",
            "taking",
        },
        "layouts": {"foreign"},
        "leaves": {
            "checksums",
            "entries",
            "errors",
            "manifest",
            "opening",
            "pieces",
            "processes",
            "targets",
            "untrusted",
        },
        "manifest": {"entries", "errors", "pieces", "sealed", "storage", "untrusted"},
        "opening": {"entries", "manifest"},
        "pairing": {"foreign", "layouts"},
        "paths": {"storage"},
        "pieces": {"entries", "errors", "untrusted"},
        "processes": {"errors"},
        "rescue": {"errors", "leaves", "processes", "restoring", "steps"},
        "restoring": {"entries", "leaves", "manifest", "processes", "step", "targets"},
        "resuming": {"changes", "handlers", "steps"},
        "retention": set(),
        "same_averages": {"entries", "manifest", "shadows"},
        "saving": {
            "background",
            "checksums",
            "host_arrays",
            "manifest",
            "paths",
            "processes",
            "step",
        },
        "sealed": {"errors", "untrusted"},
        "shadows": {"entries", "manifest"},
        "slots": {"manifest", "restoring", "step"},
        "snapshots": {
            "errors",
            "leaves",
            "manifest",
            "paths",
            "rescue",
            "sources",
            "steps",
            "storage",
        },
        "sources": {
            "checksums",
            "errors",
            "leaves",
            "manifest",
            "rescue",
            "restoring",
            "steps",
        },
        "state_nodes": {"entries"},
        "step": {"checksums", "entries", "manifest", "shadows", "untrusted"},
        "steps": {"manifest", "paths", "processes", "storage"},
        "storage": set(),
        "stored_names": {"manifest", "restoring", "state_nodes"},
        "taking": {
            "changes",
            "checksums",
            "entries",
            "leaves",
            "manifest",
            "restoring",
            "targets",
        },
        "targets": {"checksums", "entries", "pieces"},
        "untrusted": {"storage"},
    },
    "_diagnosis": {
        "diagnosing": {"findings", "leaf_pairs", "line", "records"},
        "findings": set(),
        "leaf_pairs": {"findings", "records"},
        "lengths": set(),
        "line": {"findings", "leaf_pairs", "records"},
        "records": {"findings", "lengths"},
    },
    "_interop": {
        "appearing": set(),
        "batch_stats": set(),
        "export_plan": {"appearing", "flat_names", "moves", "rule", "rules"},
        "export_writing": {"appearing", "export_plan", "moves"},
        "flat_names": set(),
        "keras_models": set(),
        "litema_names": {"torch_files"},
        "moves": set(),
        "nnx_modules": {"batch_stats"},
        "patterns": set(),
        "rule": {"patterns"},
        "rule_fits": {"moves", "patterns", "rule"},
        "rules": {"moves", "rule", "rule_fits"},
        "safetensors_files": {
            "appearing",
            "export_plan",
            "export_writing",
            "moves",
            "rule",
            "rules",
        },
        "safetensors_sources": {"flat_names", "torch_files", "torch_folders"},
        "tensorflow_checkpoints": {"tensorflow_names"},
        "tensorflow_names": set(),
        "torch_decays": {"litema_names", "torch_files"},
        "torch_files": set(),
        "torch_finding": {"torch_files", "torch_layouts"},
        "torch_folders": {"torch_files"},
        "torch_import": {
            "moves",
            "rule",
            "rules",
            "torch_files",
            "torch_finding",
            "torch_folders",
            "torch_numbers",
            "torch_weights",
        },
        "torch_layouts": {"litema_names", "torch_decays", "torch_files"},
        "torch_numbers": {"torch_files", "torch_weights"},
        "torch_weights": {"torch_files", "torch_finding", "torch_layouts"},
    },
    "_plots": {
        "choices": {"style"},
        "lag": {"style"},
        "profiles": {"style"},
        "runs": {"style"},
        "style": set(),
        "widths": {"style"},
    },
    "_demo": {
        "afterwards": {"digits"},
        "demo": {"afterwards", "digits"},
        "digits": set(),
    },
    "_cli": {
        "adopt": {"options", "parsing", "tables"},
        "average_files": {"averages", "output_folders"},
        "averages": {"parsing"},
        "choose": {
            "decay_text",
            "evaluations",
            "options",
            "output_folders",
            "parsing",
            "warning_lines",
            "wide",
        },
        "completion": {"parsing"},
        "decay_text": set(),
        "demo": {"options", "parsing"},
        "description": {"parsing", "tables"},
        "evaluations": set(),
        "explain": set(),
        "export": {"options", "parsing", "tables"},
        "import_tf": {"options", "parsing", "tables"},
        "import_torch": {"options", "parsing", "tables"},
        "inspect": {"description", "explain", "options", "parsing"},
        "interrupts": set(),
        "merge": {
            "merge_schedules",
            "merge_sources",
            "options",
            "output_folders",
            "parsing",
            "wide",
        },
        "merge_schedules": {"decay_text", "parsing"},
        "merge_sources": set(),
        "options": {"decay_text", "parsing"},
        "output_folders": set(),
        "parsing": set(),
        "profile": {"decay_text", "options", "parsing", "sketch"},
        "reconstruct": {
            "average_files",
            "averages",
            "options",
            "parsing",
            "warning_lines",
            "wide",
        },
        "sketch": set(),
        "tables": set(),
        "warning_lines": {"parsing"},
        "wide": set(),
    },
}
# Files that other rooms may import too; of the others, only what a public module shows.
OPEN = {
    "_messages": {"arguments", "disk", "extras", "layout_names", "progress", "text"},
    "_trees": {
        "locating",
        "mistaken",
        "naming",
        "renaming",
        "selection",
        "trees",
    },
    "_decays": {"decay", "decays", "derived_decays", "power_profiles", "profiles"},
    "_placement": {"leaf_placement", "transfers"},
    "_averages": {"average", "averages", "averaging", "bema", "shadows", "states"},
    "_reconstruction": {"projection", "schedules", "scores"},
    "_checkpoint": {"counts", "foreign_steps", "paths", "steps", "storage"},
    "_diagnosis": {"findings", "leaf_pairs", "records"},
    "_interop": {"safetensors_sources"},
    "_demo": {"demo"},
}

# Rooms that a function loads by name when it is called, against the order of imports:
# a run is opened by the room that builds on what opens it.
BY_NAME = {"_reconstruction": {"checkpoint"}}
LOADER = "importlib.import_module"

LONGEST = 400  # lines of a file

# What a named tuple calls its own, so that no field is called the same.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


ANY = 0.12  # of annotated arguments

# Where packages and the modules in them have different names.
PACKAGES = {"orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


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
    """A new file must be written into the house; what is private says so."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert files | folders == {*HOUSE, *FACES}
    assert all(name.startswith("_") for name in HOUSE)


@pytest.mark.parametrize("face", FACES)
def test_public_modules_show_names_of_one_room(face):
    """They are read to see what is public: imports and a sorted `__all__`, no more."""
    ours, others = _imported(face)
    assert (ours, others) == ({FACES[face]}, set())
    docstring, *statements = ast.parse(_files(face)[0].read_text()).body
    assert isinstance(docstring, ast.Expr)
    *imports, listed = statements
    assert {type(node) for node in imports} == {ast.ImportFrom}
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    assert ast.literal_eval(listed.value) == sorted(names)


@pytest.mark.parametrize("module", HOUSE)
def test_imports_run_one_way(module):
    """A module imports only what the house allows, and nobody's private parts."""
    ours, _ = _imported(module)
    free = set() if module in EVERYWHERE else EVERYWHERE
    assert ours - {"__version__"} <= HOUSE[module] | free


def _loaded_by_name(path):
    """Yields the rooms of ours that a file loads with `import_module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == LOADER:
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield name.value.split(".")[1]


def test_rooms_loaded_by_name_are_in_the_table():
    """What an import statement does not show is written down too."""
    found = {
        module: {room for path in _files(module) for room in _loaded_by_name(path)}
        for module in HOUSE
    }
    assert {module: rooms for module, rooms in found.items() if rooms} == BY_NAME


def _rooms_of(path):
    """Yields the room and the file of each import that names a file of a room."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        top, room, *inside = [*node.module.split("."), None][:3]
        if top == "ema_optax" and room in ROOMS:
            names = [a.name for a in node.names] if inside == [None] else inside
            yield from ((room, name) for name in names if name in _names(room))


def _names(room):
    return {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way_inside(room):
    """Each file of a folder has its place in the table, and keeps to it."""
    table = ROOMS[room]
    assert set(table) == _names(room)
    for name, allowed in table.items():
        path = PACKAGE / room / f"{name}.py"
        assert {file for where, file in _rooms_of(path) if where == room} <= allowed
    _check_no_cycle(table)


def test_rooms_are_entered_by_the_door():
    """From other rooms, by its public module, or what is open in it."""
    for path in PACKAGE.rglob("*.py"):
        for room, name in _rooms_of(path):
            own = room in (path.parent.name, FACES.get(path.stem)) or path == DOOR
            assert own or name in OPEN.get(room, ()), f"{path.name}: {room}.{name}"


def _private(name):
    return name.startswith("_") and not name.endswith("__")


def _own_names(tree):
    """Returns the names that a file defines: functions, classes, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in ("self", "cls") else []


def _touched(tree):
    """Returns the private names that a file has from others."""
    own = {*_own_names(tree), *OF_NAMED_TUPLES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            if ast.unparse(node.value) not in ("self", "cls") and node.attr not in own:
                yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            for name in [*names, getattr(node, "module", None) or ""]:
                first, *parts = name.split(".")
                rooms = HOUSE if first == "ema_optax" else ()
                private = filter(_private, [first, *parts])
                yield from (part for part in private if part not in rooms)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from jax._src import core", ["_src"]),
        ("import jax._src.core", ["_src"]),
        ("from ema_optax._trees.trees import _names", ["_names"]),
        ("from ema_optax._trees import trees", []),
        ("from others._trees import trees", ["_trees"]),
        ("parser._actions", ["_actions"]),
        ("self._own; cls._own; state._replace(count=1); x.__class__", []),
        ("class A:\n  def _f(self): ...\ndef g(a): a._f()", []),
        ("def g(a): a._f()", ["_f"]),
        ("self._x = 1; other._x", []),
    ],
)
def test_touched(code, names):
    """What the next test finds, and what it leaves alone."""
    assert list(_touched(ast.parse(code))) == names


def test_nobody_touches_private_names_of_others():
    """Of JAX, of the standard library or of another file of ours."""
    for path in PACKAGE.rglob("*.py"):
        names = set(_touched(ast.parse(path.read_text())))
        assert not names, path.name


@pytest.mark.skipif(not EXAMPLES.exists(), reason="they travel with the source")
def test_examples_and_notebooks_use_what_is_public():
    """A reader copies them."""
    for path in (*EXAMPLES.glob("*.py"), *NOTEBOOKS.glob("*.ipynb")):
        assert not re.search(r"ema_optax(\.\w+)*(\.| import )_[a-z]", path.read_text())


def test_no_file_is_too_long():
    """A file that is has two responsibilities."""
    lines = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert not [name for name, count in lines.items() if count > LONGEST]


def test_arguments_have_types():
    """Few are `Any`, which says nothing to a reader and checks nothing."""
    types = [
        ast.unparse(node.annotation)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.arg) and node.annotation is not None
    ]
    assert types.count("Any") / len(types) <= ANY


def test_what_is_imported_is_declared():
    """In pyproject.toml, among the dependencies or in the extra that errors name."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    declared = {
        extra: {re.match(r"[\w-]+", line)[0] for line in lines}
        for extra, lines in {
            None: project["dependencies"],
            **project["optional-dependencies"],
        }.items()
    }
    where = dict.fromkeys(extras.REQUIRED) | extras.EXTRAS
    imported = set(itertools.chain(*(_imported(module)[1] for module in HOUSE)))
    modules = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert modules - {"ema_optax"} == set(where)
    for module, extra in where.items():
        assert PACKAGES.get(module, module) in declared[extra], module


@pytest.mark.parametrize("module", sorted(set(HOUSE) - {"_checkpoint"}))
def test_only_checkpoint_imports_orbax(module):
    """Orbax changes often: one folder knows its ways."""
    _, others = _imported(module)
    assert not [name for name in others if name.partition(".")[0] == "orbax"]


def test_the_house_has_no_cycles():
    """Removing rooms whose imports are all gone empties the house."""
    rooms = {
        room: {FACES.get(name, name) for name in used} for room, used in HOUSE.items()
    }
    _check_no_cycle(rooms)


def _check_no_cycle(table):
    left = dict(table)
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
