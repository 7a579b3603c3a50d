"""The runs in tests/data/format_1, and how they were written.

    python -m tests.programs.format_1 FOLDER

writes them with the version at hand. The ones that are kept were written by version
0.1.0, and are never written again: they prove that later versions read format 1.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ema_optax
from ema_optax import checkpoint

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "format_1"
EXTRA = {"dataset": "digits", "epoch": 2}


def params():
    """Every kind of leaf; all values are exact in their dtypes."""
    return {
        "dense": {
            "kernel": jnp.asarray([[0.5, -1.25, 3.0], [0.125, 8.0, -0.75]]),
            "bias": jnp.asarray([1.5, -2.0, 0.25], jnp.bfloat16),
        },
        "layers": [jnp.asarray([2.0]), np.asarray([-4.0, 16.0], np.float32)],
        "seen": jnp.int32(1234),
        "key": jax.random.key(7),
        "none": jnp.zeros((0, 3)),
    }


def shadow(offset):
    """What is averaged of the params, in float32."""
    return {
        "dense": {
            "kernel": jnp.asarray([[0.25, -1.0, 2.5], [0.0625, 7.5, -0.5]]) + offset,
            "bias": jnp.asarray([1.25, -1.75, 0.375]) + offset,
        },
        "layers": [jnp.asarray([1.75]) + offset, jnp.asarray([-3.5, 12.0]) + offset],
        "seen": optax.MaskedNode(),
        "key": optax.MaskedNode(),
        "none": jnp.zeros((0, 3)),
    }


def optimizer(step):
    """Step 100 has one shadow, step 200 has two by name."""
    decays = {
        100: ema_optax.warmup(0.999),
        200: {
            "fast": ema_optax.constant(0.9),
            "slow": ema_optax.power(exponent=6.94),
        },
    }
    return optax.chain(
        optax.trace(0.9), ema_optax.ema_params(decays[step], every=step // 100)
    )


def opt_state(step):
    """The optimizer state of a step."""
    trace, ema = optimizer(step).init(params())
    slots, structure = jax.tree.flatten(trace.trace)
    slots = [
        slot
        if jnp.issubdtype(slot.dtype, jax.dtypes.prng_key)
        else jnp.full(slot.shape, 3, slot.dtype)
        for slot in slots
    ]
    trace = trace._replace(trace=jax.tree.unflatten(structure, slots))
    shadows = {"fast": shadow(0.0), "slow": shadow(32.0)}
    ema = ema._replace(
        count=jnp.int32(step), shadow=shadow(0.0) if step == 100 else shadows
    )
    return trace, ema


def main(folder):
    """Writes both steps."""
    for step in (100, 200):
        checkpoint.save(folder, params(), opt_state(step), step=step, extra=EXTRA)
    # Only object stores need this file, and it says where it was written.
    for path in pathlib.Path(folder).rglob("commit_success.txt"):
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
