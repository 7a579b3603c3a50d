"""One fold of one leaf: rounding, dtypes, and the noise that rounds bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ema_optax._averages import fold
from tests import reference
from tests.older import enable_x64

COPY = fold.split_weight(1.0)


@pytest.mark.parametrize(
    ("dtype", "asked", "stored"),
    [
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float8_e4m3fn", None, "float32"),
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("complex64", None, "complex64"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float64", "float32", "float32"),
        ("complex64", "bfloat16", "complex64"),
        ("complex128", "float32", "complex64"),
        ("complex64", "float64", "complex128"),
    ],
)
def test_stored_dtype(dtype, asked, stored):
    """float32 where params are narrower; what was asked for otherwise."""
    with enable_x64(True):
        asked = fold.check_shadow_dtype(asked)
    assert fold.stored_dtype(jnp.dtype(dtype), asked) == jnp.dtype(stored)


def test_a_weight_of_one_copies_to_the_last_bit():
    """The sum s + 1·(p − s) would lose a small param beside a large shadow."""
    shadow = jnp.asarray([1e8, -3.3, 0.1])
    param = jnp.asarray([1e-3, 7.7, 0.2])
    np.testing.assert_array_equal(fold.fold(shadow, param, COPY, 0), param)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "int8", "complex64"]
)
def test_what_is_folded_is_what_the_model_holds(dtype):
    """Inside jit, XLA would fold a sum that was never rounded to the params' dtype."""
    params = jnp.linspace(1, 100, 97).astype(dtype)
    updates = params * jnp.asarray(0.01, dtype)
    shadow = jnp.zeros(97, "complex64" if dtype == "complex64" else "float32")
    folded = jax.jit(lambda p, u: fold.fold(shadow, p + u, COPY, 0))(params, updates)
    np.testing.assert_array_equal(folded, (params + updates).astype(shadow.dtype))


def test_a_weight_of_zero_holds_to_the_last_bit():
    """Nothing moves, whatever the params are."""
    shadow = jnp.asarray([1e8, -3.3, 0.1])
    for dtype in (jnp.float32, jnp.bfloat16):
        held = fold.fold(shadow.astype(dtype), shadow * 3, fold.split_weight(0.0), 5)
        np.testing.assert_array_equal(held, shadow.astype(dtype))


def test_rounding_is_unbiased():
    """The mean over folds is the value itself, at any place between two bfloat16s."""
    between = np.float32(1) + np.float32(2**-7) * np.linspace(
        0, 1, 33, dtype=np.float32
    )
    params = jnp.asarray(np.repeat(between, 4000))
    for seed in (1, 2**31):
        rounded = fold.fold(
            jnp.zeros_like(params, jnp.bfloat16), params, COPY, jnp.uint32(seed)
        )
        means = np.asarray(rounded, np.float64).reshape(33, 4000).mean(axis=1)
        # The standard error of 4,000 draws is at most 2^-7 · 0.5/√4000 = 6.2e-5.
        np.testing.assert_allclose(means, between, atol=2.5e-4)
        assert set(np.unique(np.asarray(rounded, np.float32))) == {1.0, 1.0 + 2**-7}


def test_negative_and_exact_values_round_alike():
    """Away from zero as often as toward it; what bfloat16 holds is kept exactly."""
    params = jnp.full(8000, -1 - 2**-9)
    rounded = fold.fold(jnp.zeros(8000, jnp.bfloat16), params, COPY, jnp.uint32(3))
    assert np.mean(np.asarray(rounded, np.float64)) == pytest.approx(
        -1 - 2**-9, abs=3e-4
    )
    exact = jnp.full(8000, 1.5)
    same = fold.fold(jnp.zeros(8000, jnp.bfloat16), exact, COPY, jnp.uint32(3))
    np.testing.assert_array_equal(same, exact)


def test_the_largest_values_do_not_round_to_infinity():
    """3.4e38 is above bfloat16's largest and would round up: the shadow holds."""
    params = jnp.full(1000, jnp.finfo(jnp.float32).max)
    for sign in (1, -1):
        rounded = fold.fold(
            jnp.zeros(1000, jnp.bfloat16), sign * params, COPY, jnp.uint32(9)
        )
        assert np.all(np.isfinite(np.asarray(rounded, np.float32)))


