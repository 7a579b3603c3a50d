"""Folders that averages are written to: whether they may, have room, and writing."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from ema_optax import checkpoint
from ema_optax._checkpoint import storage
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.steps import all_steps
from ema_optax._decays.decay import Decay


def check_free(out: str, steps: Iterable[str]) -> None:
    """Refuses a folder that averages could not be written to.

    Args:
        out: The folder of all of them.
        steps: The folder of each one's step.

    Raises:
        FileExistsError: If an average is there already.
        OSError: If the folder cannot be made.
        ValueError: If the averages would lie among the steps of a run.
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
                f"{out} holds the steps of a run, which averages must not lie among. "
                "Pass a folder of their own as --out."
            )
    if "://" in out:
        return
    there = _nearest(out)
    if not there.is_dir():
        raise NotADirectoryError(f"Cannot write to {out}: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Cannot write to {out}: {there} is read-only, or somebody else's."
        )


def check_room(out: str, need: int, advice: str) -> None:
    """Raises OSError, with advice, if the disk has no room for so many bytes."""
    if "://" in out:
        return
    disk = shutil.disk_usage(_nearest(out))
    if need > disk.free and disk.total:  # some kinds of file systems tell 0 of 0
        raise OSError(
            f"The averages need {need / 1e6:,.3f} MB, and the disk of {out} has "
            f"{disk.free / 1e6:,.3f} MB left. {advice}"
        )


def write(
    folder: str, tree: Any, step: int, decay: Decay | None, extra: Mapping[str, Any]
) -> None:
    """Writes an average as a checkpoint; a failed one leaves no new folder.

    Raises:
        OSError: If it cannot be written.
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
            with contextlib.suppress(OSError):  # it holds what is whole
                path.rmdir()
        raise


@contextlib.contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Keeps Orbax's threads from logging an error that is raised as well."""
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
