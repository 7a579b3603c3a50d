"""`ema-optax demo`: its arguments, and the table of what it found."""

import argparse
from pathlib import Path

from ema_optax._cli import parsing


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "demo",
        command=_run,
        extra="demo",
        summary="Train on handwritten digits and compare params with their shadow.",
        details=(
            "Trains a small Flax classifier on scikit-learn's digits, saves params\n"
            "and shadow side by side with Orbax, restores each into a fresh model,\n"
            "and prints the test accuracy of both before and after. Takes about 15\n"
            "seconds on two cores and needs no network.\n"
            "\n"
            "DIR may be missing, empty, or an earlier demo's: then that demo's\n"
            "checkpoint and picture are replaced, and other files stay. The demo\n"
            "writes checkpoints/N, accuracy.png and demo.json."
        ),
        examples=(
            "  ema-optax demo\n"
            "  ema-optax demo --steps 300 --seed 4\n"
            "  ema-optax demo --out runs/digits"
        ),
    )
    parser.add_argument(
        "--steps",
        type=parsing.at_least(1),
        default=1000,
        metavar="N",
        help="optimizer updates to train for (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=parsing.path,
        default=Path("demo-run"),
        metavar="DIR",
        help="folder for what the demo writes, made if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=parsing.at_least(0),
        default=0,
        metavar="S",
        help="decides initial params, batches and test split (default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ema_optax._demo import demo

    try:
        run = demo.run(steps=args.steps, out=args.out, seed=args.seed)
    except demo.DemoError as error:
        return parsing.fail(f"ema-optax demo: error: {error}")
    table = Table(title="Accuracy on held-out digits")
    table.add_column("")
    for column in ("trained", "restored", "logits"):
        table.add_column(column, justify="right")
    for c in run.comparisons:
        name = {"params": "raw params"}.get(c.tree, c.tree)
        same = "identical" if c.exact else "DIFFERENT"
        table.add_row(name, f"{c.before:.2%}", f"{c.after:.2%}", same)
    Console().print(table)
    parsing.print_lines({"Picture": run.picture, "Checkpoint": run.checkpoint})
    if not all(c.exact for c in run.comparisons):
        return parsing.fail(
            "ema-optax demo: error: a restored model does not answer exactly as it did "
            "before, see the table above"
        )
    return 0
