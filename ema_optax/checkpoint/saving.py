"""Saving: Orbax writes the trees, and the manifest is inside the same commit.

An item is an Orbax checkpoint of the raw params, in their own structure, so that
whoever loads it without this library gets those. The folder `ema_optax` inside it is
another, of shadows and optimizer state, with manifest and checksums beside them. A
snapshot has that one alone.
"""

import asyncio
import functools
import threading
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import v1

from ema_optax import trees
from ema_optax.checkpoint import checksums, manifest
from ema_optax.checkpoint.agreement import gathered, together
from ema_optax.checkpoint.contents import PARAMS, STATE, Contents, is_key

ELSEWHERE = "another process could not save its part, and says why."


# Measured in benchmarks/checkpoints.py: compression, Orbax's default, makes float32
# weights 8 % smaller; without it save and restore take three quarters of the time. One
# file a leaf instead of OCDBT is within noise for large leaves, 1.2 times
# slower for a thousand small ones, and makes two files a leaf. One chunk a shard.
def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns the Orbax handler that stores one tree as we store it."""
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


async def start_save(
    item: epath.Path, content: Contents, handler: ocp.PyTreeCheckpointHandler
) -> list[Any]:
    """Does the blocking part of a save; returns the futures of the rest.

    Nothing here touches the disk: every future waits for the signal that Orbax has
    made the item's folder, and Orbax commits when all of them are done.

    Orbax's blocking part has a fixed cost for each store, tens of milliseconds of
    starting threads. Where this process holds every leaf whole, the second store is
    therefore begun in the background, from views of the leaves on the host.
    """
    refuse_different(content)
    gate = _Gate()
    futures: list[Any] = []

    async def start(folder: epath.Path, tree: Any) -> list[Any]:
        args = ocp.args.PyTreeSave(tree)  # whose arrays are copied to the host first
        return (
            await handler.async_save(cast(Any, _Gated(folder, gate)), args=args) or []
        )

    pieces: dict[str, Any] = {}
    views = None
    try:
        with together(RuntimeError(f"{item} is not saved: {ELSEWHERE}")):
            if PARAMS in content.trees:
                futures += await start(item, content.trees[PARAMS])
            _fetch(content)
            pieces = _host_pieces(content)
            views = _whole(content, pieces)
            if views is None:
                futures += await start(item / manifest.FOLDER, _beside(content))
    except BaseException:
        gate.broken = True
        raise
    finally:
        gate.opened.set()  # or the waiting threads would keep the process from ending

    async def rest() -> None:
        await _Gated(item, gate).await_creation()
        _refuse_overflow(pieces)
        started = await start(item / manifest.FOLDER, views) if views else []
        try:
            write_sidecars(item, content, pieces)
        finally:  # nothing of ours may write once this has ended
            await asyncio.to_thread(_Together(started).result)

    signalled = ocp.future.CommitFutureAwaitingContractedSignals(  # pyright: ignore
        rest(), name="ema_optax_beside"
    )
    return [_Told(_Together([*futures, signalled]), item)]


def save_now(
    item: epath.Path, content: Contents, handler: ocp.PyTreeCheckpointHandler
) -> None:
    """Saves without a background part."""
    refuse_different(content)
    beside = _beside(content)
    with together(OSError(f"{item} is not saved: {ELSEWHERE}")):
        if PARAMS in content.trees:
            handler.save(item, args=ocp.args.PyTreeSave(content.trees[PARAMS]))
        if beside:
            handler.save(item / manifest.FOLDER, args=ocp.args.PyTreeSave(beside))
        pieces = _host_pieces(content)
        _refuse_overflow(pieces)
        write_sidecars(item, content, pieces)


def refuse_different(content: Contents) -> None:
    """Raises on all processes if one has other NumPy arrays or numbers than another.

    Those of process 0 are stored, and nothing would tell of the others.
    """
    if jax.process_count() == 1:
        return
    local = {
        f"'{path}' of the {name}": np.asarray(leaf)
        for name, leaves in content.leaves.items()
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


def write_sidecars(item: epath.Path, content: Contents, pieces: dict[str, Any]) -> None:
    """Writes this process's checksums and, on process 0, the manifest."""
    sums = {
        name: {
            path: [[bounds, checksums.digest(array)] for bounds, array in parts]
            for path, parts in leaves.items()
        }
        for name, leaves in pieces.items()
    }
    pieces.clear()  # lets go of buffers that the caller has donated
    manifest.write_sealed(manifest.checksums_path(item, jax.process_index()), sums)
    if jax.process_index() == 0:
        manifest.write_sealed(manifest.manifest_path(item), content.manifest)


