"""Averages chosen after training: what comes out, how fast, and in how much memory.

    python benchmarks/reconstruction.py [--quick] [--rounds R] [--out FILE]

Needs `pip install torch ema-pytorch==0.8.3` for the peer; without it the peer's rows
are left out, and the table says so.

First the width that was asked for. A run of 19,200 updates holds (t/T, (t/T)²) as its
params: the average of the first is 1 − mean age, and with the second gives the width,
whoever averages. Both libraries fold every k updates, save 64 times, and are asked for
a width that was tracked and for one that was not.

Then a sweep of widths over snapshots of one large model, beside reading the same
snapshots one by one; files are in the page cache. Memory is the peak of the process
above what it held before, in units of the model.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import logging
import os
import pathlib
import platform
import statistics
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import ema_optax
from ema_optax import checkpoint, reconstruction

TRACKED = (0.05, 0.10)
STEPS, SAVES = 19_200, 64  # of 300 updates each
EVERY = (1, 10, 100)
ASKED = (0.05, 0.07, 0.15)
LEAF = (1024, 1024)


def moments(averages):
    """Returns mean age and width, both over the run, from averages of (τ, τ²)."""
    first, second = (float(x) for x in averages)
    return 1 - first, max(second - first**2, 0.0) ** 0.5


def ours(every, folder):
    """Returns mean age and width of each average asked for, from our snapshots."""
    names = {f"w{i}": ema_optax.power(width) for i, width in enumerate(TRACKED)}
    transform = ema_optax.ema_params(names, every=every)

    @jax.jit
    def run(params, state, steps):
        def step(carry, t):
            params, state = carry
            target = jnp.stack([t / STEPS, (t / STEPS) ** 2])
            updates, state = transform.update(target - params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), steps)[0]

    params = jnp.zeros(2)
    state = transform.init(params)
    marks = range(0, STEPS + 1, STEPS // SAVES)
    with ocp.CheckpointManager(folder) as manager:
        for before, after in itertools.pairwise(marks):
            steps = jnp.arange(before + 1, after + 1, dtype=jnp.float32)
            params, state = run(params, state, steps)
            manager.save(after, args=checkpoint.SnapshotSave(state))
        manager.wait_until_finished()
    found = reconstruction.reconstruct(checkpoint.snapshots(folder), width=ASKED)
    return [moments(jax.tree.leaves(r.tree)[0]) for r in found]


def ema_pytorch(every, folder):
    """Returns the same from ema-pytorch's post-hoc EMA."""
    import torch
    from ema_pytorch import PostHocEMA

    model = torch.nn.Linear(2, 1, bias=False).double()
    average = PostHocEMA(
        model,
        sigma_rels=TRACKED,
        update_every=every,
        checkpoint_every_num_steps=STEPS // SAVES,
        checkpoint_folder=folder,
        checkpoint_dtype=torch.float64,
    )
    for t in range(1, STEPS + 1):
        tau = t / STEPS
        model.weight.data = torch.tensor([[tau, tau**2]], dtype=torch.float64)
        average.update()
    found = []
    for width in ASKED:
        made = average.synthesize_ema_model(sigma_rel=width)
        found.append(moments(made.ema_model.weight.data[0]))
    return found


def expected():
    """Returns mean age and width that were asked for."""
    exponents = [ema_optax.exponent_from_width(width) for width in ASKED]
    return [(1 / (g + 2), width) for g, width in zip(exponents, ASKED, strict=True)]


def widths_table():
    """Returns the rows of the first table."""
    peers = {"ema_optax": ours}
    with contextlib.suppress(ImportError):
        import ema_pytorch as module  # noqa: F401

        peers["ema-pytorch"] = ema_pytorch
    wanted = " | ".join(f"{age:.1%}, {width:.3f}" for age, width in expected())
    rows = [f"| asked for | | {wanted} |"]
    for name, run in peers.items():
        for every in EVERY:
            with tempfile.TemporaryDirectory() as folder:
                found = run(every, folder)
            cells = " | ".join(f"{age:.1%}, {width:.3f}" for age, width in found)
            rows.append(f"| {name} | {every} | {cells} |")
    return rows


