"""`ema-optax adopt`: its arguments, and how it prints the result."""

import argparse
import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

from ema_optax._cli import options, parsing
from ema_optax._messages.layout_names import LAYOUTS
from ema_optax._messages.text import some

if TYPE_CHECKING:
    from ema_optax.checkpoint import Adopted


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    width = max(map(len, LAYOUTS))
    parser = parsing.add_command(
        commands,
        "adopt",
        command=_run,
        extra="cli",
        explain=_explained,
        on_cpu=True,
        summary="Convert a checkpoint of another JAX program to ema_optax's format.",
        details=(
            "SOURCE is one of these, on a disk or at gs://…:\n"
            "  - the folder of a CheckpointManager, of a step, or of an item in it;\n"
            "  - a folder of zarr arrays, as axlearn and Levanter write them;\n"
            "  - a msgpack file of flax.serialization.\n"
            "Params and average are copied as they are, optimizer states left out.\n"
            "\n"
            "PATH is a path in the tree of the step, such as state/ema_params. If a\n"
            "step has several items, it begins with the name of the item. Without\n"
            "--params and --shadow the command tries these layouts:\n"
            "\n"
            + "".join(f"  {name:{width}}  {about}\n" for name, about in LAYOUTS.items())
            + "\n"
            "--shadow none is for a run without an average: the average starts as a\n"
            "copy of the params, with count 0. Nothing is overwritten. Memory holds\n"
            "params and average, and a few leaves more.\n"
            "\n"
            "Few programs record the decay. If you know it, pass it: constant:0.9999\n"
            "is the plain average, 0.9999 the one with TensorFlow's warm-up.\n"
            "'ema-optax profile --help' lists the others."
        ),
        examples=(
            "  ema-optax adopt old_run --dry-run --out adopted\n"
            "  ema-optax adopt old_run --params state/params \\\n"
            "      --shadow state/ema_params --decay constant:0.9999 --out adopted\n"
            "  ema-optax inspect adopted"
        ),
    )
    options.add_source(parser, "checkpoint")
    options.add_out(parser, required=True)
    parser.add_argument(
        "--params", metavar="PATH", help="where the params are (default: searched)"
    )
    parser.add_argument(
        "--shadow",
        type=parsing.place,
        default="auto",
        metavar="PATH",
        help="where the average is, or none (default: searched)",
    )
    parser.add_argument(
        "--like", metavar="LAYOUT", help="try this layout alone, see above"
    )
    options.add_step(parser, default="the newest, by its folder's name")
    parser.add_argument(
        "--count",
        type=_count,
        metavar="N|PATH",
        help="updates that the average has seen (default: as recorded, else the step)",
    )
    options.add_decay(parser)
    parser.add_argument(
        "--zero-started",
        action=argparse.BooleanOptionalAction,
        help="the average began at zero: divide it by 1−β^count; needs --decay",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="allow params without an average: both trees hold them raw",
    )
    options.add_dry_run(parser)
    options.add_json(parser)


def _count(text: str) -> int | str:
    """Reads `--count`: a number of updates, or the path of that number."""
    if text.strip().lstrip("-").isdecimal():
        return parsing.at_least(0)(text)
    return parsing.place(text)


def _explained(error: Exception) -> str:
    """Writes an error on one line, with options in place of arguments."""
    line = parsing.explained(error)
    for argument, option in {
        "shadow=None": "--shadow none",
        "partial=True": "--partial",
        "like='axlearn'": "--like axlearn",
        "zero_started=True": "--zero-started",
        "zero_started=False": "--no-zero-started",
        "Leave zero_started out": "Leave --zero-started out",
    }.items():
        line = line.replace(argument, option)
    line = re.sub(r"decay=constant\(([^)]*)\)", r"--decay constant:\1", line)
    return re.sub(r"\b(params|shadow|count)=(?='|…|\d)", r"--\1 ", line)


def _run(args: argparse.Namespace) -> int:
    if not args.json:
        import rich  # noqa: F401 if it is missing, fail before the work

    from ema_optax import checkpoint

    adopted = checkpoint.adopt(
        args.source,
        args.out,
        params=args.params,
        shadow=None if args.shadow == "none" else args.shadow,
        like=args.like,
        step=args.step,
        count=args.count,
        decay=args.decay[1] if args.decay else None,
        zero_started=args.zero_started,
        partial=args.partial,
        dry_run=args.dry_run,
        progress=None,
    )
    if args.json:
        parsing.print_json(_as_json(adopted))
    else:
        _print(adopted, dry_run=args.dry_run)
    return 0


def _as_json(adopted: "Adopted") -> dict[str, Any]:
    decay = None if adopted.decay is None else json.loads(adopted.decay.to_json())
    fields = dataclasses.fields(adopted)
    values = {field.name: getattr(adopted, field.name) for field in fields}
    return values | {"decay": decay}


def _print(adopted: "Adopted", *, dry_run: bool) -> None:
    from rich.filesize import decimal

    from ema_optax._cli import tables

    numbers = [f"{path} = {value:.6g}" for path, value in adopted.beside.items()]
    parsing.print_lines(
        {
            "From": f"{adopted.source}, {adopted.kind}",
            "Layout": adopted.layout,
            "To": f"{adopted.path}, step {adopted.step}",
            "Count": f"{adopted.count:,}, {_origin(adopted.count_from)}",
            "Decay": "not recorded" if adopted.decay is None else adopted.decay,
            "Lies beside": ", ".join(numbers) or None,
            "Divided": "by 1−β^count: it began at zero"
            if adopted.zero_started
            else None,
            "Distance": _distance(adopted),
        }
    )
    table = tables.table(("tree", "from", "leaves", "size"), right=("leaves", "size"))
    params = len(adopted.averaged) + len(adopted.raw) + adopted.others
    rows = {
        "params": (adopted.params or "all", f"{params:,}", adopted.bytes["params"]),
        "shadow": (
            adopted.shadow or "none: a copy of the params",
            f"{len(adopted.averaged):,}",
            adopted.bytes["shadow"],
        ),
    }
    for tree, (path, leaves, size) in rows.items():
        table.add_row(tree, parsing.printable(path), leaves, decimal(size))
    for path, size in adopted.left_out.items():
        table.add_row("left out", parsing.printable(path), "", decimal(size))
    tables.console().print(table)
    for paths, what in (
        (adopted.raw, "have no average and are raw in both trees"),
        (
            adopted.narrow,
            "have an average narrower than float32, which rounds away what"
            " moves slowly",
        ),
    ):
        if paths:
            print(parsing.printable(f"{len(paths):,} params {what}: {some(paths)}"))
    if dry_run:
        print("Nothing was written: a dry run.")


def _origin(count_from: str) -> str:
    if count_from == "the step's number":
        return "the step's number: it is not recorded"
    return (
        count_from
        if count_from.startswith(("as told", "none"))
        else f"from {count_from}"
    )


def _distance(adopted: "Adopted") -> str | None:
    """Writes the distance of the average from the params, if it was measured."""
    if adopted.distance is None or adopted.shadow is None:
        return None
    doubt = (
        "; an average of params is nearer, look what it is"
        if adopted.distance > 0.9
        else ""
    )
    return f"{adopted.distance:.3g} of the params' norm{doubt}"
