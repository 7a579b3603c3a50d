"""Orbax's side: the arguments, and the handlers that its two interfaces call."""

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath
from jax.typing import DTypeLike
from orbax.checkpoint import multihost, v1

from ema_optax._checkpoint import saving, step, storage
from ema_optax._checkpoint.changed_run import restore_what_fits
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.exact_run import restore_run
from ema_optax._checkpoint.manifest import SHADOW
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.rescue import explained
from ema_optax._checkpoint.restoring import SLOTS, restore_raw, restore_tree
from ema_optax._checkpoint.stored_names import SLOTS as STORED
from ema_optax._messages import arguments
from ema_optax._messages.text import brief
from ema_optax._trees.renaming import Renames

Reading: TypeAlias = Callable[[epath.Path], Any]

# Values of `missing`, and how each restores a run.
_MISSING = {"refuse": restore_run, "start": restore_what_fits}


class EmaHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores params, shadows and optimizer state as one item.

    A manager needs it as `item_handlers=` in one case alone: where its first call is a
    bare `restore(step)`. Orbax then binds the item to the handler that the step names,
    its own, and refuses `EmaRestore`, `EmaResume` and `EmaSave` from there on.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ema_optax.checkpoint.save(folder, params, opt_state, step=1)
    ...     with ocp.CheckpointManager(folder, item_handlers=EmaHandler()) as manager:
    ...         raw = manager.restore(1)
    ...         manager.restore(1, args=EmaRestore("shadow", like=raw))
    {'w': Array([1., 1.], dtype=float32)}
    """

    def __init__(self) -> None:
        self._trees = saving.tree_handler()
        # The handler that a step's metadata names for this item. With Orbax's own, a
        # manager restores the raw params where this library is missing.
        self.typestr = ocp.PyTreeCheckpointHandler.typestr

    async def async_save(self, directory: epath.Path, args: "EmaSave") -> Any:
        """Starts a save and returns the futures that finish it."""
        if args._at_once:
            await asyncio.to_thread(saving.save_now, directory, args.contents)
            return []
        return await saving.start_save(directory, args.contents, self._trees)

    def save(self, directory: epath.Path, args: "EmaSave") -> None:
        """Saves without a background part."""
        saving.save_now(directory, args.contents)

    def restore(self, directory: epath.Path, args: "RestoreArgs | None" = None) -> Any:
        """Restores a tree, or a whole run."""
        return (args or RestoreArgs()).read(directory)

    def metadata(self, directory: epath.Path) -> Any:
        """Returns Orbax's metadata of the raw params; None where there are none."""
        if "_METADATA" not in (storage.listed(directory) or {}):
            return None
        return self._trees.metadata(directory)

    def finalize(self, directory: epath.Path) -> None:
        """Merges the files of all processes."""
        saving.finalize(directory, self._trees)

    def close(self) -> None:
        """Ends the threads of the handler."""
        self._trees.close()


@ocp.args.register_with_handler(EmaHandler, for_save=True)
@dataclasses.dataclass
class EmaSave(ocp.args.CheckpointArgs):
    """Saves params and optimizer state, the shadows as trees of their own.

    With a manager, alone or in a Composite; asynchronous where the manager is. The
    arrays may be donated or deleted as soon as `save` returns.

    Args:
        params: The live params, any tree of arrays.
        opt_state: The optimizer state, with one or more shadows anywhere in it.
        extra: Anything that is JSON, kept in the manifest; `describe` returns it.
        averaged: Where in `params` the tree sits that the optimizer was given, such as
            `"params"` of Linen's variables, which hold statistics too; None finds it.
            Of several averages, each by the place of its state in `opt_state`:
            `{"generator": "gen/params", "critic": "critic/params"}`.

    Raises:
        ValueError: If there is no shadow, or it cannot be told of which part of the
            params it is.
        TypeError: If a leaf cannot be stored, or `extra` is not JSON.

    >>> import tempfile, optax, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:
    ...         _ = manager.save(1, args=EmaSave(params, opt_state))
    ...         manager.wait_until_finished()
    ...         manager.restore(1, args=EmaRestore("shadow", like=params))
    {'w': Array([1., 1.], dtype=float32)}
    """

    params: optax.Params
    opt_state: optax.OptState
    extra: Any = None
    averaged: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._at_once = False
        self._contents = step.of_run(
            self.params, self.opt_state, self.extra, self.averaged
        )

    @property
    def contents(self) -> step.Step:
        """The step to store, built with the arguments so that errors rise there."""
        return self._contents


