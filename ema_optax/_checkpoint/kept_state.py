"""The optimizer's own state of a changed run: which of its parts go on."""

from collections.abc import Mapping, Sequence
from typing import Any

from ema_optax._averages.averages import Averages
from ema_optax._checkpoint.entries import TreeEntry
from ema_optax._checkpoint.kept_averages import counts_on_disk
from ema_optax._checkpoint.leaves import Place
from ema_optax._checkpoint.manifest import PARAMS, STATE, Manifest
from ema_optax._checkpoint.slots import by_path
from ema_optax._checkpoint.state_nodes import joined, matched, nodes_of, split
from ema_optax._checkpoint.step import structure_of
from ema_optax._checkpoint.stored_names import StoredNames
from ema_optax._checkpoint.taking import Slot, Taking
from ema_optax._messages import text
from ema_optax._trees.locating import under


def offer_state(
    taking: Taking,
    manifest: Manifest,
    found: Averages,
    names: StoredNames,
    places: Sequence[str],
    rest: Any,
) -> dict[str, str]:
    """Offers the leaves of the optimizer's own state the stored ones.

    What a node has beside leaves of params, such as a count of updates, goes on where
    one of these does.

    Args:
        taking: What is taken and what starts.
        manifest: Of the checkpoint.
        found: The averages of this run, whose shadows are not part of it.
        names: What things are called on disk.
        places: Where in the params each average sits.
        rest: The optimizer state without shadows.

    Returns:
        The slot of the param that a leaf is of, by its path in the state.
    """
    counts = {under(a.path, "count") for a in found if not a.is_computed}
    leaves = {path: x for path, x in by_path(rest).items() if path not in counts}
    stored = manifest.trees.get(STATE, TreeEntry({}, {}))
    counted = {place.path for place in counts_on_disk(manifest)}
    their_parts = {
        path: split(path, names.stored_params)
        for path in stored.leaves
        if path not in counted
    }
    parts, params_of = names.parts(leaves, places)
    given = {path: names.as_given(slot) for path, slot in params_of.items()}
    theirs_given = {
        path: [part.param]
        for path, part in their_parts.items()
        if part.param is not None
    }
    same, reasons = matched(
        nodes_of(parts, structure_of(rest), given).values(),
        nodes_of(their_parts, stored.structure, theirs_given).values(),
    )
    beside: dict[str, list[str]] = {}  # the leaves of a node that are of no param
    moments: dict[str, list[bool]] = {}  # whether those of params are taken

    def offer(path: str) -> bool:
        slot, part = Slot(STATE, path), parts[path]
        if part.node not in same:
            taking.started[slot] = reasons[part.node]
            return False
        paths = [joined(same[part.node], part, p) for p in given.get(path, [None])]
        at = next((each for each in paths if each in their_parts), paths[0])
        return taking.offer(slot, leaves[path], Place(STATE, at))

    for path, part in parts.items():
        if path in params_of:
            moments.setdefault(part.node, []).append(offer(path))
        else:
            beside.setdefault(part.node, []).append(path)
    for node, paths in beside.items():
        for path in paths:
            if node not in same or any(moments.get(node, [True])):
                offer(path)
            else:
                taking.started[Slot(STATE, path)] = "nothing that it counts goes on"
    return params_of


def check_started(
    taking: Taking, found: Averages, params_of: Mapping[str, str], call: str
) -> None:
    """Refuses to start a leaf of the optimizer's own from params that are not live.

    Args:
        taking: What is taken and what starts.
        found: The averages, which are known to start as copies of params.
        params_of: What `offer_state` returned.
        call: That does it right.

    Raises:
        ValueError: If there is one.
    """
    ours = [f"{average.path}/" if average.path else "" for average in found]
    stale = [
        path
        for path, param in params_of.items()
        if Slot(STATE, path) in taking.started
        and taking.takes(Slot(PARAMS, param))
        and not any(path.startswith(at) for at in ours)
    ]
    if stale:
        reason = taking.started[Slot(STATE, stale[0])]
        raise ValueError(
            f"{text.some(map(repr, stale))} of the optimizer state start ({reason}), "
            "and may be copies of the fresh params, while these go on from the "
            f"checkpoint. Pass optimizer.init itself, not its result: {call}; or "
            "another function from the resumed params to the optimizer state."
        )
