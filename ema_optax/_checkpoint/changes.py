"""Records what a resumed run took from a checkpoint, started, and left."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ema_optax._messages import text

_SHOWN = 6  # leaves that a line names


@dataclasses.dataclass(frozen=True)
class Changes:
    """Tells what became of each leaf of a resumed run; `str` gives it in lines.

    Leaves are called `params: PATH`, `shadow: PATH`, `shadow/NAME: PATH`, and
    `state: PATH` in the rest of the optimizer state.

    Attributes:
        taken: Leaves of this run that come from the checkpoint.
        started: Other leaves of this run, and why they start.
        left: Leaves of the checkpoint that this run has no place for.
        cast: Leaves taken in another dtype: from which to which.
        moved: Leaves taken from another path, and that path in the checkpoint.
    """

    taken: tuple[str, ...] = ()
    started: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    left: tuple[str, ...] = ()
    cast: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __str__(self) -> str:
        """Lists for each tree what became of its leaves."""
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
    """Holds a resumed run: a pair `params, opt_state` to unpack, and its changes.

    Attributes:
        params: The params.
        opt_state: The optimizer state, shadows and counts included.
        changes: What was taken from the checkpoint, started and left.
    """

    changes: Changes = Changes()


def resumed(params: Any, opt_state: Any, changes: Changes) -> Resumed:
    """Makes a `Resumed` of params, optimizer state and changes."""
    pair = Resumed(params, opt_state)
    pair.changes = changes
    return pair


def called(tree: str, path: str) -> str:
    """Returns the name of a leaf in `Changes`.

    >>> called("shadow", "dense/kernel")
    'shadow: dense/kernel'
    """
    return f"{tree}: {path}"


def _by_tree(names: Iterable[str]) -> dict[str, list[str]]:
    by_tree: dict[str, list[str]] = {}
    for name in names:
        tree, _, path = name.partition(": ")
        by_tree.setdefault(tree, []).append(path)
    return by_tree


def _moves(moved: Mapping[str, str]) -> list[str]:
    """Returns a line for each prefix of paths that differs on disk."""
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for name, stored in moved.items():
        tree, _, path = name.partition(": ")
        stored_tree, _, stored_path = stored.partition(": ")
        mine, theirs = path.split("/"), stored_path.split("/")
        while len(mine) > 1 and len(theirs) > 1 and mine[-1] == theirs[-1]:
            mine, theirs = mine[:-1], theirs[:-1]
        source = "" if stored_tree == tree else f"{stored_tree}: "
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
    """Returns a line for each run of neighbouring leaves with one reason."""
    lines: list[str] = []
    for tree, paths in _by_tree(reasons).items():
        pairs = [(path, reasons[called(tree, path)]) for path in paths]
        by_reason = itertools.groupby(pairs, key=lambda pair: pair[1])
        tree_lines = [
            f"{tree}: {text.some([path for path, _ in group], _SHOWN)} ({reason})"
            for reason, group in by_reason
        ]
        lines += tree_lines[:_SHOWN]
        if len(tree_lines) > _SHOWN:
            lines.append(f"{tree}: and {len(tree_lines) - _SHOWN:,} more")
    return lines
