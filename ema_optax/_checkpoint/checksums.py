"""Checksums of leaves, block by block, as the processes wrote them.

A piece is a block that one process wrote: its bounds in the leaf and the xxh3 of its
bytes. A leaf may be read back on other shardings and on another number of processes:
what a process needs of it is read in whole pieces, and each is compared on the host.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from ema_optax._checkpoint.pieces import Bounds, Piece

# What one process writes of a leaf, on the host.
HostParts: TypeAlias = list[tuple[Bounds, np.ndarray]]

# Largest block, in bytes: what a shard that cuts through one reads in vain.
BLOCK = 2**26
_SMALLEST = 2**20  # smaller blocks cost more to open than they save


def bounds_of(index: Iterable[slice], shape: Sequence[int]) -> Bounds:
    """Returns the start and stop of an index along each axis."""
    pairs = zip(index, shape, strict=True)
    return tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in pairs)


def whole(shape: Sequence[int]) -> Bounds:
    """Returns the bounds of a whole leaf."""
    return tuple((0, n) for n in shape)


def slices(bounds: Bounds, within: Bounds | None = None) -> tuple[slice, ...]:
    """Returns bounds as an index: of the leaf, or of the array of outer bounds."""
    if within is None:
        return tuple(slice(a, b) for a, b in bounds)
    pairs = zip(bounds, within, strict=True)
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in pairs)


def host_parts(leaf: Any, *, kept: bool = False) -> HostParts:
    """Returns what this process writes of a leaf, on the host.

    Call it after Orbax has copied the leaf to the host. On CPU a part is then a view,
    which keeps the buffer alive if the caller donates the leaf; on an accelerator it is
    the host copy that the shard has cached. NumPy leaves may be overwritten in place
    and are copied, unless they are `kept` until all is written.
    """
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return [
            (bounds_of(shard.index, leaf.shape), np.asarray(shard.data))
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        ]
    if jax.process_index() != 0:  # Orbax writes these from process 0
        return []
    value = np.asarray(leaf) if kept else np.array(leaf)
    return [(whole(value.shape), value)]


def block_shape(
    shape: Sequence[int], sharded: Sequence[bool], itemsize: int
) -> tuple[int, ...] | None:
    """Returns the shape of the blocks that a large part is cut into; None of others.

    Orbax cuts its chunks alike when asked for `BLOCK` bytes: the longest axis, of the
    sharded ones while they last, to its next smaller divisor. Where that ends in
    crumbs, as for lengths that are prime, the part stays whole.

    Args:
        shape: Of the part.
        sharded: Whether the leaf is sharded along each axis.
        itemsize: Bytes of an element.
    """
    if math.prod(shape) * itemsize <= BLOCK:
        return None
    block, candidates = list(shape), list(sharded)
    while math.prod(block) * itemsize > BLOCK:
        longest = max(
            (n for n, used in zip(block, candidates, strict=True) if used), default=1
        )
        if longest == 1:
            candidates = [True] * len(block)
            continue
        axis = next(i for i, n in enumerate(block) if n == longest and candidates[i])
        block[axis] = max(n for n in _divisors(shape[axis]) if n < block[axis])
        candidates[axis] = True
    return tuple(block) if math.prod(block) * itemsize >= _SMALLEST else None


def is_cut(leaf: Any) -> bool:
    """Returns whether a leaf is stored in blocks."""
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return False
        shape = leaf.sharding.shard_shape(leaf.shape)
    else:
        shape = np.shape(leaf)
    if math.prod(shape) <= BLOCK // 16:  # whatever the dtype
        return False
    pairs = zip(shape, leaf.shape, strict=True)
    return (
        block_shape(shape, [a != b for a, b in pairs], leaf.dtype.itemsize) is not None
    )


def pieces_of(parts: HostParts, shape: Sequence[int]) -> list[Piece]:
    """Returns the checksums of what a process writes of a leaf of a shape."""
    found: list[Piece] = []
    for bounds, array in parts:
        block = None
        if array.ndim == len(shape):  # the data of keys have one more, and lie whole
            sharded = [a != b for a, b in zip(array.shape, shape, strict=True)]
            block = block_shape(array.shape, sharded, array.itemsize)
        if block is None:
            found.append(Piece(bounds, digest(array)))
            continue
        starts = [range(a, b, n) for (a, b), n in zip(bounds, block, strict=True)]
        for corner in itertools.product(*starts):
            here = tuple((a, a + n) for a, n in zip(corner, block, strict=True))
            found.append(Piece(here, digest(array[slices(here, bounds)])))
    return found


def refuse_overflow(parts: Mapping[str, Mapping[str, HostParts]]) -> None:
    """Raises OverflowError for float16 data of a tree that are not finite.

    A shadow never is (it holds where params are not): such a value did not fit.
    """
    for name, leaves in parts.items():
        for path, each in leaves.items():
            for bounds, array in each:
                if array.dtype == np.float16 and not np.isfinite(array).all():
                    raise OverflowError(
                        f"'{path}' of the {name} does not fit float16, within "
                        f"{[list(b) for b in bounds]}: it holds values beyond 65504. "
                        "Pass dtype='bfloat16' to SnapshotSave."
                    )


def digest(array: np.ndarray) -> str:
    """Returns the xxh3 of an array's bytes in C order; runs without the GIL."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return xxhash.xxh3_64_hexdigest(memoryview(data))  # pyright: ignore[reportArgumentType] a buffer in 3.11 too