def test_noise_differs_between_elements_folds_and_leaves():
    """Rounding up or down is independent: correlations are within 4/√n of none."""
    n = 40_000
    params = jnp.full((200, 200), 1 + 2**-8)
    counts = [fold.fold_seeds(jnp.int32(t), 3) for t in (1, 2, 1000)]
    draws = [
        np.asarray(
            fold.fold(jnp.zeros((200, 200), jnp.bfloat16), params, COPY, seed),
            np.float64,
        ).ravel()
        for seeds in counts
        for seed in seeds
    ]
    signs = np.sign(np.stack(draws) - (1 + 2**-8))
    correlation = signs @ signs.T / n
    np.testing.assert_allclose(correlation, np.eye(9), atol=4 / np.sqrt(n))
    for lag in (1, 2, 200, 400):
        lagged = np.mean(signs[:, lag:] * signs[:, :-lag])
        assert abs(lagged) < 4 / np.sqrt(9 * n)


def test_the_draws_are_those_of_the_hash():
    """Every version draws the same, so that a run may go on with a later one."""
    params = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float32)
    for count in (1, 70_000, 2**31 - 1):
        seeds = fold.fold_seeds(jnp.int32(count), 18)
        for leaf in (0, 1, 15, 17):
            rounded = fold.fold(
                jnp.zeros((30, 40), jnp.bfloat16), params, COPY, seeds[leaf]
            )
            expected = reference.rounded_to_bfloat16(params, count, leaf)
            np.testing.assert_array_equal(rounded.astype(jnp.float32), expected)


def test_leaves_beyond_32_bits_are_indexed():
    """By the index modulo 2³²; nothing this large is made here."""
    shadow = jax.ShapeDtypeStruct((2, 2**32 + 5), jnp.bfloat16)
    folded = jax.eval_shape(fold.fold, shadow, shadow, COPY, jnp.uint32(1))
    assert (folded.shape, folded.dtype) == (shadow.shape, shadow.dtype)


def test_seeds_are_like_random_numbers():
    """No two folds of a leaf share one, and every bit is set in half of them."""
    seeds = np.stack(jax.vmap(lambda t: fold.fold_seeds(t, 16))(jnp.arange(20_000)))
    assert len(np.unique(seeds, axis=0)) == 16  # no two leaves
    for of_leaf in seeds:
        assert len(np.unique(of_leaf)) == 20_000
        shares = np.mean(of_leaf[:, None] >> np.arange(32, dtype=np.uint32) & 1, axis=0)
        np.testing.assert_allclose(shares, 0.5, atol=0.02)  # 5.6 standard deviations


def test_noise_depends_on_the_place_and_not_on_the_sharding():
    """The same bits under jit, and for the same flat index in another shape."""
    params = jnp.full((4, 6), 1 + 2**-8)
    shadow = jnp.zeros((4, 6), jnp.bfloat16)
    seed = fold.fold_seeds(jnp.int32(3), 1)[0]
    flat = fold.fold(shadow.ravel(), params.ravel(), COPY, seed)
    np.testing.assert_array_equal(
        jax.jit(fold.fold)(shadow, params, COPY, seed).ravel(), flat
    )


TINY = fold.split_weight(2.0**-20)


def test_stochastic_float32_moves_where_nearest_would_not():
    """By the change on average: a quarter of an ulp, which nearest leaves out."""
    shadow, param = jnp.ones(20_000), jnp.full(20_000, 1.03)
    ulp = 2.0**-23
    change = 0.03 * 2.0**-20  # 0.24 ulp
    np.testing.assert_array_equal(fold.fold(shadow, param, TINY, 1), shadow)
    for seed in (1, 2**31):
        folded = fold.fold(shadow, param, TINY, jnp.uint32(seed), stochastic=True)
        moved = (np.asarray(folded, np.float64) - 1) / ulp
        assert set(np.unique(moved)) == {0.0, 1.0}
        # Half an ulp of bias would be 0.74; the standard error is 3e-3.
        assert abs(moved.mean() - change / ulp) < 0.01


