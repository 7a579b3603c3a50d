"""Entries of a manifest: made from a stranger's JSON, or refused, and written as JSON.

Whoever can write a checkpoint can seal its manifest: the seal tells damage, not intent.
So shapes are bounded, dtypes are numbers, paths stay inside, nothing is coerced, and
nothing is nested more deeply than the recursion that reads it.
"""

# pyright: strict

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias, TypeGuard, cast

import jax.numpy as jnp

from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.untrusted import (
    DEPTH,
    is_deep,
    is_list,
    is_object,
    is_whole,
    itemsize,
    misplaced,
    nodes,
)
from ema_optax._decays.decay import Decay
from ema_optax._messages.text import brief

Json: TypeAlias = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
Structure: TypeAlias = dict[str, "Structure"] | list["Structure"] | str | None
Count: TypeAlias = int | list["Count"]  # lists where states were vmapped

BYTES = 2**60  # of a leaf; the sums of many stay far from overflow in float64
_NDIM = 64  # NumPy's own bound
_INT = 2**63
_KEY = "key:"
_KIND = re.compile(rf"jax|numpy|bool|int|float|{_KEY}.{{1,64}}")


@dataclasses.dataclass(frozen=True, slots=True)
class LeafEntry:
    """A leaf on disk.

    Attributes:
        shape: Its shape.
        dtype: By name; of PRNG keys that of their data.
        key: Implementation of PRNG keys, such as `threefry2x32`; None of numbers.
        kind: What it was in Python: `jax`, `numpy`, `bool`, `int` or `float`.
    """

    shape: tuple[int, ...]
    dtype: str
    key: str | None = None
    kind: str = dataclasses.field(default="jax", compare=False)

    @property
    def is_key(self) -> bool:
        """Whether it is an array of PRNG keys."""
        return self.key is not None

    @property
    def bytes(self) -> int:
        """Bytes of its elements; of PRNG keys one number for each."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, object]:
        """Its part of the manifest."""
        kind = f"{_KEY}{self.key}" if self.key else self.kind
        return {"shape": list(self.shape), "dtype": self.dtype, "kind": kind}

    @classmethod
    def parse(cls, content: object) -> "LeafEntry":
        """Makes an entry of JSON, or raises `CorruptCheckpointError` that says why."""
        if not is_object(content) or not {"shape", "dtype", "kind"} <= set(content):
            raise CorruptCheckpointError("lacks shape, dtype or kind")
        shape, dtype, kind = content["shape"], content["dtype"], content["kind"]
        if not isinstance(kind, str) or not _KIND.fullmatch(kind):
            raise CorruptCheckpointError(f"is of the kind {brief(kind)}")
        size = itemsize(dtype) if isinstance(dtype, str) else None
        if not isinstance(dtype, str) or size is None:
            raise CorruptCheckpointError(f"is of the dtype {brief(dtype)}")
        if not is_list(shape) or len(shape) > _NDIM or not _are_lengths(shape):
            raise CorruptCheckpointError(f"has the shape {brief(shape)}")
        if math.prod(shape) * size > BYTES:
            raise CorruptCheckpointError(
                f"has the shape {brief(shape)}, more than any disk holds"
            )
        if kind.startswith(_KEY):
            return cls(tuple(shape), dtype, kind.removeprefix(_KEY))
        return cls(tuple(shape), dtype, kind=kind)


class Computed(NamedTuple):
    """A call that makes an average which is computed when it is read."""

    maker: str
    arguments: dict[str, float]

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.maker}({given})"


@dataclasses.dataclass(frozen=True, slots=True)
class AverageEntry:
    """How a shadow was made.

    Attributes:
        decay: What it was averaged with; None where that cannot be written down.
        every: Updates between its folds; None where unknown.
        count: Updates it has seen.
        bema: Arguments of each `bema_params` that it comes from.
        ring: Arguments of each `ring` that it comes from.
        unread: The JSON of a decay that this version cannot read; `decay` is then None.
        places: Where in the params the averaged tree sits, by the place of its state in
            the optimizer state; those of which it is the whole are left out.
    """

    decay: Decay | None
    every: int | None
    count: Count
    bema: tuple[Mapping[str, float], ...] = ()
    unread: Mapping[str, Json] | None = None
    places: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    ring: tuple[Mapping[str, float], ...] = ()

    @property
    def computed(self) -> tuple["Computed", ...]:
        """What computes it when it is read, but for what the average of others is."""
        return (
            *(Computed("bema_params", dict(each)) for each in self.bema),
            *(Computed("ring", dict(each)) for each in self.ring),
        )

    def to_json(self) -> dict[str, object]:
        """Its part of the manifest.

        Raises:
            TypeError: If the decay is, or holds, a plain callable.
        """
        written = json.loads(self.decay.to_json()) if self.decay else self.unread
        entry: dict[str, object] = {
            "decay": written,
            "every": self.every,
            "count": self.count,
        }
        if self.bema:
            entry["bema"] = [dict(arguments) for arguments in self.bema]
        if self.ring:
            entry["ring"] = [dict(arguments) for arguments in self.ring]
        if self.places:
            entry["places"] = dict(self.places)
        return entry

    @classmethod
    def parse(cls, content: object) -> "AverageEntry":
        """Makes an entry of JSON, or raises `CorruptCheckpointError` that says why."""
        if not is_object(content) or not {"decay", "every", "count"} <= set(content):
            raise CorruptCheckpointError("lacks decay, every or count")
        decay, every, count = content["decay"], content["every"], content["count"]
        if decay is not None and not is_object(decay):
            raise CorruptCheckpointError(f"has the decay {brief(decay)}")
        if every is not None and not (is_whole(every) and 1 <= every < _INT):
            raise CorruptCheckpointError(f"has every={brief(every)}")
        if not _is_count(count):
            raise CorruptCheckpointError(f"has the count {brief(count)}")
        bema = _arguments(content.get("bema", []), "bema_params")
        ring = _arguments(content.get("ring", []), "ring")
        places = content.get("places", {})
        if not is_object(places) or not _are_texts(places):
            raise CorruptCheckpointError(f"has the places {brief(places)}")
        if is_deep(content):
            raise CorruptCheckpointError(f"is nested more than {DEPTH} deep")
        try:
            known, unread = Decay.from_json(decay) if decay is not None else None, None
        except ValueError:
            known, unread = None, cast("dict[str, Json]", decay)
        return cls(known, every, count, bema, unread, places, ring)


@dataclasses.dataclass(frozen=True, slots=True)
class TreeEntry:
    """A tree on disk.

    Attributes:
        structure: Dicts and lists as Orbax nests them, with the paths of its leaves.
        leaves: By path. Of a shadow: those that are averaged.
        average: How a shadow was made; None of other trees.
    """

    structure: Structure
    leaves: Mapping[str, LeafEntry]
    average: AverageEntry | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all its leaves."""
        return sum(leaf.bytes for leaf in self.leaves.values())

    @property
    def decay(self) -> Decay | None:
        """What a shadow was averaged with, where that can be written down."""
        return self.average.decay if self.average else None

    @property
    def every(self) -> int | None:
        """Updates between the folds of a shadow."""
        return self.average.every if self.average else None

    @property
    def count(self) -> Count | None:
        """Updates that a shadow has seen; a list where states were vmapped."""
        return self.average.count if self.average else None

    def to_json(self) -> dict[str, object]:
        """Its part of the manifest, but for the average."""
        leaves = {path: leaf.to_json() for path, leaf in self.leaves.items()}
        return {"structure": self.structure, "leaves": leaves}

    @classmethod
    def parse(cls, content: object, average: AverageEntry | None) -> "TreeEntry":
        """Makes an entry of JSON, or raises `CorruptCheckpointError` that says why."""
        if not is_object(content) or not {"structure", "leaves"} <= set(content):
            raise CorruptCheckpointError("has no structure or no leaves")
        if not is_object(content["leaves"]):
            raise CorruptCheckpointError("has no leaves by path")
        leaves: dict[str, LeafEntry] = {}
        for path, leaf in content["leaves"].items():
            try:
                check_place(path)
                leaves[path] = LeafEntry.parse(leaf)
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(
                    f"has a leaf {brief(path)} that {error}"
                ) from None
        structure = content["structure"]
        _check_structure(structure, set(leaves))
        return cls(cast("Structure", structure), leaves, average)


