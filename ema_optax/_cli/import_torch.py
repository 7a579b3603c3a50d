"""`ema-optax import-torch`: its arguments, and what it prints of the import."""

import argparse
import dataclasses
import json
import re
from typing import TYPE_CHECKING

from ema_optax._cli import options, parsing
from ema_optax._messages.text import some

if TYPE_CHECKING:
    from ema_optax.torch import ImportedTorch

_ROWS = 40  # leaves that are listed without --dry-run


def add(commands: parsing.Commands) -> None:
    """Adds the command."""
    parser = parsing.add_command(
        commands,
        "import-torch",
        command=_run,
        extra="cli,torch",
        explain=_explained,
        on_cpu=True,
        summary="Convert PyTorch or Hugging Face weights to ema_optax's format.",
        details=(
            "SOURCE is a safetensors file, an index of shards, a file of torch.save\n"
            "(.pt, .pth, .ckpt, .bin, .pth.tar), or the folder of a model. No code of\n"
            "a file runs: a file that needs it is refused, with how to convert it.\n"
            "\n"
            "If SOURCE has raw weights and average, the step holds both. If it has\n"
            "raw weights alone, the average starts as a copy, with count 0. The\n"
            "layout is recognised by the names in the file, or named by --like:\n"
            "\n"
            "  timm                 state_dict, state_dict_ema\n"
            "  lightning            current_model_state, and state_dict: the average\n"
            "  averaged-model       module.…, n_averaged: an average alone\n"
            "  torchvision          model, model_ema of an AveragedModel\n"
            "  model-ema            model, ema\n"
            "  ema-pytorch          online_model.…, ema_model.…\n"
            "  ema-pytorch-alone    ema_model.… without the online model\n"
            "  ema-pytorch-trainer  model, ema.ema_model.…\n"
            "  torchtitan           the top, ema.state.….ema_params; converted\n"
            "  litema, litema-flat  latent-diffusion's model_ema.…\n"
            "  diffusers            a folder with EMAModel's settings; also unet and\n"
            "                       unet_ema in one folder\n"
            "  weights              raw weights alone\n"
            "\n"
            "For other layouts --params and --shadow name the key, such as model, or\n"
            "a pattern of names, such as 'net.**'; '**' is everything at the top. If\n"
            "only one of them is passed, the file has only that one.\n"
            "\n"
            "A name becomes a path, with / for each dot, and arrays stay as they lie.\n"
            "--rules names a JSON file with a list of other names and layouts:\n"
            "\n"
            '  [{"name": "**.fc.weight", "path": "**/fc/kernel",\n'
            '    "rearrange": "o i -> i o"}, {"name": "**", "path": "**"}]\n'
            "\n"
            "Files are mapped into memory, which holds params, average and a few\n"
            "leaves more. Nothing is overwritten."
        ),
        examples=(
            "  ema-optax import-torch last.pth.tar --step 90000 --out imported\n"
            "  ema-optax import-torch last.ckpt --dry-run --out imported\n"
            "  ema-optax import-torch checkpoint-500 --out imported\n"
            "  ema-optax import-torch model.safetensors --rules rules.json \\\n"
            "      --shadow-from ema.safetensors --count 500 --out imported"
        ),
    )
    options.add_source(parser, "weights")
    options.add_out(parser, required=True)
    parser.add_argument(
        "--params", type=parsing.place, metavar="KEY", help="where the raw weights are"
    )
    parser.add_argument(
        "--shadow", type=parsing.place, metavar="KEY", help="where the average is"
    )
    parser.add_argument(
        "--shadow-from",
        type=parsing.path,
        metavar="FILE",
        help="file or folder of the average, if it is another",
    )
    parser.add_argument(
        "--like",
        type=parsing.place,
        metavar="LAYOUT",
        help="layout of the file, see above (default: recognised)",
    )
    parser.add_argument(
        "--rules",
        type=parsing.path,
        metavar="FILE",
        help="JSON file of names and layouts, see above",
    )
    options.add_step(parser, default="as recorded, else the count")
    parser.add_argument(
        "--count",
        type=parsing.at_least(0),
        metavar="N",
        help="updates that the average has seen (default: as recorded, else the step)",
    )
    options.add_decay(parser, default="as recorded")
    options.add_dry_run(parser)
    options.add_json(parser)


