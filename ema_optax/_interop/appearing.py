"""Writes files and folders whole or not at all."""

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
    """Refuses a path that a file, or a folder of files, cannot be written to.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, or if `path` is a
            folder with files that no export writes.
        FileNotFoundError: If the parent of `path` is no folder.
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
    """Refuses to write tensors of `size` bytes where the disk has no room.

    Raises:
        OSError: If the disk has less room.
    """
    advice = "Pass a narrower dtype, or another path."
    disk.check_room(path.parent, size, f"The tensors of {path}", advice)


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path, and moves what was written there to `path` at the end.

    Args:
        path: The file, or the folder, to write. One that exists is replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(exist_ok=True)  # a killed process may have left one
    try:
        written = temporary / path.name
        yield written
        new_file = temporary / "usual"
        new_file.touch()
        for file in [written, *written.rglob("*")]:
            if file.is_file():  # safetensors lets only the owner read its files
                file.chmod(new_file.stat().st_mode)
        if path.is_dir():  # os.replace refuses a folder that is not empty
            os.rename(path, temporary / "before")
        try:
            os.replace(written, path)
        except OSError:
            if (temporary / "before").exists():
                os.rename(temporary / "before", path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
