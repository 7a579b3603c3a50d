"""Weighted sums of many trees, read in parts: memory for the sums and one tree more.

Leaf by leaf, a few trees at a time, each block of elements is summed in float64 for all
sums at once; the next parts are read meanwhile. Every byte of the trees is read once.
(A leaf larger than half a tree is held twice.)
"""

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax import selection, trees

Index: TypeAlias = tuple[slice, ...]
Progress: TypeAlias = bool | Callable[[int, int], None]

_BLOCK = 2**14  # elements; so many of 64 trees in float64 stay in a cache of 8 MB
_COLUMNS = 2**7
_SMALL = 2**25  # bytes that may be held whatever the size of a tree
_READERS = 4


class Source(abc.ABC):
    """A tree whose leaves are read one by one, and in parts.

    Attributes:
        leaves: Shape and dtype of every averaged leaf, by path.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]

    @abc.abstractmethod
    def read(self, path: str, index: Index) -> np.ndarray:
        """Returns a part of a leaf; called from several threads."""


class InMemory(Source):
    """A tree of arrays as a `Source`: its floating and complex leaves."""

    def __init__(self, tree: Any) -> None:
        names, leaves, _ = trees.flatten(tree)
        self._leaves = {
            name: leaf
            for name, leaf in zip(names, leaves, strict=True)
            if selection.is_averaged(leaf)
        }
        self.leaves = {
            name: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
            for name, leaf in self._leaves.items()
        }

    def read(self, path: str, index: Index) -> np.ndarray:
        """Returns a part of a leaf: of a sharded one, from the shard that holds it."""
        leaf = self._leaves[path]
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                if _same(shard.index, index, leaf.shape):
                    return np.asarray(shard.data)
        return np.asarray(leaf)[index]


class Target(NamedTuple):
    """What a leaf of the sums is to be."""

    dtype: Any
    sharding: jax.sharding.Sharding


def weighted_sums(
    sources: Sequence[Source],
    weights: np.ndarray,
    targets: Mapping[str, Target],
    *,
    progress: Progress = False,
) -> list[dict[str, jax.Array]]:
    """Returns Σᵢ weights[i, j]·sources[i] for every j, leaf by leaf.

    On several processes each reads what its own devices will hold.

    Args:
        sources: Trees that all have the leaves of `targets`.
        weights: float64[sources, sums].
        targets: The leaves to sum, by path.
        progress: True for a bar on the terminal, or a function that is called with the
            work done and all of it.
    """
    items = list(_items(sources, targets))
    wide = _partial_dtypes(sources[0].leaves, targets, weights.shape[1])
    found: list[dict[str, jax.Array]] = [{} for _ in range(weights.shape[1])]
    shards: list[list[jax.Array]] = [[] for _ in found]
    parts: list[np.ndarray] = []
    with _reporting(progress, len(items)) as report, _Reader(sources) as reader:
        for done, (item, read) in enumerate(reader.ahead(items)):
            target = targets[item.path]
            if item.is_first:
                kind = target.dtype if item.is_last else wide[item.path]
                parts = [np.zeros(read[0].shape, kind) for _ in found]
            _add(parts, read, weights[item.low : item.high])
            read.clear()
            if item.is_last:
                for of_leaf in shards:
                    part = parts.pop(0).astype(target.dtype, copy=False)
                    of_leaf += [jax.device_put(part[i], d) for d, i in item.devices]
            if item.is_last and item.ends_leaf:
                shape = sources[0].leaves[item.path].shape
                for tree, of_leaf in zip(found, shards, strict=True):
                    tree[item.path] = jax.make_array_from_single_device_arrays(
                        shape, target.sharding, of_leaf
                    )
                    of_leaf.clear()
            report(done + 1, len(items))
    return found


def _partial_dtypes(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    targets: Mapping[str, Target],
    sums: int,
) -> dict[str, Any]:
    """Returns what the sums of a leaf are kept in until its last trees are added.

    float64, so that they are rounded once; float32, at some 1e-7, where a leaf is so
    large that this would take more than one tree.
    """
    room = max(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values()), _SMALL)
    kinds = {}
    for path, target in targets.items():
        wide = jnp.promote_types(target.dtype, jnp.float64)
        more = leaves[path].size * (wide.itemsize - target.dtype.itemsize) * sums
        fallback = jnp.promote_types(target.dtype, jnp.float32)
        kinds[path] = wide if more <= room else fallback
    return kinds


class _Item(NamedTuple):
    """One piece of the work: a part of a leaf, from the sources low … high−1.

    `devices` are those that hold any of the part, each with what it holds of it.
    """

    path: str
    part: Index
    devices: list[tuple[Any, Index]]
    ends_leaf: bool
    low: int
    high: int
    is_first: bool
    is_last: bool


def _items(sources: Sequence[Source], targets: Mapping[str, Target]) -> Iterator[_Item]:
    count = len(sources)
    leaves = sources[0].leaves
    sizes = {path: leaves[path].size * leaves[path].dtype.itemsize for path in targets}
    # Two items are held at a time, the one that is summed and the one that is read.
    budget = max(sum(sizes.values()), _SMALL) // 2
    for path, target in targets.items():
        at_once = max(1, min(count, budget // max(sizes[path], 1)))
        parts = _parts(target.sharding, leaves[path].shape)
        for number, (index, devices) in enumerate(parts):
            for low in range(0, count, at_once):
                high = min(low + at_once, count)
                yield _Item(
                    path,
                    index,
                    devices,
                    ends_leaf=number == len(parts) - 1,
                    low=low,
                    high=high,
                    is_first=low == 0,
                    is_last=high == count,
                )


class _Reader:
    """Reads the parts of an item while the one before is summed."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="ema_optax_read")

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ahead(self, items: Sequence[_Item]) -> Iterator[tuple[_Item, list[np.ndarray]]]:
        waiting: list[Future[np.ndarray]] = self._start(items[0]) if items else []
        for number, item in enumerate(items):
            read = [future.result() for future in waiting]
            more = number + 1 < len(items)
            waiting = self._start(items[number + 1]) if more else []
            yield item, read

    def _start(self, item: _Item) -> list[Future[np.ndarray]]:
        return [
            self._pool.submit(source.read, item.path, item.part)
            for source in self._sources[item.low : item.high]
        ]


