"""Reads checkpoints of a stranger in a process whose memory is bounded.

    python -m tests.programs.untrusted_reader MEBIBYTES FOLDER…

prints, a line for each reader and folder, JSON of what came of it, and at the end how
much memory the process took at its most, beyond what it had after a checkpoint that is
whole: the first folder.
"""

import json
import resource
import sys
import time
import warnings

import jax
import jax.numpy as jnp

import ema_optax
from ema_optax import checkpoint

PARAMS = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(3)}
TRANSFORM = ema_optax.ema_params(ema_optax.power(0.1))


def readers(folder):
    """Yields the name of each reader, and a call of it."""
    state = TRANSFORM.init(PARAMS)
    out = f"{folder}.safetensors"
    yield "describe", lambda: checkpoint.describe(folder)
    yield "restore", lambda: checkpoint.restore(folder, "shadow")
    yield "like", lambda: checkpoint.restore(folder, "shadow", PARAMS)
    yield "unverified", lambda: checkpoint.restore(folder, "params", verify=False)
    yield "resume", lambda: checkpoint.resume(folder, PARAMS, state)
    yield "verify", lambda: checkpoint.verify(folder)
    yield "stored", lambda: _read_all(checkpoint.stored(folder))
    yield "snapshots", lambda: [_read_all(s.tree) for s in checkpoint.snapshots(folder)]
    yield "export", lambda: ema_optax.safetensors.export(folder, out, overwrite=True)


def _read_all(tree):
    return {
        path: tree.read(path, (slice(None),) * len(leaf.shape))
        for path, leaf in tree.leaves.items()
    }


def outcome(call):
    """Returns the error of a call as its type and text, or None, and the seconds."""
    started = time.monotonic()
    try:
        jax.block_until_ready(call())
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return kinds, str(error), time.monotonic() - started
    return None, "", time.monotonic() - started


def main(mebibytes, whole, *folders):
    warnings.simplefilter("ignore")
    for name, call in readers(whole):
        kinds, text, _ = outcome(call)
        assert kinds is None, (name, kinds, text)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = now + int(mebibytes) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for folder in folders:
        for name, call in readers(folder):
            print(json.dumps([folder, name, *outcome(call)]), flush=True)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"grown_mebibytes": (after - before) / 1024}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
