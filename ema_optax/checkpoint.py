"""Saves params and shadow side by side in Orbax checkpoints, and restores either.

    manager.save(step, args=checkpoint.EmaSave(params, opt_state))
    params = checkpoint.restore(directory, "shadow", like=abstract_params)

Of the whole library, only the folder `_checkpoint` imports Orbax.
"""

from ema_optax._checkpoint.adopting import Adopted, adopt
from ema_optax._checkpoint.changes import Changes, Resumed
from ema_optax._checkpoint.directory import (
    Description,
    describe,
    restore,
    save,
    save_average,
    verify,
)
from ema_optax._checkpoint.entries import LeafEntry as Leaf
from ema_optax._checkpoint.entries import TreeEntry as Tree
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.foreign_sources import ForeignTree, stored_by_others
from ema_optax._checkpoint.handlers import (
    EmaCheckpointableHandler,
    EmaHandler,
    EmaRestore,
    EmaResume,
    EmaSave,
    SnapshotSave,
)
from ema_optax._checkpoint.resuming import resume
from ema_optax._checkpoint.retention import KeepSnapshots
from ema_optax._checkpoint.snapshots import snapshots
from ema_optax._checkpoint.sources import StoredTree, stored

__all__ = [
    "Adopted",
    "Changes",
    "CorruptCheckpointError",
    "Description",
    "EmaCheckpointableHandler",
    "EmaHandler",
    "EmaRestore",
    "EmaResume",
    "EmaSave",
    "ForeignTree",
    "KeepSnapshots",
    "Leaf",
    "Resumed",
    "SnapshotSave",
    "StoredTree",
    "Tree",
    "adopt",
    "describe",
    "restore",
    "resume",
    "save",
    "save_average",
    "snapshots",
    "stored",
    "stored_by_others",
    "verify",
]
