"""`ema-optax inspect`: its arguments, and what it prints of a checkpoint."""

import argparse
import json
from typing import Any

from ema_optax._cli import options, parsing
from ema_optax._messages.text import one_line


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "inspect",
        command=_run,
        extra="cli",
        summary="Show what a checkpoint holds, and check it for damage.",
        details=(
            "Prints the step, who wrote it, its trees with their decays and sizes,\n"
            "and the optimizer state, from the manifest alone. DIR is the folder of\n"
            "a CheckpointManager or of checkpoint.save, one step in it, or the folder\n"
            "above. If the step has several items, all are shown, or --item NAME.\n"
            "The exit code is 1 if the checkpoint is missing or damaged.\n"
            "\n"
            "--explain reads shadow and params, and prints each reason why the\n"
            "average may be worse than the params, with what to do."
        ),
        examples=(
            "  ema-optax inspect run/checkpoints\n"
            "  ema-optax inspect run/checkpoints --step 300 --verify\n"
            "  ema-optax inspect run/checkpoints --explain\n"
            "  ema-optax inspect run/checkpoints --json | jq .trees.shadow.count"
        ),
    )
    options.add_checkpoint(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all leaves and compare them with their checksums",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="print why an average may be worse than the params",
    )
    parser.add_argument(
        "--leaves", action="store_true", help="list path, shape and dtype of all leaves"
    )
    options.add_json(parser)


def _run(args: argparse.Namespace) -> int:
    from ema_optax import checkpoint
    from ema_optax._cli import description, explain

    def fail(error: Exception) -> int:
        text = one_line(error, limit=None)
        if not isinstance(error, (OSError, ValueError)):
            # A manifest is anybody's JSON, and its seal is no signature.
            text = (
                f"the manifest in {args.directory} is not one that this version can "
                f"read: {type(error).__name__} {text}"
            )
        return parsing.fail(f"ema-optax inspect: error: {text}")

    try:
        run, items = _chosen(args)
        steps = [checkpoint.describe(run, step=args.step, item=name) for name in items]
        diagnoses = [
            explain.explained(step, run, args.step, name) if args.explain else None
            for step, name in zip(steps, items, strict=True)
        ]
        for step, diagnosis in [] if args.json else zip(steps, diagnoses, strict=True):
            description.print_tables(step, leaves=args.leaves)
            for line in str(diagnosis).splitlines() if diagnosis else []:
                print(parsing.printable(line))
    except (BrokenPipeError, ImportError):
        raise
    except Exception as error:
        return fail(error)
    damage = None
    if args.verify:
        try:
            checkpoint.verify(run, step=args.step, item=args.item)
        except Exception as error:
            damage = error
    if args.json:
        whole = damage is None if args.verify else None
        texts = [
            description.as_json(
                step,
                whole=whole,
                explained=json.loads(diagnosis.to_json()) if diagnosis else None,
            )
            for step, diagnosis in zip(steps, diagnoses, strict=True)
        ]
        text = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
        print(text, flush=True)
    elif args.verify and damage is None:
        print("whole: all of it is what was saved", flush=True)
    return 0 if damage is None else fail(damage)


def _chosen(args: argparse.Namespace) -> tuple[Any, list[str]]:
    """Finds the run, here or one folder deeper, and the names of its items."""
    from ema_optax._checkpoint.paths import absolute
    from ema_optax._checkpoint.steps import find, named, runs_in

    run = absolute(args.directory)
    try:
        step = find(run, args.step)
    except FileNotFoundError:
        deeper = runs_in(run)
        if len(deeper) != 1:
            raise
        run = deeper[0]
        step = find(run, args.step)
    items = [named(step.items, args.item)] if args.item else step.items
    return run, [item.name for item in items]
