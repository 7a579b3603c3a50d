"""Exceptions of reading and writing a checkpoint, by what a user can do about them."""

# pyright: strict

import errno
import os
import re

from ema_optax.text import one_line

# What TensorStore and JAX put before the text of their errors: absl's status. Those of
# INVALID_ARGUMENT, such as what zstd cannot decompress, come as a ValueError without.
_STATUS = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
_ERRNO = re.compile(r"\[os_error_code='(\d+)'\]")
_SPEC = re.compile(r" \[(?:tensorstore_spec|os_error_code|transform|domain)=.*", re.S)

_DAMAGE = {
    *("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"),
    *("OUT_OF_RANGE", "UNIMPLEMENTED"),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
}
_PERMISSION = {
    *("PERMISSION_DENIED", "UNAUTHENTICATED"),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}
_MEMORY = {"RESOURCE_EXHAUSTED", errno.ENOMEM}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OTHERS = {"UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"}


class CorruptCheckpointError(ValueError):
    """Data on disk is not what was saved: flipped bits, missing or truncated files."""


def as_cause(error: Exception, what: str = "") -> Exception:
    """Turns an error of TensorStore, the system or JAX into the exception of its cause.

    Args:
        error: Raised by opening, reading or writing files that the manifest promises,
            or by placing what was read. A ValueError has to be TensorStore's.
        what: What was read or written, to begin the message.

    Returns:
        A `CorruptCheckpointError`, PermissionError, MemoryError or OSError, on one
        line, to be raised from `error`; `error` itself if it is of another cause.

    >>> as_cause(ValueError("DATA_LOSS: Error decoding manifest"), "leaf 'w'")
    CorruptCheckpointError("leaf 'w': DATA_LOSS: Error decoding manifest")
    """
    if isinstance(error, CorruptCheckpointError):
        return error
    text = str(error)
    status, number = _STATUS.match(text), _ERRNO.search(text)
    cause: str | int | None = status[1] if status else None
    if number:
        cause = int(number[1])
    elif isinstance(error, OSError) and error.errno is not None:
        cause = error.errno
    elif isinstance(error, MemoryError):
        cause = "RESOURCE_EXHAUSTED"
    elif isinstance(error, OSError) or cause not in _DAMAGE | _PERMISSION | _MEMORY:
        if isinstance(error, OSError) or cause in _OTHERS:
            cause = "UNKNOWN"
        elif isinstance(error, ValueError):
            cause = "INVALID_ARGUMENT"
        else:
            return error
    return error


def _said(text: str) -> str:
    return one_line(_SPEC.sub("", text))
