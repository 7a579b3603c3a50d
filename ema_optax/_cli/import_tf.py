"""`ema-optax import-tf`: its arguments, and what it prints of the import."""

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ema_optax._cli import decay_text, parsing
from ema_optax._messages.text import some

if TYPE_CHECKING:
    from ema_optax.tensorflow import Imported


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "import-tf",
        command=_run,
        extra="cli,tensorflow",
        explain=parsing.explained,
        on_cpu=True,
        summary="Turn a TensorFlow checkpoint with averages into one of ours.",
        details=(
            "CKPT is the prefix of a checkpoint, run/model.ckpt-300, or its folder:\n"
            "then the latest in it. Variables become params and shadow, nested by\n"
            "their scopes: enc/w, and as its shadow enc/w/ExponentialMovingAverage,\n"
            "also where the averages were made in a scope of their own. Where there\n"
            "is enc beside enc/w, it becomes enc/value.\n"
            "Values and dtypes stay as they are, and global_step is the step.\n"
            "\n"
            "Lists the variables without a shadow, which are raw in both trees, and\n"
            "what is left out: optimizer slots, counters, texts. Checkpoints of\n"
            "tf.train.Checkpoint are read where no two variables have one name.\n"
            "Memory holds params and shadow. Nothing is overwritten.\n"
            "\n"
            "TensorFlow does not write the decay down. If you know it, 0.9999 means\n"
            "ExponentialMovingAverage(0.9999, num_updates=step), and constant:0.9999\n"
            "the same without num_updates; 'ema-optax profile --help' has others."
        ),
        examples=(
            "  ema-optax import-tf old_run/model.ckpt-300000 --out imported\n"
            "  ema-optax import-tf old_run --decay constant:0.9999 --out imported\n"
            "  ema-optax inspect imported"
        ),
    )
    parser.add_argument("source", type=parsing.place, metavar="CKPT")
    parser.add_argument(
        "--out", type=parsing.place, required=True, metavar="DIR", help="what to write"
    )
    parser.add_argument(
        "--step",
        type=parsing.at_least(0),
        metavar="N",
        help="number of the step (default: the global_step)",
    )
    parser.add_argument(
        "--decay",
        type=decay_text.parse,
        metavar="DECAY",
        help="what it was averaged with (default: not recorded)",
    )
    parser.add_argument(
        "--average",
        type=parsing.place,
        default="ExponentialMovingAverage",
        metavar="NAME",
        help="last part of the averages' names (default: %(default)s)",
    )
    parser.add_argument(
        "--scope",
        type=parsing.place,
        metavar="SCOPE",
        help="that the averages were made in, where a variable has several",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list what would become of each variable, and write nothing",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print what was brought as JSON; needs no rich",
    )


def _run(args: argparse.Namespace) -> int:
    if not args.json:
        import rich  # noqa: F401 missed before the work, not after it
    with _quiet():
        import tensorflow  # pyright: ignore[reportMissingModuleSource]

    from ema_optax import tensorflow

    done = tensorflow.import_checkpoint(
        args.source,
        args.out,
        step=args.step,
        decay=args.decay[1] if args.decay else None,
        average=args.average,
        scope=args.scope,
        dry_run=args.dry_run,
        progress=False if args.json else None,
    )
    if args.json:
        parsing.print_json(dataclasses.asdict(done))
    else:
        _print(done, written=not args.dry_run)
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TensorFlow from telling stderr what processor there is, when imported.

    It does so below Python, and before it can be told not to.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _print(done: "Imported", *, written: bool) -> None:
    from ema_optax._cli import tables

    parsing.print_lines(
        {
            "From": done.source,
            "To": f"{done.path}, step {done.step}{'' if written else ', not written'}",
            "Averaged": f"{len(done.averaged):,} params with a shadow",
            "Scopes": ", ".join(filter(None, done.scopes)) or None,
        }
    )
    table = tables.table(("not averaged", "what it is", "what became of it"))
    for path in done.raw:
        table.add_row(parsing.printable(path), "no shadow", "raw in both trees")
    for name, path in done.moved.items():
        cells = (name, "a scope of others too", f"is {path}")
        table.add_row(*map(parsing.printable, cells))
    for role in dict.fromkeys(done.left_out.values()):
        names = [name for name, what in done.left_out.items() if what == role]
        cells = (some(names), role, "left out")
        table.add_row(*map(parsing.printable, cells))
    if table.row_count:
        tables.console().print(table)
