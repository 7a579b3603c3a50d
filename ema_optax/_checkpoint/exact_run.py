"""Restores a whole run to go on with: params and optimizer state exactly."""

from collections.abc import Mapping, Sequence
from typing import Any

import optax
from etils import epath
from jax.sharding import Mesh

from ema_optax._averages import averages
from ema_optax._checkpoint.leaves import Place, read
from ema_optax._checkpoint.manifest import PARAMS, SHADOW, STATE, Manifest
from ema_optax._checkpoint.restoring import check_fits, shared_manifest
from ema_optax._checkpoint.same_averages import check_same
from ema_optax._checkpoint.slots import by_path, filled, place_in_run, stored_place
from ema_optax._checkpoint.state_nodes import joined
from ema_optax._checkpoint.stored_names import StoredNames
from ema_optax._checkpoint.targets import Target, target_of
from ema_optax._messages import text
from ema_optax._placement import leaf_placement
from ema_optax._trees import mistaken
from ema_optax._trees.naming import tree_of

CALL = "resume(directory, params, opt_state)"


def restore_run(
    item: epath.Path,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    accept_new_decay: bool,
    rename: Mapping[str, str] | None,
    verify: bool,
) -> tuple[optax.Params, optax.OptState]:
    """Restores params and optimizer state exactly. See `checkpoint.resume`."""
    manifest = shared_manifest(item)
    if STATE not in manifest.trees:
        raise ValueError(
            f"Cannot resume from {item}: it holds {', '.join(manifest.trees)} and "
            "no optimizer state. Resume from a step that EmaSave wrote; or pass "
            "missing='start', with which params and average go on and the optimizer "
            "starts."
        )
    manifest.check_decays()
    mistaken.check_no_nnx(params, "params", CALL)
    mistaken.check_no_nnx(opt_state, "an optimizer state", CALL)
    if callable(opt_state):
        raise TypeError(
            f"This is {text.brief(opt_state)}, not an optimizer state: {CALL} with "
            "optimizer.init(params); or pass missing='start', which calls it with the "
            "params that go on."
        )
    ours = averages.find(opt_state, call=CALL, params=params)
    if not ours and len(averages.Averages(params)):
        raise ValueError(ours.none())
    names = StoredNames(rename, manifest, by_path(params))
    names.check_trees(ours)
    check_same(manifest, ours, names.tree, accept_new_decay)
    places = [
        place_in_run(average, params, names.places)
        if rename
        else stored_place(manifest, average, tree_of(average.name))
        for average in ours
    ]
    rest = ours.rest()
    # The stored leaf that each slot takes: that of its own path, unless renamed.
    slots: dict[Place, tuple[Place, Any]] = {
        Place(PARAMS, path): (Place(PARAMS, names.path(path)), leaf)
        for path, leaf in by_path(params).items()
    }
    computed: set[str] = set()
    for average, place in zip(ours, places, strict=True):
        for path, leaf in by_path(average.tree, place).items():
            stored = names.path(path)
            if average.is_computed:  # from the state; the stored value is not read
                computed.add(stored)
            else:
                slot = Place(tree_of(average.name), path)
                slots[slot] = Place(names.tree(average.name), stored), leaf
    of_state = by_path(rest)
    stored_paths = _in_state(manifest, names, of_state, places) if rename else {}
    for path, leaf in of_state.items():
        slots[Place(STATE, path)] = Place(STATE, stored_paths.get(path, path)), leaf
    meshes = leaf_placement.meshes_of((params, opt_state))
    leaves = read(
        item, manifest, _targets(manifest, slots, computed, meshes), verify=verify
    )

    def of(tree: str) -> Any:
        return lambda path: leaves[Place(tree, path)]

    shadows = [
        average.tree
        if average.is_computed
        else filled(average.tree, of(tree_of(average.name)), place)
        for average, place in zip(ours, places, strict=True)
    ]
    opt_state = ours.put_back(filled(rest, of(STATE)), shadows)
    return filled(params, of(PARAMS)), opt_state


def _in_state(
    manifest: Manifest,
    names: StoredNames,
    leaves: Mapping[str, Any],
    places: Sequence[str],
) -> dict[str, str]:
    """Returns the stored path of each leaf of a state whose params are renamed."""
    stored = manifest.trees[STATE].leaves
    parts, slots = names.parts(leaves, places)
    stored_paths: dict[str, str] = {}
    for path, slot in slots.items():
        part = parts[path]
        paths = [joined(part.node, part, param) for param in names.as_given(slot)]
        stored_paths[path] = next((each for each in paths if each in stored), paths[0])
    return stored_paths


def _targets(
    manifest: Manifest,
    slots: Mapping[Place, tuple[Place, Any]],
    computed: set[str],
    meshes: Sequence[Mesh],
) -> dict[Place, tuple[Place, Target]]:
    """Returns the target of each slot.

    Args:
        manifest: The manifest on disk.
        slots: The stored leaf that each takes, and the leaf of this run.
        computed: Paths of the stored shadow that are not read.
        meshes: Meshes that an abstract mesh may stand for.

    Raises:
        ValueError: If the leaves differ from those on disk.
    """
    stored = {
        Place(name, path): entry
        for name, tree in manifest.trees.items()
        for path, entry in tree.leaves.items()
        if not (name == SHADOW and path in computed)
    }
    wanted = {place for place, _ in slots.values()}
    if wanted != set(stored):
        raise ValueError(
            f"Cannot resume: {_difference(manifest, wanted, set(stored))} "
            "Build model and optimizer as for the saved run; or map names with "
            "rename={'of this run': 'stored'}; or take what fits and start the rest: "
            "resume(directory, params, optimizer.init, missing='start')."
        )
    for slot, (place, leaf) in slots.items():
        name = f"{_in_words(slot.tree)}: {slot.path}"
        check_fits(stored[place], leaf, name, exact=True)
    return {
        slot: (place, target_of(leaf, stored[place], meshes))
        for slot, (place, leaf) in slots.items()
    }


def _difference(manifest: Manifest, wanted: set[Place], stored: set[Place]) -> str:
    """Names a leaf that only one side has; one of the params, if those differ."""

    def first(places: set[Place]) -> Place | None:
        return min(places, key=lambda p: (p.tree != PARAMS, p), default=None)

    lacking, alone = first(wanted - stored), first(stored - wanted)
    clauses: list[str] = []
    if lacking:
        clauses.append(
            f"the checkpoint lacks '{lacking.path}' in the {_in_words(lacking.tree)}"
        )
    if alone:
        owner = "it" if lacking else "the checkpoint"
        clauses.append(
            f"only {owner} has '{alone.path}' in the {_in_words(alone.tree)}",
        )
    tree = manifest.trees.get(lacking.tree) if lacking else None
    hint = f" {text.nearest(lacking.path, tree.leaves)}" if lacking and tree else ""
    return f"{', and '.join(clauses)}.{hint}"


def _in_words(tree: str) -> str:
    return "optimizer state" if tree == STATE else tree
