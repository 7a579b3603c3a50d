"""Places that users choose for shadows: over a mesh axis, or in the host's memory."""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ema_optax._messages import arguments
from ema_optax._messages.text import brief
from ema_optax._placement.leaf_placement import is_explicit, not_a_sharding

__all__ = ["in_host_memory", "over_axis"]

# From the path of a param, such as "encoder/kernel", and its shape, dtype and sharding.
ShardingRule: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], Sharding | None]


def over_axis(axis: str) -> ShardingRule:
    """Shards each shadow over a mesh axis over which its param is replicated.

    With the axis of data parallelism each device holds and folds 1/N of the shadow
    (ZeRO stage 1), without any communication: every device has the new params. Reading
    the shadow gathers it.

    A shadow is split along its longest dimension that the axis divides. A shadow
    without such a dimension, or whose param is sharded over the axis already, is
    sharded as its param.

    Args:
        axis: Name of an axis of the params' mesh.

    Returns:
        For `ema_params(..., shadow_sharding=over_axis("data"))`.

    Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1, for the optimizer.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> replicated = NamedSharding(mesh, PartitionSpec())
    >>> param = jax.ShapeDtypeStruct((4, 6), "float32", sharding=replicated)
    >>> tuple(over_axis("data")("kernel", param).spec)
    (None, 'data')
    """
    arguments.a_name(axis, "axis", "data")

    def rule(path: str, param: jax.ShapeDtypeStruct) -> Sharding:
        sharding = param.sharding
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"over_axis({axis!r}) needs params on a mesh; '{path}' is on "
                f"{sharding}. Place them with "
                "jax.device_put(params, NamedSharding(mesh, spec))."
            )
        mesh = sharding.mesh
        if axis not in mesh.axis_names:
            raise ValueError(
                f"The mesh of the params has the axes {mesh.axis_names}, and over_axis "
                f"got {axis!r}."
            )
        spec = [*sharding.spec, *[None] * (len(param.shape) - len(sharding.spec))]
        splits = [
            (length // mesh.shape[axis], -i)
            for i, (length, part) in enumerate(zip(param.shape, spec, strict=True))
            if part is None and length and length % mesh.shape[axis] == 0
        ]
        if axis in jax.tree.leaves(spec) or not splits:
            return sharding
        spec[-max(splits)[1]] = axis
        while spec[-1] is None and not is_explicit(sharding):
            spec.pop()  # XLA drops them too; two spellings would compile a step twice
        kind = sharding.memory_kind
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)

    return rule


def in_host_memory(place: ShardingRule | Sharding | None = None) -> ShardingRule:
    """Keeps each shadow in the host's memory, so that it takes none of the device's.

    A fold fetches it and puts it back inside jit, some leaves at a time: 32 MiB or a
    16th of what is on each device, or one larger leaf. With `every=k` the other updates
    move nothing, on the device as in the host's memory. On CPUs, JAX before 0.10.2
    compiles for no such memory: there `init` warns, and the shadow is on the device.

    On one device JAX pairs donated buffers with results by shape alone, whatever
    memory they lie in, and XLA aborts where host meets device. There donate params and
    state together, and return them first, in the order in which they come.

    Args:
        place: The sharding over devices, or a function of path and param that returns
            it, such as `over_axis("data")`: each device's part then lies in its host.
            None takes the sharding of the param.

    Returns:
        For `ema_params(..., shadow_sharding=in_host_memory(), every=16)`.

    Raises:
        TypeError: If `place` is none of these.

    >>> place = in_host_memory()
    >>> device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> param = jax.ShapeDtypeStruct((2,), "float32", sharding=device)
    >>> place("bias", param).memory_kind
    'pinned_host'
    """
    if not (place is None or isinstance(place, Sharding) or callable(place)):
        raise TypeError(
            f"in_host_memory takes a sharding over devices, or a function of path and "
            f"param such as over_axis('data'); got {brief(place)}."
        )

    def pinned(path: str, param: jax.ShapeDtypeStruct) -> Sharding | None:
        chosen = place(path, param) if callable(place) else place
        sharding = param.sharding if chosen is None else chosen
        if not isinstance(sharding, Sharding | None):
            raise not_a_sharding("in_host_memory(place) gave", chosen)
        return sharding and sharding.with_memory_kind("pinned_host")

    return pinned
