"""`ema-optax choose`: its arguments, the order of its work, and what it prints."""

import argparse
import contextlib
import json
import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from ema_optax import checkpoint, reconstruction
from ema_optax._cli import (
    decay_text,
    evaluations,
    output_folders,
    parsing,
    warning_lines,
    wide,
)
from ema_optax._decays.decays import power
from ema_optax.reconstruction import Choice, EvaluationWarning

_OVER = ("width", "last", "schedule", "alpha")


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "choose",
        command=_run,
        extra="plots",
        explain=parsing.explained,
        summary="Let an evaluation choose the average of a run.",
        details=(
            "RUN is a folder of steps that this library saved. The function of\n"
            "--evaluate is called with the params of each average that is tried, as\n"
            "nested dicts, as checkpoint.restore gives them. It returns a number; or\n"
            "two or more, such as one for each batch, whose spread is the noise; or\n"
            "reconstruction.Score(value, error). Its module is imported, from the\n"
            "current folder first: that runs the code in it.\n"
            "\n"
            "  width     sigma_rel, from snapshots of power profiles\n"
            "  last      the plain mean of the last n checkpoints\n"
            "  schedule  merges that stand for a decay of the learning rate, by\n"
            "            --among; 1-sqrt@10 is of the last 10 checkpoints\n"
            "  alpha     m + A (m - m'), where m and m' are the means of the newer\n"
            "            and of the older half of the checkpoints\n"
            "\n"
            "A coarse grid is tried first, then the gaps beside the best are halved,\n"
            "until noise hides what is left. Several averages are made in one pass\n"
            "over the disk. An evaluation that fails is told, and the search goes on.\n"
            "With --log the evaluations are kept: the same command goes on after a\n"
            "stop, and evaluates nothing again but what raised.\n"
            "\n"
            "With --out the chosen average becomes the checkpoint DIR/N, where N is\n"
            "the last step; 'ema-optax inspect' shows how it was chosen."
        ),
        examples=(
            "  ema-optax choose run --evaluate evaluation:loss --log choice.jsonl\n"
            "  ema-optax choose run --evaluate evaluation:accuracy --maximize \\\n"
            "      --over last schedule --budget 20 --out chosen --plot choice.png\n"
            "  ema-optax choose run --evaluate evaluation:loss --over alpha \\\n"
            "      --between 0:2 --json"
        ),
    )
    parser.usage = (  # argparse would put RUN last, where --over takes it
        "ema-optax choose RUN --evaluate MODULE:FUNCTION [--over WHAT [WHAT ...]]\n"
        "                        [--budget N] [--log FILE] [--out DIR] [options]"
    )
    parser.set_defaults(wrong=parser.error)
    parser.add_argument("run", type=parsing.place, metavar="RUN")
    parser.add_argument(
        "--evaluate",
        type=evaluations.named,
        required=True,
        metavar="MODULE:FUNCTION",
        help="from params to a score; its module's code is run",
    )
    parser.add_argument(
        "--over",
        choices=_OVER,
        nargs="+",
        default=["width"],
        metavar="WHAT",
        help=f"one or several of {', '.join(_OVER)} (default: width)",
    )
    parser.add_argument(
        "--budget",
        type=parsing.at_least(3),
        default=12,
        metavar="N",
        help="evaluations at most (default: %(default)s)",
    )
    parser.add_argument(
        "--maximize", action="store_true", help="greater scores are better"
    )
    parser.add_argument(
        "--between",
        type=_interval,
        metavar="A:B",
        help="search from A to B instead of all that the run gives",
    )
    parser.add_argument(
        "--among",
        type=_schedule,
        nargs="+",
        metavar="S",
        help="uniform, linear, 1-sqrt, cosine, ema:B, each also with @N, or decays",
    )
    parser.add_argument(
        "--tree",
        type=parsing.place,
        default="params",
        metavar="TREE",
        help="params, or a shadow by name; not for widths (default: %(default)s)",
    )
    parser.add_argument(
        "--item", metavar="NAME", help="of the steps' items, where they have several"
    )
    parser.add_argument(
        "--at-once",
        type=parsing.at_least(1),
        default=3,
        metavar="N",
        help="averages in memory, made in one pass (default: %(default)s)",
    )
    parser.add_argument(
        "--log", type=parsing.path, metavar="FILE", help="keep the evaluations; go on"
    )
    parser.add_argument(
        "--out", type=parsing.place, metavar="DIR", help="folder for the chosen average"
    )
    parser.add_argument(
        "--plot",
        type=parsing.picture,
        metavar="FILE",
        help=f"draw the scores as a picture ({', '.join(parsing.PICTURES)})",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was tried as JSON"
    )


