"""Finds the steps of a directory, and the item of ours in each."""

# pyright: strict, reportMissingTypeStubs=false

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import orbax.checkpoint as ocp
from etils import epath

from ema_optax._checkpoint import manifest, storage
from ema_optax._checkpoint.manifest import PARAMS
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.processes import gathered
from ema_optax._messages import arguments, text

# 300, step_300, ckpt-00000300; not the 07 of width-0.07.
_STEP_NAME = re.compile(r"(.*[^0-9.])?([0-9]+)")
_ORBAX_STEP = "_CHECKPOINT_METADATA"  # what Orbax writes into each step
_COMMITTED = "commit_success.txt"  # and into those of a bucket, at the end
_LONGEST = 2**20  # bytes of what is read of the former


class Step(NamedTuple):
    """A step on disk: its number, or None where the path does not say, and its item."""

    number: int | None
    item: epath.Path


class Found(NamedTuple):
    """What a directory holds.

    Attributes:
        number: Of the step, or None where the path does not say.
        items: Those of ours in it, at least one.
        numbers: Returns those of all committed steps of the run; of a step alone its
            own. A bucket is asked for each.
    """

    number: int | None
    items: list[epath.Path]
    numbers: Callable[[], list[int]]


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
    entries = storage.listed(root)
    if entries is None:
        raise FileNotFoundError(
            f"There is no checkpoint at {root}: it "
            f"{'is a file' if storage.is_file(root) else 'does not exist'}. Pass the "
            "folder that checkpoint.save or the CheckpointManager was given."
        )
    alone = _items_among(root, entries)
    if alone:
        number = number_of(step_folder(alone[0]))
        if step in (None, number):
            return Found(number, alone, ([] if number is None else [number]).copy)
    folders = _of_one_form(root, entries)
    if step is None:
        number, inside = _newest(folders)
    else:
        number, inside = step, None
        if step in folders:
            inside = storage.listed(folders[step])
            inside = inside if is_committed(folders[step], inside) else None
    if number is None or inside is None:
        raise FileNotFoundError(_without(root, step, folders))
    items = _items_among(folders[number], inside)
    if items:
        return Found(number, items, functools.partial(_committed, folders))
    ours = [n for n in _committed(folders) if items_in(folders[n])]
    raise ValueError(
        f"Step {number} of {root} was not saved by ema_optax, or its folder "
        f"'{manifest.FOLDER}' is gone. "
        + (
            f"Steps that were: {', '.join(map(str, ours))}; pass step=… for one."
            if ours
            else "No step there was. Orbax reads its own by args=StandardRestore()."
        )
    )


