"""A checkpoint that another program wrote: what arrays it has, read a few at a time.

What was written is not trusted: paths stay inside, sizes are bounded before anything is
read, and what cannot be read is said by its cause.
"""

import abc
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from etils import epath

from ema_optax._checkpoint.entries import BYTES
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.untrusted import DEPTH, itemsize, misplaced, read_text
from ema_optax._messages import text

Shape: TypeAlias = tuple[int, ...]
# Dicts and lists as they were saved, of leaves, and None for what is no array.
Node: TypeAlias = "dict[str, Node] | list[Node] | Leaf | None"


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """An array of a foreign checkpoint.

    Attributes:
        path: Its keys from the top, joined by slashes.
        shape: Its shape.
        dtype: By name.
    """

    path: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def is_averaged(self) -> bool:
        """Whether an average covers leaves like it: floating and complex ones."""
        return jnp.issubdtype(jnp.dtype(self.dtype), jnp.inexact)

    @property
    def is_counter(self) -> bool:
        """Whether it is one whole number."""
        return not self.shape and jnp.issubdtype(jnp.dtype(self.dtype), jnp.integer)


class Foreign(abc.ABC):
    """A checkpoint of another program.

    Attributes:
        place: Where it is.
        kind: What wrote it, in words.
        number: Of its step, or None where nothing says.
        tree: Its arrays, nested as they were saved.
        leaves: The same by path.
    """

    def __init__(self, place: str, kind: str, number: int | None, tree: Node) -> None:
        self.place, self.kind, self.number, self.tree = place, kind, number, tree
        self.leaves: dict[str, Leaf] = {}
        for leaf in leaves_of(tree):
            if leaf.path in self.leaves:
                raise ValueError(
                    f"{place} has two arrays of one path, {text.brief(leaf.path)}: "
                    "keys with a slash in them fall together. Save them under others."
                )
            self.leaves[leaf.path] = leaf

    @abc.abstractmethod
    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the arrays of some paths, in any order, in the dtypes stored.

        Raises:
            CorruptCheckpointError: If one is damaged or missing.
            OSError: If something else keeps one from being read.
        """


def leaves_of(node: Node) -> Iterator[Leaf]:
    """Yields the leaves of a tree, in its order."""
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, Mapping):
        for child in node.values():
            yield from leaves_of(child)
    elif isinstance(node, list):
        for child in node:
            yield from leaves_of(child)


def leaf_at(keys: Sequence[str], shape: Sequence[int], dtype: str, place: str) -> Leaf:
    """Makes a leaf of what a file says of an array.

    Raises:
        CorruptCheckpointError: If it is none, or leads out of the checkpoint.
    """
    path = "/".join(keys)
    problem = misplaced(path) if path else None
    size = itemsize(dtype)
    if problem is None and size is None:
        problem = f"is of the dtype {text.brief(dtype)}"
    if problem is None and math.prod(shape) * (size or 1) > BYTES:
        problem = f"has the shape {text.brief(list(shape))}, more than any disk holds"
    if problem:
        raise CorruptCheckpointError(f"{place}: {text.brief(path)} {problem}.")
    return Leaf(path, tuple(int(n) for n in shape), dtype)


def is_too_deep(keys: Sequence[object]) -> bool:
    """Returns whether a leaf lies deeper than what is read."""
    return len(keys) > DEPTH


def read_json(file: epath.Path) -> dict[str, Any]:
    """Returns the object in a file of JSON.

    Raises:
        CorruptCheckpointError: If it holds none.
        OSError: If it cannot be read.
    """
    try:
        found = json.loads(read_text(file))
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{file} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{file} cannot be read: {text.one_line(error)}. If it was copied, copy it "
            "again."
        ) from error
    if not isinstance(found, dict):
        raise CorruptCheckpointError(f"{file} holds {text.brief(found)}, no object.")
    return found


def check_memory(needed: int) -> None:
    """Refuses arrays that this machine cannot hold.

    Raises:
        MemoryError: If they are larger than its memory.
    """
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not told on this system
        return
    if needed > there > 0:
        raise MemoryError(
            f"Params and average have {needed:,} bytes, and this machine {there:,} of "
            "memory, which holds both. Adopt it on a larger one."
        )
