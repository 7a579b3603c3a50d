"""Names the step to go back to, where one is damaged."""

# pyright: strict, reportMissingTypeStubs=false

from etils import epath

from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.leaves import check
from ema_optax._checkpoint.processes import gathered
from ema_optax._checkpoint.restoring import shared_manifest
from ema_optax._checkpoint.steps import items_in, number_of, step_folder, steps_in


def explained(
    item: epath.Path, error: CorruptCheckpointError, rescue: str | None = None
) -> Exception:
    """Returns an error that names the step, and what to do.

    Args:
        item: What is damaged.
        error: How.
        rescue: What to do. None names the newest older step that is whole: to find it
            steps are read, which all processes must do alike.
    """
    step = step_folder(item)
    number, root = number_of(step), step.parent
    if number is None:
        return error
    if rescue is None:
        name = None if item == step else item.name
        whole = newest_whole(root, name, before=number)
        rescue = (
            "No older step is whole."
            if whole is None
            else f"The newest older step that is whole is {whole}: pass step={whole}."
        )
    return CorruptCheckpointError(
        f"Step {number} of {root} is damaged. {error} {rescue}"
    )


def newest_whole(root: epath.Path, name: str | None, *, before: int) -> int | None:
    """Returns the newest step below a number whose item matches its checksums.

    Args:
        root: Folder of the run.
        name: Of the item; None where the step is one.
        before: What the step is older than.

    All processes must call it alike; those that process 0 finds are looked at.
    """
    while True:
        items = {
            number: item
            for number, path in steps_in(root).items()
            for item in items_in(path)
            if name is None or item == path or item.name == name
        }
        ours = [number for number in items if number < before]
        before = gathered(max(ours, default=-1))[0]
        if before < 0:
            return None
        if _is_whole(items.get(before) or root):  # the root is no item, and not whole
            return before


def verify_item(item: epath.Path) -> None:
    """Compares a whole item with its checksums; all processes must call it alike.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
    """
    check(item, shared_manifest(item))


def _is_whole(item: epath.Path) -> bool:
    try:
        verify_item(item)
    except (ValueError, RuntimeError, OSError, MemoryError):
        return False  # damaged, of a newer format, or not there on all hosts
    return True
