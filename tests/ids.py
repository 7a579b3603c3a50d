"""Ids of parametrised tests, made of their values: short, and the same everywhere."""

import dataclasses
import functools
import re
import types
from pathlib import PurePath

import numpy as np

LONGEST = 32  # characters of one value


def readable(value):
    """Returns a value as its part of an id, or None where the table has to give one.

    A value counts by what does not differ between machines, versions and runs: arrays
    by dtype and shape, a lambda by the names that it uses, a regular expression without
    its backslashes.
    """
    text = _text(value)
    if text is None:
        return None
    text = re.sub(r"\\(.)", r"\1", text).encode("ascii", "ignore").decode()
    text = "".join(filter(str.isprintable, re.sub(r"\s+", " ", text)))
    longest = len(text) if re.fullmatch(r"[\w.]{,60}", text) else LONGEST  # a name
    return text[:longest].strip() or ("other" if value else repr(value))


def positional(id_, values):
    """Returns the names of those arguments of a test that its id only counts.

    Args:
        id_: Id of the test, such as `arguments0-2`.
        values: The values by argument.
    """
    return [
        name
        for name, value in values.items()
        if readable(value) is None
        and re.search(rf"(^|-)({re.escape(name)}\d+|<lambda>\d*)(-|$)", id_)
    ]


def _text(value):
    """Returns all of a value's text, or None."""
    match value:
        case float():
            return min(str(value), f"{value:.6g}", key=len)
        case None | bool() | int() | complex():
            return str(value)
        case str():
            return value
        case bytes():
            return value.decode("ascii", "ignore")
        case np.generic():
            return _text(value.item())
        case np.dtype():
            return value.name
        case dict():
            return ",".join(f"{_inner(k)}={_inner(v)}" for k, v in value.items())
        case set() | frozenset():
            return ",".join(sorted(map(_inner, value)))
        case PurePath():
            return value.name
        case slice():
            return f"{value.start}:{value.stop}"
        case functools.partial():
            return _call(value.func.__name__, [*value.args, *value.keywords.values()])
        case types.FunctionType() if value.__name__ == "<lambda>":
            names = value.__code__.co_names
            return ".".join(name for name in names if name != "ema_optax") or None
        case type() | types.FunctionType() | types.BuiltinFunctionType():
            return value.__name__
        case types.ModuleType():
            return value.__name__.rpartition(".")[2]
        case BaseException():
            return _call(type(value).__name__, value.args)
    kind = type(value)
    if kind in (list, tuple):
        between = " " if all(isinstance(each, str) for each in value) else ","
        return between.join(map(_inner, value))
    if dataclasses.is_dataclass(kind) and kind.__module__.startswith("ema_optax"):
        said = [
            getattr(value, field.name)
            for field in dataclasses.fields(kind)
            if field.repr and getattr(value, field.name) is not field.default
        ]
        return _call(kind.__name__, said)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return None


def _inner(value):
    """Returns the text of a value within another; its kind at least."""
    text = _text(value)
    if text is None:
        return type(value).__name__
    return f"({text})" if type(value) in (dict, list, tuple) else text or "''"


def _call(name, arguments):
    """Returns a call as it is written, without the names of its arguments."""
    return f"{name}({','.join(map(_inner, arguments))})"
