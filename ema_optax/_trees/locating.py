"""Where an averaged tree sits inside the tree that is saved, by paths and shapes.

What is saved may be more than the params: variables with statistics beside them, a pair
of params and state, two networks. The shadow is stored at the paths of the leaves that
it averages, so that it is read into their slots and no others.
"""

# pyright: strict

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

from ema_optax._trees import trees

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]


@dataclasses.dataclass(frozen=True)
class Outline:
    """Paths and shapes of an averaged tree.

    Attributes:
        shapes: Of the leaves that are averaged, by path.
        others: Paths at or below which lie leaves that are not.
    """

    shapes: Shapes
    others: frozenset[str] = frozenset()


def outline_of(tree: object) -> Outline:
    """Returns the outline of an averaged tree, placeholders and all."""
    paths, leaves, _ = trees.flatten(tree)
    pairs = list(zip(paths, leaves, strict=True))
    return Outline(
        {path: np.shape(x) for path, x in pairs if not trees.is_placeholder(x)},
        frozenset(path for path, x in pairs if trees.is_placeholder(x)),
    )


def under(place: str, path: str) -> str:
    """Returns the path of a leaf of a tree that sits at a place; either may be empty.

    >>> under("params", "dense/kernel"), under("", "w"), under("0", "")
    ('params/dense/kernel', 'w', '0')
    """
    return f"{place}/{path}" if place and path else place or path


def places_of(outline: Outline, leaves: Shapes) -> list[str]:
    """Returns where an averaged tree can sit inside another tree: `""` is the whole.

    It sits where each of its averaged leaves has one of the same path and shape. Where
    it is the whole, leaf by leaf, that is the only answer. A place with further leaves
    counts too, as the optimizer may have been given a part of it.

    >>> outline = Outline({"w": (2,)})
    >>> places_of(outline, {"params/w": (2,), "stats/mean": (2,)})
    ['params']
    >>> places_of(outline, {"generator/w": (2,), "critic/w": (2,)})
    ['generator', 'critic']
    """
    if not outline.shapes or _is_whole(outline, leaves):
        return [""]
    # The candidates are where one leaf of it fits: the one with the longest path.
    path = max(outline.shapes, key=len)
    shape, end = outline.shapes[path], f"/{path}" if path else ""
    candidates = [
        at.removesuffix(path).removesuffix("/") if path else at
        for at, other in leaves.items()
        if other == shape and (at == path or at.endswith(end))
    ]
    return [place for place in candidates if misfit(outline, leaves, place) is None]


def misfit(outline: Outline, leaves: Shapes, place: str) -> str | None:
    """Returns the first averaged leaf that does not fit at a place, or None."""
    for path, shape in outline.shapes.items():
        if leaves.get(under(place, path)) != shape:
            return path
    return None


def nearest_misfit(outline: Outline, leaves: Shapes) -> str:
    """Returns the first averaged leaf that fits nowhere, or the first one."""
    ends: dict[str, set[Shape]] = {}
    for at, shape in leaves.items():
        ends.setdefault(at.rpartition("/")[2], set()).add(shape)
    return next(
        (
            path
            for path, shape in outline.shapes.items()
            if shape not in ends.get(path.rpartition("/")[2], set())
        ),
        next(iter(outline.shapes)),
    )


def named_alike(places: Iterable[str], path: str) -> list[str]:
    """Returns those of some places whose keys begin the path of an average's state.

    >>> named_alike(["generator", "critic"], "generator/1")
    ['generator']
    """
    return [place for place in places if place and f"{path}/".startswith(f"{place}/")]


def _is_whole(outline: Outline, leaves: Shapes) -> bool:
    if misfit(outline, leaves, "") is not None:
        return False
    return all(
        path in outline.shapes or _is_at_or_below(path, outline.others)
        for path in leaves
    )


def _is_at_or_below(path: str, places: frozenset[str]) -> bool:
    ends = [i for i, letter in enumerate(path) if letter == "/"]
    return any(path[:end] in places for end in (*ends, len(path))) or "" in places
