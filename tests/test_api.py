"""The public names and signatures, frozen in a table; their examples.

After a change that is meant, `python -m tests.test_api > tests/public_api.txt`, and
read the diff as the users of the last release will.
"""

import ast
import difflib
import importlib
import inspect
import pathlib
import textwrap

import pytest

HERE = pathlib.Path(__file__).parent
TABLE = HERE / "public_api.txt"
MODULES = (
    "ema_optax",
    "ema_optax.checkpoint",
    "ema_optax.digits",
    "ema_optax.interop",
    "ema_optax.placement",
    "ema_optax.plots",
    "ema_optax.reconstruction",
)

# Public names without an example of their own, and why.
WITHOUT_EXAMPLE = {
    "ema_optax.reconstruction.Soup": "returned by soup, whose example reads it",
    "ema_optax.checkpoint.ForeignTree": "made by stored_by_others",
    "ema_optax.interop.TensorTree": "made by stored_safetensors",
    "ema_optax.BemaParamsState": "made by bema_params, whose example reads it",
    "ema_optax.Diagnosis": "returned by diagnose, whose example prints it",
    "ema_optax.EmaParamsState": "made by ema_params, whose example reads it",
    "ema_optax.Finding": "part of what diagnose returns",
    "ema_optax.NamedShadowsState": "made by ema_params, read by name",
    "ema_optax.RingState": "made by ring, whose example reads it",
    "ema_optax.Profile": "returned by profile, whose example reads it",
    "ema_optax.checkpoint.Changes": "returned by resume, as `changes`",
    "ema_optax.digits.Digits": "returned by load, whose example reads it",
    "ema_optax.checkpoint.Adopted": "returned by adopt, whose example reads it",
    "ema_optax.checkpoint.CorruptCheckpointError": "an error",
    "ema_optax.checkpoint.Description": "returned by describe",
    "ema_optax.checkpoint.EmaCheckpointableHandler": "called by Orbax alone",
    "ema_optax.checkpoint.Leaf": "part of what describe returns",
    "ema_optax.checkpoint.Resumed": "returned by resume, whose example unpacks it",
    "ema_optax.checkpoint.StoredTree": "returned by stored",
    "ema_optax.checkpoint.Tree": "part of what describe returns",
    "ema_optax.interop.Tensor": "returned by export_safetensors, as `tensors`",
    "ema_optax.interop.Exported": "returned by export_safetensors",
    "ema_optax.interop.Imported": "returned by import_tensorflow",
    "ema_optax.interop.ImportedLeaf": "part of what import_torch returns",
    "ema_optax.interop.ImportedTorch": "returned by import_torch",
    "ema_optax.interop.Move": "made by Rules, whose example reads it",
    "ema_optax.interop.import_tensorflow": "needs TensorFlow, which few have installed",
    "ema_optax.interop.KerasAverage": "returned by keras_average",
    "ema_optax.interop.keras_average": "needs Keras, as the next three do",
    "ema_optax.interop.keras_split": "its example is no doctest: it needs Keras",
    "ema_optax.interop.keras_swapped": "its example is no doctest: it needs Keras",
    "ema_optax.interop.keras_update": "its example is no doctest: it needs Keras",
    "ema_optax.reconstruction.Choice": "returned by choose, whose example reads it",
    "ema_optax.reconstruction.EvaluationWarning": "a warning",
    "ema_optax.reconstruction.Plan": "returned by plan, whose example prints it",
    "ema_optax.reconstruction.Point": "part of what choose returns",
    "ema_optax.reconstruction.Reconstruction": "returned by reconstruct",
    "ema_optax.reconstruction.ReconstructionWarning": "a warning",
    "ema_optax.reconstruction.Source": "abstract; StoredTree is the one that reads",
}


def public():
    """Yields each public name in full, and what it is."""
    for module in MODULES:
        room = importlib.import_module(module)
        for name in room.__all__:
            yield f"{module}.{name}", getattr(room, name)


def signature(name, thing):
    """Returns lines that state how something is called, as its source has it.

    From the source, because the annotations that `inspect` gives name whichever module
    of JAX defines a class today. Of a class: its bases, fields and public methods.
    """
    [node] = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    _put_in_constants(node, inspect.getmodule(thing))
    if isinstance(node, ast.FunctionDef):
        return [_function(name, node)]
    lines = [f"class {name}({', '.join(map(ast.unparse, node.bases))})"]
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and not _name(part).startswith("_"):
            lines.append(f"    {ast.unparse(part)}")
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) and (
            part.name in ("__init__", "__call__") or not part.name.startswith("_")
        ):
            marks = "".join(f"@{ast.unparse(m)} " for m in part.decorator_list)
            lines.append(f"    {marks}{_function(part.name, part)}")
    return lines


def _put_in_constants(node, module):
    """Replaces defaults that have a name by their values, which are what users get."""

    def value(default):
        if not isinstance(default, ast.Name):
            return default
        return ast.parse(repr(getattr(module, default.id))).body[0].value

    for part in ast.walk(node):
        if isinstance(part, ast.arguments):
            part.defaults = [value(x) for x in part.defaults]
            part.kw_defaults = [x and value(x) for x in part.kw_defaults]
        elif isinstance(part, ast.AnnAssign):
            part.value = part.value and value(part.value)


def _name(node):
    return ast.unparse(node.target)


def _function(name, node):
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def table():
    return [line for name, thing in public() for line in signature(name, thing)]


def test_public_names_and_signatures_are_those_of_the_table():
    """Whoever changes what users call changes `public_api.txt` too, on purpose."""
    frozen, now = TABLE.read_text().splitlines(), table()
    diff = difflib.unified_diff(frozen, now, str(TABLE), "the package", lineterm="")
    assert frozen == now, "\n".join(["The public API changed:", *diff])


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted_and_holds_what_is_there(module):
    room = importlib.import_module(module)
    assert list(room.__all__) == sorted(set(room.__all__))
    if hasattr(room, "__path__"):  # a package: what it imports is what it offers
        names = {
            name
            for name, value in vars(room).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        }
        assert names == set(room.__all__)


@pytest.mark.parametrize("name", [name for name, _ in public()])
def test_every_public_name_is_documented_with_an_example(name):
    """One line first; and an example that the doctests run, or a reason above."""
    thing = dict(public())[name]
    text = inspect.cleandoc(thing.__doc__)
    assert text.splitlines()[0].endswith((".", ":"))
    assert (">>>" in text) != (name in WITHOUT_EXAMPLE)


def test_the_reasons_are_for_names_that_are_there():
    assert set(WITHOUT_EXAMPLE) <= {name for name, _ in public()}


if __name__ == "__main__":
    print("\n".join(table()))
