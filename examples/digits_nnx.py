"""A Flax NNX model with BatchNorm: train, evaluate, save, resume, infer.

    python examples/digits_nnx.py train FOLDER --steps 300  # again goes on
    python examples/digits_nnx.py infer FOLDER              # needs no optimizer

The average is evaluated with BatchNorm statistics of its own, and saved with the run in
the background.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

import ema_optax
from ema_optax import checkpoint, digits, ema_params

BATCH, SAVE_EVERY, WIDTH = 32, 100, 64


class Classifier(nnx.Module):
    """Two layers, with BatchNorm between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits, float32[n, 10], of images, float32[n, 64]."""
        return self.out(nnx.relu(self.norm(self.hidden(images))))


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, images, labels):
    """Updates the model, the optimizer, and in it the average."""

    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return jnp.mean(losses)

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def correct(model: Classifier, images, labels) -> jax.Array:
    """Returns the share of images that a model in evaluation mode gets right."""
    return jnp.mean(jnp.argmax(model(images), axis=-1) == labels)


def batches(data: digits.Digits, steps: range):
    """Yields a batch of images and labels for each step, the same after a resume."""
    for step in steps:
        rows = np.random.default_rng(step).choice(len(data.train_images), BATCH, False)
        yield data.train_images[rows], data.train_labels[rows]


def train(folder: str, steps: int) -> dict[str, float]:
    """Trains on from the newest step, and returns accuracies on the test images."""
    data = digits.load(seed=0)
    model = Classifier(nnx.Rngs(0))
    chain = optax.chain(optax.adamw(3e-2), ema_params(0.99))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    with ocp.CheckpointManager(epath.Path(folder).absolute()) as manager:
        start = manager.latest_step() or 0
        if start:
            args = checkpoint.EmaResume(*ema_optax.nnx.split(model, optimizer))
            found = manager.restore(start, args=args)
            ema_optax.nnx.update(model, optimizer, *found)
        model.train()
        for step, batch in enumerate(batches(data, range(start, start + steps)), start):
            train_step(model, optimizer, *batch)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == start + steps:
                args = checkpoint.EmaSave(*ema_optax.nnx.split(model, optimizer))
                manager.save(step + 1, args=args)  # goes on in the background
        averaged = ema_optax.nnx.shadow_copy(model, optimizer)
        images = [images for images, _ in batches(data, range(16))]
        ema_optax.nnx.refresh_batch_stats(averaged, images)
    return {
        name: accuracy(one, data)
        for name, one in (("raw", model), ("averaged", averaged))
    }


def infer(folder: str) -> float:
    """Returns the accuracy of the average, restored into a model of its own."""
    data = digits.load(seed=0)
    model = Classifier(nnx.Rngs(1))
    like = nnx.as_pure(nnx.state(model))
    nnx.update(model, checkpoint.restore(folder, "shadow", like=like))
    images = [images for images, _ in batches(data, range(16))]
    ema_optax.nnx.refresh_batch_stats(model, images)
    return accuracy(model, data)


def accuracy(model: Classifier, data: digits.Digits) -> float:
    """Returns the share of the test images that a model gets right."""
    model.eval()
    return float(correct(model, data.test_images, data.test_labels))


def main() -> None:
    """Runs a command of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "infer"))
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    if args.command == "infer":
        print(f"averaged, restored: {infer(args.folder):.1%}")
        return
    found = train(args.folder, args.steps)
    print(", ".join(f"{name}: {share:.1%}" for name, share in found.items()))


if __name__ == "__main__":
    main()
