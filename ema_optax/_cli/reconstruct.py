"""`ema-optax reconstruct`: its arguments, its warnings, and the order of its work."""

import argparse

from ema_optax._cli import averages, options, parsing, warning_lines, wide
from ema_optax._decays.power_profiles import exponent_from_width
from ema_optax._messages.text import one_line
from ema_optax._reconstruction.projection import DOUBTFUL, WRONG
from ema_optax.reconstruction import ReconstructionWarning, reconstruct

_TO_SHOW = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "reconstruct",
        command=_run,
        extra="cli",
        explain=_explained,
        on_cpu=True,
        summary="Make averages of other widths from the snapshots of a run.",
        details=(
            "RUN is a folder of steps with shadows of a power profile, written by\n"
            "SnapshotSave or EmaSave; the steps of a run may lie in several folders.\n"
            "They are read once for all widths. Memory holds the results and one\n"
            "snapshot. --dry-run without --width shows usual widths.\n"
            "\n"
            "Each average ends at --step N and becomes the checkpoint DIR/width-W/N;\n"
            "checkpoint.restore of DIR/width-W reads it. It is the whole model if a\n"
            "RUN has the params of step N, from EmaSave, else the averaged leaves\n"
            "alone. Nothing is overwritten.\n"
            "\n"
            "  width          standard deviation of the weights over the run\n"
            "                 (sigma_rel)\n"
            "  profile error  distance of the weights from the wanted ones; above\n"
            f"                 {DOUBTFUL:.0%} the command warns, above {WRONG:.0%} it "
            "refuses\n"
            "  noise gain     factor on the rounding error of the snapshots, which is\n"
            "                 3e-4 of each param in float16, 2e-3 in bfloat16"
        ),
        examples=(
            "  ema-optax reconstruct run/snapshots --dry-run\n"
            "  ema-optax reconstruct run/snapshots --width 0.03 0.07 --out averages\n"
            "  ema-optax reconstruct run/snapshots run/checkpoints --width 0.1 \\\n"
            "      --step 20000 --dtype bfloat16 --out averages"
        ),
    )
    parser.usage = (  # argparse would put RUN last, where --width takes it
        "ema-optax reconstruct RUN [RUN ...] --width W [W ...] --out DIR [options]"
    )
    parser.set_defaults(refuse=parser.error)
    parser.add_argument(
        "runs", type=parsing.place, nargs="+", metavar="RUN", help="folder of snapshots"
    )
    parser.add_argument(
        "--width",
        type=_width,
        nargs="+",
        action="extend",
        metavar="W",
        help="width of an average, in (0, 0.2886]",
    )
    options.add_out(parser)
    options.add_step(parser, lowest=1)
    options.add_dtype(parser, "averaged", default="that of the params, else float32")
    options.add_dry_run(parser)
    options.add_json(parser)


def _explained(error: Exception) -> str:
    """Writes an error on one line; for a damaged step, with the advice to remove it."""
    from ema_optax.checkpoint import CorruptCheckpointError

    if isinstance(error, CorruptCheckpointError):
        # Other commands advise an older step; averages do without the damaged one.
        cause = one_line(error.__cause__ or error, limit=None)
        step, _, _ = one_line(error, limit=None).partition(cause)
        return (
            f"{step}{cause} Remove that step: the averages are then made from the "
            "others."
        )
    return parsing.explained(error)


def _width(text: str) -> float:
    try:
        width = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"needs a number in (0, 0.2886], got {text!r}; write RUN before it"
        ) from None
    try:
        exponent_from_width(width)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"needs a number in (0, 0.2886], got {text!r}; the widest average is the "
            "plain mean of the run"
        ) from None
    return width


def _run(args: argparse.Namespace) -> int:
    required = {"--width": args.width, "--out": args.out}
    missing = [name for name, value in required.items() if value is None]
    if missing and not args.dry_run:
        args.refuse(f"needs {' and '.join(missing)}, or --dry-run")
    with (
        wide.in_64_bits(),
        warning_lines.of("reconstruct", ReconstructionWarning),
    ):
        return _do(args)


def _do(args: argparse.Namespace) -> int:
    from ema_optax._cli import average_files

    snapshots = average_files.snapshots(args.runs)
    last = int(snapshots[-1].step) if args.step is None else args.step
    widths = list(dict.fromkeys(args.width or _TO_SHOW))
    plan = averages.plan(snapshots, last, widths, args.out)
    if args.out is not None:
        average_files.check_free(plan, args.out)
    if args.width and not args.dry_run:
        plan.check()
    like, plan.whole = average_files.model(args.runs, snapshots, last)
    if args.out is not None:
        average_files.check_room(plan, args.out, like, args.dtype)
    if args.dry_run:
        averages.show(plan, as_json=args.json, reach=True)
        if args.width:
            plan.check()
        return 0
    reconstructed = reconstruct(
        snapshots,
        width=[row.width for row in plan.rows],
        step=args.step,
        params=like,
        dtype=args.dtype,
        progress=None,
    )
    average_files.write(plan, reconstructed)
    averages.show(plan, as_json=args.json)
    return 0
