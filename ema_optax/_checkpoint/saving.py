"""Saves a step: Orbax writes its trees, and commits them together with the manifest.

An item is an Orbax checkpoint of the raw params, in their own structure, which is what
programs load without this library. The folder `ema_optax` inside it is another
checkpoint, of shadows and optimizer state, with manifest and checksums beside them. A
snapshot has only that folder.
"""

import asyncio
import contextlib
import functools
import glob
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from ema_optax._checkpoint import checksums, host_arrays, manifest
from ema_optax._checkpoint.background import (
    ELSEWHERE,
    AllFutures,
    Failed,
    Future,
    Gate,
    GatedFolder,
    RaisedEverywhere,
)
from ema_optax._checkpoint.manifest import PARAMS, STATE
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.processes import gathered, together
from ema_optax._checkpoint.step import Step, is_key
from ema_optax._messages.text import one_line
from ema_optax._trees import trees

# Tree → path → the parts of that leaf that this process writes.
Parts: TypeAlias = dict[str, dict[str, checksums.HostParts]]


# Measured in benchmarks/checkpoints.py: compression, Orbax's default, makes float32
# weights 8 % smaller; without it save and restore take three quarters of the time. One
# file a leaf instead of OCDBT takes the same time for large leaves, within noise, and
# 1.2 times as long for a thousand small ones; it makes two files a leaf.
_tree_handler = functools.partial(
    ocp.PyTreeCheckpointHandler, use_ocdbt=True, use_compression=False
)


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns the Orbax handler that stores one tree as we store it."""
    return _tree_handler()


async def start_save(
    item: epath.Path, step: Step, handler: ocp.PyTreeCheckpointHandler
) -> list[Future]:
    """Does the blocking part of a save; returns the futures of the rest.

    Nothing here touches the disk: every future waits for the signal that Orbax has
    made the item's folder, and Orbax commits when all of them are done.

    Orbax's blocking part has a fixed cost for each store, tens of milliseconds of
    starting threads. Where this process holds every leaf whole, the second store is
    therefore begun in the background, from views of the leaves on the host.
    """
    try:
        item = absolute(item)
    except ValueError as error:  # raised here, Orbax would wait at exit for minutes
        return [Failed(error)]
    refuse_different(step)
    gate = Gate()
    futures: list[Future] = []

    async def start(folder: epath.Path, tree: Any) -> Sequence[Future]:
        gated = cast(Any, GatedFolder(folder, gate))
        # Copies the arrays to the host before it returns.
        with _one_array_explained(tree):
            return await handler.async_save(gated, args=_save_args(tree)) or []

    parts: Parts = {}
    views = None
    try:
        with together(RuntimeError(f"{item} is not saved: {ELSEWHERE}")):
            if PARAMS in step.trees:
                futures += await start(item, step.trees[PARAMS])
            _fetch(step)
            parts = _host_parts(step)
            views = _host_views(step, parts)
            if views is None:
                futures += await start(item / manifest.FOLDER, _beside(step))
    except BaseException:
        gate.broken = True
        raise
    finally:
        gate.opened.set()  # else waiting threads would keep the process from ending

    async def rest() -> None:
        await GatedFolder(item, gate).await_creation()
        _refuse_overflow(parts)
        started = await start(item / manifest.FOLDER, views) if views else []
        try:
            write_sidecars(item, step, parts)
        finally:  # the commit follows: no writer may still be at work
            await asyncio.to_thread(AllFutures(started).result)

    signalled = ocp.future.CommitFutureAwaitingContractedSignals(  # pyright: ignore[reportAttributeAccessIssue]
        rest(), name="ema_optax_beside"
    )
    return [RaisedEverywhere(AllFutures([*futures, signalled]), item)]


def save_now(item: epath.Path, step: Step) -> None:
    """Saves without a background part."""
    handler = _tree_handler(type_handler_registry=host_arrays.registry())
    item = absolute(item)
    refuse_different(step)
    beside = _beside(step)
    with together(OSError(f"{item} is not saved: {ELSEWHERE}")):
        if PARAMS in step.trees:
            with _one_array_explained(step.trees[PARAMS]):
                handler.save(item, args=_save_args(step.trees[PARAMS]))
        if beside:
            handler.save(item / manifest.FOLDER, args=_save_args(beside))
        parts = _host_parts(step, kept=True)
        _refuse_overflow(parts)
        write_sidecars(item, step, parts)


def refuse_different(step: Step) -> None:
    """Raises on all processes if their NumPy arrays or numbers differ.

    Those of process 0 are stored, and the others would be lost without a word.
    """
    if jax.process_count() == 1:
        return
    local = {
        f"'{path}' of the {name}": np.asarray(leaf)
        for name, leaves in step.leaves.items()
        for path, leaf in leaves.items()
        if not isinstance(leaf, jax.Array)
    }
    digests = "".join(map(checksums.digest, local.values()))
    if len(set(gathered(checksums.number_of(digests)))) > 1:
        raise ValueError(
            f"The processes hold different values in {' or '.join([*local][:3])}"
            f"{' or others' if len(local) > 3 else ''}: NumPy arrays and numbers are "
            "stored as process 0 has them. Make them alike, or arrays of all processes "
            "with jax.make_array_from_process_local_data(sharding, value)."
        )


def write_sidecars(item: epath.Path, step: Step, parts: Parts) -> None:
    """Writes this process's checksums and, on process 0, the manifest."""
    sums = {
        name: {
            path: tuple(checksums.pieces_of(each, np.shape(step.leaves[name][path])))
            for path, each in leaves.items()
        }
        for name, leaves in parts.items()
    }
    parts.clear()  # lets go of buffers that the caller has donated
    manifest.write_sums(item, jax.process_index(), sums)
    if jax.process_index() == 0:
        manifest.write_manifest(item, step.manifest)


