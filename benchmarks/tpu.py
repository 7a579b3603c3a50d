"""What an average adds to a step on TPUs, compiled for them on a machine without one.

    pip install 'jax==0.10.2' 'libtpu==0.0.42.1'
    python benchmarks/tpu.py [--topology NAME ...] [--rows ROW ...] [--out FILE]
    python benchmarks/tpu.py --check

libtpu compiles for the chips of a topology that are not there: what comes out is the
program that a TPU would run, and nothing runs. So there are no times and no values, but
its traffic, its memory, its kernels and its collectives are exact. Each row is Adam
with an average over Adam alone, on GPT-2 small, with params and state donated.

`--check` compiles a few rows for one topology, and fails where a figure is not within
the bounds below. Its model has the same bytes in 40 leaves instead of 148, and so fewer
kernels to compile: what XLA fetches into VMEM is a number of bytes.
"""

import argparse
import collections
import datetime
import importlib.metadata
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

os.environ |= {
    "JAX_PLATFORMS": "cpu",  # or JAX looks for the chips
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # who takes no chip disturbs nobody
    # What libtpu would ask a server for, that is not there either.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

import gpt2
import jax
import numpy as np
import optax
import optimizer_step
import tpu_programs
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import placement

TOPOLOGIES = "v5e:2x4", "v5p:2x2x2", "v6e:2x4"
NONE = (0, 0)
# Of row and figure the least and the most that `--check` takes, in trees or numbers.
BOUNDS = {
    "every=1": {"added": (1.98, 2.02), "temporary": (0, 0.01), "kernels": NONE},
    "every=10": {"added": (2.98, 3.16), "otherwise": (0, 0.25), "temporary": (0, 0.06)},
    "in_host_memory": {"moved": (1.98, 2.02), "temporary": (0, 0.42)},
    "over_axis": {"added": (0.27, 0.33), "temporary": (0, 0.01)},
    "FSDP, in_host_memory": {"moved": (1.98, 2.02), "temporary": (0, 1.15)},
}
COLLECTIVES = {"collectives": NONE}  # in all of them
# GPT-2 small twice as wide, with a quarter of its blocks.
FEWER_LEAVES = gpt2.shapes(width=1536, vocabulary=25128, context=512, blocks=3)

HEADER = """\
| Adam + | on | HBM trees added | floor | where none is due | host trees moved | \
temporary, device | host memory | kernels added | collectives added |
|---|---|---|---|---|---|---|---|---|---|"""
NOTES = """\
What an average adds to a step of Adam on GPT-2 small, 124M params in 148 leaves, with
everything donated. Nothing here ran: libtpu compiles for chips that are not there, and
the figures are read from the programs. `python benchmarks/tpu.py` makes them anew.

- A tree is the params that one chip holds, in float32. HBM traffic is what kernels and
  prefetches read and write; what lies in VMEM between them is none.
- The floor of an average is its shadow read and written, where the new params are at
  hand. Two shadows are a kernel each, and the second reads the params again.
- `every`: where a fold is due, and where none is. The trees of the latter are
  params that XLA fetches into VMEM for a fold before it knows that none is due.
- In host memory a shadow is fetched into HBM, folded there and put back, group by
  group: 4 trees, and one of new params that are read for it; where none is due, some
  that are fetched into VMEM. In FSDP over 8 chips most parts are narrower than a tile
  of 128 columns; XLA stores them transposed, and they are not folded in place.
- `overwrite_every` with `over_axis` gathers the shadow where it is due. Where it is
  not, the conditional still has XLA write all updates to HBM and read them again.
- `training` is a whole step: forward and backward pass in bfloat16, and the
  optimizer.
- Compiling the step for v5e took 12.7 s of a processor for Adam and 15.1 with an
  average; 24.5 with every=10, which has a second kernel for each leaf; 37.8 for
  bfloat16 and 46.5 for stochastic float32. Of these two 13 and 14 s are the hash that
  decides the rounding, and most of the rest what puts the bits together: they have half
  as many instructions again in each kernel."""


class Row(NamedTuple):
    """An average, and where it is.

    Attributes:
        where: "one chip", "replicated" on all chips, or "FSDP" over them.
        average: From the shardings of the params to the transform.
        floor: Trees of HBM traffic that it cannot do without.
        whole: Whether in a whole training step: forward, backward and optimizer.
    """

    where: str
    average: Callable[[Any], optax.GradientTransformation]
    floor: str = ""
    whole: bool = False


def averaged(decay=0.9999, **options):
    return lambda shardings: ema_optax.ema_params(
        decay, params_sharding=shardings, **options
    )


def written_by_hand(shardings):
    del shardings  # everything is where its param is
    return optimizer_step.naive(0.9999)


split, hosted = placement.over_axis("data"), placement.in_host_memory()
ROWS = {
    "hand-written": Row("one chip", written_by_hand, "2"),
    "every=1": Row("one chip", averaged(), "2"),
    "every=10": Row("one chip", averaged(every=10), "2"),
    "two shadows": Row("one chip", averaged({"a": 0.999, "b": 0.9999}), "4"),
    "bfloat16": Row("one chip", averaged(shadow_dtype="bfloat16"), "1"),
    "stochastic": Row("one chip", averaged(rounding="stochastic"), "2"),
    "pack_small": Row("one chip", averaged(pack_small=True), "2"),
    "in_host_memory": Row("one chip", averaged(shadow_sharding=hosted), "0"),
    "in_host_memory, every=10": Row(
        "one chip", averaged(shadow_sharding=hosted, every=10), "0"
    ),
    "over_axis": Row("replicated", averaged(shadow_sharding=split), "2/N"),
    "over_axis, overwrite_every=10": Row(
        "replicated", averaged(shadow_sharding=split, overwrite_every=10), "2/N"
    ),
    "FSDP": Row("FSDP", averaged(), "2"),
    "FSDP, in_host_memory": Row("FSDP", averaged(shadow_sharding=hosted), "0"),
    "training, hand-written": Row("one chip", written_by_hand, "2", whole=True),
    "training, every=1": Row("one chip", averaged(), "2", whole=True),
    "training, in_host_memory": Row(
        "one chip", averaged(shadow_sharding=hosted), "0", whole=True
    ),
}


class Figures(NamedTuple):
    """What a compiled step does and takes on one device, bytes in trees of its params.

    Attributes:
        due: Counts of `tpu_programs.work` where a fold is due.
        otherwise: The same where none is.
        temporary: Of the device's memory.
        host: Of the host's, arguments and temporary memory.
    """

    due: collections.Counter
    otherwise: collections.Counter
    temporary: float
    host: float


class Chips:
    """A topology, and abstract params and batches on it."""

    def __init__(self, name: str, shapes: Any) -> None:
        self.devices = topologies.get_topology_desc(name, "tpu").devices
        self.shapes = shapes

    def mesh(self, where: str) -> Mesh:
        """Returns one of all chips, or of one.

        An abstract array on a device without a mesh would lose its memory kind.
        """
        chips = self.devices[:1] if where == "one chip" else self.devices
        return Mesh(np.array(chips), ("data",))

    def params(self, where: str) -> Any:
        """Returns abstract params, in FSDP split along their longest dimension."""
        whole = NamedSharding(self.mesh(where), PartitionSpec())

        def param(shape):
            leaf = jax.ShapeDtypeStruct(shape, "float32", sharding=whole)
            sharding = split("", leaf) if where == "FSDP" else whole
            return jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)

        return jax.tree.map(param, self.shapes, is_leaf=lambda x: isinstance(x, tuple))


