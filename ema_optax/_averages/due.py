"""Changes of arrays only where due, without copying them where not."""

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
    """Returns `change(held, operands)` where due, and `held` where not.

    It is a loop of one round or none, which leaves its carry in place. A conditional
    would copy it twice, due or not, as jax 0.10.2 compiles it for an H100: for GPT-2
    small 4 trees of traffic where nothing is due, or two copies inside the host's
    memory.

    Args:
        change: A function that uses nothing traced but its arguments, so that there are
            derivatives.
        due: bool[]. XLA must not know its value, or it unrolls the loop.
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
    """Derives a conditional instead: a loop of unknown length has no reverse mode."""

    def either(due: jax.Array, held: Any, operands: Any) -> Any:
        return jax.lax.cond(due, change, lambda held, _: held, held, operands)

    return where_due(change, *primals), jax.jvp(either, primals, tangents)[1]
