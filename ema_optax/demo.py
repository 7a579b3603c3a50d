"""The demo: digits, a small classifier, and whether its shadow does better."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits

from ema_optax import plots
from ema_optax.averaging import ema_params
from ema_optax.shadows import shadow_params

# Small batches of noisy pixels at a constant, high learning rate: the params keep
# moving around the solution, which is what an average is for.
_BATCH = 32
_PIXEL_NOISE = 0.3
_LEARNING_RATE = 0.1
_MOMENTUM = 0.9
_DECAY = 0.99
_TEST_SHARE = 0.3
_MEASUREMENTS = 50

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
        checkpoint: The Orbax step that holds params and shadow.
    """

    comparisons: tuple[Comparison, ...]
    picture: Path
    checkpoint: Path


class _Digits(NamedTuple):
    """Pixels float32[n, 64] in [0, 1] and labels int[n], to train on and held out."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class _Measured(NamedTuple):
    """Test accuracy of raw params and shadow after so many steps."""

    step: int
    raw: float
    shadow: float


class Classifier(nnx.Module):
    """Images of 64 pixels to the logits of 10 digits, through one hidden layer."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32[n, 10] for pixels float32[n, 64] in [0, 1]."""
        return self.logits(nnx.relu(self.hidden(images)))


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
    digits = _load_digits(seed)
    model = Classifier(rngs=nnx.Rngs(seed))
    params, opt_state, measured = _train(model, digits, steps=steps, seed=seed)

    checkpoints = (out / _CHECKPOINTS).absolute()
    graph = nnx.graphdef(model)
    try:
        _save(checkpoints, params, opt_state, step=steps)
        comparisons = []
        trees = {"params": params, "shadow": shadow_params(opt_state, params)}
        for name, trained in trees.items():
            fresh = Classifier(rngs=nnx.Rngs(seed + 1))
            like = jax.tree.map(_abstract, nnx.state(fresh, nnx.Param))
            nnx.update(fresh, _restore(checkpoints, name, like, step=steps))
            before = _logits(graph, trained, digits.test_images)
            after = _logits(*nnx.split(fresh), digits.test_images)
            comparisons.append(
                Comparison(
                    tree=name,
                    before=_accuracy(before, digits),
                    after=_accuracy(after, digits),
                    exact=bool(jnp.array_equal(before, after)),
                )
            )
        axes = plots.accuracy_over_steps(*zip(*measured, strict=True))
        axes.figure.savefig(out / _PICTURE)  # pyright: ignore no SubFigure here
        accuracies = {c.tree: c.after for c in comparisons}
        (out / _MARKER).write_text(json.dumps(marker | {"accuracies": accuracies}))
    except OSError as error:
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


def _load_digits(seed: int) -> _Digits:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)  # pixels count from 0 to 16
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = np.split(order, [int(_TEST_SHARE * len(labels))])
    return _Digits(images[train], labels[train], images[test], labels[test])


def _train(
    model: Classifier, digits: _Digits, *, steps: int, seed: int
) -> tuple[Any, Any, list[_Measured]]:
    """Returns params and optimizer state after training, and the way there."""
    graph, params = nnx.split(model, nnx.Param)
    optimizer = optax.chain(optax.sgd(_LEARNING_RATE, _MOMENTUM), ema_params(_DECAY))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(seed + 1)  # not the one that split the images

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params: Any, opt_state: Any, images: Any, labels: Any
    ) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    interval = max(1, steps // _MEASUREMENTS)
    measured = []
    with _progress() as progress:
        task = progress.add_task("training", total=steps, accuracies="")
        for step in range(1, steps + 1):
            images, labels = _noisy_batch(rng, digits)
            params, opt_state = train_step(params, opt_state, images, labels)
            progress.advance(task)
            if step % interval == 0 or step == steps:
                shadow = shadow_params(opt_state, params)
                raw, average = (
                    _accuracy(_logits(graph, tree, digits.test_images), digits)
                    for tree in (params, shadow)
                )
                measured.append(_Measured(step, raw, average))
                text = f"raw {raw:.1%}, shadow {average:.1%}"
                progress.update(task, accuracies=text)
    return params, opt_state, measured


def _noisy_batch(
    rng: np.random.Generator, digits: _Digits
) -> tuple[np.ndarray, np.ndarray]:
    chosen = rng.integers(len(digits.train_labels), size=_BATCH)
    images = digits.train_images[chosen]
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    return images + _PIXEL_NOISE * noise, digits.train_labels[chosen]


@partial(jax.jit, static_argnums=0)
def _logits(graph: Any, params: Any, images: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(images)


def _accuracy(logits: jax.Array, digits: _Digits) -> float:
    return float(np.mean(np.asarray(logits).argmax(axis=1) == digits.test_labels))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracies]}"),
        console=Console(stderr=True),
    )


def _abstract(param: jax.Array) -> jax.ShapeDtypeStruct:
    # With its sharding: without one Orbax would return NumPy arrays.
    return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=param.sharding)


def _save(directory: Path, params: Any, opt_state: Any, *, step: int) -> None:
    """Writes params and shadow side by side, as two items of one Orbax step."""
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        shadow=ocp.args.StandardSave(shadow_params(opt_state, params)),
    )
    with ocp.CheckpointManager(directory) as manager:
        manager.save(step, args=items)


def _restore(directory: Path, tree: str, like: Any, *, step: int) -> Any:
    """Returns `params` or `shadow` as arrays like the abstract ones of `like`."""
    items = ocp.args.Composite(**{tree: ocp.args.StandardRestore(like)})
    with ocp.CheckpointManager(directory) as manager:
        return manager.restore(step, args=items)[tree]
