"""Text for errors and tables: bounded values, errors on one line, nearest names."""

import difflib
import os
import re
from collections.abc import Iterable

_ITEMS = 32  # of a list or tuple that is written out


def brief(value: object, limit: int = 100) -> str:
    """Writes a value as Python does, in a few words however large it is.

    Containers inside it become `…`, so that their depth does not matter; a dict or a
    long list is given by its length. Text is cut off after `limit` characters. Objects
    that Python would write with all their elements, or by an address, become the name
    of their type.

    >>> brief("kernel"), brief([1, [2]]), brief({"a": 1}), brief("a" * 9, limit=4)
    ("'kernel'", '[1, …]', 'a dict of 1', "'aaa…")
    >>> brief(int), brief(brief), brief(object())
    ('the class int', 'the function brief', 'an object')
    """
    if isinstance(value, (str, bytes)):
        value = value[: limit + 1]
    if isinstance(value, (list, tuple)) and len(value) <= _ITEMS:
        inner = ", ".join("…" if _is_deep(x) else brief(x, limit) for x in value)
        return _cut(f"[{inner}]" if isinstance(value, list) else f"({inner})", limit)
    if _is_deep(value):
        return f"a {type(value).__name__} of {len(value)}"  # pyright: ignore[reportArgumentType]
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        shape = ",".join(map(str, value.shape))  # pyright: ignore[reportAttributeAccessIssue]
        return f"an array {value.dtype}[{shape}]"  # pyright: ignore[reportAttributeAccessIssue]
    if type(value).__repr__ is object.__repr__ or not _is_plain(value):
        name = getattr(value, "__name__", None)
        if callable(value) and isinstance(name, str):
            return f"the function {name}"
        kind = type(value).__name__
        return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
    try:
        return _cut(repr(value), limit)
    except (ValueError, RecursionError):  # Python writes integers of ≤ 4,300 digits
        return f"a very large {type(value).__name__}"


def one_line(error: object, limit: int | None = 300) -> str:
    r"""Writes an error, or any text, on one line.

    It is cut off after `limit` characters, as TensorStore's errors fill several pages;
    None keeps all of it.

    >>> one_line(ValueError("one\n  two"))
    'one two'
    """
    text = " ".join(str(error).split())
    return text if limit is None else _cut(text, limit)


def nearest(name: str, names: Iterable[str]) -> str:
    """Writes a sentence with the names most like one, or the first few of them.

    >>> nearest("shadwo", ["params", "shadow"])
    "The nearest are 'shadow'."
    """
    known = list(names)
    near = nearest_names(name, known) or known[:3]
    return f"The nearest are {', '.join(map(repr, near))}."


def nearest_names(
    name: str, names: Iterable[str], *, count: int = 3, cutoff: float = 0.3
) -> list[str]:
    """Finds the names most like one, the most alike first.

    `cutoff` is how alike they have to be, from 0 to 1, which means equal.
    """
    return difflib.get_close_matches(name[:200], list(names), count, cutoff)


def some(names: Iterable[str], most: int = 3) -> str:
    """Writes the first names, and how many more there are.

    >>> some("abcde"), some("ab")
    ('a, b, c and 2 more', 'a, b')
    """
    known = list(names)
    more = f" and {len(known) - most:,} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def percent(share: float) -> str:
    """Writes a share of one in percent, or `""` where that rounds to nothing.

    >>> percent(0.123), percent(0.0001)
    ('12.3%', '')
    """
    text = f"{share:.1%}"
    return "" if text == "0.0%" else text


def _is_plain(value: object) -> bool:
    """Whether Python writes a value in a few words for people to read."""
    plain = (str, bytes, bool, int, float, complex, os.PathLike)
    return value is None or isinstance(value, plain) or hasattr(value, "to_json")


def structural(error: object) -> str:
    """Shortens JAX's error on two trees that differ to what it expected, on one line.

    >>> structural("Expected list, got {'w': Array([1.], dtype=float32)}.")
    'Expected list.'
    """
    text = re.split(r",? (?:got |value: |; value)", one_line(error, None))[0]
    return f"{_cut(text.rstrip(' .,;'), 300)}."


def _is_deep(value: object) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
