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
        names: Tensors of the model.
        change: What was done to their axes, in words; `""` for nothing.
        shape: Of the leaf.
        dtype: Of that of the params.
        shadow_dtype: Of that of the shadow; None where it has none of its own.
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
        source: The file, or index, that was read; that of the raw weights, if of two.
        path: The folder of ours; None where nothing was written.
        step: Number of the step in it.
        layout: What the source was read as.
        params: Where the raw weights were; None where there were none: restoring the
            params gives the average.
        shadow: Where the average was; None where there was none: it starts as a copy
            of the params, and has seen no update.
        leaves: Path → what the leaf was made of.
        decay: What it was averaged with; None where that is not known.
        count: Updates that the average has seen.
        told_by: Where `step`, `decay` and `count` come from.
        unwrapped: What was taken off the beginning of all names, by where they were.
        left_out: What else was there: name or key → what it is.
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

    Raw weights and average lie side by side in it where the source has both. Where it
    has raw weights alone, the average starts as a copy, with count 0; where it has an
    average alone, that is the params too. Without rules names become paths, `.` for
    `/`, and arrays stay as they lie, dtypes too.

    Read are safetensors, one file or shards with an index; files of `torch.save`, by a
    reader that runs nothing of them; and folders of models. Which is the average is
    told by the layouts of timm, Lightning, diffusers, `AveragedModel`, ema-pytorch,
    torchvision, torchtitan, latent-diffusion and DiT, or by `params` and `shadow`.

    All is read and checked before anything is written. Files are mapped. Memory holds
    params and average, and 64 MiB or one leaf more.

    Args:
        source: The file, index or folder, on this machine.
        out: Folder of the checkpoint to write, made if missing.
        params: Where the raw weights are: a key, `"model"`, or names with `**` for what
            they are called, `"net.**"`; `"**"` is all at the top. Without `shadow` the
            source has no average.
        shadow: The same of the average; without `params` it is alone.
        shadow_from: File or folder of the average, where it has one of its own;
            `shadow` is then where in that.
        layout: What to read the source as; None for the one layout that fits.
        rules: What becomes of each name, and of its axes; None keeps them.
        step: Number of the step, ≥ 0; None for that recorded, else the count.
        decay: What it was averaged with, for `describe`; None for that recorded.
        count: Updates that the average has seen, ≥ 0; None for those recorded, else the
            step.
        dry_run: Whether to read no tensor, and write nothing.
        progress: True for a bar on stderr, False for none, None for one on a terminal,
            or a function of leaves done and all.

    Raises:
        FileExistsError: If the step is in `out` already; nothing is overwritten.
        FileNotFoundError: If there are no weights, or shards are missing.
        ModuleNotFoundError: If safetensors, torch or einops is needed and missing.
        ValueError: If a file is damaged or holds more than weights, it cannot be told
            what is the average, raw weights and average differ in names or shapes, a
            tensor is not finite or cannot be held, a rule does not fit, or an average
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
    own, beside = torch_folders.open_source(_local(source, "source"))
    if shadow_from is not None:
        if beside is not None:
            raise ValueError(
                f"{own.origin} has an average beside it, {beside.origin}, and "
                "shadow_from is another. Pass the folder of the raw weights as source."
            )
        first, second = torch_folders.open_source(_local(shadow_from, "shadow_from"))
        beside = second or first
    pair = torch_weights.pair_of(
        own, beside, params=params, shadow=shadow, layout=layout
    )
    moves = _moves(pair, read_rules)
    numbers = Numbers.of(pair, step, count, decay)
    done = ImportedTorch(
        source=own.origin,
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
    if steps.is_taken(paths.absolute(folder) / str(done.step)):
        raise FileExistsError(
            f"{folder}/{done.step} exists, and nothing is overwritten. Pass another "
            "step, or another folder."
        )
    if not dry_run:
        _write(done, folder, *_read(pair, moves, progress))
    return done


def _local(path: str | os.PathLike[str], name: str) -> Path:
    text = arguments.path(path, name, "model.safetensors")
    if "://" in text:
        raise ValueError(
            f"{name} is a file or folder of this machine, got {text}. Bring it here "
            "first; out may be a bucket, gs://…"
        )
    return Path(text).expanduser()


def _moves(pair: Pair, rules: Rules) -> dict[str, Move]:
    """Returns how each leaf is made.

    Raises:
        ValueError: If a rule does not fit, or none takes a tensor.
    """
    shapes = {name: entry.shape for name, entry in pair.main.entries.items()}
    moves = rules.to_tree(shapes)
    if not moves:
        raise ValueError(f"No tensor of {pair.main.where} is left: rules take none.")
    return moves


def _leaf(move: Move, pair: Pair) -> ImportedLeaf:
    own = pair.main.entries[move.sources[0]].dtype
    other = None
    if pair.raw is not None and pair.average is not None:
        entry = pair.average.entries.get(move.sources[0])
        other = entry and entry.dtype
    return ImportedLeaf(tuple(move.sources), str(move), tuple(move.shape), own, other)


def _layouts(pair: Pair) -> str:
    names = dict.fromkeys((pair.layout.name, pair.average_layout.name))
    return " and ".join(names)


def _left_out(pair: Pair, moves: Mapping[str, Move]) -> dict[str, str]:
    """Returns tensors that no rule keeps, and what else the files have."""
    taken = {name for move in moves.values() for name in move.sources}
    left = {name: "left out by a rule" for name in pair.main.names if name not in taken}
    files = {x.tensors.origin: x.tensors for x in pair}
    for origin, tensors in files.items():
        used = {
            full
            for weights in pair
            if weights.tensors.origin == origin
            for full in weights.names.values()
        }
        left |= torch_finding.left_out(tensors, used)
    return left


def _read(
    pair: Pair, moves: Mapping[str, Move], progress: bars.Progress
) -> tuple[_Tree, _Tree | None]:
    """Returns the leaves of params and shadow; those of one where it is alone."""
    both = pair.raw is not None and pair.average is not None
    first: _Tree = {}
    second: _Tree = {}
    total = len(moves) * (1 + both)
    with bars.shown(progress, "Reading tensors", total) as report:
        for done, (path, move) in enumerate(moves.items(), start=1):
            first[path] = _made(pair.main, path, move)
            report(done)
        if pair.raw is None or pair.average is None:
            return first, None
        for done, (path, move) in enumerate(moves.items(), start=len(moves) + 1):
            array = _made_if_there(pair.average, path, move)
            # What is not averaged lies in the params, if it is the same.
            if array is not None and not _is_same_integer(array, first[path]):
                second[path] = array
            report(done)
    return first, second


def _made_if_there(weights: Weights, path: str, move: Move) -> np.ndarray | None:
    """Returns a leaf, or None where a partial average has none of its tensors."""
    there = [name for name in move.sources if name in weights.names]
    if not there:
        return None
    if len(there) < len(move.sources):
        missing = next(name for name in move.sources if name not in there)
        raise ValueError(
            f"'{path}' is made of {len(move.sources)} tensors, and the average, "
            f"{weights.where}, has {len(there)} of them: '{missing}' is not averaged."
        )
    return _made(weights, path, move)


def _made(weights: Weights, path: str, move: Move) -> np.ndarray:
    arrays = [weights.tensors.read(weights.names[name]) for name in move.sources]
    try:
        return move(arrays)
    except ValueError as error:
        raise ValueError(f"'{path}' of {weights.where}: {error}") from error


def _is_same_integer(one: np.ndarray, other: np.ndarray) -> bool:
    same = one.dtype == other.dtype and not is_averaged(one.dtype.name)
    return same and bool(np.array_equal(one, other))


def _write(
    done: ImportedTorch, folder: str, params: _Tree, shadow: _Tree | None
) -> None:
    origin = {
        "source": os.path.basename(done.source),
        "layout": done.layout,
        "params": done.params,
        "shadow": done.shadow,
        **{f"{name}_from": where for name, where in done.told_by.items()},
    }
    checkpoint.save_average(
        folder,
        trees.nested(params if shadow is None else shadow),
        params=None if shadow is None else trees.nested(params),
        step=done.step,
        decay=done.decay,
        count=done.count,
        extra={"from": origin},
    )
