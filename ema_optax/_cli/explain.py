"""What a checkpoint alone tells of its averages: `ema-optax inspect --explain`.

A shadow and its params are read side by side, one leaf at a time, and verified.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ema_optax import checkpoint
from ema_optax._averages.bema import bema_params
from ema_optax._averages.states import BemaMadeBy
from ema_optax._checkpoint.counts import stored_counts
from ema_optax._diagnosis import Diagnosis, Finding
from ema_optax._diagnosis.findings import Figures, ordered
from ema_optax._diagnosis.leaf_pairs import Pairs, stale_statistics, statistics_in
from ema_optax._diagnosis.records import BemaDecay, Record, check, is_count, why_unknown

_ROUNDING = (
    "how float32 shadows are rounded, which a checkpoint does not record: rounded by "
    "chance they have no dead zone"
)


def explained(
    found: checkpoint.Description, directory: Any, step: int | None, item: str | None
) -> Diagnosis:
    """Returns what a step tells of each of its shadows.

    Args:
        found: What `checkpoint.describe` returned.
        directory: As it was given; likewise `step` and `item`.
        step: See there.
        item: See there.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
    """
    findings: list[Finding] = []
    figures: dict[str, Figures] = {}
    unchecked: list[str] = []
    counts = stored_counts(directory, is_count, step=step, item=item)
    for name, tree in found.trees.items():
        average = tree.average
        if average is None:
            continue
        if not isinstance(average.count, int):
            unchecked.append(f"the {name}: its states are stacked, each with a count")
            continue
        label = name.removeprefix("shadow").removeprefix("/")
        record = _record(label, average, average.count)
        findings += check(record, others=counts)
        figures[label] = record.figures()
        if record.length is None:
            unchecked.append(why_unknown(label))
        if not tree.leaves:
            unchecked.append(f"the leaves of the {name}: stored without raw params")
            continue
        both = [
            checkpoint.stored(directory, each, step=step, item=item)
            for each in (name, "params")
        ]
        pairs, alone = _paired(record, *both)
        figures[label] = {**figures[label], **pairs.figures()}
        of_leaves = list(pairs.check()) if pairs.elements or not alone else []
        findings += of_leaves
        if any(f.what == "dead_zone" for f in of_leaves) and "float32" in pairs.dtypes:
            unchecked.append(_ROUNDING)
        if alone:
            unchecked.append(f"{alone} leaves of the {name} that the params have not")
        stale = [p for p in statistics_in(both[1].leaves) if p not in both[0].averaged]
        if stale:
            findings.append(stale_statistics(record, stale))
    return Diagnosis(ordered(findings), figures, unchecked=tuple(unchecked))


def _paired(
    record: Record, shadow: checkpoint.StoredTree, params: checkpoint.StoredTree
) -> tuple[Pairs, int]:
    """Returns the sums over the leaves, and how many have no like in the params."""
    if record.is_bema:  # what is stored was computed, and is not what is folded
        record = dataclasses.replace(record, decay=None)
    pairs, alone = Pairs(record), 0
    for path, leaf in shadow.leaves.items():
        if path not in shadow.averaged:
            continue
        like = params.leaves.get(path)
        if like is None or like.shape != leaf.shape:
            alone += 1
            continue
        whole = tuple(slice(0, n) for n in leaf.shape)
        pairs.add(path, shadow.read(path, whole), params.read(path, whole))
    return pairs, alone


def _record(label: str, average: Any, count: int) -> Record:
    """Returns what the manifest says of an average: its entry."""
    decay, every, text = average.decay, average.every, None
    if decay is not None:
        text = str(decay)
    made = _bema(average.bema[0]) if len(average.bema) == 1 and not decay else None
    if made is not None:
        decay, every, text = BemaDecay(made), made.every, str(made)
    if average.bema and made is None:  # joined with others: of no one length
        decay = None
    return Record(label, count, decay, every, text, is_bema=bool(average.bema))


def _bema(arguments: Mapping[str, Any]) -> BemaMadeBy | None:
    """Returns arguments from a manifest, which is anybody's, where they are good."""
    try:
        bema_params(**arguments)
        return BemaMadeBy(**arguments)
    except (TypeError, ValueError):
        return None
