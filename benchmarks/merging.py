"""Merging beside reading: 20 checkpoints of 100 MB, one pass, bytes and seconds.

    python benchmarks/merging.py [rounds]

The same steps are read and verified by `checkpoint.verify` and merged by the parts of
`ema-optax merge`, in turn, in one process; the medians' ratios are of wall time and of
this process's CPU time. Bytes are those that Linux counts for `read` calls (rchar).
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax import checkpoint, reconstruction

STEPS, LEAVES, SIDE = 20, 25, 1000  # 25 leaves of 1,000 × 1,000 float32: 100 MB


def counted(work):
    """Returns wall seconds, CPU seconds and bytes read of some work."""
    start, cpu, read = time.perf_counter(), time.process_time(), bytes_read()
    work()
    return (
        time.perf_counter() - start,
        time.process_time() - cpu,
        bytes_read() - read,
    )


def bytes_read():
    """Returns the bytes that this process has asked `read` calls for."""
    text = pathlib.Path("/proc/self/io").read_text()
    return int(text.partition("rchar: ")[2].split()[0])


def write(folder):
    """Writes the run; each step of one model with other values."""
    for step in range(1, STEPS + 1):
        rng = np.random.default_rng(step)
        params = {
            f"layer_{i:02}": jnp.asarray(rng.standard_normal((SIDE, SIDE), np.float32))
            for i in range(LEAVES)
        }
        checkpoint.save_average(folder, params, step=step)


def forget(folder):
    """Lets Linux drop the files from its page cache, as it has those of old steps."""
    os.sync()
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verify(folder):
    """Reads all steps and compares them with their checksums."""
    for step in range(1, STEPS + 1):
        checkpoint.verify(folder, step=step)


def merge(folder):
    """Merges all steps."""
    sources = [
        checkpoint.stored(folder, "params", step=step) for step in range(1, STEPS + 1)
    ]
    merged = reconstruction.merge(sources, "1-sqrt")
    jax.block_until_ready(merged)


def main():
    """Prints two tables in Markdown."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    size = STEPS * LEAVES * SIDE * SIDE * 4
    print(
        f"jax {jax.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{STEPS} steps, {size / 1e9:.2f} GB in all, medians of {rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        verify(folder)  # warm: imports, threads
        merge(folder)
        for title, before in (
            ("from the disk", forget),
            ("cached", lambda folder: None),
        ):
            print(f"\n## {title}\n")
            show(taken(folder, before, rounds), size)


def taken(folder, before, rounds):
    """Returns the medians of wall, CPU and bytes of each work, by its name."""
    works = {"verify": verify, "merge": merge}
    rows = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            before(folder)
            rows[name].append(counted(lambda work=work: work(folder)))
    return {
        name: [statistics.median(column) for column in zip(*each, strict=True)]
        for name, each in rows.items()
    }


def show(median, size):
    """Prints a table of them, and their ratio."""
    print("| | wall | CPU | bytes read / bytes there |")
    print("|---|---|---|---|")
    for name, (wall, cpu, read) in median.items():
        print(f"| {name} | {wall:.2f} s | {cpu:.2f} s | {read / size:.3f} |")
    ratio = [a / b for a, b in zip(median["merge"], median["verify"], strict=True)]
    print(f"| merge / verify | {ratio[0]:.2f} | {ratio[1]:.2f} | {ratio[2]:.3f} |")


if __name__ == "__main__":
    main()
