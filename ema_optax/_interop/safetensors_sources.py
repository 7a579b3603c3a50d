"""Checkpoints of safetensors as sources of sums, and those that a folder holds."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from ema_optax._interop import torch_folders
from ema_optax._interop.flat_names import SEPARATOR
from ema_optax._interop.torch_files import SAFETENSORS, Tensors
from ema_optax._messages import arguments
from ema_optax._messages.text import nearest, some
from ema_optax.reconstruction import Source

INDEX = f"{SAFETENSORS}.index.json"

_NUMBERED = re.compile(r"(.*[^0-9.])?([0-9]+)")  # checkpoint-500; not the 07 of w-0.07
_SHARD = re.compile(r".*-[0-9]+-of-[0-9]+")
_BEGUN = ("tmp", ".")  # beginnings of the names of files that are still written


def stored(source: str | os.PathLike[str], tree: str | None = None) -> "TensorTree":
    """Opens a safetensors checkpoint as a source for merging.

    Dots in names become slashes, as paths have them. The format keeps no checksums:
    tensors are not verified. Files are mapped, and only their headers are read yet.

    Args:
        source: A file `….safetensors`, an index of shards
            `….safetensors.index.json`, or a folder with one of them.
        tree: Beginning of the names to read, `"model"` of `model.w`, which is left
            out of paths; None for all tensors.

    Raises:
        FileNotFoundError: If there are no tensors, or a shard is missing.
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If a file is damaged, if a folder has several checkpoints, if there
            is no such tree, or a tensor cannot be held.

    >>> import tempfile, ema_optax, safetensors.numpy
    >>> from ema_optax import reconstruction
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = [f"{folder}/step-{step}.safetensors" for step in (100, 200)]
    ...     for file, value in zip(files, (1.0, 2.0)):
    ...         weight = np.full(2, value, np.float32)
    ...         safetensors.numpy.save_file({"fc.weight": weight}, file)
    ...     sources = [ema_optax.safetensors.stored(file) for file in files]
    ...     reconstruction.merge(sources, "linear")
    {'fc': {'weight': Array([1.5, 1.5], dtype=float32)}}
    """
    path = arguments.local_file(source, "source", "step-100.safetensors")
    if tree is not None:
        arguments.a_name(tree, "tree", "model")
    tensors, _ = torch_folders.open_source(path)
    if not tensors.origin.endswith((SAFETENSORS, INDEX)):
        raise ValueError(
            f"{tensors.origin} is no safetensors file. Import it instead: "
            f"ema_optax.torch.import_checkpoint({str(path)!r}, out)."
        )
    return TensorTree(tensors, tree)


class TensorTree(Source):
    """Reads the tensors of a safetensors checkpoint.

    Attributes:
        leaves: Shape and dtype of every leaf that is averaged, by path.
        others: Paths of the leaves that are not averaged.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]

    def __init__(self, tensors: Tensors, tree: str | None) -> None:
        self._tensors = tensors
        self._names: dict[str, str] = {}
        start = "" if tree is None else tree.strip("/").replace("/", SEPARATOR)
        start = f"{start}{SEPARATOR}" if start else ""
        for name in tensors.entries:
            if name.startswith(start):
                self._add(name, name.removeprefix(start))
        if not self._names:
            tops = {name.partition(SEPARATOR)[0] for name in tensors.entries}
            near = nearest(start, sorted(tops)) if tops else "It holds none."
            raise ValueError(
                f"{tensors.origin} has no tensors at tree={tree!r}. {near}"
            )
        entries = {path: tensors.entries[name] for path, name in self._names.items()}
        self.leaves = {
            path: jax.ShapeDtypeStruct(entry.shape, entry.dtype)
            for path, entry in entries.items()
            if entry.is_averaged
        }
        if not self.leaves:
            raise ValueError(f"{tensors.origin} has no floating tensors to merge.")
        self.others = tuple(path for path in entries if path not in self.leaves)

    def __repr__(self) -> str:
        return f"TensorTree({self._tensors.origin!r}, {len(self.leaves)} leaves)"

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a leaf, as a view of the file."""
        return self._tensors.raw(self._names[path])[index]

    def read_others(self) -> dict[str, np.ndarray]:
        """Reads the leaves that are not averaged, by path."""
        return {path: self._tensors.raw(self._names[path]) for path in self.others}

    def _add(self, name: str, rest: str) -> None:
        path = rest.replace(SEPARATOR, "/")
        where = f"{name!r} in {self._tensors.origin}"
        if {"", ".."} & set(path.split("/")):
            raise ValueError(
                f"{where} is no path of a leaf: a key in it is empty, or '..'."
            )
        if path in self._names:
            raise ValueError(
                f"{where} and {self._names[path]!r} are both the path '{path}'."
            )
        if not self._tensors.entries[name].is_held:
            raise ValueError(
                f"{where} is {self._tensors.entries[name].dtype}, which cannot be "
                "averaged. Convert the checkpoints to float32 or bfloat16 first."
            )
        self._names[path] = name


def checkpoints_in(folder: Path) -> tuple[dict[int, Path], list[Path]]:
    """Finds the safetensors checkpoints in a folder by number, and those left out.

    Checkpoints are files `step-100.safetensors`, or folders `checkpoint-100` with a
    model each, as Hugging Face's trainer writes them. Where there are any, the weights
    in the folder itself are left out, and always what a trainer had begun to write.

    Raises:
        ValueError: If there are several of one number, shards without their index, or
            checkpoints of several runs.
    """
    by_form: dict[str, dict[int, Path]] = {}
    left_out, single, shards, empty = [], [], [], []
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir()
        if not is_folder and not path.name.endswith((SAFETENSORS, INDEX)):
            continue
        stem = path.name if is_folder else path.name.removesuffix(SAFETENSORS)
        match = _NUMBERED.fullmatch(stem)
        if is_folder and not _has_weights(path):
            if match:
                empty.append((f"{match[1] or ''}/", path))
        elif path.name.startswith(_BEGUN):
            left_out.append(path)
        elif not is_folder and _SHARD.fullmatch(stem):
            shards.append(path)
        elif match:
            form = by_form.setdefault(f"{match[1] or ''}{'/' if is_folder else ''}", {})
            if int(match[2]) in form:
                other = form[int(match[2])].name
                raise ValueError(
                    f"{folder} has two checkpoints {int(match[2])}: {other} and "
                    f"{path.name}. Move one of them elsewhere."
                )
            form[int(match[2])] = path
        else:
            single.append(path)
    if shards and not single:
        raise ValueError(
            f"{folder} has shards, {some(path.name for path in shards)}, and no "
            f"{INDEX.removeprefix('.')} that says what is in them. Bring it too."
        )
    if len(by_form) > 1:
        examples = some(
            (next(iter(form.values())).name for form in by_form.values()), 4
        )
        raise ValueError(
            f"{folder} has checkpoints of {len(by_form)} names, such as {examples}: "
            "two runs, perhaps. Pass those that are meant, in their order, or a folder "
            "of each run."
        )
    if by_form:
        ((name, numbered),) = by_form.items()
        left_out += single + shards + [path for at, path in empty if at == name]
        return dict(sorted(numbered.items())), left_out
    return {}, left_out


def has_safetensors(path: Path) -> bool:
    """Tells whether a path is a safetensors file, an index, or a folder with one."""
    return path.name.endswith((SAFETENSORS, INDEX)) or _has_weights(path)


def _has_weights(path: Path) -> bool:
    return path.is_dir() and any(
        inside.name.endswith((SAFETENSORS, INDEX)) for inside in path.iterdir()
    )
