"""What all commands share: how arguments are read, and how errors are told."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias


class Parser(argparse.ArgumentParser):
    """Reads the arguments of the command, and those of each of its commands."""

    def error(self, message: str) -> NoReturn:
        """Ends with one line, where argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help\n")


# What to clean up where Ctrl-C ends the process at once.
AT_INTERRUPT: list[Callable[[], None]] = []

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(
    commands: Commands,
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


def at_least(lowest: int, *, at_most: int = 2**31 - 1) -> Callable[[str], int]:
    """Returns a parser of whole numbers; JAX counts in int32, hence the default."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or not lowest <= int(text) <= at_most:
            raise argparse.ArgumentTypeError(
                f"needs a whole number from {lowest} to {at_most}, got {text!r}"
            )
        return int(text)

    return parse


def path(text: str) -> Path:
    """Returns a path of this machine."""
    return Path(place(text))


def place(text: str) -> str:
    """Returns a path, or a URL of a storage that Orbax knows."""
    if not text:  # would be the current folder
        raise argparse.ArgumentTypeError("needs a path, got an empty text")
    return text


def fail(line: str) -> int:
    """Prints one line on stderr and returns the exit code of a failure."""
    tell(line)
    return 1


def tell(line: str) -> None:
    """Prints one line on stderr."""
    print(printable(line), file=sys.stderr)


def as_options(text: str) -> str:
    """Returns an error's advice with options of a command where it names arguments.

    >>> as_options("Pass step=300, or tree='shadow/fast'.")
    'Pass --step 300, or --tree shadow/fast.'
    """
    text = text.replace("overwrite=True", "--force")
    if "rename={" in text:
        text = text.replace("rename={", "--rename with {").replace(": None", ": null")
    return re.sub(r"\b(step|tree|dtype|average)='?([^\s',:;.]+)'?", r"--\1 \2", text)


def printable(text: str) -> str:
    r"""Returns one line that a terminal shows as it is, whoever chose the names in it.

    >>> printable("\x1b[2J cleared\n")
    '\\x1b[2J cleared\\n'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
