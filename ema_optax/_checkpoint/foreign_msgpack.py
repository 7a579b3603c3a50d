"""Arrays in msgpack files of `flax.serialization`, of which nothing is run."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.foreign import (
    Foreign,
    Node,
    check_memory,
    is_too_deep,
    leaf_at,
)
from ema_optax._checkpoint.untrusted import itemsize
from ema_optax._messages import extras, text

# How Flax marks what msgpack has no type for.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
# An array of more than 1 GB is a dict of its shape and its parts.
_IN_PARTS = "__msgpack_chunked_array__"


class MsgpackFile(Foreign):
    """What `flax.serialization.to_bytes` wrote: all of the file is in memory."""

    def __init__(self, file: Path, number: int | None) -> None:
        """Reads the file.

        Raises:
            CorruptCheckpointError: If it is no msgpack of arrays.
            ModuleNotFoundError: If msgpack is not installed.
            OSError: If it cannot be read.
        """
        self._arrays: dict[str, np.ndarray] = {}
        tree = self._nested(_unpacked(file), (), str(file))
        super().__init__(str(file), "a msgpack file of Flax", number, tree)

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the arrays of some paths; see `Foreign`."""
        for path in paths:
            yield path, self._arrays[path]

    def _nested(self, node: Any, keys: tuple[str, ...], file: str) -> Node:
        if is_too_deep(keys):
            raise CorruptCheckpointError(f"{file} is nested too deep for a tree.")
        if isinstance(node, Mapping) and _IN_PARTS in node:
            node = _joined(node, file)
        if isinstance(node, Mapping):
            return {
                str(key): self._nested(child, (*keys, str(key)), file)
                for key, child in node.items()
            }
        if isinstance(node, (list, tuple)):
            return [
                self._nested(child, (*keys, str(i)), file)
                for i, child in enumerate(node)
            ]
        if not isinstance(node, (np.ndarray, bool, int, float, complex)):
            return None  # nothing, or a text
        try:
            array = np.asarray(node)
        except OverflowError:
            return None
        leaf = leaf_at(keys, array.shape, array.dtype.name, file)
        self._arrays[leaf.path] = array
        return leaf


def _unpacked(file: Path) -> Any:
    """Returns what a file holds, with its arrays as NumPy has them."""
    with extras.needed_by("adopt of a msgpack file"):
        import msgpack
    check_memory(2 * os.path.getsize(file))
    data = file.read_bytes()
    try:
        return msgpack.unpackb(data, ext_hook=_extension, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        said = text.one_line(error).rstrip(".") or type(error).__name__
        raise CorruptCheckpointError(
            f"{file} is no msgpack file of flax.serialization: {said}. If it was "
            "copied, copy it again."
        ) from error


def _extension(code: int, data: bytes) -> Any:
    """Returns what Flax packed: an array, a scalar of NumPy, or a complex number."""
    import msgpack

    if code in (_ARRAY, _SCALAR):
        shape, dtype, buffer = msgpack.unpackb(data)
        return _array(shape, dtype, buffer)
    if code == _COMPLEX:
        real, imaginary = msgpack.unpackb(data)
        return complex(float(real), float(imaginary))
    raise ValueError(f"it has a value of the unknown type {code}")


def _array(shape: object, dtype: object, buffer: object) -> np.ndarray:
    name = dtype.decode() if isinstance(dtype, bytes) else dtype
    name = "bfloat16" if name == "V2" else name
    size = itemsize(name) if isinstance(name, str) else None
    if size is None or not isinstance(name, str):
        raise ValueError(f"it has an array of the dtype {text.brief(dtype)}")
    if not isinstance(shape, (list, tuple)) or not all(
        type(n) is int and n >= 0 for n in shape
    ):
        raise ValueError(f"it has an array of the shape {text.brief(shape)}")
    if not isinstance(buffer, bytes) or math.prod(shape) * size != len(buffer):
        raise ValueError(
            f"it has an array {name}{list(shape)} of another number of bytes"
        )
    return np.frombuffer(buffer, jnp.dtype(name)).reshape(tuple(shape))


def _joined(node: Mapping[Any, Any], file: str) -> np.ndarray:
    """Returns an array that was packed in parts."""
    parts, shape = node.get("chunks"), node.get("shape")
    try:
        if not isinstance(parts, Mapping) or not isinstance(shape, Mapping):
            raise ValueError("its parts are not there")
        arrays = [parts[str(i)] for i in range(len(parts))]
        return np.concatenate(arrays).reshape(
            [shape[str(i)] for i in range(len(shape))]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{file} has an array in parts that do not fit: {text.one_line(error)}."
        ) from error
