"""Watches which parts of leaves are asked of TensorStore, and when they have come."""

import contextlib
import weakref
from unittest import mock

from ema_optax._checkpoint import opening


class Reads:
    """What was read.

    Attributes:
        parts: Each part that was asked for: tree, path, and its bounds.
        bytes: Of all of them.
        in_flight: Bytes that are asked for, and not yet waited for.
        peak: The most that ever were.
        held: Bytes of the arrays that have come, and are not let go of.
        most_held: The most that ever were.
        error: What waiting raises in place of returning data, if anything.
    """

    def __init__(self, error=None):
        self.parts, self.bytes, self.in_flight, self.peak = [], 0, 0, 0
        self.error, self.held, self.most_held = error, 0, 0

    def hold(self, data):
        """Counts an array until it is let go of."""
        self.held += data.nbytes
        self.most_held = max(self.most_held, self.held)
        weakref.finalize(data, self._let_go, data.nbytes)

    def _let_go(self, size):
        self.held -= size


class _Future:
    def __init__(self, future, then):
        self._future, self._then = future, then

    def result(self):
        return self._then(self._future.result())


class _Array:
    def __init__(self, array, place, reads):
        self._array, self._place, self._reads = array, place, reads
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, index):
        bounds = tuple((s.start, s.stop) for s in index)
        return _Part(self._array[index], (*self._place, bounds), self._reads)


class _Part:
    def __init__(self, array, part, reads):
        self._array, self._part, self._reads = array, part, reads

    def read(self):
        reads, size = (
            self._reads,
            self._array.size * self._array.dtype.numpy_dtype.itemsize,
        )
        reads.parts.append(self._part)
        reads.bytes += size
        reads.in_flight += size
        reads.peak = max(reads.peak, reads.in_flight)

        def came(data):
            reads.in_flight -= size
            if reads.error is not None:
                raise reads.error
            reads.hold(data)
            return data

        return _Future(self._array.read(), came)


@contextlib.contextmanager
def watched(error=None):
    """Yields the `Reads` of what is read within; with an error reads fail."""
    reads, really = Reads(error), opening.Store.open

    def open_watched(self, tree, path, metadata):
        future = really(self, tree, path, metadata)
        return _Future(future, lambda array: _Array(array, (tree, path), reads))

    with mock.patch.object(opening.Store, "open", open_watched):
        yield reads
