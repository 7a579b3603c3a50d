"""A progress bar with rich on stderr, or a function of the user's instead."""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from typing import Protocol, TypeAlias, TypeVar

from ema_optax._messages import arguments, extras

Progress: TypeAlias = bool | Callable[[int, int], None] | None
_T = TypeVar("_T")


class Report(Protocol):
    """Reports how much of the work is done, with a note beside the bar."""

    def __call__(self, done: int, note: str | None = None) -> None:
        """Reports."""
        ...


@contextlib.contextmanager
def shown(progress: Progress, text: str, total: int | None) -> Iterator[Report]:
    """Draws a bar until the work is done, and gives the function that moves it.

    Args:
        progress: True draws anywhere, and leaves the last state where stderr is no
            terminal; False draws nowhere; None draws where stderr is a terminal and
            rich is installed. A function is called with the work done and all of it.
        text: Name of the work, beside the bar.
        total: All of the work; None where it is not known, and functions get the work
            done in its place.

    Raises:
        ModuleNotFoundError: If a bar was asked for, and rich is missing.
    """
    if progress is not None and not callable(progress):
        progress = arguments.flag(progress, "progress")
    if callable(progress):
        yield lambda done, note=None: progress(done, done if total is None else total)
        return
    if progress or (progress is None and sys.stderr.isatty()):
        try:
            with extras.needed_by("progress=True", "progress=None goes without."):
                import rich.console
                import rich.progress as bars
        except ModuleNotFoundError:
            if progress:
                raise
        else:
            console = rich.console.Console(stderr=True)
            columns = (
                bars.TextColumn("{task.description}"),
                bars.BarColumn(),
                bars.TaskProgressColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                bars.TextColumn("{task.fields[note]}"),
            )
            transient = console.is_terminal
            with bars.Progress(*columns, console=console, transient=transient) as bar:
                task = bar.add_task(text, total=total, note="")

                def update(done: int, note: str | None = None) -> None:
                    bar.update(task, completed=done)
                    if note is not None:
                        bar.update(task, note=note)

                yield update
            return
    yield lambda done, note=None: None


def tracked(
    items: Iterable[_T], text: str, progress: Progress
) -> Generator[_T, None, None]:
    """Yields items, and reports how many it has yielded.

    Close the generator where an error may leave it unfinished: a traceback keeps the
    bar alive.

    Args:
        items: Any iterable; where it has a length, the bar has an end.
        text: Name of the work, beside the bar.
        progress: As in `shown`.
    """
    total = len(items) if isinstance(items, Sized) else None
    with shown(progress, text, total) as report:
        for done, item in enumerate(items, start=1):
            yield item
            report(done)
