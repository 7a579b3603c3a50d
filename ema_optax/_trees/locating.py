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
    """Outlines an averaged tree: its averaged leaves, and the paths of the others."""
    paths, leaves, _ = trees.flatten(tree)
    pairs = list(zip(paths, leaves, strict=True))
    return Outline(
        {path: np.shape(x) for path, x in pairs if not trees.is_placeholder(x)},
        frozenset(path for path, x in pairs if trees.is_placeholder(x)),
    )


def under(place: str, path: str) -> str:
    """Joins the place of a tree and the path of a leaf in it; either may be empty.

    >>> under("params", "dense/kernel"), under("", "w"), under("0", "")
    ('params/dense/kernel', 'w', '0')
    """
    return f"{place}/{path}" if place and path else place or path


def places_of(outline: Outline, leaves: Shapes) -> list[str]:
    """Lists the places where an averaged tree can sit inside another; `""` is the root.

    A place is one below which each averaged leaf has a leaf of the same path and shape.
    Where the two trees have the same leaves, the root is the only answer. A place with
    further leaves counts too, as the optimizer may have been given a part of it.

    >>> outline = Outline({"w": (2,)})
    >>> places_of(outline, {"params/w": (2,), "stats/mean": (2,)})
    ['params']
    >>> places_of(outline, {"generator/w": (2,), "critic/w": (2,)})
    ['generator', 'critic']
    """
    if not outline.shapes or _is_whole(outline, leaves):
        return [""]
    # Candidates are the places where the leaf with the longest path fits.
    path = max(outline.shapes, key=len)
    shape, end = outline.shapes[path], f"/{path}" if path else ""
    candidates = [
        other.removesuffix(path).removesuffix("/") if path else other
        for other, other_shape in leaves.items()
        if other_shape == shape and (other == path or other.endswith(end))
    ]
    return [place for place in candidates if misfit(outline, leaves, place) is None]


def misfit(outline: Outline, leaves: Shapes, place: str) -> str | None:
    """Finds the first averaged leaf that does not fit at a place, or None."""
    for path, shape in outline.shapes.items():
        if leaves.get(under(place, path)) != shape:
            return path
    return None


def nearest_misfit(outline: Outline, leaves: Shapes) -> str:
    """Finds the first averaged leaf that fits nowhere, else the first one."""
    ends: dict[str, set[Shape]] = {}
    for other, shape in leaves.items():
        ends.setdefault(other.rpartition("/")[2], set()).add(shape)
    return next(
        (
            path
            for path, shape in outline.shapes.items()
            if shape not in ends.get(path.rpartition("/")[2], set())
        ),
        next(iter(outline.shapes)),
    )


def named_alike(places: Iterable[str], path: str) -> list[str]:
    """Selects the places that begin the path of an average's state.

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
