"""Restores a whole run, to go on with: params and optimizer state exactly."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from ema_optax import averages, mistaken, placement, trees
from ema_optax.average import Average
from ema_optax.averages import Averages
from ema_optax.checkpoint.entries import AverageEntry
from ema_optax.checkpoint.leaves import Place, read
from ema_optax.checkpoint.manifest import PARAMS, SHADOW, STATE, Manifest, tree_of
from ema_optax.checkpoint.restoring import (
    check_fits,
    shared_manifest,
    without_elements,
)
from ema_optax.checkpoint.shadows import bema_arguments
from ema_optax.checkpoint.step import is_empty
from ema_optax.checkpoint.targets import Target, target_of
from ema_optax.locating import under
from ema_optax.states import BemaMadeBy


def restore_run(
    item: epath.Path,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    accept_new_decay: bool,
    verify: bool,
) -> tuple[optax.Params, optax.OptState]:
    """Returns params and optimizer state exactly as saved. See `directory.resume`."""
    manifest = shared_manifest(item)
    if STATE not in manifest.trees:
        raise ValueError(
            f"Cannot resume from {item}: it holds {', '.join(manifest.trees)} and "
            "no optimizer state. Resume from a step that EmaSave wrote."
        )
    manifest.check_decays()
    call = "resume(directory, params, opt_state)"
    mistaken.check_no_nnx(params, "params", call)
    found = averages.find(opt_state, call=call, params=params)
    if not found and len(averages.Averages(params)):
        raise ValueError(found.none())
    _check_averages(manifest, found, accept_new_decay)
    places = [_place_of(manifest, average) for average in found]
    rest = found.rest()
    ours = {PARAMS: _by_path(params)}
    computed: set[str] = set()
    for average, place in zip(found, places, strict=True):
        paths = _by_path(average.tree, place)
        if average.is_computed:  # when it is read; what is stored is not read back
            computed |= set(paths)
        else:
            ours.setdefault(tree_of(average.name), {}).update(paths)
    ours[STATE] = _by_path(rest)
    meshes = placement.meshes_of((params, opt_state))
    wanted: dict[Place, tuple[Place, Target]] = {}
    for name, of_tree in ours.items():
        without = computed if name == SHADOW else set[str]()
        wanted |= _targets(manifest, name, of_tree, without, meshes)
    leaves = read(item, manifest, wanted, verify=verify)

    def fill(name: str, tree: object, place: str = "") -> Any:
        def value(path: object, leaf: object) -> Any:
            if is_empty(leaf):
                return without_elements(leaf)
            return leaves[Place(name, under(place, trees.path_name(path)))]

        return jax.tree_util.tree_map_with_path(value, tree)

    filled = [
        average.tree
        if average.is_computed
        else fill(tree_of(average.name), average.tree, place)
        for average, place in zip(found, places, strict=True)
    ]
    return fill(PARAMS, params), found.put_back(fill(STATE, rest), filled)


def _place_of(manifest: Manifest, average: Average) -> str:
    """Returns where in the params on disk the tree of an average sits."""
    name = SHADOW if average.is_computed else tree_of(average.name)
    return manifest.averages[name].places.get(average.path, "")


def _by_path(tree: object, place: str = "") -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {trees.path_name(path): leaf for path, leaf in pairs}
    return {under(place, path): x for path, x in leaves.items() if not is_empty(x)}


def _targets(
    manifest: Manifest,
    name: str,
    ours: Mapping[str, Any],
    without: set[str],
    meshes: Sequence[Mesh],
) -> dict[Place, tuple[Place, Target]]:
    """Returns the target of each leaf of a tree on disk.

    Args:
        manifest: What is on disk.
        name: Of the tree.
        ours: Its leaves in this run, by path.
        without: Paths on disk that are not read.
        meshes: What an abstract mesh may stand for.

    Raises:
        ValueError: If the leaves differ from those on disk.
    """
    stored = dict(manifest.trees[name].leaves) if name in manifest.trees else {}
    for path in without:
        stored.pop(path, None)
    called = "optimizer state" if name == STATE else name
    if set(ours) != set(stored):
        odd = min(set(ours) ^ set(stored))
        who = "only the checkpoint has" if odd in stored else "the checkpoint lacks"
        raise ValueError(
            f"Cannot resume: {who} '{odd}' in the {called}. Build model and "
            "optimizer as for the saved run; or take the weights alone, "
            "checkpoint.restore(directory, 'params', like=params), and start with "
            "optimizer.init(params): the shadow then starts as a copy of them."
        )
    for path, leaf in ours.items():
        check_fits(stored[path], leaf, f"{called}: {path}", exact=True)
    return {
        Place(name, path): (Place(name, path), target_of(leaf, stored[path], meshes))
        for path, leaf in ours.items()
    }


def _check_averages(manifest: Manifest, found: Averages, accept_new: bool) -> None:
    """Refuses to go on with other averages, or unasked with another decay.

    Raises:
        ValueError: If it would.
    """
    saved = manifest.averages
    _check_bema(saved.get(SHADOW), found, accept_new)
    ours = {tree_of(average.name) for average in found}
    if set(saved) != ours:
        there = ", ".join(sorted(saved)) or "no shadow"
        here = ", ".join(sorted(ours)) or "no shadow"
        raise ValueError(
            f"Cannot resume: the checkpoint has {there}, the optimizer state has "
            f"{here}. Chain ema_params with the decays of the saved run "
            f"({_decays_text(saved)}); or take the weights alone, "
            "checkpoint.restore(directory, 'params', like=params), and start with "
            "optimizer.init(params): a started shadow is a copy of the params."
        )
    for average in found:
        if accept_new or average.is_computed or average.made_by is None:
            continue
        tree, decay = tree_of(average.name), average.decay
        before = saved[tree]
        changed = decay and before.decay and before.decay != decay
        if changed or average.every != (before.every or average.every):
            raise ValueError(
                f"Cannot resume unasked: '{tree}' was averaged with "
                f"{_decays_text({tree: before})}, and would go on with "
                f"{decay} at every={average.every}. Pass accept_new_decay=True to "
                "keep the shadow and go on so; or restore the params and start "
                "with optimizer.init(params), whose shadow is a copy of them."
            )


def _check_bema(saved: AverageEntry | None, found: Averages, accept_new: bool) -> None:
    """Refuses another `bema_params`, or one where there was none."""
    before = tuple(map(dict, saved.bema)) if saved else ()
    now = bema_arguments(found)
    if before == now or (accept_new and len(before) == len(now)):
        return
    there, here = (
        _calls(given) if given else "no bema_params" for given in (before, now)
    )
    accept = (
        "Pass accept_new_decay=True to keep the average and go on so; or chain"
        if len(before) == len(now)
        else "Chain"
    )
    raise ValueError(
        f"Cannot resume: the checkpoint's shadow is of {there}, and the optimizer "
        f"state has {here}. {accept} the averages of the saved run; or take the "
        "weights alone, checkpoint.restore(directory, 'params', like=params), and "
        "start with optimizer.init(params), which averages from there."
    )


def _calls(given: tuple[Mapping[str, Any], ...]) -> str:
    return ", ".join(str(BemaMadeBy(**arguments)) for arguments in given)


def _decays_text(saved: Mapping[str, AverageEntry]) -> str:
    return "; ".join(
        f"{tree}: {_calls(entry.bema)}"
        if entry.bema
        else f"{tree}: {entry.decay or 'a callable'} at every="
        f"{entry.every or 'unknown'}"
        for tree, entry in saved.items()
    )
