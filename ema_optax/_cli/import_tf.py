"""`ema-optax import-tf`: its arguments, and what it prints of the import."""

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ema_optax._cli import options, parsing
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
        summary="Convert a TensorFlow checkpoint with averages to ema_optax's format.",
        details=(
            "CKPT is the prefix of a checkpoint, such as run/model.ckpt-300, or a\n"
            "folder, whose latest checkpoint is read. The variable enc/w becomes the\n"
            "param enc/w, and enc/w/ExponentialMovingAverage its shadow, also where\n"
            "the averages have a scope of their own. Where a variable enc lies beside\n"
            "enc/w, it becomes enc/value. Values and dtypes stay as they are, and\n"
            "global_step is the step.\n"
            "\n"
            "The command lists the variables without a shadow, which both trees hold\n"
            "raw, and those left out: optimizer slots, counters, texts. A checkpoint\n"
            "of tf.train.Checkpoint is read if no two of its variables share a name.\n"
            "Memory holds params and shadow. Nothing is overwritten.\n"
            "\n"
            "TensorFlow does not record the decay. If you know it, pass it: 0.9999 is\n"
            "ExponentialMovingAverage(0.9999, num_updates=step), constant:0.9999 the\n"
            "same without num_updates. 'ema-optax profile --help' lists the others."
        ),
        examples=(
            "  ema-optax import-tf old_run/model.ckpt-300000 --out imported\n"
            "  ema-optax import-tf old_run --decay constant:0.9999 --out imported\n"
            "  ema-optax inspect imported"
        ),
    )
    options.add_source(parser, "checkpoint", metavar="CKPT")
    options.add_out(parser, required=True)
    options.add_step(parser, default="the global_step")
    options.add_decay(parser)
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
        help="scope of the averages, where a variable has several",
    )
    options.add_dry_run(parser)
    options.add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if not args.json:
        import rich  # noqa: F401 if it is missing, fail before the work
    with _quiet():
        import tensorflow  # pyright: ignore[reportMissingModuleSource]

    from ema_optax import tensorflow

    imported = tensorflow.import_checkpoint(
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
        parsing.print_json(dataclasses.asdict(imported))
    else:
        _print(imported, written=not args.dry_run)
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what TensorFlow prints of the processor when it is imported.

    TensorFlow writes to stderr below Python, before a setting could tell it not to.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    try:
        with tempfile.TemporaryFile() as discarded:
            os.dup2(discarded.fileno(), 2)
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _print(imported: "Imported", *, written: bool) -> None:
    from ema_optax._cli import tables

    parsing.print_lines(
        {
            "From": imported.source,
            "To": f"{imported.path}, step {imported.step}"
            f"{'' if written else ', not written'}",
            "Averaged": f"{len(imported.averaged):,} params with a shadow",
            "Scopes": ", ".join(filter(None, imported.scopes)) or None,
        }
    )
    table = tables.table(("not averaged", "what it is", "what became of it"))
    for path in imported.raw:
        table.add_row(parsing.printable(path), "no shadow", "raw in both trees")
    for name, path in imported.moved.items():
        cells = (name, "a scope of others too", f"is {path}")
        table.add_row(*map(parsing.printable, cells))
    for role in dict.fromkeys(imported.left_out.values()):
        names = [name for name, what in imported.left_out.items() if what == role]
        cells = (some(names), role, "left out")
        table.add_row(*map(parsing.printable, cells))
    if table.row_count:
        tables.console().print(table)
