"""The arrays that are adopted: read leaf by leaf, checked, and nested as they were."""

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

_BLOCK = 2**22  # elements that are checked at once


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Params and average.

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
        choice: What is read of it.
        weight: What the average is divided by: the sum of its weights.
        bar: Whether to draw how far it is.

    Raises:
        MemoryError: If this machine cannot hold them.
        ValueError: If a value is not finite. Infinities that are alike in params and
            average are constants, such as masks, and are kept.
    """
    average = choice.average if choice.shadow is not None else {}
    check_memory(size(choice.leaves) + size(choice.average))
    params: dict[str, np.ndarray] = {}
    shadow: dict[str, np.ndarray] = {}
    apart = whole = 0.0
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
            apart += _squares(divided, params[path])
            whole += _squares(params[path], None)
            report(len(params) + len(shadow))
    if choice.shadow is None:
        shadow = {path: _wide(params[path]) for path in choice.average}
    return Arrays(
        _nested(source, choice, params),
        _nested(source, choice, shadow),
        math.sqrt(apart / whole) if whole else 0.0,
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
    """Returns an array divided in float64, as its own dtype, or float32 if narrower."""
    made = np.empty(array.shape, trees.wide(array.dtype))
    for block, to in zip(_blocks(array), _blocks(made), strict=True):
        to[...] = _double(block) / weight
    return made


def _double(block: np.ndarray) -> np.ndarray:
    return block.astype(np.promote_types(_wide(block[:0]).dtype, np.float64))


def _refuse_nan(array: np.ndarray, leaf: Leaf, source: Foreign) -> None:
    bad = sum(int(np.isnan(_wide(block)).sum()) for block in _blocks(array))
    if bad:
        raise ValueError(_not_finite(leaf, bad, source))


def _refuse_infinite(
    average: np.ndarray, param: np.ndarray, leaf: Leaf, source: Foreign
) -> None:
    bad = 0
    for ours, theirs in zip(_blocks(average), _blocks(param), strict=True):
        ours, theirs = _wide(ours), _wide(theirs)
        finite = np.isfinite(ours) & np.isfinite(theirs)
        if not finite.all():
            bad += int((~finite & ~(ours == theirs)).sum())
    if bad:
        raise ValueError(_not_finite(leaf, bad, source))


def _not_finite(leaf: Leaf, bad: int, source: Foreign) -> str:
    return (
        f"'{leaf.path}' of {source.place} has {bad:,} of {math.prod(leaf.shape):,} "
        "elements that are not finite, in the average or the params. Pass an earlier "
        "step of the run, from before it diverged."
    )


def _squares(array: np.ndarray, other: np.ndarray | None) -> float:
    """Returns the sum of squares of an array, or of its difference to another."""
    total = 0.0
    others = [None] if other is None else _blocks(other)
    for block, less in zip(
        _blocks(array), others if other is not None else _none(array), strict=True
    ):
        double = _double(block)
        if less is not None:
            with np.errstate(invalid="ignore"):  # of infinities that are alike
                double = double - _double(less)
        size_ = np.abs(double[np.isfinite(double)])
        total += float(np.dot(size_, size_))
    return total


def _none(array: np.ndarray) -> Iterator[None]:
    for _ in _blocks(array):
        yield None


def _nested(source: Foreign, choice: Choice, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns arrays nested as the params are in the source."""
    names = {leaf.path: path for path, leaf in choice.leaves.items()}
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
            found = _at(child, path[len(key) + 1 :])
            if found is not None:
                return found
    return None
