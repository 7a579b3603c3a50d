"""The leaves of a run by their paths, and the run with others in their places."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ema_optax._averages.average import Average
from ema_optax._checkpoint.manifest import SHADOW, Manifest
from ema_optax._checkpoint.restoring import without_elements
from ema_optax._checkpoint.step import is_empty
from ema_optax._messages.text import some
from ema_optax._trees import trees
from ema_optax._trees.locating import misfit, named_alike, outline_of, places_of, under


def by_path(tree: object, place: str = "") -> dict[str, Any]:
    """Returns the leaves of a tree that sits at a place; those with elements alone."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {trees.path_name(path): leaf for path, leaf in pairs}
    return {under(place, path): x for path, x in leaves.items() if not is_empty(x)}


def filled(tree: object, leaf_at: Callable[[str], Any], place: str = "") -> Any:
    """Returns a tree with other leaves, by their paths; what has no elements is made.

    Args:
        tree: Concrete or abstract.
        leaf_at: From a path, that of the place included, to the leaf.
        place: Where the tree sits.
    """

    def value(path: object, leaf: object) -> Any:
        if is_empty(leaf):
            return without_elements(leaf)
        return leaf_at(under(place, trees.path_name(path)))

    return jax.tree_util.tree_map_with_path(value, tree)


def stored_place(manifest: Manifest, average: Average, tree: str) -> str:
    """Returns where in the params on disk an average of the same path sits."""
    name = SHADOW if average.is_computed else tree
    entry = manifest.averages.get(name)
    return entry.places.get(average.path, "") if entry else ""


def place_in_run(average: Average, params: object, likely: set[str]) -> str:
    """Returns where in the params of this run an average sits.

    Args:
        average: Of this run.
        params: Of this run; more than what is averaged, or just that.
        likely: Where averages of the saved run sit, which decides between several.

    Raises:
        ValueError: If it sits nowhere, or may sit at several places.
    """
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {trees.path_name(path): np.shape(leaf) for path, leaf in pairs}
    outline = outline_of(average.tree)
    places = places_of(outline, shapes)
    for choice in (
        named_alike(places, average.path),
        [place for place in places if place in likely],
    ):
        places = (choice or places) if len(places) > 1 else places
    if len(places) == 1:
        return places[0]
    if not places:
        path = misfit(outline, shapes, "")
        raise ValueError(
            f"The average at '{average.path}' does not sit in these params: it has "
            f"'{path}'. Pass the params, or the variables with the params among them, "
            "that optimizer.init was given."
        )
    raise ValueError(
        f"The average at '{average.path}' fits these params at several places: "
        f"{some(map(repr, places), 8)}. Resume each of them on its own, with the part "
        "of the params and of the optimizer state that belong together."
    )
