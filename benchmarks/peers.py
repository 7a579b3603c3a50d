"""The fold beside every peer's: speed, error, and its share of a training step.

    pip install torch timm diffusers dm-haiku ema-pytorch kauldron tensorflow
    python benchmarks/peers.py [--quick] [--rounds R] [--out FILE] [--picture FILE]

`pip` installs the peers; one that does not import is left out, and named in the table.
`--quick` takes small trees and shows only that it runs.

Everything runs in one process, interleaved, on the same arrays, with torch on as many
threads as there are cores and JAX states donated. Bytes come first, from XLA's own
analysis. Times are medians of ratios of neighbouring runs, with their quartiles.

Where JAX has a GPU, torch's folds run on it too, trees are larger, and the tables also
have kernels, the device's time and the host's, apart.
"""

import argparse
import datetime
import functools
import gc
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import time

import device_time
import folds
import gpt2
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optimizer_step
from matplotlib.figure import Figure

import ema_optax
from ema_optax._averages import packing
from ema_optax._plots import style

BETAS = 0.999, 0.9999, 0.99999
PACKAGES = [
    *("ema-optax", "jax", "optax", "flax", "numpy", "torch", "timm", "diffusers"),
    *("dm-haiku", "ema-pytorch", "kauldron"),
]
STEP_ROWS = {
    "hand-written": optimizer_step.ROWS["naive"],
    "every=1": optimizer_step.ROWS["ema_params"],
    "every=10": optimizer_step.ROWS["every=10"],
    "every=100": optimizer_step.ROWS["every=100"],
    "bfloat16 shadow": optimizer_step.ROWS["bfloat16"],
    "two shadows": optimizer_step.ROWS["two shadows"],
    "four shadows": lambda: ema_optax.ema_params(
        {"a": 0.99, "b": 0.999, "c": 0.9999, "d": 0.99999}
    ),
    "pack_small": optimizer_step.ROWS["pack_small"],
    "pack_small, every=10": optimizer_step.ROWS["pack_small, every=10"],
}
PACKED_ROWS = "pack_small", "pack_small, every=10"
FOR_MANY = ("hand-written", "every=1", "every=10", "bfloat16 shadow", *PACKED_ROWS)
NOTES = """\
**How to read it.** GB/s counts what a fold cannot do without: the shadow read and
written, the params read (of a copy: one tree read, one written). A copy also makes the
processor fetch the lines that it overwrites, which nothing counts, and a fold in place
does not: so a fold may exceed 100 % of it. The triad has a fold's own traffic and is
the nearer limit of it.

**Where ours does more.** An element that is not finite is left out of our fold, of no
peer's: two comparisons and selections for each element, none of them memory traffic.
They show where a tree fits the processor's cache, and hide behind the memory where it
does not. Thousands of small leaves cost XLA a kernel and a dispatch each, whoever
wrote the fold, where torch goes through a list of them in one call. `pack_small=True`
does so too: one kernel gathers the new params, one folds. On one large leaf torch's
lerp can be faster than XLA's triad, which does nothing but the traffic of a fold: then
that is XLA's limit, not the fold's.

**Error.** Peers that compute β·s + (1−β)·p round both constants to float32, whose sum
then is not 1: the shadow shrinks or grows. ema-pytorch passes β through a float32
tensor, and so folds with another weight. Those that compute s + w·(p − s) with w from a
double err by the rounding of a float32 shadow alone, as ours does: it is the same
formula. Peers follow bfloat16 params with a bfloat16 shadow; rounded to nearest it does
not move.
"""


def small_leaves(count):
    return {f"m{i:04d}": {"w": (64, 64)} for i in range(count)}