@pytest.mark.parametrize("weight", [1e-6, 1e-8, 1 - 2**-24])
def test_stochastic_float32_is_unbiased_at_any_change(weight):
    """Up and down, small and large, on both sides of a power of two."""
    rng = np.random.default_rng(0)
    starts = rng.standard_normal(50).astype(np.float32)
    ends = 3 * rng.standard_normal(50).astype(np.float32)
    starts[:10], ends[:10] = [1, -1, 2, -2, 0.5] * 2, np.linspace(-0.4, 0.4, 10)
    shadow, param = np.repeat(starts, 4000), np.repeat(ends, 4000)
    folded = fold.fold(
        jnp.asarray(shadow),
        param,
        fold.split_weight(weight),
        jnp.uint32(7),
        stochastic=True,
    )
    s, p = shadow.astype(np.float64), param.astype(np.float64)
    lost = np.asarray(folded, np.float64) - (s + np.float32(weight) * (p - s))
    # Toward 0 from a power of two, the next float32 is half as far.
    near, far = (param, shadow) if weight > 0.5 else (shadow, param)
    ulp = np.abs(np.nextafter(near, far) - near).astype(np.float64)
    mean = (lost / ulp).reshape(50, 4000).mean(1)
    # 4,000 draws of at most half an ulp: standard error .008. Nearest: up to .5.
    assert np.abs(mean).max() < 0.035


def test_stochastic_float32_keeps_what_nearest_keeps():
    """Copies at weight 1, fixed points, holds at weight 0 and at what is not finite."""
    rng = np.random.default_rng(0)
    shadow = jnp.asarray(rng.standard_normal(100), jnp.float32)
    param = jnp.asarray(rng.standard_normal(100), jnp.float32)
    for s, p, weight, expected in (
        (shadow, param, COPY, param),
        (shadow, shadow, TINY, shadow),
        (shadow, param, fold.split_weight(0.0), shadow),
        (shadow, param * jnp.inf, TINY, shadow),
        (shadow * jnp.nan, param, TINY, param),
        (shadow * 0, param, TINY, param * 2.0**-20),
    ):
        folded = fold.fold(s, p, weight, jnp.uint32(3), stochastic=True)
        np.testing.assert_array_equal(folded, expected)


@pytest.mark.parametrize("bad", [complex(np.nan, 1), complex(1, np.inf)])
def test_a_complex_element_is_finite_in_both_parts(bad):
    """A bad param is left out, a bad shadow takes the param; the one between folds."""
    s, p = jnp.asarray([1 + 2j, 4j, bad]), jnp.asarray([bad, 8 - 4j, 3 + 1j])
    folded = fold.fold(s, p, fold.split_weight(0.25), 0)
    np.testing.assert_array_equal(folded, [1 + 2j, 2 + 2j, 3 + 1j])


@pytest.mark.parametrize("weight", [0.5001, 0.75, 0.9999])
def test_a_weight_above_a_half_is_counted_from_the_params(weight):
    """A shadow far from them leaves their digits: s + w·(p − s) would lose 1e-8·s."""
    s, p = np.float32(1e8), np.float32(-1 / 3)
    w = np.float64(np.float32(weight))
    exact = p + (w - 1) * (np.float64(p) - s)
    folded = fold.fold(s, p, fold.split_weight(weight), 0)
    # Two roundings of 6e-8. From the shadow it is 8e-4 off at weight .9999.
    np.testing.assert_allclose(np.float64(folded), exact, rtol=1.3e-7)


def test_check_rounding():
    """Rounding to nearest is refused where it freezes."""
    assert fold.check_rounding("stochastic", None)
    assert not fold.check_rounding("nearest", jnp.dtype("float32"))
    assert not fold.check_rounding(None, jnp.dtype("bfloat16"))
    with pytest.raises(ValueError, match="'nearest' or 'stochastic', got 'up'"):
        fold.check_rounding("up", None)
    with pytest.raises(ValueError, match="does not move"):
        fold.check_rounding("nearest", jnp.dtype("bfloat16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("weight", [-0.5, 1.5, np.nan, np.inf, -np.inf])
def test_a_weight_that_is_none_is_loud(weight, dtype):
    """All elements become NaN: holding them would look like an average."""
    shadow, param = jnp.ones(3, dtype), jnp.arange(3, dtype=dtype)

    @jax.jit
    def folded(weight):
        return fold.fold(shadow, param, fold.split_weight(weight), 0)

    assert jnp.isnan(folded(weight)).all()
    assert jnp.isnan(jax.jit(lambda: folded(weight))()).all()  # folded by XLA


@pytest.mark.parametrize("weight", [-1e-6, 1 + 1e-6])
def test_a_weight_may_be_rounded_beyond_its_end(weight):
    """A decay of 1 that is summed in logs may come to a little more."""
    shadow, param = jnp.ones(3), jnp.arange(3.0)
    near = shadow if weight < 0.5 else param
    folded = fold.fold(shadow, param, fold.split_weight(weight), 0)
    np.testing.assert_allclose(folded, near, atol=2e-6)
