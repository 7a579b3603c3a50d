"""A progress bar on the terminal, where there is one to look at it."""

import sys
from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

_T = TypeVar("_T")


def tracked(
    items: Iterable[_T], text: str, progress: bool | None
) -> Generator[_T, None, None]:
    """Yields the items, and draws on stderr how many there were.

    Args:
        items: Any iterable; where it has a length, the bar has an end.
        text: What is done with them.
        progress: True draws anywhere, False nowhere, None where stderr is a terminal
            and rich is installed.

    Raises:
        ModuleNotFoundError: If a bar was asked for, and rich is missing.
    """
    if progress or (progress is None and sys.stderr.isatty()):
        try:
            import rich.console
            import rich.progress as bars
        except ModuleNotFoundError as error:
            if progress:
                raise ModuleNotFoundError(
                    "progress=True draws with rich, which is not installed: "
                    "pip install 'ema-optax[cli]'. progress=None goes without.",
                    name=error.name,
                ) from error
        else:
            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
            )
            console = rich.console.Console(stderr=True)
            with bars.Progress(*columns, console=console) as bar:
                total = len(items) if isinstance(items, Sized) else None
                task = bar.add_task(text, total=total)
                for item in items:
                    yield item
                    bar.advance(task)
            return
    yield from items
