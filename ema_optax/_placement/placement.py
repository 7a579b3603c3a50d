"""Shardings of shadows: over devices other than the params', or in host memory."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from ema_optax._messages import arguments
from ema_optax._messages.text import brief, structural
from ema_optax._placement import memories, set_mesh
from ema_optax._trees import trees

__all__ = ["in_host_memory", "over_axis"]

# From the path of a param, such as "encoder/kernel", and its shape, dtype and sharding.
ShardingRule: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], Sharding | None]


class LeafSharding(NamedTuple):
    """The shardings of one leaf of a shadow and of its param; hashable."""

    shadow: Sharding
    param: Sharding


# One for each leaf, placeholders included; None where a shadow is sharded as its param.
LeafShardings: TypeAlias = tuple[LeafSharding | None, ...]


def over_axis(axis: str) -> ShardingRule:
    """Shards each shadow over a mesh axis over which its param is replicated.

    With the axis of data parallelism each device holds and folds 1/N of the shadow
    (ZeRO stage 1), without any communication: every device has the new params. It is
    gathered when it is read.

    A shadow is split along its longest dimension that the axis divides; one that has
    none, or whose param is sharded over the axis already, is sharded as its param.

    Args:
        axis: Name of an axis of the params' mesh.

    Returns:
        For `ema_params(..., shadow_sharding=over_axis("data"))`.

    Source: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1, for the optimizer.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> replicated = NamedSharding(mesh, PartitionSpec())
    >>> param = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=replicated)
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
        while spec[-1] is None and not _is_explicit(sharding):
            spec.pop()  # as XLA writes it, or a step would compile twice
        kind = sharding.memory_kind
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)

    return rule


def in_host_memory(place: ShardingRule | Sharding | None = None) -> ShardingRule:
    """Keeps each shadow in the host's memory, so that it takes none of the device's.

    A fold fetches it and puts it back inside jit, some leaves at a time: 32 MiB or a
    16th of what is on each device, or one larger leaf. With `every=k` the other updates
    move nothing, on the device as in the host's memory. What JAX before 0.10.2 compiles
    for CPUs knows no such memory: there `init` warns, and the shadow is on the device.

    On one device JAX pairs donated buffers with results by shape alone, whatever
    memory they lie in, and XLA aborts where host meets device. There donate params and
    state together, and return them first, in the order in which they come.

    Args:
        place: The sharding over devices, or a function of path and param that returns
            it, such as `over_axis("data")`: each device's part then lies in its host.
            None is that of the param.

    Returns:
        For `ema_params(..., shadow_sharding=in_host_memory(), every=16)`.

    Raises:
        TypeError: If `place` is none of these.

    >>> place = in_host_memory()
    >>> device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> param = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=device)
    >>> place("bias", param).memory_kind
    'pinned_host'
    """
    if not (place is None or isinstance(place, Sharding) or callable(place)):
        raise TypeError(
            f"in_host_memory takes a sharding over devices, or a function of path and "
            f"param such as over_axis('data'); got {brief(place)}."
        )

    def pinned(path: str, param: jax.ShapeDtypeStruct) -> Sharding | None:
        found = place(path, param) if callable(place) else place
        sharding = param.sharding if found is None else found
        if not isinstance(sharding, Sharding | None):
            raise _no_sharding(f"in_host_memory(place) gave {_shown(found)}")
        return sharding and sharding.with_memory_kind("pinned_host")

    return pinned


