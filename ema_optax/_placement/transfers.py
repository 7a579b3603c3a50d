"""Groups of shadows that come from the host's memory to the device and go back."""

# pyright: strict

import math
from collections.abc import Mapping

import jax

from ema_optax._placement.leaf_placement import LeafSharding

# Bytes that are on a device at once on their way from the host's memory and back.
_TOGETHER = 2**25
_GROUPS = 16  # at most, of more bytes then: each is a loop to compile and to begin


def host_groups(
    arrays: Mapping[int, jax.Array], shardings: Mapping[int, LeafSharding | None]
) -> list[list[int]]:
    """Lists the arrays in the host's memory, in groups that are fetched together.

    Args:
        arrays: Shadows by number.
        shardings: For each number, the shardings of the shadow and its param.

    Returns:
        Groups of numbers: each of at most 32 MiB on a device, or a 16th of all
        shadows there, or one larger array.
    """
    sizes: dict[int, int] = {}
    for n, array in arrays.items():
        sharding = shardings[n]
        if sharding is not None and sharding.shadow.memory_kind == "pinned_host":
            shape = sharding.shadow.shard_shape(array.shape)
            sizes[n] = math.prod(shape) * array.dtype.itemsize
    most = max(_TOGETHER, sum(sizes.values()) // _GROUPS)
    groups: list[list[int]] = []
    room = 0
    for n, size in sizes.items():
        if size > room:
            groups.append([])
            room = most
        groups[-1].append(n)
        room -= size
    return groups


def is_by_row(array: jax.Array, sharding: LeafSharding | None) -> bool:
    """Whether each device stores its part of an array row by row, on any platform.

    TPUs store rows in tiles of 128, and transpose an array where that pads less. A loop
    over such an array in device memory would transpose it back, and do so in the host's
    memory as well: 2.8 trees instead of 1.0.
    """
    shape = sharding.shadow.shard_shape(array.shape) if sharding else array.shape
    return len(shape) < 2 or shape[-1] % 128 == 0
