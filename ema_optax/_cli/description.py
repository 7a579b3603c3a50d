"""A checkpoint's description, as tables for people and as JSON for programs.

Names and `extra` in a manifest are whatever its writer chose. They are never read as
markup, and what could steer a terminal or reorder a line is written as an escape.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ema_optax._cli import parsing
from ema_optax._cli.parsing import printable
from ema_optax.checkpoint import Description, Tree

_LONGEST = 12  # elements of a list that is shown whole


def print_tables(found: Description, *, leaves: bool = False) -> None:
    """Prints a description, with a table of its trees.

    Args:
        found: What `checkpoint.describe` returned.
        leaves: Whether to print a table of all leaves too.
    """
    from rich.filesize import decimal

    from ema_optax._cli import tables

    parsing.print_lines(
        {
            "Step": "not in the path" if found.step is None else found.step,
            "Steps": _steps(found.steps),
            "Path": found.path,
            "Written by": f"ema_optax {found.version}, format {found.format}",
            "Extra": None
            if found.extra is None
            else json.dumps(_shortened(found.extra)),
        }
    )
    console = tables.console()
    between = "\n" if console.is_terminal else ", "
    table = tables.table(
        ("tree", "leaves", "size", "dtypes", "decay", "every", "count"),
        right=("leaves", "size", "every", "count"),
    )
    for name, tree in _trees(found).items():
        table.add_row(
            printable(name),
            f"{len(tree.leaves):,}",
            decimal(tree.bytes),
            between.join(map(printable, _dtypes(tree))),
            *_average(name, tree),
        )
    console.print(table)
    if not leaves:
        return
    table = tables.table(("tree", "path", "shape", "dtype"))
    for name, tree in _trees(found).items():
        for path, leaf in tree.leaves.items():
            cells = (name, path, f"{leaf.shape}", leaf.dtype)
            table.add_row(*map(printable, cells))
        table.add_section()
    console.print(table)


def _shortened(value: Any) -> Any:
    """Returns JSON for people: of a long list its ends, of a float six digits."""
    if isinstance(value, Mapping):
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        if len(value) > _LONGEST:
            more = f"... {len(value) - 4:,} more ..."
            value = [*value[:3], more, value[-1]]
        return [_shortened(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_json(
    found: Description, *, whole: bool | None = None, explained: Any = None
) -> str:
    """Returns a description as JSON text, all leaves included.

    Args:
        found: What `checkpoint.describe` returned.
        whole: What `checkpoint.verify` found, or None if it was not asked.
        explained: What `explain.explained` found, as JSON's; None if it was not asked.
    """
    return json.dumps(
        {
            "step": found.step,
            "steps": list(found.steps),
            "path": found.path,
            "version": found.version,
            "format": found.format,
            "trees": {
                name: _tree(tree)
                for name, tree in _trees(found).items()
                if name in found.trees
            },
            "state": _tree(found.state),
            "extra": found.extra,
            "whole": whole,
            **({} if explained is None else {"explained": explained}),
        },
        indent=2,
    )


def _steps(steps: Sequence[int]) -> str | None:
    """Returns the steps of a run in words, the newest last."""
    if len(steps) < 2:
        return None
    listed = [str(step) for step in steps]
    shown = listed if len(listed) <= 8 else [*listed[:3], "…", *listed[-3:]]
    return f"{len(steps):,}: {', '.join(shown)}"


def _trees(found: Description) -> Mapping[str, Tree]:
    if found.state.leaves:
        return {**found.trees, "state": found.state}
    # A single average is stored once, where a stranger looks for the params.
    params = found.trees.get("params")
    return {
        name: dataclasses.replace(params, average=tree.average)
        if params and not tree.leaves
        else tree
        for name, tree in found.trees.items()
    }


def _dtypes(tree: Tree) -> list[str]:
    return sorted({leaf.dtype for leaf in tree.leaves.values()})


def _average(name: str, tree: Tree) -> tuple[str, str, str]:
    """Returns the cells of decay, every and count, which only a shadow has."""
    if not name.startswith("shadow"):
        return "", "", ""
    computed = tree.average.computed if tree.average else ()
    decay = "not recorded"
    if tree.decay is not None or computed:
        parts = [*computed, *[tree.decay][: tree.decay is not None]]
        decay = printable(", ".join(map(str, parts)))
    every = "" if tree.every is None else f"{tree.every:,}"
    count = f"{tree.count:,}" if isinstance(tree.count, int) else str(tree.count)
    return decay, every, printable(count)


def _tree(tree: Tree) -> dict[str, Any]:
    return {
        "bytes": tree.bytes,
        "dtypes": _dtypes(tree),
        "decay": None if tree.decay is None else json.loads(tree.decay.to_json()),
        "every": tree.every,
        "count": tree.count,
        "leaves": {
            path: {"shape": list(leaf.shape), "dtype": leaf.dtype}
            for path, leaf in tree.leaves.items()
        },
    }
