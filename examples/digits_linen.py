"""A Flax Linen model with BatchNorm in a TrainState: train, save, resume, infer.

    python examples/digits_linen.py train FOLDER --steps 300  # again goes on
    python examples/digits_linen.py infer FOLDER              # needs no optimizer

A step of the run is a Composite: params and statistics beside the optimizer state, with
the average stored where the params are, and what else the program wants to keep.
"""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath
from flax.training import train_state

import ema_optax
from ema_optax import checkpoint, digits, ema_params, shadow_params

BATCH, SAVE_EVERY, WIDTH = 32, 100, 64


class Classifier(nn.Module):
    """Two layers, with BatchNorm between them."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns logits, float32[n, 10], of images, float32[n, 64]."""
        hidden = nn.Dense(WIDTH)(images)
        hidden = nn.BatchNorm(use_running_average=not train, momentum=0.9)(hidden)
        return nn.Dense(10)(nn.relu(hidden))


MODEL = Classifier()
OPTIMIZER = optax.chain(optax.adamw(3e-2), ema_params(0.99))


class TrainState(train_state.TrainState):
    """With the statistics, which no optimizer sees."""

    batch_stats: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to, and what is saved."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def started() -> TrainState:
    """Returns a state before the first update."""
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 64)), train=False)
    return TrainState.create(apply_fn=MODEL.apply, tx=OPTIMIZER, **variables)


@jax.jit
def train_step(state: TrainState, images, labels) -> TrainState:
    """Returns the state after an update of params, average and statistics."""

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = MODEL.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), new["batch_stats"]

    grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


@jax.jit
def correct(variables: Any, images, labels) -> jax.Array:
    """Returns the share of images that a model gets right."""
    logits = MODEL.apply(variables, images, train=False)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def batches(data: digits.Digits, steps: range):
    """Yields a batch of images and labels for each step, the same after a resume."""
    for step in steps:
        rows = np.random.default_rng(step).choice(len(data.train_images), BATCH, False)
        yield data.train_images[rows], data.train_labels[rows]


def refreshed(variables: Any, data: digits.Digits) -> Any:
    """Returns variables with the statistics that belong to their params."""
    images = [images for images, _ in batches(data, range(16))]
    apply = functools.partial(MODEL.apply, train=True)
    return ema_optax.linen.refresh_batch_stats(apply, variables, images)


def train(folder: str, steps: int) -> dict[str, float]:
    """Trains on from the newest step, and returns accuracies on the test images."""
    data, state = digits.load(seed=0), started()
    with ocp.CheckpointManager(epath.Path(folder).absolute()) as manager:
        start = manager.latest_step() or 0
        if start:
            args = checkpoint.EmaResume(state.variables, state.opt_state)
            found = manager.restore(start, args=ocp.args.Composite(state=args))
            variables, opt_state = found["state"]
            state = state.replace(step=start, opt_state=opt_state, **variables)
        for step, batch in enumerate(batches(data, range(start, start + steps)), start):
            state = train_step(state, *batch)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == start + steps:
                items = {
                    "state": checkpoint.EmaSave(state.variables, state.opt_state),
                    "config": ocp.args.JsonSave({"batch": BATCH, "width": WIDTH}),
                }
                manager.save(step + 1, args=ocp.args.Composite(**items))
    averaged = {
        **state.variables,
        "params": shadow_params(state.opt_state, state.params),
    }
    return {
        "raw": accuracy(state.variables, data),
        "averaged": accuracy(refreshed(averaged, data), data),
    }


def infer(folder: str) -> float:
    """Returns the accuracy of the average, restored without an optimizer."""
    data = digits.load(seed=0)
    init = functools.partial(MODEL.init, train=False)
    like = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64)))
    variables = checkpoint.restore(folder, "shadow", like=like)
    return accuracy(refreshed(variables, data), data)


def accuracy(variables: Any, data: digits.Digits) -> float:
    """Returns the share of the test images that a model gets right."""
    return float(correct(variables, data.test_images, data.test_labels))


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