def _interval(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    with contextlib.suppress(ValueError):
        if colon:
            return float(low), float(high)
    raise argparse.ArgumentTypeError(
        f"needs two numbers, such as 0.02:0.2, got {text!r}; write a negative one as "
        "--between=-1:1"
    )


def _schedule(text: str) -> Any:
    """Returns a decay, or a name that the library knows or will refuse."""
    if re.match(r"ema:|[^:]*@", text) or ":" not in text:
        return text
    return decay_text.parse(text)[1]


def _run(args: argparse.Namespace) -> int:
    if args.among and "schedule" not in args.over:
        args.wrong("needs --over schedule for --among")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warning_lines.of("choose", EvaluationWarning))
        if _is_wide(args):
            stack.enter_context(wide.in_64_bits())
        return _do(args)


def _is_wide(args: argparse.Namespace) -> bool:
    """Returns whether the run has leaves that JAX holds in 64 bits alone."""
    held = checkpoint.describe(args.run, item=args.item).trees.values()
    kinds = {leaf.dtype for tree in held for leaf in tree.leaves.values()}
    return bool(kinds & {"float64", "complex128"})


def _do(args: argparse.Namespace) -> int:
    draw = None
    if args.plot:
        from ema_optax import plots  # missed before the work, not after it

        draw = plots.choice
    if args.out is not None:
        output_folders.check_free(args.out, [])
        _check_room(args)
    found = reconstruction.choose(
        args.run,
        evaluations.loaded(args.evaluate),
        over=list(dict.fromkeys(args.over)),
        budget=args.budget,
        maximize=args.maximize,
        between=args.between,
        among=args.among,
        tree=args.tree,
        item=args.item,
        at_once=args.at_once,
        log=args.log,
        progress=None,
    )
    if args.out is not None:
        decay = power(float(found.best.value)) if found.best.over == "width" else None
        output_folders.write(args.out, found.tree, found.step, decay, found.provenance)
    if draw is not None:
        picture = draw(found).get_figure(root=True)
        assert picture is not None  # the axes have a figure of their own
        picture.savefig(args.plot)
    _show(args, found)
    return 0


def _check_room(args: argparse.Namespace) -> None:
    held = checkpoint.describe(args.run, item=args.item).trees.values()
    size = max(
        sum(
            math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            for leaf in tree.leaves.values()
        )
        for tree in held
    )
    output_folders.check_room(args.out, size, "Pass another --out.")


def _show(args: argparse.Namespace, found: Choice) -> None:
    written = args.out and f"{args.out.rstrip('/')}/{found.step}"
    if args.json:
        picture = args.plot and str(args.plot)
        files = {"directory": written, "picture": picture}
        parsing.print_json({**json.loads(found.to_json()), **files})
        return
    print("\n".join(map(parsing.printable, str(found).splitlines())))
    counted = np.count_nonzero(found.best.coefficients)
    print(
        f"\nBest: {found.best.over} {found.best.value}, of {counted} trees that end at "
        f"step {found.step}"
        + (f"; {len(found.ties)} others are tied with it" if found.ties else "")
    )
    if written:
        print(f"Written: {parsing.printable(written)}")
    if args.plot:
        print(f"Picture: {parsing.printable(str(args.plot))}")
