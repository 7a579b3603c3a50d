"""Handwritten digits for the demo: the images, a small classifier, its training."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from ema_optax._averages.averaging import ema_params
from ema_optax._averages.shadows import shadow_params
from ema_optax._decays.decays import power
from ema_optax._messages.progress import shown

# Small batches of noisy pixels at a constant, high learning rate: the params keep
# moving around the solution, which is what an average is for.
_BATCH = 32
_PIXEL_NOISE = 0.3
_LEARNING_RATE = 0.1
_MOMENTUM = 0.9
DECAY = 0.99  # averages the last hundred updates or so
# One EMA as most runs have it, and two power profiles that give any other length later.
DECAYS = {"ema": DECAY, "short": power(0.05), "long": power(0.10)}
_TEST_SHARE = 0.3
_MEASUREMENTS = 50  # points of a curve in the picture, about


class Digits(NamedTuple):
    """Pixels float32[n, 64] in [0, 1] and labels int[n], to train on and held out."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Measured(NamedTuple):
    """Test accuracy of the raw params and of their EMA after so many steps."""

    step: int
    raw: float
    ema: float


class Classifier(nnx.Module):
    """Classifies images of 64 pixels as one of 10 digits, through a hidden layer.

    >>> import jax.numpy as jnp
    >>> Classifier(rngs=nnx.Rngs(0))(jnp.zeros((2, 64))).shape
    (2, 10)
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits float32[n, 10] for pixels float32[n, 64] in [0, 1]."""
        return self.logits(nnx.relu(self.hidden(images)))


def load(seed: int) -> Digits:
    """Returns scikit-learn's digits, split as the seed decides.

    >>> data = load(seed=0)
    >>> data.train_images.shape, data.test_images.shape
    ((1258, 64), (539, 64))
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)  # pixels count from 0 to 16
    order = np.random.default_rng(seed).permutation(len(labels))
    test, train = np.split(order, [int(_TEST_SHARE * len(labels))])
    return Digits(images[train], labels[train], images[test], labels[test])


Save = Callable[[int, nnx.State, optax.OptState], None]


def train(
    model: Classifier,
    digits: Digits,
    *,
    steps: int,
    seed: int,
    save: Save,
    save_every: int,
) -> tuple[nnx.State, optax.OptState, list[Measured]]:
    """Trains a classifier, and saves the run at every `save_every` steps and the last.

    Returns:
        Params and optimizer state after the last step, and the accuracies on the way.
    """
    graph, params = nnx.split(model, nnx.Param)
    optimizer = optax.chain(optax.sgd(_LEARNING_RATE, _MOMENTUM), ema_params(DECAYS))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(seed + 1)  # not the one that split the images

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params: nnx.State,
        opt_state: optax.OptState,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[nnx.State, optax.OptState]:
        def loss(params: nnx.State) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return cast(nnx.State, optax.apply_updates(params, updates)), opt_state

    interval = max(1, steps // _MEASUREMENTS)
    measured = []
    with shown(None, "training", steps) as report:
        for step in range(1, steps + 1):
            images, labels = _noisy_batch(rng, digits)
            params, opt_state = train_step(params, opt_state, images, labels)
            if step % interval == 0 or step == steps:
                average = shadow_params(opt_state, params, name="ema")
                raw, ema = (
                    accuracy(logits(graph, tree, digits.test_images), digits)
                    for tree in (params, average)
                )
                measured.append(Measured(step, raw, ema))
                report(step, f"raw {raw:.1%}, EMA {ema:.1%}")
            else:
                report(step)
            if step % save_every == 0 or step == steps:
                save(step, params, opt_state)
    return params, opt_state, measured


def _noisy_batch(
    rng: np.random.Generator, digits: Digits
) -> tuple[np.ndarray, np.ndarray]:
    chosen = rng.integers(len(digits.train_labels), size=_BATCH)
    images = digits.train_images[chosen]
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    return images + _PIXEL_NOISE * noise, digits.train_labels[chosen]


@partial(jax.jit, static_argnums=0)
def logits(
    graph: nnx.GraphDef[Classifier], params: nnx.State, images: jax.Array
) -> jax.Array:
    """Computes the logits float32[n, 10] of a classifier.

    Args:
        graph: Graph of the classifier, as `nnx.split` returns it.
        params: Params of the classifier.
        images: float32[n, 64], pixels in [0, 1].

    >>> import jax.numpy as jnp
    >>> graph, params = nnx.split(Classifier(rngs=nnx.Rngs(0)))
    >>> logits(graph, params, jnp.zeros((2, 64))).shape
    (2, 10)
    """
    return nnx.merge(graph, params)(images)


def accuracy(logits: jax.Array, digits: Digits) -> float:
    """Returns the share of held-out images that the logits get right, in [0, 1].

    Args:
        logits: float32[n, 10], of the held-out images.
        digits: As `load` returns them.

    >>> data = load(seed=0)
    >>> accuracy(jax.nn.one_hot(data.test_labels, 10), data)
    1.0
    """
    return float(np.mean(np.asarray(logits).argmax(axis=1) == digits.test_labels))