def _add(
    sums: Sequence[np.ndarray], terms: Sequence[np.ndarray], weights: np.ndarray
) -> None:
    """Adds Σᵢ weights[i, j]·terms[i] to sums[j], in place.

    As products of matrices of _COLUMNS columns, which BLAS leaves on one thread: on
    cores that others use too, its threads wait for each other, and take ten times as
    long. The next terms are read meanwhile.
    """
    wide = np.complex128 if np.iscomplexobj(sums[0]) else np.float64
    flat_sums = [total.reshape(-1) for total in sums]
    flat_terms = [np.ascontiguousarray(term).reshape(-1) for term in terms]
    size, factors = flat_terms[0].size, np.ascontiguousarray(weights.T)
    start = 0
    while start < size:
        columns = min(_COLUMNS, size - start)
        rows = min(_BLOCK, size - start) // columns
        stop = start + rows * columns
        block = np.empty((rows, len(terms), columns), wide)
        for i, term in enumerate(flat_terms):
            block[:, i] = term[start:stop].reshape(rows, columns)
        added = factors @ block
        for j, total in enumerate(flat_sums):
            here = total[start:stop].reshape(rows, columns)
            here += added[:, j].astype(total.dtype)
        start = stop


def _parts(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> list[tuple[Index, list[tuple[Any, Index]]]]:
    """Returns the parts of a leaf that this process sums, and who holds what of them.

    All of it where no other process holds any; else what each device holds.
    """
    whole = (slice(None),) * len(shape)
    held = sharding.addressable_devices_indices_map(shape)
    devices = [(device, index or whole) for device, index in held.items()]
    if sharding.is_fully_addressable:
        return [(whole, devices)]
    found: dict[Any, tuple[Index, list[tuple[Any, Index]]]] = {}
    for device, index in devices:
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        found.setdefault(key, (index, []))[1].append((device, whole))
    return list(found.values())


def _same(a: Index, b: Index, shape: tuple[int, ...]) -> bool:
    pairs = zip(a, b, shape, strict=True)
    return all(x.indices(n) == y.indices(n) for x, y, n in pairs)


@contextlib.contextmanager
def _reporting(progress: Progress, total: int) -> Iterator[Callable[[int, int], None]]:
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        try:
            from rich.progress import Progress as Bar
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "progress=True needs rich, which is not installed: "
                "pip install 'ema-optax[cli]', or pass a function of (done, total).",
                name=error.name,
            ) from error
        with Bar() as bar:
            task = bar.add_task("averaging", total=total)
            yield lambda done, total: bar.update(task, completed=done)
