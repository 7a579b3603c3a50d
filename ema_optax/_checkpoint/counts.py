"""Scalars of the optimizer state on disk, such as its counts of updates."""

# pyright: reportMissingTypeStubs=false

from collections.abc import Callable

from etils import epath

from ema_optax._checkpoint.entries import LeafEntry
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.leaves import Place, Reader
from ema_optax._checkpoint.manifest import STATE, read_manifest
from ema_optax._checkpoint.rescue import explained
from ema_optax._checkpoint.steps import find_step


def stored_counts(
    directory: epath.PathLike,
    wanted: Callable[[str, LeafEntry], bool],
    *,
    step: int | None = None,
    item: str | None = None,
) -> dict[str, int]:
    """Returns whole numbers of the optimizer state of a checkpoint, by their paths.

    Args:
        directory: The folder of a run, or of one step of it.
        wanted: Whether to read a leaf, from its path and entry; scalars alone.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        FileNotFoundError: If there is no such checkpoint.
    """
    found = find_step(directory, step, item).item
    try:
        manifest = read_manifest(found)
        state = manifest.trees.get(STATE)
        places = [
            Place(STATE, path)
            for path, entry in (state.leaves if state else {}).items()
            if wanted(path, entry)
        ]
        reader = Reader(found, manifest, places, verify=True)
        return {
            place.path: int(next(iter(parts.values())))
            for place, parts in reader.stream(dict.fromkeys(places))
        }
    except CorruptCheckpointError as error:
        raise explained(found, error) from error