def make(shapes):
    """Returns random float32 arrays of these shapes, of the size of weights."""
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(
        lambda shape: jnp.asarray(0.02 * draw(shape, "float32")),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def sizes(params):
    leaves = jax.tree.leaves(params)
    millions = sum(leaf.size for leaf in leaves) / 1e6
    plural = "leaf" if len(leaves) == 1 else "leaves"
    return f"{millions:.1f}M params in {len(leaves):,} {plural}"


def jax_call(made, params):
    """Returns a fold, what waits for it, and the bytes that XLA says it accesses."""
    state = jax.tree.map(jnp.copy, made.state)  # some share it with the params
    jitted = jax.jit(made.fold, donate_argnums=0, keep_unused=True)
    compiled = jitted.lower(state, params).compile()
    held = [state]

    def call():
        held[0] = compiled(held[0], params)

    def wait():
        jax.block_until_ready(held[0])

    return call, wait, compiled.cost_analysis()["bytes accessed"]


def time_folds(params, rounds, makers):
    """Returns by name the bytes, the seconds of each round, and costs on a GPU."""
    in_jax, in_torch = makers
    model = folds.torch_model(params) if in_torch else None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    calls, accessed = {}, {}
    for name, maker in in_jax.items():
        *calls[name], count = jax_call(maker(params, 0.9999), params)
        accessed[name] = count / size
    for name, maker in in_torch.items():
        calls[name] = maker(model, 0.9999).fold, folds.torch_wait
    names = list(calls)
    seconds = {name: [] for name in names}
    for i in range(rounds + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(0.003)  # for the other library's threads to fall asleep
            call, wait = calls[name]
            start = time.perf_counter()
            call()
            wait()
            if i >= 2:  # after two of warm-up
                seconds[name].append(time.perf_counter() - start)
    costs = {name: device_time.measure(*pair) for name, pair in calls.items()}
    return accessed, seconds, costs, size


def ratio(over, under):
    """Returns quartiles of the ratios of neighbouring runs."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def cell(quartiles, digits=2):
    low, median, high = (f"{x:.{digits}f}" for x in quartiles)
    return f"{median} ({low}–{high})"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(name, seconds, size):
    trees = 2 if name in (folds.COPY, folds.TORCH_COPY) else 3
    return [trees * size / s / 1e9 for s in seconds]


def fold_table(accessed, seconds, costs, size):
    """Returns the table of one tree, and the sentences on who is faster than we."""
    rows, faster = [], []
    ours = folds.OURS, folds.TRANSFORM, folds.PACKED
    best = min(ours, key=lambda name: statistics.median(seconds[name]))
    copied = speed(folds.COPY, seconds[folds.COPY], size)
    for name in seconds:
        measured = speed(name, seconds[name], size)
        against = ratio(seconds[name], seconds[folds.OURS])
        against_best = ratio(seconds[name], seconds[best])
        if against_best[2] < 1 and name not in (*folds.LIMITS, *ours):
            faster.append(f"{name} takes {against_best[1]:.2f} of its time")
        rows.append(
            [
                f"**{name}**" if name.startswith("ema_optax") else name,
                f"{accessed[name]:.2f}" if name in accessed else "",
                f"{statistics.median(measured):.1f}",
                cell(ratio(measured, copied)),
                cell(against) if name not in (folds.COPY, folds.TORCH_COPY) else "",
            ]
        )
        if costs[name]:
            of_it, of_copy = (
                speed(each, [costs[each].device], size)[0]
                for each in (name, folds.COPY)
            )
            rows[-1] += [f"{of_it:.0f}", f"{of_it / of_copy:.2f}"]
            rows[-1] += costs[name].cells()
    header = ["", "bytes / tree", "GB/s", "GB/s / copy", "time / update_shadow"]
    if costs[folds.COPY]:
        header += ["device GB/s", "device GB/s / copy", *device_time.HEADER]
    said = "; ".join(faster) or "no peer, by more than the quartiles' spread"
    return f"{table(header, rows)}\n\nFaster than our {best} here: {said}."


def trajectory(steps, elements):
    """Returns float32[steps + 1, elements]: weights that drift, with noise on top."""
    rng = np.random.default_rng(0)
    start, drift = rng.standard_normal((2, elements))
    noise = rng.standard_normal((steps + 1, elements), "float32")
    progress = np.linspace(0, 1, steps + 1)[:, None]
    return (start + progress * drift + 0.02 * noise).astype("float32")


def exact(path, beta):
    shadow = path[0].astype("float64")
    for row in path:
        shadow += (1 - beta) * (row.astype("float64") - shadow)
    return shadow


def jax_error(maker, path, beta, expected):
    made = maker({"m": {"w": jnp.asarray(path[0])}}, beta)
    scan = jax.jit(
        lambda state, rows: jax.lax.scan(
            lambda s, row: (made.fold(s, {"m": {"w": row}}), None), state, rows
        )[0]
    )
    return error(made.read(scan(made.state, jnp.asarray(path))), expected)


def torch_error(maker, path, beta, expected):
    import torch

    narrow = path.dtype == ml_dtypes.bfloat16
    model = folds.torch_model([path[0]], torch.bfloat16 if narrow else None)
    rows = torch.from_numpy(path.astype("float32"))
    weights = next(iter(model.parameters()))
    made = maker(model, beta)
    for row in rows:
        weights.data.copy_(row)
        made.fold()
    return error([p.detach().float().cpu().numpy() for p in made.read()], expected)


def error(found, expected):
    (found,) = (np.asarray(x, "float64") for x in found if np.ndim(x))
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def errors(path, makers):
    """Returns name → β or "bfloat16" → relative RMS error."""
    cases = {beta: (beta, path) for beta in BETAS}
    cases["bfloat16"] = (BETAS[0], path.astype(ml_dtypes.bfloat16))
    figures = {}
    for key, (beta, rows) in cases.items():
        expected = exact(rows, beta)
        for measure, found in zip((jax_error, torch_error), makers, strict=True):
            for name, maker in found.items():
                if name not in folds.LIMITS:
                    figures.setdefault(name, {})[key] = measure(
                        maker, rows, beta, expected
                    )
    return figures


def error_table(figures):
    header = ["", *(f"{beta:g}" for beta in BETAS)]
    header += [f"{BETAS[0]}, params bfloat16", "warm-up by default"]
    rows = [
        [f"**{name}**" if name.startswith("ema_optax") else name]
        + [f"{row[key]:.1e}" for key in (*BETAS, "bfloat16")]
        + [folds.DEFAULTS.get(name, folds.DEFAULTS[folds.TRANSFORM])]
        for name, row in figures.items()
    ]
    return table(header, rows)


def optimizer_rows(params, rounds):
    """Returns the table of Adam with an average over Adam, in two halves for memory."""
    optimizer_step.ROWS |= STEP_ROWS
    many = len(jax.tree.leaves(params)) > 1000  # whose compilation takes half a minute
    small = any(leaf.nbytes <= packing.SMALL for leaf in jax.tree.leaves(params))
    names = [n for n in STEP_ROWS if small or n not in PACKED_ROWS]
    if many:
        names = [n for n in names if n in FOR_MANY]
    figures, half = {}, (len(names) + 1) // 2
    for part in names[:half], names[half:]:
        compiles = 1 if many else 3
        found = optimizer_step.measure(params, part, rounds, compiles)
        figures = found | figures
        gc.collect()
    figures = {name: figures[name] for name in ("Adam", *names)}
    return optimizer_step.rows_of(figures)


def training_table(shapes, tokens, rounds):
    """Returns a whole training step with an average over one without."""
    params = make(shapes)
    averages = {"(nothing)": optax.identity, "(nothing, again)": optax.identity}
    averages |= {f"ema_params, {k}": STEP_ROWS[k] for k in ("every=1", "every=10")}
    averages["hand-written"] = STEP_ROWS["hand-written"]
    steps, carries = {}, {}
    for name, average in averages.items():
        optimizer = optax.chain(optax.adam(1e-3), average())

        def step(params, state, optimizer=optimizer):
            grads = jax.grad(gpt2.loss)(params, tokens)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        carry = jax.tree.map(jnp.copy, params), optimizer.init(params)
        steps[name] = jax.jit(step, donate_argnums=(0, 1)).lower(*carry).compile()
        carries[name] = carry
    seconds = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](*carries[name]))
            if i:
                seconds[name].append(time.perf_counter() - start)
    base = seconds[names[0]]
    milliseconds = 1000 * statistics.median(base)
    accessed = [steps[name].cost_analysis()["bytes accessed"] for name in names]
    rows = [
        [name, f"{count / accessed[0]:.3f}", cell(ratio(seconds[name], base), 3)]
        for name, count in zip(names, accessed, strict=True)
    ]
    header = ["Adam +", "bytes / those without", "time / that without"]
    costs = []
    for name, row in zip(names, rows, strict=True):

        def call(name=name):
            carries[name] = steps[name](*carries[name])

        def wait(name=name):
            jax.block_until_ready(carries[name])

        cost = device_time.measure(call, wait)
        if cost:
            costs.append(cost)
            row += [f"{cost.device / costs[0].device:.3f}", *cost.cells()]
    if costs:
        header += ["device time / that without", *device_time.HEADER]
    return (
        f"{sizes(params)}, {tokens.shape[0]} times {tokens.shape[1] - 1} tokens, "
        f"{milliseconds:.0f} ms a step without an average, {rounds} rounds. The second "
        f"row is the first again: what the machine's noise is.\n\n{table(header, rows)}"
    )


class Neighbours:
    """What other processes used of the cores since this was made.

    Neighbours slow torch more than JAX: its threads wait for each other in every call.
    """

    def __init__(self):
        self.start, self.used = time.perf_counter(), self._seconds()

    def __str__(self):
        wall = (time.perf_counter() - self.start) * os.cpu_count()
        used = self._seconds() - self.used
        if not used >= 0:  # or NaN, where nobody counts
            return "What other processes used meanwhile is not known."
        return f"Other processes used {used / wall:.0%} of the cores meanwhile."

    def _seconds(self):
        try:
            first = (
                pathlib.Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0]
            )
        except OSError:
            return float("nan")
        user, nice, system, _, _, *rest = (int(x) for x in first.split()[1:9])
        everybody = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return everybody - sum(os.times()[:4])


def draw(speeds, figures, steps, file):
    """Draws GB/s of each fold and error of each peer, side by side."""
    timed = next(iter(speeds.values()))
    names = [*(name for name in figures if name not in timed), *reversed(timed)]
    figure = Figure(figsize=(11, 5.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    looks = zip(speeds.items(), style.CURVES, strict=False)
    for i, ((tree, rates), look) in enumerate(looks):
        heights = [y + (1 - i) * 0.26 for y in range(len(names))]
        values = [rates.get(name, 0) for name in names]
        left.barh(heights, values, 0.26, label=tree, color=look["color"], alpha=0.9)
    left.set_yticks(range(len(names)), names)
    for label in left.get_yticklabels():
        if label.get_text().startswith("ema_optax"):
            label.set_fontweight("bold")
    style.dress(left, title="One fold", xlabel="GB/s: more is better", ylabel="")
    keys = {f"float32, β = {beta:g}": beta for beta in BETAS}
    keys[f"bfloat16 params, β = {BETAS[0]:g}"] = "bfloat16"
    for (label, key), look in zip(keys.items(), style.CURVES, strict=False):
        found = [(figures[n][key], y) for y, n in enumerate(names) if n in figures]
        # An error of exactly nothing is drawn at the edge.
        values = [value if value > 0 else 1e-9 for value, _ in found]
        heights = [height for _, height in found]
        look = look | {"linestyle": "none", "markersize": 6}
        if key == "bfloat16":
            look |= {"markerfacecolor": "white"}
        right.plot(values, heights, label=label, **look)
    right.set_xscale("log")
    style.dress(
        right,
        title=f"Error after {steps:,} folds",
        xlabel="relative RMS error: less is better",
        ylabel="",
    )
    for ax in left, right:
        if ax is left:
            ax.grid(visible=False, axis="y")
        ax.grid(axis="x", color="0.9")
        ax.legend(frameon=False, fontsize=8, loc="upper center", ncols=2,
                  bbox_to_anchor=(0.5, -0.12))  # fmt: skip
    figure.savefig(file)


def main(argv=None):
    """Prints the tables, and writes them and the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small trees")
    parser.add_argument("--rounds", type=int, default=24, help="of folds")
    parser.add_argument("--out", help="Markdown file to write as well")
    parser.add_argument("--picture", help="image file to write as well")
    args = parser.parse_args(argv)
    quick, rounds = args.quick, 4 if args.quick else args.rounds
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # some is torch's
    on_gpu = jax.default_backend() == "gpu"
    *makers, missing = folds.installed()
    if makers[1]:
        import torch

        torch.set_num_threads(os.cpu_count())
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    text = [
        "# The fold beside every peer's",
        f"\n{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), "
        f"Python {platform.python_version()}, {', '.join(versions)}. float32, "
        f"β = 0.9999, at every step, in place; {rounds} rounds. Others may use the "
        "machine: times are medians, ratios those of neighbouring runs with their "
        "quartiles.",
    ]
    for name, why in missing.items():
        text.append(f"\nLeft out: {name}, which does not run here ({why}).")
    text += [f"\n{NOTES}"]
    if on_gpu:
        text += [device_time.NOTE]
    small = gpt2.shapes(64, 2000, 128, 2)
    one = 500_000_000 if on_gpu else 25_000_000  # beyond any cache
    trees = [{"one": {"w": (one,)}}, gpt2.shapes(), small_leaves(2000)]
    if quick:
        trees = [{"one": {"w": (1_000_000,)}}, small, small_leaves(50)]
    speeds = {}
    for shapes in trees:
        params = make(shapes)
        say(sizes(params))
        others = Neighbours()
        found = time_folds(params, rounds, makers)
        text += [f"\n## {sizes(params)}", f"\n{others}", f"\n{fold_table(*found)}"]
        speeds[sizes(params)] = {
            name: statistics.median(speed(name, seconds, found[-1]))
            for name, seconds in found[1].items()
        }
        gc.collect()
        publish(text, args.out)
    say("errors")
    path = trajectory(500 if quick else 20_000, 64 if quick else 2000)
    with_narrow = makers[0] | {f"{folds.TRANSFORM}, bfloat16": folds.ours_bfloat16}
    figures = errors(path, (with_narrow, makers[1]))
    text += [
        f"\n## Relative RMS error against float64, {len(path) - 1:,} steps",
        "\nThe same drifting, noisy trajectory for each, constant β, no warm-up; all "
        "start as copies of the first params and keep what dtype they would for "
        "params of float32 and, in the last column of figures, bfloat16: of ours "
        "float32 shadows but where bfloat16 is asked for, and timm rounds "
        "stochastically as that does.",
        f"\n{error_table(figures)}",
    ]
    publish(text, args.out)
    if args.picture:
        draw(speeds, figures, len(path) - 1, args.picture)
    for shapes in trees:
        params = make(shapes)
        say(f"optimizer steps, {sizes(params)}")
        others = Neighbours()
        rounds = 2 if quick else 30 if len(jax.tree.leaves(params)) > 1000 else 5
        optimizers = optimizer_rows(params, rounds)
        text += [
            f"\n## Adam and an average over Adam, {sizes(params)}",
            f"\nBytes and temporary memory in units of the params' bytes. {others}",
            f"\n{optimizers}",
        ]
        publish(text, args.out)
        del params
        gc.collect()
    say("training steps")
    others = Neighbours()
    shapes, rows, length = gpt2.shapes(256, 4096, 128, 6), 8, 128
    if quick:
        shapes, rows, length = gpt2.shapes(64, 500, 32, 2), 2, 32
    elif on_gpu:
        shapes, rows, length = gpt2.shapes(), 16, 512
    tokens = np.random.default_rng(0).integers(0, 500, (rows, length + 1))
    trained = training_table(shapes, jnp.asarray(tokens), 4 if quick else 40)
    text += [f"\n## A training step of a transformer\n\n{others}", f"\n{trained}"]
    publish(text, args.out)
    print("\n".join(text))


def publish(text, file):
    """Writes what there is so far: the whole run takes minutes."""
    if file:
        pathlib.Path(file).write_text("\n".join(text) + "\n", encoding="utf-8")


@functools.cache
def _start():
    return time.perf_counter()


def say(what):
    print(f"{time.perf_counter() - _start():.0f} s: {what} …", file=sys.stderr)


if __name__ == "__main__":
    _start()
    main()
