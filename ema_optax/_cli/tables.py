"""Tables on the terminal, with names from files shown as they are."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Opens stdout without markup, and without a limit of width in a pipe or file."""
    stdout = Console(markup=False, emoji=False, highlight=False)
    if not stdout.is_terminal:
        stdout.width = 100_000
    return stdout


def table(columns: Iterable[str], *, right: Iterable[str] = ()) -> Table:
    """Returns an empty table.

    Args:
        columns: Heads of the columns; a text that does not fit is wrapped.
        right: Heads of the columns with numbers, which are aligned to the right.
    """
    empty = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        side = "right" if column in right else "left"
        empty.add_column(column, justify=side, overflow="fold")
    return empty
