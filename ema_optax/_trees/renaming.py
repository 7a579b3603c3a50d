"""Renames paths of leaves: by the path, by a beginning of it, or by a pattern."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import cast

from ema_optax._messages.text import brief, nearest

_WILDCARD = re.compile(r"\*\*|\*")


class Renames:
    """A mapping of paths to others, beginnings and patterns of them included.

    A leaf's own path decides alone. Else the longest beginning that is in the mapping
    is replaced, and then the first pattern that fits the result. `*` stands for
    characters of one key and `**` for any number of keys, also none; on the other side
    they stand for the same text, in the same order. A pattern too may fit a beginning.

    Attributes:
        used: The paths that each key of the mapping decided on, until now.

    Raises:
        TypeError: If it is no mapping of texts.
        ValueError: If the two sides of a pattern have other wildcards.

    >>> renames = Renames({"enc": "encoder", "**/kernel": "**/weight", "h_*": "h/*"})
    >>> [renames(path) for path in ("enc/dense/kernel", "kernel", "h_12/bias", "w")]
    ['encoder/dense/weight', 'weight', 'h/12/bias', 'w']
    >>> renames.used["**/kernel"]
    ['enc/dense/kernel', 'kernel']
    """

    def __init__(
        self,
        rename: Mapping[str, str | None] | None,
        what: str = "stored paths to names",
        separator: str = "/",
        may_leave_out: bool = False,
    ) -> None:
        """Initializes the mapping.

        Args:
            rename: Paths to paths, or to names; None renames nothing.
            what: What the mapping maps, for errors.
            separator: Between the keys of the results.
            may_leave_out: Whether a path may be mapped to None.
        """
        checked = _checked({} if rename is None else rename, what, may_leave_out)
        self._separator = separator
        self._literal = {k: v for k, v in checked.items() if "*" not in k}
        self._patterns = {k: v for k, v in checked.items() if "*" in k}
        for key, value in self._patterns.items():
            if value is not None and _wildcards(key) != _wildcards(value):
                raise ValueError(
                    f"rename has the pattern {brief(key, 200)} with "
                    f"{_counted(key)}, and {brief(value, 200)} has {_counted(value)}: "
                    'both sides have the same, as in {"**/kernel": "**/weight"}.'
                )
        self.used: dict[str, list[str]] = {key: [] for key in checked}

    def __call__(self, path: str) -> str | None:
        """Renames a path; None where the mapping leaves it out."""
        new = path
        for beginning in _beginnings(path):  # the longest first
            if beginning in self._literal:
                self.used[beginning].append(path)
                target = self._literal[beginning]
                if target is None:
                    return None
                rest = path[len(beginning) :].strip("/")
                if not rest:
                    return target
                new = f"{target}/{rest}" if target else rest
                break
        for pattern, target in self._patterns.items():
            fit = _fit(pattern.split("/"), new.split("/"))
            if fit is None:
                continue
            self.used[pattern].append(path)
            if target is None:
                return None
            texts, rest = fit
            new = "/".join(part for part in (_filled(target, texts), *rest) if part)
            break
        return new.replace("/", self._separator)

    def check_used(self, paths: Collection[str], of: str) -> None:
        """Refuses a key that renamed nothing, once all paths were renamed.

        Args:
            paths: All paths.
            of: What has the paths, for the error: `a slot of "like"`.

        Raises:
            ValueError: If a key fits none of the paths.
        """
        unused = {key for key, used in self.used.items() if not used}
        for path in paths if unused else ():
            unused -= set(_beginnings(path))  # its leaves have keys of their own
        for key in self.used:
            if key in unused:
                what = "fits" if key in self._patterns else "is, or begins,"
                some = {x for path in list(paths)[:1000] for x in _beginnings(path)}
                raise ValueError(
                    f"rename has {brief(key, 200)}, which {what} no {of}. "
                    f"{nearest(key, sorted(some - {''}))}"
                )


def _beginnings(path: str) -> Iterator[str]:
    """Yields a path and its beginnings, one key shorter each time, down to `""`."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def _checked(
    rename: object, what: str, may_leave_out: bool
) -> Mapping[str, str | None]:
    if not isinstance(rename, Mapping):
        raise TypeError(
            f"rename maps {what}, got a {type(rename).__name__}. Pass "
            '{"encoder": "model/encoder"}.'
        )
    for key, value in rename.items():
        left_out = value is None and may_leave_out
        if not isinstance(key, str) or not (left_out or isinstance(value, str)):
            out = ", or to None to leave out" if may_leave_out else ""
            raise TypeError(
                f"rename maps {what}, both text{out}; got {brief(key)}: {brief(value)}."
            )
    return cast(Mapping[str, str | None], rename)


def _wildcards(text: str) -> list[str]:
    return _WILDCARD.findall(text)


def _counted(text: str) -> str:
    return " ".join(_wildcards(text)) or "none"


def _fit(pattern: list[str], keys: list[str]) -> tuple[list[str], list[str]] | None:
    """Fits a pattern to keys: the texts of its wildcards, and the keys after it.

    `**` takes as many keys as it can: `**/kernel` fits the last `kernel` of a path.
    """
    if not pattern:
        return [], keys
    first, others = pattern[0], pattern[1:]
    if first == "**":
        for taken in range(len(keys), -1, -1):
            fit = _fit(others, keys[taken:])
            if fit is not None:
                return ["/".join(keys[:taken]), *fit[0]], fit[1]
        return None
    if not keys:
        return None
    expression = ".*".join(map(re.escape, first.split("*"))).replace(".*", "(.*)")
    match = re.fullmatch(expression, keys[0])
    fit = _fit(others, keys[1:]) if match else None
    if match is None or fit is None:
        return None
    return [*match.groups(), *fit[0]], fit[1]


def _filled(target: str, texts: list[str]) -> str:
    """Fills the wildcards of a target with texts, and drops empty keys."""
    rest = iter(texts)
    filled = _WILDCARD.sub(lambda _: next(rest), target)
    return re.sub("/{2,}", "/", filled).strip("/")
