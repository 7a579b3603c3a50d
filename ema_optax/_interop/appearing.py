"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from ema_optax._messages import disk
from ema_optax._messages.text import some

FILE = ".safetensors"
INDEX = ".safetensors.index.json"


def check_free(path: Path, overwrite: bool, *, folder: bool) -> None:
    """Raises if a file, or a folder of files, cannot be written to a path.

    Raises:
        FileExistsError: If something is there and `overwrite` is False, or if a folder
            there holds files that no export writes.
        FileNotFoundError: If its parent is no folder.
        IsADirectoryError, NotADirectoryError: If `path` is a folder instead of a
            file, or a file instead of a folder.
    """
    if path.is_dir() and not folder:
        raise IsADirectoryError(
            f"{path} is a folder. Pass a file in it: {path / 'model.safetensors'}; or "
            "max_shard_size='5GB', and a folder that is not there yet."
        )
    if folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file, and several are to be written. Pass a folder."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists, and nothing is overwritten unasked. Pass another name, or "
            "overwrite=True."
        )
    others = sorted(
        str(file.relative_to(path))
        for file in (path.rglob("*") if folder else ())
        if not file.name.endswith((FILE, INDEX)) and not file.is_dir()
    )
    if others:
        raise FileExistsError(
            f"{path} also holds {some(others)}, which would be lost. Pass a folder "
            "that is not there yet, and copy the files."
        )
    if not path.parent.is_dir():
        what = "is a file" if path.parent.exists() else "does not exist"
        raise FileNotFoundError(
            f"Cannot write {path}: the folder {path.parent} {what}. Make it first."
        )


def check_room(path: Path, size: int) -> None:
    """Raises OSError if the disk has no room for the tensors, of `size` bytes."""
    advice = "Pass a narrower dtype, or another path."
    disk.check_room(path.parent, size, f"The tensors of {path}", advice)


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path, and moves what was written there to `path` at the end.

    Args:
        path: The file, or the folder, to write. What is there is replaced.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir(exist_ok=True)  # a killed process may have left one
    try:
        written = beside / path.name
        yield written
        usual = beside / "usual"
        usual.touch()
        for file in [written, *written.rglob("*")]:
            if file.is_file():  # safetensors lets only the owner read it
                file.chmod(usual.stat().st_mode)
        if path.is_dir():  # os.replace refuses a folder that is not empty
            os.rename(path, beside / "before")
        try:
            os.replace(written, path)
        except OSError:
            if (beside / "before").exists():
                os.rename(beside / "before", path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
