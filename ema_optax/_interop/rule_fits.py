"""Finds which rule takes which name or path, and plans the moves that follow."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from ema_optax._interop import moves
from ema_optax._interop.moves import Move, Shape
from ema_optax._interop.patterns import Pattern
from ema_optax._interop.rule import Rule
from ema_optax._messages.text import brief, nearest, some

_Index: TypeAlias = tuple[int, ...]
# The texts of the wildcards that carry over → member → numbers in a stack → source.
_Groups: TypeAlias = dict[tuple[str, ...], dict[int, dict[_Index, str]]]


def to_tree(
    rules: Sequence[Rule], names: Mapping[str, Shape], *, must_fit: bool
) -> dict[str, Move]:
    """Plans the move to each path, as `Rules.to_tree` describes."""
    planned = _Planned("path")
    for at, groups in _fits(rules, names, "name", must_fit).items():
        rule = rules[at]
        for texts, members in groups.items():
            with _Where(at, rule, members):
                sources, counts = _in_order(rule.names, members, texts)
                shapes = tuple(tuple(names[source]) for source in sources)
                parts = _parts(rule, len(rule.paths), shapes[0])
                for path, part in zip(rule.paths, parts, strict=True):
                    move = Move(
                        sources=sources,
                        shapes=shapes,
                        part=part,
                        counts=counts,
                        pattern=rule.rearrange,
                        sizes=rule.sizes or {},
                        axis=rule.axis if len(rule.names) > 1 else None,
                    )
                    _check_lengths(rule, move)
                    planned.add(path.filled(texts, "."), move, path.separator)
    return planned.checked()


def to_names(
    rules: Sequence[Rule], paths: Mapping[str, Shape], *, must_fit: bool
) -> dict[str, Move]:
    """Plans the move to each name, as `Rules.to_names` describes."""
    planned = _Planned("name")
    for at, groups in _fits(rules, paths, "path", must_fit).items():
        rule = rules[at]
        for texts, members in groups.items():
            with _Where(at, rule, members):
                sources, _ = _in_order(rule.paths, members, texts)
                shapes = tuple(tuple(paths[source]) for source in sources)
                parts = _parts(rule, len(rule.names), shapes[0])
                for name, part in zip(rule.names, parts, strict=True):
                    whole = Move(
                        sources=sources,
                        shapes=shapes,
                        part=part,
                        pattern=_turned_round(rule.rearrange),
                        sizes=rule.sizes or {},
                    )
                    for index in _indices(whole, rule.stacked):
                        axis = rule.axis if len(rule.paths) > 1 else None
                        move = dataclasses.replace(whole, index=index, axis=axis)
                        _check_lengths(rule, move)
                        numbered = _numbered(name, texts, index)
                        planned.add(name.filled(numbered, "/"), move, name.separator)
    return planned.checked()


class _Where(contextlib.AbstractContextManager[None]):
    """Names in an error the rule, and the source that does not fit."""

    def __init__(
        self, at: int, rule: Rule, members: Mapping[int, Mapping[_Index, str]]
    ) -> None:
        self._rule = f"rules[{at}], {brief(rule.name, 200)} ↔ {brief(rule.path, 200)},"
        self._source = next(s for indices in members.values() for s in indices.values())

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(
                f"{self._rule} does not fit {brief(self._source, 200)}: "
                f"{str(error).rstrip('.')}."
            ) from None


class _Planned:
    """Collects moves by the path or name they make, each once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._moves: dict[str, Move] = {}

    def add(self, target: str, move: Move, separator: str) -> None:
        source = move.sources[0]
        keys = target.split(separator)
        if "" in keys or (self._what == "path" and {".", ".."} & set(keys)):
            raise ValueError(
                f"it would get the {self._what} {brief(target, 200)}, with the key "
                f"{brief(next(k for k in keys if k in ('', '.', '..')))}"
            )
        if target in self._moves:
            other = self._moves[target].sources[0]
            raise ValueError(
                f"{brief(other, 200)} and {brief(source, 200)} would both have the "
                f"{self._what} {brief(target, 200)}"
            )
        self._moves[target] = move

    def checked(self) -> dict[str, Move]:
        for path in self._moves if self._what == "path" else ():
            above = path.rpartition("/")[0]
            while above:
                if above in self._moves:
                    raise ValueError(
                        f"{brief(self._moves[above].sources[0], 200)} would be the "
                        f"leaf {brief(above, 200)}, and "
                        f"{brief(self._moves[path].sources[0], 200)} lies below it, "
                        f"{brief(path, 200)}. Give one of them another path."
                    )
                above = above.rpartition("/")[0]
        return self._moves


def _fits(
    rules: Sequence[Rule], sources: Collection[str], what: str, must_fit: bool
) -> dict[int, _Groups]:
    """Groups the sources that each rule takes, without those that rules leave out."""
    candidates = {
        at: patterns
        for at, rule in enumerate(rules)
        if (patterns := rule.names if what == "name" else rule.paths)
    }
    fits: dict[int, _Groups] = {}
    unused, untaken = set(candidates), list[str]()
    for source in sources:
        at, member, texts = next(_all_fits(candidates, source), (-1, 0, ()))
        if at < 0:
            untaken.append(source)
            continue
        unused.discard(at)
        rule = rules[at]
        if rule.names and rule.paths:
            stacked = what == "name" and rule.stacked
            carried, index = _carried(candidates[at][member], texts, bool(stacked))
            group = fits.setdefault(at, {}).setdefault(carried, {})
            group.setdefault(member, {})[index] = source
    if unused and must_fit:
        raise _fits_nothing(min(unused), candidates[min(unused)], sources, what)
    if untaken:
        known = [p.text for patterns in candidates.values() for p in patterns]
        first = json.dumps(untaken[0][:200])
        arguments = f"{first}, None" if what == "name" else f"None, {first}"
        raise ValueError(
            f"No rule takes {len(untaken):,} of {len(sources):,} {what}s: "
            f"{some(brief(name, 200) for name in untaken)}. "
            f"{nearest(untaken[0], known) if known else 'There are no rules.'} Give "
            f"one, or leave it out: Rule({arguments})."
        )
    return dict(sorted(fits.items()))


