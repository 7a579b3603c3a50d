"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from ema_optax._messages.text import some

FILE = ".safetensors"
INDEX = ".safetensors.index.json"


def check_free(path: Path, overwrite: bool, *, folder: bool) -> None:
    """Refuses a place where a file, or a folder of files, cannot appear.

    Raises:
        FileExistsError: If something is there, unless it may be overwritten; a folder
            never is, where it holds what no export writes.
        FileNotFoundError: If it would lie in no folder.
        IsADirectoryError, NotADirectoryError: If the other kind is there.
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
    """Raises OSError if the disk has no room for so many bytes."""
    disk = shutil.disk_usage(path.parent)
    if size > disk.free and disk.total:  # some kinds of file systems tell 0 of 0
        raise OSError(
            f"The tensors of {path} need {size / 1e6:,.3f} MB, and the disk has "
            f"{disk.free / 1e6:,.3f} MB left. Pass a narrower dtype, or another place."
        )


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path, None, None]:
    """Gives a path beside the place, and moves what was written there when it is whole.

    Args:
        path: Where a file, or a folder, shall appear. What is there is replaced.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir(exist_ok=True)  # a killed process may have had this one's number
    try:
        written = beside / path.name
        yield written
        usual = beside / "usual"
        usual.touch()
        for file in [written, *written.rglob("*")]:
            if file.is_file():  # safetensors lets nobody else read it
                file.chmod(usual.stat().st_mode)
        if path.is_dir():  # os.replace replaces no folder that holds anything
            os.rename(path, beside / "before")
        try:
            os.replace(written, path)
        except OSError:
            if (beside / "before").exists():
                os.rename(beside / "before", path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
