"""`ema-optax export`: its arguments, and what it prints of the files."""

import argparse
import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ema_optax._cli import options, parsing
from ema_optax._decays.decay import Decay
from ema_optax._messages.text import some

if TYPE_CHECKING:
    from ema_optax.interop import Rules
    from ema_optax.safetensors import Exported


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "export",
        command=_run,
        extra="safetensors",
        explain=parsing.explained,
        on_cpu=True,
        summary="Write the params or an average of a checkpoint as safetensors files.",
        details=(
            "DIR is the folder of a CheckpointManager or of checkpoint.save, or one\n"
            "step in it. Leaves are compared with their checksums. A shadow is\n"
            "written as a whole model: leaves not averaged come from the params.\n"
            "Memory holds one file, and the leaves of one tensor more.\n"
            "\n"
            "--out is a file. With --max-shard-size it is a folder, as transformers\n"
            "and diffusers load it: model.safetensors, or shards with an index. With\n"
            "--tree twice or more it is a folder with one such folder for each tree,\n"
            "params/ and shadow/. If an export fails, nothing of it stays.\n"
            "\n"
            "A tensor is named by the path of its leaf with dots, encoder.kernel.\n"
            "--rename takes a JSON file that maps paths, or beginnings of paths, to\n"
            "names. The longest that fits applies, null leaves a leaf out, and the\n"
            'path "" fits all:\n'
            "\n"
            '  {"": "model", "encoder": "model.enc", "dropout/key": null}\n'
            "\n"
            "In a pattern * matches characters of a key, ** any number of keys. The\n"
            "first pattern that fits applies, if no beginning of a path fits:\n"
            "\n"
            '  {"**/kernel": "**/weight", "layers_*": "h/*"}\n'
            "\n"
            "The command lists the leaves that each entry renamed.\n"
            "\n"
            "--rules takes a JSON list of names and layouts instead. The first rule\n"
            "that fits a path applies, and each path needs one. Patterns are as\n"
            "above; # matches a number. If only the name has a #, the leaf is split\n"
            "along its first axis:\n"
            "\n"
            '  [{"name": "h.#.fc.weight", "path": "h/fc/kernel",\n'
            '    "rearrange": "l o i -> l i o"},\n'
            '   {"name": null, "path": "rng/key"}, {"name": "**", "path": "**"}]\n'
            "\n"
            "rearrange is an einops pattern from the file's axes to the tree's,\n"
            "applied backwards here. A rule with several names, axis and lengths\n"
            "splits a leaf; one with several paths joins leaves. --dry-run lists the\n"
            "result.\n"
            "\n"
            "The file's metadata record tree, step, decay, every and count."
        ),
        examples=(
            "  ema-optax export run/checkpoints --out model.safetensors\n"
            "  ema-optax export run/checkpoints --tree params --step 300 \\\n"
            "      --dtype bfloat16 --out params.safetensors\n"
            "  ema-optax export run/checkpoints --rename names.json --out m\n"
            "  ema-optax export run/checkpoints --rules rules.json --dry-run --out m\n"
            "  ema-optax export run/checkpoints --tree params --tree shadow \\\n"
            "      --rules rules.json --max-shard-size 5GB --out exported"
        ),
    )
    options.add_checkpoint(parser)
    options.add_tree(parser, shown="shadow", repeated=True)
    options.add_out(
        parser, "file or folder", metavar="PATH", kind=parsing.path, required=True
    )
    options.add_dtype(parser, "floating", default="as stored")
    parser.add_argument(
        "--rename", type=_renames, metavar="FILE", help="JSON file of names, see above"
    )
    parser.add_argument(
        "--rules",
        type=_rules,
        metavar="FILE",
        help="JSON file of names and layouts, see above",
    )
    parser.add_argument(
        "--max-shard-size",
        type=parsing.place,
        metavar="SIZE",
        help="most bytes of a file, such as 5GB or 500MB (default: one file)",
    )
    parser.add_argument(
        "--name",
        dest="start",  # `name` is the command's own
        type=parsing.place,
        metavar="NAME",
        help="name of the files in the folder, such as diffusion_pytorch_model\n"
        "(default: model)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an earlier export"
    )
    options.add_dry_run(parser)
    options.add_json(parser)


def _renames(text: str) -> Any:
    """Reads the JSON file of `--rename`, whose keys and names the export checks."""
    try:
        return parsing.json_file(text, _without_repeats)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"needs a JSON object of paths and names, {error}"
        ) from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    renames = dict(pairs)
    if len(renames) < len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        repeated = counts.most_common(1)[0][0]
        raise ValueError(f"it has the path '{repeated[:200]}' twice")
    return renames


def _rules(text: str) -> "Rules":
    from ema_optax import interop

    try:
        return interop.read_rules(parsing.path(text))
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text}: {reason}") from None


def _run(args: argparse.Namespace) -> int:
    if args.dry_run and not args.json:
        args.extra = "cli,safetensors"
        import rich  # noqa: F401 if it is missing, fail before the work

    from ema_optax import safetensors

    trees = args.tree or ["shadow"]
    result = safetensors.export(
        args.directory,
        args.out,
        tree=trees[0] if len(trees) == 1 else trees,
        step=args.step,
        item=args.item,
        dtype=args.dtype,
        rename=args.rename,
        rules=args.rules,
        max_shard_size=args.max_shard_size,
        name=args.start,
        overwrite=args.force,
        dry_run=args.dry_run,
    )
    exports = [result] if isinstance(result, safetensors.Exported) else result
    if args.json:
        values = [dataclasses.asdict(export) for export in exports]
        parsing.print_json(values[0] if len(values) == 1 else {"trees": values})
        return 0
    for export in exports:
        _print(export, args.rename, args.dry_run)
    return 0


def _print(
    export: "Exported", rename: Mapping[str, str | None] | None, dry_run: bool
) -> None:
    decay = export.metadata.get("decay")
    if decay is not None:
        decay = "not recorded" if decay == "null" else Decay.from_json(decay)
    files = dict.fromkeys(tensor.file for tensor in export.tensors)
    parsing.print_lines(
        {
            "Tree": export.tree,
            "Step": export.step,
            "Tensors": f"{len(export.tensors):,}",
            "Size": f"{export.bytes:,} bytes",
            "Decay": decay,
            "Files": f"{len(files):,}" if len(files) > 1 else None,
            "Would be" if dry_run else "File": export.path
            if len(files) > 1 or export.path.name in files
            else export.path / next(iter(files)),
        }
    )
    for key, paths in export.renamed.items():
        target = rename[key] if rename else None
        what = f"{key} -> {'left out' if target is None else target}"
        pairs = [f"{path} -> {export.names.get(path, 'left out')}" for path in paths]
        print(parsing.printable(f"{what}: {len(paths):,} leaves, {some(pairs)}"))
    if dry_run:
        _print_table(export)


def _print_table(export: "Exported") -> None:
    from ema_optax._cli import tables

    table = tables.table(("name", "of", "made by", "dtype", "shape", "file"))
    for tensor in export.tensors:
        cells = (
            tensor.name,
            " ".join(tensor.paths),
            tensor.made,
            tensor.dtype,
            "×".join(map(str, tensor.shape)),
            tensor.file,
        )
        table.add_row(*map(parsing.printable, cells))
    tables.console().print(table)
