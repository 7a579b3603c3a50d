"""A BatchNorm network on handwritten digits: an average needs its own statistics."""

import numpy as np
import optax
import pytest
from flax import nnx

import ema_optax
from ema_optax import digits, update_shadow

STEPS, BATCH, DECAY = 300, 32, 0.995


class Network(nnx.Module):
    """Two hidden layers with Flax's BatchNorm as it comes: its momentum is .99."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List(
            nnx.Linear(64, 64, use_bias=False, rngs=rngs) for _ in range(2)
        )
        self.norms = nnx.List(nnx.BatchNorm(64, rngs=rngs) for _ in range(2))
        self.logits = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.logits(x)


@nnx.jit
def _step(model, optimizer, images, labels):
    def loss(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def _logits(model, images):
    return model(images)


def _accuracies(seed):
    """Of the shadow on held-out digits, with each kind of statistics; of raw params."""
    data = digits.load(seed)
    rng = np.random.default_rng(seed + 1)

    def batch():
        chosen = rng.integers(len(data.train_labels), size=BATCH)
        return data.train_images[chosen], data.train_labels[chosen]

    def accuracy(model):
        model.eval()
        found = digits.accuracy(_logits(model, data.test_images), data)
        model.train()
        return found

    model = Network(seed)
    average = ema_optax.ema_params(ema_optax.constant(DECAY))
    chain = optax.chain(optax.sgd(0.2, 0.9), average)
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    averaged = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    for _ in range(STEPS):
        _step(model, optimizer, *batch())
        stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        averaged = update_shadow(averaged, stats, DECAY)

    shadow = ema_optax.nnx.shadow_copy(model, optimizer)
    found = {"raw": accuracy(model), "stale": accuracy(shadow)}
    batches = [batch()[0] for _ in range(50)]
    ema_optax.nnx.refresh_batch_stats(shadow, batches)
    found["refreshed"] = accuracy(shadow)
    nnx.update(shadow, averaged)
    found["averaged"] = accuracy(shadow)
    return found


@pytest.mark.once
def test_refreshed_statistics_beat_stale_ones():
    """For every seed.

    Means over seeds 0 to 9: raw params 96.0 %; the shadow 95.4 % with the statistics of
    the raw params, 97.9 % with refreshed and 97.1 % with averaged ones. Refreshed beat
    stale ones by .2 to 6.7 percentage points.
    """
    gains = []
    for seed in range(3):
        found = _accuracies(seed)
        assert found["refreshed"] > found["stale"], found
        assert found["refreshed"] > found["raw"] + 0.005, found
        gains.append(found["refreshed"] - found["stale"])
    assert np.mean(gains) > 0.015