def finalize(item: epath.Path, handler: ocp.PyTreeCheckpointHandler) -> None:
    """Merges the files of all processes, on process 0, after all have written."""
    item = absolute(item)
    for folder in (item, item / manifest.FOLDER):
        folder = _with_literal_glob(type(folder))(folder)
        if any(folder.glob("ocdbt.process_*")):
            handler.finalize(folder)


@functools.cache
def _with_literal_glob(kind: type[epath.Path]) -> type[epath.Path]:
    """Returns a subclass of a path whose `glob` takes the path itself as it stands.

    Orbax finds the files of each process by `glob`, which in epath takes the folder's
    own path for a part of the pattern: in `lr=[0.1]` Orbax would find none, merge
    nothing, and report success.
    """

    def find(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
        return kind(glob.escape(os.fspath(self))).glob(pattern)

    return type(kind.__name__, (kind,), {"glob": find})


@contextlib.contextmanager
def _one_array_explained(tree: optax.Params) -> Iterator[None]:
    """Adds what helps to the error of an Orbax that cannot save params of one array."""
    try:
        yield
    except ValueError as error:  # of the truth value of an array
        if not isinstance(tree, (jax.Array, np.ndarray)):
            raise
        raise ValueError(
            "This version of Orbax does not save params that are one bare array "
            f"({one_line(error)}). Newer ones do: pip install -U orbax-checkpoint. Or "
            "train them in a dict, such as {'w': array}."
        ) from error


def _save_args(tree: optax.Params) -> ocp.args.PyTreeSave:
    """Returns Orbax's arguments: large leaves are stored in the blocks of checksums."""

    def leaf_args(leaf: Any) -> ocp.SaveArgs:
        return ocp.SaveArgs(
            chunk_byte_size=checksums.BLOCK if checksums.is_cut(leaf) else None
        )

    return ocp.args.PyTreeSave(tree, save_args=jax.tree.map(leaf_args, tree))


def _host_parts(step: Step, *, kept: bool = False) -> Parts:
    """Returns for each leaf the parts that this process writes."""
    return {
        name: {
            path: checksums.host_parts(leaf, kept=kept) for path, leaf in leaves.items()
        }
        for name, leaves in step.leaves.items()
    }


def _refuse_overflow(parts: Parts) -> None:
    """Raises OverflowError for shadows with values that float16 cannot hold.

    Shadows are float16 only where a snapshot rounds them. Params and state may be
    float16 themselves, and are stored as they are.
    """
    shadows = {name: x for name, x in parts.items() if name not in (PARAMS, STATE)}
    checksums.refuse_overflow(shadows)


def _fetch(step: Step) -> None:
    """Starts copying to the host the leaves that Orbax has not, all at once."""
    for leaves in step.leaves.values():
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array) and not is_key(leaf):
                leaf.copy_to_host_async()


def _host_views(step: Step, parts: Parts) -> Any:
    """Returns the trees beside the params as host arrays; None if that cannot be.

    It cannot where a leaf is sharded, or where another process writes it; and Orbax
    stores PRNG keys itself.
    """
    if jax.process_count() > 1:
        return None
    views = {}
    for name, tree in _beside(step).items():
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        leaves = []
        for path, leaf in paths:
            if isinstance(leaf, (jax.Array, np.ndarray)):
                each = parts[name][trees.path_name(path)]
                if is_key(leaf) or [array.shape for _, array in each] != [leaf.shape]:
                    return None
                leaf = each[0][1]
            leaves.append(leaf)
        views[name] = jax.tree.unflatten(treedef, leaves)
    return views


def _beside(step: Step) -> dict[str, Any]:
    """Returns the trees beside the params as one, for each store has a fixed cost."""
    return {name: tree for name, tree in step.trees.items() if name != PARAMS}
