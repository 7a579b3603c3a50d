"""Warnings of the library, as lines of stderr."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import TextIO

from ema_optax._cli import parsing


@contextlib.contextmanager
def of(command: str, kind: type[Warning]) -> Iterator[None]:
    """Prints each warning of a kind as one line of stderr, as soon as it comes."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", kind)
        show = warnings.showwarning

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, kind):
                parsing.tell(f"ema-optax {command}: warning: {message}")
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = tell
        yield
