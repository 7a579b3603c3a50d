"""`ema-optax inspect --explain`: findings on averages, from a checkpoint alone.

A shadow and its params are read side by side, one leaf at a time, and verified.
"""

import dataclasses
import functools
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
    description: checkpoint.Description,
    directory: Any,
    step: int | None,
    item: str | None,
) -> Diagnosis:
    """Diagnoses each shadow of a step.

    Args:
        description: The description that `checkpoint.describe` returned.
        directory: Folder of the run or step.
        step: Number of the step; None for the newest.
        item: Name of the item; None for the only one.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
    """
    findings: list[Finding] = []
    figures: dict[str, Figures] = {}
    unchecked: list[str] = []
    stored = functools.partial(checkpoint.stored, directory, step=step, item=item)
    counts = stored_counts(directory, is_count, step=step, item=item)
    for name, tree in description.trees.items():
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
            unchecked.append(why_unknown(record))
        if not tree.leaves:
            unchecked.append(f"the leaves of the {name}: stored without raw params")
            continue
        shadow, params = stored(name), stored("params")
        pairs, unpaired = _paired(record, shadow, params)
        figures[label] = {**figures[label], **pairs.figures()}
        of_pairs = list(pairs.check()) if pairs.elements or not unpaired else []
        findings += of_pairs
        if any(f.what == "dead_zone" for f in of_pairs) and "float32" in pairs.dtypes:
            unchecked.append(_ROUNDING)
        if unpaired:
            unchecked.append(f"{unpaired} leaves of the {name} that the params lack")
        stale = [p for p in statistics_in(params.leaves) if p not in shadow.averaged]
        if stale:
            findings.append(stale_statistics(record, stale))
    return Diagnosis(ordered(findings), figures, unchecked=tuple(unchecked))


def _paired(
    record: Record, shadow: checkpoint.StoredTree, params: checkpoint.StoredTree
) -> tuple[Pairs, int]:
    """Sums over pairs of leaves, and counts the leaves without a pair in the params."""
    if record.is_bema:  # its stored leaves are computed, not the folded ones
        record = dataclasses.replace(record, decay=None)
    pairs, unpaired = Pairs(record), 0
    for path, leaf in shadow.leaves.items():
        if path not in shadow.averaged:
            continue
        raw = params.leaves.get(path)
        if raw is None or raw.shape != leaf.shape:
            unpaired += 1
            continue
        whole = tuple(slice(0, n) for n in leaf.shape)
        pairs.add(path, shadow.read(path, whole), params.read(path, whole))
    return pairs, unpaired


def _record(label: str, average: Any, count: int) -> Record:
    """Builds the record of an average from its entry in the manifest."""
    decay, every, text = average.decay, average.every, None
    if decay is not None:
        text = str(decay)
    bema = _bema(average.bema[0]) if len(average.bema) == 1 and not decay else None
    if bema is not None:
        decay, every, text = BemaDecay(bema), bema.every, str(bema)
    if average.bema and bema is None:  # joined with other averages: of no one length
        decay = None
    copies = None
    if len(average.computed) == 1 and average.ring and not decay:
        copies, text = average.ring[0].get("k"), str(average.computed[0])
    if not isinstance(copies, int) or copies < 1:  # anyone may write a manifest
        copies = None
    return Record(
        label,
        count,
        decay,
        every,
        text,
        is_bema=bool(average.bema),
        copies=copies,
    )


def _bema(arguments: Mapping[str, Any]) -> BemaMadeBy | None:
    """Checks the arguments of a manifest, which anyone may write; None if refused."""
    try:
        bema_params(**arguments)
        return BemaMadeBy(**arguments)
    except (TypeError, ValueError):
        return None
