"""The demo: digits, a small classifier, and whether its shadow does better."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ema_optax import checkpoint, plots
from ema_optax._averages.shadows import shadow_params
from ema_optax._demo import digits

_MARKER, _CHECKPOINTS, _PICTURE = "demo.json", "checkpoints", "accuracy.png"
_AUTHOR = "ema-optax demo"


class DemoError(Exception):
    """The demo cannot use its folder; the message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Test accuracy of one tree before saving and after restoring it.

    Attributes:
        tree: `params` or `shadow`.
        before: Accuracy of the trained model, in [0, 1].
        after: Accuracy of a fresh model that was given the restored tree.
        exact: Whether both gave the same logits for every image, bit for bit.
    """

    tree: str
    before: float
    after: float
    exact: bool


@dataclasses.dataclass(frozen=True)
class DemoRun:
    """What a run of the demo found and wrote.

    Attributes:
        comparisons: That of the raw params, then that of the shadow.
        picture: The PNG of accuracy over steps.
        checkpoint: The step that holds params and shadow.
    """

    comparisons: tuple[Comparison, ...]
    picture: Path
    checkpoint: Path


def run(*, steps: int, out: Path, seed: int = 0) -> DemoRun:
    """Trains, saves, restores into fresh models, and draws the run.

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
    marker = {"author": _AUTHOR, "steps": steps, "seed": seed}
    _claim(out, marker)
    data = digits.load(seed)
    model = digits.Classifier(rngs=nnx.Rngs(seed))
    params, opt_state, measured = digits.train(model, data, steps=steps, seed=seed)

    graph = nnx.graphdef(model)
    try:
        checkpoint.save(out / _CHECKPOINTS, params, opt_state, step=steps)
        comparisons = []
        trees = {"params": params, "shadow": shadow_params(opt_state, params)}
        for name, trained in trees.items():
            fresh = digits.Classifier(rngs=nnx.Rngs(seed + 1))
            like = nnx.state(fresh, nnx.Param)
            restored = checkpoint.restore(
                out / _CHECKPOINTS, name, like=like, step=steps
            )
            nnx.update(fresh, restored)
            before = digits.logits(graph, trained, data.test_images)
            after = digits.logits(*nnx.split(fresh), data.test_images)
            comparisons.append(
                Comparison(
                    tree=name,
                    before=digits.accuracy(before, data),
                    after=digits.accuracy(after, data),
                    exact=bool(jnp.array_equal(before, after)),
                )
            )
        axes = plots.accuracy_over_steps(*zip(*measured, strict=True))
        axes.figure.savefig(out / _PICTURE)  # pyright: ignore[reportAttributeAccessIssue] no SubFigure
        accuracies = {c.tree: c.after for c in comparisons}
        (out / _MARKER).write_text(json.dumps(marker | {"accuracies": accuracies}))
    except (OSError, checkpoint.CorruptCheckpointError) as error:
        raise DemoError(f"cannot write the run to {out}: {error}") from error
    return DemoRun(
        comparisons=tuple(comparisons),
        picture=out / _PICTURE,
        checkpoint=out / _CHECKPOINTS / str(steps),
    )


def _claim(out: Path, marker: dict[str, Any]) -> None:
    """Makes the folder and leaves a marker, after removing what an earlier demo wrote.

    Raises:
        DemoError: If that is not possible, or if the folder is somebody else's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier_steps(out / _MARKER)
        if earlier is None and any(out.iterdir()):
            raise DemoError(
                f"--out {out} has files in it and is no earlier demo's folder. Choose "
                "a new or an empty one."
            )
        # By name, as there may be somebody's own files beside them by now.
        for name in (f"{earlier}", f"{earlier}.orbax-checkpoint-tmp"):
            if (out / _CHECKPOINTS / name).exists():
                shutil.rmtree(out / _CHECKPOINTS / name)
        if (taken := out / _CHECKPOINTS / str(marker["steps"])).exists():
            raise DemoError(f"{taken} is there already, and not from a demo. Move it.")
        (out / _PICTURE).unlink(missing_ok=True)
        (out / _MARKER).write_text(json.dumps(marker))
    except OSError as error:
        is_other = isinstance(error, FileExistsError)
        reason = "it is no folder" if is_other else error.strerror
        raise DemoError(
            f"cannot write to the folder --out {out}: {reason}. Choose another one."
        ) from error


def _earlier_steps(marker: Path) -> int | None:
    """Returns how many steps an earlier demo took, or None if none left `marker`."""
    try:
        found = json.loads(marker.read_text())
    except (FileNotFoundError, ValueError):  # ValueError: no JSON, or no text
        return None
    if not isinstance(found, dict) or found.get("author") != _AUTHOR:
        return None
    return found["steps"] if isinstance(found.get("steps"), int) else None
