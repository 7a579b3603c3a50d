"""What is done to arrays only where it is due, and leaves them in place elsewhere."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def where_due(
    change: Callable[[Any, Any], Any], due: jax.Array, held: Any, operands: Any
) -> Any:
    """Returns `change(held, operands)` where that is due, and `held` elsewhere.

    A loop of one round or none: it keeps what it carries in place. A conditional copies
    it twice, due or not, compiled for an H100 by jax 0.10.2: for GPT-2 small 4 trees of
    traffic where nothing is due, or two copies inside the host's memory.

    Args:
        change: Uses nothing traced but its arguments, or there were no derivatives.
        due: bool[]. If XLA knew it, it would unroll the loop.
        held: Arrays, which `change` returns in the same shapes, dtypes and memories.
        operands: Other arrays that `change` needs.
    """
    if not isinstance(due, Tracer):
        return change(held, operands) if due else held

    def once(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        due, held = state
        return jnp.zeros_like(due), change(held, operands)

    return jax.lax.while_loop(lambda state: state[0], once, (due, held))[1]


@where_due.defjvp
def _derivative(
    change: Callable[[Any, Any], Any],
    primals: tuple[Any, Any, Any],
    tangents: tuple[Any, Any, Any],
) -> tuple[Any, Any]:
    """That of a conditional: a loop of unknown length has none in reverse mode."""

    def either(due: jax.Array, held: Any, operands: Any) -> Any:
        return jax.lax.cond(due, change, lambda held, _: held, held, operands)

    return where_due(change, *primals), jax.jvp(either, primals, tangents)[1]
