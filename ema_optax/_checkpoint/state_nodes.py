"""Which part of one optimizer state is which part of another: by names, not positions.

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
        field: Of the node, such as `mu`.
        param: Path of a param as the optimizer was given it; None if it is of none.
    """

    node: str
    field: str
    param: str | None


class Node(NamedTuple):
    """A node of a state that has leaves.

    Attributes:
        path: Where it is.
        fields: What it consists of, sorted, fields without leaves included; None where
            it is no more than a sequence.
        params: The params that it has leaves of, as they may be called on disk.
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
    """Returns the path of the same field in a node that is elsewhere."""
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
        names: By path, what the param of a leaf may be called on disk.
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
    """Finds for each node the stored one that is the same.

    Nodes of the same fields are the same where each side has one. Of several, those are
    that alone have params in common; the others in their order where as many are left
    on both sides, else at the same place.

    Returns:
        The places of those found, and for the others why there is none.
    """
    by_fields: dict[object, tuple[list[Node], list[Node]]] = {}
    for side, nodes in enumerate((ours, stored)):
        for node in nodes:
            kind = node.path if node.fields is None else node.fields
            by_fields.setdefault((node.fields is None, kind), ([], []))[side].append(
                node
            )
    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for mine, theirs in by_fields.values():
        found |= _matched(mine, theirs)
        for node in mine:
            if node.path in found:
                continue
            fields = ", ".join(node.fields or ()) or "this place"
            reasons[node.path] = (
                f"of the states of {fields} here are {len(mine)} and in the "
                f"checkpoint {len(theirs)}, and which is which is not known"
                if theirs
                else f"the checkpoint has no state of {fields}"
            )
    return found, reasons


# Fields of the states whose averages are computed: BEMA's, and a ring's.
_COMPUTED = ({"count", "average", "anchor"}, {"count", "slots", "made_by"})


def average_nodes(structure: Structure, at: str = "") -> dict[str, bool]:
    """Returns the places of averages' states, and whether each is a computed one.

    The shadow of `ema_params` is a tree of its own: what is left of its state is a
    count beside nothing. Structures are of bounded depth.
    """
    found: dict[str, bool] = {}
    if isinstance(structure, list):
        for i, node in enumerate(structure):
            found |= average_nodes(node, under(at, str(i)))
    elif isinstance(structure, dict):
        if _is_ema(structure) or any(set(structure) >= own for own in _COMPUTED):
            return {at: not _is_ema(structure)}
        for key, node in structure.items():
            found |= average_nodes(node, under(at, key))
    return found


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
    found: dict[str, str] = {}
    for node in mine:
        rivals = [other for other in mine if other is not node]
        if len(sharing[node.path]) == 1 and not any(
            node.params & rival.params for rival in rivals
        ):
            found[node.path] = sharing[node.path][0]
    rest = [node.path for node in mine if node.path not in found]
    left = [other.path for other in theirs if other.path not in found.values()]
    if len(rest) == len(left):
        return found | dict(zip(rest, left, strict=True))
    return found | {path: path for path in rest if path in left}


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
