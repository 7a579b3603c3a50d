"""Whether a disk has room for what is to be written."""

import os
import shutil


def check_room(
    folder: str | os.PathLike[str], size: int, what: str, advice: str
) -> None:
    """Raises OSError if the disk of a folder has less than `size` bytes left.

    Args:
        folder: A folder that exists.
        size: Bytes to be written.
        what: Begins the message: what needs the bytes, in the plural.
        advice: Ends the message: what to do instead.
    """
    disk = shutil.disk_usage(folder)
    if size > disk.free and disk.total:  # some kinds of file systems report 0 of 0
        raise OSError(
            f"{what} need {size / 1e6:,.3f} MB, and the disk has "
            f"{disk.free / 1e6:,.3f} MB left. {advice}"
        )
