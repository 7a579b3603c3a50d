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
    options,
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
        summary="Find the best average of a run with an evaluation of yours.",
        details=(
            "RUN is a folder of steps that ema_optax saved. The command calls the\n"
            "function of --evaluate with the params of each average that it tries, as\n"
            "nested dicts, as checkpoint.restore gives them. The function returns a\n"
            "number; or several, such as one for each batch, whose spread is the\n"
            "noise; or reconstruction.Score(value, error). The command imports its\n"
            "module, from the current folder first: that runs the code in it.\n"
            "\n"
            "--over says what is tried:\n"
            "  width     widths (sigma_rel), from snapshots of power profiles;\n"
            "            --tree does not apply\n"
            "  last      plain means of the last n checkpoints\n"
            "  schedule  weighted means that replace a decay of the learning rate,\n"
            "            listed by --among; 1-sqrt@10 is of the last 10 checkpoints\n"
            "  alpha     m + A (m - m'), where m and m' are the means of the newer\n"
            "            and of the older half of the checkpoints\n"
            "\n"
            "The search tries a coarse grid, then halves the gaps beside the best,\n"
            "until the noise exceeds the differences. It makes several averages in\n"
            "one pass over the disk. If an evaluation fails, the search warns\n"
            "and goes on. With --log the same command goes on after a stop, and\n"
            "evaluates again only what failed.\n"
            "\n"
            "With --out the best average becomes the checkpoint DIR/N, where N is the\n"
            "last step; 'ema-optax inspect' shows how it was chosen."
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
    parser.set_defaults(refuse=parser.error)
    parser.add_argument(
        "run", type=parsing.place, metavar="RUN", help="folder of steps"
    )
    parser.add_argument(
        "--evaluate",
        type=evaluations.named,
        required=True,
        metavar="MODULE:FUNCTION",
        help="function from params to a score; runs the code of its module",
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
        help="most evaluations (default: %(default)s)",
    )
    parser.add_argument(
        "--maximize",
        action="store_true",
        help="take the greatest score (default: the least)",
    )
    parser.add_argument(
        "--between",
        type=_interval,
        metavar="A:B",
        help="search from A to B (default: all that the run gives)",
    )
    parser.add_argument(
        "--among",
        type=_schedule,
        nargs="+",
        metavar="S",
        help="schedules: uniform, linear, 1-sqrt, cosine, ema:B, all also with @N; or\n"
        "decays",
    )
    options.add_tree(parser, shown="params", default="params")
    options.add_item(parser)
    parser.add_argument(
        "--at-once",
        type=parsing.at_least(1),
        default=3,
        metavar="N",
        help="averages made in one pass, and held (default: %(default)s)",
    )
    parser.add_argument(
        "--log",
        type=parsing.path,
        metavar="FILE",
        help="file that keeps the evaluations",
    )
    options.add_out(parser)
    parser.add_argument(
        "--plot",
        type=parsing.picture,
        metavar="FILE",
        help=f"draw the scores as a picture ({', '.join(parsing.PICTURES)})",
    )
    options.add_json(parser)


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
    """Reads a decay, or leaves the name of a schedule for the library to check."""
    if re.match(r"ema:|[^:]*@", text) or ":" not in text:
        return text
    return decay_text.parse(text)[1]


def _run(args: argparse.Namespace) -> int:
    if args.among and "schedule" not in args.over:
        args.refuse("needs --over schedule for --among")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warning_lines.of("choose", EvaluationWarning))
        if _is_wide(args):
            stack.enter_context(wide.in_64_bits())
        return _do(args)


def _is_wide(args: argparse.Namespace) -> bool:
    """Returns whether the run has leaves that JAX holds in 64 bits alone."""
    stored = checkpoint.describe(args.run, item=args.item).trees.values()
    kinds = {leaf.dtype for tree in stored for leaf in tree.leaves.values()}
    return bool(kinds & {"float64", "complex128"})


def _do(args: argparse.Namespace) -> int:
    draw = None
    if args.plot:
        from ema_optax import plots  # if it is missing, fail before the work

        draw = plots.choice
    if args.out is not None:
        output_folders.check_free(args.out, [])
        _check_room(args)
    choice = reconstruction.choose(
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
        decay = power(float(choice.best.value)) if choice.best.over == "width" else None
        output_folders.write(
            args.out, choice.tree, choice.step, decay, choice.provenance
        )
    if draw is not None:
        picture = draw(choice).get_figure(root=True)
        assert picture is not None  # the axes have a figure of their own
        picture.savefig(args.plot)
    _show(args, choice)
    return 0


def _check_room(args: argparse.Namespace) -> None:
    stored = checkpoint.describe(args.run, item=args.item).trees.values()
    size = max(
        sum(
            math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            for leaf in tree.leaves.values()
        )
        for tree in stored
    )
    output_folders.check_room(args.out, size, "Pass another --out.")


def _show(args: argparse.Namespace, choice: Choice) -> None:
    directory = args.out and f"{args.out.rstrip('/')}/{choice.step}"
    if args.json:
        picture = args.plot and str(args.plot)
        files = {"directory": directory, "picture": picture}
        parsing.print_json({**json.loads(choice.to_json()), **files})
        return
    print("\n".join(map(parsing.printable, str(choice).splitlines())))
    counted = np.count_nonzero(choice.best.coefficients)
    print(
        f"\nBest: {choice.best.over} {choice.best.value}, of {counted} trees that end "
        f"at step {choice.step}"
        + (f"; {len(choice.ties)} others are tied with it" if choice.ties else "")
    )
    if directory:
        print(f"Written: {parsing.printable(directory)}")
    if args.plot:
        print(f"Picture: {parsing.printable(str(args.plot))}")