def number_of(text: str) -> int:
    """Returns a checksum of a text as a number of 62 bits."""
    return xxhash.xxh3_64_intdigest(text.encode()) >> 2


def cover(
    pieces: Sequence[Piece], part: Bounds, shape: Sequence[int]
) -> tuple[Bounds, Sequence[Piece]]:
    """Returns the smallest box of whole pieces around a part, and its pieces.

    Raises:
        ValueError: If the pieces are not of this shape, or leave gaps.
    """
    if len(pieces) == 1 and pieces[0].bounds == part == whole(shape):
        return part, pieces
    if any(
        len(piece.bounds) != len(shape)
        or any(b > n for (_, b), n in zip(piece.bounds, shape, strict=True))
        for piece in pieces
    ):
        raise ValueError(f"its checksums are of another shape than {list(shape)}")
    box, inside = part, []
    while len(touching := [p for p in pieces if _overlap(p.bounds, box)]) > len(inside):
        inside = touching
        box = hull([box, *(piece.bounds for piece in inside)])
    covered = sum(size(bounds) for bounds in {piece.bounds for piece in inside})
    if covered != size(box):
        raise ValueError(f"its checksums cover {covered} elements of {size(box)}")
    return box, inside


def mismatch(data: np.ndarray, box: Bounds, pieces: Iterable[Piece]) -> str | None:
    """Returns which piece within a box is not what was saved, or None."""
    for piece in pieces:
        if digest(data[slices(piece.bounds, box)]) != piece.xxh3:
            return (
                "its data is not what was saved, within "
                f"{[list(b) for b in piece.bounds]}"
            )
    return None


def disjoint(boxes: Iterable[Bounds]) -> list[Bounds]:
    """Returns boxes, with those that overlap joined: nothing is read twice."""
    found: list[Bounds] = []
    for box in dict.fromkeys(boxes):
        joined = box
        while near := [other for other in found if _overlap(other, joined)]:
            found = [other for other in found if other not in near]
            joined = hull([joined, *near])
        found.append(joined)
    return found


def inside(part: Bounds, box: Bounds) -> bool:
    """Returns whether a part lies within a box."""
    return all(a >= c and b <= d for (a, b), (c, d) in zip(part, box, strict=True))


def hull(boxes: Sequence[Bounds]) -> Bounds:
    """Returns the smallest box around boxes."""
    return tuple(
        (min(a for a, _ in axis), max(b for _, b in axis))
        for axis in zip(*boxes, strict=True)
    )


def _divisors(number: int) -> set[int]:
    small = {n for n in range(1, math.isqrt(number) + 1) if number % n == 0}
    return small | {number // n for n in small}


def _overlap(one: Bounds, other: Bounds) -> bool:
    pairs = zip(one, other, strict=True)
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in pairs)


def size(bounds: Bounds) -> int:
    """Returns the number of elements within bounds."""
    return math.prod(b - a for a, b in bounds)
