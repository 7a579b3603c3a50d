"""Tables on the terminal, with names from files shown as they are."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Returns where to print, without markup and as wide as a pipe lets it be."""
    made = Console(markup=False, emoji=False, highlight=False)
    if not made.is_terminal:
        made.width = 100_000
    return made


def table(columns: Iterable[str], *, right: Iterable[str] = ()) -> Table:
    """Returns an empty table.

    Args:
        columns: Their heads; what does not fit is wrapped.
        right: Those with numbers, which end below each other.
    """
    made = Table(box=box.SIMPLE_HEAVY, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        side = "right" if column in right else "left"
        made.add_column(column, justify=side, overflow="fold")
    return made
