"""`ema-optax merge`: its arguments, the steps it takes, and what it prints."""

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax import checkpoint, reconstruction, trees
from ema_optax.cli import merge_schedules, output_folders, parsing, wide
from ema_optax.cli.merge_schedules import Schedule
from ema_optax.text import some

_RANGE = re.compile(r"(\d*):(\d*)(?::(\d+))?")


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "merge",
        command=_run,
        extra="cli",
        explain=parsing.explained,
        on_cpu=True,
        summary="Write the weighted mean of a run's checkpoints.",
        details=(
            "RUN is a folder of steps that this library saved. Merging checkpoints of\n"
            "a constant learning rate stands for a decay of it (WSM,\n"
            "arXiv:2507.17634). The steps are read once for all schedules, compared\n"
            "with their checksums, and summed in float64. Memory holds the results\n"
            "and one step.\n"
            "\n"
            f"{merge_schedules.HELP}"
            "\n"
            "One schedule writes the checkpoint DIR/N, where N is the last step;\n"
            "several write DIR/SCHEDULE/N. checkpoint.restore reads it like any\n"
            "other, and 'ema-optax inspect' shows steps and coefficients. Nothing is\n"
            "overwritten."
        ),
        examples=(
            "  ema-optax merge run --last 10 --dry-run\n"
            "  ema-optax merge run --last 10 --schedule 1-sqrt --out merged\n"
            "  ema-optax merge run --steps 20000:40000:1000 --tree shadow \\\n"
            "      --schedule linear cosine ema:0.8 --out merged"
        ),
    )
    parser.usage = (  # argparse would put RUN last, where --schedule takes it
        "ema-optax merge RUN [--last N] [--steps A:B[:K]] [--every-steps K]\n"
        "                       [--schedule S [S ...]] --out DIR [options]"
    )
    parser.set_defaults(wrong=parser.error)
    parser.add_argument("run", type=parsing.place, metavar="RUN")
    parser.add_argument(
        "--last", type=parsing.at_least(1), metavar="N", help="the last N of the steps"
    )
    parser.add_argument(
        "--steps",
        type=_range,
        metavar="A:B[:K]",
        help="those from A to B, both included, at distances of K",
    )
    parser.add_argument(
        "--every-steps",
        type=parsing.at_least(1),
        metavar="K",
        help="those that K divides",
    )
    parser.add_argument(
        "--schedule",
        type=merge_schedules.parse,
        nargs="+",
        default=[merge_schedules.parse("uniform")],
        metavar="S",
        help="see above (default: uniform)",
    )
    parser.add_argument(
        "--tree",
        type=parsing.place,
        default="params",
        metavar="TREE",
        help="params, shadow, or shadow/NAME (default: %(default)s)",
    )
    parser.add_argument(
        "--item", metavar="NAME", help="of the steps' items, where they have several"
    )
    parser.add_argument(
        "--out", type=parsing.place, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the merged leaves (default: that of the tree)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the steps and their coefficients, and write nothing",
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")


def _range(text: str) -> tuple[int, int, int]:
    match = _RANGE.fullmatch(text)
    if not match or match[3] == "0":
        raise argparse.ArgumentTypeError(
            f"needs A:B or A:B:K, whole numbers of steps such as 1000:9000, got "
            f"{text!r}"
        )
    return int(match[1] or 0), int(match[2] or 2**63), int(match[3] or 1)


def _run(args: argparse.Namespace) -> int:
    if args.out is None and not args.dry_run:
        args.wrong("needs --out, or --dry-run")
    with wide.in_64_bits():
        return _do(args)


def _do(args: argparse.Namespace) -> int:
    steps = _chosen(args)
    schedules: dict[str, Schedule] = dict(args.schedule)
    weights = {name: make(steps) for name, make in schedules.items()}
    sources = [
        checkpoint.stored(args.run, args.tree, step=step, item=args.item)
        for step in steps
    ]
    folders = _folders(args.out, list(weights))
    if args.out is not None:
        paths = [f"{folder}/{steps[-1]}" for folder in folders.values()]
        output_folders.check_free(args.out, paths)
        _check_room(args, sources[-1], len(weights))
    if not args.dry_run:
        results = reconstruction.merge(
            sources,
            np.array(list(weights.values())),
            params=_model(args, steps[-1], sources[-1]),
            dtype=args.dtype,
            progress=None,
        )
        for name, result in zip(weights, results, strict=True):
            told = _origin(args, steps, name, weights[name])
            output_folders.write(folders[name], result, steps[-1], None, told)
    _show(args, steps, weights, folders)
    return 0


def _chosen(args: argparse.Namespace) -> list[int]:
    """Returns the steps that are merged, ascending.

    Raises:
        ValueError: If there are none, or fewer than the last ones asked for.
    """
    have = sorted(checkpoint.describe(args.run, item=args.item).steps)
    low, high, distance = args.steps or (0, 2**63, 1)
    every = args.every_steps or 1
    steps = [
        step
        for step in have
        if low <= step <= high and (step - low) % distance == 0 and step % every == 0
    ]
    if len(steps) < (args.last or 1):
        raise ValueError(
            f"{len(steps)} of the steps in {args.run} are as asked for, and "
            f"{args.last or 1} are needed: it has {some(map(str, have), 8)}."
        )
    return steps[-args.last :] if args.last else steps


def _folders(out: str | None, names: Sequence[str]) -> dict[str, str]:
    if out is None or len(names) == 1:
        return dict.fromkeys(names, out or "")
    root = out.rstrip("/") or "/"
    return {name: f"{root}/{re.sub('[^-0-9A-Za-z_.]+', '-', name)}" for name in names}


def _check_room(
    args: argparse.Namespace, source: checkpoint.StoredTree, results: int
) -> None:
    size = sum(
        math.prod(leaf.shape) * jnp.dtype(args.dtype or leaf.dtype).itemsize
        for leaf in source.leaves.values()
    )
    advice = "Ask for fewer schedules at a time, or pass another --out."
    output_folders.check_room(args.out, size * results, advice)


def _model(
    args: argparse.Namespace, step: int, source: checkpoint.StoredTree
) -> dict[str, Any]:
    """Returns what a result is like: its other leaves are those of the last step."""
    merged = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in source.leaves.items()
    }
    if set(source.entries) == set(merged):
        return trees.nested(merged)
    whole = checkpoint.restore(args.run, args.tree, step=step, item=args.item)
    paths, leaves, _ = trees.flatten(whole)
    return trees.nested({**dict(zip(paths, leaves, strict=True)), **merged})


