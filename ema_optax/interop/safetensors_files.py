"""Export: one tree of a checkpoint as a safetensors file."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ema_optax import arguments, checkpoint, extras
from ema_optax.interop.flat_names import flat_names
from ema_optax.text import brief
from ema_optax.version import __version__

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        step: Number of the step it is of, or None where the path did not say.
        tree: The tree it is of.
        names: Stored path → name in the file.
        bytes: Of all tensors.
        metadata: In the file's header.
        renamed: Key of `rename` → the stored paths that it fitted.
    """

    path: Path
    step: int | None
    tree: str
    names: Mapping[str, str]
    bytes: int
    metadata: Mapping[str, str]
    renamed: Mapping[str, Sequence[str]]


def export_safetensors(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tree: str = "shadow",
    step: int | None = None,
    item: str | None = None,
    dtype: DTypeLike | None = None,
    rename: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write one tree of a checkpoint as a safetensors file.

    A shadow is the whole model: leaves that are not averaged are those of the params.
    Names are the paths with dots, `encoder.kernel`. The header's metadata are texts:
    `step`, `tree`, `decay` (JSON, `null` where it is not known), `every` and `count` of
    a shadow, `ema_optax`, the version that wrote it, and `format`, `flax`, which tells
    Hugging Face's libraries in whose layout the weights are.

    All that is read is compared with its checksums. Memory holds what is written, and
    one leaf more. The file appears whole or not at all.

    Args:
        directory: The folder of a run, or of one step of it.
        out: The file to write, in a folder that exists.
        tree: `"params"`, `"shadow"`, or `"shadow/NAME"`.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several.
        dtype: float32, bfloat16 or float16, which floating leaves are rounded to, the
            others stay; None for those stored.
        rename: Stored paths, or beginnings of both, to names:
            `{"encoder": "model.encoder"}`; or patterns, `{"**/kernel": "**/weight"}`,
            where `**` stands for any number of keys and `*` for characters of one. A
            leaf's own path decides alone; else the longest beginning is replaced, and
            then the first pattern that fits. None as a name leaves out, `""` as a path
            stands for all of them.
        overwrite: Whether to replace a file that is there.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        FileExistsError: If there is a file, unless `overwrite`.
        FileNotFoundError: If there is no such checkpoint, or no folder for the file.
        ModuleNotFoundError: If safetensors is not installed.
        OverflowError: If a value is too large for `dtype`.
        ValueError, TypeError: If there is no such tree, a leaf is of a dtype that the
            format does not have, or `rename` does not fit.

    >>> import tempfile, ema_optax, safetensors.numpy
    >>> params = {"dense": {"kernel": jnp.ones(2)}}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint.save(folder, params, opt_state, step=300)
    ...     out = f"{folder}/model.safetensors"
    ...     _ = export_safetensors(folder, out, rename={"dense": "fc"})
    ...     safetensors.numpy.load_file(out)
    {'fc.kernel': array([1., 1.], dtype=float32)}
    """
    with extras.needed_by("export_safetensors"):
        from safetensors.numpy import save_file
    overwrite = arguments.flag(overwrite, "overwrite")
    path = arguments.local_file(out, "out", "model.safetensors")
    _check_free(path, overwrite)
    cast = _dtype(dtype)
    found = checkpoint.describe(directory, step=step, item=item)
    source = checkpoint.stored(found.path, tree)  # also says which trees there are
    tree = _full_name(found, tree)
    leaves = source.entries
    names, renamed = flat_names(leaves, rename)
    _check_dtypes({stored: leaves[stored] for stored in names})

    others = {p: _like(leaves[p]) for p in names if p not in source.leaves}
    arrays = checkpoint.restore(found.path, "params", others) if others else {}
    tensors: dict[str, np.ndarray] = {}
    for stored, name in names.items():
        # Popped, so that memory holds each leaf once.
        array = arrays.pop(stored, None)
        if array is None:
            own = stored in found.trees[tree].leaves
            array = _read(
                found.path, tree if own else "params", source, stored, leaves[stored]
            )
        # safetensors takes the memory as it lies.
        tensors[name] = np.asarray(_rounded(array, cast, stored), order="C")
        del array
    metadata = _metadata(found, tree)
    _write(save_file, tensors, path, metadata)
    size = sum(array.nbytes for array in tensors.values())
    return Exported(path, found.step, tree, names, size, metadata, renamed)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder. Pass a file in it: {path / 'model.safetensors'}."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists, and nothing is overwritten unasked. Pass another name, or "
            "overwrite=True."
        )
    if not path.parent.is_dir():
        what = "is a file" if path.parent.exists() else "does not exist"
        raise FileNotFoundError(
            f"Cannot write {path}: the folder {path.parent} {what}. Make it first."
        )


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


def _full_name(found: checkpoint.Description, tree: str) -> str:
    """Returns the name of a tree where `shadow` stands for the only one."""
    if tree in found.trees:
        return tree
    return next(name for name in found.trees if name.startswith(f"{tree}/"))


def _check_dtypes(leaves: Mapping[str, checkpoint.Leaf]) -> None:
    from safetensors import SafetensorError, TensorSpec

    wrong = {}
    for path, leaf in leaves.items():
        if leaf.key:
            wrong[path] = f"a PRNG key ({leaf.key})"
            continue
        size = jnp.dtype(leaf.dtype).itemsize
        try:
            TensorSpec(dtype=leaf.dtype, shape=[1], data_ptr=0, data_len=size)
        except SafetensorError:
            wrong[path] = leaf.dtype
    if wrong:
        path, what = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more such leaves)" if len(wrong) > 1 else ""
        out = ", ".join(f'"{path}": None' for path in list(wrong)[:5])
        raise ValueError(
            f"'{path}' is {what}{more}, which safetensors files cannot hold. Leave out "
            f"what is not needed: rename={{{out}}}."
        )


def _like(leaf: checkpoint.Leaf) -> np.ndarray:
    """Returns a slot for a leaf that takes no memory, and keeps 64 bits."""
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf.dtype)), leaf.shape)


def _read(
    item: str,
    tree: str,
    source: checkpoint.StoredTree,
    path: str,
    leaf: checkpoint.Leaf,
) -> np.ndarray:
    try:
        return source.read(path, (slice(None),) * len(leaf.shape))
    except checkpoint.CorruptCheckpointError:
        # Read again by what names the newest step that is whole.
        checkpoint.restore(item, tree, {path: _like(leaf)})
        raise


def _rounded(array: np.ndarray, dtype: np.dtype | None, path: str) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):  # said below, with the name
        cast = array.astype(dtype)
    if not (np.isfinite(cast) | ~np.isfinite(array)).all():
        raise OverflowError(
            f"'{path}' does not fit {dtype.name}: it holds values beyond "
            f"{float(jnp.finfo(dtype).max):g}. Pass dtype='bfloat16', or none at all."
        )
    return cast


def _metadata(found: checkpoint.Description, tree: str) -> dict[str, str]:
    """Returns what the header says: all of it text, as the format wants it."""
    told = {"format": "flax", "ema_optax": __version__, "tree": tree}
    if found.step is not None:
        told["step"] = str(found.step)
    if tree.startswith("shadow"):
        average = found.trees[tree]
        told["decay"] = average.decay.to_json() if average.decay else "null"
        told["every"] = json.dumps(average.every)
        told["count"] = json.dumps(average.count)
    return told


def _write(
    save_file: Callable[..., None],
    tensors: dict[str, np.ndarray],
    path: Path,
    metadata: dict[str, str],
) -> None:
    """Writes the file beside its place, and puts it there when it is whole."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(exist_ok=True)  # a killed process may have had this one's number
    try:
        whole = folder / path.name
        save_file(tensors, whole, metadata=metadata)
        usual = folder / "usual"
        usual.touch()
        whole.chmod(usual.stat().st_mode)  # safetensors lets nobody else read it
        os.replace(whole, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
