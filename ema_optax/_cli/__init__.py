"""The command `ema-optax`: parse, call, print. One file a command."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import jax

import ema_optax
from ema_optax._cli import (
    adopt,
    choose,
    completion,
    demo,
    export,
    import_tf,
    import_torch,
    inspect,
    interrupts,
    merge,
    parsing,
    profile,
    reconstruct,
)
from ema_optax._messages import extras

__all__ = ["main"]

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the command's name. None takes the arguments of this
            process, which Ctrl-C then ends with one line.

    Returns:
        The exit code: 0 on success, 1 on an error, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 0 after `--help` and `--version`; with code 2 if the
            arguments are wrong.
    """
    if argv is not None:
        return _run(argv)
    try:
        with interrupts.raised_for_sure():
            return _run(None)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # stderr may be closed
            parsing.tell("ema-optax: interrupted")
        return _INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if argv is None and args.on_cpu and "JAX_PLATFORMS" not in os.environ:
        # JAX would take an accelerator's memory, which a training run beside needs.
        jax.config.update("jax_platforms", "cpu")
    try:
        return args.command(args)
    except BrokenPipeError:  # `ema-optax … | head` closes the pipe early
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        return 1
    except ModuleNotFoundError as error:
        caller = f"'ema-optax {args.name}'"
        advice = extras.advice(caller, error, extra=args.extra)
        if advice is None:
            raise
        return parsing.fail(advice)
    except Exception as error:
        if args.explain is None or isinstance(error, ImportError):
            raise
        return parsing.fail(f"ema-optax {args.name}: error: {args.explain(error)}")


def _parser() -> parsing.Parser:
    parser = parsing.Parser(
        prog="ema-optax",
        description=(
            "Inspects, makes and converts averages of model parameters (EMA) of JAX\n"
            "and Optax."
        ),
        epilog=(
            "examples:\n"
            "  ema-optax demo\n"
            "  ema-optax profile --decay 0.9999 --steps 100000\n"
            "  ema-optax inspect run/checkpoints\n"
            "\n"
            "'ema-optax COMMAND --help' explains a command, with examples."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {ema_optax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (
        adopt,
        choose,
        demo,
        export,
        import_tf,
        import_torch,
        inspect,
        merge,
        profile,
        reconstruct,
    ):
        command.add(commands)
    completion.add(commands, parser)
    return parser
