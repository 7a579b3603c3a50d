"""`ema-optax inspect`: its arguments, and what it does with them."""

import argparse

from ema_optax.cli import parsing
from ema_optax.text import one_line


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "inspect",
        command=_run,
        extra="cli",
        summary="Tell what a checkpoint holds, and whether it is whole.",
        details=(
            "Prints the step, who wrote it, its trees with their decays and sizes,\n"
            "and the optimizer state, from the manifest alone. DIR is the folder of\n"
            "a CheckpointManager or of checkpoint.save, or one step in it. Ends with\n"
            "code 1 where there is no such checkpoint or it is damaged."
        ),
        examples=(
            "  ema-optax inspect run/checkpoints\n"
            "  ema-optax inspect run/checkpoints --step 300 --verify\n"
            "  ema-optax inspect run/checkpoints --json | jq .trees.shadow.count"
        ),
    )
    parsing.add_checkpoint(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read everything and compare it with its checksums",
    )
    parser.add_argument(
        "--leaves", action="store_true", help="list path, shape and dtype of all leaves"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON with all leaves; needs no optional package",
    )


def _run(args: argparse.Namespace) -> int:
    from ema_optax import checkpoint
    from ema_optax.cli import description

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
        found = checkpoint.describe(args.directory, step=args.step)
        if not args.json:
            description.print_tables(found, leaves=args.leaves)
    except (BrokenPipeError, ImportError):
        raise
    except Exception as error:
        return fail(error)
    damage = None
    if args.verify:
        try:
            checkpoint.verify(args.directory, step=args.step)
        except Exception as error:
            damage = error
    if args.json:
        whole = damage is None if args.verify else None
        print(description.as_json(found, whole=whole), flush=True)
    elif args.verify and damage is None:
        print("whole: all of it is what was saved", flush=True)
    return 0 if damage is None else fail(damage)
