"""Short training runs that tests share: given updates folded under jit and scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def drifting(steps, size, seed=0, noise=0.3):
    """Returns float32[steps+1, size]: params that drift from 0.5 to 1.5 with noise."""
    rng = np.random.default_rng(seed)
    mean = np.linspace(0.5, 1.5, steps + 1)[:, None]
    return (mean + noise * rng.standard_normal((steps + 1, size))).astype(np.float32)


def follow(transform, path):
    """Drives params along a path; returns the last state and the params held.

    The path holds where to go; what float32 (or narrower) addition makes of it is
    returned, so that a reference can average exactly what the model held.
    """

    def step(carry, target):
        params, state = carry
        updates = {"w": (target - params["w"]).astype(params["w"].dtype)}
        updates, state = transform.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        # Widened here: XLA's CPU rewrites a whole bfloat16 buffer to set one row of it.
        return (params, state), params["w"].astype(jnp.float32)

    params = {"w": jnp.asarray(path[0])}
    carry = (params, transform.init(params))
    (_, state), held = jax.jit(lambda c, p: jax.lax.scan(step, c, p))(carry, path[1:])
    return state, np.asarray(held)