@ocp.args.register_with_handler(EmaHandler, for_restore=True)
@dataclasses.dataclass
class RestoreArgs(ocp.args.CheckpointArgs):
    """Arguments of `EmaRestore` and `EmaResume`: Orbax binds an item to one type.

    For a bare `restore(step)` a manager makes them without a reading. It then gives the
    raw params, as Orbax does where this library is missing.
    """

    reading: Reading = restore_raw

    def read(self, item: epath.PathLike) -> Any:
        """Reads from the folder of an item what the arguments ask for."""
        item = absolute(item)
        try:
            return self.reading(item)
        except CorruptCheckpointError as error:
            raise explained(item, error) from error


def EmaRestore(  # noqa: N802 used as the other arguments are
    tree: str = SHADOW,
    like: Any = None,
    rename: Mapping[str, str] | None = None,
    verify: bool = True,
) -> RestoreArgs:
    """Restores one tree into the slots of a model; see `checkpoint.restore`.

    A manager's `restore(step)` without arguments is not `EmaRestore()`: it gives the
    raw params, as nested dicts and lists, whether this library is imported or not.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:
    ...         _ = manager.save(1, args=EmaSave(params, opt_state))
    ...         manager.wait_until_finished()
    ...         manager.restore(1, args=EmaRestore("params", like=params))
    {'w': Array([1., 1.], dtype=float32)}
    """
    if not isinstance(tree, str):
        raise TypeError(
            f"The name of a tree is a text such as 'shadow' or 'params', got "
            f"{brief(tree)}. Pass the model by name: restore(directory, like=…)."
        )
    Renames(rename, SLOTS)  # refuses what is no renaming
    verify = arguments.flag(verify, "verify")
    return RestoreArgs(
        lambda item: restore_tree(item, tree, like, rename, verify=verify)
    )


def EmaResume(  # noqa: N802 used as the other arguments are
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    accept_new_decay: bool = False,
    rename: Mapping[str, str] | None = None,
    missing: str = "refuse",
    verify: bool = True,
) -> RestoreArgs:
    """Restores params and optimizer state to go on with; see `checkpoint.resume`.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:
    ...         _ = manager.save(1, args=EmaSave(params, opt_state))
    ...         manager.wait_until_finished()
    ...         again = EmaResume(params, opt_state)
    ...         params, opt_state = manager.restore(1, args=again)
    >>> opt_state.count
    Array(0, dtype=int32)
    """
    accept_new_decay = arguments.flag(accept_new_decay, "accept_new_decay")
    verify = arguments.flag(verify, "verify")
    Renames(rename, STORED)  # refuses what is no renaming
    if not isinstance(missing, str) or missing not in _MISSING:
        raise ValueError(
            f"missing is 'refuse', to resume all of a run or nothing, or 'start', to "
            f"take what fits and start the rest; got {brief(missing)}."
        )
    restore = _MISSING[missing]
    return RestoreArgs(
        lambda item: restore(
            item,
            params,
            opt_state,
            accept_new_decay=accept_new_decay,
            rename=rename,
            verify=verify,
        )
    )


