"""Coefficients of a merge by the name of a schedule, beside formulas written again."""

import itertools
import math

import numpy as np
import pytest

import ema_optax
from ema_optax.reconstruction import decay_coefficients, lr_decay, schedule_coefficients

# As in Megatron-LM's tool for merging, of n evenly spaced checkpoints.
FORMULAS = {"linear": lambda x: 1 - x, "1-sqrt": lambda x: 1 - math.sqrt(x)}


@pytest.mark.parametrize("name", FORMULAS)
def test_evenly_spaced_checkpoints(name):
    """c_j = w_j − w_(j+1) of w(i/n), for 2 to 200 checkpoints, to 1e-15."""
    for n in range(2, 201):
        multipliers = [1.0, *(FORMULAS[name](i / n) for i in range(1, n)), 0.0]
        expected = [a - b for a, b in itertools.pairwise(multipliers)]
        found = schedule_coefficients(name, range(50, 50 + 30 * n, 30))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
        assert abs(found.sum() - 1) < 1e-14


def test_the_window_that_checkpoints_cover():
    """It begins one mean distance before the first: uneven steps keep their times."""
    steps = [100, 150, 300]  # 0 to 300
    multipliers = lr_decay(schedule_coefficients("cosine", steps))
    expected = [(1 + math.cos(math.pi * x)) / 2 for x in (1 / 3, 1 / 2)]
    np.testing.assert_allclose(multipliers, expected, atol=1e-15)
    own = schedule_coefficients(lambda x: 1 - x**2, steps)
    np.testing.assert_allclose(own, [1 / 9, 1 / 4 - 1 / 9, 3 / 4], atol=1e-15)


@pytest.mark.parametrize("name", ["linear", "1-sqrt", "cosine", "uniform"])
def test_one_checkpoint_is_itself(name):
    """Whatever the schedule."""
    np.testing.assert_array_equal(schedule_coefficients(name, [7]), [1])


def test_uniform_and_decays():
    """The plain mean of any steps; a decay weighs as if it had folded them alone."""
    steps = [10, 20, 50]
    np.testing.assert_array_equal(schedule_coefficients("uniform", steps), [1 / 3] * 3)
    decay = ema_optax.power(0.1)
    np.testing.assert_array_equal(
        schedule_coefficients(decay, steps), decay_coefficients(decay, steps)
    )


@pytest.mark.parametrize(
    ("schedule", "steps", "error"),
    [
        ("1-sqr", [1, 2], "no schedule '1-sqr'. The nearest are '1-sqrt'"),
        (3, [1, 2], "schedule is a name such as"),
        ("linear", [2, 1], "ascending"),
        ("linear", [], "ascending"),
        ("linear", [1.5, 2.0], "ascending"),
        (lambda x: 2.0, [1, 2], r"in \[0, 1\], got"),
        (lambda x: math.nan, [1, 2], r"in \[0, 1\], got"),
    ],
    ids=[
        "misspelt",
        "number",
        "descending",
        "no steps",
        "fractional steps",
        "function above 1",
        "function of nan",
    ],
)
def test_what_is_refused(schedule, steps, error):
    """With what was given, and what is known."""
    with pytest.raises((ValueError, TypeError), match=error):
        schedule_coefficients(schedule, steps)
