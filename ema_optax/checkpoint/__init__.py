"""Params and shadow side by side in Orbax checkpoints, and the chosen one restored.

    manager.save(step, args=checkpoint.EmaSave(params, opt_state))
    params = checkpoint.restore(directory, "shadow", like=abstract_params)

This package is the only importer of Orbax.
"""

from ema_optax.checkpoint.directory import (
    Description,
    Leaf,
    Tree,
    describe,
    restore,
    resume,
    save,
    save_average,
    verify,
)
from ema_optax.checkpoint.handler import (
    EmaHandler,
    EmaRestore,
    EmaResume,
    EmaSave,
    SnapshotSave,
)
from ema_optax.checkpoint.manifest import CorruptCheckpointError
from ema_optax.checkpoint.snapshots import KeepSnapshots, snapshots
from ema_optax.checkpoint.stored import StoredTree, stored
from ema_optax.checkpoint.v1 import EmaCheckpointableHandler

__all__ = [
    "CorruptCheckpointError",
    "Description",
    "EmaCheckpointableHandler",
    "EmaHandler",
    "EmaRestore",
    "EmaResume",
    "EmaSave",
    "KeepSnapshots",
    "Leaf",
    "SnapshotSave",
    "StoredTree",
    "Tree",
    "describe",
    "restore",
    "resume",
    "save",
    "save_average",
    "snapshots",
    "stored",
    "verify",
]
