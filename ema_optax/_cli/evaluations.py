"""The user's function that a command calls, by `module:function`."""

import argparse
import contextlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ema_optax._messages.text import nearest, one_line

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def named(text: str) -> str:
    """Checks that a text has the form `module:function`, and imports nothing.

    Raises:
        argparse.ArgumentTypeError: If `text` has another form.

    >>> named("evaluation:loss")
    'evaluation:loss'
    """
    if not _FORM.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"needs module:function, such as evaluation:loss for loss(params) of "
            f"evaluation.py in this folder, got {text!r}"
        )
    return text


def loaded(text: str) -> Callable[[Any], Any]:
    """Imports a module, from the current folder first, and returns its function.

    What the function prints goes to stderr, so that JSON stays JSON.

    Raises:
        ValueError: If there is no such module or function, or the module raises.
    """
    name, _, attribute = text.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            target: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(_raised(name, error)) from error
        raise ValueError(
            f"There is no module {error.name!r}: no {error.name}.py in {folder}, and "
            "none that is installed."
        ) from None
    except Exception as error:  # whatever the user's code raises
        raise ValueError(_raised(name, error)) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [each for each in vars(target) if not each.startswith("_")]
            near = f" {nearest(part, names)}" if names else ""
            raise ValueError(f"{text!r}: {name} has no {part!r}.{near}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(
            f"{text!r} is no function but {type(target).__name__}. It is called with "
            "the params."
        )

    def quiet(params: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return target(params)

    return quiet


def _raised(name: str, error: Exception) -> str:
    """Writes the error that a module raised, with its file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = "" if not frames else f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return (
        f"The module {name!r} cannot be imported: {type(error).__name__}: "
        f"{one_line(error)}{where}"
    )
