"""`ema-optax export`: its arguments, and what it does with them."""

import argparse
import collections
import dataclasses
import json
from typing import Any

from ema_optax.cli import parsing
from ema_optax.decay import Decay
from ema_optax.text import some

_LONGEST = 2**24  # characters of a file of names


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "export",
        command=_run,
        extra="safetensors",
        explain=parsing.explained,
        on_cpu=True,
        summary="Write one tree of a checkpoint as a safetensors file.",
        details=(
            "DIR is the folder of a CheckpointManager or of checkpoint.save, or one\n"
            "step in it. All that is read is compared with its checksums. A shadow is\n"
            "the whole model: leaves that are not averaged are those of the params.\n"
            "Memory holds what is written, and one leaf more.\n"
            "\n"
            "Names are the paths with dots, encoder.kernel. --rename takes a JSON\n"
            "object from paths, or beginnings of them, to names; the longest that\n"
            'fits counts, null leaves out, and the path "" stands for all:\n'
            "\n"
            '  {"": "model", "encoder": "model.enc", "dropout/key": null}\n'
            "\n"
            "In a pattern * stands for characters of one key, ** for any number of\n"
            "keys, and the first pattern that fits counts, after the beginnings:\n"
            "\n"
            '  {"**/kernel": "**/weight", "layers_*": "h/*"}\n'
            "\n"
            "What each fitted is listed.\n"
            "\n"
            "The file's metadata tell tree, step, decay, every and count."
        ),
        examples=(
            "  ema-optax export run/checkpoints --out model.safetensors\n"
            "  ema-optax export run/checkpoints --tree params --step 300 \\\n"
            "      --dtype bfloat16 --out params.safetensors\n"
            "  ema-optax export run/checkpoints --rename names.json --out m.safetensors"
        ),
    )
    parsing.add_checkpoint(parser)
    parser.add_argument(
        "--tree",
        type=parsing.place,
        default="shadow",
        metavar="TREE",
        help="params, shadow, or shadow/NAME (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=parsing.path, required=True, metavar="FILE", help="what to write"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of floating leaves; others stay (default: those stored)",
    )
    parser.add_argument(
        "--rename", type=_renames, metavar="FILE", help="JSON, see above"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a file that is there"
    )
    parser.add_argument(
        "--json", action="store_true", help="print what was written as JSON"
    )


def _renames(text: str) -> Any:
    """Returns what a file holds; whether it fits is for the export to say."""
    try:
        with parsing.path(text).open(encoding="utf-8") as file:
            read = file.read(_LONGEST + 1)
        if len(read) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST:,} characters")
        return json.loads(read, object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(
            f"needs a JSON object of paths and names, cannot read {text}: {reason}"
        ) from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"it has the path '{twice[:200]}' twice")
    return found


def _run(args: argparse.Namespace) -> int:
    from ema_optax import interop

    done = interop.export_safetensors(
        args.directory,
        args.out,
        tree=args.tree,
        step=args.step,
        item=args.item,
        dtype=args.dtype,
        rename=args.rename,
        overwrite=args.force,
    )
    if args.json:
        parsing.print_json(dataclasses.asdict(done))
        return 0
    decay = done.metadata.get("decay")
    if decay is not None:
        decay = "not recorded" if decay == "null" else Decay.from_json(decay)
    parsing.print_lines(
        {
            "Tree": done.tree,
            "Step": done.step,
            "Tensors": f"{len(done.names):,}",
            "Size": f"{done.bytes:,} bytes",
            "Decay": decay,
            "File": done.path,
        }
    )
    for key, paths in done.renamed.items():
        what = (
            f"{key} -> {'left out' if args.rename[key] is None else args.rename[key]}"
        )
        pairs = [f"{path} -> {done.names.get(path, 'left out')}" for path in paths]
        print(parsing.printable(f"{what}: {len(paths):,} leaves, {some(pairs)}"))
    return 0
