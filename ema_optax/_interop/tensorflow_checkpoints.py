"""Import: a TensorFlow checkpoint with averages becomes one of ours."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ema_optax import checkpoint
from ema_optax._decays.decay import Decay
from ema_optax._interop.tensorflow_names import Variable, roles
from ema_optax._messages import arguments, extras, text
from ema_optax._messages.progress import Progress, tracked
from ema_optax._trees import trees

AVERAGE = "ExponentialMovingAverage"

_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_FILE = re.compile(r"(.+)\.(index|meta|data-\d{5}-of-\d{5})")


@dataclasses.dataclass(frozen=True)
class Imported:
    """Tells what became of a TensorFlow checkpoint.

    Attributes:
        source: Prefix of the checkpoint, as TensorFlow names it.
        path: Folder of the new checkpoint.
        step: Number of the step in the new checkpoint.
        averaged: Paths of the params that have a shadow.
        raw: Paths of the params that have none, and are raw in the shadow too.
        left_out: Names of the other variables → what each is.
        moved: Variables whose name is a scope of others too: name → path.
        scopes: Scopes in which the averages were made, `""` for none.
    """

    source: str
    path: str
    step: int
    averaged: tuple[str, ...]
    raw: tuple[str, ...]
    left_out: Mapping[str, str]
    moved: Mapping[str, str]
    scopes: tuple[str, ...]


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    decay: Decay | None = None,
    average: str = AVERAGE,
    scope: str | None = None,
    dry_run: bool = False,
    progress: Progress = None,
) -> Imported:
    """Turns a TensorFlow checkpoint with averages into one of ours.

    Its variables become params and shadow, nested by their scopes: `enc/w` is
    `["enc"]["w"]`, and `enc/w/ExponentialMovingAverage` its shadow, also where the
    averages were made inside a scope: `train/enc/w/ExponentialMovingAverage`. Where
    there is `enc` beside `enc/w`, it becomes `enc/value`. Values and dtypes stay as
    they are, bfloat16 and 64 bits included. Optimizer slots and texts are left
    out. The checkpoint may be one of `tf.compat.v1.train.Saver`, or one of
    `tf.train.Checkpoint` where no two variables have the same name.

    The shadow's count is the step. Memory holds params and shadow, and some leaves
    more.

    Args:
        source: Prefix of the checkpoint, `run/model.ckpt-300`, one of its files, or its
            folder: then the latest in it.
        out: Folder of the checkpoint to write, made if missing.
        step: Number of the step, ≥ 0; None for the `global_step`.
        decay: Decay of the average, for `describe`; TensorFlow does not write it down.
            `ExponentialMovingAverage(0.999)` is `constant(0.999)`, and `warmup(0.999)`
            with `num_updates`.
        average: Last part of the names of the averages.
        scope: The `variable_scope` in which the averages were made, `""` for none; None
            for any. Needed only where a variable has averages in several scopes.
        dry_run: Whether to read the names and the step alone, and write nothing.
        progress: Whether to draw a bar on stderr: None on terminals, where rich is
            installed. Or a function of the variables read and of their total.

    Raises:
        FileExistsError: If the step is in `out` already; nothing is overwritten.
        FileNotFoundError: If there is no TensorFlow checkpoint.
        ModuleNotFoundError: If TensorFlow is not installed.
        ValueError: If the checkpoint is damaged, holds no average or no step, or does
            not tell which average belongs to which variable.

    Source: the names are those of `tf.train.ExponentialMovingAverage`.

        ema_optax.tensorflow.import_checkpoint(
            "old_run", "imported", decay=ema_optax.warmup(0.9999)
        )
        params = checkpoint.restore("imported", "shadow", like=abstract_params)
    """
    dry_run = arguments.flag(dry_run, "dry_run")
    tf = _tensorflow()
    prefix = _prefix(tf, os.path.expanduser(os.fspath(source)))
    with _Reader(tf, prefix) as reader:
        variables = roles(reader.variables(), average, prefix, scope)
        number = _number(variables.step, reader, step, prefix)
        groups = () if dry_run else (variables.params, variables.shadow)
        values = _values(reader, groups, progress)
    if values:
        params, shadow = values
        origin = f"TensorFlow checkpoint {os.path.basename(prefix)}"
        checkpoint.save_average(
            out,
            trees.nested(shadow),
            params=trees.nested(params),
            step=number,
            decay=decay,
            extra={"imported_from": origin},
        )
    return Imported(
        source=prefix,
        path=str(out),
        step=number,
        averaged=tuple(variables.shadow),
        raw=tuple(path for path in variables.params if path not in variables.shadow),
        left_out=variables.left_out,
        moved={v.name: path for path, v in variables.params.items() if path != v.name},
        scopes=variables.scopes,
    )


def _values(
    reader: "_Reader", groups: Sequence[Mapping[str, Variable]], progress: Progress
) -> list[dict[str, np.ndarray]]:
    """Reads the variables of each group."""
    pairs = [(n, *pair) for n, group in enumerate(groups) for pair in group.items()]
    values: list[dict[str, np.ndarray]] = [{} for _ in groups]
    with contextlib.closing(tracked(pairs, "variables", progress)) as items:
        for n, path, variable in items:
            values[n][path] = reader.read(variable)
    return values


def _tensorflow() -> ModuleType:
    with extras.needed_by("ema_optax.tensorflow.import_checkpoint"):
        import tensorflow as tf  # pyright: ignore[reportMissingModuleSource] an extra
    return tf


def _prefix(tf: ModuleType, source: str) -> str:
    """Finds a checkpoint's prefix from a prefix, one of its files, or its folder."""
    if os.path.isdir(source):
        listed = tf.train.get_checkpoint_state(source)
        if listed is not None:
            latest = listed.model_checkpoint_path
            # The folder may have been moved, and the list name where it was.
            moved = os.path.join(source, os.path.basename(latest))
            for prefix in (moved, latest):
                if os.path.exists(f"{prefix}.index"):
                    return prefix
        prefixes = _prefixes(source)
        if len(prefixes) == 1:
            return prefixes[0]
        contents = (
            f"it has {', '.join(prefixes)}: pass one of them"
            if prefixes
            else "no file in it ends in .index"
        )
        raise FileNotFoundError(
            f"{source} does not say which TensorFlow checkpoint is its latest; "
            f"{contents}."
        )
    match = _FILE.fullmatch(source)
    prefix = match[1] if match else source
    if "://" not in prefix and not os.path.exists(f"{prefix}.index"):
        near = _prefixes(os.path.dirname(prefix))
        advice = "Pass a prefix, such as run/model.ckpt-300, or the folder of the run."
        if near:
            advice = f"There are {', '.join(near[:3])}."
        raise FileNotFoundError(
            f"There is no TensorFlow checkpoint {prefix}: {prefix}.index does not "
            f"exist. {advice}"
        )
    return prefix


