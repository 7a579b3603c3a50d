"""The mesh that `jax.set_mesh` has set."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec


def current() -> list[Mesh]:
    """Lists the mesh that is set, or nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return []
    if hasattr(jax.sharding, "get_mesh"):
        mesh = jax.sharding.get_mesh()
        return [] if mesh.empty else [mesh]
    # jax 0.7 has no get_mesh, but the sharding of a compiled result has the mesh.
    number = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(lambda x: x, out_shardings=PartitionSpec()).lower(number)
    return [compiled.compile().output_shardings.mesh]
