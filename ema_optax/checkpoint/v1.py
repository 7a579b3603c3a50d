"""The same checkpoints under `orbax.checkpoint.v1`, by a thin handler."""

import asyncio
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import multihost, v1

from ema_optax.checkpoint import saving
from ema_optax.checkpoint.contents import PARAMS
from ema_optax.checkpoint.handler import EmaRestore, EmaSave


@v1.handlers.register_handler
class EmaCheckpointableHandler(v1.CheckpointableHandler):
    """Lets v1 save `EmaSave` and load `EmaRestore` or `EmaResume` as checkpointables.

        v1.save_checkpointables(path, {"default": EmaSave(params, opt_state)})
        v1.load_checkpointables(path, {"default": EmaRestore("shadow", like=params)})

    The name `default` is the one that a v0 manager gives to a single item, so that each
    reads the other's steps. (v1 keeps `state` for its own handler of pytrees.)
    """

    def is_handleable(self, checkpointable: Any) -> bool:
        """Returns whether this is something to save."""
        return isinstance(checkpointable, EmaSave)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Returns whether this says what to load."""
        return isinstance(abstract_checkpointable, EmaRestore)

    async def save(self, directory: Any, checkpointable: EmaSave) -> Any:
        """Does the blocking part and returns the rest as an awaitable."""
        handler = saving.tree_handler()
        futures = await saving.start_save(
            epath.Path(directory.path), checkpointable.contents(), handler
        )

        async def background() -> None:
            await directory.await_creation()  # sends what the futures wait for
            for future in futures:
                await asyncio.to_thread(future.result)
            # v1 has no barrier of its own before it renames. No collective of devices:
            # beside those of the training step it would come in any order, and hang.
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
        """Returns the load as an awaitable; the raw params where nothing is asked."""
        args = abstract_checkpointable or EmaRestore(PARAMS)

        async def background() -> Any:
            return await asyncio.to_thread(args.read, epath.Path(directory))

        return background()

    async def metadata(self, directory: Any) -> Any:
        """Returns Orbax's metadata of the raw params."""
        return await v1.handlers.PyTreeHandler().metadata(directory)
