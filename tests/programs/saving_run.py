"""A run that saves as fast as it can until it is killed; see test_checkpoint_faults.

python -m tests.programs.saving_run FOLDER
"""

import itertools
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp

import ema_optax
from ema_optax import checkpoint

KEPT = 2


def manager(folder):
    """Async, and old steps are removed, so that a kill meets every part of a save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT)
    return ocp.CheckpointManager(folder, options=options)


def run(step):
    """Params and optimizer state whose every element tells their step."""
    params = {"w": jnp.full((200, 200), step, jnp.float32), "b": jnp.full(3, -step)}
    state = ema_optax.ema_params(0.9).init(params)
    shadow = {"w": params["w"] + 0.5, "b": params["b"]}
    return params, state._replace(count=jnp.int32(step), shadow=shadow)


def main(folder):
    """Goes on after the newest step; prints each step known to be committed."""
    saves = manager(folder)
    print("ready", flush=True)
    for step in itertools.count((saves.latest_step() or 0) + 1):
        saves.save(step, args=checkpoint.EmaSave(*run(step)))
        print(step - 1, flush=True)  # a save waits for the one before


if __name__ == "__main__":
    main(sys.argv[1])
