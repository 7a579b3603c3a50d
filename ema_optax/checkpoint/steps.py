"""Finds the steps of a directory, and the item of ours in each."""

import re
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from ema_optax.checkpoint import manifest
from ema_optax.checkpoint.manifest import PARAMS
from ema_optax.checkpoint.processes import gathered

_STEP_NAME = re.compile(r"(?:.*[^0-9])?([0-9]+)")  # 300, step_300, ckpt-00000300
_ORBAX_STEP = "_CHECKPOINT_METADATA"  # what Orbax writes into each step


class Step(NamedTuple):
    """A step on disk: its number, or None where the path does not say, and its item."""

    number: int | None
    item: epath.Path


def find_step(directory: epath.PathLike, step: int | None) -> Step:
    """Returns a step of a directory: the newest, or the one of that number.

    Args:
        directory: The folder of a CheckpointManager or of `checkpoint.save`, or one
            step in it.
        step: Its number; None for the newest committed one.

    Raises:
        FileNotFoundError: If there is no such step.
        PermissionError: If it may not be read.
        ValueError: If the newest step was not saved by this library.
    """
    root = absolute(directory)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"There is no checkpoint at {root}: it {what}. Pass the folder that "
            "checkpoint.save or the CheckpointManager was given."
        )
    alone = item_in(root)
    if alone is not None:
        number = number_of(step_folder(alone))
        if step in (None, number):
            return Step(number, alone)
    found = steps_in(root)
    if not found:
        raise FileNotFoundError(
            f"{root} holds no checkpoint: no committed step is in it. Pass the folder "
            "that checkpoint.save or the CheckpointManager was given."
        )
    if step is not None and step not in found:
        numbers = ", ".join(map(str, sorted(found)))
        raise FileNotFoundError(f"{root} has no step {step}; it has {numbers}.")
    number = max(found) if step is None else step
    item = item_in(found[number])
    if item is None:
        next(iter(found[number].iterdir()), None)  # raises if it may not be read
        ours = [n for n in sorted(found) if item_in(found[n]) is not None]
        raise ValueError(
            f"Step {number} of {root} was not saved by ema_optax, or its folder "
            f"'{manifest.FOLDER}' is gone. Steps that were: "
            f"{', '.join(map(str, ours)) or 'none'}; pass step=… for one of them."
        )
    return Step(number, item)


def find_same_step(directory: epath.PathLike, step: int | None) -> Step:
    """Returns the step that all processes then read; all of them must call it alike.

    The newest is what process 0 finds. A network file system may show it to one host
    before another, and parts of two steps would be neither.

    Raises:
        FileNotFoundError: If no process finds such a step.
        RuntimeError: On all of them, if only some do.
        ValueError: If they ask for different steps.
    """
    found = error = None
    try:
        found = find_step(directory, step)
    except (OSError, ValueError) as caught:
        error = caught
    none, unnamed = -2, -1
    number = unnamed if found is None or found.number is None else found.number
    numbers = gathered(none if found is None else number)
    if len(set(numbers)) == 1:
        if found is None:
            raise error or AssertionError("either is there")
        return found
    seen = ", ".join(
        f"process {process} {'none' if number == none else number}"
        for process, number in enumerate(numbers)
    )
    if none in numbers:
        # No FileNotFoundError, on which some programs begin anew, beside a run.
        raise RuntimeError(
            f"Not all processes find the step in {absolute(directory)}: {seen}. Each "
            "of them reads its part: pass a folder on a file system that all hosts "
            "share, or wait until all of them show the step."
        ) from error
    if step is not None:
        raise ValueError(
            f"The processes ask for different steps of {absolute(directory)}: {seen}. "
            "Pass the same step=… on each."
        )
    return find_same_step(directory, numbers[0])


def all_steps(root: epath.Path) -> list[epath.Path]:
    """Returns the items of ours in a directory, or of one step, oldest step first.

    Steps that were not saved by this library are passed over.

    Raises:
        FileNotFoundError: If there is no step.
        ValueError: If none was saved by this library.
    """
    if root.is_dir() and item_in(root) is None:
        found = steps_in(root)
        items = [item_in(found[number]) for number in sorted(found)]
        ours = [item for item in items if item is not None]
        if ours:
            return ours
    return [find_step(root, None).item]  # or says what is there instead


def absolute(directory: Any) -> epath.Path:
    """Returns a directory as Orbax wants it, with `~` replaced."""
    return epath.Path(directory).expanduser().absolute()


def steps_in(root: epath.Path) -> dict[int, epath.Path]:
    """Returns the folders of the committed steps, by number."""
    found = {}
    for path in root.iterdir():
        number = number_of(path)
        if number is not None and path.is_dir() and _is_committed(path):
            found[number] = path
    return found


def _is_committed(path: epath.Path) -> bool:
    return ocp.step.TMP_DIR_SUFFIX not in path.name and ocp.step.is_path_finalized(path)


def number_of(path: epath.Path) -> int | None:
    """Returns the number that the name of a step's folder ends with."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def step_folder(item: epath.Path) -> epath.Path:
    """Returns the folder of the step of an item, which may be the item itself."""
    if (item.parent / _ORBAX_STEP).exists():
        return item.parent
    is_step = (item / _ORBAX_STEP).exists() or number_of(item) is not None
    return item if is_step else item.parent


def item_in(folder: epath.Path) -> epath.Path | None:
    """Returns the item of ours that a step is or holds, whatever it is called."""
    if (folder / manifest.FOLDER).is_dir():
        return folder
    names = ("default", "state", PARAMS)  # the usual ones first
    is_run = not (folder / _ORBAX_STEP).exists()  # what it holds are no items
    others = [] if is_run else sorted(folder.iterdir())
    for path in (*(folder / name for name in names), *others):
        if (path / manifest.FOLDER).is_dir():
            return path
    return None
