"""Compile time of an optimizer step with an average of very many leaves.

    python benchmarks/compile_times.py [--leaves N] [--side M] [--rounds R] [--out FILE]

Each row is Adam with an average over Adam alone, in one process, compiled anew and
alternated. Seconds are CPU time of the process: the machine may be shared. "HLO" counts
the instructions of the compiled step for each leaf, which no load changes.

`naive` is s + (1−β)·(p − s) with β a constant. `naive, warm-up` is the same with the
weight of `ema_params(β)`, which changes from step to step. `jnp` is the fold of
`ema_params` in that place, written with `jnp.where` and `jnp.isfinite`.
"""

import argparse
import datetime
import gc
import os
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax
from optimizer_step import make_step, naive

import ema_optax


def with_weight(fold):
    """Makes a fold of s, p and w a transform with the weight of `ema_params`."""
    decay = ema_optax.warmup(0.9999)

    def init(params):
        return jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params)

    def update(updates, state, params):
        count, shadow = optax.safe_increment(state[0]), state[1]
        new = optax.apply_updates(params, updates)
        w = decay.newest_weight(count)
        return updates, (count, jax.tree.map(lambda s, p: fold(s, p, w), shadow, new))

    return optax.GradientTransformation(init, update)


@jax.jit
def fold_in_jnp(s, p, w):
    """The fold of `ema_params`, to the bit, as `jnp` writes it."""
    near, change = w > 0.5, jnp.where(w > 0.5, w - 1, w) * (p - s)
    folded = jnp.where(near, p, s) + change
    kept = jnp.where(jnp.isfinite(s), s, p)
    return jnp.where(jnp.isfinite(folded), folded, kept)


ROWS = {
    "(alone)": optax.identity,
    "naive": lambda: naive(0.9999),
    "naive, warm-up": lambda: with_weight(lambda s, p, w: s + w * (p - s)),
    "jnp": lambda: with_weight(fold_in_jnp),
    "ema_params": lambda: ema_optax.ema_params(0.9999),
}


def measure(leaves, side, rounds):
    """Returns by row the seconds of each compilation, and HLO and bytes of a step."""
    params = {f"w{i:04d}": jnp.full((side, side), 0.01 * i) for i in range(leaves)}
    size = sum(leaf.nbytes for leaf in params.values())
    seconds, counts = {name: [] for name in ROWS}, {}
    for i in range(rounds):
        for name, make in ROWS.items():
            optimizer = optax.chain(optax.adam(1e-3), make())
            state = jax.eval_shape(optimizer.init, params)
            jax.clear_caches()
            gc.collect()
            start = time.process_time()
            lowered = make_step(optimizer).lower(params, state, params)
            traced = time.process_time()
            compiled = lowered.compile()
            seconds[name].append((traced - start, time.process_time() - traced))
            print(i, name, seconds[name][-1], file=sys.stderr, flush=True)
            counts[name] = (
                compiled.as_text().count(" = ") / leaves,
                compiled.cost_analysis()["bytes accessed"] / size,
            )
    return seconds, counts


def as_table(seconds, counts):
    """Returns the figures as a Markdown table."""
    lines = [
        "| Adam + | HLO / leaf | bytes | tracing | XLA | both | shortest of both |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = seconds["(alone)"]
    for name, rows in seconds.items():
        ratios = [
            (a / b, c / d, (a + c) / (b + d))
            for (a, c), (b, d) in zip(rows, alone, strict=True)
        ]
        medians = [
            f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True)
        ]
        least = min(map(sum, rows)) / min(map(sum, alone))
        hlo, size = counts[name]
        lines.append(
            f"| {name} | {hlo:.1f} | {size:.2f} | {' | '.join(medians)} | {least:.2f} |"
        )
    return "\n".join(lines)


def main():
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    table = as_table(*measure(args.leaves, args.side, args.rounds))
    report = (
        f"{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), Python "
        f"{platform.python_version()}, jax {jax.__version__}, optax "
        f"{optax.__version__}, ema_optax {ema_optax.__version__}. {args.leaves} leaves "
        f"of {args.side}×{args.side} float32, {args.rounds} rounds; medians of ratios "
        f"to Adam alone, and the ratio of the shortest.\n\n{table}\n"
    )
    print(report)
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            file.write(report)


if __name__ == "__main__":
    main()
