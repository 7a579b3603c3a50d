"""`ema-optax completion`: its arguments, and what it does with them."""

import argparse
from typing import Any

from ema_optax.cli import parsing

_SHELLS = ("bash", "zsh", "tcsh")
_FOLDERS, _FILES = ("DIR", "RUN"), ("FILE", "CKPT")  # what arguments are called


def add(commands: parsing.Commands, root: argparse.ArgumentParser) -> None:
    """Adds the command, which completes those of `root`."""
    parser = parsing.add_command(
        commands,
        "completion",
        command=lambda args: _run(args, root),
        extra="cli",
        summary="Print a script by which a shell completes these commands.",
        details=(
            "Commands, options, their values, files and folders. Completing runs\n"
            "nothing of this library. Print it anew after an upgrade."
        ),
        examples=(
            '  eval "$(ema-optax completion bash)"   # in ~/.bashrc\n'
            "  ema-optax completion bash \\\n"
            "      > ~/.local/share/bash-completion/completions/ema-optax\n"
            "  ema-optax completion zsh > ~/.zfunc/_ema-optax"
        ),
    )
    parser.add_argument("shell", choices=_SHELLS)


def _run(args: argparse.Namespace, root: argparse.ArgumentParser) -> int:
    import shtab

    for action in _actions(root):
        if action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY
        elif action.metavar in _FILES:
            action.complete = shtab.FILE
    print(shtab.complete(root, shell=args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> list[Any]:
    """Returns the arguments of a parser and of its commands."""
    found: list[Any] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _actions(command)
    return found
