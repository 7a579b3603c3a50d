"""Matches the parts of one optimizer state to those of another, by name.

A path of a state is split into the place of a node, the field of it, and the path of a
param: `1/0/mu/dense/kernel` is the moment `mu` of `dense/kernel` in the node `1/0`. A
transform in front of others shifts the places and leaves the fields.
"""

# pyright: strict

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from ema_optax._checkpoint.entries import Structure
from ema_optax._trees.locating import under


class Part(NamedTuple):
    """A path of an optimizer state, split.

    Attributes:
        node: Place of the node, such as `1/0`.
        field: Field of the node, such as `mu`.
        param: Path of a param, in the tree that the optimizer was given; None where
            the leaf belongs to no param.
    """

    node: str
    field: str
    param: str | None


class Node(NamedTuple):
    """A node of a state that has leaves.

    Attributes:
        path: Its place in the state.
        fields: Names of its fields, sorted, fields without leaves included; None for a
            plain sequence.
        params: The params that it has leaves of, by their possible names on disk.
    """

    path: str
    fields: tuple[str, ...] | None
    params: frozenset[str]


def split(path: str, params: Container[str]) -> Part:
    """Splits a path at the longest end that is the path of a param.

    >>> split("1/0/mu/dense/kernel", {"kernel", "dense/kernel"})
    Part(node='1/0', field='mu', param='dense/kernel')
    >>> split("1/0/count", {"dense/kernel"})
    Part(node='1/0', field='count', param=None)
    """
    keys = path.split("/")
    for i in range(1, len(keys) + 1):
        param = "/".join(keys[i:])
        if param in params:
            return Part("/".join(keys[: i - 1]), keys[i - 1], param)
    return Part("/".join(keys[:-1]), keys[-1], None)


def joined(node: str, part: Part, param: str | None) -> str:
    """Returns the path of the same field and param in another node."""
    path = under(node, part.field)
    return under(path, param) if param else path


def nodes_of(
    parts: Mapping[str, Part],
    structure: Structure,
    names: Mapping[str, Collection[str]],
) -> dict[str, Node]:
    """Returns the nodes of a state by their places, in order.

    Args:
        parts: Its paths, split.
        structure: Of the state, as Orbax nests it.
        names: By path, the possible names on disk of the param of a leaf.
    """
    members: dict[str, set[str]] = {}
    for path, part in parts.items():
        members.setdefault(part.node, set()).update(names.get(path, ()))
    return {
        path: Node(path, _fields(structure, path), frozenset(those))
        for path, those in members.items()
    }


def matched(
    ours: Iterable[Node], stored: Iterable[Node]
) -> tuple[dict[str, str], dict[str, str]]:
    """Finds for each node its stored one.

    Nodes with the same fields match where each side has one. Of several, two match
    that alone have params in common. The others match in their order where as many are
    left on both sides, else at the same place.

    Returns:
        The places of the nodes that match, and for the others the reason.
    """
    by_fields: dict[object, tuple[list[Node], list[Node]]] = {}
    for side, nodes in enumerate((ours, stored)):
        for node in nodes:
            kind = node.path if node.fields is None else node.fields
            by_fields.setdefault((node.fields is None, kind), ([], []))[side].append(
                node
            )
    places: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for mine, theirs in by_fields.values():
        places |= _matched(mine, theirs)
        for node in mine:
            if node.path in places:
                continue
            fields = ", ".join(node.fields or ()) or "this place"
            reasons[node.path] = (
                f"of the states of {fields} here are {len(mine)} and in the "
                f"checkpoint {len(theirs)}, and which is which is not known"
                if theirs
                else f"the checkpoint has no state of {fields}"
            )
    return places, reasons


# Fields of the states whose averages are computed: BEMA's, and a ring's.
_COMPUTED = ({"count", "average", "anchor"}, {"count", "slots", "made_by"})


def average_nodes(structure: Structure, at: str = "") -> dict[str, bool]:
    """Returns the places of averages' states, and whether each is a computed one.

    The shadow of `ema_params` is a tree of its own: what is left of its state is a
    count beside nothing. Structures are of bounded depth.
    """
    places: dict[str, bool] = {}
    if isinstance(structure, list):
        for i, node in enumerate(structure):
            places |= average_nodes(node, under(at, str(i)))
    elif isinstance(structure, dict):
        if _is_ema(structure) or any(set(structure) >= own for own in _COMPUTED):
            return {at: not _is_ema(structure)}
        for key, node in structure.items():
            places |= average_nodes(node, under(at, key))
    return places


def _is_ema(structure: Mapping[str, Structure]) -> bool:
    return (
        set(structure) <= {"count", "shadow", "made_by"}
        and isinstance(structure.get("count"), str)
        and structure.get("shadow", "") is None
        and structure.get("made_by") is None
    )


def _matched(mine: Sequence[Node], theirs: Sequence[Node]) -> dict[str, str]:
    if len(mine) == len(theirs) == 1:
        return {mine[0].path: theirs[0].path}
    sharing = {
        node.path: [other.path for other in theirs if node.params & other.params]
        for node in mine
    }
    places: dict[str, str] = {}
    for node in mine:
        rivals = [other for other in mine if other is not node]
        if len(sharing[node.path]) == 1 and not any(
            node.params & rival.params for rival in rivals
        ):
            places[node.path] = sharing[node.path][0]
    rest = [node.path for node in mine if node.path not in places]
    left = [other.path for other in theirs if other.path not in places.values()]
    if len(rest) == len(left):
        return places | dict(zip(rest, left, strict=True))
    return places | {path: path for path in rest if path in left}


def _fields(structure: Structure, path: str) -> tuple[str, ...] | None:
    node = structure
    for key in path.split("/") if path else ():
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return tuple(sorted(node)) if isinstance(node, dict) else None