def _run(args: argparse.Namespace) -> int:
    if not args.json:
        import rich  # noqa: F401 if it is missing, fail before the work
    from ema_optax import interop, torch

    imported = torch.import_checkpoint(
        args.source,
        args.out,
        params=args.params,
        shadow=args.shadow,
        shadow_from=args.shadow_from,
        layout=args.like,
        rules=interop.read_rules(args.rules) if args.rules else None,
        step=args.step,
        decay=args.decay[1] if args.decay else None,
        count=args.count,
        dry_run=args.dry_run,
    )
    if args.json:
        decay = json.loads(imported.decay.to_json()) if imported.decay else None
        fields = dataclasses.asdict(dataclasses.replace(imported, decay=None))
        parsing.print_json(fields | {"raw": imported.raw, "decay": decay})
    else:
        _print(imported, args.dry_run)
    return 0


def _explained(error: Exception) -> str:
    """Writes an error on one line, with options in place of arguments."""
    line = parsing.explained(error)
    for argument in ("params", "shadow", "layout", "count"):
        option = "like" if argument == "layout" else argument
        for quote in ('"', "'"):
            line = line.replace(f"{argument}={quote}", f"--{option} {quote}")
    line = line.replace("count=", "--count ").replace("shadow_from=", "--shadow-from ")
    rule = r'Rule\("([^"]*)", (?:None|"([^"]*)")\)'
    line = re.sub(rule, _as_json, line).replace("rules=[", "--rules with [")
    return line.replace("shadow_from", "--shadow-from")


def _as_json(rule: re.Match[str]) -> str:
    return json.dumps({"name": rule[1], "path": rule[2]})


def _print(imported: "ImportedTorch", dry_run: bool) -> None:
    from ema_optax._cli import tables

    origins = imported.told_by
    decay = (
        f"{imported.decay} ({origins['decay']})" if imported.decay else origins["decay"]
    )
    copy = "none: it starts as a copy of the params"
    parsing.print_lines(
        {
            "From": imported.source,
            "Layout": imported.layout,
            "Params": imported.params or "none: they are the average",
            "Shadow": imported.shadow or copy,
            "Unwrapped": ", ".join(sorted({*imported.unwrapped.values()})) or None,
            "Step": f"{imported.step:,} ({origins['step']})",
            "Count": f"{imported.count:,} ({origins['count']})",
            "Decay": decay,
            "Leaves": f"{len(imported.leaves):,}",
            "To": f"{imported.path}, step {imported.step}"
            if imported.path
            else "not written",
        }
    )
    if dry_run or any(leaf.change for leaf in imported.leaves.values()):
        table = tables.table(("tensor", "leaf", "change", "dtype", "shape"))
        rows = list(imported.leaves.items())
        for path, leaf in rows if dry_run else rows[:_ROWS]:
            dtypes = dict.fromkeys((leaf.dtype, leaf.shadow_dtype or leaf.dtype))
            shape = "×".join(map(str, leaf.shape)) or "scalar"
            cells = (
                some(leaf.names),
                path,
                leaf.change,
                " and ".join(dtypes),
                shape,
            )
            table.add_row(*map(parsing.printable, cells))
        tables.console().print(table)
        if not dry_run and len(rows) > _ROWS:
            print(f"and {len(rows) - _ROWS:,} more; --dry-run lists all")
    if imported.left_out or imported.raw:
        table = tables.table(("not averaged or left out", "what became of it"))
        for path in imported.raw:
            table.add_row(parsing.printable(path), "raw in both trees")
        for name, what in imported.left_out.items():
            table.add_row(*map(parsing.printable, (name, f"left out, {what}")))
        tables.console().print(table)
