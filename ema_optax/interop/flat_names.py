"""Flat names of leaves from their paths, renamed by whole leaves or by beginnings."""

from collections.abc import Collection, Iterator, Mapping
from typing import cast

from ema_optax.text import brief, nearest

_LONGEST = 4096  # characters of a name
SEPARATOR = "."  # of PyTorch's state dicts, and of Flax models among safetensors


def flat_names(
    paths: Collection[str], rename: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """Returns the name of each path that is not left out.

    Args:
        paths: Stored paths, their keys joined by slashes.
        rename: A mapping of stored paths, or beginnings of them, to names. The longest
            that fits counts, `""` fits every path, and None leaves out.

    Raises:
        TypeError: If `rename` is no such mapping.
        ValueError: If it names what is not there, or two leaves have one name.

    >>> flat_names(["dense/kernel", "dense/bias"], {"dense": "model.fc"})
    {'dense/kernel': 'model.fc.kernel', 'dense/bias': 'model.fc.bias'}
    """
    rename = _checked({} if rename is None else rename)
    unused = set(rename)
    for path in paths:
        unused.difference_update(_beginnings(path))
    if unused:
        key = min(unused)
        some = {part for path in list(paths)[:1000] for part in _beginnings(path)}
        raise ValueError(
            f"rename has {brief(key, 200)}, and no leaf has this path or begins with "
            f"it. {nearest(key, sorted(some - {''}))}"
        )
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path in paths:
        name = _name(path, rename)
        if name is None:
            continue
        _check(name, path)
        if name in owners:
            raise ValueError(
                f"'{owners[name]}' and '{path}' would both be called '{name}'. Rename "
                f'one of them: rename={{"{path}": …}}.'
            )
        names[path], owners[name] = name, path
    if not names:
        raise ValueError("No leaf is left to write: rename leaves all of them out.")
    return names


def _checked(rename: object) -> Mapping[str, str | None]:
    if not isinstance(rename, Mapping):
        raise TypeError(
            f"rename maps stored paths to names, got a {type(rename).__name__}. Pass "
            '{"encoder": "model.encoder"}.'
        )
    for key, value in rename.items():
        if not isinstance(key, str) or not (value is None or isinstance(value, str)):
            raise TypeError(
                f"rename maps stored paths to names, both text, or to None to leave "
                f"out; got {brief(key)}: {brief(value)}."
            )
    return cast(Mapping[str, str | None], rename)


def _beginnings(path: str) -> Iterator[str]:
    """Yields a path and what it begins with, in whole keys, down to nothing."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def _name(path: str, rename: Mapping[str, str | None]) -> str | None:
    for beginning in _beginnings(path):  # the longest first
        if beginning in rename:
            new, rest = rename[beginning], path[len(beginning) :].strip("/")
            parts = (new, rest.replace("/", SEPARATOR))
            return None if new is None else SEPARATOR.join(p for p in parts if p)
    return path.replace("/", SEPARATOR)


def _check(name: str, path: str) -> None:
    """Refuses what would make a file that cannot be read."""
    wrong = None
    if not name:
        wrong = "an empty name"
    elif name == "__metadata__":
        wrong = "the name '__metadata__', which the format keeps for itself"
    elif not name.isprintable():
        wrong = f"the name {brief(name)}, with characters that cannot be printed"
    elif len(name) > _LONGEST:
        wrong = f"the name {brief(name)}, of {len(name):,} characters"
    if wrong:
        raise ValueError(
            f"'{path}' would get {wrong}. Give it another: "
            f'rename={{"{path}": "weights"}}.'
        )
