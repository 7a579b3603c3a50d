"""Restores a chosen tree into the slots of a model."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ema_optax._checkpoint.entries import LeafEntry, Structure
from ema_optax._checkpoint.leaves import Place, elsewhere, read
from ema_optax._checkpoint.manifest import (
    PARAMS,
    STATE,
    Manifest,
    read_manifest,
)
from ema_optax._checkpoint.processes import agreed
from ema_optax._checkpoint.step import is_empty, is_key
from ema_optax._checkpoint.targets import default_target, target_of
from ema_optax._messages import text
from ema_optax._placement import leaf_placement
from ema_optax._trees import naming, trees
from ema_optax._trees.locating import Outline, misfit, places_of, under
from ema_optax._trees.renaming import Renames

SLOTS = "slots of `like` to stored paths"  # what `rename` maps


def restore_tree(
    item: epath.Path,
    tree: str,
    like: object,
    rename: Mapping[str, str] | None,
    *,
    verify: bool,
) -> Any:
    """Restores one tree of an item into the slots of `like`, or as a nested dict.

    Leaves that are not averaged come from the params. See `checkpoint.restore`.
    """
    manifest = shared_manifest(item)
    tree = chosen(manifest, tree)
    sources = sources_of(manifest, tree)
    if like is None:
        if rename:
            raise ValueError(
                "rename maps the slots of `like` to stored paths: pass like=…, for "
                "example jax.eval_shape(model.init, …)."
            )
        wanted = {
            path: (place, default_target(manifest.leaf(place)))
            for path, place in sources.items()
        }
        return trees.nested(read(item, manifest, wanted, verify=verify))
    pairs, structure = jax.tree_util.tree_flatten_with_path(like)
    slots = {trees.path_name(path): leaf for path, leaf in pairs}
    sources = _seen_from(slots, sources, manifest) if not rename else sources
    places = _places(slots, sources, rename or {}, tree)
    wanted, meshes = {}, leaf_placement.meshes_of(like)
    for slot, place in places.items():
        check_fits(manifest.leaf(place), slots[slot], slot, exact=False)
        wanted[slot] = place, target_of(slots[slot], manifest.leaf(place), meshes)
    _check_averaged(places, manifest, tree)
    leaves = read(item, manifest, wanted, verify=verify)
    filled = [
        leaves[slot] if slot in leaves else without_elements(leaf)
        for slot, leaf in slots.items()
    ]
    return jax.tree.unflatten(structure, filled)


def restore_raw(item: epath.Path) -> Any:
    """Restores the params of an item as Orbax nests them, and verifies them."""
    manifest = shared_manifest(item)
    places = sources_of(manifest, chosen(manifest, PARAMS))
    wanted = {
        path: (place, default_target(manifest.leaf(place)))
        for path, place in places.items()
    }
    leaves = read(item, manifest, wanted, verify=True)
    return jax.tree.map(lambda path: leaves[path], manifest.trees[PARAMS].structure)


def shared_manifest(item: epath.Path) -> Manifest:
    """Reads the manifest of an item; all processes must call it alike."""
    return agreed(lambda: read_manifest(item), elsewhere(item))


def sources_of(manifest: Manifest, tree: str) -> dict[str, Place]:
    """Returns the place of each leaf of a tree: averaged in it, others in params."""
    own = {path: Place(tree, path) for path in manifest.trees[tree].leaves}
    if tree == PARAMS or PARAMS not in manifest.trees:
        return own
    params = {path: Place(PARAMS, path) for path in manifest.trees[PARAMS].leaves}
    place = _where_it_sits(manifest, tree)
    if place is None:
        return own  # the params on disk may be of another model
    return params | {under(place, path): at for path, at in own.items()}


def chosen(manifest: Manifest, tree: str) -> str:
    """Returns the tree that a name means, as it is stored.

    Raises:
        ValueError: If the checkpoint has no such tree, or two may be meant.
    """
    stored = [name for name in manifest.trees if name != STATE]
    return naming.chosen(tree, stored, "Pass tree=")


def _where_it_sits(manifest: Manifest, tree: str) -> str | None:
    """Returns the place in the params on disk where a shadow sits, or None.

    The params fill the leaves that are not averaged, and must not stand for averaged
    ones: a step may hold more than the params, or come from a stranger.
    """
    entry = manifest.trees[tree]
    outline = Outline(_shapes(entry.leaves), frozenset(_gaps(entry.structure)))
    params = _shapes(manifest.trees[PARAMS].leaves)
    if entry.average and entry.average.places:  # its paths are those of the params
        return "" if misfit(outline, params, "") is None else None
    places = places_of(outline, params)
    if not places and set(outline.shapes) <= set(params):
        return ""  # shapes differ: the error names the leaf when it is read
    return places[0] if len(places) == 1 else None


def _shapes(leaves: Mapping[str, LeafEntry]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in leaves.items()}


def _gaps(structure: Structure, at: str = "") -> Iterator[str]:
    """Yields the paths where a structure has no leaf, as nothing is averaged there."""
    if isinstance(structure, str):
        return
    pairs = structure.items() if isinstance(structure, dict) else ()
    if isinstance(structure, list):
        pairs = ((str(i), node) for i, node in enumerate(structure))
    is_empty_node = True
    for key, node in pairs:
        is_empty_node = False
        yield from _gaps(node, under(at, key))
    if is_empty_node:
        yield at


def _seen_from(
    slots: Mapping[str, Any], sources: Mapping[str, Place], manifest: Manifest
) -> Mapping[str, Place]:
    """Returns the sources by the paths of a part of the model that is restored alone.

    One is the params of a step that holds variables with statistics beside them.
    """
    wanted = {
        slot: np.shape(leaf) for slot, leaf in slots.items() if not is_empty(leaf)
    }
    if set(wanted) <= set(sources):
        return sources
    have = {path: manifest.leaf(place).shape for path, place in sources.items()}
    places = places_of(Outline(wanted), have)
    if len(places) != 1:
        return sources
    return {slot: sources[under(places[0], slot)] for slot in wanted}


def _check_averaged(places: Mapping[str, Place], manifest: Manifest, tree: str) -> None:
    """Refuses to give params alone where a shadow is asked for.

    Raises:
        ValueError: If no slot takes a leaf of it, where it has any.
    """
    averaged = manifest.trees[tree].leaves
    read_from = {place.tree for place in places.values()}
    if tree != PARAMS and averaged and read_from == {PARAMS}:
        raise ValueError(
            f"None of the slots of `like` is averaged in the {tree}, such as "
            f"'{next(iter(places))}'. It averages {text.some(averaged)}; for the live "
            "params pass tree='params'."
        )


def check_fits(entry: LeafEntry, leaf: Any, slot: str, *, exact: bool) -> None:
    """Refuses a leaf on disk that a slot cannot take.

    Args:
        entry: Entry of the leaf on disk.
        leaf: The leaf in the slot, concrete or abstract.
        slot: Name of the slot, for errors.
        exact: Whether not even floats are cast.

    Raises:
        ValueError: If shape, dtype or kind differ, with both sides.
    """
    if entry.shape != tuple(np.shape(leaf)):
        advice = " missing='start' starts it anew." if exact else ""
        raise ValueError(
            f"'{slot}' is {entry.shape} on disk and {np.shape(leaf)} in "
            "the target. Build the model as for the saved run, or rename slots to the "
            f"leaves that fit.{advice}"
        )
    if entry.is_key or is_key(leaf):
        if not (entry.is_key and is_key(leaf)):
            stored = f"key:{entry.key}" if entry.is_key else entry.dtype
            raise ValueError(
                f"'{slot}' is {stored} on disk and {_dtype(leaf)} in the target: PRNG "
                "keys and numbers are not converted."
            )
        return
    have, want = jnp.dtype(entry.dtype), _dtype(leaf)
    if have == want or (not hasattr(leaf, "dtype") and have.kind == want.kind):
        return
    for kind in (jnp.floating, jnp.complexfloating):
        alike = jnp.issubdtype(have, kind) and jnp.issubdtype(want, kind)
        if alike and not exact:
            return
    advice = (
        "A resumed run goes on in the dtypes it was saved in. missing='start' casts."
        if exact
        else "Only floats are cast, and only to floats: ask for the stored dtype."
    )
    raise ValueError(f"'{slot}' is {have} on disk and {want} in the target. {advice}")


def is_turned(
    rename: Mapping[str, str], slots: Collection[str], sources: Collection[str]
) -> bool:
    """Returns whether `rename` maps stored paths to slots, the wrong way round."""

    def is_stored(path: str) -> bool:
        return any(f"{at}/".startswith(f"{path}/") for at in sources)

    return all(
        path not in slots and is_stored(path) and slot in slots and slot not in sources
        for path, slot in rename.items()
    )


def without_elements(leaf: Any) -> Any:
    """Makes a leaf without elements: none of those is on disk."""
    make = np.zeros if isinstance(leaf, np.ndarray) else jnp.zeros
    return make(leaf.shape, leaf.dtype)


def _places(
    slots: Mapping[str, Any],
    sources: Mapping[str, Place],
    rename: Mapping[str, str],
    tree: str,
) -> dict[str, Place]:
    """Returns the stored leaf of each slot that has elements."""
    if rename and is_turned(rename, slots, sources):
        path, slot = next(iter(rename.items()))
        raise ValueError(
            "rename maps slots of `like` to stored paths, and here it is the other way "
            f"round: pass rename={{{slot!r}: {path!r}, …}}."
        )
    renames = Renames(rename, SLOTS)
    places = {}
    for slot, leaf in slots.items():
        path = str(renames(slot))
        if is_empty(leaf):
            continue
        if path not in sources:
            raise ValueError(
                f"There is no leaf '{path}' in the {tree} for the slot '{slot}'. "
                f"{text.nearest(path, sources)} Map slots to stored paths with "
                f"rename={{{slot!r}: …}}."
            )
        places[slot] = sources[path]
    renames.check_used(slots, "slot of `like`")
    return places


def _dtype(leaf: Any) -> np.dtype:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
