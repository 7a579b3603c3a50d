"""Folders of a reconstruction: reads snapshots and params, writes averages."""

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
    """Lists the snapshots in all folders, by step and exponent.

    Where several have the same step and exponent, the one of the finest dtype counts.
    """
    stored = [snapshot for run in runs for snapshot in checkpoint.snapshots(run)]
    finest: dict[tuple[float, float], Snapshot] = {}
    for snapshot in sorted(stored, key=lambda s: float(jnp.finfo(s.dtype).eps)):
        finest.setdefault((snapshot.step, snapshot.exponent), snapshot)
    return [finest[key] for key in sorted(finest)]


def model(
    runs: Sequence[str], snapshots: Sequence[Snapshot], last: float
) -> tuple[optax.Params, bool]:
    """Builds the tree of an average, and tells if that is the whole model.

    Averaged leaves are abstract; the others are the leaves of the params.
    """
    averaged = snapshots[0].tree.leaves
    item = _item_with_params(runs, last)
    if item is None:
        dtypes = {p: trees.wide(x.dtype) for p, x in averaged.items()}
        params: dict[str, Any] = {}
    else:
        stored = checkpoint.describe(item).trees["params"].leaves
        dtypes = {path: jnp.dtype(leaf.dtype) for path, leaf in stored.items()}
        params = {}
        if set(stored) - set(averaged):
            paths, leaves, _ = trees.flatten(checkpoint.restore(item, "params"))
            params = dict(zip(paths, leaves, strict=True))
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtypes[path])
        for path, leaf in averaged.items()
        if path in dtypes  # else reconstruct says that the params lack it
    }
    return trees.nested({**params, **abstract}), item is not None


def check_free(plan: Plan, out: str) -> None:
    """Raises OSError if the averages cannot be written to a folder."""
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


def write(plan: Plan, averages: Sequence[Reconstruction]) -> None:
    """Writes each average as a checkpoint, with a bar on a terminal.

    Raises:
        OSError: If an average cannot be written. Nothing of that average stays; the
            averages before it are whole.
    """
    with shown(None, "writing", len(averages)) as report:
        for written, (row, average) in enumerate(zip(plan.rows, averages, strict=True)):
            report(written)
            try:
                _write(plan, row, average)
            except Exception as error:
                if not written:
                    raise
                before = ", ".join(f"{r.width:g}" for r in plan.rows[:written])
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
    """Finds the item with params that has a shadow last folded at update `last`."""
    for run in runs:
        for item in reversed(all_steps(absolute(run))):
            stored = checkpoint.describe(item).trees
            if "params" in stored and any(_folded(t) == last for t in stored.values()):
                return item
    return None


def _folded(tree: checkpoint.Tree) -> int | None:
    """Counts a shadow's updates up to its last fold; None where counts are stacked."""
    if not isinstance(tree.count, int):
        return None
    return tree.count - tree.count % (tree.every or 1)
