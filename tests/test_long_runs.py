"""Long runs: a million folds, the end of int32, ten thousand steps with checkpoints."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from tests import launch, reference

pytestmark = pytest.mark.once

MILLION, BLOCK, SIZE = 1_000_000, 10_000, 64
INT32_MAX = 2**31 - 1


def _targets(block, noise):
    """Where the params go in a block of steps, float32: a slow wave, and noise."""
    rng = np.random.default_rng(block)
    t = np.arange(block * BLOCK, (block + 1) * BLOCK)[:, None]
    wave = 1.5 + np.cos(2 * np.pi * (t / MILLION + np.arange(SIZE) / SIZE))
    return (wave + noise * rng.standard_normal((BLOCK, SIZE))).astype(np.float32)


def _logs(name, t):
    """Log β of steps t in float64, from the formulas."""
    if name == "power":
        exponent = ema_optax.exponent_from_width(0.05)
        with np.errstate(divide="ignore"):
            return (exponent + 1) * np.log1p(-1 / t)
    return np.full(t.shape, np.log(0.9999))


@pytest.mark.parametrize(
    ("name", "decay", "rounding", "noise", "bound"),
    [
        ("constant", ema_optax.constant(0.9999), None, 0.3, 5e-6),
        ("power", ema_optax.power(0.05), None, 0.3, 1e-5),
        # Params without noise: each fold is rounded alike, and the errors add up to
        # half an ulp over the weight of a fold. Rounding by chance is for them.
        ("constant", ema_optax.constant(0.9999), None, 0.0, 2e-4),
        ("constant", ema_optax.constant(0.9999), "stochastic", 0.0, 1e-5),
        ("power", ema_optax.power(0.05), "stochastic", 0.0, 2e-5),
    ],
)
def test_a_million_folds(name, decay, rounding, noise, bound):
    """Against float64; a shadow 1,000 steps late is ten times beyond the bound.

    The reference folds what the model really held, in blocks in closed form: after a
    block s is Πβ·s + Σ (1−β_t)·(Π later β)·p_t.
    """
    transform = ema_optax.ema_params(decay, rounding=rounding)

    def step(carry, target):
        params, state = carry
        update, state = transform.update(target - params, state, params)
        params = optax.apply_updates(params, update)
        return (params, state), params

    scan = jax.jit(lambda carry, targets: jax.lax.scan(step, carry, targets))
    params = jnp.ones(SIZE)
    carry = (params, transform.init(params))
    shadows = [np.ones(SIZE)]  # the last of them; one is 1,000 steps late
    late = None
    for block in range(MILLION // BLOCK):
        carry, held = scan(carry, _targets(block, noise))
        held = np.asarray(held, np.float64)
        logs = _logs(name, np.arange(block * BLOCK + 1, (block + 1) * BLOCK + 1))
        for part in (slice(None, -1000), slice(-1000, None)):
            late = shadows.pop()
            shadows.append(_after(late, held[part], logs[part]))
    _, state = carry
    assert int(state.count) == MILLION
    assert scan._cache_size() == 1
    assert reference.relative_rms(state.shadow, shadows[0]) <= bound
    assert reference.relative_rms(late, shadows[0]) > 10 * bound


def _after(shadow, held, logs):
    """Folds params into a shadow at once, from the logs of their decays."""
    later = np.append(np.cumsum(logs[:0:-1])[::-1], 0.0)  # Σ of those after each
    weights = -np.expm1(logs) * np.exp(later)
    return np.exp(logs[0] + later[0]) * shadow + weights @ held


@pytest.mark.parametrize("every", [1, 7, 128])
@pytest.mark.parametrize(
    "decay", [ema_optax.constant(0.9), ema_optax.uniform(), 0.9999], ids=str
)
def test_the_count_stays_at_the_end_of_int32(decay, every):
    """It does not wrap around to a negative step; a shadow of `every=1` goes on.

    2³¹−1 is prime, and so no multiple of any `every` above 1: there a shadow stays as
    it is. `ema_params` says so.
    """
    transform = ema_optax.ema_params(decay, every=every)
    params = {"w": jnp.zeros(3)}
    state = transform.init(params)
    state = state._replace(count=jnp.int32(INT32_MAX - 2))
    update = jax.jit(transform.update)
    for expected in (INT32_MAX - 1, INT32_MAX, INT32_MAX, INT32_MAX):
        _, state = update({"w": jnp.ones(3)}, state, params)
        assert int(state.count) == expected
        assert state.count.dtype == jnp.int32
    assert np.isfinite(state.shadow["w"]).all()
    weight = decay.newest_weight(INT32_MAX) if hasattr(decay, "kind") else 1e-4
    folded = 4 if every == 1 else 0
    # The first of the four is at 2³¹−2, a multiple of 7 (and not of 128).
    folded = 1 if every == 7 else folded
    if every == 7:
        weight = -np.expm1(7 * np.log1p(-weight))
    np.testing.assert_allclose(
        state.shadow["w"], -np.expm1(folded * np.log1p(-weight)), rtol=1e-5, atol=0
    )
    assert "2³¹" in ema_optax.ema_params.__doc__


def test_bema_counts_to_the_end_of_int32_too():
    transform = ema_optax.bema_params(every=1)
    params = {"w": jnp.zeros(3)}
    state = transform.init(params)._replace(count=jnp.int32(INT32_MAX - 1))
    for _ in range(3):
        _, state = transform.update({"w": jnp.ones(3)}, state, params)
    assert int(state.count) == INT32_MAX
    shadow = ema_optax.shadow_params(state, params)
    assert np.isfinite(shadow["w"]).all()


# --- Ten thousand steps ---

# Seen on Linux with one heap: 30 kB more with each save, of Orbax alone as with ours,
# and so 0.4 MiB in the 12 saves that are compared. A leak of one tree of 1 MiB in a
# save would be 12 MiB, one of 1 kB in a step 6 MiB.
GROWTH = 3 * 2**20
WARM = 4  # saves: what Orbax and JAX make once is there by then


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux's /proc")
def test_ten_thousand_steps_with_checkpoints_leave_nothing_behind(tmp_path):
    """One compilation; no growth of memory, arrays, threads or open files."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.long_run", str(tmp_path / "run")],
        # The memory that is looked at is the host's: arrays have to be in it.
        env=launch.on_cpu() | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["steps"] == [9_000, 9_500, 10_000]
    assert told["compiled"] == 1
    assert told["count"] == 10_000
    assert told["same"]
    seen = told["seen"][WARM - 1 :]
    assert len(seen) == 17
    first, last = seen[:5], seen[-5:]
    assert len({held["arrays"] for held in seen}) == 1
    for what in ("threads", "files"):
        assert max(held[what] for held in last) <= max(held[what] for held in first)
    # The least of the last, against the most of the first: both go up and down.
    grown = min(h["memory"] for h in last) - max(h["memory"] for h in first)
    assert grown < GROWTH, [held["memory"] for held in seen]
