"""Export: trees of a checkpoint as safetensors files, one or many."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ema_optax import checkpoint
from ema_optax._interop import appearing, export_plan, export_writing
from ema_optax._interop.export_plan import Tensor
from ema_optax._interop.moves import Move
from ema_optax._interop.rule import Rule
from ema_optax._interop.rules import Rules
from ema_optax._messages import arguments, extras
from ema_optax._messages.progress import Progress, shown
from ema_optax._messages.text import brief
from ema_optax._trees import naming
from ema_optax._version import __version__

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Exported:
    """Tells what an export wrote.

    Attributes:
        path: The file, or the folder.
        step: Number of the exported step, or None where the path did not say.
        tree: Name of the exported tree.
        names: Stored path → name in the file, of leaves that became one tensor.
        bytes: Size of all tensors.
        metadata: Texts in each file's header.
        renamed: Key of `rename` → the stored paths that the key fitted.
        tensors: All tensors in order, with the names of their files.
    """

    path: Path
    step: int | None
    tree: str
    names: Mapping[str, str]
    bytes: int
    metadata: Mapping[str, str]
    renamed: Mapping[str, Sequence[str]]
    tensors: Sequence[Tensor] = ()


@overload
def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tree: str = "shadow",
    step: int | None = None,
    item: str | None = None,
    dtype: DTypeLike | None = None,
    rename: Mapping[str, str | None] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] | Rules | None = None,
    max_shard_size: int | str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
) -> Exported: ...


@overload
def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tree: list[str] | tuple[str, ...],
    step: int | None = None,
    item: str | None = None,
    dtype: DTypeLike | None = None,
    rename: Mapping[str, str | None] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] | Rules | None = None,
    max_shard_size: int | str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
) -> tuple[Exported, ...]: ...


def export(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tree: str | Sequence[str] = "shadow",
    step: int | None = None,
    item: str | None = None,
    dtype: DTypeLike | None = None,
    rename: Mapping[str, str | None] | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] | Rules | None = None,
    max_shard_size: int | str | None = None,
    name: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
) -> Exported | tuple[Exported, ...]:
    """Writes one tree of a checkpoint as a safetensors file, or more in a folder.

    A shadow is the whole model: leaves that are not averaged are those of the params.
    Names are the paths with dots, `encoder.kernel`. The header's metadata are texts:
    `step`, `tree`, `decay` (JSON, `null` where it is not known), `every` and `count` of
    a shadow, `ema_optax`, the version that wrote it, and `format`, which tells Hugging
    Face's libraries in whose layout the weights are: `pt` by `rules`, else `flax`.

    With `max_shard_size` the result is a folder as transformers and diffusers load it:
    `model.safetensors`, or `model-00001-of-00003.safetensors`, … and
    `model.safetensors.index.json`. Several trees have a folder each in `out`, `params/`
    and `shadow/`.

    Every leaf is compared with its checksums. Memory holds one file, and the leaves of
    one tensor more. The result appears whole or not at all.

    Args:
        directory: The folder of a run, or of one step of it.
        out: The file to write, or the folder, in a folder that exists.
        tree: `"params"`, `"shadow"`, or the name of a shadow: `"fast"`, in full
            `"shadow/fast"`; or several of them.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several.
        dtype: float32, bfloat16 or float16, which floating leaves are rounded to; other
            leaves stay. None for the stored dtypes.
        rename: Stored paths to names, or beginnings to beginnings:
            `{"encoder": "model.encoder"}`; or patterns, `{"**/kernel": "**/weight"}`,
            where `**` stands for any number of keys and `*` for characters of one. A
            leaf's own path decides alone; else the longest beginning is replaced, and
            then the first pattern that fits. None as a name leaves out, `""` as a path
            stands for all of them.
        rules: Instead of `rename`, names and layouts: `Rule`s, or what `read_rules`
            returns. The first that fits a path counts, and each path needs one.
        max_shard_size: Bytes that a file holds at most, or a text such as `"5GB"`,
            which is 5 · 10⁹; a larger tensor has a file by itself. None for one file.
        name: Beginning of the files' names in a folder; None for `"model"`.
        overwrite: Whether to replace a file, or a folder of such files, that is there.
        dry_run: Whether to read and write no values, and to return what would be.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function of the tensors done and all of them.

    Returns:
        What was written; of several trees one each.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        FileExistsError: If there is a file, unless `overwrite`.
        FileNotFoundError: If there is no such checkpoint, or no folder for the file.
        ModuleNotFoundError: If safetensors is not installed, or einops for `rules`.
        OSError: If the disk has no room.
        OverflowError: If a value is too large for `dtype`.
        ValueError, TypeError: If there is no such tree, a leaf is of a dtype that the
            format does not have, or `rename` or `rules` do not fit.

    >>> import tempfile, ema_optax, safetensors.numpy
    >>> params = {"dense": {"kernel": jnp.ones((2, 1))}}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder, params, opt_state, step=300)
    ...     out = f"{folder}/model.safetensors"
    ...     rules = [Rule("fc.weight", "dense/kernel", "o i -> i o")]
    ...     _ = ema_optax.safetensors.export(folder, out, rules=rules)
    ...     safetensors.numpy.load_file(out)
    {'fc.weight': array([[1., 1.]], dtype=float32)}
    """
    with extras.needed_by("ema_optax.safetensors.export"):
        from safetensors.numpy import save_file
    overwrite = arguments.flag(overwrite, "overwrite")
    dry_run = arguments.flag(dry_run, "dry_run")
    path = arguments.local_file(out, "out", "model.safetensors")
    limit = export_plan.shard_size(max_shard_size)
    trees = _trees(tree)
    in_folder = limit is not None or not isinstance(tree, str)
    if name is not None and not in_folder:
        raise ValueError(
            f"name={brief(name)} is of files in a folder, and out is a file here. "
            "Leave it out, or pass max_shard_size='5GB'."
        )
    prefix = export_plan.file_name(name)
    appearing.check_free(path, overwrite, folder=in_folder)
    cast = _dtype(dtype)
    description = checkpoint.describe(directory, step=step, item=item)
    exports: dict[Path, tuple[Exported, list[tuple[Tensor, Move]]]] = {}
    for tree_name in trees:
        source = checkpoint.stored(description.path, tree_name)
        full_name = naming.chosen(tree_name, [*description.trees], "Pass tree=")
        plan, renamed = export_plan.planned(
            source.entries, rename=rename, rules=rules, dtype=cast
        )
        plan = export_plan.in_files(plan, prefix if in_folder else path.stem, limit)
        if not in_folder:  # the name of `out`, whatever it ends with
            plan = [(dataclasses.replace(t, file=path.name), move) for t, move in plan]
        subfolder = Path() if isinstance(tree, str) else Path(full_name)
        if subfolder in exports:
            raise ValueError(f"tree has {full_name!r} twice: {brief(tree)}.")
        # First, so that a cut checkpoint is not reported as a disk without room.
        source.check_size()
        tensors = [tensor for tensor, _ in plan]
        exported = Exported(
            path=path / subfolder,
            step=description.step,
            tree=full_name,
            names=_single(tensors),
            bytes=sum(tensor.bytes for tensor in tensors),
            metadata=_metadata(
                description, full_name, "flax" if rules is None else "pt"
            ),
            renamed=renamed,
            tensors=tensors,
        )
        exports[subfolder] = exported, plan
    results = tuple(exported for exported, _ in exports.values())
    if not dry_run:
        appearing.check_room(path, sum(exported.bytes for exported in results))
        count = sum(len(exported.tensors) for exported in results)
        with (
            appearing.whole(path) as whole,
            shown(progress, "tensors", count) as report,
        ):
            numbers = itertools.count(1)
            for subfolder, (exported, plan) in exports.items():
                folder = whole / subfolder if in_folder else whole.parent
                folder.mkdir(parents=True, exist_ok=True)
                reader = export_writing.Reader(description, exported.tree, cast)
                export_writing.write(
                    save_file,
                    reader,
                    plan,
                    folder,
                    exported.metadata,
                    report=lambda: report(next(numbers)),
                )
                if in_folder:
                    export_writing.write_index(
                        exported.tensors, folder, prefix, exported.metadata
                    )
    return results[0] if isinstance(tree, str) else results


def _trees(tree: object) -> Sequence[str]:
    trees = [tree] if isinstance(tree, str) else tree
    if not isinstance(trees, (list, tuple)) or not trees:
        raise TypeError(
            'tree is "params", "shadow" or the name of one, or several of them; got '
            f"{brief(tree)}."
        )
    return [arguments.a_name(each, "tree", "shadow") for each in trees]


def _single(tensors: Sequence[Tensor]) -> dict[str, str]:
    """Names the tensor of each leaf that became one tensor by itself."""
    names: dict[str, list[str]] = {}
    for tensor in tensors:
        for path in tensor.paths:
            is_alone = len(tensor.paths) == 1
            names.setdefault(path, []).extend([tensor.name] if is_alone else ["", ""])
    return {
        path: tensor_names[0]
        for path, tensor_names in names.items()
        if len(tensor_names) == 1
    }


def _dtype(dtype: DTypeLike | None) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        name = arguments.dtype(dtype, "dtype").name
    except TypeError:
        name = brief(dtype)
    if name not in DTYPES:
        raise ValueError(
            f"dtype is one of {', '.join(DTYPES)}, or None for those stored; got "
            f"{name}."
        )
    return jnp.dtype(name)


def _metadata(
    description: checkpoint.Description, tree: str, layout: str
) -> dict[str, str]:
    """Makes the metadata of a header: all of it text, as the format wants it."""
    metadata = {"format": layout, "ema_optax": __version__, "tree": tree}
    if description.step is not None:
        metadata["step"] = str(description.step)
    if tree != naming.PARAMS:
        average = description.trees[tree]
        metadata["decay"] = average.decay.to_json() if average.decay else "null"
        metadata["every"] = json.dumps(average.every)
        metadata["count"] = json.dumps(average.count)
    return metadata
