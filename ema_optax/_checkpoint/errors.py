"""Exceptions of reading and writing a checkpoint, by what a user can do about them."""

# pyright: strict

import errno
import re

from ema_optax._messages.text import one_line

# TensorStore's errors are ValueErrors that begin with absl's status and state the
# system's; only those of INVALID_ARGUMENT, as of data that zstd refuses, state neither.
_STATUS = re.compile(r"([A-Z_]+): ")
_ERRNO = re.compile(r"\[(?:os_error_code='|OS error )(\d+)")
_OF_SYSTEM = re.compile(r"\[OS error \d+: \w+ ([^]]*)\]")  # as older versions have it
# In any order: the status keeps them by hash.
_DETAILS = re.compile(
    r" \[(?:tensorstore_spec|os_error_code|domain|transform|source locations)=.*", re.S
)


class CorruptCheckpointError(ValueError):
    """Data on disk is not what was saved: flipped bits, missing or truncated files."""


_CAUSES: list[tuple[type[Exception], set[str | int], str]] = [
    (
        CorruptCheckpointError,
        {
            *("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"),
            *("OUT_OF_RANGE", errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
        },
        "If it was copied, copy it again.",
    ),
    (
        PermissionError,
        {
            *("PERMISSION_DENIED", "UNAUTHENTICATED"),
            *(errno.EACCES, errno.EPERM, errno.EROFS),
        },
        "Give this user access to it, by chmod or by the credentials of its store.",
    ),
    (
        MemoryError,
        {"RESOURCE_EXHAUSTED", errno.ENOMEM},
        "The checkpoint may be whole: take fewer leaves, shard them over more devices, "
        "or free memory.",
    ),
    (OSError, {errno.ENOSPC, errno.EDQUOT}, "Make room on the disk."),
    (OSError, {errno.EMFILE, errno.ENFILE}, "Allow more open files: ulimit -n 65536."),
]
_OTHERWISE = (
    "The checkpoint may be whole: try again, and look after the disk or the network."
)


def as_cause(error: Exception, what: str = "") -> Exception:
    """Turns an error of TensorStore, the system or JAX into the exception of its cause.

    Args:
        error: What opening, reading, writing or placing raised. A missing file counts
            as damage: pass errors of files that the manifest promises. Pass no other
            ValueError than TensorStore's.
        what: What was read or written; the message begins with it.

    Returns:
        A `CorruptCheckpointError`, PermissionError, MemoryError or OSError of one line,
        to raise from `error`; `error` itself if its cause is none of these.

    >>> as_cause(ValueError("DATA_LOSS: Error decoding manifest"), "leaf 'w'").args[0]
    "leaf 'w': DATA_LOSS: Error decoding manifest. If it was copied, copy it again."
    """
    text = str(error) or type(error).__name__
    status, number = _STATUS.match(text), _ERRNO.search(text)
    cause: str | int | None
    if isinstance(error, CorruptCheckpointError):
        return error
    if isinstance(error, PermissionError):
        cause = errno.EACCES
    elif isinstance(error, OSError):
        cause = error.errno
    elif isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and text.startswith("RESOURCE_EXHAUSTED: ")
    ):  # of Python, or of JAX
        cause = errno.ENOMEM
    elif not isinstance(error, (ValueError, RecursionError)):  # of JSON without end
        return error
    elif number:
        cause = int(number[1])
    else:
        cause = status[1] if status else "INVALID_ARGUMENT"
    kind, advice = OSError, _OTHERWISE
    for known, causes, its_advice in _CAUSES:
        if cause in causes:
            kind, advice = known, its_advice
    said = one_line(_DETAILS.sub("", _OF_SYSTEM.sub(r"\1", text)), None).rstrip(".")
    if len(said) > 300:  # TensorStore's begin with the paths, and end with the cause
        said = f"{said[:100]} … {said[-200:]}"
    return kind(f"{what}{': ' if what else ''}{said}. {advice}")
