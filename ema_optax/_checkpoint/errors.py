"""Turns errors of reading and writing a checkpoint into those a user can act on."""

# pyright: strict

import errno
import re

from ema_optax._messages.text import one_line

# TensorStore raises ValueErrors that begin with the status of absl and hold the number
# of the system's error. Only INVALID_ARGUMENT, as for data that zstd refuses, has
# neither.
_STATUS = re.compile(r"([A-Z_]+): ")
_ERRNO = re.compile(r"\[(?:os_error_code='|OS error )(\d+)")
_OF_SYSTEM = re.compile(r"\[OS error \d+: \w+ ([^]]*)\]")  # of older TensorStore
# The details come in any order: the status keeps them in a hash table.
_DETAILS = re.compile(
    r" \[(?:tensorstore_spec|os_error_code|domain|transform|source locations)=.*", re.S
)


class CorruptCheckpointError(ValueError):
    """Raised where data on disk is not what was saved.

    Causes are flipped bits, and files that are missing or truncated.
    """


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
        "The checkpoint may be intact: read fewer leaves, shard them over more "
        "devices, or free memory.",
    ),
    (OSError, {errno.ENOSPC, errno.EDQUOT}, "Make room on the disk."),
    (OSError, {errno.EMFILE, errno.ENFILE}, "Allow more open files: ulimit -n 65536."),
]
_OTHERWISE = (
    "The checkpoint may be intact: try again, and check the disk or the network."
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
    elif not isinstance(error, (ValueError, RecursionError)):  # of JSON nested too deep
        return error
    elif number:
        cause = int(number[1])
    else:
        cause = status[1] if status else "INVALID_ARGUMENT"
    kind, advice = OSError, _OTHERWISE
    for known, causes, what_to_do in _CAUSES:
        if cause in causes:
            kind, advice = known, what_to_do
    message = one_line(_DETAILS.sub("", _OF_SYSTEM.sub(r"\1", text)), None).rstrip(".")
    if len(message) > 300:  # TensorStore's begin with paths and end with the cause
        message = f"{message[:100]} … {message[-200:]}"
    return kind(f"{what}{': ' if what else ''}{message}. {advice}")
