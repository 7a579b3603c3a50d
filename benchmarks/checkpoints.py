"""What a checkpoint of params and shadow costs beside one of plain Orbax.

    python benchmarks/checkpoints.py [--quick] [--rounds R] [--out FILE]

Params, one shadow and Adam's two moments, all random float32, saved and restored by
CheckpointManagers in one process: ours, plain Orbax as it ships, and plain Orbax with
our storage options. The peers hold the same arrays as one tree, and verify nothing.
Files and bytes come first and depend on no machine (but OCDBT's files vary by a few).
Times are medians of ratios of neighbouring runs, with their quartiles; files are in
the page cache when they are read.
"""

import argparse
import collections
import contextlib
import datetime
import logging
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import ema_optax
from ema_optax import checkpoint

OURS, PLAIN, SAME = "ema_optax", "Orbax", "Orbax, same storage"
PEERS = {OURS: None, PLAIN: {}, SAME: {"use_compression": False}}
ZSTD = "OCDBT zstd (Orbax's default)"
DRIVERS = {
    ZSTD: {},
    "OCDBT (ours)": {"use_compression": False},
    "zarr files zstd": {"use_ocdbt": False},
    "zarr files": {"use_ocdbt": False, "use_compression": False},
    "zarr3 files": {"use_ocdbt": False, "use_compression": False, "use_zarr3": True},
}
SAVES = SAVE, BLOCKING = "save", "save, blocking part"
ALL, UNVERIFIED, BOTH = "restore all", "restore all, unverified", "restore both trees"
SHADOW, PARAMS = "restore the shadow", "restore the params"
RESTORES = ALL, UNVERIFIED, BOTH, SHADOW, PARAMS
TARGETS = {SAVE: "≤ 1.10", BLOCKING: "≤ 1.20"}


LAYER = {"w": (1024, 1152), "b": (1152,), "scale": (1024,)}
LARGE = {f"layer{i}/{name}": LAYER[name] for i in range(8) for name in LAYER}
SMALL = {f"leaf{i:04d}": (1000 + 12 * i,) for i in range(250)}  # of 4 to 16 kB
QUICK = {f"leaf{i}": (1000 + 300 * i,) for i in range(10)}


class Trees:
    """The same random arrays as we take them and as plain Orbax does."""

    def __init__(self, shapes, optimizer):
        draw = np.random.default_rng(0).standard_normal
        zeros = {path: jnp.zeros(shape) for path, shape in shapes.items()}
        average = ema_optax.ema_params(0.999)
        self.params, self.state = jax.tree.map(
            lambda x: jnp.asarray(draw(x.shape, "float32")) if x.ndim else x,
            (zeros, (optimizer.init(zeros), average.init(zeros))),
        )
        rest, shadow = self.state[0], self.state[1].shadow
        self.plain = {"params": self.params, "shadow": shadow, "opt_state": rest}
        self.like, self.state_like = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, (self.plain, self.state)
        )
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.plain))
        self.one = sum(leaf.nbytes for leaf in self.params.values())


def restores(trees, ours):
    """Returns what a manager is asked for in each of RESTORES, one after the other."""
    like, run = trees.like, (trees.like["params"], trees.state_like)
    if ours:
        params = [checkpoint.EmaRestore("params", like["params"])]
        shadow = [checkpoint.EmaRestore("shadow", like["params"])]
        unverified = [checkpoint.EmaResume(*run, verify=False)]
        everything = [checkpoint.EmaResume(*run)]
        return everything, unverified, params + shadow, shadow, params

    def some(*names):  # of the one tree that plain Orbax saved
        item = {name: like[name] for name in names}
        how = ocp.checkpoint_utils.construct_restore_args(item)
        return [ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)]

    both, everything = some("params", "shadow"), some(*like)
    return everything, everything, both, some("shadow"), some("params")


def run_round(trees, variants, rows, figures):
    """Saves with every variant, then restores row by row, side by side.

    Args:
        trees: What to save.
        variants: Name → options of Orbax's handler, or None for ours; in turn.
        rows: The restores to time.
        figures: Name → row → list of seconds, bytes or files; appended to.
    """
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        managers = {}
        for name, options in variants.items():
            if options is None:
                handler, args = None, checkpoint.EmaSave(trees.params, trees.state)
            else:
                handler = ocp.PyTreeCheckpointHandler(**options)
                args = ocp.args.PyTreeSave(trees.plain)
            folder = pathlib.Path(root, str(len(managers)))
            manager = ocp.CheckpointManager(folder, item_handlers=handler)
            managers[name] = stack.enter_context(manager)
            start = time.perf_counter()
            manager.save(0, args=args)
            figures[name][BLOCKING].append(time.perf_counter() - start)
            manager.wait_until_finished()
            figures[name][SAVE].append(time.perf_counter() - start)
            sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
            figures[name]["disk"].append(sum(sizes))
            figures[name]["files"].append(len(sizes))
        for i, row in enumerate(rows):
            for name, manager in managers.items():
                asked = restores(trees, variants[name] is None)[i]
                before, start = bytes_read(), time.perf_counter()
                for args in asked:
                    jax.block_until_ready(manager.restore(0, args=args))
                figures[name][row].append(time.perf_counter() - start)
                figures[name]["read", row].append(bytes_read() - before)


