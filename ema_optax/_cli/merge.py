"""`ema-optax merge`: its arguments, the steps it takes, and what it prints."""

import argparse
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax import reconstruction
from ema_optax._cli import (
    merge_schedules,
    merge_sources,
    options,
    output_folders,
    parsing,
    wide,
)
from ema_optax._cli.merge_schedules import Schedule
from ema_optax._cli.merge_sources import Opened
from ema_optax._messages.text import some
from ema_optax._trees import trees

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
            "RUN is a folder of steps that ema_optax or plain Orbax saved, also at\n"
            "gs://…; or a folder of safetensors, as files step-100.safetensors or as\n"
            "folders checkpoint-100 of a model each. If several RUNs are passed, each\n"
            "is one checkpoint, oldest first. Merging the checkpoints of a constant\n"
            "learning rate replaces a decay of it (WSM, arXiv:2507.17634).\n"
            "\n"
            "The steps are read once for all schedules, and summed in float64. Steps\n"
            "of ema_optax are compared with their checksums; steps of other programs\n"
            "have none, and the result says so. In those steps --tree is a path, such\n"
            "as state/params. Memory holds the results and one step; with plain Orbax\n"
            "up to 32 MB of each step.\n"
            "\n"
            f"{merge_schedules.HELP}"
            "\n"
            "One merge becomes the checkpoint DIR/N, where N is the last step, or the\n"
            "number of RUNs; several become DIR/SCHEDULE/N. checkpoint.restore reads\n"
            "it, and 'ema-optax inspect' shows its steps and coefficients. Nothing is\n"
            "overwritten."
        ),
        examples=(
            "  ema-optax merge run --last 10 --dry-run\n"
            "  ema-optax merge run --last 10 --schedule 1-sqrt --out merged\n"
            "  ema-optax merge orbax_run --tree state/params --last 10 --out merged\n"
            "  ema-optax merge a.safetensors b.safetensors --out merged\n"
            "  ema-optax merge run --steps 20000:40000:1000 --tree shadow \\\n"
            "      --schedule linear cosine ema:0.8 --out merged"
        ),
    )
    parser.usage = (  # argparse would put RUN last, where --schedule takes it
        "ema-optax merge RUN [RUN ...] [--last N] [--steps A:B[:K]]\n"
        "                       [--every-steps K] [--schedule S [S ...]] --out DIR\n"
        "                       [options]"
    )
    parser.set_defaults(refuse=parser.error)
    parser.add_argument(
        "runs", type=parsing.place, nargs="+", metavar="RUN", help="run, or checkpoint"
    )
    parser.add_argument(
        "--last", type=parsing.at_least(1), metavar="N", help="merge the last N steps"
    )
    parser.add_argument(
        "--steps",
        type=_range,
        metavar="A:B[:K]",
        help="merge the steps from A to B, both included, K apart",
    )
    parser.add_argument(
        "--every-steps",
        type=parsing.at_least(1),
        metavar="K",
        help="merge the steps that K divides",
    )
    parser.add_argument(
        "--schedule",
        type=merge_schedules.parse,
        nargs="+",
        default=[merge_schedules.parse("uniform")],
        metavar="S",
        help="weights of the steps, see above (default: uniform)",
    )
    parser.add_argument(
        "--extrapolate",
        type=_alpha,
        nargs="+",
        default=[0.0],
        metavar="A",
        help="write m + A(m - m') for each merge m, where m' is the plain mean of the\n"
        "first half of the steps; 0 is m itself (default: 0)",
    )
    options.add_tree(parser, shown="params")
    options.add_item(parser)
    options.add_out(parser)
    options.add_dtype(parser, "merged", default="as in the tree")
    options.add_dry_run(parser)
    options.add_json(parser)


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 <= alpha < math.inf:
        raise argparse.ArgumentTypeError(
            f"needs a number ≥ 0 such as 0.3, got {text!r}"
        )
    return alpha


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
        args.refuse("needs --out, or --dry-run")
    with wide.in_64_bits():
        return _do(args)


def _do(args: argparse.Namespace) -> int:
    available = merge_sources.find(args.runs, args.item)
    steps = _chosen(args, list(available.places))
    chosen = merge_sources.opened(
        {step: available.places[step] for step in steps},
        args.tree,
        args.item,
        mixed=args.dtype is not None,
    )
    schedules: dict[str, Schedule] = dict(args.schedule)
    weights = {
        f"{name}+{alpha:g}" if alpha else name: _extrapolated(make(steps), alpha)
        for name, make in schedules.items()
        for alpha in args.extrapolate
    }
    folders = _folders(args.out, list(weights))
    if args.out is not None:
        paths = [f"{folder}/{steps[-1]}" for folder in folders.values()]
        output_folders.check_free(args.out, paths)
        _check_room(args, chosen.sources[-1], len(weights))
    if available.left_out:
        left_out = some(available.left_out, 4)
        parsing.tell(f"ema-optax merge: beside the checkpoints, not merged: {left_out}")
    if not args.dry_run:
        with warnings.catch_warnings():
            # NumPy's threads warn of values that are not finite; the check below says
            # which checkpoint has them.
            warnings.simplefilter("ignore", RuntimeWarning)
            results = reconstruction.merge(
                chosen.sources,
                np.array(list(weights.values())),
                params=_model(chosen),
                dtype=args.dtype,
                progress=None,
            )
        for result in results:
            merge_sources.check_finite(result, chosen)
        for name, result in zip(weights, results, strict=True):
            origin = _origin(args, chosen, name, weights[name])
            output_folders.write(folders[name], result, steps[-1], None, origin)
    _show(args, chosen, weights, folders)
    return 0


