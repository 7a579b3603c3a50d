"""Where a shadow lives: on which devices, and in which of their memories."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ema_optax import trees

__all__ = ["in_host_memory", "over_axis"]

# From the path of a param, such as "encoder/kernel", and its shape, dtype and sharding.
Place: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], Sharding | None]


class Home(NamedTuple):
    """Where one leaf of a shadow lives, and its param; hashable."""

    shadow: Sharding
    param: Sharding


Homes: TypeAlias = tuple[Home | None, ...]  # one for each leaf, placeholders included


def over_axis(axis: str) -> Place:
    """Shards each shadow over a mesh axis over which its param is replicated.

    With the axis of data parallelism each device holds and folds 1/N of the shadow
    (ZeRO stage 1), without any communication: every device has the new params. It is
    gathered when it is read.

    A shadow is split along its longest dimension that the axis divides; one that has
    none, or whose param is sharded over the axis already, is placed like its param.

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

    def place(path: str, param: jax.ShapeDtypeStruct) -> Sharding:
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
        used = {name for part in spec for name in _names(part)}
        splits = [
            (length // mesh.shape[axis], -i)
            for i, (length, part) in enumerate(zip(param.shape, spec, strict=True))
            if part is None and length and length % mesh.shape[axis] == 0
        ]
        if axis in used or not splits:
            return sharding
        spec[-max(splits)[1]] = axis
        while spec[-1] is None and not _is_explicit(sharding):
            spec.pop()  # as XLA writes it, or a step would compile twice
        kind = sharding.memory_kind
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=kind)

    return place


def in_host_memory(place: Place | None = None) -> Place:
    """Keeps each shadow in the host's memory, so that it takes none of the device's.

    A fold fetches it leaf by leaf and puts it back, inside jit; with `every=k` the
    other updates move nothing.

    On one device JAX pairs donated buffers with results by shape alone, whatever
    memory they lie in, and XLA aborts where host meets device. There donate params and
    state together, and return them first, in the order in which they come.

    Args:
        place: Where it would live otherwise, such as `over_axis("data")`: each device's
            part then lies in its host. None is where its param lives.

    Returns:
        For `ema_params(..., shadow_sharding=in_host_memory(), every=16)`.

    >>> place = in_host_memory()
    >>> device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> param = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=device)
    >>> place("bias", param).memory_kind
    'pinned_host'
    """

    def pinned(path: str, param: jax.ShapeDtypeStruct) -> Sharding | None:
        sharding = (place(path, param) if place else None) or param.sharding
        return sharding and sharding.with_memory_kind("pinned_host")

    return pinned


def find_homes(params: Any, shadow_sharding: Any, params_sharding: Any) -> Homes | None:
    """Returns where the leaves of a shadow and their params live.

    Args:
        params: Those to be averaged, with placeholders for the others.
        shadow_sharding: A sharding, a `Place`, or a tree of them like the params or a
            prefix of it, with None where a shadow follows its param. None is so for
            all.
        params_sharding: A sharding, or a tree of them like the params or a prefix of
            it. None is what the params show.

    Raises:
        ValueError: If the trees do not fit, or the sharding of a param is not known.
        TypeError: If what is given is no sharding.
    """
    if shadow_sharding is None:
        return None
    paths, leaves, _ = trees.flatten(params)
    wanted_by_leaf = _for_each(params, shadow_sharding, "shadow_sharding")
    known_by_leaf = _for_each(params, params_sharding, "params_sharding")
    for known in known_by_leaf:
        if not isinstance(known, Sharding | None):
            raise _no_sharding(f"params_sharding holds {known!r}")
    homes: list[Home | None] = []
    for leaf, path, wanted, known in zip(
        leaves, paths, wanted_by_leaf, known_by_leaf, strict=True
    ):
        if trees.is_placeholder(leaf) or wanted is None:
            homes.append(None)
            continue
        param = known or _sharding_of(leaf)
        if param is None:
            raise ValueError(
                f"The sharding of the param '{path}' is not known here: under jit only "
                "meshes with Explicit axes show it. Call optimizer.init(params) "
                "outside of jit, or pass ema_params(..., params_sharding=…), a "
                "sharding or a tree of them."
            )
        if not isinstance(wanted, Sharding):
            shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
            wanted = wanted(path, jax.ShapeDtypeStruct(shape, dtype, sharding=param))
            if not isinstance(wanted, Sharding | None):
                raise _no_sharding(f"shadow_sharding gave {wanted!r} for '{path}'")
        homes.append(None if wanted is None else Home(wanted, param))
    return tuple(homes)


