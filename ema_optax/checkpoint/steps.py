"""Finds the steps of a directory, and the item of ours in each."""

import re
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from ema_optax import arguments, text
from ema_optax.checkpoint import manifest
from ema_optax.checkpoint.manifest import PARAMS
from ema_optax.checkpoint.paths import absolute
from ema_optax.checkpoint.processes import gathered

# 300, step_300, ckpt-00000300; not the 07 of width-0.07.
_STEP_NAME = re.compile(r"(.*[^0-9.])?([0-9]+)")
_ORBAX_STEP = "_CHECKPOINT_METADATA"  # what Orbax writes into each step


class Step(NamedTuple):
    """A step on disk: its number, or None where the path does not say, and its item."""

    number: int | None
    item: epath.Path


class Found(NamedTuple):
    """What a directory holds.

    Attributes:
        number: Of the step, or None where the path does not say.
        items: Those of ours in it, at least one.
        numbers: Of all committed steps of the run; of a step alone its own.
    """

    number: int | None
    items: list[epath.Path]
    numbers: list[int]


def find_step(
    directory: epath.PathLike, step: int | None, item: str | None = None
) -> Step:
    """Returns a step of a directory: the newest, or the one of that number.

    Args:
        directory: The folder of a CheckpointManager or of `checkpoint.save`, or one
            step in it.
        step: Its number; None for the newest committed one.
        item: Name of the item in it; None for the only one.

    Raises:
        FileNotFoundError: If there is no such step.
        PermissionError: If it may not be read.
        ValueError: If the newest step was not saved by this library, or holds several
            items and none was named.
    """
    found = find(directory, step)
    return Step(found.number, named(found.items, item))


def find_same_step(
    directory: epath.PathLike, step: int | None, item: str | None = None
) -> Step:
    """Returns the step that all processes then read; all of them must call it alike.

    The newest is what process 0 finds. A network file system may show it to one host
    before another, and parts of two steps would be neither.

    Raises:
        FileNotFoundError: If no process finds such a step.
        RuntimeError: On all of them, if only some do.
        ValueError: If they ask for different steps, or it holds several items and none
            was named.
    """
    found = _find_same(directory, step)
    return Step(found.number, named(found.items, item))


def find_same_items(
    directory: epath.PathLike, step: int | None, item: str | None
) -> list[epath.Path]:
    """Returns the items of a step, or the one of a name; see `find_same_step`."""
    items = _find_same(directory, step).items
    return items if item is None else [named(items, item)]


def find(directory: epath.PathLike, step: int | None) -> Found:
    """Returns a step of a directory with all items of ours; see `find_step`."""
    root = absolute(directory)
    if step is not None:
        step = arguments.whole(step, "step", 0, "step=None is the newest.")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"There is no checkpoint at {root}: it {what}. Pass the folder that "
            "checkpoint.save or the CheckpointManager was given."
        )
    alone = items_in(root)
    if alone:
        number = number_of(step_folder(alone[0]))
        if step in (None, number):
            return Found(number, alone, [] if number is None else [number])
    found = steps_in(root)
    if not found:
        deeper = runs_in(root)
        raise FileNotFoundError(
            f"{root} holds no checkpoint: no committed step is in it. Pass the folder "
            "that checkpoint.save or the CheckpointManager was given"
            + (f", such as {text.some(map(str, deeper))}." if deeper else ".")
        )
    if step is not None and step not in found:
        numbers = ", ".join(map(str, sorted(found)))
        raise FileNotFoundError(f"{root} has no step {step}; it has {numbers}.")
    number = max(found) if step is None else step
    items = items_in(found[number])
    if items:
        return Found(number, items, sorted(found))
    next(iter(found[number].iterdir()), None)  # raises if it may not be read
    ours = [n for n in sorted(found) if items_in(found[n])]
    raise ValueError(
        f"Step {number} of {root} was not saved by ema_optax, or its folder "
        f"'{manifest.FOLDER}' is gone. "
        + (
            f"Steps that were: {', '.join(map(str, ours))}; pass step=… for one."
            if ours
            else "No step there was. Orbax reads its own by args=StandardRestore()."
        )
    )


def _find_same(directory: epath.PathLike, step: int | None) -> Found:
    found = error = None
    try:
        found = find(directory, step)
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
    return _find_same(directory, numbers[0])