def placed(state: Any, shardings: Iterable[Any], others: Any) -> Any:
    """Puts each array of an abstract state where the param is that it belongs to.

    Args:
        state: Trees in the order of the params, and scalars.
        shardings: Of each leaf of one tree.
        others: The sharding of scalars.
    """
    each = itertools.cycle(shardings)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=next(each) if x.shape else others
        ),
        state,
    )


def training_step(optimizer: optax.GradientTransformation) -> Any:
    """Returns a jitted step of training in bfloat16 with params in float32."""

    def loss(params, tokens):
        narrow = jax.tree.map(lambda p: p.astype("bfloat16"), params)
        return gpt2.loss(narrow, tokens, heads=12)

    def step(params, state, tokens):
        grads = jax.grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def measure(chips: Chips, row: Row) -> Figures:
    """Compiles a step and reads its figures."""
    params = chips.params(row.where)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    beside = jax.tree.leaves(shardings)
    everywhere = NamedSharding(chips.mesh(row.where), PartitionSpec())
    optimizer = optax.chain(optax.adam(1e-3), row.average(shardings))
    adam, average = jax.eval_shape(optimizer.init, params)
    made_by = getattr(average, "made_by", None)
    homes = made_by.shardings if made_by else None
    homes = [home.shadow for home in homes] if homes else beside
    state = placed(adam, beside, everywhere), placed(average, homes, everywhere)
    if row.whole:
        tokens = jax.ShapeDtypeStruct((4, 1025), "int32", sharding=everywhere)
        compiled = training_step(optimizer).lower(params, state, tokens).compile()
    else:
        step = optimizer_step.make_step(optimizer)
        compiled = step.lower(params, state, params).compile()
    tree = 4 * sum(
        math.prod(p.sharding.shard_shape(p.shape)) for p in jax.tree.leaves(params)
    )
    memory = compiled.memory_analysis()
    due, otherwise = (
        collections.Counter(
            {k: n / tree if k in ("hbm", "host") else n for k, n in found.items()}
        )
        for found in tpu_programs.work(compiled.as_text())
    )
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    return Figures(due, otherwise, memory.temp_size_in_bytes / tree, host / tree)