def _fits_nothing(
    at: int, patterns: Sequence[Pattern], sources: Collection[str], what: str
) -> ValueError:
    start = f"rules[{at}] has the {what} {brief(patterns[0].text, 200)}, which"
    own = {at: patterns}
    taken = next((s for s in sources if next(_all_fits(own, s), None)), None)
    if taken is not None:
        return ValueError(
            f"{start} takes nothing: a rule before it takes {brief(taken, 200)}. The "
            "first that fits counts, so write it before that one."
        )
    if not sources:
        return ValueError(f"{start} fits no {what}, and there are none.")
    near = nearest(patterns[0].text, list(sources)[:10_000])
    return ValueError(f"{start} fits no {what}. {near}")


def _all_fits(
    candidates: Mapping[int, Sequence[Pattern]], source: str
) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    for at, patterns in candidates.items():
        for member, pattern in enumerate(patterns):
            texts = pattern.fit(source)
            if texts is not None:
                yield at, member, texts


def _carried(
    pattern: Pattern, texts: tuple[str, ...], stacked: bool
) -> tuple[tuple[str, ...], _Index]:
    """Separates the texts that carry over from the numbers in the stack."""
    if not stacked:
        return texts, ()
    pairs = list(zip(pattern.wildcards, texts, strict=True))
    carried = tuple(text for wildcard, text in pairs if wildcard != "#")
    return carried, tuple(int(text) for wildcard, text in pairs if wildcard == "#")


def _numbered(name: Pattern, texts: Sequence[str], index: _Index) -> tuple[str, ...]:
    """Puts the numbers in a stack between the texts of a name's wildcards."""
    if not index:
        return tuple(texts)
    carried, numbers = iter(texts), iter(index)
    return tuple(
        str(next(numbers)) if wildcard == "#" else next(carried)
        for wildcard in name.wildcards
    )


def _in_order(
    sides: Sequence[Pattern],
    members: Mapping[int, Mapping[_Index, str]],
    texts: Sequence[str],
) -> tuple[tuple[str, ...], _Index]:
    """Orders the sources by member and number, and counts the numbers of each axis.

    Raises:
        ValueError: If a source is missing.
    """
    indices = [index for indices in members.values() for index in indices]
    counts = tuple(max(numbers) + 1 for numbers in zip(*indices, strict=True))
    ordered: list[str] = []
    for member, side in enumerate(sides):
        by_number = members.get(member, {})
        # A grid of large numbers is never walked: the first missing one ends the loop.
        for index in _grid(counts):
            if index not in by_number:
                missing = side.filled(_numbered(side, texts, index), side.separator)
                present = [s for member in members.values() for s in member.values()]
                raise ValueError(
                    f"{brief(missing, 200)} is missing, of what becomes one; there are "
                    f"{some(brief(source, 200) for source in present)}"
                )
            ordered.append(by_number[index])
    return tuple(ordered), counts


def _indices(whole: Move, stacked: int) -> Iterable[_Index]:
    """Returns the index of each array that a stack is taken apart into."""
    shapes = whole.members()
    counts = {shape[:stacked] for shape in shapes}
    if len(counts) > 1:
        raise ValueError(
            f"the stacks are of different lengths: {some(map(str, counts))}"
        )
    (lengths,) = counts
    if len(lengths) < stacked:
        raise ValueError(f"the shape {shapes[0]} has no axis of a stack")
    return _grid(lengths)


def _grid(counts: Sequence[int]) -> Iterator[_Index]:
    """Yields the indices of a grid in order, without a list of them."""
    for at in range(math.prod(counts)):
        index: list[int] = []
        for count in reversed(counts):
            at, place = divmod(at, count)
            index.append(place)
        yield tuple(reversed(index))


def _parts(rule: Rule, count: int, shape: Shape) -> Sequence[moves.Part | None]:
    if count == 1:
        return [None]
    return moves.parts(shape, rule.axis, count, rule.lengths)


def _check_lengths(rule: Rule, move: Move) -> None:
    """Refuses to join parts that the rule could not split again."""
    if move.axis is None:
        return
    shapes = move.members()
    axis = moves.checked_axis(move.axis, shapes[0])
    lengths = tuple(shape[axis] for shape in shapes)
    if rule.lengths is None and len(set(lengths)) > 1:
        raise ValueError(
            f"the parts along axis {move.axis} are {lengths}, which could not be split "
            f"again: give lengths={lengths}"
        )
    if rule.lengths not in (None, lengths):
        raise ValueError(
            f"the parts along axis {move.axis} are {lengths}, and lengths says "
            f"{rule.lengths}"
        )


def _turned_round(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    before, _, after = pattern.partition("->")
    return f"{after.strip()} -> {before.strip()}"