def _without(
    root: epath.Path, step: int | None, folders: Mapping[int, epath.Path]
) -> str:
    """Returns what to say of a run without the step that was asked for."""
    committed = _committed(folders)
    if committed:
        numbers = ", ".join(map(str, committed))
        return f"{root} has no step {step}; it has {numbers}."
    deeper = runs_in(root)
    return (
        f"{root} holds no checkpoint: no committed step is in it. Pass the folder "
        "that checkpoint.save or the CheckpointManager was given"
        + (f", such as {text.some(map(str, deeper))}." if deeper else ".")
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
    entries = storage.listed(root)
    if entries is not None and not _items_among(root, entries):
        folders = _of_one_form(root, entries)
        of_steps = storage.side_by_side(_items_if_committed, folders.values())
        ours = [named(items, item) for items in of_steps if items]
        if ours:
            return ours
    return [find_step(root, None, item).item]  # or says what is there instead


def is_taken(folder: epath.Path) -> bool:
    """Returns whether a step is there already, or what somebody put in its place."""
    if not storage.is_remote(folder):
        return folder.exists()
    return is_committed(folder, storage.listed(folder))


def steps_in(root: epath.Path) -> dict[int, epath.Path]:
    """Returns the folders of the committed steps, by number, as their manager does.

    Raises:
        ValueError: If there are steps of several forms.
    """
    folders = _of_one_form(root, storage.listed(root) or {})
    return {number: folders[number] for number in _committed(folders)}


def _of_one_form(
    root: epath.Path, entries: Mapping[str, bool]
) -> dict[int, epath.Path]:
    """Returns the folders that are steps by their names, the oldest first.

    A manager gives all of its steps names of one form: a number, or a number behind one
    prefix. Other folders of a run may end in a number too, such as `logs-2026`.

    Raises:
        ValueError: If there are steps of several forms.
    """
    forms: dict[str, dict[int, epath.Path]] = {}
    for name, is_folder in entries.items():
        match = _STEP_NAME.fullmatch(name)
        if match and is_folder and ocp.step.TMP_DIR_SUFFIX not in name:
            forms.setdefault(match[1] or "", {})[int(match[2])] = root / name
    forms = {prefix: dict(sorted(found.items())) for prefix, found in forms.items()}
    numbers = forms.pop("", {})
    if not forms:
        return numbers
    prefixes = [prefix for prefix, found in forms.items() if _holds_steps(found)]
    if numbers and (not prefixes or _holds_steps(numbers)):
        return numbers
    if len(prefixes) > 1:
        raise ValueError(
            f"{root} holds steps with several prefixes: "
            f"{text.some(map(repr, sorted(prefixes)))}. Pass the folder of one step."
        )
    return forms[prefixes[0]] if prefixes else {}


def _holds_steps(folders: Mapping[int, epath.Path]) -> bool:
    """Returns whether one of some folders was written as a step, or may have been."""
    return any(_may_be_step(folders[n]) for n in sorted(folders, reverse=True))


def _may_be_step(path: epath.Path) -> bool:
    try:
        inside = storage.listed(path) or {}
        return _ORBAX_STEP in inside or bool(_items_among(path, inside))
    except PermissionError:  # said when it is read, not that there is none
        return True


def _newest(
    folders: Mapping[int, epath.Path],
) -> tuple[int | None, Mapping[str, bool] | None]:
    """Returns the newest step that was committed, and what its folder holds."""
    for number in sorted(folders, reverse=True):
        inside = storage.listed(folders[number])  # or raises: there may be a step
        if is_committed(folders[number], inside):
            return number, inside
    return None, None


def _committed(folders: Mapping[int, epath.Path]) -> list[int]:
    """Returns the numbers of the committed steps; a bucket is asked for each."""

    def is_whole(number: int) -> bool:
        try:
            inside = storage.listed(folders[number])
        except PermissionError:
            return True
        return is_committed(folders[number], inside)

    found = storage.side_by_side(is_whole, folders)
    return [number for number, good in zip(folders, found, strict=True) if good]


def is_committed(folder: epath.Path, inside: Mapping[str, bool] | None) -> bool:
    """Returns whether a step was written whole, by what its folder holds.

    In a bucket, and wherever a manager was told `AtomicityOptions(COMMIT_FILE)`, a step
    has its name from the start, and a file that Orbax writes last, after those of its
    items. Elsewhere it has its name at the end.
    """
    if inside is None:
        return False
    if _COMMITTED in inside:
        return True
    if storage.is_remote(folder):
        return False
    if _ORBAX_STEP not in inside:
        return True
    try:
        told = json.loads(storage.read(folder / _ORBAX_STEP, _LONGEST))
        begun = told.get("commit_timestamp_nsecs") is None
    except (OSError, ValueError, AttributeError):  # nothing that Orbax wrote
        return True
    names = [name for name in inside if inside[name]]
    return not begun and not any(
        _COMMITTED in (storage.listed(folder / name) or {}) for name in names
    )


def _items_if_committed(folder: epath.Path) -> list[epath.Path]:
    inside = storage.listed(folder)
    return _items_among(folder, inside or {}) if is_committed(folder, inside) else []


def number_of(path: epath.Path) -> int | None:
    """Returns the number that the name of a step's folder ends with."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[2]) if match else None


def step_folder(item: epath.Path) -> epath.Path:
    """Returns the folder of the step of an item, which may be the item itself."""
    if _ORBAX_STEP in (storage.listed(item.parent) or {}):
        return item.parent
    is_step = number_of(item) is not None or _ORBAX_STEP in (storage.listed(item) or {})
    return item if is_step else item.parent


def items_in(folder: epath.Path) -> list[epath.Path]:
    """Returns the items of ours that a step is or holds, whatever they are called."""
    return _items_among(folder, storage.listed(folder) or {})


def _items_among(folder: epath.Path, inside: Mapping[str, bool]) -> list[epath.Path]:
    """Returns the items of ours, by what the folder of a step, or of a run, holds."""
    if inside.get(manifest.FOLDER):
        return [folder]
    names = [name for name in sorted(inside) if inside[name]]
    if _ORBAX_STEP not in inside:  # what a run holds are no items
        names = [name for name in ("default", "state", PARAMS) if name in names]
    found = storage.side_by_side(
        lambda name: (storage.listed(folder / name) or {}).get(manifest.FOLDER), names
    )
    return [folder / name for name, ours in zip(names, found, strict=True) if ours]


def runs_in(root: epath.Path) -> list[epath.Path]:
    """Returns the folders of a folder that hold steps of ours."""
    entries = storage.listed(root) or {}
    folders = [root / name for name in sorted(entries) if entries[name]]
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
