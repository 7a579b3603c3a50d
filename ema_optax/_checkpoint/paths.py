"""Checks the folders of checkpoints: on a disk, or the URL of a bucket."""

# pyright: strict, reportMissingTypeStubs=false

import re

from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._messages import arguments

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# pathlib turns the two slashes of a URL into one; `absolute()` of epath then makes it a
# local path.
_BROKEN_URL = re.compile(r"(?:^|/)(gs|gcs|s3|s3a|az|abfss?|hf|hdfs|https?|file):/")


def absolute(directory: epath.PathLike) -> epath.Path:
    """Returns a directory as Orbax needs it: an absolute path without `~`, or a URL.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is a URL of a store that Orbax cannot write to, or if its
            arrays would lie elsewhere.
    """
    path = arguments.path(directory, "The directory of a checkpoint", "run/checkpoints")
    _check_store(path)
    folder = epath.Path(path)
    if storage.is_remote(folder):
        return folder
    local = folder.expanduser().absolute().as_posix()
    if "\\" in local:
        raise ValueError(
            f"The folder {local} has a backslash in its path. TensorStore, which holds "
            "a checkpoint's arrays, takes it for a slash: they would lie in another "
            "folder. Rename the folder, or move the checkpoint to one without it."
        )
    # Two slashes may begin a path in POSIX, and in Python; TensorStore refuses them.
    return epath.Path(re.sub("^/+", "/", local))


def _check_store(path: str) -> None:
    """Refuses a URL that Orbax takes for a folder on this machine's disk.

    Orbax would report success, and the bucket would stay empty.

    Raises:
        ValueError: If it is one, with what to do.
    """
    if path.startswith("gs://"):
        return
    broken = _BROKEN_URL.search(path)
    if broken and broken[1] == "gs":
        raise ValueError(
            f"{path} was a URL, until pathlib or absolute() made a path of it. Pass it "
            "as text, or as epath.Path(url): gs://bucket/run."
        )
    if broken or _URL.match(path):
        raise ValueError(
            f"Orbax cannot save to {path}, it would write to this machine's disk: of "
            "URLs it knows those of Google Cloud Storage, gs://bucket/run. Mount the "
            "store as a folder, and pass that."
        )
