"""Times checkpoints of this checkout beside those of another one, turn by turn.

    python benchmarks/beside.py OTHER [--rounds R] [--out FILE]

OTHER is a folder with another version of the package, such as a `git worktree`. Each
version runs in a process of its own, and both take turns, task by task: the figures are
medians of ratios of neighbouring runs, with their quartiles. Params, one shadow and
Adam's two moments; files are in the page cache when they are read.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {  # leaves and their shape
    "48 leaves of .26 MB": (48, (256, 256)),
    "100 leaves of 2 MB": (100, (512, 1024)),
    "1000 leaves of 10 kB": (1000, (2500,)),
}
TASKS = ("save", "blocking part", "restore the shadow", "restore all", "find a bit")


def work():
    """Runs tasks as they come on standard input, and answers with seconds and bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp

    import ema_optax
    from ema_optax import checkpoint

    optimizer = optax.chain(optax.adam(1e-3), ema_optax.ema_params(0.999))

    def read():
        counters = pathlib.Path("/proc/self/io").read_text().split()
        return int(counters[counters.index("rchar:") + 1])

    for line in sys.stdin:
        task, size, folder = json.loads(line)
        count, shape = SIZES[size]
        draw = np.random.default_rng(0).standard_normal
        params = {f"l{i:04d}": jnp.asarray(draw(shape, "f4")) for i in range(count)}
        state = optimizer.init(params)
        like = jax.eval_shape(lambda tree: tree, params)
        blocking = 0.0
        before, start = read(), time.perf_counter()
        if task == "save":
            shutil.rmtree(folder, ignore_errors=True)
            with ocp.CheckpointManager(folder) as manager:
                start = time.perf_counter()
                manager.save(0, args=checkpoint.EmaSave(params, state))
                blocking = time.perf_counter() - start
                manager.wait_until_finished()
                seconds = time.perf_counter() - start
        elif task == "restore the shadow":
            jax.block_until_ready(checkpoint.restore(folder, "shadow", like))
            seconds = time.perf_counter() - start
        elif task == "restore all":
            jax.block_until_ready(checkpoint.resume(folder, params, state))
            seconds = time.perf_counter() - start
        else:  # a flipped bit in the middle of the largest file
            path = max(
                (p for p in pathlib.Path(folder).rglob("*") if p.is_file()),
                key=lambda p: p.stat().st_size,
            )
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 8]))
            start = time.perf_counter()
            try:
                checkpoint.verify(folder)
            except checkpoint.CorruptCheckpointError:
                seconds = time.perf_counter() - start
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(bytes([byte]))
        print(json.dumps([seconds, blocking, read() - before]), flush=True)


def started(root):
    """Starts a process that works with the package in a folder."""
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, __file__, "--work"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tempfile.gettempdir(),
    )


def asked(worker, *task):
    """Has a worker do one task; returns its answer."""
    worker.stdin.write(json.dumps(task) + "\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main():
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", nargs="?", help="a folder with another version")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", help="Markdown file to write as well")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work()
    here = pathlib.Path(__file__).resolve().parent.parent
    workers = [started(here), started(pathlib.Path(args.other).resolve())]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            found = {task: [[], []] for task in TASKS}
            bytes_read = [{}, {}]
            for turn in range(args.rounds + 1):
                for task in ("save", "restore the shadow", "restore all", "find a bit"):
                    order = (0, 1) if turn % 2 else (1, 0)
                    for i in order:
                        folder = str(pathlib.Path(scratch, str(i)))
                        seconds, blocking, read = asked(workers[i], task, size, folder)
                        if turn == 0:
                            continue  # of warm-up
                        found[task][i].append(seconds)
                        bytes_read[i][task] = read
                        if task == "save":
                            found["blocking part"][i].append(blocking)
            for task in TASKS:
                ours, theirs = found[task]
                ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                read = [each.get(task) for each in bytes_read]
                share = f"{read[0] / read[1]:.4f}" if "restore" in task else ""
                rows.append(
                    f"| {size} | {task} | {statistics.median(theirs) * 1e3:.0f} | "
                    f"{statistics.median(ours) * 1e3:.0f} | "
                    f"{middle:.2f} ({low:.2f}–{high:.2f}) | {share} |"
                )
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "orbax-checkpoint", "tensorstore")
    )
    text = "\n".join(
        [
            "# Checkpoints of this version beside those of another",
            "",
            f"{datetime.date.today()}, {os.cpu_count()} cores ({platform.machine()}), "
            f"Python {platform.python_version()}, {versions}; {args.rounds} rounds.",
            "",
            "| | | theirs, ms | ours, ms | time of ours / theirs | bytes read |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )
    print(text)
    if args.out:
        pathlib.Path(args.out).write_text(text + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
