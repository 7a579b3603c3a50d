"""Scores of evaluations with their noise, and whether two of them differ."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from ema_optax._messages import arguments
from ema_optax._messages.text import brief

# A difference of up to so many standard errors may be noise.
NOISE = 2.0


class EvaluationWarning(UserWarning):
    """An evaluation failed, and there is no score of what was evaluated."""


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of an evaluation, and how far noise may move it.

    Attributes:
        value: The score; one that is not finite is none.
        error: Its standard error, ≥ 0; None where that is not known.
        samples: What the value is the mean of, such as one number for each batch, in
            the same order at each evaluation. None where it is not known.

    Raises:
        TypeError: If value or error is no number.
        ValueError: If the error is negative or not finite.

    >>> Score(0.91, error=0.01)
    Score(value=0.91, error=0.01)
    """

    value: float
    error: float | None = None
    samples: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        arguments.one_number(self.value, "The value of a Score")
        object.__setattr__(self, "value", float(self.value))
        if self.samples is not None:
            samples = arguments.numbers(self.samples, "The samples of a Score")
            object.__setattr__(self, "samples", tuple(np.ravel(samples).tolist()))
        if self.error is None:
            return
        arguments.one_number(self.error, "The error of a Score")
        object.__setattr__(self, "error", float(self.error))
        if not 0 <= self.error < math.inf:
            raise ValueError(
                f"The error of a Score is a standard error ≥ 0, got {self.error:g}. "
                "None says that it is not known."
            )


def as_score(returned: object) -> Score:
    """Reads the result of an evaluation as a score.

    Args:
        returned: A number; at least two numbers, whose mean and standard error are
            taken; or a score.

    Raises:
        TypeError: If it is anything else.

    >>> as_score([1.0, 3.0])
    Score(value=2.0, error=1.0)
    """
    if isinstance(returned, Score):
        return returned
    numbers = _numbers(returned)
    if numbers is None or numbers.ndim > 1 or (numbers.ndim and numbers.size < 2):
        what = brief(returned)
        raise TypeError(
            "evaluate(params) returns a number; or two numbers or more, such as one "
            "for each batch, whose mean is the score and whose spread its noise; or "
            f"reconstruction.Score(value, error). It returned {what}."
        )
    if not numbers.ndim:
        return Score(float(numbers))
    return of_samples(numbers.tolist())


def of_samples(samples: Sequence[float]) -> Score:
    """Computes the mean of two samples or more, with its standard error."""
    if not np.all(np.isfinite(samples)):
        return Score(math.nan)
    error = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    return Score(float(np.mean(samples)), error, tuple(samples))


def difference(a: Score, b: Score) -> tuple[float, float]:
    """Computes a − b and its standard error, 0 where no noise is known.

    Samples of one length are taken as pairs: what makes a batch hard is in both.

    >>> difference(as_score([1.0, 3.0]), as_score([1.5, 3.5]))
    (-0.5, 0.0)
    """
    if a.samples and b.samples and len(a.samples) == len(b.samples):
        differences = np.subtract(a.samples, b.samples)
        error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
        return float(np.mean(differences)), error
    return a.value - b.value, math.hypot(a.error or 0.0, b.error or 0.0)


def are_tied(a: Score, b: Score) -> bool:
    """Whether two scores differ by no more than noise may make them differ.

    Without known noise, only equal scores are tied.
    """
    apart, error = difference(a, b)
    # Differences of samples that are all the same are so up to rounding.
    rounding = 4 * np.finfo(np.float64).eps * max(abs(a.value), abs(b.value))
    return abs(apart) <= NOISE * error or (error > 0 and abs(apart) <= rounding)


def _numbers(value: object) -> np.ndarray | None:
    """Converts real numbers to float64; None for anything else."""
    if isinstance(value, (str, bytes, bool, dict, set)):
        return None
    try:
        array = np.asarray(value)
    except Exception:  # whatever another library's array raises
        return None
    real = jnp.issubdtype(array.dtype, jnp.floating)
    if real or jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(np.float64)
    return None
