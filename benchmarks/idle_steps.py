"""What an average costs on the updates at which it does not fold.

    python benchmarks/idle_steps.py [--side M] [--rounds R] [--out FILE]

Adam with an average that is never due (`every` is beyond the run) over Adam alone, in
one process, everything donated: one shadow, several, sharded and offloaded ones. Times
are medians of ratios of neighbouring runs, with their quartiles. The first row is Adam
again, and so shows the noise of the machine.
"""

import argparse
import datetime
import os
import pathlib
import platform
import statistics
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 " + os.environ.get(
    "XLA_FLAGS", ""
)

import jax
import jax.numpy as jnp
import optax
import optimizer_step
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ema_optax
from ema_optax.placement import in_host_memory, over_axis

NEVER = 1000
TWO = {"a": 0.999, "b": 0.9999}


def averaged(decay=0.9999, **options):
    return ema_optax.ema_params(decay, every=NEVER, **options)


ONE_DEVICE = {
    "nothing (Adam again)": optax.identity,
    "one shadow": averaged,
    "two shadows": lambda: averaged(TWO),
    "bfloat16": lambda: averaged(shadow_dtype="bfloat16"),
    "in host memory": lambda: averaged(shadow_sharding=in_host_memory()),
    "two, in host memory": lambda: averaged(TWO, shadow_sharding=in_host_memory()),
}
TWO_DEVICES = {
    "nothing (Adam again)": optax.identity,
    "one shadow": averaged,
    "split over the axis": lambda: averaged(shadow_sharding=over_axis("data")),
    "two, split": lambda: averaged(TWO, shadow_sharding=over_axis("data")),
    "split, in host memory": lambda: averaged(
        shadow_sharding=in_host_memory(over_axis("data"))
    ),
}


def passing():
    """A state like the params that is not looked at: what its arrays cost alone."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.copy, params),
        lambda updates, state, params=None: (updates, state),
    )


MANY_LEAVES = {
    "nothing (Adam again)": optax.identity,
    "a tree that passes through": passing,
    "one shadow": averaged,
    "pack_small": lambda: averaged(pack_small=True),
}


def measure(params, rows, rounds):
    """Returns name → quartiles of its time over Adam's in the same round."""
    adam = optax.adam(1e-3)
    optimizers = {"Adam": adam}
    optimizers |= {name: optax.chain(adam, make()) for name, make in rows.items()}
    steps, carries = {}, {}
    for name, optimizer in optimizers.items():
        carry = jax.tree.map(jnp.copy, params), optimizer.init(params)
        step = optimizer_step.make_step(optimizer)
        steps[name] = step.lower(*carry, params).compile()
        carries[name] = carry
    seconds = {name: [] for name in optimizers}
    names = list(optimizers)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            for _ in range(5):
                carries[name] = steps[name](*carries[name], params)
            jax.block_until_ready(carries[name])
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: statistics.quantiles(
            [a / b for a, b in zip(seconds[name], seconds["Adam"], strict=True)],
            n=4,
            method="inclusive",
        )
        for name in rows
    }


def as_table(figures):
    lines = ["| Adam + | time / Adam |", "|---|---|"]
    for name, (low, median, high) in figures.items():
        lines.append(f"| {name} | {median:.3f} ({low:.3f}–{high:.3f}) |")
    return "\n".join(lines)


def main():
    """Prints the tables, and writes them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out")
    args = parser.parse_args()
    versions = ", ".join(
        f"{m.__name__} {m.__version__}" for m in (jax, optax, ema_optax)
    )
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    large = {f"w{i:02d}": jnp.full((args.side, args.side), 0.1) for i in range(25)}
    whole = jax.device_put(large, NamedSharding(mesh, PartitionSpec()))
    small = {f"w{i:04d}": jnp.full((64, 64), 0.1) for i in range(500)}
    text = [
        "# Updates at which an average does not fold",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), Python "
        f"{platform.python_version()}, {versions}. {args.rounds} rounds of 5 updates.",
    ]
    for title, params, rows in (
        (f"25 leaves of {args.side}×{args.side}, one device", large, ONE_DEVICE),
        ("The same, replicated on two devices (of one processor)", whole, TWO_DEVICES),
        ("500 leaves of 64×64, one device", small, MANY_LEAVES),
    ):
        text += ["", f"## {title}", "", as_table(measure(params, rows, args.rounds))]
    report = "\n".join(text) + "\n"
    print(report)
    if args.out:
        pathlib.Path(args.out).write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