def whole_on(params: Any, params_sharding: Any) -> list[Hashable | None]:
    """Returns for each leaf what tells on which devices it is whole; None if sharded.

    Args:
        params: With placeholders for those that are not averaged.
        params_sharding: As in `find_homes`. Under `jit`, on a mesh whose axes are not
            Explicit, a leaf of which it says nothing counts as whole.
    """

    def devices(leaf: Any, known: Sharding | None) -> Hashable | None:
        sharding = known or _sharding_of(leaf)
        if sharding is None:
            return ()
        if not sharding.is_fully_replicated:
            return None
        if isinstance(leaf, Tracer):
            return (sharding.memory_kind,)
        return (frozenset(sharding.device_set), sharding.memory_kind)

    known_by_leaf = _for_each(params, params_sharding, "params_sharding")
    leaves = trees.flatten(params)[1]
    return [devices(*pair) for pair in zip(leaves, known_by_leaf, strict=True)]


def settle(shadow: jax.Array, home: Home | None) -> jax.Array:
    """Puts a shadow where it lives."""
    return shadow if home is None else _put(shadow, home.shadow)


def at_work(array: Any, home: Home | None) -> jax.Array:
    """Puts a shadow, or the param it folds, where the fold is computed: on devices."""
    return array if home is None else _put(array, _on_device(home.shadow))


def at_param(array: Any, home: Home | None) -> Any:
    """Puts an array where the param lives.

    What XLA is told of the shadow's sharding would otherwise spread to the params
    themselves, wherever their sharding is left to it.
    """
    return array if home is None else _put(array, home.param)


def brought(shadow: jax.Array, home: Home | None) -> jax.Array:
    """Returns a copy of a shadow where its param lives; gathered, on the device."""
    return at_param(at_work(shadow, home), home)


def _for_each(params: Any, given: Any, name: str) -> list[Any]:
    """Returns what was given for each leaf of the params."""

    def is_one(node: Any) -> bool:
        return node is None or isinstance(node, Sharding) or callable(node)

    count = len(trees.flatten(params)[1])
    if is_one(given):
        return [given] * count
    structure = jax.tree.structure(given, is_leaf=is_one)
    try:
        parts = structure.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{name} does not fit the params: {error} Give one sharding, a function of "
            "path and param, or a tree of these like the params."
        ) from None
    values = jax.tree.leaves(given, is_leaf=is_one)
    for value in values:
        if not is_one(value):
            raise _no_sharding(f"{name} holds {value!r}")
    return [
        value
        for value, part in zip(values, parts, strict=True)
        for _ in trees.flatten(part)[1]
    ]


def _no_sharding(what: str) -> TypeError:
    return TypeError(
        f"{what}, which is no sharding. Write jax.sharding.NamedSharding(mesh, "
        "PartitionSpec('data')), or None to leave it where it is."
    )


def _put(array: Any, sharding: Sharding) -> Any:
    moved = jax.device_put(array, sharding)
    if isinstance(array, Tracer) and not _is_explicit(sharding):
        # Under jit device_put moves between memories, and leaves the sharding to XLA.
        moved = jax.lax.with_sharding_constraint(moved, sharding)
    return moved


def _is_explicit(sharding: Sharding) -> bool:
    if not isinstance(sharding, NamedSharding):
        return False
    return set(sharding.mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def _on_device(sharding: Sharding) -> Sharding:
    return sharding.with_memory_kind("device")


def _sharding_of(leaf: Any) -> Sharding | None:
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        return sharding if _is_explicit(sharding) else None
    return getattr(leaf, "sharding", None)


def _names(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)
