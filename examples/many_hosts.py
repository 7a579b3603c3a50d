"""A run on many hosts: sharded shadow, checkpoints, and another number of processes.

    python examples/many_hosts.py FOLDER --processes 2  # on this machine
    python examples/many_hosts.py FOLDER --processes 1  # goes on with the same run
    srun python examples/many_hosts.py FOLDER           # under SLURM; so on a TPU pod

Each start trains `--steps` further from the newest step in FOLDER, which all hosts must
see, and saves every 50th and the last. The data are made up on the spot: a teacher's
answers with noise. The batch of a step is the same on any number of processes.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ema_optax
from ema_optax import checkpoint, placement

INPUTS, OUTPUTS, BATCH, SAVE_EVERY = 64, 16, 128, 50
OPTIMIZER = optax.chain(
    optax.adam(3e-2),
    ema_optax.ema_params(0.99, shadow_sharding=placement.over_axis("data")),
)
TEACHER = np.random.default_rng(0).normal(size=(INPUTS, OUTPUTS)).astype(np.float32)


def batch(step: int, rows: NamedSharding) -> list[jax.Array]:
    """Returns a batch, of which each process makes the rows that its devices hold."""

    def made(index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        numbers = range(BATCH)[index[0]]
        rngs = [np.random.default_rng((step, number)) for number in numbers]
        x = np.stack([rng.normal(size=INPUTS) for rng in rngs])
        return x, x @ TEACHER + [rng.normal(size=OUTPUTS) for rng in rngs]

    return [
        jax.make_array_from_callback(
            (BATCH, width), rows, lambda index, i=i: made(index)[i].astype(np.float32)
        )
        for i, width in enumerate((INPUTS, OUTPUTS))
    ]


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, x, y):
    """Returns params and state after one update; XLA adds up the gradients of all."""
    grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"] - y) ** 2))(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def train(folder: str, steps: int) -> None:
    """Goes on with the run in a folder, or starts it, on all devices there are."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    zeros = {"w": np.zeros((INPUTS, OUTPUTS), "f4"), "b": np.zeros(OUTPUTS, "f4")}
    params = jax.device_put(zeros, everywhere)
    opt_state = OPTIMIZER.init(params)
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=3
    )
    at = folder if "://" in folder else os.path.abspath(folder)  # gs:// or a disk
    with ocp.CheckpointManager(at, options=options) as manager:
        newest = manager.latest_step() or 0
        if newest:  # every process reads the parts that its devices hold
            params, opt_state = checkpoint.resume(at, params, opt_state, step=newest)
        last = newest + steps
        for step in range(newest + 1, last + 1):
            params, opt_state = train_step(params, opt_state, *batch(step, rows))
            save = checkpoint.EmaSave(params, opt_state)
            manager.save(step, args=save, force=step == last)
        manager.wait_until_finished()
    shadow = ema_optax.shadow_params(opt_state, params)  # gathered: on all processes
    if jax.process_index() == 0:
        held = opt_state[1].shadow["w"].addressable_shards[0].data.size
        off = {
            name: float(np.sqrt(np.mean((np.asarray(tree["w"]) - TEACHER) ** 2)))
            for name, tree in (("params", params), ("shadow", shadow))
        }
        print(
            f"steps {newest + 1} to {last} on {jax.process_count()} "
            f"processes, {jax.device_count()} devices; each holds {held} of the "
            f"shadow's {INPUTS * OUTPUTS} weights"
        )
        print(
            f"off the teacher: params {off['params']:.4f}, shadow {off['shadow']:.4f}"
        )


def start(processes: int, arguments: list[str]) -> int:
    """Starts the processes of a run on this machine; returns the worst exit code."""
    with socket.socket() as held:  # bound, not listening: nobody else is given the port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        command = [sys.executable, __file__, *arguments, "--join", address]
        started = [
            subprocess.Popen([*command, str(processes), str(rank)])
            for rank in range(processes)
        ]
        try:
            while None in [process.poll() for process in started]:
                if any(process.returncode for process in started):
                    time.sleep(5)  # the others find out by themselves, or are ended
                    break
                time.sleep(0.05)
        finally:
            for process in started:
                process.kill()
        return max(abs(process.wait()) for process in started)


def positive(text: str) -> int:
    """Returns a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number from 1, got {text}")
    return int(text)


def place(text: str) -> str:
    """Returns a path or a URL; an empty text would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("needs a path, got an empty text")
    return text


def main() -> None:
    """Reads the arguments; starts processes, or is one of them."""
    parser = argparse.ArgumentParser(description="a run on many hosts")
    parser.add_argument("folder", type=place)
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--processes", type=positive)
    parser.add_argument("--join", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.processes:
        given = [args.folder, "--steps", str(args.steps)]
        sys.exit(start(args.processes, given))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for CPUs alone
    if args.join:
        address, count, rank = args.join
        jax.distributed.initialize(
            address, int(count), int(rank), coordinator_bind_address=address
        )
    else:
        jax.distributed.initialize()  # SLURM and TPU pods say the rest
    train(args.folder, args.steps)


if __name__ == "__main__":
    main()
