"""Restores what fits of a saved run, starts the rest, and reports on each leaf.

Params and shadows are taken leaf by leaf, by path and shape. A leaf that is not stored
starts: a param as it was passed, a shadow as a copy of the param that goes on, the
optimizer's own state as `optimizer.init` makes it from those params.
"""

from collections.abc import Mapping
from typing import Any

import optax
from etils import epath

from ema_optax._averages import averages
from ema_optax._averages.average import Average
from ema_optax._averages.averages import Averages
from ema_optax._checkpoint.changes import Resumed, resumed
from ema_optax._checkpoint.kept_averages import (
    counts_on_disk,
    offer_shadows,
    set_counts,
    started_as,
)
from ema_optax._checkpoint.kept_state import check_started, offer_state
from ema_optax._checkpoint.leaves import Place
from ema_optax._checkpoint.manifest import PARAMS, SHADOW, STATE, Manifest
from ema_optax._checkpoint.restoring import shared_manifest
from ema_optax._checkpoint.same_averages import check_computed_goes_on
from ema_optax._checkpoint.slots import by_path, filled, place_in_run
from ema_optax._checkpoint.stored_names import StoredNames
from ema_optax._checkpoint.taking import Slot, Taking, check_concrete
from ema_optax._messages import text
from ema_optax._placement import leaf_placement
from ema_optax._trees import mistaken
from ema_optax._trees.locating import under
from ema_optax._trees.naming import tree_of

CALL = "resume(directory, params, optimizer.init, missing='start')"


def restore_what_fits(
    item: epath.Path,
    params: optax.Params,
    opt_state: Any,
    *,
    accept_new_decay: bool,
    rename: Mapping[str, str] | None,
    verify: bool,
) -> Resumed:
    """Restores params and optimizer state, saved or started. See `checkpoint.resume`.

    Args:
        item: Folder of the item.
        params: Those of this run.
        opt_state: That of this run, or the function from params to it.
        accept_new_decay: Whether an average goes on with another decay.
        rename: Slots of this run to stored paths.
        verify: Whether to compare what is read with its checksums.
    """
    manifest = shared_manifest(item)
    if PARAMS not in manifest.trees:
        raise ValueError(
            f"Cannot resume from {item}: it holds {', '.join(manifest.trees)} and no "
            "params. Resume from a step that EmaSave or save_average wrote."
        )
    manifest.check_decays()
    mistaken.check_no_nnx(params, "params", CALL)
    mistaken.check_no_nnx(opt_state, "an optimizer state", CALL)
    has_init = callable(opt_state)
    if not has_init:
        ours = averages.find(opt_state, call=CALL, params=params)
        if not ours and len(Averages(params)):
            raise ValueError(ours.none())
    slots = by_path(params)
    names = StoredNames(rename, manifest, slots)
    taking = Taking(manifest)
    _offer_params(taking, slots, names, manifest)

    def resumed_params() -> Any:
        taking.read(item, leaf_placement.meshes_of(params), verify=verify)
        return filled(params, lambda path: _param(taking, slots, path))

    live = None
    if has_init:  # the state that starts is made from the params that go on
        live = resumed_params()
        opt_state = opt_state(live)
    ours = averages.find(opt_state, call=CALL, params=params)
    names.check_trees(ours)
    places = [place_in_run(average, params, names.places) for average in ours]
    rest = ours.rest()
    of_state = by_path(rest)
    offer_shadows(
        taking, manifest, ours, names, places, accept_new_decay=accept_new_decay
    )
    params_of = offer_state(taking, manifest, ours, names, places, rest)
    continuing = [
        average.path
        for average in ours
        if average.is_computed
        and taking.takes(Slot(STATE, under(average.path, "count")))
    ]
    if continuing:
        check_computed_goes_on(manifest.averages[SHADOW], ours, False, accept_new_decay)
    if not has_init:
        check_started(taking, ours, params_of, CALL)
    set_counts(taking, item, manifest, ours, names, of_state, verify=verify)
    live = resumed_params() if live is None else live
    taking.read(item, leaf_placement.meshes_of((params, opt_state)), verify=verify)
    by_slot = by_path(live)
    started_as_params = tuple(
        under(average.path, field)
        for average in ours
        if average.is_computed
        for field in average.fields
    )

    def value(slot: Slot, leaf: Any, param: str | None) -> Any:
        if slot in taking.leaves:
            return taking.leaves[slot]
        if param is not None and not has_init:
            return started_as(by_slot[param], leaf)
        return check_concrete(leaf, slot)

    def state_leaf(path: str) -> Any:
        is_of_average = any(f"{path}/".startswith(f"{at}/") for at in started_as_params)
        param = params_of.get(path) if is_of_average else None
        return value(Slot(STATE, path), of_state[path], param)

    def shadow(i: int, average: Average, place: str) -> Any:
        if average.is_computed:
            return average.tree
        leaves, tree = by_path(average.tree, place), tree_of(average.name)
        return filled(
            average.tree,
            lambda path: value(Slot(tree, path, i), leaves[path], path),
            place,
        )

    pairs = enumerate(zip(ours, places, strict=True))
    shadows = [shadow(i, average, place) for i, (average, place) in pairs]
    opt_state = ours.put_back(filled(rest, state_leaf), shadows)
    computed = {  # stored values of averages that are computed when they are read
        Place(SHADOW, names.path(path))
        for average, place in zip(ours, places, strict=True)
        if average.is_computed and average.path in continuing
        for path in by_path(average.tree, place)
    }
    known = counts_on_disk(manifest) | computed
    return resumed(live, opt_state, taking.changes(known))


def _offer_params(
    taking: Taking, slots: Mapping[str, Any], names: StoredNames, manifest: Manifest
) -> None:
    """Offers each param its stored leaf.

    Raises:
        ValueError: If none takes it: this is another model. If a leaf that starts has
            no value.
    """
    fitting = [
        taking.offer(Slot(PARAMS, path), leaf, Place(PARAMS, names.path(path)))
        for path, leaf in slots.items()
    ]
    if not any(fitting):
        stored = manifest.trees[PARAMS].leaves
        first = next(iter(slots), "")
        reason = taking.started.get(Slot(PARAMS, first), "these have no leaves")
        raise ValueError(
            f"Nothing of the checkpoint fits these params: '{first}' is {reason}, and "
            f"so on. {text.nearest(names.path(first), stored)} Map slots of this run "
            f"to stored paths with rename={{{first!r}: …}}; or start a new run."
        )
    for slot in taking.started:
        check_concrete(slots[slot.path], slot)


def _param(taking: Taking, slots: Mapping[str, Any], path: str) -> Any:
    slot = Slot(PARAMS, path)
    return taking.leaves[slot] if slot in taking.leaves else slots[path]
