"""Ways to store a shadow: the error, bytes and time of each.

    python benchmarks/shadow_dtypes.py [--quick] [--rounds R] [--out FILE]

Errors are against a float64 sum of the same float32 params with their exact weights,
which folds nothing. Bytes and memory come from XLA's own analysis of the compiled step.
Times are medians of ratios of neighbouring runs, with their quartiles, in one process,
everything donated. `--quick` takes short runs and small trees: it shows only that it
runs. The candidate that `ema_optax` does not have is written out below.
"""

import argparse
import datetime
import functools
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizer_step

import ema_optax
from ema_optax._averages import fold

STEPS = {0.9999: 100_000, 0.99999: 500_000, 0.999999: 3_000_000}
ELEMENTS = 128
BLOCK = 20_000  # steps whose params are held at once
SIZE = 0.02  # of the noise, where weights and their drift are of size 1
EVERY = 10
STEPS_A_RUN = 10  # so that every=10 folds once in each

NOTES = """\
**Candidates.** "Stochastic": rounded up or down by chance, from a hash of index and
count: `shadow_dtype="bfloat16"`, and `rounding="stochastic"` for float32. "float32 +
bfloat16", which `ema_optax` does not have: two bytes more keep what float32 loses.
It has the least error; but XLA on CPU computes its two outputs apart, each from all the
inputs, and most of what it saves is lost when the shadow is read as float32. Stochastic
float32 takes away the dead zone at no further bytes.

**Params.** "Noisy" ones drift at one speed under noise; "quiet" ones follow a cosine
learning rate to zero, where float32 meets its dead zone: it does not move while
(1−β)·|p−s| is less than half an ulp of s; "constant" ones jump once and stay.

**References.** Errors are of shadow and remainder together. Reading as float32 adds
what the row in brackets says, and no other way to store can save that. The weight 1−β
is a float32 in all but the float64 row. every=10 is compared with a float64 average
that folds as seldom; how that differs from folding always is a row in brackets: it is
another average of the noise, not a worse one.
"""


@jax.jit
def fold_compensated(shadow, remainder, param, weight):
    """Returns s + w·(p − s) as its two parts, for s = shadow + remainder.

    What the sum loses to the rounding of the shadow is kept, exactly, and then rounded
    to the remainder's dtype. Guards as in `fold.fold`: an element that would become
    non-finite holds, in both parts; one that is non-finite itself takes the param's
    value, and a remainder that is counts as none. A weight of 1 copies exactly, and one
    of 0 changes nothing.

    Args:
        shadow: float32 (or float64, complex) array.
        remainder: Array of the same shape, bfloat16 for a float32 shadow; for others
            of the shadow's own dtype.
        param: Array p of the same shape, any floating or complex dtype.
        weight: What `fold.split_weight` made of w.
    """
    dtype = shadow.dtype
    new = fold._as_held(jnp.asarray(param), dtype)
    low = remainder.astype(dtype)
    low = jnp.where(jnp.isfinite(low), low, 0)
    near_new, factor = weight
    factor = factor.astype(jnp.finfo(dtype).dtype)
    base = jnp.where(near_new, new, shadow)
    change = factor * ((new - shadow) - low) + jnp.where(near_new, 0, low)
    # XLA computes the two outputs apart, and may round a product and a sum at once in
    # one of them: they would not fit each other. It does not through a selection.
    change = jnp.where(jnp.isfinite(change), change, jnp.nan)
    folded, lost = two_sum(base, change)
    if remainder.dtype == jnp.bfloat16:
        lost = jax.lax.reduce_precision(lost, 8, 7)  # the astype may be left out
    held = jnp.isfinite(shadow)
    good = jnp.isfinite(folded)
    folded = jnp.where(good, folded, jnp.where(held, shadow, new))
    lost = jnp.where(good, lost, jnp.where(held, low, 0))
    return folded, lost.astype(remainder.dtype)


def two_sum(a, b):
    """Returns the rounded a + b and what the rounding lost: together exactly a + b.

    Source: Knuth, The Art of Computer Programming 2, 4.2.2; whichever is larger.
    """
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def start_compensated(param):
    return jnp.copy(param), jnp.zeros(param.shape, jnp.bfloat16)


def alone(fold):
    """Makes a fold of a shadow without a remainder one of a tuple of one part."""
    return lambda state, *rest: (fold(*state, *rest),)