def SnapshotSave(  # noqa: N802 used as the other arguments are
    opt_state: optax.OptState, *, dtype: DTypeLike | None = None, extra: Any = None
) -> EmaSave:
    """Saves the shadows alone, as one small step to reconstruct other averages from.

    With a manager and a folder of their own, asynchronous where the manager is, and as
    often as wanted: `reconstruction.plan` tells how often. `checkpoint.snapshots`
    reads them; `checkpoint.restore` gives a single one, without leaves that are not
    averaged. `KeepSnapshots` is a retention that thins them out evenly.

    Args:
        opt_state: The optimizer state, with one or more shadows anywhere in it.
        dtype: "float16", "bfloat16" or "float32", to round wider shadows to; None
            keeps theirs. The rounding error of an average is at most
            `Reconstruction.noise_gain` times that of a snapshot, which is 3e-4 of each
            param in float16 and 2e-3 in bfloat16. Values beyond 65504 do not fit
            float16: the save fails.
        extra: Anything that is JSON, kept in the manifest; `describe` returns it.

    Returns:
        `EmaSave` arguments: a manager binds an item to one type of them.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(ema_optax.power(0.05)).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:
    ...         _ = manager.save(1, args=SnapshotSave(opt_state, dtype="float16"))
    ...         manager.wait_until_finished()
    ...         manager.restore(1, args=EmaRestore("shadow", like=params))
    {'w': Array([1., 1.], dtype=float32)}
    """
    return save_args(step.of_shadows(opt_state, dtype, extra))


def save_args(contents: step.Step, *, at_once: bool = False) -> EmaSave:
    """Returns the arguments that save a step already built.

    Args:
        contents: The step.
        at_once: Whether to save all of it before returning, without copies of its
            NumPy arrays. For a manager without asynchronous saves.
    """
    args: Any = object.__new__(EmaSave)
    args.params = args.opt_state = args.extra = args.averaged = None
    args._contents = contents
    args._at_once = at_once
    return args


@v1.handlers.register_handler
class EmaCheckpointableHandler(v1.CheckpointableHandler):
    """Lets v1 save `EmaSave` and load `EmaRestore` or `EmaResume` as checkpointables.

        v1.save_checkpointables(path, {"default": EmaSave(params, opt_state)})
        v1.load_checkpointables(path, {"default": EmaRestore("shadow", like=params)})

    The name `default` is the one that a v0 manager gives to a single item, so that each
    reads the other's steps. (v1 keeps `state` for its own handler of pytrees.)
    """

    def is_handleable(self, checkpointable: Any) -> bool:
        """Returns whether this is an `EmaSave`."""
        return isinstance(checkpointable, EmaSave)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Returns whether this is an `EmaRestore` or `EmaResume`."""
        return isinstance(abstract_checkpointable, RestoreArgs)

    async def save(self, directory: Any, checkpointable: EmaSave) -> Any:
        """Does the blocking part and returns the rest as an awaitable."""
        handler = saving.tree_handler()
        futures = await saving.start_save(
            epath.Path(directory.path), checkpointable.contents, handler
        )

        async def background() -> None:
            await directory.await_creation()  # signals the futures
            for future in futures:
                await asyncio.to_thread(future.result)
            # v1 renames the folder without a barrier. This one is no collective of
            # devices: among those of the training step it would hang, for their order
            # could differ between processes.
            await asyncio.to_thread(
                multihost.get_barrier_sync_fn(),
                key=f"ema_optax_saved:{directory.path}",
                timeout_ms=1000 * ocp.options.AsyncOptions().timeout_secs,
            )
            if jax.process_index() == 0:
                item = epath.Path(directory.path)
                await asyncio.to_thread(saving.finalize, item, handler)

        return background()

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
        """Returns the load as an awaitable; of the raw params without arguments."""
        args = abstract_checkpointable or RestoreArgs()

        async def background() -> Any:
            return await asyncio.to_thread(args.read, epath.Path(directory))

        return background()

    async def metadata(self, directory: Any) -> Any:
        """Returns Orbax's metadata of the raw params."""
        return await v1.handlers.PyTreeHandler().metadata(directory)
