"""`ema-optax demo`: its arguments, and the tables that it prints."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ema_optax._cli import options, parsing

if TYPE_CHECKING:
    from ema_optax._demo.demo import DemoRun


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "demo",
        command=_run,
        extra="demo",
        summary="Train on handwritten digits and compare raw params with averages.",
        details=(
            "Trains a small Flax classifier on scikit-learn's digits with an\n"
            "exponential moving average (EMA) of its params. Saves params and\n"
            "averages side by side with Orbax, restores each into a fresh model, and\n"
            "prints the accuracy before and after. Then it makes two more averages\n"
            "from the checkpoints: one of the width that an evaluation chooses, and\n"
            "the mean of the last ones. Takes about 20 seconds on two cores, and\n"
            "needs no network.\n"
            "\n"
            "DIR may be missing, empty, or an earlier demo's: then that demo's\n"
            "checkpoints and pictures are replaced, and other files stay. The demo\n"
            "writes checkpoints/N, accuracy.png, choice.png and demo.json."
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
    options.add_out(parser, kind=parsing.path, default=Path("demo-run"))
    parser.add_argument(
        "--seed",
        type=parsing.at_least(0),
        default=0,
        metavar="S",
        help="seed of initial params, batches and test split (default: %(default)s)",
    )


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ema_optax._demo import demo

    try:
        run = demo.run(steps=args.steps, out=args.out, seed=args.seed)
    except demo.DemoError as error:
        return parsing.fail(f"ema-optax demo: error: {error}")
    console = Console()
    table = Table(title=f"Accuracy on held-out digits, after {args.steps:,} updates")
    table.add_column("")
    for column in ("trained", "restored", "logits"):
        table.add_column(column, justify="right")
    for comparison in run.comparisons:
        same = "identical" if comparison.exact else "DIFFERENT"
        table.add_row(
            comparison.name, f"{comparison.before:.2%}", f"{comparison.after:.2%}", same
        )
    console.print(table)
    if run.candidates:
        table = Table(title="Averages made afterwards, from the checkpoints")
        table.add_column("")
        for column in ("loss", "accuracy"):
            table.add_column(column, justify="right")
        for model in run.candidates:
            table.add_row(model.name, f"{model.loss:.3f}", f"{model.accuracy:.2%}")
        console.print(table)
    parsing.print_lines(_notes(run))
    if not all(comparison.exact for comparison in run.comparisons):
        return parsing.fail(
            "ema-optax demo: error: a restored model does not answer exactly as it did "
            "before, see the table above"
        )
    return 0


def _notes(run: "DemoRun") -> dict[str, object]:
    """Explains the tables, and says where the files are and what to look at next."""
    updates = 1 / (1 - run.decay)
    checkpoints = shlex.quote(str(run.checkpoint.parent))
    return {
        "EMA": f"β = {run.decay} averages about {updates:.0f} updates, 1/(1 − β)",
        "Afterwards": "measured on the half of the digits that chose nothing"
        if run.candidates
        else None,
        "Picture": run.picture,
        "Choice": run.choice,
        "Checkpoint": run.checkpoint,
        "Look inside": f"ema-optax inspect {checkpoints}",
    }
