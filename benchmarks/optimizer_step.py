"""What an average adds to an optimizer step: bytes, memory, time, compile time.

    python benchmarks/optimizer_step.py [--leaves N --side M] [--rounds R] [--out FILE]

Each row is Adam with an average over Adam alone, in one process and on the same tree,
with params, gradients and state donated as in training. Bytes and memory come from
XLA's own analysis of the compiled step and are deterministic, in units of the params'
bytes. Times are medians of ratios of neighbouring runs; compare rows, not machines.
`naive` is the fold that everybody writes: s + (1−β)·(p − s), mapped over the tree.

On a GPU the table also has kernels, the device's time and the host's, apart, and the
floor, which is what the bytes allow.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import time

import device_time
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ema_optax

STEPS_A_RUN = 10  # so that every=10 folds once in each


def naive(decay):
    """The hand-written average: no guard, no dtype, no warm-up."""

    def init(params):
        return jax.tree.map(jnp.copy, params)

    def update(updates, shadow, params):
        new = optax.apply_updates(params, updates)
        folded = jax.tree.map(lambda s, p: s + (1 - decay) * (p - s), shadow, new)
        return updates, folded

    return optax.GradientTransformation(init, update)


ROWS = {
    "naive": lambda: naive(0.9999),
    "ema_params": lambda: ema_optax.ema_params(0.9999),
    "every=10": lambda: ema_optax.ema_params(0.9999, every=10),
    "every=100": lambda: ema_optax.ema_params(0.9999, every=100),
    "bfloat16": lambda: ema_optax.ema_params(0.9999, shadow_dtype="bfloat16"),
    "pack_small": lambda: ema_optax.ema_params(0.9999, pack_small=True),
    "pack_small, every=10": lambda: ema_optax.ema_params(
        0.9999, pack_small=True, every=10
    ),
    "two shadows": lambda: ema_optax.ema_params({"a": 0.999, "b": 0.9999}),
    "two, every=10": lambda: ema_optax.ema_params({"a": 0.999, "b": 0.9999}, every=10),
    "overwrite_every=10": lambda: ema_optax.ema_params(0.9999, overwrite_every=10),
}
FEW = ["naive", "ema_params", "every=10", "bfloat16"]
FEW += ["pack_small", "pack_small, every=10"]


def make_step(optimizer):
    """Returns the jitted optimizer step that training would call."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def compile_step(optimizer, params):
    """Returns the compiled step and the seconds of tracing and compiling it."""
    jax.clear_caches()
    state = jax.eval_shape(optimizer.init, params)
    start = time.process_time()  # of this process alone: the machine may be shared
    compiled = make_step(optimizer).lower(params, state, params).compile()
    return compiled, time.process_time() - start


def least_bytes(optimizer, params):
    """Returns the bytes that a step must move: 7 trees for Adam, 2 for an average.

    Params and state are read and written, gradients read. A shadow that is folded at
    every k-th update counts as a k-th.
    """

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    moved = 3 * size(params)
    for state in jax.eval_shape(optimizer.init, params):
        every = getattr(getattr(state, "made_by", None), "every", 1)
        moved += 2 * size(state) / every
    return moved


def measure(params, rows, rounds, compiles=3):
    """Returns figures by row name: bytes, temporary memory, compile and step ratios.

    Those of time are quartiles over so many rounds, of compilation medians. "device" is
    None without a GPU.
    """
    adam = optax.adam(1e-3)
    optimizers = {"Adam": adam}
    optimizers |= {name: optax.chain(adam, ROWS[name]()) for name in rows}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    figures, compiled, seconds = {}, {}, {name: [] for name in optimizers}
    compile_seconds = {name: [] for name in optimizers}
    for _ in range(compiles):
        for name, optimizer in optimizers.items():
            compiled[name], took = compile_step(optimizer, params)
            compile_seconds[name].append(took)
    carries = {
        name: (jax.tree.map(jnp.copy, params), optimizer.init(params))
        for name, optimizer in optimizers.items()
    }
    names = list(optimizers)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            for _ in range(STEPS_A_RUN):
                carries[name] = compiled[name](*carries[name], params)
            jax.block_until_ready(carries[name])
            if i:  # after one of warm-up
                seconds[name].append(time.perf_counter() - start)
    for name in optimizers:

        def call(name=name):
            carries[name] = compiled[name](*carries[name], params)

        def wait(name=name):
            jax.block_until_ready(carries[name])

        ratios = [s / a for s, a in zip(seconds[name], seconds["Adam"], strict=True)]
        compiled_in = zip(compile_seconds[name], compile_seconds["Adam"], strict=True)
        figures[name] = {
            "bytes": compiled[name].cost_analysis()["bytes accessed"] / size,
            "temp": compiled[name].memory_analysis().temp_size_in_bytes / size,
            "time": statistics.quantiles(ratios, n=4, method="inclusive"),
            "compile": statistics.median(s / a for s, a in compiled_in),
            "least": least_bytes(optimizers[name], params),
            "device": device_time.measure(call, wait, STEPS_A_RUN),
        }
    return figures


def as_table(figures, leaves, side):
    """Returns the figures as a Markdown table under a heading with the tree."""
    megabytes = leaves * side * side * 4 / 1e6
    title = f"### {leaves} leaves of {side}×{side} float32, {megabytes:.0f} MB"
    return f"{title}\n\n{rows_of(figures)}"


def rows_of(figures):
    """Returns the figures as a Markdown table."""
    header = ["Adam +", "bytes accessed", "temporary", "time / Adam", "compile / Adam"]
    adam = figures["Adam"]
    if adam["device"]:
        header += ["floor", "device time / Adam", *device_time.HEADER]
    lines = [header, ["---"] * len(header)]
    for name, row in figures.items():
        low, median, high = row["time"]
        cells = [
            "(alone)" if name == "Adam" else name,
            f"{row['bytes']:.2f}",
            f"{row['temp']:.2f}",
            f"{median:.2f} ({low:.2f}–{high:.2f})",
            f"{row['compile']:.2f}",
        ]
        if row["device"]:
            cells += [
                f"{row['least'] / adam['least']:.3f}",
                f"{row['device'].device / adam['device'].device:.3f}",
                *row["device"].cells(),
            ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main():
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, action="append")
    parser.add_argument("--side", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    args = parser.parse_args()
    trees = list(zip(args.leaves or [25, 2000], args.side or [1000, 64], strict=True))
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (jax, optax, np))
    text = [
        "# What an average adds to an optimizer step",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} "
        f"({platform.machine()}), Python {platform.python_version()}, {versions}, "
        f"ema_optax {ema_optax.__version__}. Bytes and temporary memory in units of "
        "the params' bytes.",
    ]
    if jax.default_backend() == "gpu":
        text += ["", device_time.NOTE]
    for leaves, side in trees:
        print(f"{leaves} leaves of {side}×{side} …", file=sys.stderr, flush=True)
        params = {f"w{i:04d}": jnp.full((side, side), 0.01 * i) for i in range(leaves)}
        rows = [r for r in ROWS if "pack" not in r]  # which has nothing to pack there
        rows = rows if leaves < 500 else FEW  # compiling is slow there
        text += ["", as_table(measure(params, rows, args.rounds), leaves, side)]
    report = "\n".join(text) + "\n"
    print(report)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(report)


if __name__ == "__main__":
    main()
