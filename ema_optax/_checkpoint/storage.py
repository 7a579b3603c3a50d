"""What lies in a folder, on a disk or in a bucket, asked for in few requests.

`epath` asks a bucket two or three times whether a folder exists, believes a listing of
an hour ago, and takes an answer of "forbidden" for "not there". Here one listing says
what a folder holds, it is always a new one, and what a store answers is told as that.
"""

import functools
import os
import stat
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from etils import epath

from ema_optax._messages import extras
from ema_optax._messages.text import one_line

_T = TypeVar("_T")
_AT_ONCE = 32  # requests to a bucket


def is_remote(path: epath.Path) -> bool:
    """Returns whether a path is the URL of a bucket."""
    return "://" in os.fspath(path)


def listed(folder: epath.Path) -> dict[str, bool] | None:
    """Returns whether each entry of a folder is one itself; None if there is no folder.

    One request to a bucket, of which a folder is where objects are.

    Raises:
        PermissionError: If it may not be read.
        OSError: If its store does not answer.
    """
    if not is_remote(folder):
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.is_dir() for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            return None
    url = os.fspath(folder).rstrip("/")
    try:
        found = _asked(lambda: bucket().ls(url, detail=True), url)
    except FileNotFoundError:
        return None
    name = url.partition("://")[2]
    entries = {
        entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] == "directory"
        for entry in found
        if entry["name"].rstrip("/") != name  # the folder's own, empty object
    }
    return entries or None


def is_file(path: epath.Path) -> bool:
    """Returns whether there is a file of this machine, and no folder."""
    return os.path.isfile(path) and not is_remote(path)


def read(path: epath.Path, most: int) -> bytes:
    """Returns the first `most` bytes of a file or object.

    Raises:
        FileNotFoundError: If there is none.
        PermissionError: If it may not be read.
        OSError: If its store does not answer.
        ValueError: If it is no file.
    """
    if not is_remote(path):
        # Without waiting: a pipe would have no end, or no beginning.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no file")
            return file.read(most)
    url = os.fspath(path)
    return _asked(lambda: bucket().cat_file(url, start=0, end=most), url)


def side_by_side(function: Callable[[Any], _T], items: Iterable[Any]) -> list[_T]:
    """Returns a function of each item; of a bucket many are asked for at once."""
    todo = list(items)
    if len(todo) < 2:
        return [function(item) for item in todo]
    with ThreadPoolExecutor(min(_AT_ONCE, len(todo))) as pool:
        return list(pool.map(function, todo))


def errors() -> tuple[type[Exception], ...]:
    """Returns what a client of a bucket raises that is no OSError."""
    gcsfs = sys.modules.get("gcsfs")
    return (gcsfs.retry.HttpError,) if gcsfs else ()


def forget_listings() -> None:
    """Lets Orbax see what others wrote since it looked: gcsfs lists a folder once.

    Those are the clients that epath makes, by its versions.
    """
    gcsfs = sys.modules.get("gcsfs")
    if gcsfs:
        for options in ({}, {"finalize_on_close": True}):  # the same ones, not others
            gcsfs.GCSFileSystem(**options).invalidate_cache()


@functools.cache
def bucket() -> Any:
    """Returns a client of Google Cloud Storage that keeps no listings."""
    with extras.needed_by("gs://…"):
        import gcsfs  # pyright: ignore[reportMissingImports] an extra
    return gcsfs.GCSFileSystem(use_listings_cache=False)


def _asked(request: Callable[[], _T], url: str) -> _T:
    """Returns what a request gave; errors are the system's for the same cause."""
    try:
        return request()
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:  # gcsfs, aiohttp and google.auth have classes of theirs
        said = one_line(error)
        status = getattr(error, "code", None) or getattr(error, "status", None)
        if status in (401, 403) or said.startswith("Forbidden"):
            raise PermissionError(
                f"{url}: {said}. Give this user access to it, by the credentials of "
                "its store."
            ) from error
        raise OSError(
            f"{url}: {said or type(error).__name__}. What is there is not known: try "
            "again, and look after the network."
        ) from error
