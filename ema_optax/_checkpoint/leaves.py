"""Reads leaves of an item: opens, compares and verifies them on the host, places them.

This is the only way from disk. Each process reads the parts that its devices need, in
whole pieces where they are verified, so that no leaf is read twice, copied back from a
device, or gathered from other processes.
"""

import collections
import contextlib
import functools
import itertools
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from ema_optax._checkpoint import checksums, manifest, opening, untrusted
from ema_optax._checkpoint.entries import LeafEntry
from ema_optax._checkpoint.errors import CorruptCheckpointError, as_cause
from ema_optax._checkpoint.manifest import PARAMS, Manifest
from ema_optax._checkpoint.pieces import Bounds, Sums
from ema_optax._checkpoint.processes import agreed
from ema_optax._checkpoint.targets import Parts, Target, place_all

# Bytes that are read and not yet placed: enough to keep a disk busy. A leaf that is
# larger is read alone.
_IN_FLIGHT = 2**28
# Bytes of leaves that are placed with one call: with a call for each, a restore of
# 1,000 leaves of 10 kB takes 1.1 times as long.
_TOGETHER = 2**26
_OPEN = 256  # leaves whose arrays are opened ahead, or are placed with one call


Slot = TypeVar("Slot", bound=Hashable)


class Place(NamedTuple):
    """Where a leaf lies in an item: the name of its tree, and its path there."""

    tree: str
    path: str

    def __str__(self) -> str:
        return f"leaf '{self.path}' of the {self.tree}"


def read(
    item: epath.Path,
    saved: Manifest,
    slots: Mapping[Slot, tuple[Place, Target]],
    *,
    verify: bool,
) -> dict[Slot, Any]:
    """Reads leaves in the dtype they were saved in, and places them at their targets.

    All processes must call it alike.

    Args:
        item: Folder of the item.
        saved: Its manifest.
        slots: For each slot the place of the leaf that it takes, and its target.
        verify: Whether to compare what is read with the checksums.

    Returns:
        The leaf of each slot.

    Raises:
        CorruptCheckpointError: On every process, if data on disk is not what was saved.
        MemoryError, PermissionError, OSError: If something else keeps it from being
            read.
        ValueError: If a target cannot hold its leaf.
    """
    takers: dict[Place, list[Slot]] = {}  # two slots may take one leaf, read once
    for slot, (place, _) in slots.items():
        takers.setdefault(place, []).append(slot)

    def read_here() -> dict[Slot, Any]:
        reader = Reader(item, saved, takers, verify=verify)
        parts = {
            slot: _parts(reader.entry(place), place, target)
            for slot, (place, target) in slots.items()
        }
        wanted = {
            place: list(dict.fromkeys(p for slot in its_slots for p in parts[slot]))
            for place, its_slots in takers.items()
        }
        placed: dict[Slot, Any] = {}
        ready: dict[Slot, tuple[Target, Parts, tuple[int, ...]]] = {}
        size = 0
        for place, data in reader.stream(wanted):
            entry = reader.entry(place)
            ready |= {
                slot: (slots[slot][1], data, entry.shape) for slot in takers[place]
            }
            size += entry.bytes
            if size > _TOGETHER or len(ready) > _OPEN:
                placed |= _placed(ready)
                ready, size = {}, 0
        return placed | _placed(ready)

    return agreed(read_here, elsewhere(item))


def check(item: epath.Path, saved: Manifest) -> None:
    """Compares all of an item with its checksums, as each process sees it.

    All processes must call it alike. Each reads all: a file system may show one of them
    what it hides from another.

    Raises:
        CorruptCheckpointError: On every process, if data on disk is not what was saved.
    """

    def check_here() -> None:
        everything = [
            Place(tree, path)
            for tree, entry in saved.trees.items()
            for path in entry.leaves
        ]
        reader = Reader(item, saved, everything, verify=True)
        for _ in reader.stream(dict.fromkeys(everything)):
            pass  # each leaf is read, compared and freed
        _check_metadata(item, saved)

    agreed(check_here, elsewhere(item))


