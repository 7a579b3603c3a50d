"""Trees leaf by leaf: their paths, their placeholders, and where two of them differ."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_placeholder(node: object) -> bool:
    """Whether a node stands for a leaf that is not averaged."""
    return isinstance(node, optax.MaskedNode)


def wide(dtype: Any) -> np.dtype:
    """Returns the dtype in which a leaf is computed: its own, or float32 if narrower.

    NumPy's promotion, which JAX's `jax_numpy_dtype_promotion="strict"` leaves alone.

    >>> wide(jnp.bfloat16), wide(jnp.complex64)
    (dtype('float32'), dtype('complex64'))
    """
    return np.promote_types(dtype, np.float32)


def flatten(tree: object) -> tuple[list[str], list[Any], Any]:
    """Returns the paths, leaves and structure of a tree; placeholders count as leaves.

    >>> flatten({"a": [1, optax.MaskedNode()], "b": None})[:2]
    (['a/0', 'a/1'], [1, MaskedNode()])
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=is_placeholder
    )
    return (
        [path_name(path) for path, _ in pairs],
        [leaf for _, leaf in pairs],
        structure,
    )


def path_name(path: Any) -> str:
    """Returns a key path as text, its keys joined by slashes.

    The `.value` of Flax's variables is left out: an `nnx.State` and a dict of its
    arrays have the same paths.
    """
    value = jax.tree_util.GetAttrKey("value")
    keys = path[:-1] if len(path) > 1 and path[-1] == value else path
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def arranged(tree: object, like: object) -> Any:
    """Rebuilds an averaged tree in the structure of another with the same paths.

    So arrays inside Flax's variables fit plain arrays, and a dict fits a State. A
    placeholder stands for all leaves at or below its path: `optax.masked` puts one
    where its mask is False for a whole part. Where paths differ otherwise, or two
    leaves share one, the tree is returned as it is.

    >>> arranged({"a": optax.MaskedNode(), "b": 1}, {"a": {"v": 2, "w": 3}, "b": 4})
    {'a': {'v': MaskedNode(), 'w': MaskedNode()}, 'b': 1}
    """
    tree = _spread(tree, like)
    paths, leaves, structure = flatten(tree)
    like_paths, _, like_structure = flatten(like)
    if structure == like_structure or len(set(paths)) < len(paths):
        return tree
    by_path = dict(zip(paths, leaves, strict=True))
    masked = {path for path, leaf in by_path.items() if is_placeholder(leaf)}
    sources = [path if path in by_path else _above(path, masked) for path in like_paths]
    known = [source for source in sources if source is not None]
    if len(known) < len(like_paths) or set(known) != set(paths):
        return tree
    return jax.tree.unflatten(like_structure, [by_path[source] for source in known])


def _spread(tree: object, like: object) -> Any:
    """Replaces a placeholder for a part of another tree by one for each of its leaves.

    Parts without leaves, as an empty dict, have no path: the structures tell of them.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_placeholder)
    try:
        parts = structure.flatten_up_to(like)
    except ValueError:  # of other containers: their paths may still be the same
        return tree
    spread = [
        jax.tree.map(lambda _: optax.MaskedNode(), part, is_leaf=is_placeholder)
        if is_placeholder(leaf)
        else leaf
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    return jax.tree.unflatten(structure, spread)


def _above(path: str, places: Collection[str]) -> str | None:
    """Finds the place that lies above a path, or None."""
    parents = [path[:i] for i, letter in enumerate(path) if letter == "/"]
    return next((place for place in ("", *parents) if place in places), None)


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nests leaves by path in dicts.

    Raises:
        ValueError: If the path of a leaf is the beginning of another.

    >>> nested({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    above = {path[:i] for path in leaves for i in range(len(path)) if path[i] == "/"}
    for path, leaf in leaves.items():
        if path in above:
            raise ValueError(
                f"'{path}' is a leaf and the beginning of other paths, which nested "
                "dicts cannot hold. Pass like=…, a tree that has the keys as they were."
            )
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def describe(leaf: Any) -> str:
    """Writes dtype and shape of a leaf, such as `float32[2,3]`; else its value."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return "not averaged" if is_placeholder(leaf) else repr(leaf)


def difference(ours: object, theirs: object, names: tuple[str, str]) -> str | None:
    """Describes where the structures or shapes of two trees first differ, or None.

    Args:
        ours: A tree.
        theirs: The tree it should match. A placeholder in ours fits any leaf of it, and
            is no difference where it lies above leaves.
        names: Names of the two in the description.
    """
    our_paths, our_leaves, our_structure = flatten(ours)
    their_paths, their_leaves, their_structure = flatten(theirs)
    if our_structure != their_structure:
        pairs = zip(our_paths, our_leaves, strict=True)
        masked = {path for path, leaf in pairs if is_placeholder(leaf)}
        below = {path for path in their_paths if _above(path, masked) is not None}
        above = {_above(path, masked) for path in below}
        for mine, other, name in (
            (our_paths, {*their_paths, *above}, names[0]),
            (their_paths, {*our_paths, *below}, names[1]),
        ):
            alone = [path for path in mine if path not in other]
            if alone:
                more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
                return f"'{alone[0]}'{more} is only in the {name}"
        mine, other = (
            f"{str(each).removeprefix('PyTreeDef(')[:60]}…"
            for each in (our_structure, their_structure)
        )
        return (
            f"the {names[0]} is built of {mine} and the {names[1]} of {other}, with "
            "the same leaves"
        )
    for path, mine, other in zip(our_paths, our_leaves, their_leaves, strict=True):
        if is_placeholder(mine):
            continue
        if is_placeholder(other) or jnp.shape(mine) != jnp.shape(other):
            return (
                f"'{path}' is {describe(mine)} in the {names[0]} and {describe(other)} "
                f"in the {names[1]}"
            )
    return None
