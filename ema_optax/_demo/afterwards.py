"""What the demo makes of a finished run: a width that is chosen, and a merge."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import optax
from flax import nnx

from ema_optax import checkpoint, reconstruction
from ema_optax._demo import digits
from ema_optax._demo.digits import Classifier, Digits

LEAST = 10  # checkpoints of a run, of which the newer half is merged


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model on the held-out digits that chose nothing.

    Attributes:
        name: What it is, for a table.
        loss: Mean cross-entropy, in nats.
        accuracy: Share of digits that it gets right, in [0, 1].
    """

    name: str
    loss: float
    accuracy: float


def halves(held_out: Digits) -> tuple[Digits, Digits]:
    """Splits the held-out digits: one half chooses, the other reports."""
    first, second = (
        held_out._replace(
            test_images=held_out.test_images[start::2],
            test_labels=held_out.test_labels[start::2],
        )
        for start in (0, 1)
    )
    return first, second


def losses(
    graph: nnx.GraphDef[Classifier], params: nnx.State, data: Digits
) -> jnp.ndarray:
    """Returns the cross-entropy of each held-out digit, float32[n], in nats."""
    logits = digits.logits(graph, params, data.test_images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.test_labels)


def candidates(
    run: Path,
    saved: Sequence[int],
    graph: nnx.GraphDef[Classifier],
    data: Digits,
    known: dict[str, nnx.State],
) -> tuple[tuple[Candidate, ...], reconstruction.Choice]:
    """Makes two averages from the checkpoints of a run, and compares all.

    Args:
        run: The folder of the checkpoints.
        saved: Their steps, `LEAST` or more, ascending.
        graph: Of the classifier.
        data: The digits.
        known: What the run ended with, by its name in the table.

    Returns:
        The models: those that are known, the width that the first half of the held-out
        digits chose, and the mean of the newer half of the checkpoints; measured on
        the second half. And the choice.
    """
    choosing, reporting = halves(data)
    like = next(iter(known.values()))
    choice = reconstruction.choose(
        run, lambda params: losses(graph, params, choosing), budget=8, params=like
    )
    newer = saved[len(saved) // 2 :]
    merged = reconstruction.merge(
        [checkpoint.stored(run, "params", step=step) for step in newer],
        reconstruction.uniform_coefficients(len(newer)),
        params=like,
    )
    width = f"chosen width {choice.best.value:.3f}, of {choice.evaluations} tried"
    models = known | {
        width: choice.tree,
        f"mean of the last {len(newer)} checkpoints": merged,
    }
    found = tuple(
        Candidate(
            name=name,
            loss=float(losses(graph, params, reporting).mean()),
            accuracy=digits.accuracy(
                digits.logits(graph, params, reporting.test_images), reporting
            ),
        )
        for name, params in models.items()
    )
    return found, choice