def _origin(
    args: argparse.Namespace, steps: Sequence[int], name: str, weights: np.ndarray
) -> dict[str, Any]:
    return {
        "merged": {
            "run": args.run.rstrip("/").rpartition("/")[2],
            "tree": args.tree,
            "schedule": name,
            "steps": list(steps),
            "coefficients": weights.tolist(),
        }
    }


def _show(
    args: argparse.Namespace,
    steps: Sequence[int],
    weights: dict[str, np.ndarray],
    folders: dict[str, str],
) -> None:
    if args.json:
        merges = [
            {
                "schedule": name,
                "coefficients": each.tolist(),
                "noise_gain": float(np.linalg.norm(each)),
                "directory": folders[name] or None,
            }
            for name, each in weights.items()
        ]
        figures = {"tree": args.tree, "steps": list(steps), "merges": merges}
        parsing.print_json({**figures, "written": not args.dry_run})
        return
    names = {name: parsing.printable(name) for name in weights}
    columns = {name: max(len(shown), 8) + 2 for name, shown in names.items()}
    print(f"{args.tree} of {len(steps):,} steps, with the coefficients\n")
    print(f"{'step':>12}" + "".join(f"{names[n]:>{w}}" for n, w in columns.items()))
    for i, step in enumerate(steps):
        row = "".join(f"{weights[n][i]:>{w}.5f}" for n, w in columns.items())
        print(f"{step:>12}{row}")
    gains = "".join(f"{np.linalg.norm(weights[n]):>{w}.3f}" for n, w in columns.items())
    print(f"{'noise gain':>12}{gains}\n")
    if args.dry_run:
        print("Nothing was written.", flush=True)
        return
    for folder in folders.values():
        print(f"Written: {parsing.printable(folder)}/{steps[-1]}", flush=True)
