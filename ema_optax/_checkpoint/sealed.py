"""JSON files that carry a checksum of their own: `{"xxh3": …, "content": …}`."""

# pyright: strict

import json

import xxhash
from etils import epath  # pyright: ignore[reportMissingTypeStubs]

from ema_optax._checkpoint.errors import CorruptCheckpointError, as_cause
from ema_optax._checkpoint.untrusted import LIMIT, read_text
from ema_optax._messages.text import one_line


def write_sealed(path: epath.Path, content: object) -> None:
    """Writes JSON with its checksum, and the folders above it.

    Raises:
        ValueError: If it is larger than what is read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sealed = json.dumps({"xxh3": seal(content), "content": content})
    if len(sealed) > LIMIT:  # ASCII
        raise ValueError(
            f"{path} would have {len(sealed):,} bytes, and at most {LIMIT:,} are "
            "read. There are too many leaves to describe, or extra is too large: save "
            "what is large as arrays in params."
        )
    path.write_text(sealed)


def read_sealed(path: epath.Path) -> object:
    """Reads what `write_sealed` wrote.

    Raises:
        CorruptCheckpointError: If it is missing, damaged, or was edited.
        OSError: If it may be whole, and cannot be read; see `as_cause`.
    """
    try:
        sealed = json.loads(read_text(path))
        content = sealed["content"]
        if seal(content) != sealed["xxh3"]:
            raise ValueError("its own checksum does not match")
    except OSError as error:
        raise as_cause(error, f"{path} cannot be read") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{path} cannot be trusted: {one_line(error)}."
        ) from error
    return content


def seal(content: object) -> str:
    """Returns the checksum of JSON, whatever the order of its keys."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
