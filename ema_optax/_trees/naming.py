"""Names of trees: of a training state in memory, and of a step on disk."""

from collections.abc import Collection

from ema_optax._messages.text import brief

PARAMS, SHADOW = "params", "shadow"


def tree_of(name: str) -> str:
    """Name of a shadow's tree: `shadow/NAME`, or `shadow` without a name."""
    return f"{SHADOW}/{name}" if name else SHADOW


def name_of(tree: str) -> str:
    """Name of the shadow in a tree: the inverse of `tree_of`."""
    return tree.removeprefix(SHADOW).removeprefix("/")


def chosen(asked: str, trees: Collection[str], call: str) -> str:
    """Finds the tree that a name means.

    A shadow is meant by its own name, `fast`, and by that of its tree, `shadow/fast`;
    an only shadow also by `shadow`, whatever its name. `params` are always the raw
    params, and `shadow/` is always the shadow without a name.

    Args:
        asked: The name that the user passed.
        trees: Names of all trees.
        call: The user's call, up to the name: `"Pass tree="`.

    Raises:
        ValueError: If there is no such tree, or two may be meant.

    >>> chosen("fast", ["params", "shadow/fast", "shadow/slow"], "Pass tree=")
    'shadow/fast'
    >>> chosen("shadow", ["params", "shadow/fast"], "Pass tree=")
    'shadow/fast'
    """
    candidates = {SHADOW if asked == f"{SHADOW}/" else asked}
    if "/" not in asked and asked != PARAMS:
        candidates.add(f"{SHADOW}/{asked}")
    meant = sorted(candidates & set(trees))
    named = [tree for tree in trees if tree.startswith(f"{SHADOW}/")]
    if asked == SHADOW and not meant and len(named) == 1:
        meant = named
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(
            f"{asked!r} may be the shadow without a name or the one of that name. "
            f"{call}'{SHADOW}/' for the one without, or {call}{tree_of(asked)!r}."
        )
    names = spelled(trees)
    listed = ", ".join(map(repr, names))
    raise ValueError(
        f"There is no tree {brief(asked)}; there are {listed}. {call}{names[-1]!r}."
    )


def spelled(trees: Collection[str]) -> list[str]:
    """Lists the shortest name of each tree."""
    names = ((name_of(tree), tree) for tree in trees)
    return [tree if name in ("", PARAMS, SHADOW) else name for name, tree in names]
