"""The demo: train on digits, save, restore, and compare raw params with averages."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ema_optax import checkpoint, plots
from ema_optax._averages.shadows import shadow_params
from ema_optax._demo import afterwards, digits

_MARKER, _CHECKPOINTS = "demo.json", "checkpoints"
_PICTURE, _CHOICE = "accuracy.png", "choice.png"
_SAVES = 20  # in a run: enough to make any width from 5 to 20 % of it
_AUTHOR = "ema-optax demo"


class DemoError(Exception):
    """The demo cannot use its folder; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Test accuracy of one tree before saving and after restoring it.

    Attributes:
        tree: `params` or `shadow/ema`, as the checkpoint calls it.
        name: Its name in the table.
        before: Accuracy of the trained model, in [0, 1].
        after: Accuracy of a fresh model that was given the restored tree.
        exact: Whether both models gave the same logits for every image, bit for bit.
    """

    tree: str
    name: str
    before: float
    after: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """Results and files of a run of the demo.

    Attributes:
        comparisons: Of the raw params, then of the EMA.
        candidates: Models that the run ended with, and averages made afterwards; empty
            where the run was too short.
        picture: The PNG of accuracy over steps.
        choice: The PNG of the widths that were tried; None without `candidates`.
        checkpoint: The last step, which holds params and shadows.
        decay: Decay of the EMA.
    """

    comparisons: tuple[Comparison, ...]
    candidates: tuple[afterwards.Candidate, ...]
    picture: Path
    choice: Path | None
    checkpoint: Path
    decay: float = digits.DECAY


def run(*, steps: int, out: Path, seed: int = 0) -> DemoRun:
    """Trains, saves, restores into fresh models, chooses a width, and draws all.

    Args:
        steps: Optimizer updates, ≥ 1.
        out: Folder to write to. An earlier demo's files in it are replaced.
        seed: Decides initial params, batches and test split, in [0, 2³¹).

    Returns:
        The accuracies and where the files are.

    Raises:
        DemoError: If `out` cannot be written to or has somebody's files, before any
            training; or if the disk fails afterwards.
    """
    every = max(1, steps // _SAVES)
    saved = sorted({*range(every, steps + 1, every), steps})
    marker = {"author": _AUTHOR, "steps": steps, "seed": seed, "saved": saved}
    _claim(out, marker)
    data = digits.load(seed)
    model = digits.Classifier(rngs=nnx.Rngs(seed))
    graph = nnx.graphdef(model)
    folder = out / _CHECKPOINTS
    try:
        params, opt_state, measured = digits.train(
            model,
            data,
            steps=steps,
            seed=seed,
            save=lambda step, *run: checkpoint.save(folder, *run, step=step),
            save_every=every,
        )
        ema = shadow_params(opt_state, params, name="ema")
        models = {"raw params": params, f"EMA, β = {digits.DECAY}": ema}
        comparisons = [
            _compared(graph, trained, data, folder, tree=tree, name=name, seed=seed)
            for tree, (name, trained) in zip(
                ("params", "shadow/ema"), models.items(), strict=True
            )
        ]
        axes = plots.accuracy_over_steps(
            *zip(*measured, strict=True), label=comparisons[1].name
        )
        axes.figure.savefig(out / _PICTURE)  # pyright: ignore[reportAttributeAccessIssue] no SubFigure
        candidates, choice = (), None
        if len(saved) >= afterwards.LEAST:
            candidates, chosen = afterwards.candidates(
                folder, saved, graph, data, models
            )
            choice = out / _CHOICE
            plots.choice(chosen).figure.savefig(choice)  # pyright: ignore[reportAttributeAccessIssue] no SubFigure
        accuracies = {c.tree: c.after for c in comparisons}
        (out / _MARKER).write_text(json.dumps(marker | {"accuracies": accuracies}))
    except (OSError, checkpoint.CorruptCheckpointError) as error:
        raise DemoError(f"cannot write the run to {out}: {error}") from error
    return DemoRun(
        comparisons=tuple(comparisons),
        candidates=candidates,
        picture=out / _PICTURE,
        choice=choice,
        checkpoint=folder / str(steps),
    )


def _compared(
    graph: nnx.GraphDef[digits.Classifier],
    trained: nnx.State,
    data: digits.Digits,
    folder: Path,
    *,
    tree: str,
    name: str,
    seed: int,
) -> Comparison:
    """Restores a tree of the last step into a fresh model, and compares the logits."""
    # Of another seed, so that only the restored tree can give the same logits.
    fresh = digits.Classifier(rngs=nnx.Rngs(seed + 1))
    like = nnx.state(fresh, nnx.Param)
    nnx.update(fresh, checkpoint.restore(folder, tree, like=like))
    before = digits.logits(graph, trained, data.test_images)
    after = digits.logits(*nnx.split(fresh), data.test_images)
    return Comparison(
        tree=tree,
        name=name,
        before=digits.accuracy(before, data),
        after=digits.accuracy(after, data),
        exact=bool(jnp.array_equal(before, after)),
    )


def _claim(out: Path, marker: dict[str, Any]) -> None:
    """Makes the folder, removes an earlier demo's files, and writes a marker.

    Raises:
        DemoError: If the folder cannot be made, or has somebody's files.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_steps(out / _MARKER)
        if earlier is None and any(out.iterdir()):
            raise DemoError(
                f"--out {out} has files in it and is no earlier demo's folder. Choose "
                "a new or an empty one."
            )
        # By name, as the user may have put files beside the steps since.
        for step in earlier or ():
            for name in (f"{step}", f"{step}.orbax-checkpoint-tmp"):
                if (out / _CHECKPOINTS / name).exists():
                    shutil.rmtree(out / _CHECKPOINTS / name)
        for other in (out / _CHECKPOINTS).glob("[0-9]*"):  # would be read as a step
            raise DemoError(f"{other} is there already, and not from a demo. Move it.")
        for picture in (_PICTURE, _CHOICE):
            (out / picture).unlink(missing_ok=True)
        (out / _MARKER).write_text(json.dumps(marker))
    except OSError as error:
        is_other = isinstance(error, FileExistsError)
        reason = "it is no folder" if is_other else error.strerror
        raise DemoError(
            f"cannot write to the folder --out {out}: {reason}. Choose another one."
        ) from error


def _earlier_steps(marker: Path) -> list[int] | None:
    """Reads the steps of an earlier demo; None if `marker` is no demo's."""
    try:
        earlier = json.loads(marker.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: no JSON, or no text
        return None
    if not isinstance(earlier, dict) or earlier.get("author") != _AUTHOR:
        return None
    saved = earlier.get("saved", [earlier.get("steps")])
    return [step for step in saved if isinstance(step, int)] or None
