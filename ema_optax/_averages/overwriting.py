"""The updates of `overwrite_every`, which make the params the shadow."""

from typing import Any

import jax
import jax.numpy as jnp

from ema_optax._placement import leaf_placement
from ema_optax._trees import trees


def updates_to_shadow(
    updates: Any,
    params: Any,
    shadow: Any,
    due: jax.Array,
    shardings: leaf_placement.LeafShardings | None,
) -> Any:
    """Replaces updates, where due, by those that make the params the shadow."""
    leaves, structure = jax.tree.flatten(shadow, is_leaf=trees.is_placeholder)
    old = structure.flatten_up_to(params)
    deltas = structure.flatten_up_to(updates)
    placed = shardings or (None,) * len(leaves)
    apart: list[int] = []
    for i, leaf in enumerate(leaves):
        if trees.is_placeholder(leaf):
            continue
        if placed[i] is not None:
            apart.append(i)
            deltas[i] = _widened(deltas[i], old[i])
            continue
        deltas[i] = _widened(deltas[i], old[i])
        jump = _difference_to(leaf, old[i]).astype(deltas[i].dtype)
        deltas[i] = jnp.where(due, jump, deltas[i])

    def jumps(
        shadows: list[Any], params: list[Any], deltas: list[Any]
    ) -> list[jax.Array]:
        gathered = map(leaf_placement.gather, shadows, [placed[i] for i in apart])
        return [
            _difference_to(*pair).astype(delta.dtype)
            for *pair, delta in zip(gathered, params, deltas, strict=True)
        ]

    if apart:  # one conditional for all leaves fetches them only where due
        operands = [[tree[i] for i in apart] for tree in (leaves, old, deltas)]
        chosen = jax.lax.cond(due, jumps, lambda *x: x[2], *operands)
        for i, delta in zip(apart, chosen, strict=True):
            deltas[i] = delta
    return jax.tree.unflatten(structure, deltas)


def _widened(delta: object, param: object) -> jax.Array:
    """Widens an update to the dtype of its param, to move that by its last bit."""
    delta, wanted = jnp.asarray(delta), jnp.result_type(param)
    is_narrower = (
        jnp.issubdtype(wanted, jnp.complexfloating)
        and not jnp.issubdtype(delta.dtype, jnp.complexfloating)
    ) or jnp.finfo(delta.dtype).bits < jnp.finfo(wanted).bits
    return delta.astype(wanted) if is_narrower else delta


def _difference_to(shadow: jax.Array, param: object) -> jax.Array:
    """Returns the update d after which p + d is the shadow in the param's dtype."""
    param = jnp.asarray(param)
    target = shadow.astype(param.dtype)
    wide = trees.wide(param.dtype)
    return target.astype(wide) - param.astype(wide)
