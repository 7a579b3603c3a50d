"""The averages of a changed run: which go on, from which stored one, at which count."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ema_optax._averages.averages import Averages
from ema_optax._checkpoint.leaves import Place, read
from ema_optax._checkpoint.manifest import PARAMS, SHADOW, STATE, Manifest
from ema_optax._checkpoint.same_averages import check_computed_goes_on, check_decay
from ema_optax._checkpoint.slots import by_path
from ema_optax._checkpoint.state_nodes import average_nodes
from ema_optax._checkpoint.stored_names import StoredNames
from ema_optax._checkpoint.taking import Slot, Taking
from ema_optax._checkpoint.targets import default_target
from ema_optax._messages import text
from ema_optax._trees.locating import under
from ema_optax._trees.naming import tree_of


def offer_shadows(
    taking: Taking,
    manifest: Manifest,
    found: Averages,
    names: StoredNames,
    places: Sequence[str],
    *,
    accept_new_decay: bool,
) -> None:
    """Offers each shadow the leaves of the stored one that it goes on from.

    Some are computed: what they are computed from is the optimizer's own state.

    Raises:
        ValueError: If one would go on with another decay, and that is not accepted.
    """
    saved = manifest.averages
    for i, (average, place) in enumerate(zip(found, places, strict=True)):
        if average.is_computed:
            continue
        source = names.tree(average.name)
        # An average that was saved alone lies where the params do, stored once.
        lies_in = (
            source if source in saved and manifest.trees[source].leaves else PARAMS
        )
        goes_on = False
        for path, leaf in by_path(average.tree, place).items():
            slot = Slot(tree_of(average.name), path, i)
            if source not in saved:
                taking.started[slot] = _no_average(source, saved)
                continue
            goes_on |= taking.offer(slot, leaf, Place(lies_in, names.path(path)))
        if goes_on:
            check_computed_goes_on(
                saved[source], found, source == SHADOW, accept_new_decay
            )
            check_decay(average, source, saved, accept_new_decay)


def set_counts(
    taking: Taking,
    item: epath.Path,
    manifest: Manifest,
    found: Averages,
    names: StoredNames,
    of_state: Mapping[str, Any],
    *,
    verify: bool,
) -> None:
    """Sets the count of each state of shadows: it goes on where one of them does.

    Args:
        taking: What is taken, shadows included.
        item: Folder of the item.
        manifest: Its manifest.
        found: The averages of this run.
        names: What they are called on disk.
        of_state: The leaves of the optimizer state without its shadows, by path.
        verify: Whether what is read is compared with its checksums.

    Raises:
        ValueError: If one state would have two counts, or it cannot be told which.
    """
    going: dict[str, set[str]] = {}
    for i, average in enumerate(found):
        if average.is_computed:  # its count is offered with what it is computed from
            at = under(average.path, "count")
            if Slot(STATE, at) in taking.started:
                taking.count(Slot(STATE, at), of_state[at], 0, None)
        else:
            sources = going.setdefault(average.path, set())
            tree = tree_of(average.name)
            if taking.goes_on(tree, i):
                sources.add(names.tree(average.name))
    all_counts: dict[str, Any] = {}
    for path, sources in going.items():
        at = under(path, "count")
        slot = Slot(STATE, at)
        if not sources:
            taking.count(slot, of_state[at], 0, None)
            continue
        counts = {}
        for source in sorted(sources):
            count: Any = manifest.averages[source].count
            takers = sum(source in others for others in going.values())
            if takers > 1 or len(manifest.averages[source].places) > 1:
                all_counts = all_counts or _stored_counts(item, manifest, verify=verify)
                if any(other != count for other in all_counts.values()):
                    count = _own_count(all_counts, path, source)
            counts[source] = count
        first, *others = counts
        if any(counts[other] != counts[first] for other in others):
            told = text.some([f"'{s}' {text.brief(c)}" for s, c in counts.items()], 8)
            raise ValueError(
                f"The averages at '{path}' share one count, and those they would go on "
                f"from have seen different numbers of updates: {told}. Chain a "
                "transform for each: ema_params({'fast': 0.99}), "
                "ema_params({'slow': 0.9999})."
            )
        taking.count(slot, of_state[at], counts[first], first)


def started_as(param: Any, leaf: Any) -> Any:
    """Returns a copy of a param as a leaf of an average, where that lies.

    A leaf of several slots holds it in each.

    Args:
        param: Concrete.
        leaf: What it becomes, concrete or abstract.
    """
    if isinstance(leaf, np.ndarray):
        return np.array(np.broadcast_to(param, leaf.shape), leaf.dtype)
    copy = jnp.broadcast_to(jnp.array(param, dtype=leaf.dtype), leaf.shape)
    sharding = getattr(leaf, "sharding", None)
    bound = isinstance(sharding, jax.sharding.Sharding) and (
        not isinstance(leaf, jax.Array) or getattr(leaf, "committed", True)
    )
    if bound and copy.sharding != sharding:
        copy = jax.device_put(copy, sharding)
    return copy


def counts_on_disk(manifest: Manifest) -> set[Place]:
    """Returns the stored counts of shadows; those of computed ones are its own."""
    stored = manifest.trees.get(STATE)
    if stored is None:
        return set()
    nodes = average_nodes(stored.structure)
    return {
        Place(STATE, under(path, "count"))
        for path, is_computed in nodes.items()
        if not is_computed
    }


def _stored_counts(
    item: epath.Path, manifest: Manifest, *, verify: bool
) -> dict[str, Any]:
    """Reads the count of each stored state of shadows, by its place."""
    wanted = {
        place: (place, default_target(manifest.leaf(place)))
        for place in counts_on_disk(manifest)
    }
    leaves = read(item, manifest, wanted, verify=verify)
    return {
        place.path.removesuffix("count").removesuffix("/"): np.asarray(leaf).tolist()
        for place, leaf in leaves.items()
    }


def _own_count(counts: Mapping[str, Any], path: str, source: str) -> Any:
    """Returns the count of a state, of several that one stored average was made of."""
    if path in counts:
        return counts[path]
    told = text.some([f"'{at}' {text.brief(c)}" for at, c in counts.items()], 8)
    raise ValueError(
        f"'{source}' is of several parts of the params, whose counts differ: {told}. "
        f"None is at '{path}': keep the place of the average in the optimizer state."
    )


def _no_average(source: str, saved: Mapping[str, Any]) -> str:
    if not saved:
        return "the checkpoint has no average"
    return (
        f"the checkpoint has {text.some(map(repr, saved), 4)}; rename={{{source!r}: "
        f"{next(iter(saved))!r}}} goes on from that"
    )
