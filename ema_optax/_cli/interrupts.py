"""Ctrl-C as a KeyboardInterrupt that cannot be lost on its way."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_LATER = 0.05  # seconds, until a callback or destructor has returned


@contextlib.contextmanager
def raised_for_sure() -> Iterator[None]:
    """Sends Ctrl-C again where the block did not end by it.

    Python can only report an exception from a destructor or from a callback of the
    garbage collector, such as JAX's, and goes on. There 4 of 20 demos lost their
    Ctrl-C.
    """
    usual, timers = sys.unraisablehook, []

    def hook(lost: "sys.UnraisableHookArgs") -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            usual(lost)
            return
        main = threading.main_thread().ident
        timers.append(
            threading.Timer(_LATER, signal.pthread_kill, (main, signal.SIGINT))
        )
        timers[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for timer in timers:
            timer.cancel()
