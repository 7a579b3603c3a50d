"""Finds the checkpoint of another program that a path means."""

import re
from collections.abc import Mapping
from pathlib import Path

import orbax.checkpoint as ocp
from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._checkpoint.foreign import Foreign
from ema_optax._checkpoint.foreign_arrays import ArrayFolders, has_arrays
from ema_optax._checkpoint.foreign_msgpack import MsgpackFile
from ema_optax._checkpoint.foreign_orbax import METADATA, OrbaxStep, trees_in
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.steps import (
    is_committed,
    items_in,
    number_of,
    step_folder,
    steps_in,
)
from ema_optax._messages import arguments, text

_STEP = "_CHECKPOINT_METADATA"
_FILE = re.compile(r".*(\.msgpack|\.flax|checkpoint_[0-9]+)")


def opened(source: epath.PathLike, step: int | None) -> Foreign:
    """Opens the checkpoint that a path means.

    Args:
        source: The folder of a `CheckpointManager`, of a step, or of an item in it; a
            folder of zarr arrays; a msgpack file.
        step: Number of the step, where it is the folder of several; None is the newest.

    Raises:
        CorruptCheckpointError: If it is damaged.
        FileNotFoundError: If there is none, or no such step.
        ValueError: If it is one of ours, or was not committed.
    """
    root = absolute(source)
    if step is not None:
        step = arguments.whole(step, "step", 0, "step=None is the newest.")
    entries = storage.listed(root)
    if entries is None:
        if storage.is_file(root):
            return MsgpackFile(Path(root), number_of(root))
        raise FileNotFoundError(
            f"There is no checkpoint at {root}: it does not exist. Pass the folder of "
            "a CheckpointManager, of one of its steps, or a file of flax.serialization."
        )
    _refuse_begun(root)
    if METADATA in entries:
        _refuse_begun(root.parent)
    if not _is_step(entries):
        folders = steps_in(root)
        if step is not None and folders and step not in folders:
            raise FileNotFoundError(
                f"{root} has no committed step {step}; it has "
                f"{', '.join(map(str, folders))}."
            )
        if folders:
            root = folders[max(folders) if step is None else step]
            entries = storage.listed(root) or {}
    _refuse_ours(root)
    found = trees_in(root, entries)
    if found:
        return OrbaxStep(root, found, number_of(step_folder(root)))
    if has_arrays(root):
        return ArrayFolders(root, number_of(root))
    files = [name for name in sorted(entries) if _FILE.fullmatch(name)]
    raise FileNotFoundError(
        f"{root} holds no checkpoint that is known: no committed step of Orbax, and no "
        "arrays. "
        + (
            f"Pass one of its files: {text.some(files)}."
            if files
            else f"It holds {text.some(map(repr, sorted(entries))) or 'nothing'}."
        )
    )


def folders_of(source: epath.PathLike) -> dict[int, epath.Path]:
    """Returns the committed steps in a folder by number; of one step itself alone.

    Whoever saved them. A step whose name has no number is number 0.
    """
    root = absolute(source)
    entries = storage.listed(root) or {}
    if _is_step(entries) or items_in(root):
        return {number_of(step_folder(root)) or 0: root}
    return steps_in(root)


def _is_step(entries: Mapping[str, bool]) -> bool:
    """Returns whether a folder is a step or an item of Orbax, by what it holds."""
    return METADATA in entries or _STEP in entries


def _refuse_begun(folder: epath.Path) -> None:
    """Refuses a step that was not written to its end."""
    begun = ocp.step.TMP_DIR_SUFFIX in folder.name
    if not begun:
        inside = storage.listed(folder) or {}
        begun = _STEP in inside and not is_committed(folder, inside)
    if begun:
        raise ValueError(
            f"{folder} was not written to its end: it is no committed step. Pass an "
            "earlier one of the run."
        )


def _refuse_ours(folder: epath.Path) -> None:
    """Refuses a step that this library reads without more."""
    ours = items_in(folder)
    if ours:
        raise ValueError(
            f"{ours[0]} was saved by ema_optax: there is nothing to adopt. Read it by "
            "checkpoint.restore(directory, 'shadow', like=…), or go on with it by "
            "checkpoint.resume(directory, params, opt_state)."
        )
