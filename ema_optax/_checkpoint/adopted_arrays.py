"""Reads the arrays to adopt leaf by leaf, checks them, and nests them as they were."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ema_optax._checkpoint.foreign import Foreign, Leaf, Node, check_memory
from ema_optax._checkpoint.layouts import size
from ema_optax._checkpoint.pairing import Choice
from ema_optax._messages import progress
from ema_optax._messages.progress import Progress
from ema_optax._trees import trees

# Elements that are checked at once: their float64 copies take 32 MiB each.
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Params and average, read and checked.

    Attributes:
        params: As they were nested.
        shadow: The same, with None for the leaves that are not averaged.
        distance: Norm of average − params over that of the params, where averaged.
    """

    params: Any
    shadow: Any
    distance: float


def read(source: Foreign, choice: Choice, weight: float, bar: Progress) -> Arrays:
    """Reads params and average.

    Args:
        source: The checkpoint.
        choice: Which of its leaves to read.
        weight: The sum of the average's weights, > 0, by which it is divided.
        bar: How to show progress; see `reconstruction.merge`.

    Raises:
        MemoryError: If this machine cannot hold them.
        ValueError: If a value is not finite. Infinities that are alike in params and
            average are constants, such as masks, and are kept.
    """
    average = choice.average if choice.shadow is not None else {}
    check_memory(size(choice.leaves) + size(choice.average))
    params: dict[str, np.ndarray] = {}
    shadow: dict[str, np.ndarray] = {}
    squared_distance = squared_norm = 0.0
    total = len(choice.leaves) + len(average)
    with progress.shown(bar, f"Reading {source.place}", total) as report:
        for path, array in _by_name(source, choice.leaves):
            params[path] = array
            if choice.leaves[path].is_averaged:
                _refuse_nan(array, choice.leaves[path], source)
            report(len(params))
        for path, array in _by_name(source, average):
            leaf = average[path]
            divided = array if weight == 1.0 else _divided(array, weight)
            _refuse_infinite(divided, params[path], leaf, source)
            shadow[path] = divided
            squared_distance += _squares(divided, params[path])
            squared_norm += _squares(params[path], None)
            report(len(params) + len(shadow))
    if choice.shadow is None:
        shadow = {path: _wide(params[path]) for path in choice.average}
    return Arrays(
        _nested(source, choice, params),
        _nested(source, choice, shadow),
        math.sqrt(squared_distance / squared_norm) if squared_norm else 0.0,
    )


def is_narrow(dtype: str) -> bool:
    """Returns whether a floating dtype is narrower than float32."""
    return trees.wide(jnp.dtype(dtype)) != jnp.dtype(dtype)


def _by_name(
    source: Foreign, leaves: Mapping[str, Leaf]
) -> Iterator[tuple[str, np.ndarray]]:
    names = {leaf.path: path for path, leaf in leaves.items()}
    for path, array in source.read(list(names)):
        yield names[path], array


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(trees.wide(array.dtype), copy=False)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


def _divided(array: np.ndarray, weight: float) -> np.ndarray:
    """Divides an array in float64; returns its own dtype, or float32 if narrower."""
    quotient = np.empty(array.shape, trees.wide(array.dtype))
    for block, to in zip(_blocks(array), _blocks(quotient), strict=True):
        to[...] = _double(block) / weight
    return quotient


def _double(block: np.ndarray) -> np.ndarray:
    return block.astype(np.promote_types(_wide(block[:0]).dtype, np.float64))


def _refuse_nan(array: np.ndarray, leaf: Leaf, source: Foreign) -> None:
    count = sum(int(np.isnan(_wide(block)).sum()) for block in _blocks(array))
    if count:
        raise ValueError(_not_finite(leaf, count, source))


def _refuse_infinite(
    average: np.ndarray, param: np.ndarray, leaf: Leaf, source: Foreign
) -> None:
    count = 0
    for ours, theirs in zip(_blocks(average), _blocks(param), strict=True):
        ours, theirs = _wide(ours), _wide(theirs)
        finite = np.isfinite(ours) & np.isfinite(theirs)
        if not finite.all():
            count += int((~finite & ~(ours == theirs)).sum())
    if count:
        raise ValueError(_not_finite(leaf, count, source))


def _not_finite(leaf: Leaf, count: int, source: Foreign) -> str:
    return (
        f"'{leaf.path}' of {source.place} has {count:,} of {math.prod(leaf.shape):,} "
        "elements that are not finite, in the average or the params. Pass an earlier "
        "step of the run, from before it diverged."
    )


def _squares(array: np.ndarray, other: np.ndarray | None) -> float:
    """Sums the squares of an array, or of its difference to another, in float64."""
    total = 0.0
    others = [None] if other is None else _blocks(other)
    for block, subtrahend in zip(
        _blocks(array), others if other is not None else _none(array), strict=True
    ):
        double = _double(block)
        if subtrahend is not None:
            with np.errstate(invalid="ignore"):  # inf − inf, of constants such as masks
                double = double - _double(subtrahend)
        finite = np.abs(double[np.isfinite(double)])  # |z| of complex ones
        total += float(np.dot(finite, finite))
    return total


def _none(array: np.ndarray) -> Iterator[None]:
    for _ in _blocks(array):
        yield None


def _nested(source: Foreign, choice: Choice, arrays: Mapping[str, np.ndarray]) -> Any:
    """Nests arrays as the params are in the source."""
    names = {leaf.path: path for path, leaf in choice.leaves.items()}
    # Flax keeps each variable as {"value": array}; the array takes its place.
    without_value = any(
        path != f"{choice.params}/{name}".strip("/") for path, name in names.items()
    )
    node = _at(source.tree, choice.params)
    if node is None:  # the path ends inside a key
        return trees.nested(arrays)

    def filled(node: Node) -> Any:
        if isinstance(node, Mapping):
            inner = node.get("value")
            if without_value and len(node) == 1 and isinstance(inner, Leaf):
                return filled(inner)
            return {key: filled(child) for key, child in node.items()}
        if isinstance(node, list):
            return [filled(child) for child in node]
        return arrays.get(names[node.path]) if node is not None else None

    return filled(node)


def _at(node: Node, path: str) -> Node:
    """Returns the tree at a path, or None if it ends inside a key."""
    if path == "":
        return node
    children = (
        node.items()
        if isinstance(node, Mapping)
        else ((str(i), child) for i, child in enumerate(node))
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        if path == key:
            return child
        if path.startswith(f"{key}/"):
            below = _at(child, path[len(key) + 1 :])
            if below is not None:
                return below
    return None
