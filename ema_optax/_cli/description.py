"""A checkpoint's description, as tables for people and as JSON for programs.

The writer of a manifest chose its names and its `extra`: neither is read as markup, and
a character that could steer a terminal or reorder a line is printed as an escape.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ema_optax._cli import parsing
from ema_optax._cli.parsing import printable
from ema_optax.checkpoint import Description, Tree

_LONGEST = 12  # elements of a list that is shown whole


def print_tables(description: Description, *, leaves: bool = False) -> None:
    """Prints a description, with a table of its trees.

    Args:
        description: The description that `checkpoint.describe` returned.
        leaves: Whether to print a table of all leaves too.
    """
    from rich.filesize import decimal

    from ema_optax._cli import tables

    parsing.print_lines(
        {
            "Step": "not in the path" if description.step is None else description.step,
            "Steps": _steps(description.steps),
            "Path": description.path,
            "Written by": f"ema_optax {description.version}, "
            f"format {description.format}",
            "Extra": None
            if description.extra is None
            else json.dumps(_shortened(description.extra)),
        }
    )
    console = tables.console()
    separator = "\n" if console.is_terminal else ", "
    table = tables.table(
        ("tree", "leaves", "size", "dtypes", "decay", "every", "count"),
        right=("leaves", "size", "every", "count"),
    )
    for name, tree in _trees(description).items():
        table.add_row(
            printable(name),
            f"{len(tree.leaves):,}",
            decimal(tree.bytes),
            separator.join(map(printable, _dtypes(tree))),
            *_average(name, tree),
        )
    console.print(table)
    if not leaves:
        return
    table = tables.table(("tree", "path", "shape", "dtype"))
    for name, tree in _trees(description).items():
        for path, leaf in tree.leaves.items():
            cells = (name, path, f"{leaf.shape}", leaf.dtype)
            table.add_row(*map(printable, cells))
        table.add_section()
    console.print(table)


def _shortened(value: Any) -> Any:
    """Shortens JSON for people: long lists to their ends, floats to six digits."""
    if isinstance(value, Mapping):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) > _LONGEST:
            more = f"... {len(value) - 4:,} more ..."
            value = [*value[:3], more, value[-1]]
        return [_shortened(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_json(
    description: Description, *, whole: bool | None = None, explained: Any = None
) -> str:
    """Returns a description as JSON text, all leaves included.

    Args:
        description: The description that `checkpoint.describe` returned.
        whole: Whether `checkpoint.verify` found no damage; None if it was not called.
        explained: The diagnosis of `explain.explained` as JSON; None without one.
    """
    return json.dumps(
        {
            "step": description.step,
            "steps": list(description.steps),
            "path": description.path,
            "version": description.version,
            "format": description.format,
            "trees": {
                name: _tree(tree)
                for name, tree in _trees(description).items()
                if name in description.trees
            },
            "state": _tree(description.state),
            "extra": description.extra,
            "whole": whole,
            **({} if explained is None else {"explained": explained}),
        },
        indent=2,
    )


def _steps(steps: Sequence[int]) -> str | None:
    """Writes the steps of a run, the newest last; None if there is only one."""
    if len(steps) < 2:
        return None
    listed = [str(step) for step in steps]
    shown = listed if len(listed) <= 8 else [*listed[:3], "…", *listed[-3:]]
    return f"{len(steps):,}: {', '.join(shown)}"


def _trees(description: Description) -> Mapping[str, Tree]:
    if description.state.leaves:
        return {**description.trees, "state": description.state}
    # A single average is stored once, where a stranger looks for the params.
    params = description.trees.get("params")
    return {
        name: dataclasses.replace(params, average=tree.average)
        if params and not tree.leaves
        else tree
        for name, tree in description.trees.items()
    }


def _dtypes(tree: Tree) -> list[str]:
    return sorted({leaf.dtype for leaf in tree.leaves.values()})


def _average(name: str, tree: Tree) -> tuple[str, str, str]:
    """Writes the cells decay, every and count: of a shadow, else empty ones."""
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
