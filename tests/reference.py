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
    "window": lambda t, n: ((t - 1) % n) / ((t - 1) % n + 1),
    "fraction": lambda t, f: 0.5 ** (1 / (f * t)),
    "start_after": lambda t, inner, n: inner(t - n) if t > n else 0.0,
    "scale_to_batch": lambda t, inner, factor: inner(t) ** factor,
}


def betas(kind, steps, *args):
    """Returns β_1 … β_steps as float64."""
    return np.array([BETAS[kind](t, *args) for t in range(1, steps + 1)], np.float64)


def bema_weights(
    steps, every, ema_power=0.5, lag=10, multiplier=1.0, min_newest_weight=0.0
):
    """Returns b = max((ρ + γt)^−κ, min) at each fold up to `steps`, as float64."""
    t = np.arange(every, steps + 1, every, dtype=np.float64)
    return np.maximum((lag + multiplier * t) ** -ema_power, min_newest_weight)


def average(params, decays, every=1, start=None):
    """Folds float64 params[t] (t = 1 …) one by one; returns the shadow after the last.

    A fold over `every` updates takes the product of their decays, multiplied out.
    """
    shadow = np.array(params[0] if start is None else start, np.float64)
    for t in range(every, len(params) + 1, every):
        kept = np.prod(decays[t - every : t])
        shadow = kept * shadow + (1 - kept) * np.asarray(params[t - 1], np.float64)
    return shadow


def shadows(params, decays, every=1):
    """Returns the shadow after every fold, float64[folds, …]; like `average`."""
    found, shadow = [], np.array(params[0], np.float64)
    for t in range(every, len(params) + 1, every):
        kept = np.prod(decays[t - every : t])
        shadow = kept * shadow + (1 - kept) * np.asarray(params[t - 1], np.float64)
        found.append(shadow)
    return np.stack(found)


def power_densities(times, steps, exponents):
    """Returns (γ+1)·t^γ / T^(γ+1) on [0, T], and 0 after it: float64[times, steps]."""
    t, last = np.asarray(times, np.float64)[:, None], np.asarray(steps, np.float64)
    g = np.broadcast_to(np.asarray(exponents, np.float64), last.shape)
    return np.where(t <= last, (g + 1) / last * (t / last) ** g, 0.0)


def quadrature(ends, order):
    """Returns points and weights that integrate what is smooth between the ends."""
    x, w = np.polynomial.legendre.leggauss(order)
    ends = np.unique(np.concatenate([[0.0], ends]))
    half = np.diff(ends)[:, None] / 2
    return ((ends[:-1, None] + half * (x + 1)).ravel(), (half * w).ravel())


def projection(steps, exponents, exponent, step, order=16):
    """Returns the weights, of sum 1, that bring profiles closest to t^γ on [0, step].

    By least squares on the profiles themselves, point by point. No inner product is
    formed, so that the condition number is the root of the normal equations'.

    Returns:
        The weights, and the distance left over the norm of what is wanted.
    """
    t, w = quadrature(np.append(steps, step), order)
    root = np.sqrt(w)[:, None]
    columns = root * power_densities(t, steps, exponents)
    wanted = (root * power_densities(t, [step], exponent))[:, 0]
    # The last weight is what the others leave of 1.
    matrix, side = columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1]
    norms = np.linalg.norm(matrix, axis=0)
    q, r = np.linalg.qr(matrix / norms)
    others = np.linalg.solve(r, q.T @ side) / norms
    weights = np.append(others, 1 - others.sum())
    left = np.linalg.norm(columns @ weights - wanted)
    return weights, left / np.linalg.norm(wanted)


def lowbias32(x):
    """Returns the hash of a 32-bit integer: Chris Wellons' C code, in Python."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def rounded_to_bfloat16(values, count, leaf):
    """Returns float32 values rounded by chance, as leaf number `leaf` at a count is.

    An element with the 16 bits n below those that bfloat16 has goes up in magnitude
    where n and 16 bits of the hash of its index make 2¹⁶ or more.
    """
    seed = lowbias32(count) ^ lowbias32(0x9E3779B9 + leaf % 16)
    bits = np.asarray(values, np.float32).ravel().view(np.uint32)
    drawn = [lowbias32(i ^ seed) >> 16 for i in range(bits.size)]
    up = (bits & 0xFFFF) + np.asarray(drawn, np.uint32) >= 2**16
    kept = (bits & 0xFFFF0000) + np.where(up, 2**16, 0).astype(np.uint32)
    return kept.view(np.float32).reshape(np.shape(values))


def relative_rms(actual, expected):
    """Returns the RMS of the error over the RMS of the expected values."""
    error = np.asarray(actual, np.float64) - expected
    return np.sqrt(np.mean(np.abs(error) ** 2) / np.mean(np.abs(expected) ** 2))
