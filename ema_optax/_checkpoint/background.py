"""What of a save runs in the background: the gate around Orbax's writers.

Orbax starts to write as soon as an array is on the host, on threads that take the
processors from the blocking part: without the gate that part is 2.6 times longer
(96 leaves, 151 MB, two cores; benchmarks/checkpoints.py). So every folder that Orbax
is given waits, until the blocking part has opened the gate.
"""

import asyncio
import functools
import threading
from collections.abc import Sequence
from typing import Protocol

from etils import epath
from orbax.checkpoint import v1

from ema_optax._checkpoint.processes import together

ELSEWHERE = "another process could not save its part, and says why."


class Future(Protocol):
    """What Orbax waits for at the end of a save."""

    def result(self, timeout: float | None = None) -> object:
        """Waits for the end; raises the error of what ran."""


class AllFutures:
    """Futures as one that ends, well or not, when nothing writes any more."""

    def __init__(self, futures: Sequence[Future]) -> None:
        self._futures = futures

    def result(self, timeout: float | None = None) -> None:
        """Waits for all of them; raises the first error."""
        errors = []
        for future in self._futures:
            try:
                future.result(timeout=timeout)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class Failed:
    """What has failed before it was begun, and says so when it is waited for."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self, timeout: float | None = None) -> None:
        """Raises the error."""
        raise self._error


class RaisedEverywhere:
    """A future whose error on one process is one on all, where a save blocks.

    Orbax then waits for it on the thread that started the save, and afterwards for the
    other processes, without a bound. A background thread must not compute: its
    collective could meet those of the training step. There Orbax's bound is
    `AsyncOptions.timeout_secs`.
    """

    def __init__(self, future: AllFutures, item: epath.Path) -> None:
        self._future, self._item = future, item
        self._thread = threading.get_ident()

    def result(self, timeout: float | None = None) -> None:
        """Waits for it; raises its error, or that there is one elsewhere."""
        if threading.get_ident() != self._thread:
            return self._future.result(timeout)
        with together(OSError(f"{self._item} is not saved: {ELSEWHERE}")):
            return self._future.result(timeout)


class Gate:
    """Holds writing back until the blocking part is done, which it would slow down."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.broken = False


class GatedFolder(v1.path.PathAwaitingCreation):
    """A folder that Orbax's writers may use once the gate is open."""

    def __init__(self, folder: epath.Path, gate: Gate) -> None:
        self._folder, self._gate = folder, gate

    def __truediv__(self, other: str | epath.Path) -> "GatedFolder":
        return GatedFolder(self._folder / other, self._gate)

    @property
    def path(self) -> epath.Path:
        """The folder, which may not be there yet."""
        return self._folder

    async def await_creation(self) -> epath.Path:
        """Returns the folder once the gate is open.

        Raises:
            RuntimeError: If the blocking part failed.
        """
        if not self._gate.opened.is_set():
            await asyncio.to_thread(self._gate.opened.wait)
        if self._gate.broken:
            raise RuntimeError("Another part of this save could not be started.")
        return _awaitable_again(type(self._folder))(self._folder)


@functools.cache
def _awaitable_again(kind: type[epath.Path]) -> type[epath.Path]:
    """Returns a kind of path that can be awaited although it is there.

    Orbax's threads share what they know of a leaf. Between a thread's finding that the
    folder is to be awaited, and its awaiting it, another may put the path in its place.
    """

    async def await_creation(self: epath.Path) -> epath.Path:
        return self

    return type(kind.__name__, (kind,), {"await_creation": await_creation})