def _check_metadata(item: epath.Path, saved: Manifest) -> None:
    """Checks the files beside the arrays, which Orbax reads without this library."""
    trees = [name for name, tree in saved.trees.items() if tree.leaves]
    for folder in {
        item if name == PARAMS else item / manifest.FOLDER for name in trees
    }:
        path = folder / "_METADATA"
        try:
            json.loads(untrusted.read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise as_cause(error, f"{path} cannot be read") from error


def elsewhere(item: epath.Path) -> Exception:
    """Returns the error to raise on a process where only another one failed."""
    return RuntimeError(
        f"{item}: another process could not read its part, or found it damaged."
    )


class Reader:
    """Reads parts of the leaves of one item, in this process alone."""

    def __init__(
        self,
        item: epath.Path,
        saved: Manifest,
        places: Iterable[Place],
        *,
        verify: bool,
    ) -> None:
        """Refuses files that would block reading or fill the memory.

        Args:
            item: Folder of the item.
            saved: Its manifest.
            places: The leaves that will be read.
            verify: Whether to compare what is read with the checksums.

        Raises:
            CorruptCheckpointError: If the files cannot be those of the manifest.
        """
        self._item, self._manifest, self._verify = item, saved, verify
        structures = {name: tree.structure for name, tree in saved.trees.items()}
        self._store = opening.Store(item, structures)
        places = list(places)
        claimed = sum(self.entry(place).bytes for place in places)
        if not claimed:
            return
        try:
            problem = untrusted.refusal(item, claimed)
        except FileNotFoundError as error:
            problem = f"it cannot be read: {error}"
        if problem:
            raise self.damage(places[0], problem)

    def entry(self, place: Place) -> LeafEntry:
        """Returns the manifest's entry of a leaf."""
        return self._manifest.leaf(place)

    def damage(self, place: Place, problem: str) -> CorruptCheckpointError:
        """Returns the error of a leaf that is not what was saved."""
        return CorruptCheckpointError(f"{self._item}: {place}: {problem}.")

    def stream(
        self, wanted: Mapping[Place, Sequence[Bounds] | None]
    ) -> Iterator[tuple[Place, dict[Bounds, np.ndarray]]]:
        """Yields the parts of each leaf, verified, with few bytes in flight.

        Args:
            wanted: The bounds of the parts of each leaf; None for all of it, in the
                bounds of its array on disk.

        Raises:
            CorruptCheckpointError, MemoryError, OSError: Of the first leaf that fails.
        """
        waiting: collections.deque[_Pending] = collections.deque()
        in_flight = 0
        for pending in self._opened(wanted):
            while waiting and in_flight + pending.bytes > _IN_FLIGHT:
                first = waiting.popleft()
                yield first.place, self._finish(first)
                in_flight -= first.bytes
            pending.start()
            waiting.append(pending)
            in_flight += pending.bytes
        while waiting:
            first = waiting.popleft()
            yield first.place, self._finish(first)

    def _opened(
        self, wanted: Mapping[Place, Sequence[Bounds] | None]
    ) -> Iterator["_Pending"]:
        places = iter(wanted)
        while group := list(itertools.islice(places, _OPEN)):
            metadata = [self._store.metadata(*place) for place in group]
            futures = []
            for place, future in zip(group, metadata, strict=True):
                with _blaming(self._item, place):
                    stored = opening.parse(future.result())
                problem = opening.difference(stored, self.entry(place))
                if problem:
                    raise self.damage(place, problem)
                futures.append(self._store.open(*place, stored))
            for place, future in zip(group, futures, strict=True):
                with _blaming(self._item, place):
                    array = future.result()
                yield self._pending(place, array, wanted[place])

    def _pending(
        self, place: Place, array: Any, parts: Sequence[Bounds] | None
    ) -> "_Pending":
        shape = tuple(array.shape)
        if parts is None or self.entry(place).is_key:
            parts = [checksums.whole(shape)]
        if not self._verify:
            boxes = checksums.disjoint(parts)
            return _Pending(place, array, parts, dict.fromkeys(boxes, ()))
        pieces = self._sums[place.tree].get(place.path, ())
        try:
            boxes = [checksums.cover(pieces, part, shape)[0] for part in parts]
            covers = [
                checksums.cover(pieces, box, shape) for box in checksums.disjoint(boxes)
            ]
        except ValueError as error:
            raise self.damage(place, str(error)) from None
        return _Pending(place, array, parts, dict(covers))

    def _finish(self, pending: "_Pending") -> dict[Bounds, np.ndarray]:
        parts: dict[Bounds, np.ndarray] = {}
        for box, pieces in pending.boxes.items():
            with _blaming(self._item, pending.place):
                data = pending.futures.pop(0).result()
            problem = checksums.mismatch(data, box, pieces)
            if problem:
                raise self.damage(pending.place, problem)
            parts |= {
                part: data
                if part == box
                # A copy: a view of a small part would keep the whole box in memory.
                else data[checksums.slices(part, box)].copy()
                for part in pending.parts
                if checksums.inside(part, box)
            }
        return parts

    @functools.cached_property
    def _sums(self) -> Sums:
        return manifest.read_sums(self._item, self._manifest)


class _Pending:
    """A leaf being read: its array, and the boxes on disk that hold its parts."""

    def __init__(
        self,
        place: Place,
        array: Any,
        parts: Sequence[Bounds],
        boxes: Mapping[Bounds, Sequence[Any]],
    ) -> None:
        self.place, self._array, self.parts, self.boxes = place, array, parts, boxes
        self.futures: list[Any] = []
        itemsize = array.dtype.numpy_dtype.itemsize
        self.bytes = itemsize * sum(map(checksums.size, boxes))

    def start(self) -> None:
        """Begins to read every box."""
        self.futures = [self._array[checksums.slices(box)].read() for box in self.boxes]


def _parts(entry: LeafEntry, place: Place, target: Target) -> list[Bounds]:
    try:
        return target.parts(entry.shape)
    except ValueError as error:  # such as a sharding that does not divide the shape
        raise ValueError(
            f"{place} cannot be placed as the target asks: {error} The checkpoint is "
            "not damaged. Pass a target whose shardings fit, on devices that are there."
        ) from error


def _placed(
    ready: Mapping[Slot, tuple[Target, Parts, tuple[int, ...]]],
) -> dict[Slot, Any]:
    try:
        return dict(zip(ready, place_all(ready.values()), strict=True))
    except (MemoryError, RuntimeError) as error:  # JAX's own is a RuntimeError
        raise as_cause(error, "What was read cannot be placed") from error


@contextlib.contextmanager
def _blaming(item: epath.Path, place: Place) -> Iterator[None]:
    """Names the leaf in an error of TensorStore, and tells damage from other causes."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        raise as_cause(error, f"{item}: {place} cannot be read") from error