def _extrapolated(weights: np.ndarray, alpha: float) -> np.ndarray:
    """Moves coefficients on by `alpha`, away from the plain mean of the first half."""
    half = len(weights) // 2
    if not alpha:
        return weights
    if not half:
        raise ValueError("--extrapolate needs at least 2 steps, and 1 is merged.")
    origin = np.where(np.arange(len(weights)) < half, 1 / half, 0.0)
    return reconstruction.extrapolated(weights, origin, alpha)


def _chosen(args: argparse.Namespace, available: Sequence[int]) -> list[int]:
    """Chooses the steps to merge, ascending.

    Raises:
        ValueError: If the options leave no step, or fewer than `--last`.
    """
    low, high, distance = args.steps or (0, 2**63, 1)
    every = args.every_steps or 1
    steps = [
        step
        for step in available
        if low <= step <= high and (step - low) % distance == 0 and step % every == 0
    ]
    if len(steps) < (args.last or 1):
        raise ValueError(
            f"{len(steps)} of the steps in {', '.join(args.runs)} fit the options, "
            f"and {args.last or 1} are needed: it has {some(map(str, available), 8)}."
        )
    return steps[-args.last :] if args.last else steps


def _folders(out: str | None, names: Sequence[str]) -> dict[str, str]:
    if out is None or len(names) == 1:
        return dict.fromkeys(names, out or "")
    root = out.rstrip("/") or "/"
    return {name: f"{root}/{re.sub('[^-0-9A-Za-z_.]+', '-', name)}" for name in names}


def _check_room(
    args: argparse.Namespace, source: reconstruction.Source, results: int
) -> None:
    size = sum(
        math.prod(leaf.shape) * jnp.dtype(args.dtype or leaf.dtype).itemsize
        for leaf in source.leaves.values()
    )
    advice = "Ask for fewer schedules at a time, or pass another --out."
    output_folders.check_room(args.out, size * results, advice)


def _model(chosen: Opened) -> dict[str, Any]:
    """Builds the tree of a result, whose other leaves are those of the last step."""
    merged = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in chosen.sources[-1].leaves.items()
    }
    return trees.nested({**chosen.others(), **merged})


def _origin(
    args: argparse.Namespace, chosen: Opened, name: str, weights: np.ndarray
) -> dict[str, Any]:
    runs = [run.rstrip("/").rpartition("/")[2] for run in args.runs]
    return {
        "merged": {
            "run": runs[0] if len(runs) == 1 else runs,
            "tree": chosen.tree,
            "schedule": name,
            "steps": list(chosen.steps),
            "coefficients": weights.tolist(),
            "verified": chosen.is_verified,
        }
    }


def _show(
    args: argparse.Namespace,
    chosen: Opened,
    weights: dict[str, np.ndarray],
    folders: dict[str, str],
) -> None:
    steps = chosen.steps
    if args.json:
        merges = [
            {
                "schedule": name,
                "coefficients": coefficients.tolist(),
                "noise_gain": reconstruction.noise_gain(coefficients),
                "directory": folders[name] or None,
            }
            for name, coefficients in weights.items()
        ]
        parsing.print_json(
            {
                "tree": chosen.tree,
                "steps": list(steps),
                "merges": merges,
                "verified": chosen.is_verified,
                "written": not args.dry_run,
            }
        )
        return
    names = {name: parsing.printable(name) for name in weights}
    columns = {name: max(len(shown), 8) + 2 for name, shown in names.items()}
    tree = "all" if chosen.tree == "/" else parsing.printable(chosen.tree)
    print(f"{tree} of {len(steps):,} steps, with the coefficients\n")
    print(f"{'step':>12}" + "".join(f"{names[n]:>{w}}" for n, w in columns.items()))
    for i, step in enumerate(steps):
        row = "".join(f"{weights[n][i]:>{w}.5f}" for n, w in columns.items())
        print(f"{step:>12}{row}")
    gains = "".join(
        f"{reconstruction.noise_gain(weights[n]):>{w}.3f}" for n, w in columns.items()
    )
    print(f"{'noise gain':>12}{gains}\n")
    if not chosen.is_verified:
        print(f"Not verified: saved by {chosen.kind}, without checksums to compare.")
    if args.dry_run:
        print("Nothing was written.", flush=True)
        return
    for folder in folders.values():
        print(f"Written: {parsing.printable(folder)}/{steps[-1]}", flush=True)
