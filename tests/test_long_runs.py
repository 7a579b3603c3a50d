"""Long runs: a million folds, the end of int32, ten thousand steps with checkpoints."""

import functools
import gc
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import ema_optax
from ema_optax import checkpoint
from tests import reference

MILLION, BLOCK, SIZE = 1_000_000, 10_000, 64
INT32_MAX = 2**31 - 1


def _updates(block):
    """Updates of a block of steps, float32: a slow wave, and noise of its size."""
    rng = np.random.default_rng(block)
    t = np.arange(block * BLOCK, (block + 1) * BLOCK)[:, None]
    wave = np.cos(2 * np.pi * (t / MILLION + np.arange(SIZE) / SIZE))
    return (1e-5 * (wave + rng.standard_normal((BLOCK, SIZE)))).astype(np.float32)


def _logs(name, t):
    """Log β of steps t in float64, from the formulas."""
    if name == "power":
        exponent = ema_optax.exponent_from_width(0.05)
        with np.errstate(divide="ignore"):
            return (exponent + 1) * np.log1p(-1 / t)
    return np.full(t.shape, np.log(0.9999))


@pytest.mark.parametrize(
    ("name", "decay", "bound"),
    [
        ("constant", ema_optax.constant(0.9999), 1e-5),
        ("power", ema_optax.power(0.05), 1e-5),
    ],
)
def test_a_million_folds(name, decay, bound):
    """Within 1e-5 of float64, of which a shadow 100 steps late is beyond.

    The reference folds what the model really held, in blocks in closed form: after a
    block s is Πβ·s + Σ (1−β_t)·(Π later β)·p_t.
    """
    transform = ema_optax.ema_params(decay)

    def step(carry, update):
        params, state = carry
        update, state = transform.update(update, state, params)
        params = optax.apply_updates(params, update)
        return (params, state), params

    scan = jax.jit(lambda carry, updates: jax.lax.scan(step, carry, updates))
    params = jnp.ones(SIZE)
    carry = (params, transform.init(params))
    expected = np.ones(SIZE)
    for block in range(MILLION // BLOCK):
        carry, held = scan(carry, _updates(block))
        logs = _logs(name, np.arange(block * BLOCK + 1, (block + 1) * BLOCK + 1))
        later = np.append(np.cumsum(logs[:0:-1])[::-1], 0.0)  # Σ of those after each
        weights = -np.expm1(logs) * np.exp(later)
        kept = np.exp(logs[0] + later[0])
        expected = kept * expected + weights @ np.asarray(held, np.float64)
    _, state = carry
    assert int(state.count) == MILLION
    assert scan._cache_size() == 1
    assert reference.relative_rms(state.shadow, expected) <= bound
    # The bound has teeth: in the last block, 100 steps late.
    late = expected + np.mean(np.asarray(held[-100:]) - np.asarray(held[:100]), 0) / 99
    assert reference.relative_rms(late, expected) > 2 * bound


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

STEPS, SAVES = 10_000, 500
WARM = 2_000  # steps, and 4 saves: what Orbax and JAX make once is there by then

# Memory is measured after each save, when nothing is in flight. Seen on Linux: from one
# save to another 1 or 2 MiB up and down, and 0 to 4 MiB more after 16 saves than after
# the warm-up. A leak of one tree of 1 MiB in a save would be 16 MiB (three in a step,
# of params, moments and shadow: 48), and of 1 kB in a step 8 MiB.
GROWTH = 8 * 2**20


def _resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open_files():
    return len(os.listdir("/proc/self/fd"))


@functools.cache
def _model():
    size = 2**18  # 1 MiB in float32
    params = {"w": jnp.zeros(size - 3), "b": jnp.zeros(3)}
    average = ema_optax.ema_params({"fast": 0.99, "slow": ema_optax.power(0.05)})
    return params, optax.chain(optax.sgd(1e-2), average)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux's /proc")
def test_ten_thousand_steps_with_checkpoints_leave_nothing_behind(tmp_path):
    """One compilation; no growth of memory, threads or open files; three steps kept."""
    params, optimizer = _model()
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, target):
        grads = jax.tree.map(lambda p: p - target, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    seen = []
    options = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as manager:
        for number in range(1, STEPS + 1):
            params, state = step(params, state, jnp.float32(number % 7))
            if number % SAVES:
                continue
            manager.save(number, args=checkpoint.EmaSave(params, state))
            manager.wait_until_finished()
            gc.collect()
            if number >= WARM:
                seen.append((_resident(), threading.active_count(), _open_files()))
        assert manager.all_steps() == [9_000, 9_500, 10_000]
    assert step._cache_size() == 1
    memory, threads, descriptors = zip(*seen, strict=True)
    assert len(seen) == 17
    # The least of the last five, against the most of the first five: both are noisy.
    print("growth", (min(memory[-5:]) - max(memory[:5])) / 2**20, memory)
    assert min(memory[-5:]) - max(memory[:5]) < GROWTH
    assert max(threads[-5:]) <= max(threads[:5])
    assert max(descriptors[-5:]) <= max(descriptors[:5])
    fresh, optimizer = _model()
    params_, state_ = checkpoint.resume(tmp_path / "run", fresh, optimizer.init(fresh))
    np.testing.assert_array_equal(params_["w"], params["w"])
    assert int(state_[1].count) == STEPS
