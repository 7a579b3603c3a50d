"""`ema-optax profile`: its arguments, and the figures and pictures of a decay."""

import argparse
import json
import sys
from collections.abc import Mapping

from ema_optax._cli import decay_text, options, parsing, sketch
from ema_optax._decays.decay import Decay
from ema_optax._decays.profiles import Profile, profile
from ema_optax._messages.text import percent

_LONGEST = 10_000_000  # updates: seconds and half a gigabyte of memory a decay
_COLUMNS = ("width", "mean age", "of the run", "initial", "effective")


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "profile",
        command=_run,
        extra="plots",
        summary="Show what a decay averages over, before you train with it.",
        details=(
            "Prints for each decay what its shadow holds at the end of the run, and\n"
            "draws the weights of the past updates:\n"
            "  width      standard deviation of the weights over the run (sigma_rel)\n"
            "  mean age   mean distance of the averaged params from the last update\n"
            "  initial    weight that is still on the initial params\n"
            "  effective  1/sum of squared weights: the number of params it averages\n"
            "\n"
            "DECAY is a number such as 0.9999, which is warmup:0.9999 as in\n"
            "ema_params, or a name with its arguments:\n"
            + "\n".join(f"  {form}" for form in decay_text.FORMS.values())
            + "\nINNER is a DECAY: start_after:uniform,1000."
        ),
        examples=(
            "  ema-optax profile --decay 0.9999 --every 10 --steps 100000\n"
            "  ema-optax profile --decay 0.999 power:0.05 half_life:500 --steps 20000\n"
            "  ema-optax profile --decay power:0.1 --steps 50000 --out profile.svg\n"
            "  ema-optax profile --decay uniform --steps 1000 --json"
        ),
    )
    parser.add_argument(
        "--decay",
        type=decay_text.parse,
        nargs="+",
        action="extend",
        required=True,
        metavar="DECAY",
        help="one decay, or several to compare",
    )
    parser.add_argument(
        "--steps",
        type=parsing.at_least(1, at_most=_LONGEST),
        required=True,
        metavar="N",
        help="length of the run in optimizer updates",
    )
    parser.add_argument(
        "--every",
        type=parsing.at_least(1, at_most=_LONGEST),
        default=1,
        metavar="K",
        help="updates between folds, as in ema_params (default: %(default)s)",
    )
    options.add_out(
        parser,
        f"picture ({', '.join(parsing.PICTURES)})",
        metavar="FILE",
        kind=parsing.picture,
    )
    options.add_json(parser)


def _run(args: argparse.Namespace) -> int:
    decays: dict[str, Decay] = dict(args.decay)  # a decay passed twice is shown once
    if args.out:
        from ema_optax import plots

        try:
            ax = plots.profiles(decays, args.steps, every=args.every)
            picture = ax.get_figure(root=True)
            assert picture is not None  # the axes have a figure of their own
            picture.savefig(args.out)
        except (OSError, ValueError) as error:
            return parsing.fail(f"ema-optax profile: error: {error}")
    runs = {
        name: profile(decay, args.steps, args.every) for name, decay in decays.items()
    }
    if args.json:
        parsing.print_json(_figures(args, decays, runs))
        return 0
    print("\n".join(_table(runs)))
    if args.every > args.steps:
        print("\nNothing is folded so soon: the shadow is the initial params.")
    else:
        _draw(runs, args.every)
    if args.out:
        print(f"Picture: {args.out}")
    return 0


def _table(runs: Mapping[str, Profile]) -> list[str]:
    """Writes a table of at most 80 columns, with a long name on a line of its own."""
    name_width = min(max(map(len, runs)), 24)
    head = "".join(f"{column:>11}" for column in _COLUMNS)
    table = [f"{'decay':<{name_width}}{head}", "-" * (name_width + len(head))]
    for name, run in runs.items():
        cells = (
            f"{run.width:.2e}" if 0 < run.width < 0.001 else f"{run.width:.4f}",
            f"{run.mean_age:,.1f}",
            f"{run.mean_age / len(run.weights):.2%}",
            f"{run.initial_weight:.3g}",
            f"{run.effective_size:,.1f}",
        )
        if len(name) > name_width:
            table.append(name)
            name = ""
        table.append(f"{name:<{name_width}}" + "".join(f"{cell:>11}" for cell in cells))
    return table


def _draw(runs: Mapping[str, Profile], every: int) -> None:
    characters = sketch.characters(sys.stdout.encoding)
    for name, run in runs.items():
        print("", name, *sketch.lines(run, every, characters), sep="\n")
        if initial := percent(run.initial_weight):
            print(f"        Not drawn: {initial} still on the initial params.")
    steps = len(next(iter(runs.values())).weights)
    part = "one update" if steps <= sketch.COLUMNS else f"1/{sketch.COLUMNS} of the run"
    print(f"\nA bar holds {part}. {characters.mark} is the mean age.")


def _figures(
    args: argparse.Namespace, decays: Mapping[str, Decay], runs: Mapping[str, Profile]
) -> dict[str, object]:
    names = ("width", "mean_age", "initial_weight", "effective_size")
    return {
        "steps": args.steps,
        "every": args.every,
        "profiles": {
            name: {"decay": json.loads(decays[name].to_json())}
            | {figure: getattr(run, figure) for figure in names}
            for name, run in runs.items()
        },
    }
