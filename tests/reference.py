"""Averages in float64 NumPy, from the formulas alone; imports nothing of ours."""

import numpy as np

BETAS = {
    "constant": lambda t, b: b,
    "warmup": lambda t, b: min(b, (1 + t) / (10 + t)),
    "debiased": lambda t, b: b * (1 - b ** (t - 1)) / (1 - b**t),
    "uniform": lambda t: (t - 1) / t,
    "power": lambda t, exponent: (1 - 1 / t) ** (exponent + 1),
    "inverse_power": lambda t, b, g, p, low: (
        0.0 if t == 1 else min(max(1 - (1 + (t - 1) / g) ** -p, low), b)
    ),
    "ramp": lambda t, b, tau: b * (1 - np.exp(-t / tau)),
    "cosine": lambda t, b, n: 1 - (1 - b) * (1 + np.cos(np.pi * min(t, n) / n)) / 2,
    "half_life": lambda t, n: 0.5 ** (1 / n),
    "fraction": lambda t, f: 0.5 ** (1 / (f * t)),
}


def betas(kind, steps, *args):
    """Returns β_1 … β_steps as float64."""
    return np.array([BETAS[kind](t, *args) for t in range(1, steps + 1)], np.float64)


def average(params, decays, every=1, start=None):
    """Folds float64 params[t] (t = 1 …) one by one; returns the shadow after the last.

    A fold over `every` updates takes the product of their decays, multiplied out.
    """
    shadow = np.array(params[0] if start is None else start, np.float64)
    for t in range(every, len(params) + 1, every):
        kept = np.prod(decays[t - every : t])
        shadow = kept * shadow + (1 - kept) * np.asarray(params[t - 1], np.float64)
    return shadow


def relative_rms(actual, expected):
    """Returns the RMS of the error over the RMS of the expected values."""
    error = np.asarray(actual, np.float64) - expected
    return np.sqrt(np.mean(np.abs(error) ** 2) / np.mean(np.abs(expected) ** 2))
