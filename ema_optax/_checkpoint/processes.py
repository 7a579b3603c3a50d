"""Turns an error on one process into an error on all, so that none waits for ever.

Each function here is a collective: all processes call it alike, in the same order, and
on their main threads. With one process it costs nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ema_optax._checkpoint.errors import CorruptCheckpointError

T = TypeVar("T")


def gathered(number: int) -> list[int]:
    """Returns the whole number of each process, in the order of their indices."""
    if jax.process_count() == 1:
        return [number]
    parts = np.array(divmod(number, 2**31), np.int32)  # JAX would narrow an int64
    found = multihost_utils.process_allgather(parts)
    return [int(high) * 2**31 + int(low) for high, low in found]


@contextlib.contextmanager
def together(elsewhere: Exception) -> Iterator[None]:
    """Raises on every process if what is done within raises on one.

    Each process raises its own error. One that has none raises a
    `CorruptCheckpointError` where the others met that and nothing worse, so that all
    of them then look for a step that is whole, or none does; else `elsewhere`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    ours = 0 if error is None else 1 if isinstance(error, CorruptCheckpointError) else 2
    worst = max(gathered(ours))
    if worst == 0:
        return
    if error is not None and ours == worst:
        raise error
    raise (
        CorruptCheckpointError(*elsewhere.args) if worst == 1 else elsewhere
    ) from error


def agreed(do: Callable[[], T], elsewhere: Exception) -> T:
    """Returns what `do` returns, if it raises on no process; see `together`."""
    found: list[T] = []
    with together(elsewhere):
        found.append(do())
    return found[0]
