"""The command `ema-optax`: parse, call, print."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import ema_optax

_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the command's name. None takes those of this process
            and lets Ctrl-C end it.

    Returns:
        The exit code: 0, or 1 where the command could not do its work.

    Raises:
        SystemExit: After `--help` and `--version` with code 0; with code 2 where the
            arguments are wrong.
    """
    # A shell that starts a job in the background has it ignore Ctrl-C: let it.
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "ema_optax"):
            raise
        return _fail(
            f"'ema-optax {args.name}' needs {missing}, which is not installed. "
            f"Run: pip install 'ema-optax[{args.extra}]'"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends with one line, where argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ema-optax", description="Parameter averaging for JAX and Optax."
    )
    version = f"%(prog)s {ema_optax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    *,
    command: Callable[[argparse.Namespace], int],
    extra: str,
    summary: str,
    details: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a command that needs the optional packages of `extra`."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{details}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command, name=name, extra=extra)
    return parser


def _add_demo(
    commands: "argparse._SubParsersAction[_Parser]",
) -> None:
    parser = _add_command(
        commands,
        "demo",
        command=_demo,
        extra="demo",
        summary="Train on handwritten digits and compare params with their shadow.",
        details=(
            "Trains a small Flax classifier on scikit-learn's digits, saves params\n"
            "and shadow side by side with Orbax, restores each into a fresh model,\n"
            "and prints the test accuracy of both before and after. Takes about 15\n"
            "seconds on two cores and needs no network.\n"
            "\n"
            "DIR may be missing, empty, or an earlier demo's: then that demo's\n"
            "checkpoint and picture are replaced, and other files stay. The demo\n"
            "writes checkpoints/N, accuracy.png and demo.json."
        ),
        examples=(
            "  ema-optax demo\n"
            "  ema-optax demo --steps 300 --seed 4\n"
            "  ema-optax demo --out /tmp/digits"
        ),
    )
    parser.add_argument(
        "--steps",
        type=_at_least(1),
        default=1000,
        metavar="N",
        help="optimizer updates to train for (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=_path,
        default=Path("demo-run"),
        metavar="DIR",
        help="folder for what the demo writes, made if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_at_least(0),
        default=0,
        metavar="S",
        help="decides initial params, batches and test split (default: %(default)s)",
    )


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ema_optax import demo

    try:
        run = demo.run(steps=args.steps, out=args.out, seed=args.seed)
    except demo.DemoError as error:
        return _fail(f"ema-optax demo: error: {error}")
    table = Table(title="Accuracy on held-out digits")
    table.add_column("")
    for column in ("trained", "restored", "logits"):
        table.add_column(column, justify="right")
    for c in run.comparisons:
        name = {"params": "raw params"}.get(c.tree, c.tree)
        same = "identical" if c.exact else "DIFFERENT"
        table.add_row(name, f"{c.before:.2%}", f"{c.after:.2%}", same)
    Console().print(table)
    print(f"Picture:    {run.picture}\nCheckpoint: {run.checkpoint}")
    if not all(c.exact for c in run.comparisons):
        return _fail(
            "ema-optax demo: error: a restored model does not answer exactly as it did "
            "before, see the table above"
        )
    return 0


def _at_least(lowest: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `lowest` up to what an int32 holds."""

    def parse(text: str) -> int:
        highest = 2**31 - 1  # JAX counts in int32
        if not text.strip().isdecimal() or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(
                f"needs a whole number from {lowest} to {highest}, got {text!r}"
            )
        return int(text)

    return parse


def _path(text: str) -> Path:
    if not text:  # Path("") would be the current folder
        raise argparse.ArgumentTypeError("needs a path, got an empty text")
    return Path(text)


def _fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at Ctrl-C with one line, wherever it was.

    A KeyboardInterrupt would not do: raised within an import, a destructor or the join
    of a saving thread it prints tracebacks, or is swallowed and the work goes on.
    """
    del number, frame
    # A progress bar has hidden the cursor, and its line is still open.
    restore = "\x1b[?25h\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # there may be no stderr to write to
        os.write(2, f"{restore}ema-optax: interrupted\n".encode())
    os._exit(_INTERRUPTED)