def leaf_shardings(
    params: optax.Params, shadow_sharding: object, params_sharding: object
) -> LeafShardings | None:
    """Finds the shardings of each leaf of a shadow and of its param.

    Args:
        params: Those to be averaged, with placeholders for the others.
        shadow_sharding: A sharding, a `ShardingRule`, or a tree of them like the params
            or a prefix of it, with None where a shadow follows its param. None is so
            for all.
        params_sharding: A sharding, or a tree of them like the params or a prefix of
            it. None is what the params show.

    Returns:
        None where every shadow follows its param.

    Raises:
        ValueError: If the trees do not fit, or the sharding of a param is not known.
        TypeError: If what is given is no sharding.
    """
    if shadow_sharding is None:
        return None
    paths, leaves, _ = trees.flatten(params)
    wanted = _for_each(params, shadow_sharding, "shadow_sharding", (Sharding, Callable))
    known = _for_each(params, params_sharding, "params_sharding", Sharding)
    shardings: list[LeafSharding | None] = []
    lost: list[str | None] = []
    for leaf, path, shadow, param in zip(leaves, paths, wanted, known, strict=True):
        if trees.is_placeholder(leaf) or shadow is None:
            shardings.append(None)
            continue
        param = param or _sharding_of(leaf)
        if param is None:
            raise ValueError(
                f"The sharding of the param '{path}' is not known here: under jit only "
                "meshes with Explicit axes show it. Call optimizer.init(params) "
                "outside of jit, or pass ema_params(..., params_sharding=…), a "
                "sharding or a tree of them."
            )
        if not isinstance(shadow, Sharding):
            shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
            shadow = shadow(path, jax.ShapeDtypeStruct(shape, dtype, sharding=param))
            if not isinstance(shadow, Sharding | None):
                raise _no_sharding(
                    f"shadow_sharding gave {_shown(shadow)} for '{path}'"
                )
        if shadow and not memories.is_kept(shadow.memory_kind, _platform(shadow)):
            lost.append(shadow.memory_kind)
            shadow = shadow.with_memory_kind("device")
        shardings.append(shadow and LeafSharding(shadow, param))
    if lost:
        memories.warn_of(lost)
    return tuple(shardings)


def replicated_on(
    params: optax.Params, params_sharding: object
) -> list[Hashable | None]:
    """Finds the devices and the memory on which each leaf is replicated.

    Args:
        params: With placeholders for those that are not averaged.
        params_sharding: As in `leaf_shardings`. Under `jit`, on a mesh whose axes are
            not Explicit, a leaf of which it says nothing counts as replicated.

    Returns:
        For each leaf a value that is equal where devices and memory are; None if the
        leaf is sharded, or on a TPU.
    """

    def devices(leaf: Any, known: Sharding | None) -> Hashable | None:
        sharding = known or _sharding_of(leaf)
        if _platform(sharding) == "tpu":
            return None
        if sharding is None:
            return ()
        if not sharding.is_fully_replicated:
            return None
        if isinstance(leaf, Tracer):
            return (sharding.memory_kind,)
        return (frozenset(sharding.device_set), sharding.memory_kind)

    known = _for_each(params, params_sharding, "params_sharding", Sharding)
    leaves = trees.flatten(params)[1]
    return [devices(*pair) for pair in zip(leaves, known, strict=True)]


def default_sharding() -> Sharding:
    """Returns where `jnp.zeros` puts an array here: see `jax.default_device`."""
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return SingleDeviceSharding(device)


def is_bound(leaf: Any) -> bool:
    """Returns whether an array has to stay on its devices, if it is one."""
    return not isinstance(leaf, jax.Array) or bool(getattr(leaf, "committed", True))


