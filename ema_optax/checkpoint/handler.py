"""Orbax's side: the arguments, and the handler that a CheckpointManager calls."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from ema_optax.checkpoint import saving
from ema_optax.checkpoint.contents import PARAMS, SHADOW, Contents, contents, snapshot
from ema_optax.checkpoint.manifest import CorruptCheckpointError
from ema_optax.checkpoint.restoring import restore_run, restore_tree
from ema_optax.checkpoint.steps import explained
from ema_optax.version import __version__


class EmaHandler(ocp.AsyncCheckpointHandler):
    """Saves and restores params, shadows and optimizer state as one item."""

    def __init__(self) -> None:
        self._trees = saving.tree_handler()
        # What a step's metadata names as the handler of this item. With Orbax's own,
        # a manager restores the raw params where this library is missing.
        self.typestr = ocp.PyTreeCheckpointHandler.typestr

    async def async_save(self, directory: epath.Path, args: "EmaSave") -> Any:
        """Starts a save and returns the futures that finish it."""
        return await saving.start_save(directory, args.contents(), self._trees)

    def save(self, directory: epath.Path, args: "EmaSave") -> None:
        """Saves without a background part."""
        saving.save_now(directory, args.contents(), self._trees)

    def restore(self, directory: epath.Path, args: "EmaRestore | None" = None) -> Any:
        """Restores a tree, or a whole run."""
        return (args or EmaRestore(PARAMS)).read(directory)

    def metadata(self, directory: epath.Path) -> Any:
        """Returns Orbax's metadata of the raw params; None where there are none."""
        if not (directory / "_METADATA").exists():
            return None
        return self._trees.metadata(directory)

    def finalize(self, directory: epath.Path) -> None:
        """Completes what all processes wrote."""
        saving.finalize(directory, self._trees)

    def close(self) -> None:
        """Ends the threads of the handler."""
        self._trees.close()


@ocp.args.register_with_handler(EmaHandler, for_save=True)
@dataclasses.dataclass
class EmaSave(ocp.args.CheckpointArgs):
    """Save params and optimizer state, the shadows as trees of their own.

    With a manager, alone or in a Composite; asynchronous where the manager is. The
    arrays may be donated or deleted as soon as `save` returns.

    Args:
        params: The live params, any tree of arrays.
        opt_state: The optimizer state, with one or more shadows anywhere in it.
        extra: Anything that is JSON, kept in the manifest; `describe` returns it.

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

    params: Any
    opt_state: Any
    extra: Any = None
    instead: Callable[[], Contents] | None = None  # not for users: see SnapshotSave

    def contents(self) -> Contents:
        """Returns what to store; raises before anything is written."""
        if self.instead is not None:
            return self.instead()
        return contents(self.params, self.opt_state, self.extra, __version__)


@ocp.args.register_with_handler(EmaHandler, for_restore=True)
@dataclasses.dataclass
class EmaRestore(ocp.args.CheckpointArgs):
    """Restore one tree into the slots of a model; see `checkpoint.restore`.

    A manager's `restore(step)` without arguments means `EmaRestore()` where this
    library is imported, and the raw params where it is not.

    >>> EmaRestore("params", like={"w": 0.0}, rename={"w": "dense/kernel"}).tree
    'params'
    """

    tree: str = SHADOW
    like: Any = None
    rename: Mapping[str, str] | None = None
    verify: bool = True
    run: tuple[Any, Any, bool] | None = None  # set by EmaResume alone

    def read(self, item: Any) -> Any:
        """Reads what was asked for from the folder of an item."""
        item = epath.Path(item)
        try:
            if self.run is None:
                return restore_tree(
                    item, self.tree, self.like, self.rename, verify=self.verify
                )
            params, opt_state, accept = self.run
            return restore_run(
                item, params, opt_state, accept_new_decay=accept, verify=self.verify
            )
        except CorruptCheckpointError as error:
            raise explained(item, error) from error


def EmaResume(  # noqa: N802 used as the other arguments are
    params: Any,
    opt_state: Any,
    *,
    accept_new_decay: bool = False,
    verify: bool = True,
) -> EmaRestore:
    """Restore params and optimizer state exactly, to go on; see `checkpoint.resume`.

    Returns `EmaRestore` arguments: a manager binds an item to one type of them.

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
    return EmaRestore(verify=verify, run=(params, opt_state, accept_new_decay))


def SnapshotSave(  # noqa: N802 used as the other arguments are
    opt_state: Any, *, dtype: Any = None, extra: Any = None
) -> EmaSave:
    """Save the shadows alone, as one small step to reconstruct other averages from.

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
    return EmaSave(
        None, opt_state, extra, lambda: snapshot(opt_state, dtype, extra, __version__)
    )
