"""Arguments and error lines that all commands share."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ema_optax._messages.text import one_line

PICTURES = (".png", ".svg", ".pdf")
_LONGEST = 2**24  # characters of a JSON file


class Parser(argparse.ArgumentParser):
    """Reads the arguments of `ema-optax`, or of one of its commands.

    Attributes:
        arguments: All arguments that were added, `--help` included.
    """

    def __init__(self, **settings: object) -> None:
        self.arguments: list[argparse.Action] = []
        super().__init__(**settings)  # pyright: ignore[reportArgumentType] argparse's

    def add_argument(self, *args: object, **settings: object) -> argparse.Action:
        """Adds an argument, as argparse does."""
        argument = super().add_argument(*args, **settings)  # pyright: ignore[reportArgumentType] argparse's
        self.arguments.append(argument)
        return argument

    def error(self, message: str) -> NoReturn:
        """Ends with one line, where argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help\n")


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
    explain: Callable[[Exception], str] | None = None,
    on_cpu: bool = False,
) -> Parser:
    """Adds a command; its packages come with the `extra`.

    `explain` turns any error into the line that is printed; None lets errors through.
    """
    if on_cpu:
        details += "\n\nWorks on the CPU, unless JAX_PLATFORMS says otherwise."
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}\n\n{details}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(
        command=command, name=name, extra=extra, explain=explain, on_cpu=on_cpu
    )
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
    """Reads a path of this machine, and refuses a URL."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"needs a local file, got {text}")
    return Path(place(text))


def picture(text: str) -> Path:
    """Reads the path of a picture, and refuses one of another format."""
    file = path(text)
    if file.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"needs a file that ends in {', '.join(PICTURES)}, got {text!r}"
        )
    return file


def place(text: str) -> str:
    """Reads a path, or a URL of a storage that Orbax knows."""
    if not text:  # would be the current folder
        raise argparse.ArgumentTypeError("needs a path, got an empty text")
    return text


def json_file(text: str, hook: Callable[[Any], Any] | None = None) -> Any:
    """Reads a JSON file of this machine; `hook` makes its objects from their pairs.

    Raises:
        argparse.ArgumentTypeError: If the file cannot be read, or is too large.
    """
    try:
        with path(text).open(encoding="utf-8") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST:,} characters")
        return json.loads(content, object_pairs_hook=hook)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot read {text}: {reason}") from None


def fail(line: str) -> int:
    """Prints one line on stderr and returns the exit code of a failure."""
    tell(line)
    return 1


def tell(line: str) -> None:
    """Prints one line on stderr."""
    print(printable(line), file=sys.stderr)


def print_lines(values: Mapping[str, object]) -> None:
    """Prints a line for each value that is not None, with its name before it."""
    width = max(map(len, values)) + 2
    for name, value in values.items():
        if value is not None:
            print(f"{name + ':':<{width}}{printable(str(value))}")


def print_json(figures: Mapping[str, object]) -> None:
    """Prints values as JSON for programs, with paths as text."""
    print(json.dumps(figures, indent=2, default=str), flush=True)


def explained(error: Exception) -> str:
    """Writes an error on one line, with a command's options in place of arguments."""
    line = one_line(error, limit=None)
    if not isinstance(error, (OSError, ValueError, TypeError, OverflowError)):
        line = f"{type(error).__name__}: {line}"
    return as_options(line)


def as_options(text: str) -> str:
    """Rewrites the arguments that an error names as options of a command.

    >>> as_options("Pass step=300, or tree='shadow/fast'.")
    'Pass --step 300, or --tree shadow/fast.'
    """
    text = text.replace("overwrite=True", "--force")
    if "rename={" in text:
        text = text.replace("rename={", "--rename with {").replace(": None", ": null")
    return re.sub(
        r"\b(step|tree|dtype|average|scope|max-shard-size|name)='?([^\s',:;.]+)'?",
        r"--\1 \2",
        text.replace("max_shard_size=", "max-shard-size="),
    )


def printable(text: str) -> str:
    r"""Escapes characters that a terminal would act on, in names that others chose.

    >>> printable("\x1b[2J cleared\n")
    '\\x1b[2J cleared\\n'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
