"""Finds where each leaf of a shadow and its param live, and puts arrays there."""

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

from ema_optax._messages.text import brief, structural
from ema_optax._placement import memories, set_mesh
from ema_optax._trees import trees


class LeafSharding(NamedTuple):
    """The shardings of one leaf of a shadow and of its param; hashable."""

    shadow: Sharding
    param: Sharding


# One for each leaf, placeholders included; None where a shadow is sharded as its param.
LeafShardings: TypeAlias = tuple[LeafSharding | None, ...]


def leaf_shardings(
    params: optax.Params, shadow_sharding: object, params_sharding: object
) -> LeafShardings | None:
    """Finds the shardings of each leaf of a shadow and of its param.

    Args:
        params: The params, with placeholders for those that are not averaged.
        shadow_sharding: A sharding, a `ShardingRule`, or a tree of them like the params
            or a prefix of it, with None where a shadow follows its param. None for all
            of them.
        params_sharding: A sharding, or a tree of them like the params or a prefix of
            it. None takes the shardings of the params.

    Returns:
        The shardings by leaf; None where every shadow follows its param.

    Raises:
        ValueError: If the trees do not fit, or the sharding of a param is not known.
        TypeError: If a value is no sharding.
    """
    if shadow_sharding is None:
        return None
    paths, leaves, _ = trees.flatten(params)
    wanted = _for_each(params, shadow_sharding, "shadow_sharding", (Sharding, Callable))
    known = _for_each(params, params_sharding, "params_sharding", Sharding)
    shardings: list[LeafSharding | None] = []
    missing: list[str | None] = []  # kinds of memory
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
                raise not_a_sharding("shadow_sharding gave", shadow, f" for '{path}'")
        if shadow and not memories.is_kept(shadow.memory_kind, _platform(shadow)):
            missing.append(shadow.memory_kind)
            shadow = shadow.with_memory_kind("device")
        shardings.append(shadow and LeafSharding(shadow, param))
    if missing:
        memories.warn_of(missing)
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
        # XLA does not fuse the gather there: 6,001 kernels for 2,000 packed leaves.
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
    """Returns the sharding of a new array, as of `jnp.zeros`: see `default_device`."""
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return SingleDeviceSharding(device)


def is_bound(leaf: Any) -> bool:
    """Whether an array has to stay on its devices; True for what is no array."""
    return not isinstance(leaf, jax.Array) or bool(getattr(leaf, "committed", True))


