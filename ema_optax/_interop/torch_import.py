"""Import: weights of PyTorch and Hugging Face become a checkpoint of ours."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ema_optax import checkpoint
from ema_optax._checkpoint import paths, steps
from ema_optax._decays.decay import Decay
from ema_optax._interop import torch_finding, torch_folders, torch_weights
from ema_optax._interop.moves import Move
from ema_optax._interop.rule import Rule
from ema_optax._interop.rules import Rules
from ema_optax._interop.torch_files import is_averaged
from ema_optax._interop.torch_numbers import Numbers
from ema_optax._interop.torch_weights import Pair, Weights
from ema_optax._messages import arguments
from ema_optax._messages import progress as bars
from ema_optax._messages.text import brief
from ema_optax._trees import trees

_Tree = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImportedLeaf:
    """Tells what a leaf was made of.

    Attributes:
        names: Names of the model's tensors.
        change: What was done to their axes, in words; `""` for nothing.
        shape: Shape of the leaf.
        dtype: Dtype of the leaf in the params.
        shadow_dtype: Dtype of the leaf in the shadow; None where the shadow has none of
            its own.
    """

    names: tuple[str, ...]
    change: str
    shape: tuple[int, ...]
    dtype: str
    shadow_dtype: str | None


@dataclasses.dataclass(frozen=True)
class ImportedTorch:
    """Tells what became of weights of PyTorch or Hugging Face.

    Attributes:
        source: The file, or index, that was read; of two, the one of the raw weights.
        path: Folder of the new checkpoint; None where nothing was written.
        step: Number of the step in the new checkpoint.
        layout: Name of the layout that the source was read as.
        params: Where the raw weights were; None where there were none: restoring the
            params gives the average.
        shadow: Where the average was; None where there was none: it starts as a copy
            of the params, and has seen no update.
        leaves: Path → what the leaf was made of.
        decay: Decay of the average; None where it is not known.
        count: Updates that the average has seen.
        told_by: Where `step`, `decay` and `count` come from.
        unwrapped: Place of weights → prefix that was taken off all their names.
        left_out: Names or keys of whatever was left out → what each is.
    """

    source: str
    path: str | None
    step: int
    layout: str
    params: str | None
    shadow: str | None
    leaves: Mapping[str, ImportedLeaf]
    decay: Decay | None
    count: int
    told_by: Mapping[str, str]
    unwrapped: Mapping[str, str]
    left_out: Mapping[str, str]

    @property
    def raw(self) -> tuple[str, ...]:
        """Paths of floating leaves that a partial average lacks: raw in both trees."""
        if self.params is None or self.shadow is None:
            return ()
        return tuple(
            path
            for path, leaf in self.leaves.items()
            if leaf.shadow_dtype is None and is_averaged(leaf.dtype)
        )


def import_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    params: str | None = None,
    shadow: str | None = None,
    shadow_from: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    rules: Sequence[Rule | Mapping[str, Any]] | Rules | None = None,
    step: int | None = None,
    decay: Decay | None = None,
    count: int | None = None,
    dry_run: bool = False,
    progress: bars.Progress = None,
) -> ImportedTorch:
    """Turns weights of PyTorch or Hugging Face into one of our checkpoints.

    Where the source has raw weights and average, the checkpoint has both. Where it has
    raw weights alone, the average starts as a copy, with count 0; where it has an
    average alone, that is the params too. Without rules names become paths, `/` for
    `.`, and arrays stay as they lie, dtypes too.

    The source may be safetensors, one file or shards with an index; a file of
    `torch.save`, by a reader that runs nothing of the file; or a folder of a model. The
    layouts of timm, Lightning, diffusers, `AveragedModel`, ema-pytorch, torchvision,
    torchtitan, latent-diffusion and DiT tell which tensors are the average, or
    `params` and `shadow` do.

    Everything is read and checked before anything is written. Files are mapped. Memory
    holds params and average, and 64 MiB or one leaf more.

    Args:
        source: The file, index or folder, on this machine.
        out: Folder of the checkpoint to write, made if missing.
        params: Where the raw weights are: a key, `"model"`, or names with `**` for the
            model's own names, `"net.**"`; `"**"` is all at the top. Without `shadow`
            the source has no average.
        shadow: The same of the average; without `params` the average is alone.
        shadow_from: File or folder of the average, where that is another; `shadow`
            then says where in it.
        layout: Name of the layout to read; None for the one layout that fits.
        rules: Path and axes for each name; None keeps names and axes.
        step: Number of the step, ≥ 0; None for the recorded one, else the count.
        decay: Decay of the average, for `describe`; None for the recorded one.
        count: Updates that the average has seen, ≥ 0; None for the recorded number,
            else the step.
        dry_run: Whether to read no tensor, and write nothing.
        progress: True for a bar on stderr, False for none, None for one on a terminal,
            or a function of the leaves read and their total.

    Raises:
        FileExistsError: If the step is in `out` already; nothing is overwritten.
        FileNotFoundError: If there are no weights, or shards are missing.
        ModuleNotFoundError: If safetensors, torch or einops is needed and missing.
        ValueError: If a file is damaged or holds more than weights, nothing tells which
            tensors are the average, raw weights and average differ in names or shapes,
            a tensor is not finite or cannot be held, a rule does not fit, or an average
            comes with neither count nor step.

    >>> import tempfile, ema_optax, safetensors.numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights = {"fc.weight": np.ones((3, 2), np.float32)}
    ...     safetensors.numpy.save_file(weights, f"{folder}/model.safetensors")
    ...     _ = ema_optax.torch.import_checkpoint(
    ...         f"{folder}/model.safetensors", f"{folder}/imported"
    ...     )
    ...     checkpoint.restore(f"{folder}/imported", "params")["fc"]["weight"].shape
    (3, 2)
    """
    dry_run = arguments.flag(dry_run, "dry_run")
    folder = os.fspath(paths.absolute(arguments.path(out, "out", "imported")))
    if decay is not None and not isinstance(decay, Decay):
        raise TypeError(
            "decay is what it was averaged with, such as ema_optax.warmup(0.9999), or "
            f"None for that recorded; got {brief(decay)}."
        )
    for value, name in ((params, "params"), (shadow, "shadow"), (layout, "layout")):
        if value is not None:
            arguments.a_name(value, name, "model-ema" if name == "layout" else "model")
    read_rules = Rules.of(rules)
    tensors, average_tensors = torch_folders.open_source(_local(source, "source"))
    if shadow_from is not None:
        if average_tensors is not None:
            raise ValueError(
                f"{tensors.origin} has an average beside it, {average_tensors.origin}, "
                "and shadow_from is another. Pass the folder of the raw weights as "
                "source."
            )
        main, paired = torch_folders.open_source(_local(shadow_from, "shadow_from"))
        average_tensors = paired or main
    pair = torch_weights.pair_of(
        tensors, average_tensors, params=params, shadow=shadow, layout=layout
    )
    moves = _moves(pair, read_rules)
    numbers = Numbers.of(pair, step, count, decay)
    imported = ImportedTorch(
        source=tensors.origin,
        path=None if dry_run else folder,
        step=numbers.step,
        layout=_layouts(pair),
        params=pair.raw and pair.raw.where,
        shadow=pair.average and pair.average.where,
        leaves={path: _leaf(move, pair) for path, move in moves.items()},
        decay=numbers.decay,
        count=numbers.count,
        told_by=numbers.told_by,
        unwrapped={x.where: x.wrapper for x in pair if x.wrapper},
        left_out=_left_out(pair, moves),
    )
    if steps.is_taken(paths.absolute(folder) / str(imported.step)):
        raise FileExistsError(
            f"{folder}/{imported.step} exists, and nothing is overwritten. Pass "
            "another step, or another folder."
        )
    if not dry_run:
        _write(imported, folder, *_read(pair, moves, progress))
    return imported


def _local(path: str | os.PathLike[str], name: str) -> Path:
    text = arguments.path(path, name, "model.safetensors")
    if "://" in text:
        raise ValueError(
            f"{name} is a file or folder of this machine, got {text}. Bring it here "
            "first; out may be a bucket, gs://…"
        )
    return Path(text).expanduser()


def _moves(pair: Pair, rules: Rules) -> dict[str, Move]:
    """Plans how each leaf is made of tensors.

    Raises:
        ValueError: If a rule does not fit, or none takes a tensor.
    """
    shapes = {name: entry.shape for name, entry in pair.main.entries.items()}
    moves = rules.to_tree(shapes)
    if not moves:
        raise ValueError(f"No tensor of {pair.main.where} is left: rules take none.")
    return moves


def _leaf(move: Move, pair: Pair) -> ImportedLeaf:
    dtype = pair.main.entries[move.sources[0]].dtype
    shadow_dtype = None
    if pair.raw is not None and pair.average is not None:
        entry = pair.average.entries.get(move.sources[0])
        shadow_dtype = entry and entry.dtype
    return ImportedLeaf(
        tuple(move.sources), str(move), tuple(move.shape), dtype, shadow_dtype
    )


def _layouts(pair: Pair) -> str:
    names = dict.fromkeys((pair.layout.name, pair.average_layout.name))
    return " and ".join(names)


def _left_out(pair: Pair, moves: Mapping[str, Move]) -> dict[str, str]:
    """Lists the tensors that no rule keeps, and what else the files have."""
    taken = {name for move in moves.values() for name in move.sources}
    left_out = {
        name: "left out by a rule" for name in pair.main.names if name not in taken
    }
    files = {x.tensors.origin: x.tensors for x in pair}
    for origin, tensors in files.items():
        used = {
            full
            for weights in pair
            if weights.tensors.origin == origin
            for full in weights.names.values()
        }
        left_out |= torch_finding.left_out(tensors, used)
    return left_out


def _read(
    pair: Pair, moves: Mapping[str, Move], progress: bars.Progress
) -> tuple[_Tree, _Tree | None]:
    """Reads the leaves of params and shadow, or of the one that there is."""
    has_both = pair.raw is not None and pair.average is not None
    main: _Tree = {}
    shadow: _Tree = {}
    total = len(moves) * (1 + has_both)
    with bars.shown(progress, "Reading tensors", total) as report:
        for count, (path, move) in enumerate(moves.items(), start=1):
            main[path] = _array(pair.main, path, move)
            report(count)
        if pair.raw is None or pair.average is None:
            return main, None
        for count, (path, move) in enumerate(moves.items(), start=len(moves) + 1):
            array = _array_or_none(pair.average, path, move)
            # Integers are not averaged: equal ones lie in the params alone.
            if array is not None and not _is_same_integer(array, main[path]):
                shadow[path] = array
            report(count)
    return main, shadow


def _array_or_none(weights: Weights, path: str, move: Move) -> np.ndarray | None:
    """Makes a leaf, or None where a partial average has none of its tensors."""
    names = [name for name in move.sources if name in weights.names]
    if not names:
        return None
    if len(names) < len(move.sources):
        missing = next(name for name in move.sources if name not in names)
        raise ValueError(
            f"'{path}' is made of {len(move.sources)} tensors, and the average, "
            f"{weights.where}, has {len(names)} of them: '{missing}' is not averaged."
        )
    return _array(weights, path, move)


def _array(weights: Weights, path: str, move: Move) -> np.ndarray:
    arrays = [weights.tensors.read(weights.names[name]) for name in move.sources]
    try:
        return move(arrays)
    except ValueError as error:
        raise ValueError(f"'{path}' of {weights.where}: {error}") from error


def _is_same_integer(one: np.ndarray, other: np.ndarray) -> bool:
    same = one.dtype == other.dtype and not is_averaged(one.dtype.name)
    return same and bool(np.array_equal(one, other))


def _write(
    imported: ImportedTorch, folder: str, params: _Tree, shadow: _Tree | None
) -> None:
    origin = {
        "source": os.path.basename(imported.source),
        "layout": imported.layout,
        "params": imported.params,
        "shadow": imported.shadow,
        **{f"{name}_from": where for name, where in imported.told_by.items()},
    }
    checkpoint.save_average(
        folder,
        trees.nested(params if shadow is None else shadow),
        params=None if shadow is None else trees.nested(params),
        step=imported.step,
        decay=imported.decay,
        count=imported.count,
        extra={"from": origin},
    )
