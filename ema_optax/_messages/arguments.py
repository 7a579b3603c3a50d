"""Checks of arguments: each returns the value, or raises an error with an example."""

import operator
import os
from pathlib import Path
from typing import Any, SupportsIndex, cast

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax._messages.text import brief


def path(value: object, name: str, example: str) -> str:
    """Returns a path, or a URL, as text.

    Raises:
        TypeError: If it is neither text nor a path.

    >>> path("run/checkpoints", "directory", "run")
    'run/checkpoints'
    """
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(cast("str | os.PathLike[Any]", value))
        if isinstance(text, str) and text:
            return text
    raise TypeError(f"{name} is a path such as {example!r}, got {brief(value)}.")


def local_file(value: object, name: str, example: str) -> Path:
    """Returns the absolute path of a file of this machine, with `~` replaced.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is a URL.
    """
    text = path(value, name, example)
    if "://" in text:
        raise ValueError(
            f"{name} is a local file such as {example!r}, got {text}. Write it here, "
            "and copy it there."
        )
    return Path(text).expanduser().absolute()


def whole(value: object, name: str, least: int, example: str) -> int:
    """Returns a whole number; a scalar integer of NumPy or JAX is one too.

    Raises:
        TypeError: If it is something else; True is no number.
        ValueError: If it is less than `least`.

    >>> whole(np.int64(300), "step", 0, "step=300")
    300
    """
    kind = getattr(value, "dtype", None)
    if not isinstance(value, bool) and kind != np.bool_:
        try:
            number = operator.index(cast(SupportsIndex, value))
        except Exception:  # whatever an array or a tracer raises
            pass
        else:
            if number >= least:
                return number
            raise ValueError(
                f"{name} must be a whole number ≥ {least}, got {number}. {example}"
            )
    raise TypeError(
        f"{name} must be a whole number ≥ {least}, got {brief(value)}. {example}"
    )


def a_name(value: object, name: str, example: str) -> str:
    """Returns a name.

    Raises:
        TypeError: If it is no text.
    """
    if isinstance(value, str):
        return value
    raise TypeError(f"{name} is a text such as {example!r}, got {brief(value)}.")


def flag(value: object, name: str) -> bool:
    """Returns a truth value.

    Raises:
        TypeError: If it is neither True nor False.
    """
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {brief(value)}.")


def dtype(value: object, name: str) -> Any:
    """Returns a dtype, by a name, a type or a dtype.

    Raises:
        TypeError: If it is none.

    >>> dtype("bfloat16", "shadow_dtype")
    dtype(bfloat16)
    """
    try:
        if isinstance(value, (str, type, np.dtype)) or hasattr(value, "dtype"):
            return jnp.dtype(cast(Any, value))
    except Exception:  # NumPy raises errors of several types
        pass
    raise TypeError(
        f"{name} must be a dtype such as 'float32' or jax.numpy.bfloat16, got "
        f"{brief(value)}."
    )


def numbers(value: object, name: str) -> np.ndarray:
    """Returns a number, or an array of numbers, as float64.

    Raises:
        TypeError: If it is no number.

    >>> numbers([1, 2], "steps")
    array([1., 2.])
    """
    try:
        if isinstance(value, (list, tuple, range, int, float)) or hasattr(
            value, "dtype"
        ):
            return np.asarray(cast(Any, value), np.float64)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be numbers, got {brief(value)}.")


def ascending(value: object, name: str) -> np.ndarray:
    """Returns steps as an array of integers, at least one.

    Raises:
        ValueError: If they are not ascending whole numbers ≥ 0.

    >>> ascending([100, 200], "steps")
    array([100, 200])
    """
    steps = np.asarray(value)
    if (
        steps.ndim != 1
        or not steps.size
        or not np.issubdtype(steps.dtype, np.integer)
        or steps[0] < 0
        or np.any(np.diff(steps) <= 0)
    ):
        raise ValueError(
            f"{name} must be ascending whole numbers ≥ 0, got {brief(value)}."
        )
    return steps


def one_number(value: object, name: str) -> None:
    """Refuses anything but one number: of Python, or an array without axes, or traced.

    Raises:
        TypeError: If it is no number, or several; True is no number.

    >>> one_number([0.9], "factor")
    Traceback (most recent call last):
    TypeError: factor must be one number, got [0.9].
    """
    kinds = (int, float, np.number, np.ndarray, jax.Array)
    if (
        not isinstance(value, kinds)
        or np.ndim(cast(Any, value))
        or isinstance(value, bool)
    ):
        raise TypeError(f"{name} must be one number, got {brief(value)}.")
