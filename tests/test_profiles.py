"""The weights of a whole run, against folding one-hot steps and the closed forms."""

import numpy as np
import pytest

import ema_optax
from tests import reference


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize(
    ("kind", "args", "decay"),
    [
        ("warmup", (0.99,), ema_optax.warmup(0.99)),
        ("power", (3.0,), ema_optax.power(exponent=3.0)),
        ("uniform", (), ema_optax.uniform()),
        ("constant", (0.9,), ema_optax.constant(0.9)),
    ],
)
def test_weights_are_what_the_folds_do(kind, args, decay, every):
    """Averaging one-hot params reads off the weights; 47 steps are no multiple."""
    steps = 47
    one_hot = np.eye(steps + 1)  # column 0: the initial params
    decays = reference.betas(kind, steps, *args)
    expected = reference.average(one_hot[1:], decays, every, start=one_hot[0])
    run = ema_optax.profile(decay, steps, every)
    np.testing.assert_allclose(run.weights, expected[1:], rtol=1e-12, atol=1e-15)
    assert run.initial_weight == pytest.approx(expected[0], rel=1e-12, abs=1e-15)
    ages = steps - np.arange(steps + 1)
    assert run.mean_age == pytest.approx(expected @ ages, rel=1e-12)
    spread = np.sqrt(expected @ (ages - expected @ ages) ** 2)
    assert run.width == pytest.approx(spread / steps, rel=1e-10)
    assert run.effective_size == pytest.approx(1 / np.sum(expected**2), rel=1e-12)


def test_the_closed_forms_of_a_constant_decay():
    """Lag β/(1−β), variance factor (1−β)/(1+β), β^t of the initial params."""
    run = ema_optax.profile(ema_optax.constant(0.98), 3000)
    assert run.mean_age == pytest.approx(49, rel=1e-9)
    assert 1 / run.effective_size == pytest.approx(0.02 / 1.98, rel=1e-9)
    assert run.initial_weight == pytest.approx(0.98**3000, rel=1e-9)


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("width", [0.03, 0.05, 0.1, 0.15, 0.2])
def test_power_has_the_width_asked_for(width, every):
    """Within .003 over 20,000 steps, however rarely it folds."""
    run = ema_optax.profile(ema_optax.power(width), 20_000, every)
    assert run.width == pytest.approx(width, abs=0.003)
    assert run.initial_weight == 0.0
    assert np.sum(run.weights) == pytest.approx(1, rel=1e-12)
    assert run.weights.dtype == np.float64


def test_a_float_means_a_warmup():
    """profile(0.9999) is what ema_params(0.9999) does."""
    ours = ema_optax.profile(0.9999, 100)
    np.testing.assert_array_equal(
        ours.weights, ema_optax.profile(ema_optax.warmup(0.9999), 100).weights
    )


def test_before_the_first_fold_only_the_initial_params_count():
    """Until then all weight is on the initial params, at an age of the whole run."""
    run = ema_optax.profile(0.9, 5, every=10)
    assert run.initial_weight == 1.0
    assert run.mean_age == 5
    assert run.width == 0.0


@pytest.mark.parametrize(("steps", "every"), [(0, 1), (10, 0), (-1, 1)])
def test_lengths_below_one_are_refused(steps, every):
    """The message has the argument and its value."""
    wrong = f"steps must be .* ≥ 1, got {steps}" if steps < 1 else "every .* got 0"
    with pytest.raises(ValueError, match=wrong):
        ema_optax.profile(0.9, steps, every)
