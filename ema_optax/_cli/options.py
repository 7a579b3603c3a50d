"""Options that several commands share, each with one meaning and one help text."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ema_optax._cli import decay_text, parsing


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose a step: DIR, `--step` and `--item`."""
    parser.add_argument(
        "directory", type=parsing.place, metavar="DIR", help="folder of a run or step"
    )
    add_step(parser)
    add_item(parser)


def add_source(
    parser: argparse.ArgumentParser, what: str, *, metavar: str = "SOURCE"
) -> None:
    """Adds the argument that names what a command converts."""
    parser.add_argument(
        "source", type=parsing.place, metavar=metavar, help=f"{what} to convert"
    )


def add_step(
    parser: argparse.ArgumentParser, *, lowest: int = 0, default: str = "the newest"
) -> None:
    """Adds `--step N`; `default` describes what the command takes without it."""
    parser.add_argument(
        "--step",
        type=parsing.at_least(lowest),
        metavar="N",
        help=f"number of the step (default: {default})",
    )


def add_item(parser: argparse.ArgumentParser) -> None:
    """Adds `--item NAME`."""
    parser.add_argument(
        "--item", metavar="NAME", help="item of the step, where it has several"
    )


def add_tree(
    parser: argparse.ArgumentParser,
    *,
    shown: str,
    default: str | None = None,
    repeated: bool = False,
) -> None:
    """Adds `--tree TREE`; `shown` is the default that the help names."""
    parser.add_argument(
        "--tree",
        type=parsing.place,
        action="append" if repeated else "store",
        default=default,
        metavar="TREE",
        help=f"params, or a shadow by name (default: {shown})",
    )


def add_decay(
    parser: argparse.ArgumentParser, *, default: str = "not recorded"
) -> None:
    """Adds `--decay DECAY`, the decay of an average that was made elsewhere."""
    parser.add_argument(
        "--decay",
        type=decay_text.parse,
        metavar="DECAY",
        help=f"decay of the average (default: {default})",
    )


def add_dtype(parser: argparse.ArgumentParser, leaves: str, *, default: str) -> None:
    """Adds `--dtype`, which applies to the leaves that the help names."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help=f"dtype of the {leaves} leaves (default: {default})",
    )


def add_out(
    parser: argparse.ArgumentParser,
    what: str = "folder",
    *,
    metavar: str = "DIR",
    kind: Callable[[str], str | Path] = parsing.place,
    required: bool = False,
    **settings: Any,
) -> None:
    """Adds `--out`, the folder, file or picture that a command writes."""
    default = " (default: %(default)s)" if "default" in settings else ""
    parser.add_argument(
        "--out",
        type=kind,
        metavar=metavar,
        required=required,
        help=f"{what} to write{default}",
        **settings,
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds `--dry-run`."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be written, and write nothing",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