def bytes_read():
    """Returns what this process had the system read, or NaN where nobody counts."""
    with contextlib.suppress(OSError, ValueError):
        counters = pathlib.Path("/proc/self/io").read_text().split()
        return int(counters[counters.index("rchar:") + 1])
    return float("nan")


def measure(trees, variants, rows, rounds, warm_up=True):
    """Returns name → row → what each round after the warm-up gave."""
    if warm_up:
        measure(trees, variants, rows, 1, warm_up=False)
    figures = {name: collections.defaultdict(list) for name in variants}
    for i in range(rounds):
        names = list(variants)
        turns = names[i % len(names) :] + names[: i % len(names)]
        run_round(trees, {name: variants[name] for name in turns}, rows, figures)
    return figures


def ratio(over, under):
    """Returns the median ratio of neighbouring runs, with its quartiles."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def count(values, size=None):
    """Returns a median as it is, or as a multiple of a size."""
    median = statistics.median(values)
    return f"{median / size:.4f}" if size else f"{median:.0f}"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts_table(trees, figures, two, two_figures):
    """Returns files and bytes, of which none depends on the machine."""
    rows = [
        ("files", "files", None, figures, ""),
        ("disk / bytes saved", "disk", trees.bytes, figures, ""),
        ("disk / bytes saved, no Adam", "disk", two.bytes, two_figures, "≤ 1.02"),
        ("read for the shadow", ("read", SHADOW), trees.one, figures, "≤ 1.05"),
        ("read for the params", ("read", PARAMS), trees.one, figures, ""),
        ("read for all", ("read", ALL), trees.bytes, figures, ""),
    ]
    cells = [
        [what, *(count(f[key], size) for f in found.values()), target]
        for what, key, size, found, target in rows
    ]
    return table(["bytes / their bytes in memory", *figures, "target"], cells)


def times_table(figures):
    """Returns ratios to the peers, and of the shadow alone to both trees."""
    ours, peers = figures[OURS], [figures[PLAIN], figures[SAME]]
    rows = [
        [row, *(ratio(ours[row], peer[row]) for peer in peers), TARGETS.get(row, "")]
        for row in (*SAVES, *RESTORES)
    ]
    own = [ratio(f[SHADOW], f[BOTH]) for f in figures.values()]
    # We restore both in two calls: a peer that needs one is the harder measure.
    harder = [ratio(ours[SHADOW], peer[BOTH]) for peer in peers]
    alone = [["its own", *own, "≤ 0.60"], ["ours / theirs", "", *harder, ""]]
    header = ["time of the shadow / both trees", *figures, "target"]
    times = table(["time of ours /", PLAIN, SAME, "target"], rows)
    return f"{times}\n\n{table(header, alone)}"


def drivers_table(trees, figures):
    """Returns storage options of plain Orbax beside its default."""
    rows = [
        [name, count(f["files"]), count(f["disk"], trees.bytes)]
        + [ratio(f[row], figures[ZSTD][row]) for row in (*SAVES, ALL)]
        for name, f in figures.items()
    ]
    return table(["storage", "files", "disk / bytes saved", *SAVES, ALL], rows)


def main(argv=None):
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    quick = "a small tree and 4 rounds, in seconds: shows that it runs"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--rounds", type=int, default=10, help="half for the storage")
    parser.add_argument("--out", help="Markdown file to write as well")
    args = parser.parse_args(argv)
    rounds = 4 if args.quick else args.rounds
    logging.getLogger("absl").setLevel(logging.ERROR)  # zarr files have no finalize
    modules = (jax, optax, ocp, np)
    text = [
        "# What a checkpoint of params and shadow costs",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} "
        f"({platform.machine()}), Python {platform.python_version()}, "
        + ", ".join(f"{m.__name__} {m.__version__}" for m in modules)
        + f", ema_optax {ema_optax.__version__}. {rounds} rounds, half of them for the "
        "storage options. The machine may be shared: times are medians of ratios of "
        "neighbouring runs, with their quartiles.",
    ]
    for shapes in [QUICK] if args.quick else [LARGE, SMALL]:
        print(f"{4 * len(shapes)} leaves …", file=sys.stderr, flush=True)
        trees, two = Trees(shapes, optax.adam(1e-3)), Trees(shapes, optax.sgd(1e-3))
        warm_up = not args.quick
        figures = measure(trees, PEERS, RESTORES, rounds, warm_up)
        drivers = measure(trees, DRIVERS, [ALL], rounds // 2, warm_up)
        two_figures = measure(two, PEERS, [], 1, warm_up=False)
        text += [
            f"\n## {4 * len(shapes)} leaves, {trees.bytes / 1e6:.1f} MB",
            f"\n{counts_table(trees, figures, two, two_figures)}",
            f"\n{times_table(figures)}",
            "\n### Storage options of plain Orbax, times / its default",
            f"\n{drivers_table(trees, drivers)}",
        ]
    report = "\n".join(text) + "\n"
    print(report)
    if args.out:
        pathlib.Path(args.out).write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
