"""The folders of a reconstruction: snapshots and params read, averages written."""

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from etils import epath

from ema_optax import checkpoint, trees
from ema_optax.checkpoint import storage
from ema_optax.checkpoint.paths import absolute
from ema_optax.checkpoint.steps import all_steps
from ema_optax.cli.averages import Plan, Row
from ema_optax.decays import power
from ema_optax.progress import shown
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
    """Refuses a folder that averages could not be written to.

    Raises:
        FileExistsError: If an average is there already.
        OSError: If the folder cannot be made.
        ValueError: If the averages would lie among the steps of a run.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        if all_steps(absolute(out)):
            raise FileExistsError(
                f"{out} holds the steps of a run, which averages must not lie among. "
                "Pass a folder of their own as --out."
            )
    for row in plan.rows:
        path = f"{row.directory}/{plan.step}"
        if storage.listed(absolute(path)) is not None:
            raise FileExistsError(
                f"{path} exists, and nothing is overwritten. Remove it, or pass "
                "another --out."
            )
    if "://" in out:
        return
    there = _nearest(out)
    if not there.is_dir():
        raise NotADirectoryError(f"Cannot write to {out}: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Cannot write to {out}: {there} is read-only, or somebody else's."
        )


def check_room(plan: Plan, out: str, like: optax.Params, dtype: str | None) -> None:
    """Raises OSError if the disk has no room for the averages."""
    if "://" in out:
        return
    averaged = plan.snapshots[0].tree.leaves
    paths, leaves, _ = trees.flatten(like)
    size = sum(
        math.prod(leaf.shape) * jnp.dtype(dtype or leaf.dtype).itemsize
        for path, leaf in zip(paths, leaves, strict=True)
        if path in averaged
    )
    need, disk = size * len(plan.rows), shutil.disk_usage(_nearest(out))
    if need > disk.free and disk.total:  # some kinds of file systems tell 0 of 0
        raise OSError(
            f"The averages need {need / 1e6:,.3f} MB, and the disk of {out} has "
            f"{disk.free / 1e6:,.3f} MB left. Ask for fewer widths at a time, a "
            "narrower --dtype, or pass another --out."
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
    folder = absolute(cast(str, row.directory))
    new = []
    if not storage.is_remote(folder):
        new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _no_tracebacks():
            checkpoint.save_average(
                folder,
                average.tree,
                step=plan.step,
                decay=power(row.width),
                extra={
                    "width": row.width,
                    "profile_error": average.profile_error,
                    "noise_gain": average.noise_gain,
                    "snapshots": len(plan.snapshots),
                    "tracked": plan.tracked,
                    "snapshot_dtypes": plan.dtypes,
                    "whole_model": plan.whole,
                },
            )
    except BaseException:  # Ctrl-C too
        for path in new:
            with contextlib.suppress(OSError):  # it holds what is whole
                path.rmdir()
        raise


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


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Keeps Orbax's threads from logging an error that is raised as well."""
    logger = logging.getLogger("absl")
    usual, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = usual


def _nearest(out: str) -> epath.Path:
    """Returns a local folder, or the nearest above it that exists."""
    root = absolute(out)
    return next(path for path in (root, *root.parents) if path.exists())