def check_place(path: str) -> None:
    """Raises `CorruptCheckpointError` where a path cannot be that of a leaf."""
    if problem := misplaced(path):
        raise CorruptCheckpointError(problem)


def _check_structure(structure: object, leaves: set[str]) -> None:
    left = set(leaves)
    for node, depth in nodes(structure):
        if depth > DEPTH:
            raise CorruptCheckpointError(f"is nested more than {DEPTH} deep")
        if isinstance(node, str):
            if node not in left:
                what = "twice" if node in leaves else "and no such leaf"
                raise CorruptCheckpointError(
                    f"has the path {brief(node)} in its structure {what}"
                )
            left.remove(node)
        elif is_object(node):
            for key in node:
                if problem := misplaced(key):
                    raise CorruptCheckpointError(
                        f"has a key {brief(key)} that {problem}"
                    )
        elif node is not None and not is_list(node):
            raise CorruptCheckpointError(f"has {brief(node)} in its structure")
    if left:
        raise CorruptCheckpointError(
            f"has a leaf {brief(min(left))} that is not in its structure"
        )


def _are_lengths(shape: list[object]) -> TypeGuard[list[int]]:
    return all(is_whole(n) and n >= 0 for n in shape)


def _is_count(value: object) -> TypeGuard[Count]:
    return all(
        depth < _NDIM if is_list(node) else is_whole(node) and 0 <= node < _INT
        for node, depth in nodes(value)
    )


def _are_texts(value: Mapping[str, object]) -> TypeGuard[Mapping[str, str]]:
    return all(isinstance(text, str) for text in value.values())


def _arguments(value: object, call: str) -> tuple[Mapping[str, float], ...]:
    """Returns the arguments of each call of a maker of averages."""
    if not is_list(value) or not all(map(_is_arguments, value)):
        raise CorruptCheckpointError(f"has the arguments {brief(value)} of {call}")
    return tuple(cast("list[dict[str, float]]", value))


def _is_arguments(value: object) -> bool:
    """Whether JSON is an object of numbers."""
    return is_object(value) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in value.values()
    )