class Kind(NamedTuple):
    """A way to store a shadow: how a leaf starts, as its parts, and how they fold."""

    bytes: int
    start: Any
    fold: Any


FLOAT32, SPARSE = "float32 (ours)", f"float32, every={EVERY} (ours)"
FLOAT64 = "float64 (ours, x64)"
COMPENSATED = "float32 + bfloat16"
STOCHASTIC = functools.partial(fold.fold, stochastic=True)
KINDS = {
    "bfloat16, stochastic (ours)": Kind(
        2, lambda p: (p.astype(jnp.bfloat16),), alone(fold.fold)
    ),
    FLOAT32: Kind(4, lambda p: (jnp.copy(p),), alone(fold.fold)),
    "float32, stochastic (ours)": Kind(4, lambda p: (jnp.copy(p),), alone(STOCHASTIC)),
    COMPENSATED: Kind(
        6, start_compensated, lambda s, p, w, seed: fold_compensated(*s, p, w)
    ),
}
WIDE = {FLOAT64: Kind(8, lambda p: (p.astype(jnp.float64),), alone(fold.fold))}


# Errors.


def noisy(at, start, drift, noise):
    """Weights that drift at one speed, with noise on top."""
    return start + at * drift + SIZE * noise


def quiet(at, start, drift, noise):
    """Weights under a cosine learning rate to zero: speed and noise follow it."""
    rate = (1 + np.cos(np.pi * at)) / 2
    return start + (at + np.sin(np.pi * at) / np.pi) * drift + SIZE * rate * noise


def constant(at, start, drift, noise):
    """Weights that jump away from the shadow's start, and stay."""
    return start + drift + 0 * noise


PATHS = noisy, quiet, constant


def blocks(path, steps):
    """Yields float32[n, ELEMENTS] params, of all steps in turn."""
    rng = np.random.default_rng(0)
    begin, drift = rng.standard_normal((2, ELEMENTS))
    for first in range(0, steps, BLOCK):
        at = np.arange(first + 1, min(first + BLOCK, steps) + 1)[:, None] / steps
        noise = rng.standard_normal((len(at), ELEMENTS), "float32")
        yield path(at, begin, drift, noise).astype("float32")


def start_of_path():
    return np.random.default_rng(0).standard_normal(ELEMENTS).astype("float32")


class Exact:
    """The average in float64, as the sum of all params times their weights."""

    def __init__(self, begin, weight):
        self.value, self.weight = begin.astype("float64"), weight

    def add(self, rows):
        """Takes further params, one row a step."""
        ages = np.arange(len(rows))[::-1]
        log = np.log1p(-self.weight)
        self.value *= np.exp(len(rows) * log)
        self.value += (self.weight * np.exp(ages * log)) @ rows.astype("float64")


def scan_folds(kinds):
    """Returns a jitted scan of folds over rows, of all kinds at once."""

    def run(carry, weight, rows):
        weight = fold.split_weight(weight)

        def step(carry, row):
            count, states = carry
            (seed,) = fold.fold_seeds(count, 1)
            folded = {
                name: kinds[name].fold(state, row, weight, seed)
                for name, state in states.items()
            }
            return (count + 1, folded), None

        return jax.lax.scan(step, carry, rows)[0]

    return jax.jit(run, donate_argnums=0)


def relative(found, expected):
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def value_of(parts):
    """Returns what is stored, with its remainder, in float64."""
    return sum(np.asarray(part).astype("float64") for part in parts)


def errors(path, beta, steps, scans):
    """Returns name → relative RMS error of the final shadow."""
    begin, weight = start_of_path(), 1 - beta
    sparse_weight = -math.expm1(EVERY * math.log(beta))
    exact, as_held, sparse_exact = (
        Exact(begin, w) for w in (weight, float(np.float32(weight)), sparse_weight)
    )
    leaf = jnp.asarray(begin)
    carry = jnp.int32(1), {name: kind.start(leaf) for name, kind in KINDS.items()}
    sparse = jnp.int32(1), {FLOAT32: KINDS[FLOAT32].start(leaf)}
    with jax.enable_x64(True):
        wide = jnp.int32(1), {FLOAT64: WIDE[FLOAT64].start(leaf)}
    for rows in blocks(path, steps):
        seldom = rows[EVERY - 1 :: EVERY]
        exact.add(rows)
        as_held.add(rows)
        sparse_exact.add(seldom)
        carry = scans[False](carry, weight, rows)
        sparse = scans[False](sparse, sparse_weight, seldom)
        with jax.enable_x64(True):
            wide = scans[True](wide, weight, rows)
    states = carry[1] | wide[1]
    found = {name: relative(value_of(s), exact.value) for name, s in states.items()}
    found[SPARSE] = relative(value_of(sparse[1][FLOAT32]), sparse_exact.value)
    found["(the weight in float32)"] = relative(as_held.value, exact.value)
    as_read = exact.value.astype("float32").astype("float64")
    found["(reading as float32)"] = relative(as_read, exact.value)
    found[f"(not folding between, every={EVERY})"] = relative(
        sparse_exact.value, exact.value
    )
    return found