def all_steps(root: epath.Path, item: str | None = None) -> list[epath.Path]:
    """Returns the items of ours in a directory, or of one step, oldest step first.

    Steps that were not saved by this library are passed over.

    Raises:
        FileNotFoundError: If there is no step.
        ValueError: If none was saved by this library, or one holds several items and
            none was named.
    """
    if root.is_dir() and not items_in(root):
        found = steps_in(root)
        of_steps = [items_in(found[number]) for number in sorted(found)]
        ours = [named(items, item) for items in of_steps if items]
        if ours:
            return ours
    return [find_step(root, None, item).item]  # or says what is there instead


def steps_in(root: epath.Path) -> dict[int, epath.Path]:
    """Returns the folders of the committed steps, by number, as their manager does.

    A manager gives all of its steps names of one form: a number, or a number behind one
    prefix. Other folders of a run may end in a number too, such as `logs-2026`.

    Raises:
        ValueError: If there are steps of several forms.
    """
    forms: dict[str, dict[int, epath.Path]] = {}
    for path in root.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir() and _is_committed(path):
            forms.setdefault(match[1] or "", {})[int(match[2])] = path
    numbers = forms.pop("", {})
    prefixes = [prefix for prefix, found in forms.items() if _holds_steps(found)]
    if numbers and (not prefixes or _holds_steps(numbers)):
        return numbers
    if len(prefixes) > 1:
        raise ValueError(
            f"{root} holds steps with several prefixes: "
            f"{text.some(map(repr, sorted(prefixes)))}. Pass the folder of one step."
        )
    return forms[prefixes[0]] if prefixes else {}


def _holds_steps(folders: dict[int, epath.Path]) -> bool:
    """Returns whether one of some folders was written as a step, or may have been."""
    newest_first = [folders[number] for number in sorted(folders, reverse=True)]
    return any(map(_may_be_step, newest_first))


def _may_be_step(path: epath.Path) -> bool:
    try:
        next(iter(path.iterdir()), None)
        return (path / _ORBAX_STEP).exists() or bool(items_in(path))
    except PermissionError:  # said when it is read, not that there is none
        return True


def _is_committed(path: epath.Path) -> bool:
    return ocp.step.TMP_DIR_SUFFIX not in path.name and ocp.step.is_path_finalized(path)


def number_of(path: epath.Path) -> int | None:
    """Returns the number that the name of a step's folder ends with."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[2]) if match else None


def step_folder(item: epath.Path) -> epath.Path:
    """Returns the folder of the step of an item, which may be the item itself."""
    if (item.parent / _ORBAX_STEP).exists():
        return item.parent
    is_step = (item / _ORBAX_STEP).exists() or number_of(item) is not None
    return item if is_step else item.parent


def items_in(folder: epath.Path) -> list[epath.Path]:
    """Returns the items of ours that a step is or holds, whatever they are called."""
    if (folder / manifest.FOLDER).is_dir():
        return [folder]
    is_run = not (folder / _ORBAX_STEP).exists()  # what it holds are no items
    usual = [folder / name for name in ("default", "state", PARAMS)]
    candidates = usual if is_run else sorted(folder.iterdir())
    return [path for path in candidates if (path / manifest.FOLDER).is_dir()]


def runs_in(root: epath.Path) -> list[epath.Path]:
    """Returns the folders of a folder that hold steps of ours."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    return [path for path in folders if _is_run(path)]


def _is_run(folder: epath.Path) -> bool:
    try:
        return any(items_in(path) for path in steps_in(folder).values())
    except (OSError, ValueError):  # not ours to read, or steps of several forms
        return False


def named(items: list[epath.Path], item: str | None) -> epath.Path:
    """Returns the item of a name, or the only one.

    Raises:
        ValueError: If there are several and none was named, or none of that name.
    """
    names = [path.name for path in items]
    if item is not None:
        arguments.a_name(item, "item", names[0])
    if len(items) == 1 and item in (None, names[0]):
        return items[0]
    folder, have = items[0].parent, ", ".join(map(repr, names))
    if item is None:
        raise ValueError(
            f"{folder} holds several items: {have}. Say which: item={names[0]!r}."
        )
    if item not in names:
        raise ValueError(f"{folder} holds no item {item!r}; it has {have}.")
    return items[names.index(item)]
