"""Files of a checkpoint from anybody: read within bounds, or refused."""

import os
import stat

from etils import epath

LIMIT = 2**26  # bytes of a JSON file: some 300,000 leaves; Python makes 20 times of it

# Bytes of leaves for each byte on disk. Arrays are stored as they are; only those below
# 1 kB may lie compressed in OCDBT's nodes, beside 30 bytes of a checksum for each.
_FACTOR = 64
_SMALL = 2**20  # bytes of leaves that are never too many


def text(path: epath.Path) -> str:
    """Returns the text of a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no file, has more than `LIMIT` bytes, or is no text.
    """
    if _is_remote(path):
        if path.stat().length > LIMIT:
            raise ValueError(f"it has more than {LIMIT:,} bytes")
        return path.read_text()
    # Without waiting: a pipe would have no end, or no beginning.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"it has more than {LIMIT:,} bytes")
    return data.decode()


def wrong(item: epath.Path, claimed: int) -> str | None:
    """Returns why the files of an item must not be read, or None.

    A pipe would never end. What says that it has far more elements than its files have
    bytes would fill the memory with them.

    Args:
        item: Its folder. Of a remote one nothing is known: it has no pipes.
        claimed: Bytes of the leaves to read.
    """
    if _is_remote(item):
        return None
    size, left = 0, [os.fspath(item)]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                try:
                    mode = entry.stat()
                except OSError as error:  # such as a link to nothing, or to itself
                    return f"{entry.path} cannot be read: {error.strerror}"
                if stat.S_ISDIR(mode.st_mode):
                    if entry.is_symlink():  # may lead to a folder above
                        return f"{entry.path} is a link to a folder"
                    left.append(entry.path)
                elif stat.S_ISREG(mode.st_mode):
                    size += mode.st_size
                else:
                    return f"{entry.path} is no file"
    if claimed > _FACTOR * size + _SMALL:
        return f"its leaves have {claimed:,} bytes, and its files {size:,}"
    return None


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)
