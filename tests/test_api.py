"""The public names and signatures, frozen in a table; their examples.

After a change that is meant, `python -m tests.test_api > tests/public_api.txt`, and
read the diff as the users of the last release will.
"""

import ast
import difflib
import importlib
import inspect
import pathlib
import re
import textwrap

import pytest

from ema_optax import interop
from ema_optax._decays import decays
from ema_optax._trees import selection

HERE = pathlib.Path(__file__).parent
TABLE = HERE / "public_api.txt"
MODULES = (
    "ema_optax",
    "ema_optax.checkpoint",
    "ema_optax.digits",
    "ema_optax.interop",
    "ema_optax.keras",
    "ema_optax.linen",
    "ema_optax.nnx",
    "ema_optax.placement",
    "ema_optax.plots",
    "ema_optax.reconstruction",
    "ema_optax.safetensors",
    "ema_optax.tensorflow",
    "ema_optax.torch",
)

# Names of `interop` as they were, and what they are now.
OLD = {
    f"ema_optax.interop.{old}": f"ema_optax.{new}"
    for old, new in {
        "Exported": "safetensors.Exported",
        "Imported": "tensorflow.Imported",
        "ImportedLeaf": "torch.ImportedLeaf",
        "ImportedTorch": "torch.ImportedTorch",
        "KerasAverage": "keras.KerasAverage",
        "Tensor": "safetensors.Tensor",
        "TensorTree": "safetensors.TensorTree",
        "export_safetensors": "safetensors.export",
        "import_tensorflow": "tensorflow.import_checkpoint",
        "import_torch": "torch.import_checkpoint",
        "keras_average": "keras.average",
        "keras_split": "keras.split",
        "keras_swapped": "keras.swapped",
        "keras_update": "keras.update",
        "nnx_split": "nnx.split",
        "nnx_update": "nnx.update",
        "refresh_batch_stats": "linen.refresh_batch_stats",
        "refresh_nnx_batch_stats": "nnx.refresh_batch_stats",
        "shadow_copy": "nnx.shadow_copy",
        "stored_safetensors": "safetensors.stored",
        "swapped": "nnx.swapped",
    }.items()
}

# Public names without an example of their own, and why.
WITHOUT_EXAMPLE = {
    "ema_optax.reconstruction.Soup": "returned by soup, whose example reads it",
    "ema_optax.checkpoint.ForeignTree": "made by stored_by_others",
    "ema_optax.safetensors.TensorTree": "made by stored",
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
    "ema_optax.safetensors.Tensor": "returned by export, as `tensors`",
    "ema_optax.safetensors.Exported": "returned by export",
    "ema_optax.tensorflow.Imported": "returned by import_checkpoint",
    "ema_optax.torch.ImportedLeaf": "part of what import_checkpoint returns",
    "ema_optax.torch.ImportedTorch": "returned by import_checkpoint",
    "ema_optax.interop.Move": "made by Rules, whose example reads it",
    "ema_optax.tensorflow.import_checkpoint": "needs TensorFlow, which few have",
    "ema_optax.keras.KerasAverage": "returned by average",
    "ema_optax.keras.average": "needs Keras, as the next three do",
    "ema_optax.keras.split": "its example is no doctest: it needs Keras",
    "ema_optax.keras.swapped": "its example is no doctest: it needs Keras",
    "ema_optax.keras.update": "its example is no doctest: it needs Keras",
    "ema_optax.reconstruction.Choice": "returned by choose, whose example reads it",
    "ema_optax.reconstruction.EvaluationWarning": "a warning",
    "ema_optax.reconstruction.Plan": "returned by plan, whose example prints it",
    "ema_optax.reconstruction.Point": "part of what choose returns",
    "ema_optax.reconstruction.Reconstruction": "returned by reconstruct",
    "ema_optax.reconstruction.ReconstructionWarning": "a warning",
    "ema_optax.reconstruction.Source": "abstract; StoredTree is the one that reads",
}

# Types of arguments, and the modules that say what they are.
ALIASES = {"ema_optax.DecayLike": decays, "ema_optax.Mask": selection}


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
    if name in ALIASES:
        of = ast.parse(inspect.getsource(ALIASES[name])).body
        [value] = [
            node.value
            for node in of
            if isinstance(node, ast.AnnAssign)
            and _name(node) == name.removeprefix("ema_optax.")
        ]
        return [f"{name}: {ast.unparse(value)}"]
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
    if name in ALIASES:  # a type: no example, a sentence below it
        source = inspect.getsource(ALIASES[name])
        alias = name.removeprefix("ema_optax.")
        assert re.search(rf'^{alias}: TypeAlias = .*\n"""[A-Z].*\."""$', source, re.M)
        return
    text = inspect.cleandoc(thing.__doc__)
    assert text.splitlines()[0].endswith((".", ":"))
    assert (">>>" in text) != (OLD.get(name, name) in WITHOUT_EXAMPLE)


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_old_names_are_the_new_ones(old, new):
    """A program written with them goes on as it did."""
    names = dict(public())
    assert names[old] is names[new]
    assert new.removeprefix("ema_optax.").rpartition(".")[0] in interop.__doc__


def test_interop_has_old_names_and_what_is_common_to_formats():
    common = {"Move", "Rule", "Rules", "read_rules"}
    old = {name.rpartition(".")[2] for name in OLD}
    assert set(interop.__all__) == common | old


def test_the_reasons_are_for_names_that_are_there():
    assert set(WITHOUT_EXAMPLE) <= {name for name, _ in public()}


if __name__ == "__main__":
    print("\n".join(table()))