def finalize(item: epath.Path, handler: ocp.PyTreeCheckpointHandler) -> None:
    """Merges what the processes wrote; on process 0, once all have written."""
    for folder in (item, item / manifest.FOLDER):
        if any(folder.glob("ocdbt.process_*")):
            handler.finalize(folder)


def _host_pieces(content: Contents) -> dict[str, Any]:
    """Returns tree → path → what this process writes of that leaf."""
    return {
        name: {path: checksums.host_pieces(leaf) for path, leaf in leaves.items()}
        for name, leaves in content.leaves.items()
    }


def _refuse_overflow(pieces: dict[str, Any]) -> None:
    """Raises OverflowError for shadows rounded to float16 that it cannot hold.

    They are kept in no float16 but that of a snapshot. Params and state may be, and
    are stored as they are.
    """
    shadows = {name: x for name, x in pieces.items() if name not in (PARAMS, STATE)}
    checksums.refuse_overflow(shadows)


def _fetch(content: Contents) -> None:
    """Starts copying to the host what Orbax has not, all leaves at once."""
    for leaves in content.leaves.values():
        for leaf in leaves.values():
            if isinstance(leaf, jax.Array) and not is_key(leaf):
                leaf.copy_to_host_async()


def _whole(content: Contents, pieces: dict[str, Any]) -> Any:
    """Returns what lies beside the params, of host arrays; None if that cannot be.

    It cannot where a leaf is sharded, or where another process must write it; and PRNG
    keys are for Orbax to store.
    """
    if jax.process_count() > 1:
        return None
    views = {}
    for name, tree in _beside(content).items():
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        leaves = []
        for path, leaf in paths:
            if isinstance(leaf, (jax.Array, np.ndarray)):
                parts = pieces[name][trees.path_name(path)]
                if is_key(leaf) or [array.shape for _, array in parts] != [leaf.shape]:
                    return None
                leaf = parts[0][1]
            leaves.append(leaf)
        views[name] = jax.tree.unflatten(treedef, leaves)
    return views


def _beside(content: Contents) -> dict[str, Any]:
    """Returns what lies beside the params, as one tree: each store has a fixed cost."""
    return {name: tree for name, tree in content.trees.items() if name != PARAMS}


class _Together:
    """Futures as one that ends, well or not, when nothing writes any more."""

    def __init__(self, futures: list[Any]) -> None:
        self._futures = futures

    def result(self, timeout: float | None = None) -> None:
        """Waits for all of them; raises the first error."""
        errors = []
        for future in self._futures:
            try:
                future.result(timeout=timeout)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class _Told:
    """A future whose error on one process is one on all, where a save blocks.

    Orbax then waits for it on the thread that started the save, and afterwards for the
    other processes, without a bound. A background thread must not compute: its
    collective could meet those of the training step. There Orbax's bound is
    `AsyncOptions.timeout_secs`.
    """

    def __init__(self, future: _Together, item: epath.Path) -> None:
        self._future, self._item = future, item
        self._thread = threading.get_ident()

    def result(self, timeout: float | None = None) -> None:
        """Waits for it; raises its error, or that there is one elsewhere."""
        if threading.get_ident() != self._thread:
            return self._future.result(timeout)
        with together(OSError(f"{self._item} is not saved: {ELSEWHERE}")):
            return self._future.result(timeout)


class _Gate:
    """Holds writing back until the blocking part is done, which it would slow down."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.broken = False


class _Gated(v1.path.PathAwaitingCreation):
    """A folder that Orbax's writers may use once the gate is open."""

    def __init__(self, folder: epath.Path, gate: _Gate) -> None:
        self._folder, self._gate = folder, gate

    def __truediv__(self, other: Any) -> "_Gated":
        return _Gated(self._folder / other, self._gate)

    @property
    def path(self) -> epath.Path:
        return self._folder

    async def await_creation(self) -> epath.Path:
        if not self._gate.opened.is_set():
            await asyncio.to_thread(self._gate.opened.wait)
        if self._gate.broken:
            raise RuntimeError("Another part of this save could not be started.")
        return _awaitable_again(type(self._folder))(self._folder)


@functools.cache
def _awaitable_again(kind: type) -> type:
    """Returns a kind of path that can be awaited although it is there.

    Orbax's threads share what they know of a leaf. Between a thread's finding that the
    folder is to be awaited, and its awaiting it, another may put the path in its place.
    """

    async def await_creation(self: Any) -> Any:
        return self

    return type(kind.__name__, (kind,), {"await_creation": await_creation})