class Memory:
    """The peak of this process' resident memory while a block runs, above the start."""

    def __enter__(self):
        gc.collect()
        self._stop = threading.Event()
        self._start = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self.peak -= self._start

    def _watch(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._now())

    def _now(self):
        status = pathlib.Path("/proc/self/status").read_text()
        line = next(x for x in status.splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def write_snapshots(folder, leaves, steps, dtype):
    """Writes snapshots of random shadows, two to a step."""
    draw = np.random.default_rng(0).standard_normal
    shadow = {f"leaf{i}": jnp.asarray(draw(LEAF, "float32")) for i in range(leaves)}
    decays = {f"w{i}": ema_optax.power(width) for i, width in enumerate(TRACKED)}
    state = ema_optax.ema_params(decays).init(shadow)
    with ocp.CheckpointManager(folder) as manager:
        for step in range(1, steps + 1):
            counted = state._replace(count=jnp.int32(step * 100))
            args = checkpoint.SnapshotSave(counted, dtype=dtype)
            manager.save(step * 100, args=args)
        manager.wait_until_finished()
    return jax.eval_shape(lambda: shadow)


def read_all(folder, like, *, verify):
    """Reads every snapshot, one by one, and keeps none."""
    for step in sorted(int(path.name) for path in pathlib.Path(folder).iterdir()):
        for i in range(len(TRACKED)):
            tree = f"shadow/w{i}"
            found = checkpoint.restore(folder, tree, like, step=step, verify=verify)
            jax.block_until_ready(found)
            del found


def sweep_table(leaves, steps, widths, rounds):
    """Returns the rows of the second table."""
    model = leaves * LEAF[0] * LEAF[1] * 4
    asked = np.geomspace(0.03, 0.2, widths).tolist()
    rows = []
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            like = write_snapshots(folder, leaves, steps, dtype)
            size = sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*"))
            times = {"verified": [], "not verified": [], "sweep": []}
            peak = 0
            for _ in range(rounds):
                for name in ("verified", "not verified"):
                    start = time.perf_counter()
                    read_all(folder, like, verify=name == "verified")
                    times[name].append(time.perf_counter() - start)
                start = time.perf_counter()
                with Memory() as memory:
                    found = reconstruction.reconstruct(
                        checkpoint.snapshots(folder), width=asked, params=like
                    )
                    jax.block_until_ready([r.tree for r in found])
                times["sweep"].append(time.perf_counter() - start)
                peak = max(peak, memory.peak)
                del found
        medians = {name: statistics.median(t) for name, t in times.items()}
        ratio = {name: medians[name] / medians["sweep"] for name in medians}
        rows.append(
            f"| {dtype} | {size / 1e9:.2f} GB "
            f"| {size / medians['sweep'] / 1e9:.2f} GB/s "
            f"| {ratio['verified']:.2f} | {ratio['not verified']:.2f} "
            f"| {peak / model:.1f} (≤ {widths + 2}) |"
        )
    return rows


def report(args):
    """Returns the whole page."""
    leaves, steps, widths = (4, 4, 4) if args.quick else (25, 32, 20)
    packages = ("ema_optax", "jax", "orbax-checkpoint", "numpy", "torch", "ema-pytorch")
    versions = []
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    table = widths_table()
    sweep = sweep_table(leaves, steps, widths, args.rounds)
    missing = "" if len(table) > 4 else "\nema-pytorch was not installed.\n"
    asked = " | ".join(f"width {width:g}" for width in ASKED)
    return "\n".join(
        [
            "# Averages chosen after training",
            "",
            f"{datetime.date.today()}, {os.cpu_count()} cores, "
            f"{jax.default_backend()} ({platform.machine()}), "
            f"Python {platform.python_version()}, {', '.join(versions)}. Others may "
            "use the machine: times are medians.",
            "",
            "## The width that was asked for",
            "",
            f"Mean age over the run and width, after {STEPS:,} updates, {SAVES} saves "
            f"of {' and '.join(map(str, TRACKED))}. .05 was tracked, the others not.",
            missing,
            f"| | every | {asked} |",
            "| --- | --- | --- | --- | --- |",
            *table,
            "",
            f"## {widths} widths from {steps * 2} snapshots of "
            f"{leaves * LEAF[0] * LEAF[1] * 4 / 1e6:.0f} MB",
            "",
            "One pass over the disk for all widths, verified, summed in float64. Its "
            "speed is compared with reading the same snapshots one by one with "
            "`checkpoint.restore` (aim: ≥ .60 of it). Memory is in models of float32.",
            "",
            "| snapshots | on disk | sweep | / read, verified | / read, not verified "
            "| peak memory |",
            "| --- | --- | --- | --- | --- | --- |",
            *sweep,
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    text = report(args)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
