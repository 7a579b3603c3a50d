"""The folders of a reconstruction: snapshots and params read, averages written."""

import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from etils import epath

from ema_optax import checkpoint
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.steps import all_steps
from ema_optax._cli import output_folders
from ema_optax._cli.averages import Plan, Row
from ema_optax._decays.decays import power
from ema_optax._messages.progress import shown
from ema_optax._trees import trees
from ema_optax.reconstruction import Reconstruction, Snapshot


def snapshots(runs: Sequence[str]) -> list[Snapshot]:
    """Returns the snapshots in all folders, in order; of equal ones the finest."""
    found = [snapshot for run in runs for snapshot in checkpoint.snapshots(run)]
    finest: dict[tuple[float, float], Snapshot] = {}
    for snapshot in sorted(found, key=lambda s: float(jnp.finfo(s.dtype).eps)):
        finest.setdefault((snapshot.step, snapshot.exponent), snapshot)
    return [finest[key] for key in sorted(finest)]


def model(
    runs: Sequence[str], snapshots: Sequence[Snapshot], last: float
) -> tuple[optax.Params, bool]:
    """Returns what the result is like, and whether that is the whole model.

    Leaves that are averaged are abstract; the others are those of the params.
    """
    averaged = snapshots[0].tree.leaves
    item = _item_with_params(runs, last)
    if item is None:
        wide = {p: trees.wide(x.dtype) for p, x in averaged.items()}
        kept: dict[str, Any] = {}
    else:
        stored = checkpoint.describe(item).trees["params"].leaves
        wide = {path: jnp.dtype(leaf.dtype) for path, leaf in stored.items()}
        kept = {}
        if set(stored) - set(averaged):
            paths, leaves, _ = trees.flatten(checkpoint.restore(item, "params"))
            kept = dict(zip(paths, leaves, strict=True))
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, wide[path])
        for path, leaf in averaged.items()
        if path in wide  # else reconstruct says that the params lack it
    }
    return trees.nested({**kept, **abstract}), item is not None


def check_free(plan: Plan, out: str) -> None:
    """Refuses a folder that the averages could not be written to, as `OSError`."""
    output_folders.check_free(out, [f"{r.directory}/{plan.step}" for r in plan.rows])


def check_room(plan: Plan, out: str, like: optax.Params, dtype: str | None) -> None:
    """Raises OSError if the disk has no room for the averages."""
    averaged = plan.snapshots[0].tree.leaves
    paths, leaves, _ = trees.flatten(like)
    size = sum(
        math.prod(leaf.shape) * jnp.dtype(dtype or leaf.dtype).itemsize
        for path, leaf in zip(paths, leaves, strict=True)
        if path in averaged
    )
    output_folders.check_room(
        out,
        size * len(plan.rows),
        "Ask for fewer widths at a time, a narrower --dtype, or pass another --out.",
    )


def write(plan: Plan, found: Sequence[Reconstruction]) -> None:
    """Writes each average as a checkpoint, with a bar on a terminal.

    Raises:
        OSError: If one cannot be written; nothing of it is left, and those before it
            are whole.
    """
    with shown(None, "writing", len(found)) as report:
        for done, (row, average) in enumerate(zip(plan.rows, found, strict=True)):
            report(done)
            try:
                _write(plan, row, average)
            except Exception as error:
                if not done:
                    raise
                before = ", ".join(f"{r.width:g}" for r in plan.rows[:done])
                raise OSError(f"{error} Written before it: width {before}.") from error


def _write(plan: Plan, row: Row, average: Reconstruction) -> None:
    output_folders.write(
        cast(str, row.directory),
        average.tree,
        plan.step,
        power(row.width),
        {
            "width": row.width,
            "profile_error": average.profile_error,
            "noise_gain": average.noise_gain,
            "snapshots": len(plan.snapshots),
            "tracked": plan.tracked,
            "snapshot_dtypes": plan.dtypes,
            "whole_model": plan.whole,
        },
    )


def _item_with_params(runs: Sequence[str], last: float) -> epath.Path | None:
    """Returns what holds the params of a step, by the updates that its shadows saw."""
    for run in runs:
        for item in reversed(all_steps(absolute(run))):
            held = checkpoint.describe(item).trees
            if "params" in held and any(_folded(t) == last for t in held.values()):
                return item
    return None


def _folded(tree: checkpoint.Tree) -> int | None:
    """Returns the updates that a shadow had seen at its last fold."""
    if not isinstance(tree.count, int):
        return None
    return tree.count - tree.count % (tree.every or 1)
