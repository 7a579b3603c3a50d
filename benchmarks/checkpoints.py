"""What a checkpoint of params and shadow costs beside one of plain Orbax.

    python benchmarks/checkpoints.py [--quick] [--rounds R] [--out FILE]

`--rounds` are of restores: three times as many are of saves, half of storage options.
`--quick` takes seconds and a small tree, and shows only that it runs.

Params, one shadow and Adam's two moments, all random float32, saved and restored by
CheckpointManagers in one process: ours, plain Orbax as it ships, and plain Orbax with
our storage options. The peers hold the same arrays as one tree, and verify nothing.
Files and bytes come first and depend on no machine (OCDBT's files vary by a few).
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
TARGETS = {SAVE: 1.10, BLOCKING: 1.20}

LAYER = {"w": (1024, 1152), "b": (1152,), "scale": (1024,)}
LARGE = {f"layer{i}/{name}": LAYER[name] for i in range(8) for name in LAYER}
SMALL = {f"leaf{i:04d}": (1000 + 12 * i,) for i in range(250)}  # of 4 to 16 kB
QUICK = {f"leaf{i}": (1000 + 300 * i,) for i in range(10)}


class Trees:
    """The same random arrays as we take them and as plain Orbax does."""

    def __init__(self, shapes, optimizer):
        draw = np.random.default_rng(0).standard_normal
        zeros = {path: jnp.zeros(shape) for path, shape in shapes.items()}
        params, (rest, average) = self.run = jax.tree.map(
            lambda x: jnp.asarray(draw(x.shape, "float32")) if x.ndim else x,
            (zeros, (optimizer.init(zeros), ema_optax.ema_params(0.999).init(zeros))),
        )
        self.plain = {"params": params, "shadow": average.shadow, "opt_state": rest}
        abstract = ocp.utils.to_shape_dtype_struct
        self.like, self.like_run = jax.tree.map(abstract, (self.plain, self.run))
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.plain))


def restores(trees, ours):
    """Returns what a manager is asked for in each of RESTORES, one after the other."""
    like = trees.like
    if ours:
        params = [checkpoint.EmaRestore("params", like["params"])]
        shadow = [checkpoint.EmaRestore("shadow", like["params"])]
        unverified = [checkpoint.EmaResume(*trees.like_run, verify=False)]
        everything = [checkpoint.EmaResume(*trees.like_run)]
        return everything, unverified, params + shadow, shadow, params

    def some(*names):  # of the one tree that plain Orbax saved
        item = {name: like[name] for name in names}
        how = ocp.checkpoint_utils.construct_restore_args(item)
        return [ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)]

    both, everything = some("params", "shadow"), some(*like)
    return everything, everything, both, some("shadow"), some("params")


def run_round(trees, variants, rows, figures):
    """Saves with each variant in turn, then restores row by row, side by side.

    `figures`, name → row → seconds, bytes or files, is appended to.
    """
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        managers = {}
        for name, options in variants.items():
            handler, args = None, checkpoint.EmaSave(*trees.run)
            if options is not None:
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


def measure(trees, variants, rows, rounds):
    """Returns name → row → what each round gave after one of warm-up."""
    names = list(variants)
    for i in range(rounds + 1):
        if i <= 1:  # forgets the warm-up
            figures = {name: collections.defaultdict(list) for name in names}
        turns = names[i % len(names) :] + names[: i % len(names)]
        run_round(trees, {name: variants[name] for name in turns}, rows, figures)
    return figures


def ratio(over, under, target=None):
    """Returns the median ratio of neighbouring runs, with its quartiles."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return judged(f"{median:.2f}", target) + f" ({low:.2f}–{high:.2f})"


def count(values, size=None, target=None):
    """Returns a median as it is, or as a multiple of a size."""
    median = statistics.median(values)
    return judged(f"{median / size:.4f}", target) if size else f"{median:.0f}"


def judged(text, target):
    return f"**{text}**" if target and float(text) > target else text


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counts_table(trees, figures, two, two_figures):
    """Returns files and bytes, of which none depends on the machine."""
    one = two.bytes / 2
    rows = [
        ("files", "files", None, figures, None),
        ("disk", "disk", trees.bytes, figures, None),
        ("disk, of a save without Adam", "disk", two.bytes, two_figures, 1.02),
        ("read to restore the shadow", ("read", SHADOW), one, figures, 1.05),
        ("read to restore the params", ("read", PARAMS), one, figures, None),
        ("read to restore all", ("read", ALL), trees.bytes, figures, None),
    ]
    cells = [
        [f"{what} (≤ {target})" if target else what]
        + [count(f[key], size, target) for f in found.values()]
        for what, key, size, found, target in rows
    ]
    return table(["bytes / bytes in memory", *figures], cells)


def times_table(figures):
    """Returns ratios to the peers, and of the shadow alone to both trees."""
    ours, peers = figures[OURS], [figures[PLAIN], figures[SAME]]
    rows = [
        [f"{row} (≤ {TARGETS[row]:.2f})" if row in TARGETS else row]
        + [ratio(ours[row], peer[row], TARGETS.get(row)) for peer in peers]
        for row in (*SAVES, *RESTORES)
    ]
    own = [ratio(f[SHADOW], f[BOTH], 0.6) for f in figures.values()]
    # We restore both in two calls: a peer that needs one is the harder measure.
    harder = [ratio(ours[SHADOW], peer[BOTH]) for peer in peers]
    alone = [["its own (≤ 0.60)", *own], ["ours / theirs", "", *harder]]
    times = table(["time of ours /", PLAIN, SAME], rows)
    return f"{times}\n\n{table(['time of the shadow / both trees', *figures], alone)}"


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
    parser.add_argument("--quick", action="store_true", help="a small tree")
    parser.add_argument("--rounds", type=int, default=8, help="of restores")
    parser.add_argument("--out", help="Markdown file to write as well")
    args = parser.parse_args(argv)
    rounds = 2 if args.quick else args.rounds
    logging.getLogger("absl").setLevel(logging.ERROR)  # zarr files have no finalize
    used = ema_optax, jax, optax, ocp, np
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in used)
    text = [
        "# What a checkpoint of params and shadow costs",
        f"\n{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}. {rounds} rounds, for saves "
        "three times as many, for storage options half. Others may use the machine: "
        "times are medians of ratios of neighbouring runs, with their quartiles. "
        "**Bold** is beyond its target.",
    ]
    for shapes in [QUICK] if args.quick else [LARGE, SMALL]:
        trees, two = Trees(shapes, optax.adam(1e-3)), Trees(shapes, optax.sgd(1e-3))
        figures = measure(trees, PEERS, RESTORES, rounds)
        for name, f in measure(trees, PEERS, [], 2 * rounds).items():
            for row in SAVES:  # which vary the most
                figures[name][row] += f[row]
        drivers = measure(trees, DRIVERS, [ALL], max(2, rounds // 2))
        two_figures = measure(two, PEERS, [], 1)
        text += [
            f"\n## {4 * len(shapes)} leaves, {trees.bytes / 1e6:.1f} MB",
            f"\n{counts_table(trees, figures, two, two_figures)}",
            f"\n{times_table(figures)}",
            "\n### Storage options of plain Orbax, times / its default",
            f"\n{drivers_table(trees, drivers)}",
        ]
    print("\n".join(text))
    if args.out:
        pathlib.Path(args.out).write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