def measured(
    chips: Chips, names: Iterable[str]
) -> Iterator[tuple[str, Figures, Figures]]:
    """Yields rows, the figures with their average, and those of Adam alone."""
    alone = {}
    for name in names:
        row = ROWS[name]
        base = row._replace(average=lambda _: optax.identity())
        if (row.where, row.whole) not in alone:
            print(f"Adam, {row.where} …", file=sys.stderr, flush=True)
            alone[row.where, row.whole] = measure(chips, base)
        print(f"{name} …", file=sys.stderr, flush=True)
        yield name, measure(chips, row), alone[row.where, row.whole]


def differences(figures: Figures, alone: Figures) -> dict[str, float]:
    """Returns what an average adds, by the names that `BOUNDS` has."""
    due = figures.due
    return {
        "added": due["hbm"] - alone.due["hbm"],
        "otherwise": figures.otherwise["hbm"] - alone.due["hbm"],
        "moved": due["host"],
        "temporary": figures.temporary - alone.temporary,
        "host": figures.host,
        "kernels": due["kernels"] - alone.due["kernels"],
        "collectives": sum(
            due[name] - alone.due[name] for name in tpu_programs.COLLECTIVES
        ),
    }


def as_row(name: str, figures: Figures, alone: Figures) -> str:
    """Returns a line of the table."""
    row, added = ROWS[name], differences(figures, alone)
    conditional = figures.due != figures.otherwise
    cells = [
        name,
        row.where,
        f"{added['added']:+.2f}",
        row.floor,
        f"{added['otherwise']:+.2f}" if conditional else "",
        f"{added['moved']:.2f}",
        f"{added['temporary']:.2f}",
        f"{added['host']:.2f}",
        f"{added['kernels']:+d}",
        f"{added['collectives']:+d}",
    ]
    return f"| {' | '.join(cells)} |"


def problems(name: str, figures: Figures, alone: Figures) -> Iterator[str]:
    """Yields a sentence for each figure of a row that is not within its bounds."""
    added = differences(figures, alone)
    for figure, (least, most) in (BOUNDS[name] | COLLECTIVES).items():
        if not least <= added[figure] <= most:
            yield (
                f"{name}: {figure} is {added[figure]:.3f}, which should be from "
                f"{least} to {most}"
            )


def versions() -> str:
    packages = "jax", "libtpu", "optax"
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([*found, f"ema_optax {ema_optax.__version__}"])


def main():
    """Prints the tables, and writes them where asked; or checks the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    parser.add_argument("--out", help="Markdown file to write as well")
    parser.add_argument("--check", action="store_true", help="the bounds, on one")
    args = parser.parse_args()
    # A program from the cache would be one for this machine's processor.
    jax.config.update("jax_enable_compilation_cache", False)
    if args.check:
        chips = Chips(TOPOLOGIES[0], FEWER_LEAVES)
        found = [problems(*each) for each in measured(chips, BOUNDS)]
        sys.exit("\n".join(itertools.chain(*found)) or None)
    text = [f"# TPUs, compiled for and not run on\n\n{NOTES}"]
    text.append(f"{datetime.date.today()}, {versions()}.")
    for name in args.topology:
        chips = Chips(name, gpt2.shapes())
        kind = chips.devices[0].device_kind
        text += [f"## {name}: {len(chips.devices)} chips, {kind}", HEADER]
        for each in measured(chips, args.rows):
            text[-1] += "\n" + as_row(*each)
            if args.out:  # what there is so far: a row takes half a minute
                report = "\n\n".join(text) + "\n"
                pathlib.Path(args.out).write_text(report, encoding="utf-8")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
