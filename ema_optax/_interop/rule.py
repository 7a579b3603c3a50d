"""One rule: which tensors of a file are which leaves, and how their axes lie."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias, cast

from ema_optax._interop.patterns import Pattern
from ema_optax._messages import arguments
from ema_optax._messages.text import brief, nearest

_Side: TypeAlias = "str | tuple[str, ...] | None"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says which tensors of a file are which leaves of a tree, and how axes lie.

    `*` stands for characters of one key, `**` for any number of keys, also none, and
    `#` for a number; they carry over in order. Where `#` is in `name` and not in
    `path`, the arrays 0 … n − 1 are stacked on a new first axis, as scanned layers lie.

    Attributes:
        name: Name of tensors in a file, keys joined by dots. Several become one leaf,
            joined along its `axis`. None leaves a leaf out of an export.
        path: Path of a leaf in the tree, keys joined by slashes. Several are made of
            one tensor, split along its `axis`. None leaves a tensor out of an import.
        rearrange: An einops pattern from the file's axes to the tree's: `"o i -> i o"`
            of a linear layer, `"o i h w -> h w i o"` of a convolution, `"(h d) i -> i h
            d"` of heads; turned round for an export. The axis of a stack is named too,
            first. None for axes as they lie.
        sizes: Sizes of axes in the pattern, `{"h": 12}`, which the shapes do not say.
        axis: Axis that parts are joined along, counted in the joined array.
        lengths: Lengths of the parts along `axis`; None for equal ones.

    Raises:
        TypeError, ValueError: If the parts of the rule do not fit each other.

    >>> rule = Rule("h.#.q.weight", "h/query/kernel", "l o i -> l i o")
    >>> rule.stacked, rule.fields()["path"]
    (1, 'h/query/kernel')
    """

    name: str | tuple[str, ...] | None
    path: str | tuple[str, ...] | None
    rearrange: str | None = None
    sizes: Mapping[str, int] | None = dataclasses.field(
        default=None, kw_only=True, hash=False
    )
    axis: int = dataclasses.field(default=0, kw_only=True)
    lengths: tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for field in ("name", "path"):
            object.__setattr__(self, field, _side(getattr(self, field), field))
        if self.lengths is not None:
            object.__setattr__(self, "lengths", _lengths(self.lengths))
        if self.sizes is not None:
            object.__setattr__(self, "sizes", _sizes(self.sizes))
        _check_joined(self)
        _check_wildcards(self)
        _check_rearrange(self)

    @functools.cached_property
    def names(self) -> tuple[Pattern, ...]:
        """Patterns of `name`."""
        return _patterns(self.name, ".")

    @functools.cached_property
    def paths(self) -> tuple[Pattern, ...]:
        """Patterns of `path`."""
        return _patterns(self.path, "/")

    @functools.cached_property
    def stacked(self) -> int:
        """Number of stacked axes: one for each `#` in `name`, where `path` has none."""
        if not self.names or not self.paths or "#" in self.paths[0].wildcards:
            return 0
        return self.names[0].wildcards.count("#")

    def fields(self) -> dict[str, object]:
        """Returns name, path and each field that differs from its default, for JSON."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name in ("name", "path")
            or getattr(self, field.name) != field.default
        }


def _side(value: object, field: str) -> _Side:
    items = [value] if isinstance(value, str) else value
    if items is None:
        return None
    if not isinstance(items, (list, tuple)) or not all(
        isinstance(text, str) for text in items
    ):
        raise TypeError(
            f"{field} is a text, several, or None to leave out; got {brief(value)}."
        )
    texts = cast("Sequence[str]", items)
    if len(set(texts)) < len(texts) or not texts:
        raise ValueError(f"{field} has one text, or several, got {brief(value)}.")
    return texts[0] if len(texts) == 1 else tuple(texts)


def _lengths(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"lengths are those of the parts, got {brief(value)}.")
    return tuple(
        arguments.whole(n, "lengths", 1, "lengths=(64, 16, 16)") for n in value
    )


def _sizes(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise TypeError(f'sizes are those of axes, {{"h": 12}}; got {brief(value)}.')
    return {
        str(axis): arguments.whole(size, f"sizes[{axis!r}]", 1, 'sizes={"h": 12}')
        for axis, size in value.items()
    }


def _patterns(side: _Side, separator: str) -> tuple[Pattern, ...]:
    if side is None:
        return ()
    return tuple(
        Pattern(text, separator)
        for text in ((side,) if isinstance(side, str) else side)
    )


def _check_joined(rule: Rule) -> None:
    counts = len(rule.names), len(rule.paths)
    if max(counts) == 0:
        raise ValueError("A rule has a name, a path, or both; got None for both.")
    if min(counts) > 1:
        raise ValueError(
            f"{brief(rule.name)} and {brief(rule.path)} are both several, and several "
            "names become one path, or one name several paths. Write two rules."
        )
    if rule.lengths is not None and len(rule.lengths) != max(counts):
        raise ValueError(
            f"lengths {rule.lengths} are {len(rule.lengths)} for {max(counts)} parts."
        )
    object.__setattr__(
        rule, "axis", arguments.whole(rule.axis, "axis", -(2**31), "axis=1")
    )
    is_single = max(counts) == 1 or min(counts) == 0
    if is_single and (rule.axis or rule.lengths is not None):
        raise ValueError(
            "axis and lengths are of several names or paths that are joined, and "
            f"{brief(rule.name)} ↔ {brief(rule.path)} joins none."
        )
    if min(counts) == 0 and (rule.rearrange is not None or rule.sizes):
        raise ValueError(
            f"{brief(rule.name or rule.path)} is left out: nothing to rearrange."
        )


def _check_wildcards(rule: Rule) -> None:
    sides = [*rule.names, *rule.paths]
    if not rule.names or not rule.paths:
        return
    carried = [[w for w in side.wildcards if w != "#"] for side in sides]
    numbers = [side.wildcards.count("#") for side in sides]
    wildcards = [side.wildcards for side in sides[: len(rule.names)]]
    wildcards += [side.wildcards for side in sides[len(rule.names) :]]
    names, paths = wildcards[0], wildcards[len(rule.names)]
    fits = (
        all(w == carried[0] for w in carried)
        and all(w == names for w in wildcards[: len(rule.names)])
        and all(w == paths for w in wildcards[len(rule.names) :])
        and (names == paths or numbers[-1] == 0)
    )
    if not fits:
        listed = ", ".join(
            f"{brief(side.text, 200)} has {' '.join(side.wildcards) or 'none'}"
            for side in sides
        )
        raise ValueError(
            f"The wildcards do not fit each other: {listed}. Both sides have the same, "
            "in one order. Only `#` may be in the name alone, then all of them: they "
            "are stacked; `*` carries a number over."
        )


def _check_rearrange(rule: Rule) -> None:
    if rule.rearrange is None:
        if rule.sizes:
            raise ValueError(f"sizes {brief(rule.sizes)} are those of a rearrange.")
        return
    pattern = arguments.a_name(rule.rearrange, "rearrange", "o i -> i o")
    sides = pattern.split("->")
    axes = [re.findall(r"[^\W\d]\w*|\.\.\.", side) for side in sides]
    if len(sides) != 2 or sorted(axes[0]) != sorted(axes[-1]):
        raise ValueError(
            f"rearrange {brief(pattern, 200)} cannot be turned round: it has the same "
            'axes on both sides of one "->", as in "(h d) i -> i h d".'
        )
    if any(len(set(side)) < len(side) for side in axes):
        raise ValueError(f"rearrange {brief(pattern, 200)} has an axis twice.")
    for axis in rule.sizes or ():
        if axis not in axes[0]:
            raise ValueError(
                f"sizes has {brief(axis)}, which is no axis of {brief(pattern, 200)}. "
                f"{nearest(axis, axes[0])}"
            )
    first = sides[0].split()[: rule.stacked]
    if any(axis not in axes[0] or axis == "..." for axis in first) or (
        len(first) < rule.stacked
    ):
        raise ValueError(
            f"rearrange {brief(pattern, 200)} does not name the stacked axis of "
            f'{brief(rule.name)}, which is the first: "l o i -> l i o".'
        )