def put_as_shadow(array: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Puts an array where the shadow is stored."""
    return array if sharding is None else _put(array, sharding.shadow)


def put_on_device(array: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Puts a shadow or its param in device memory, sharded as the shadow, to fold."""
    if sharding is None:
        return array
    return _put(array, sharding.shadow.with_memory_kind("device"))


def put_as_param(array: Any, sharding: LeafSharding | None) -> jax.Array:
    """Puts an array where the param is.

    The sharding of a shadow would otherwise spread to the params, where XLA chooses
    theirs.
    """
    return array if sharding is None else _put(array, sharding.param)


def whole_until_fold(array: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Keeps XLA from cutting a new param before the loop that folds a part of it.

    With the parts cut at every update, one that does not fold took 1.36 of Adam's time
    on two devices of one processor; now 1.01.
    """
    if sharding is None or not cuts_in_loops(_platform(sharding.shadow)):
        return array
    return put_as_param(array, sharding)


def cuts_in_loops(platform: str) -> bool:
    """Returns whether a loop can cut an array into the devices' parts.

    XLA of JAX before 0.9 aborts where a small loop on CPUs asks which device it is on.
    """
    return platform != "cpu" or jax.__version_info__ >= (0, 9)


def gather(shadow: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Copies a shadow to where its param is, from the host by way of the devices."""
    return put_as_param(put_on_device(shadow, sharding), sharding)


def on_mesh(sharding: Any, meshes: Iterable[Mesh]) -> Any:
    """Returns a sharding on the first of some meshes that its abstract mesh describes.

    What `jax.eval_shape` or a traced `init` knows of arrays on Explicit axes has no
    devices. Others are returned as they are, as one that describes none of the meshes.
    """
    if not is_abstract(sharding):
        return sharding
    for mesh in meshes:
        if mesh.abstract_mesh == sharding.mesh:
            kind = sharding.memory_kind
            return NamedSharding(mesh, sharding.spec, memory_kind=kind)
    return sharding


def is_abstract(sharding: object) -> TypeGuard[NamedSharding]:
    """Returns whether a sharding is on a mesh without devices."""
    return isinstance(sharding, NamedSharding) and isinstance(
        sharding.mesh, AbstractMesh
    )


def meshes_of(tree: object) -> list[Mesh]:
    """Returns the meshes that arrays of a tree are on, and the one that is set."""
    leaves = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    named = [each for each in leaves if isinstance(each, NamedSharding)]
    meshes = dict.fromkeys(each.mesh for each in named if isinstance(each.mesh, Mesh))
    return [*meshes, *set_mesh.current()]


def _for_each(params: optax.Params, given: object, name: str, kinds: Any) -> list[Any]:
    """Lists what was given for each leaf of the params, of one of the kinds or None."""

    def is_one(node: object) -> bool:
        return node is None or isinstance(node, Sharding) or callable(node)

    values, structure = jax.tree.flatten(given, is_leaf=is_one)
    try:
        parts = structure.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name} does not fit the params: {structural(error)} Give one "
            "sharding, a function of path and param, or a tree of them like the params."
        ) from None
    for value in values:
        if value is not None and not isinstance(value, kinds):
            raise _no_sharding(f"{name} holds {_shown(value)}")
    return [
        value
        for value, part in zip(values, parts, strict=True)
        for _ in trees.flatten(part)[1]
    ]


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, PartitionSpec) else brief(value)


def _no_sharding(what: str) -> TypeError:
    return TypeError(
        f"{what}, which is no sharding. Write jax.sharding.NamedSharding(mesh, "
        "PartitionSpec('data')), or None to leave it where it is."
    )


def _put(array: jax.Array, sharding: Sharding) -> jax.Array:
    if is_abstract(sharding) and not isinstance(array, Tracer):
        sharding = on_mesh(sharding, meshes_of([array]))  # as a traced init knew it
    moved = jax.device_put(array, sharding)
    if not isinstance(array, Tracer):
        return moved
    if not _is_explicit(sharding):
        # Under jit device_put moves between memories, and leaves the sharding to XLA.
        return jax.lax.with_sharding_constraint(moved, sharding)
    if not _is_split_as(moved, sharding):  # with jax 0.7 so it is on Explicit axes
        split = NamedSharding(sharding.mesh, sharding.spec)
        return jax.device_put(jax.sharding.reshard(array, split), sharding)
    return moved


def _is_split_as(array: jax.Array, sharding: NamedSharding) -> bool:
    found, wanted = jax.typeof(array).sharding.spec, sharding.spec
    return tuple(found) == (*wanted, *[None] * (array.ndim - len(wanted)))


def _platform(sharding: Sharding | None) -> str:
    if sharding is None or is_abstract(sharding):
        return jax.default_backend()
    return next(iter(sharding.device_set)).platform


def _is_explicit(sharding: Sharding) -> TypeGuard[NamedSharding]:
    if not isinstance(sharding, NamedSharding):
        return False
    return set(sharding.mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def _sharding_of(leaf: Any) -> Sharding | None:
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if _is_explicit(sharding) else None
    return getattr(leaf, "sharding", None)
