"""Patterns of names and paths: `*` in a key, `**` for keys, `#` for a number."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from ema_optax._messages.text import brief

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")  # as it is written; "00" would not come back
_DIGITS = 9

# The place where a part of a pattern begins → places where the part may end; None for
# any place from there on.
_Step: TypeAlias = Callable[[int], Iterable[int]] | None


class Pattern:
    """Matches names of tensors, or paths of leaves, by wildcards.

    `*` stands for characters of one key, `**` for any number of keys, also none, and
    `#` for a number without leading zeros. Each takes as much as it can, the first one
    first. A fit takes time in proportion to the name, whatever the name is.

    Attributes:
        text: The pattern itself.
        separator: What its keys are joined by.
        wildcards: Its wildcards, in order.

    Raises:
        ValueError: If a key is empty, or wildcards lie side by side in one.

    >>> pattern = Pattern("layers.#.**.weight", ".")
    >>> pattern.fit("layers.12.attn.q.weight")
    ('12', 'attn.q')
    >>> Pattern("layers_#/**/kernel", "/").filled(("12", "attn.q"), ".")
    'layers_12/attn/q/kernel'
    """

    def __init__(self, text: str, separator: str) -> None:
        self.text = text
        self.separator = separator
        self._keys = [_Key(key, text) for key in text.split(separator)]
        self.wildcards = tuple(w for key in self._keys for w in key.wildcards)

    def fit(self, name: str) -> tuple[str, ...] | None:
        """Reads each wildcard's text from a name, or None where the name does not fit.

        The keys of a `**` are joined by the pattern's own separator.
        """
        keys = name.split(self.separator)
        runs = sum(key.is_run for key in self._keys)
        if len(keys) < len(self._keys) - runs or (
            not runs and len(keys) != len(self._keys)
        ):
            return None
        if not (self._keys[0].may_be(keys[0]) and self._keys[-1].may_be(keys[-1])):
            return None
        steps = [None if key.is_run else key.step(keys) for key in self._keys]
        ends = _ends(steps, len(keys))
        if ends is None:
            return None
        texts: list[str] = []
        start = 0
        for key, end in zip(self._keys, ends, strict=True):
            if key.is_run:
                # An empty key and no key are not the same, but both are no text.
                texts.append(self.separator.join(keys[start:end]))
            else:
                texts += key.fit(keys[start]) or ()
            start = end
        return tuple(texts)

    def filled(self, texts: Sequence[str], separator: str) -> str:
        """Makes a name: puts texts in the place of the wildcards.

        Args:
            texts: A text for each wildcard, as `fit` of the other side returns them.
            separator: The other side's, which joins the keys of a `**` in a text.
        """
        remaining = iter(texts)
        keys: list[str] = []
        for key in self._keys:
            if key.is_run:
                run = next(remaining)
                keys += run.split(separator) if run else []
            else:
                keys.append(key.filled([next(remaining) for _ in key.wildcards]))
        return self.separator.join(keys)


class _Key:
    """Matches one key of a name."""

    def __init__(self, key: str, pattern: str) -> None:
        self.is_run = key == "**"
        self.parts = ["**"] if self.is_run else re.findall(r"[*#]|[^*#]+", key)
        self.wildcards = [part for part in self.parts if part in ("*", "**", "#")]
        if not key:
            raise ValueError(f"The pattern {brief(pattern)} has an empty key.")
        pairs = zip(self.parts, self.parts[1:], strict=False)
        if any(a in "*#" and b in "*#" for a, b in pairs):
            raise ValueError(
                f"The pattern {brief(pattern)} has the key {brief(key)}: `**` is a key "
                "by itself, and in a key no wildcard follows another."
            )

    def may_be(self, key: str) -> bool:
        """Tells quickly whether a key may fit, for the first and the last key."""
        return bool(self.wildcards) or key == self.parts[0]

    def step(self, keys: Sequence[str]) -> Callable[[int], Iterable[int]]:
        """Makes the step over one key of several."""
        return lambda at: (
            (at + 1,) if at < len(keys) and self.fit(keys[at]) is not None else ()
        )

    def fit(self, key: str) -> tuple[str, ...] | None:
        """Reads each wildcard's text from a key, or None where the key does not fit."""
        if not self.wildcards:
            return () if key == self.parts[0] else None
        if len(self.wildcards) == 1:
            at = self.parts.index(self.wildcards[0])
            before, after = "".join(self.parts[:at]), "".join(self.parts[at + 1 :])
            text = key[len(before) : len(key) - len(after)]
            fits = len(key) >= len(before) + len(after) and (
                key.startswith(before) and key.endswith(after)
            )
            is_number = self.wildcards[0] == "#"
            fits = fits and (not is_number or _NUMBER.fullmatch(text) is not None)
            return (text,) if fits else None
        ends = _ends([_in_key(part, key) for part in self.parts], len(key))
        if ends is None:
            return None
        starts = [0, *ends]
        return tuple(
            key[start:end]
            for part, start, end in zip(self.parts, starts, ends, strict=False)
            if part in "*#"
        )

    def filled(self, texts: Sequence[str]) -> str:
        """Makes a key: puts texts in the place of the wildcards."""
        remaining = iter(texts)
        return "".join(next(remaining) if part in "*#" else part for part in self.parts)


def _in_key(part: str, key: str) -> _Step:
    if part == "*":
        return None
    if part == "#":
        return lambda at: [
            end
            for end in range(at + 1, min(at + _DIGITS, len(key)) + 1)
            if _NUMBER.fullmatch(key, at, end)
        ]
    return lambda at: (at + len(part),) if key.startswith(part, at) else ()


def _ends(steps: Sequence[_Step], size: int) -> list[int] | None:
    """Finds where each step ends, as far as it can, the first one first.

    Tables, made from the last step on, say from which places the steps after each can
    reach the end. No step is tried twice at a place, unlike in regular expressions.

    Returns:
        The places, or None where no way reaches the end.
    """
    tables = [[False] * size + [True]]
    for step in reversed(steps):
        after = tables[-1]
        if step is None:
            last = max((at for at, fits in enumerate(after) if fits), default=-1)
            table = [at <= last for at in range(size + 1)]
        else:
            table = [any(after[end] for end in step(at)) for at in range(size + 1)]
        tables.append(table)
    tables.reverse()
    if not tables[0][0]:
        return None
    ends, at = [], 0
    for step, after in zip(steps, tables[1:], strict=True):
        if step is None:
            at = max(end for end, fits in enumerate(after) if fits)
        else:
            at = max(end for end in step(at) if after[end])
        ends.append(at)
    return ends
