"""Averages that the demo makes of a finished run: one of a chosen width, a merge."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import optax
from flax import nnx

from ema_optax import checkpoint, reconstruction
from ema_optax._demo import digits
from ema_optax._demo.digits import Classifier, Digits

LEAST = 10  # checkpoints of a run, of which the newer half is merged


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model, measured on the held-out digits that chose nothing.

    Attributes:
        name: Its name in the table.
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


def losses(logits: jax.Array, data: Digits) -> jax.Array:
    """Returns the cross-entropy of each held-out digit, float32[n], in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, data.test_labels)


def candidates(
    run: Path,
    saved: Sequence[int],
    graph: nnx.GraphDef[Classifier],
    data: Digits,
    known: dict[str, nnx.State],
) -> tuple[tuple[Candidate, ...], reconstruction.Choice]:
    """Makes two averages from the checkpoints of a run, and measures all models.

    Args:
        run: The folder of the checkpoints.
        saved: Steps of the checkpoints, `LEAST` or more, ascending.
        graph: Graph of the classifier.
        data: The digits.
        known: Trees that the run ended with, by their names in the table.

    Returns:
        The known models, the average of the width that the first half of the held-out
        digits chose, and the mean of the newer half of the checkpoints, all measured
        on the second half of the digits; and the choice.
    """

    def logits(params: nnx.State, data: Digits) -> jax.Array:
        return digits.logits(graph, params, data.test_images)

    choosing, reporting = halves(data)
    like = next(iter(known.values()))
    choice = reconstruction.choose(
        run,
        lambda params: losses(logits(params, choosing), choosing),
        budget=8,
        params=like,
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
    answers = {name: logits(params, reporting) for name, params in models.items()}
    measured = tuple(
        Candidate(
            name=name,
            loss=float(losses(answer, reporting).mean()),
            accuracy=digits.accuracy(answer, reporting),
        )
        for name, answer in answers.items()
    )
    return measured, choice
