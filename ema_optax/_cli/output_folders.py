"""Folders of averages: checks that they are free and have room, and writes."""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from ema_optax import checkpoint
from ema_optax._checkpoint import storage
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.steps import all_steps
from ema_optax._decays.decay import Decay
from ema_optax._messages import disk


def check_free(out: str, steps: Iterable[str]) -> None:
    """Raises if averages cannot be written to a folder.

    Args:
        out: The folder that all averages go to.
        steps: The folder of each average's step.

    Raises:
        FileExistsError: If an average is there already, or the averages would lie
            among the steps of a run.
        OSError: If the folder cannot be made.
    """
    for path in steps:
        if storage.listed(absolute(path)) is not None:
            raise FileExistsError(
                f"{path} exists, and nothing is overwritten. Remove it, or pass "
                "another --out."
            )
    with contextlib.suppress(FileNotFoundError, ValueError):
        if all_steps(absolute(out)):
            raise FileExistsError(
                f"{out} holds the steps of a run, or an earlier average, and averages "
                "must not lie among them. Pass another folder as --out."
            )
    if "://" in out:
        return
    folder = _nearest(out)
    if not folder.is_dir():
        raise NotADirectoryError(f"Cannot write to {out}: {folder} is a file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Cannot write to {out}: {folder} is read-only, or belongs to another user."
        )


def check_room(out: str, need: int, advice: str) -> None:
    """Raises OSError, with advice, if the disk has no room for so many bytes."""
    if "://" in out:
        return
    disk.check_room(_nearest(out), need, f"The averages in {out}", advice)


def write(
    folder: str, tree: Any, step: int, decay: Decay | None, extra: Mapping[str, Any]
) -> None:
    """Writes an average as a checkpoint; if that fails, no new folder stays.

    Raises:
        OSError: If the checkpoint cannot be written.
    """
    place = absolute(folder)
    new = []
    if not storage.is_remote(place):
        new = [path for path in (place, *place.parents) if not path.exists()]
    try:
        with _no_tracebacks():
            checkpoint.save_average(place, tree, step=step, decay=decay, extra=extra)
    except BaseException:  # Ctrl-C too
        for path in new:
            with contextlib.suppress(OSError):  # the folder holds earlier averages
                path.rmdir()
        raise


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Keeps Orbax's threads from logging an error that is also raised."""
    logger = logging.getLogger("absl")
    usual, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = usual


def _nearest(out: str) -> epath.Path:
    """Returns a local folder, or the nearest above it that exists."""
    root = absolute(out)
    return next(path for path in (root, *root.parents) if path.exists())