def put_as_shadow(array: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Moves an array to where the shadow is stored."""
    return array if sharding is None else _put(array, sharding.shadow)


def put_on_device(array: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Moves a shadow or its param to device memory, sharded as the shadow, to fold."""
    if sharding is None:
        return array
    return _put(array, sharding.shadow.with_memory_kind("device"))


def put_as_param(array: Any, sharding: LeafSharding | None) -> jax.Array:
    """Moves an array to where the param is.

    Without it, where XLA chooses the shardings of the params, that of a shadow would
    spread to them.
    """
    return array if sharding is None else _put(array, sharding.param)


def whole_until_fold(array: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Keeps XLA from cutting a new param before the loop that folds a part of it.

    With the parts cut at every update, an update that does not fold took 1.36 of Adam's
    time on two devices of one processor; now 1.01.
    """
    if sharding is None or not cuts_in_loops(_platform(sharding.shadow)):
        return array
    return put_as_param(array, sharding)


def cuts_in_loops(platform: str) -> bool:
    """Whether a loop can cut an array into the devices' parts.

    XLA of JAX before 0.9 aborts where a small loop on CPUs asks which device it is on.
    """
    return platform != "cpu" or jax.__version_info__ >= (0, 9)


def gather(shadow: jax.Array, sharding: LeafSharding | None) -> jax.Array:
    """Copies a shadow to where its param is, from the host by way of the devices."""
    return put_as_param(put_on_device(shadow, sharding), sharding)


def on_mesh(sharding: Any, meshes: Iterable[Mesh]) -> Any:
    """Gives an abstract sharding devices: those of the first mesh that it describes.

    `jax.eval_shape` and a traced `init` know shardings on Explicit axes without their
    devices. A sharding that has devices, or describes none of the meshes, is returned
    as it is.
    """
    if not is_abstract(sharding):
        return sharding
    for mesh in meshes:
        if mesh.abstract_mesh == sharding.mesh:
            kind = sharding.memory_kind
            return NamedSharding(mesh, sharding.spec, memory_kind=kind)
    return sharding


def is_abstract(sharding: object) -> TypeGuard[NamedSharding]:
    """Whether a sharding is on a mesh without devices."""
    return isinstance(sharding, NamedSharding) and isinstance(
        sharding.mesh, AbstractMesh
    )


def is_explicit(sharding: Sharding) -> TypeGuard[NamedSharding]:
    """Whether a sharding is on a mesh whose axes are all Explicit."""
    if not isinstance(sharding, NamedSharding):
        return False
    return set(sharding.mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def meshes_of(tree: object) -> list[Mesh]:
    """Lists the meshes that arrays of a tree are on, and the mesh that is set."""
    leaves = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    named = [each for each in leaves if isinstance(each, NamedSharding)]
    meshes = dict.fromkeys(each.mesh for each in named if isinstance(each.mesh, Mesh))
    return [*meshes, *set_mesh.current()]


def not_a_sharding(source: str, value: object, place: str = "") -> TypeError:
    """Builds the error for a value that is no sharding.

    Args:
        source: What has the value, with its verb: `"params_sharding holds"`.
        value: The value.
        place: Which leaf it is for: `" for 'encoder/kernel'"`.
    """
    text = repr(value) if isinstance(value, PartitionSpec) else brief(value)
    return TypeError(
        f"{source} {text}{place}, which is no sharding. Write "
        "jax.sharding.NamedSharding(mesh, PartitionSpec('data')), or None to leave it "
        "where it is."
    )


def _for_each(
    params: optax.Params, argument: object, name: str, kinds: Any
) -> list[Any]:
    """Spreads an argument over the leaves of the params: a value, or None, for each."""

    def is_value(node: object) -> bool:
        return node is None or isinstance(node, Sharding) or callable(node)

    values, structure = jax.tree.flatten(argument, is_leaf=is_value)
    try:
        parts = structure.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name} does not fit the params: {structural(error)} Give one "
            "sharding, a function of path and param, or a tree of them like the params."
        ) from None
    for value in values:
        if value is not None and not isinstance(value, kinds):
            raise not_a_sharding(f"{name} holds", value)
    return [
        value
        for value, part in zip(values, parts, strict=True)
        for _ in trees.flatten(part)[1]
    ]


def _put(array: jax.Array, sharding: Sharding) -> jax.Array:
    if is_abstract(sharding) and not isinstance(array, Tracer):
        # A traced init knows the mesh without its devices.
        sharding = on_mesh(sharding, meshes_of([array]))
    moved = jax.device_put(array, sharding)
    if not isinstance(array, Tracer):
        return moved
    if not is_explicit(sharding):
        # Under jit device_put moves between memories, and leaves the sharding to XLA.
        return jax.lax.with_sharding_constraint(moved, sharding)
    if not _is_split_as(moved, sharding):  # on Explicit axes, with jax 0.7
        split = NamedSharding(sharding.mesh, sharding.spec)
        return jax.device_put(jax.sharding.reshard(array, split), sharding)
    return moved


def _is_split_as(array: jax.Array, sharding: NamedSharding) -> bool:
    spec, wanted = jax.typeof(array).sharding.spec, sharding.spec
    return tuple(spec) == (*wanted, *[None] * (array.ndim - len(wanted)))


def _platform(sharding: Sharding | None) -> str:
    if sharding is None or is_abstract(sharding):
        return jax.default_backend()
    return next(iter(sharding.device_set)).platform


def _sharding_of(leaf: Any) -> Sharding | None:
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if is_explicit(sharding) else None
    return getattr(leaf, "sharding", None)
