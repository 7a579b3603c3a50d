"""The folders that checkpoints lie in: on a disk, or a URL of a bucket."""

# pyright: strict, reportMissingTypeStubs=false

import re

from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._messages import arguments

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# pathlib makes one slash of two, and `absolute()` of epath a local path of a URL.
_BROKEN_URL = re.compile(r"(?:^|/)(gs|gcs|s3|s3a|az|abfss?|hf|hdfs|https?|file):/")


def absolute(directory: epath.PathLike) -> epath.Path:
    """Returns a directory as Orbax wants it: whole, with `~` replaced, or a URL.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is a URL of a store that Orbax cannot write to.
    """
    path = arguments.path(directory, "The directory of a checkpoint", "run/checkpoints")
    check_store(path)
    found = epath.Path(path)
    return found if storage.is_remote(found) else found.expanduser().absolute()


def check_store(path: str) -> None:
    """Refuses what Orbax takes for a folder of this machine's disk, and is a URL.

    It would report success, and the bucket stay empty.

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
