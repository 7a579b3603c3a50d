"""Coefficients that go beyond a mean of checkpoints, and their noise gain."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint, reconstruction
from ema_optax.reconstruction import extrapolated, noise_gain

VALUES = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 2.0])
def test_it_is_the_point_on_the_line(alpha):
    """θ̄ + α(θ̄ − θ̄'), in float64."""
    c = np.array([0.1, 0.2, 0.3, 0.2, 0.2])
    origin = np.array([0.5, 0.5, 0, 0, 0])
    weights = extrapolated(c, origin, alpha)
    mean, old = c @ VALUES.astype(np.float64), origin @ VALUES.astype(np.float64)
    expected = mean + alpha * (mean - old)
    np.testing.assert_allclose(weights @ VALUES, expected, rtol=0, atol=1e-14)
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    if alpha == -1:
        np.testing.assert_allclose(weights, origin, atol=1e-16)
    merged = reconstruction.merge([{"w": jnp.asarray(v)} for v in VALUES], weights)
    np.testing.assert_allclose(merged["w"], expected, rtol=0, atol=1e-6)


def test_the_noise_gain_is_that_of_independent_noise():
    """Measured on 200,000 draws, to 1 %."""
    weights = extrapolated([0.25] * 4, [0.5, 0.5, 0, 0], 1.0)
    np.testing.assert_array_equal(weights, [0, 0, 0.5, 0.5])
    weights = extrapolated([0.25] * 4, [1, 0, 0, 0], 1.0)
    noise = np.random.default_rng(0).normal(size=(4, 200_000))
    assert np.std(weights @ noise) == pytest.approx(noise_gain(weights), rel=0.01)
    assert noise_gain(weights) == pytest.approx(np.sqrt(0.25 + 3 * 0.25))


@pytest.mark.parametrize(
    ("coefficients", "origin", "alpha", "message"),
    [
        ([0.5, 0.5], [1, 0, 0], 1, "for 3 checkpoints, and coefficients for 2"),
        ([0.5, 0.6], [1, 0], 1, "coefficients are one weight .* sum 1"),
        ([0.5, 0.5], [0, 0], 1, "origin are one weight"),
        ([0.5, np.nan], [1, 0], 1, "coefficients are one weight"),
        ([[0.5, 0.5]], [1, 0], 1, "coefficients are one weight"),
        ([0.5, 0.5], [1, 0], np.inf, "alpha is how far"),
    ],
)
def test_what_is_refused(coefficients, origin, alpha, message):
    """Weights that scale the params, of other checkpoints, or not finite."""
    with pytest.raises(ValueError, match=message):
        extrapolated(coefficients, origin, alpha)


def test_noise_gain_refuses_a_table():
    """It is of one merge."""
    with pytest.raises(ValueError, match="one number a checkpoint"):
        noise_gain([[0.5, 0.5]])


def test_the_command(tmp_path, capsys):
    """Each schedule at each α, from the mean of the first half; the gain is told."""
    for i, value in enumerate(VALUES):
        params = {"w": jnp.asarray(value)}
        opt_state = ema_optax.ema_params(0.9).init(params)
        checkpoint.save(tmp_path / "run", params, opt_state, step=i + 1)
    out = tmp_path / "out"
    options = ["--schedule", "uniform", "1-sqrt", "--extrapolate", "0", "0.5"]
    run = ["merge", str(tmp_path / "run"), *options]
    assert cli.main([*run, "--out", str(out), "--json"]) == 0
    merges = json.loads(capsys.readouterr().out)["merges"]
    assert [each["schedule"] for each in merges] == [
        *("uniform", "uniform+0.5", "1-sqrt", "1-sqrt+0.5")
    ]
    mean = VALUES.astype(np.float64).mean(axis=0)
    origin = VALUES[:2].astype(np.float64).mean(axis=0)
    for name, alpha in (("uniform", 0), ("uniform-0.5", 0.5)):
        got = checkpoint.restore(out / name, "params")["w"]
        expected = mean + alpha * (mean - origin)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)
    expected = np.array([0.2, 0.2, 0.2, 0.2, 0.2]) * 1.5
    expected[:2] -= 0.25
    assert merges[1]["coefficients"] == pytest.approx(expected)
    assert merges[1]["noise_gain"] == pytest.approx(np.linalg.norm(expected))
    assert cli.main([*run, "--last", "1", "--dry-run"]) == 1
    assert "at least 2 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["merge", "run", "--extrapolate", "-1", "--dry-run"])
    assert "needs a number ≥ 0" in capsys.readouterr().err
