"""Plans an export: which tensors it writes, of which leaves, and in which files."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ema_optax import checkpoint
from ema_optax._interop.appearing import FILE
from ema_optax._interop.flat_names import check_name, flat_names
from ema_optax._interop.moves import Move
from ema_optax._interop.rule import Rule
from ema_optax._interop.rules import Rules
from ema_optax._messages import arguments
from ema_optax._messages.text import brief

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Describes a tensor in a file.

    Attributes:
        name: Name in the file.
        paths: Paths of the leaves that the tensor is made of.
        made: How the leaves become the tensor, in words; `""` for one as it lies.
        shape: Shape of the tensor.
        dtype: Name of its dtype.
        file: Name of the file.
    """

    name: str
    paths: tuple[str, ...]
    made: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def planned(
    leaves: Mapping[str, checkpoint.Leaf],
    *,
    rename: Mapping[str, str | None] | None,
    rules: "Sequence[Rule | Mapping[str, Any]] | Rules | None",
    dtype: np.dtype | None,
) -> tuple[list[tuple[Tensor, Move]], dict[str, list[str]]]:
    """Plans the tensors of a tree, in no file yet, and lists what each key fitted.

    Tensors of the same leaves follow each other.

    Raises:
        ModuleNotFoundError: If rules rearrange, and einops is not installed.
        TypeError, ValueError: If names, rules or dtypes do not fit.
    """
    if rules is not None and rename is not None:
        raise ValueError(
            "rename and rules both say what leaves are called. Pass one of them: a "
            'rename is a rule without a layout, Rule("model.**", "**").'
        )
    renamed: dict[str, list[str]] = {}
    if rules is None:
        names, renamed = flat_names(leaves, rename)
        moves = {
            name: Move(sources=(path,), shapes=(tuple(leaves[path].shape),))
            for path, name in names.items()
        }
    else:
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        moves = Rules.of(rules).to_names(shapes)
        for name, move in moves.items():
            check_name(name, move.sources[0])
        if not moves:
            raise ValueError(
                "No leaf is left to write: the rules leave out all of them."
            )
    used = dict.fromkeys(path for move in moves.values() for path in move.sources)
    _check_dtypes({path: leaves[path] for path in used}, rules is not None)
    plan = []
    for name, move in moves.items():
        kinds = {path: _after(leaves[path], dtype) for path in move.sources}
        if len(set(kinds.values())) > 1:
            dtypes = ", ".join(f"'{path}' is {kind}" for path, kind in kinds.items())
            raise ValueError(
                f"'{name}' would be made of arrays of several dtypes: {dtypes}. Pass "
                "dtype='float32', or make them alike before."
            )
        kind = kinds[move.sources[0]]
        plan.append((Tensor(name, move.sources, str(move), move.shape, kind, ""), move))
    return plan, renamed


def in_files(
    tensors: Sequence[tuple[Tensor, Move]], name: str, limit: int | None
) -> list[tuple[Tensor, Move]]:
    """Distributes tensors over files, in order.

    A file takes tensors until the next would make it larger than `limit` bytes; a
    tensor that is larger by itself has a file of its own. One file is called
    NAME.safetensors, several NAME-00001-of-0000N.safetensors, as Hugging Face's
    libraries call them.
    """
    numbers: list[int] = []
    number = size = 0
    for tensor, _ in tensors:
        if size and limit is not None and size + tensor.bytes > limit:
            number, size = number + 1, 0
        size += tensor.bytes
        numbers.append(number)
    last = number + 1
    files = [f"{name}-{at + 1:05d}-of-{last:05d}{FILE}" for at in range(last)]
    if last == 1:
        files = [f"{name}{FILE}"]
    return [
        (dataclasses.replace(tensor, file=files[number]), move)
        for (tensor, move), number in zip(tensors, numbers, strict=True)
    ]


def shard_size(value: int | str | None) -> int | None:
    """Reads how many bytes a file may have; None for any number.

    Raises:
        TypeError, ValueError: If `value` is no such size.

    >>> shard_size("500MB"), shard_size("1.5GB")
    (500000000, 1500000000)
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(
            r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]B)?\s*", value, re.I
        )
        if match is None or (match[2] is None and "." in match[1]):
            raise ValueError(
                "max_shard_size is a size such as '5GB' or '500MB', got "
                f"{brief(value)}."
            )
        value = (
            int(float(match[1]) * _UNITS[match[2].upper()])
            if match[2]
            else int(match[1])
        )
    return arguments.whole(value, "max_shard_size", 1, "max_shard_size='5GB'")


def file_name(name: str | None) -> str:
    """Reads how the names of files in a folder begin; None for `model`.

    Raises:
        TypeError, ValueError: If `name` is no name of a file.
    """
    if name is None:
        return "model"
    name = arguments.a_name(name, "name", "diffusion_pytorch_model")
    is_bad = not name or Path(name).name != name or not name.isprintable()
    if is_bad or len(name) > 100:
        raise ValueError(
            f"name begins the names of files, got {brief(name)}. Pass "
            "name='diffusion_pytorch_model'."
        )
    return name


def _after(leaf: checkpoint.Leaf, dtype: np.dtype | None) -> str:
    floating = jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating)
    return dtype.name if dtype is not None and floating else leaf.dtype


def _check_dtypes(leaves: Mapping[str, checkpoint.Leaf], by_rules: bool) -> None:
    from safetensors import SafetensorError, TensorSpec

    refused = {}
    for path, leaf in leaves.items():
        if leaf.key:
            refused[path] = f"a PRNG key ({leaf.key})"
            continue
        size = jnp.dtype(leaf.dtype).itemsize
        try:
            TensorSpec(dtype=leaf.dtype, shape=[1], data_ptr=0, data_len=size)
        except SafetensorError:
            refused[path] = leaf.dtype
    if not refused:
        return
    path, kind = next(iter(refused.items()))
    more = f" (and {len(refused) - 1} more such leaves)" if len(refused) > 1 else ""
    first = list(refused)[:5]
    advice = ", ".join(f'"{path}": None' for path in first)
    advice = f"rename={{{advice}}}"
    if by_rules:
        advice = ", ".join(f'Rule(None, "{path}")' for path in first)
    raise ValueError(
        f"'{path}' is {kind}{more}, which safetensors files cannot hold. Leave out "
        f"what is not needed: {advice}."
    )
