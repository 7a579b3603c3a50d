"""What a resumed run took from a checkpoint, and what became of everything else."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ema_optax._messages import text

_SHOWN = 6  # leaves that a line names


@dataclasses.dataclass(frozen=True)
class Changes:
    """What became of each leaf of a run that is resumed; `str` tells it in lines.

    Leaves are called `params: PATH`, `shadow: PATH`, `shadow/NAME: PATH`, and
    `state: PATH` in the rest of the optimizer state.

    Attributes:
        taken: Leaves of this run that are those of the checkpoint.
        started: Other leaves of this run, and why they start.
        left: Leaves of the checkpoint that this run has no place for.
        cast: Of those taken, the ones whose dtype is another: from which to which.
        moved: Of those taken, the ones that are called otherwise in the checkpoint.
    """

    taken: tuple[str, ...] = ()
    started: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    left: tuple[str, ...] = ()
    cast: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __str__(self) -> str:
        """Tells of each tree what became of its leaves."""
        sections = {
            "taken": [
                f"{tree}: {_leaves(len(paths))}"
                for tree, paths in _by_tree(self.taken).items()
            ],
            "moved": _moves(self.moved),
            "cast": _by_reason(self.cast),
            "started": _by_reason(self.started),
            "left": [
                f"{tree}: {text.some(paths, _SHOWN)}"
                for tree, paths in _by_tree(self.left).items()
            ],
        }
        return "\n".join(
            f"{title if i == 0 else '':8}{line}"
            for title, lines in sections.items()
            for i, line in enumerate(lines)
        )


class _Pair(NamedTuple):
    params: Any
    opt_state: Any


class Resumed(_Pair):
    """A changed run to go on with: a pair `params, opt_state` to unpack.

    Attributes:
        params: The params.
        opt_state: The optimizer state, shadows and counts included.
        changes: What was taken from the checkpoint, started and left.
    """

    changes: Changes = Changes()


def resumed(params: Any, opt_state: Any, changes: Changes) -> Resumed:
    """Returns a pair with what became of its leaves."""
    pair = Resumed(params, opt_state)
    pair.changes = changes
    return pair


def called(tree: str, path: str) -> str:
    """Returns what a leaf is called in `Changes`.

    >>> called("shadow", "dense/kernel")
    'shadow: dense/kernel'
    """
    return f"{tree}: {path}"


def _by_tree(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        tree, _, path = name.partition(": ")
        found.setdefault(tree, []).append(path)
    return found


def _moves(moved: Mapping[str, str]) -> list[str]:
    """Returns a line for each beginning of paths that is another one on disk."""
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for name, stored in moved.items():
        (tree, _, path), (of, _, at) = name.partition(": "), stored.partition(": ")
        mine, theirs = path.split("/"), at.split("/")
        while len(mine) > 1 and len(theirs) > 1 and mine[-1] == theirs[-1]:
            mine, theirs = mine[:-1], theirs[:-1]
        source = "" if of == tree else f"{of}: "
        counts[tree, "/".join(mine), source + "/".join(theirs)] += 1
    lines = [
        f"{tree}: {mine} from {theirs} ({_leaves(count)})"
        for (tree, mine, theirs), count in counts.items()
    ]
    more = len(lines) - 2 * _SHOWN
    return [*lines[: 2 * _SHOWN], *([f"and {more:,} more"] if more > 0 else [])]


def _leaves(count: int) -> str:
    return f"{count:,} {'leaf' if count == 1 else 'leaves'}"


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Returns a line for each tree and reason that leaves next to each other have."""
    lines: list[str] = []
    for tree, paths in _by_tree(reasons).items():
        pairs = [(path, reasons[called(tree, path)]) for path in paths]
        groups = itertools.groupby(pairs, key=lambda pair: pair[1])
        told = [
            f"{tree}: {text.some([path for path, _ in group], _SHOWN)} ({reason})"
            for reason, group in groups
        ]
        lines += told[:_SHOWN]
        if len(told) > _SHOWN:
            lines.append(f"{tree}: and {len(told) - _SHOWN:,} more")
    return lines
