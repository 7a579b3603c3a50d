"""Finds the files of weights in a folder, and the average beside them."""

import dataclasses
from pathlib import Path

from ema_optax._interop.torch_files import (
    PICKLED,
    SAFETENSORS,
    Tensors,
    opened,
    settings,
    shards_of,
)
from ema_optax._messages.text import nearest, some

# Beginnings of the names of files that training programs write beside the weights.
_OTHERS = ("optimizer", "scheduler", "rng_state", "random_states", "training_args")
_OTHERS += ("scaler", "sampler", "dataloader", "custom_checkpoint")
_EMA = "_ema"  # of diffusers' folders


def open_source(source: Path) -> tuple[Tensors, Tensors | None]:
    """Opens the weights of a file or folder, and an average in a folder of its own.

    Args:
        source: A file; the folder of a model, with one file or one index of shards; or
            a folder of diffusers' training programs, with `unet` and `unet_ema`.

    Raises:
        FileNotFoundError: If `source` does not exist, or has no weights in it.
        ValueError: If there are several files of weights, or one cannot be read.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"There is no {source}. {_nearest(source.parent, source.name)}"
        )
    if not source.is_dir():
        return opened(source), None
    _refuse_distributed(source)
    files = _files(source)
    if len(files) > 1:
        names = some((file.name for file in files), 8)
        raise ValueError(
            f"{source} has several files of weights: {names}. Pass one of them: "
            f"{files[0]}."
        )
    if files:
        return _with_settings(files[0]), None
    pairs = [
        (folder.with_name(folder.name.removesuffix(_EMA)), folder)
        for folder in sorted(source.iterdir())
        if folder.is_dir() and folder.name.endswith(_EMA)
    ]
    pairs = [pair for pair in pairs if all(map(_is_model, pair))]
    if len(pairs) == 1:
        raw, average = pairs[0]
        return open_source(raw)[0], open_source(average)[0]
    if pairs:
        names = some((f"{raw.name} and {raw.name}{_EMA}" for raw, _ in pairs), 8)
        raise ValueError(
            f"{source} has several models with averages: {names}. Pass one of them "
            f'as source, {pairs[0][0]}, and its average: shadow_from="{pairs[0][1]}".'
        )
    with_weights = [str(path) for path in sorted(source.iterdir()) if _is_model(path)]
    advice = (
        f"There are weights in {some(with_weights, 8)}: pass one of them."
        if with_weights
        else f"It has {some(sorted(path.name for path in source.iterdir()), 8) or '—'}."
    )
    raise FileNotFoundError(f"There are no weights in {source} itself. {advice}")


def _with_settings(file: Path) -> Tensors:
    tensors = opened(file)
    config = {f"config.{key}": value for key, value in settings(file.parent).items()}
    return dataclasses.replace(tensors, values={**tensors.values, **config})


def _files(folder: Path) -> list[Path]:
    """Lists the files of weights in a folder; of shards, their index."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    indices = [path for path in files if path.name.endswith(".index.json")]
    shards = {shard for index in indices for shard in shards_of(index)}
    endings = (SAFETENSORS, *PICKLED)
    return indices + [
        path
        for path in files
        if path.suffix in endings
        and path not in shards
        and not path.name.startswith(_OTHERS)
    ]


def _is_model(path: Path) -> bool:
    return path.is_dir() and bool(_files(path))


def _refuse_distributed(folder: Path) -> None:
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        raise ValueError(
            f"{folder} is a checkpoint of torch.distributed.checkpoint, whose .metadata"
            " is a pickle that runs code when it is read. If you trust who wrote it, "
            "convert it in the environment of the run, and import the file: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} "
            "checkpoint.pt"
        )


def _nearest(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"Its folder {folder} does not exist."
    names = sorted(path.name for path in folder.iterdir())
    return nearest(name, names) if names else f"{folder} is empty."
