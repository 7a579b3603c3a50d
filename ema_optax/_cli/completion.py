"""`ema-optax completion`: its arguments, and the script that it prints."""

import argparse

from ema_optax._cli import parsing

_SHELLS = ("bash", "zsh", "tcsh")
_FOLDERS, _FILES = ("DIR", "RUN"), ("FILE", "CKPT")  # metavars of arguments


def add(commands: parsing.Commands, root: parsing.Parser) -> None:
    """Adds the command, which completes the commands of `root`."""
    parser = parsing.add_command(
        commands,
        "completion",
        command=lambda args: _run(args, root, commands),
        extra="cli",
        summary="Print a script that completes these commands in your shell.",
        details=(
            "The script completes commands, options, their values, files and folders,\n"
            "without running ema-optax. Print it again after an upgrade."
        ),
        examples=(
            '  eval "$(ema-optax completion bash)"   # in ~/.bashrc\n'
            "  ema-optax completion bash \\\n"
            "      > ~/.local/share/bash-completion/completions/ema-optax\n"
            "  ema-optax completion zsh > ~/.zfunc/_ema-optax"
        ),
    )
    parser.add_argument("shell", choices=_SHELLS)


def _run(
    args: argparse.Namespace, root: parsing.Parser, commands: parsing.Commands
) -> int:
    import shtab

    kinds = dict.fromkeys(_FOLDERS, shtab.DIRECTORY) | dict.fromkeys(_FILES, shtab.FILE)
    for parser in commands.choices.values():
        for argument in parser.arguments:
            if argument.metavar in kinds:
                vars(argument)["complete"] = kinds[argument.metavar]
    print(shtab.complete(root, shell=args.shell))
    return 0