# That XLA leaves the compensation as it is.


def exact_fold(value, param, weight):
    """Returns a fold in float64, with the weight as it was split, and its change."""
    near_new, factor = bool(weight.near_new), float(weight.factor)
    change = factor * (param.astype("float64") - value)
    return (param if near_new else value) + change, abs(change)


def check_compensation(elements=4096, steps=20):
    """Returns the worst error of a fold over what rounding the remainder allows.

    Folds run op by op, under jit, inside a scan, inside one that is unrolled, and in an
    optimizer step, whose outputs XLA computes apart. Without the compensation the
    figure would be above 100.

    Raises:
        RuntimeError: If it is above 1 anywhere.
    """
    rng = np.random.default_rng(1)
    scale = 2.0 ** rng.integers(-12, 12, elements)
    rows = (scale * rng.standard_normal((steps, elements))).astype("float32")
    begin = jnp.asarray((scale * rng.standard_normal(elements)).astype("float32"))
    worst = {}
    for w in (0.0, 1e-6, 0.3, 0.7, 1.0):
        weight = fold.split_weight(w)

        def step(parts, row, weight=weight):
            parts = fold_compensated(*parts, row, weight)
            return parts, parts

        def loop(step):
            state, found = start_compensated(begin), []
            for row in rows:
                state, parts = step(state, jnp.asarray(row))
                found.append(parts)
            return rows, found

        def scan(unroll, step=step):
            run = jax.jit(lambda s, r: jax.lax.scan(step, s, r, unroll=unroll)[1])
            found = run(start_compensated(begin), rows)
            return rows, list(zip(*found, strict=True))

        optimizer = optax.chain(optax.sgd(1.0), average(KINDS[COMPENSATED], w))
        seen = {
            "op by op": loop(without_jit(step)),
            "jit": loop(jax.jit(step)),
            "scan": scan(1),
            "scan, unrolled": scan(4),
            "optimizer step": step_by_step(optimizer, begin, rows),
        }
        for where, (params, found) in seen.items():
            before = start_compensated(begin)
            for row, after in zip(params, found, strict=True):
                expected, change = exact_fold(value_of(before), row, weight)
                allowed = 2.0**-33 * abs(expected) + 2.0**-22 * change + 1e-38
                ratio = np.max(abs(value_of(after) - expected) / allowed)
                worst[where] = max(worst.get(where, 0), float(ratio))
                before = after
    if max(worst.values()) > 1:
        raise RuntimeError(f"The compensation does not compensate: {worst}")
    return ", ".join(f"{where} {ratio:.2f}" for where, ratio in worst.items())


def without_jit(step):
    def call(state, row):
        with jax.disable_jit():
            return step(state, row)

    return call


def step_by_step(optimizer, begin, rows):
    """Returns the params, about `rows`, and the parts after each optimizer step."""

    def step(params, state, target):
        updates, state = optimizer.update([params[0] - target], state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step)
    params, seen, found = [begin], [], []
    state = optimizer.init(params)
    for row in rows:
        params, state = step(params, state, jnp.asarray(row))
        seen.append(np.asarray(params[0]))
        found.append(state[1][1][0])
    return seen, found


# Bytes and time.


def average(kind, weight):
    """Returns a transform that keeps a shadow of this kind and passes updates on."""

    def init(params):
        return jnp.int32(0), [kind.start(leaf) for leaf in jax.tree.leaves(params)]

    def update(updates, state, params):
        count, shadows = state[0] + 1, state[1]
        new = jax.tree.leaves(optax.apply_updates(params, updates))
        seeds = fold.fold_seeds(count, len(new))
        split = fold.split_weight(weight)
        folded = [
            kind.fold(s, p, split, seed)
            for s, p, seed in zip(shadows, new, seeds, strict=True)
        ]
        return updates, (count, folded)

    return optax.GradientTransformation(init, update)


