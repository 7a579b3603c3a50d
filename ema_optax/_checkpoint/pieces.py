"""Checksums of leaves, block by block: made from a stranger's JSON, or refused."""

# pyright: strict

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from ema_optax._checkpoint.entries import BYTES
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.untrusted import is_list, is_object, is_whole
from ema_optax._messages.text import brief

Bounds: TypeAlias = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A block of a leaf, a (start, stop) for each axis, and the xxh3 of its bytes."""

    bounds: Bounds
    xxh3: str


Sums: TypeAlias = Mapping[str, Mapping[str, tuple[Piece, ...]]]  # tree → path → pieces


def parse_sums(content: object) -> Sums:
    """Makes checksums of a stranger's JSON, or raises `CorruptCheckpointError`."""
    if not is_object(content):
        raise CorruptCheckpointError("it holds no trees")
    sums: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for tree, leaves in content.items():
        if not is_object(leaves):
            raise CorruptCheckpointError(f"its tree {brief(tree)} has no leaves")
        sums[tree] = {}
        for path, pieces in leaves.items():
            parsed = _pieces(pieces)
            if parsed is None:
                raise CorruptCheckpointError(
                    f"the pieces of {brief(path)} are not bounds and a checksum"
                )
            sums[tree][path] = parsed
    return sums


def _pieces(value: object) -> tuple[Piece, ...] | None:
    if not is_list(value):
        return None
    pieces: list[Piece] = []
    for piece in value:
        if not is_list(piece) or len(piece) != 2 or not is_list(piece[0]):
            return None
        pairs = [_pair(x) for x in piece[0]]
        bounds = tuple(pair for pair in pairs if pair)
        if len(bounds) < len(pairs) or not isinstance(piece[1], str):
            return None
        pieces.append(Piece(bounds, piece[1]))
    return tuple(pieces)


def _pair(value: object) -> tuple[int, int] | None:
    if not is_list(value) or len(value) != 2:
        return None
    start, stop = value
    if is_whole(start) and is_whole(stop) and 0 <= start <= stop < BYTES:
        return start, stop
    return None
