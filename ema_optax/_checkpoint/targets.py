"""Chooses for each leaf its devices, type and dtype, and places it there."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from orbax.checkpoint.metadata import ShardingMetadata

from ema_optax._checkpoint.checksums import bounds_of, whole
from ema_optax._checkpoint.entries import LeafEntry
from ema_optax._checkpoint.pieces import Bounds
from ema_optax._placement import leaf_placement

Parts: TypeAlias = Mapping[Bounds, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a leaf goes, and as what.

    Attributes:
        sharding: Its sharding; None for NumPy arrays, Python numbers, and arrays that
            are bound to no device: they lie on the default one, and can be used with
            arrays on any others.
        dtype: The dtype that it is cast to; None keeps the stored one.
        make: Makes the leaf from a whole array on the host, where it has no sharding or
            holds keys. Copies for NumPy: another slot may take the same array.
        is_key: Whether it holds PRNG keys.
    """

    sharding: Sharding | None = None
    dtype: np.dtype | None = None
    make: Callable[[Any], Any] = np.array
    is_key: bool = False

    def parts(self, shape: Sequence[int]) -> list[Bounds]:
        """Returns the parts of a leaf that this process needs, each once.

        Raises:
            ValueError: If the sharding does not fit the shape, or has no devices.
        """
        if self.sharding is None:
            return [whole(shape)]
        if leaf_placement.is_abstract(self.sharding):
            raise ValueError(
                f"{self.sharding} has no devices. Pass concrete params, whose mesh it "
                "is then taken to be, or call inside jax.set_mesh(mesh)."
            )
        if isinstance(self.sharding, NamedSharding):  # others split no dimension
            self.sharding.check_compatible_aval(tuple(shape))
        indices = self.sharding.addressable_devices_indices_map(tuple(shape))
        if self.is_key:
            return [whole(shape)]
        return list(
            dict.fromkeys(bounds_of(index or (), shape) for index in indices.values())
        )

    def cast(self, parts: Parts) -> Parts:
        """Returns the parts in the dtype of the target."""
        if self.dtype is None:
            return parts
        with np.errstate(over="ignore"):  # as JAX casts: to infinity
            return {
                at: part.astype(self.dtype, copy=False) for at, part in parts.items()
            }


def place_all(
    leaves: Iterable[tuple[Target, Parts, tuple[int, ...]]],
) -> list[Any]:
    """Places leaves at their targets.

    All leaves that go to one device each go with one call: with a call for each, 1,000
    small leaves take twice as long.

    Args:
        leaves: For each its target, at least the parts on the host that
            `Target.parts` names, and the shape of the whole.
    """
    placed: list[Any] = []
    moved: dict[int, tuple[np.ndarray, Sharding]] = {}
    unbound: dict[int, np.ndarray] = {}
    for i, (target, parts, shape) in enumerate(leaves):
        parts, sharding = target.cast(parts), target.sharding
        if target.make is jnp.asarray and sharding is None:
            unbound[i] = parts[whole(shape)]
            placed.append(None)
        elif sharding is None or target.is_key:  # the data of keys have other bounds
            placed.append(
                target.make(parts.get(whole(shape), next(iter(parts.values()))))
            )
        elif len(sharding.device_set) == 1:
            moved[i] = parts[whole(shape)], sharding
            placed.append(None)
        else:
            placed.append(
                jax.make_array_from_callback(
                    shape,
                    sharding,
                    lambda index, parts=parts, shape=shape: parts[
                        bounds_of(index or (), shape)
                    ],
                )
            )
    arrays, shardings = zip(*moved.values(), strict=True) if moved else ((), ())
    bound = jax.device_put(list(arrays), list(shardings))
    free = jax.device_put(list(unbound.values()))
    for i, array in zip([*moved, *unbound], [*bound, *free], strict=True):
        placed[i] = array
    return placed


def target_of(leaf: Any, entry: LeafEntry, meshes: Sequence[Mesh] = ()) -> Target:
    """Returns the target that a leaf of a model asks for, concrete or abstract.

    Args:
        leaf: Of the model.
        entry: What is on disk.
        meshes: For shardings on an abstract mesh, as `jax.eval_shape` gives them: the
            meshes that it may stand for.
    """
    if isinstance(leaf, (bool, int, float, complex)):
        return Target(make=type(leaf))
    if entry.is_key:
        return _of_keys(entry, _sharding(leaf, meshes))
    dtype = np.dtype(leaf.dtype)
    is_cut = jax.dtypes.canonicalize_dtype(dtype) != dtype  # of 64 bits, without x64
    if is_cut or isinstance(leaf, (np.ndarray, np.generic)):
        return Target(dtype=dtype)
    return Target(_sharding(leaf, meshes), dtype, jnp.asarray)


def default_target(entry: LeafEntry) -> Target:
    """Returns the target of a leaf without a slot: the default device, or NumPy.

    Saved numbers and NumPy arrays become NumPy arrays, and so do dtypes that JAX cannot
    hold, of 64 bits without x64.
    """
    if entry.is_key:
        return _of_keys(entry, None)
    dtype = np.dtype(jnp.dtype(entry.dtype))
    fits = jax.dtypes.canonicalize_dtype(dtype) == dtype
    return Target(make=jnp.asarray if entry.kind == "jax" and fits else np.array)


def _of_keys(entry: LeafEntry, sharding: Sharding | None) -> Target:
    def make(data: np.ndarray) -> jax.Array:
        keys = jax.random.wrap_key_data(jnp.asarray(data), impl=entry.key)
        return keys if sharding is None else jax.device_put(keys, sharding)

    return Target(sharding, make=make, is_key=True)


def _sharding(leaf: Any, meshes: Sequence[Mesh]) -> Sharding | None:
    """Returns the sharding of a leaf; None if it is bound to no device.

    One is the count of a state beside params on a mesh: bound to a device, it could not
    be used with them.
    """
    if not leaf_placement.is_bound(leaf):
        return None
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, ShardingMetadata):
        sharding = sharding.to_jax_sharding()  # of a manager's item_metadata
    if leaf_placement.is_abstract(sharding) and sharding.mesh.empty:
        return None  # the array was made without a mesh
    return leaf_placement.on_mesh(sharding, meshes)