def time_steps(params, rounds):
    """Returns name → bytes, temporary memory, and seconds of each round.

    Without float64: enabling x64 widens Adam's moments too.
    """
    adam = optax.adam(1e-3)
    weight = 1e-4
    optimizers = {"(alone)": adam}
    for name, kind in KINDS.items():
        optimizers[name] = optax.chain(adam, average(kind, weight))
    sparse = ema_optax.ema_params(1 - weight, every=EVERY)
    optimizers[SPARSE] = optax.chain(adam, sparse)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    steps, carries, figures = {}, {}, {}
    for name, optimizer in optimizers.items():
        steps[name], _ = optimizer_step.compile_step(optimizer, params)
        carry = jax.tree.map(jnp.copy, params), optimizer.init(params)
        carries[name] = jax.block_until_ready(carry)
        figures[name] = {
            "bytes": steps[name].cost_analysis()["bytes accessed"] / size,
            "temp": steps[name].memory_analysis().temp_size_in_bytes / size,
            "seconds": [],
        }
    names = list(optimizers)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            for _ in range(STEPS_A_RUN):
                carries[name] = steps[name](*carries[name], params)
            jax.block_until_ready(carries[name])
            if i:  # after one of warm-up
                figures[name]["seconds"].append(time.perf_counter() - start)
    return figures


# The report.


def error_table(figures):
    """Returns a table of figures: (path's name, β) → row's name → error."""
    kinds = KINDS | {SPARSE: KINDS[FLOAT32]} | WIDE
    rows = [
        [name, str(kinds[name].bytes) if name in kinds else ""]
        + [f"{found[name]:.1e}" for found in figures.values()]
        for name in [
            *kinds,
            *(k for k in next(iter(figures.values())) if k not in kinds),
        ]
    ]
    header = ["", "bytes", *(f"{path}, {beta}" for path, beta in figures)]
    return table(header, rows)


def time_table(figures):
    base = figures["(alone)"]["seconds"]
    rows = []
    for name, row in figures.items():
        ratios = [s / b for s, b in zip(row["seconds"], base, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            [
                *(name, f"{row['bytes']:.2f}", f"{row['temp']:.2f}"),
                f"{median:.2f} ({low:.2f}–{high:.2f})",
            ]
        )
    header = ["Adam +", "bytes accessed", "temporary", "time / Adam"]
    return table(header, rows)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None):
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, small trees")
    parser.add_argument("--rounds", type=int, default=5, help="of optimizer steps")
    parser.add_argument("--out", help="Markdown file to write as well")
    args = parser.parse_args(argv)
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (jax, optax, np))
    text = [
        "# Ways to store a shadow",
        f"\n{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), "
        f"Python {platform.python_version()}, {versions}, "
        f"ema_optax {ema_optax.__version__}.",
        f"\n{NOTES}",
    ]
    say("whether the compensation holds")
    text += [
        "## Whether the compensation holds",
        "\nThe worst error of a fold, over what rounding the remainder allows (without "
        f"the compensation it is above 100): {check_compensation()}.",
    ]
    scans = {wide: scan_folds(WIDE if wide else KINDS) for wide in (False, True)}
    figures = {}
    for path in PATHS:
        for beta, steps in STEPS.items():
            say(f"errors: {path.__name__}, {beta}")
            steps = steps // 50 if args.quick else steps
            figures[path.__name__, beta] = errors(path, beta, steps, scans)
    counts = ", ".join(f"{n // (50 if args.quick else 1):,}" for n in STEPS.values())
    text += [
        "\n## Relative RMS error of the final shadow",
        f"\n{ELEMENTS} elements; {counts} steps for the three decays.",
        f"\n{error_table(figures)}",
    ]
    say("optimizer steps")
    leaves, side = 25, 100 if args.quick else 1000
    params = {f"w{i:04d}": jnp.full((side, side), 0.01 * i) for i in range(leaves)}
    rounds = 2 if args.quick else args.rounds
    text += [
        f"\n## Adam and an average over Adam, {leaves} leaves of {side}×{side}",
        f"\nBytes and temporary memory in units of the params' bytes; {rounds} rounds.",
        f"\n{time_table(time_steps(params, rounds))}",
    ]
    report = "\n".join(text) + "\n"
    print(report)
    if args.out:
        pathlib.Path(args.out).write_text(report, encoding="utf-8")


def say(what):
    print(f"{time.process_time():.0f} s of CPU: {what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
