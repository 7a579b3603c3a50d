"""The command `ema-optax`: parse, call, print. One file a command."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import ema_optax
from ema_optax.cli import (
    completion,
    demo,
    export,
    import_tf,
    inspect,
    parsing,
    profile,
    reconstruct,
)

__all__ = ["main"]

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
    args.alone = argv is None  # in a process of its own
    try:
        return args.command(args)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "ema_optax"):
            raise
        return parsing.fail(
            f"'ema-optax {args.name}' needs {missing}, which is not installed. "
            f"Run: pip install 'ema-optax[{args.extra}]'"
        )


def _parser() -> parsing.Parser:
    parser = parsing.Parser(
        prog="ema-optax", description="Parameter averaging for JAX and Optax."
    )
    version = f"%(prog)s {ema_optax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (demo, export, import_tf, inspect, profile, reconstruct):
        command.add(commands)
    completion.add(commands, parser)
    return parser


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process at Ctrl-C with one line, wherever it was.

    A KeyboardInterrupt would not do: raised within an import, a destructor or the join
    of a saving thread it prints tracebacks, or is swallowed and the work goes on.
    """
    del number, frame
    for clean_up in parsing.AT_INTERRUPT:
        clean_up()
    # A progress bar has hidden the cursor, and its line is still open.
    restore = "\x1b[?25h\n" if os.isatty(2) else ""
    with contextlib.suppress(OSError):  # there may be no stderr to write to
        os.write(2, f"{restore}ema-optax: interrupted\n".encode())
    os._exit(_INTERRUPTED)
