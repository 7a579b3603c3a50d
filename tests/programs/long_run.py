"""Ten thousand steps with a manager that saves, and what the process has after each.

    MALLOC_ARENA_MAX=1 python -m tests.programs.long_run FOLDER

prints JSON. The variable is glibc's: without it each of Orbax's threads keeps what it
has freed in a heap of its own, which for tens of saves looks like a leak.
"""

import functools
import gc
import json
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import ema_optax
from ema_optax import checkpoint

STEPS, SAVES = 10_000, 500
SIZE = 2**18  # 1 MiB in float32


def main(folder):
    params = {"w": jnp.zeros(SIZE - 3), "b": jnp.zeros(3)}
    average = ema_optax.ema_params({"fast": 0.99, "slow": ema_optax.power(0.05)})
    optimizer = optax.chain(optax.sgd(1e-2), average)
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, target):
        grads = jax.tree.map(lambda p: p - target, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    fresh = jax.tree.map(jnp.copy, (params, state))
    seen = []
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(folder, options=options) as manager:
        for number in range(1, STEPS + 1):
            params, state = step(params, state, jnp.float32(number % 7))
            if number % SAVES == 0:
                manager.save(number, args=checkpoint.EmaSave(params, state))
                manager.wait_until_finished()  # so that nothing is in flight
                gc.collect()
                seen.append(_held())
        steps = list(manager.all_steps())
    again = checkpoint.resume(folder, *fresh)
    same = jax.tree.map(np.array_equal, again, (params, state))
    told = {
        "steps": steps,
        "compiled": step._cache_size(),
        "count": int(again[1][1].count),
        "same": all(jax.tree.leaves(same)),
        "seen": seen,
    }
    print(json.dumps(told))


def _held():
    """Memory, arrays, threads and open files of this process, on Linux."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "arrays": len(jax.live_arrays()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