def _prefixes(folder: str) -> list[str]:
    return sorted(str(p.with_suffix("")) for p in Path(folder or ".").glob("*.index"))


def _number(
    variable: Variable | None, reader: "_Reader", step: int | None, prefix: str
) -> int:
    if step is not None:
        return step
    if variable is not None:
        return int(reader.read(variable))
    end = re.search(r"-(\d+)$", prefix)
    example = int(end[1]) if end else 0
    raise ValueError(
        f"{prefix} holds no global_step. Pass step={example}, or whichever it is of."
    )


class _Reader:
    """Reads a TensorFlow checkpoint, and turns TensorFlow's errors into ours."""

    def __init__(self, tf: ModuleType, prefix: str) -> None:
        self._tf, self._prefix = tf, prefix

    def __enter__(self) -> "_Reader":
        self._reader = self._call(self._tf.train.load_checkpoint, self._prefix)
        return self

    def __exit__(self, *error: object) -> None:
        del self._reader

    def variables(self) -> list[Variable]:
        """Lists all variables; those of an object graph by their own names."""
        shapes = self._reader.get_variable_to_shape_map()
        dtypes = self._reader.get_variable_to_dtype_map()
        names = {key: key for key in dtypes}
        if _OBJECTS in dtypes:
            del names[_OBJECTS]
            names |= self._names_of_objects()
        return [
            Variable(
                name, key, tuple(shapes[key]), dtypes[key].name, _role(key, dtypes)
            )
            for key, name in names.items()
        ]

    def read(self, variable: Variable) -> np.ndarray:
        """Reads the value of a variable; TensorFlow compares it with its checksum.

        After the first error the reader must not be used again: that ends the process.
        """
        return np.asarray(self._call(self._reader.get_tensor, variable.key))

    def _names_of_objects(self) -> Iterator[tuple[str, str]]:
        from tensorflow.core.protobuf import trackable_object_graph_pb2 as objects  # pyright: ignore[reportMissingModuleSource]

        graph = objects.TrackableObjectGraph()
        graph.ParseFromString(self._call(self._reader.get_tensor, _OBJECTS))
        for node in graph.nodes:
            for attribute in node.attributes:
                if attribute.checkpoint_key.endswith(_VALUE):
                    key = attribute.checkpoint_key
                    yield key, attribute.full_name or key[: -len(_VALUE)]

    def _call(self, function: Callable[[str], Any], argument: str) -> Any:
        try:
            return function(argument)
        except self._tf.errors.OpError as error:
            raise ValueError(
                f"TensorFlow cannot read {self._prefix}: {text.one_line(error)}. The "
                "checkpoint is damaged or incomplete; pass another one of the run."
            ) from error


def _role(key: str, keys: Mapping[str, Any]) -> str | None:
    """Tells by an object's path what optimizers or savers keep; None for others."""
    path = key.removesuffix(_VALUE)
    if path == key:
        return None
    if path == "save_counter":
        return "TensorFlow's count of saves"
    if "/.OPTIMIZER_SLOT/" in path:
        return f"slot '{path.rpartition('/')[2]}'"
    # Keras keeps an optimizer's own variables right under it, and what it keeps of the
    # model's in a list. The model's may be in another list of it.
    owner = re.sub(r"/_variables/\d+$", "", path)
    owner = owner if owner != path else path.rpartition("/")[0]
    counts = (f"{owner}/{name}{_VALUE}" for name in ("_iterations", "iter"))
    return "of an optimizer" if any(count in keys for count in counts) else None
