"""Weighted sums of many trees, read in parts: memory for the sums and one tree more.

Each leaf is read from a few trees at a time. A block of its elements is added to all
sums at once, in float64, while the next parts are read. Every byte is read once.
"""

import abc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from ema_optax._messages.progress import Progress, shown
from ema_optax._messages.text import brief
from ema_optax._trees import selection, trees

Index: TypeAlias = tuple[slice, ...]

_BLOCK = 2**14  # elements; so many of 64 trees in float64 stay in a cache of 8 MB
# Multiplications in a product of matrices that BLAS leaves on one thread. On cores that
# others use too, its own threads wait for each other, and take ten times as long.
_PRODUCT = 2**17
_SMALL = 2**25  # bytes that may be held, however small a tree is
_READERS = 4  # threads, as _ADDERS
_ADDERS = min(4, os.cpu_count() or 1)


class Source(abc.ABC):
    """A tree whose leaves are read one by one, and in parts.

    Attributes:
        leaves: Shape and dtype of every averaged leaf, by path.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]

    @abc.abstractmethod
    def read(self, path: str, index: Index) -> np.ndarray:
        """Reads a part of a leaf; called from several threads."""

    def fingerprint(self) -> bytes:
        """Computes a digest of all leaves; reads them."""
        import xxhash  # loaded with the first digest, not with ema_optax

        digest = xxhash.xxh3_128()
        for path, leaf in sorted(self.leaves.items()):
            digest.update(f"{path} {leaf.dtype} {leaf.shape} ".encode())
            array = self.read(path, (slice(None),) * len(leaf.shape))
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()


class InMemory(Source):
    """A tree of arrays as a `Source`: its floating and complex leaves.

    Raises:
        TypeError: If a leaf is neither an array nor a number.
    """

    def __init__(self, tree: optax.Params) -> None:
        names, leaves, _ = trees.flatten(tree)
        for name, leaf in zip(names, leaves, strict=True):
            if isinstance(getattr(leaf, "tree", None), (Mapping, Source)):
                raise TypeError(
                    f"A tree of arrays is needed, and {brief(leaf)} holds one: pass "
                    f"its .tree{f', at {name!r}' if name else ''}."
                )
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
        """Reads a part of a leaf, from the one shard that holds it if there is one."""
        leaf = self._leaves[path]
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                if _same(shard.index, index, leaf.shape):
                    return np.asarray(shard.data)
        return np.asarray(leaf)[index]


class Target(NamedTuple):
    """The dtype and the sharding of a leaf of the sums."""

    dtype: Any
    sharding: jax.sharding.Sharding


def weighted_sums(
    sources: Sequence[Source],
    weights: np.ndarray,
    targets: Mapping[str, Target],
    *,
    progress: Progress = False,
) -> list[dict[str, jax.Array]]:
    """Computes Σᵢ weights[i, j]·sources[i] for every j, leaf by leaf.

    On several processes each reads what its own devices will hold.

    Args:
        sources: Trees that all have the leaves of `targets`.
        weights: float64[sources, sums].
        targets: The leaves to sum, by path.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function that is called with the work done and all of it.
    """
    items = list(_items(sources, targets))
    wide = _partial_dtypes(sources[0].leaves, targets, weights.shape[1])
    results: list[dict[str, jax.Array]] = [{} for _ in range(weights.shape[1])]
    shards: list[list[jax.Array]] = [[] for _ in results]
    parts: list[np.ndarray] = []
    with (
        shown(progress, "averaging", len(items)) as report,
        _Reader(sources) as reader,
        ThreadPoolExecutor(_ADDERS, thread_name_prefix="ema_optax_add") as adders,
    ):
        for done, (item, read) in enumerate(reader.ahead(items)):
            target = targets[item.path]
            if item.is_first:
                kind = target.dtype if item.is_last else wide[item.path]
                parts = [_empty(read[0].shape, kind) for _ in results]
            factors = weights[item.low : item.high]
            _add(adders, parts, read, factors, is_first=item.is_first)
            read.clear()
            if item.is_last:
                for of_leaf in shards:
                    part = parts.pop(0).astype(target.dtype, copy=False)
                    of_leaf += [jax.device_put(part[i], d) for d, i in item.devices]
            if item.is_last and item.ends_leaf:
                shape = sources[0].leaves[item.path].shape
                for tree, of_leaf in zip(results, shards, strict=True):
                    tree[item.path] = jax.make_array_from_single_device_arrays(
                        shape, target.sharding, of_leaf
                    )
                    of_leaf.clear()
            report(done + 1)
    return results


def _partial_dtypes(
    leaves: Mapping[str, jax.ShapeDtypeStruct],
    targets: Mapping[str, Target],
    sums: int,
) -> dict[str, Any]:
    """Chooses the dtype of a leaf's sums until the last trees are added.

    float64, so that they are rounded once; float32, at some 1e-7, where a leaf is so
    large that this would take more than a quarter of a tree.
    """
    room = _tree_bytes(leaves, targets) // 4
    kinds = {}
    for path, target in targets.items():
        wide = np.promote_types(target.dtype, np.float64)
        more = leaves[path].size * (wide.itemsize - target.dtype.itemsize) * sums
        kinds[path] = wide if more <= room else trees.wide(target.dtype)
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
    # Two items are held at a time, the one that is summed and the one that is read.
    budget = _tree_bytes(leaves, targets) // 2
    for path, target in targets.items():
        size = leaves[path].size * leaves[path].dtype.itemsize
        at_once = max(1, min(count, budget // max(size, 1)))
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


def _tree_bytes(
    leaves: Mapping[str, jax.ShapeDtypeStruct], targets: Mapping[str, Target]
) -> int:
    """Returns the bytes of a tree, as it is read or as it is summed: the larger."""
    sizes = [
        leaf.size * max(leaf.dtype.itemsize, targets[path].dtype.itemsize)
        for path, leaf in leaves.items()
    ]
    return max(sum(sizes), _SMALL)


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
    adders: ThreadPoolExecutor,
    sums: Sequence[np.ndarray],
    terms: Sequence[np.ndarray],
    weights: np.ndarray,
    *,
    is_first: bool,
) -> None:
    """Adds Σᵢ weights[i, j]·terms[i] to sums[j], in place, on threads.

    Where it is the first addition, the sums hold nothing yet. A term of weight 0 counts
    for nothing, whatever it holds: 0·inf and 0·NaN would be NaN.
    """
    flat_sums = [total.reshape(-1) for total in sums]
    flat_terms = [np.ascontiguousarray(term).reshape(-1) for term in terms]
    size, factors = flat_terms[0].size, np.ascontiguousarray(weights.T)
    width = max(_PRODUCT // factors.size, 16)
    wide = np.complex128 if np.iscomplexobj(sums[0]) else np.float64

    rows = max(min(_BLOCK, size) // width, 1)
    # For the sums that leave terms out, the numbers of the terms that they take.
    taken = {j: np.flatnonzero(row) for j, row in enumerate(factors) if not row.all()}

    def add(start: int, stop: int) -> None:
        # Made once: the allocator would give such large ones back, and clear new ones.
        block = np.empty((rows, len(terms), width), wide)
        added = np.empty((rows, len(sums), width), wide)
        while start < stop:
            columns = min(width, stop - start)
            count = min(rows, (stop - start) // columns)
            end = start + count * columns
            x, y = block[:count, :, :columns], added[:count, :, :columns]
            for i, term in enumerate(flat_terms):
                x[:, i] = term[start:end].reshape(count, columns)
            with np.errstate(invalid="ignore" if taken else None):
                np.matmul(factors, x, out=y)
            for j, terms_of_sum in taken.items():
                if not np.isfinite(y[:, j]).all():
                    y[:, j] = factors[j, terms_of_sum] @ x[:, terms_of_sum]
            for j, total in enumerate(flat_sums):
                part = total[start:end].reshape(count, columns)
                if is_first:
                    part[...] = y[:, j]
                else:
                    np.add(part, y[:, j], out=part, casting="same_kind")
            start = end

    edges = np.linspace(0, size, _ADDERS + 1).astype(int).tolist()
    list(adders.map(add, edges[:-1], edges[1:]))


def _empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Allocates an array aligned to 64 bytes, whose memory JAX takes over on CPUs."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(kind).reshape(shape)


def _parts(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...]
) -> list[tuple[Index, list[tuple[Any, Index]]]]:
    """Lists the parts of a leaf that this process sums, with their devices.

    One part, the leaf, where no other process holds any of it; else one for each
    different index that a device of this process holds.
    """
    whole = (slice(None),) * len(shape)
    indices = sharding.addressable_devices_indices_map(shape)
    devices = [(device, index or whole) for device, index in indices.items()]
    if sharding.is_fully_addressable:
        return [(whole, devices)]
    parts: dict[Any, tuple[Index, list[tuple[Any, Index]]]] = {}
    for device, index in devices:
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        parts.setdefault(key, (index, []))[1].append((device, whole))
    return list(parts.values())


def _same(a: Index, b: Index, shape: tuple[int, ...]) -> bool:
    pairs = zip(a, b, shape, strict=True)
    return all(x.indices(n) == y.indices(n) for x, y, n in pairs)
