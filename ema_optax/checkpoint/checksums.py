"""Checksums of leaves piece by piece, as processes wrote them and wherever they lie.

A piece is what one process wrote of a leaf: its bounds, a [start, stop] for each axis,
and the xxh3 of its bytes. Restored leaves may be sharded differently, or live on
another number of processes: a piece is compared wherever one process holds all of it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.experimental import multihost_utils

Bounds: TypeAlias = tuple[tuple[int, int], ...]
Pieces: TypeAlias = list[tuple[Bounds, np.ndarray]]


def plain(leaf: Any) -> Any:
    """Returns the data of a PRNG key array, and any other leaf as it is."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )
    return jax.random.key_data(leaf) if is_key else leaf


def host_pieces(leaf: Any) -> Pieces:
    """Returns the pieces of a leaf that this process writes, on the host.

    Call it after Orbax has copied the leaf to the host. On CPU a piece is then a view,
    which keeps the buffer alive if the caller donates the leaf; on an accelerator it is
    the host copy that the shard has cached. NumPy leaves may be overwritten in place
    and are copied.
    """
    if isinstance(leaf, jax.Array):
        leaf = plain(leaf)
        return [
            (_bounds(shard.index, leaf.shape), np.asarray(shard.data))
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        ]
    if jax.process_index() != 0:  # Orbax writes these from process 0
        return []
    value = np.array(leaf)
    return [(tuple((0, n) for n in value.shape), value)]


def refuse_overflow(pieces: Mapping[str, Mapping[str, Pieces]]) -> None:
    """Raises OverflowError for float16 data of a tree that are not finite.

    A shadow never is (it holds where params are not): such a value did not fit.
    """
    for name, leaves in pieces.items():
        for path, parts in leaves.items():
            for bounds, array in parts:
                if array.dtype == np.float16 and not np.isfinite(array).all():
                    raise OverflowError(
                        f"'{path}' of the {name} does not fit float16, within "
                        f"{[list(b) for b in bounds]}: it holds values beyond 65504. "
                        "Pass dtype='bfloat16' to SnapshotSave."
                    )


def digest(array: np.ndarray) -> str:
    """Returns the xxh3 of an array's bytes in C order; runs without the GIL."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return xxhash.xxh3_64_hexdigest(data)  # pyright: ignore a buffer, as it asks for


def number_of(text: str) -> int:
    """Returns a checksum of a text as a number of 62 bits."""
    return xxhash.xxh3_64_intdigest(text.encode()) >> 2


def mismatch(
    leaf: Any, dtype: str, sums: Iterable[tuple[Iterable[Any], str]]
) -> str | None:
    """Compares a restored leaf with the checksums of its pieces.

    Every process must call it for the same leaves in the same order: where a piece
    spans processes, all of them gather the leaf.

    Args:
        leaf: The leaf as it was read, in the dtype it was saved in.
        dtype: That dtype, by name.
        sums: Bounds and checksum of every piece.

    Returns:
        What is wrong, as far as this process can tell, or None.
    """
    leaf = plain(leaf)
    pieces = {tuple((a, b) for a, b in bounds): value for bounds, value in sums}
    shape = np.shape(leaf)
    if any(len(bounds) != len(shape) for bounds in pieces) or any(
        b > n for bounds in pieces for (_, b), n in zip(bounds, shape, strict=True)
    ):
        return f"its checksums are of another shape than {list(shape)}"
    covered = sum(math.prod(b - a for a, b in bounds) for bounds in pieces)
    if covered != math.prod(shape):
        return f"its checksums cover {covered} elements of {math.prod(shape)}"
    if not isinstance(leaf, jax.Array):
        shards, mine = {}, list(pieces)
        whole = np.asarray(leaf)
    else:
        shards = {
            _bounds(shard.index, shape): shard.data for shard in leaf.addressable_shards
        }
        mine, gather = _share_out(leaf, list(pieces))
        whole = multihost_utils.process_allgather(leaf, tiled=True) if gather else None
    for bounds in mine:
        data = _cut(bounds, shards)
        if data is None:
            if whole is None:
                whole = np.asarray(leaf)
            data = whole[tuple(slice(a, b) for a, b in bounds)]
        if str(data.dtype) != dtype or digest(data) != pieces[bounds]:
            return f"its data is not what was saved, within {[list(b) for b in bounds]}"
    return None


def part(
    sums: Iterable[tuple[Sequence[Any], str]], index: Sequence[slice], shape: Any
) -> list[tuple[Bounds, str]] | None:
    """Returns the checksums of a part of a leaf, in its own bounds.

    None where no pieces fill the part exactly: it can then only be verified with what
    surrounds it.
    """
    here = _bounds(index, tuple(shape))
    inside = []
    for bounds, value in sums:
        if len(bounds) != len(here):
            return None
        pairs = list(zip(bounds, here, strict=True))
        if all(a >= c and b <= d for (a, b), (c, d) in pairs):
            inside.append((tuple((a - c, b - c) for (a, b), (c, _) in pairs), value))
    covered = sum(math.prod(b - a for a, b in bounds) for bounds, _ in inside)
    return inside if covered == math.prod(b - a for a, b in here) else None


def _share_out(leaf: jax.Array, pieces: list[Bounds]) -> tuple[list[Bounds], bool]:
    """Returns the pieces that this process compares, and whether it must gather.

    Decided from facts that all processes share, so that they agree.
    """
    if leaf.is_fully_addressable:
        return pieces, False
    owners: dict[Bounds, set[int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        bounds = _bounds(index, leaf.shape)
        owners.setdefault(bounds, set()).add(int(device.process_index))
    holders = [
        {o for shard, those in owners.items() if _inside(piece, shard) for o in those}
        for piece in pieces
    ]
    gather = not all(holders)
    if gather:
        holders = [{i % jax.process_count()} for i in range(len(pieces))]
    here = jax.process_index()
    return [
        p for p, those in zip(pieces, holders, strict=True) if here in those
    ], gather


def _cut(piece: Bounds, shards: Mapping[Bounds, Any]) -> np.ndarray | None:
    for shard, data in shards.items():
        if _inside(piece, shard):
            offsets = zip(piece, shard, strict=True)
            return np.asarray(data)[
                tuple(slice(a - start, b - start) for (a, b), (start, _) in offsets)
            ]
    return None


def _inside(piece: Bounds, shard: Bounds) -> bool:
    return all(a >= c and b <= d for (a, b), (c, d) in zip(piece, shard, strict=True))


def _bounds(index: Iterable[slice], shape: tuple[int, ...]) -> Bounds:
    pairs = zip(index, shape, strict=True)
    return tuple((s.indices(n)[0], s.indices(n)[1]) for s, n in pairs)
