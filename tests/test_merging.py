"""Merged checkpoints, against float64 sums and the runs that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import reconstruction
from ema_optax._reconstruction import sums
from ema_optax.reconstruction import merge, uniform_coefficients
from tests import reference
from tests.older import enable_x64


def _trees(count, seed=0):
    """Checkpoints of a model with floating, complex and integer leaves."""
    rng = np.random.default_rng(seed)
    return [
        {
            "w": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32),
            "b": [jnp.asarray(rng.standard_normal(3), jnp.bfloat16), None],
            "z": jnp.asarray(rng.standard_normal(2) + 2j, jnp.complex64),
            "steps": jnp.int32(100 * i),
        }
        for i in range(count)
    ]


def _sum(coefficients, trees, pick):
    terms = [np.asarray(pick(tree), np.complex128) for tree in trees]
    return np.tensordot(np.asarray(coefficients), np.stack(terms), axes=1)


def test_merge_is_the_weighted_sum():
    """In float64, rounded once; integers are those of the last tree."""
    trees = _trees(9)
    coefficients = np.random.default_rng(1).uniform(-1, 2, 9)
    coefficients /= coefficients.sum()
    merged = reconstruction.merge(trees, coefficients)
    # Half a digit of float32, for a swapped or unsummed weight changes the first.
    for pick in (lambda t: t["w"], lambda t: t["z"], lambda t: t["b"][0]):
        np.testing.assert_allclose(
            np.asarray(pick(merged), np.complex128),
            _sum(coefficients, trees, pick),
            rtol=2**-23,
            atol=2**-26,
        )
    assert merged["b"][0].dtype == jnp.float32  # a mean of bfloat16 is none
    assert merged["b"][1] is None
    assert merged["z"].dtype == jnp.complex64
    assert merged["steps"] == 800
    assert merged["steps"].dtype == jnp.int32


def test_params_and_dtype_say_what_it_is_like():
    """Dtypes and integers of the params; or floating leaves of the dtype."""
    trees = _trees(3)
    params = _trees(5)[-1]
    merged = reconstruction.merge(trees, [0.2, 0.3, 0.5], params=params)
    assert jax.tree.map(jnp.result_type, merged) == jax.tree.map(
        jnp.result_type, params
    )
    assert merged["steps"] == 400
    half = reconstruction.merge(trees, [0.2, 0.3, 0.5], dtype="float16")
    wide = reconstruction.merge(trees, [0.2, 0.3, 0.5])
    assert half["w"].dtype == jnp.float16
    assert half["z"].dtype == jnp.complex64
    np.testing.assert_array_equal(half["w"], wide["w"].astype(jnp.float16))


@pytest.mark.parametrize(("leaves", "exact"), [(4, True), (3, False)])
def test_parts_of_sums_are_kept_in_float64_where_there_is_room(
    leaves, exact, monkeypatch
):
    """Up to a leaf of a quarter of the tree; beyond, what one part loses is lost."""
    monkeypatch.setattr(sums, "_SMALL", 0)
    trees = [{str(i): jnp.full(100, x) for i in range(leaves)} for x in (1e8, 1.0, 1e8)]
    for leaf in merge(trees, [1.0, 1.0, -1.0]).values():
        np.testing.assert_array_equal(leaf, 1.0 if exact else 0.0)


def test_a_merge_of_one_tree_is_that_tree():
    """With all of the weight."""
    tree = {"w": jnp.asarray([0.1, 0.2])}
    np.testing.assert_array_equal(merge([tree], [1.0])["w"], tree["w"])


def test_a_merge_tells_how_far_it_is():
    """For each piece of the work, up to all of it."""
    told = []
    trees = [{"a": jnp.ones(2), "b": jnp.ones(3)}] * 3
    merge(trees, uniform_coefficients(3), progress=lambda *x: told.append(x))
    assert told == [(1, 2), (2, 2)]


def test_complex_results_are_as_wide_as_the_dtype_asked_for():
    """complex64 for float32, where float64 would be held too."""
    with enable_x64(True):
        trees = [{"w": jnp.ones(2, jnp.complex64)}] * 2
        for dtype, kind in (("float32", "complex64"), ("float64", "complex128")):
            assert merge(trees, [0.5, 0.5], dtype=dtype)["w"].dtype == kind


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_a_tree_of_weight_0_counts_for_nothing(monkeypatch, bad, dtype):
    """It may have diverged; sums that take it are of what it holds, others are not."""
    # One tree at a time, so that some parts of a sum have no tree to take.
    monkeypatch.setattr(sums, "_SMALL", 0)
    trees = [{"w": np.full(100_003, i + 1, dtype)} for i in range(4)]
    trees[1]["w"][7] = bad
    weights = [[0.5, 0, 0.25, 0.25], [0.5, 0.5, 0, 0], [0, 0, 0, 1]]
    for count in (1, 3):
        merged = [np.asarray(tree["w"]) for tree in merge(trees, weights[:count])]
        np.testing.assert_allclose(merged[0], 2.25, rtol=1e-6)
    np.testing.assert_array_equal(merged[2], 4)
    assert not np.isfinite(merged[1][7])
    np.testing.assert_allclose(np.delete(merged[1], 7), 1.5, rtol=1e-6)
    np.testing.assert_array_equal(merge(trees, weights[0])["w"], merged[0])


def test_a_tree_that_no_sum_takes_is_not_read():
    """Not even from a disk: leaving it out costs nothing."""

    class Unread(sums.InMemory):
        def read(self, path, index):
            raise AssertionError(path)

    trees = [{"w": jnp.ones(3)}, Unread({"w": jnp.ones(3)}), {"w": jnp.full(3, 3.0)}]
    np.testing.assert_array_equal(merge(trees, [0.5, 0, 0.5])["w"], 2)
    with pytest.raises(AssertionError, match="w"):
        merge(trees, [0.25, 0.5, 0.25])


def test_several_results_come_from_one_pass():
    """Each row of coefficients bit for bit what it gives alone; one reading of each."""
    reads = []

    class Tree(reconstruction.Source):
        leaves = {"w": jax.ShapeDtypeStruct((3,), np.float32)}  # noqa: RUF012

        def read(self, path, index):
            reads.append(path)
            return np.asarray([1, 2, 4], np.float32)[index]

    table = [[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [3.0, -1.0, -1.0]]
    trees = _trees(3)
    merged = reconstruction.merge(trees, table)
    assert isinstance(merged, list)
    for one, row in zip(merged, table, strict=True):
        alone = reconstruction.merge(trees, row)
        jax.tree.map(np.testing.assert_array_equal, one, alone)
    assert len(reconstruction.merge(trees, [table[0]])) == 1
    reconstruction.merge([Tree(), Tree(), Tree()], table)
    assert reads == ["w"] * 3


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        (
            [0.5, 0.5],
            r"one coefficient for each of the 3 trees, got \(2,\).*plain mean",
        ),
        ([[0.5, 0.5]], r"got \(1, 2\)"),
        (1.0, r"got \(\)"),
        ([0.5, 0.5, 0.5], r"sum to 1.*got a sum of 1\.5"),
        ([0.3, 0.3, 0.4 + 2e-6], "got a sum of 1"),
        ([[0, 0, 1], [0, 0, 0.9]], r"got a sum of 0\.9"),
        ([np.nan, 0.5, 0.5], "got a sum of nan"),
    ],
)
def test_merge_refuses(coefficients, message):
    """Coefficients that scale the params, or are not one a tree."""
    with pytest.raises(ValueError, match=message):
        reconstruction.merge(_trees(3), coefficients)


def test_coefficients_may_be_rounded():
    """To 1e-6; their sum is told where it is further from 1."""
    trees = [{"w": 1.0}, {"w": 3.0}]
    assert reconstruction.merge(trees, [0.5, 0.5 + 9e-7])["w"] == pytest.approx(
        2, rel=1e-5
    )
    with pytest.raises(ValueError, match=r"got a sum of 0\.999989"):
        reconstruction.merge(trees, [0.5, 0.5 - 1.1e-5])


def test_merge_refuses_no_trees():
    """An empty list of checkpoints has no mean."""
    with pytest.raises(ValueError, match="0 trees"):
        reconstruction.merge([], [])


def test_uniform_coefficients_are_of_the_last():
    """1/k for k checkpoints, 0 for those before."""
    ours = reconstruction.uniform_coefficients(5)
    np.testing.assert_array_equal(ours, np.full(5, 0.2))
    ours = reconstruction.uniform_coefficients(5, last=3)
    np.testing.assert_array_equal(ours, np.array([0, 0, 1, 1, 1]) / 3)
    np.testing.assert_array_equal(
        reconstruction.uniform_coefficients(3, last=1), [0, 0, 1]
    )
    for count, last in ((3, 4), (3, 0), (0, None)):
        with pytest.raises(ValueError, match=f"of {count} checkpoints"):
            reconstruction.uniform_coefficients(count, last=last)


@pytest.mark.parametrize(
    ("kind", "args", "decay"),
    [
        ("constant", (0.97,), ema_optax.constant(0.97)),
        ("power", (3.0,), ema_optax.power(exponent=3.0)),
        ("uniform", (), ema_optax.uniform()),
        ("warmup", (0.97,), 0.97),
    ],
)
@pytest.mark.parametrize(
    "steps", [[40, 80, 120, 160], [7, 8, 50, 51, 200], [0, 30, 60], [12]]
)
def test_a_decay_folds_the_checkpoints(kind, args, decay, steps):
    """Each with the product of the decays since the one before; the first is taken."""
    betas = reference.betas(kind, max(steps), *args)
    weights = np.eye(len(steps))[0]
    for i in range(1, len(steps)):
        kept = np.prod(betas[steps[i - 1] : steps[i]])  # of updates s₁+1 … s₂
        weights = kept * weights + (1 - kept) * np.eye(len(steps))[i]
    ours = reconstruction.decay_coefficients(decay, steps)
    np.testing.assert_allclose(ours, weights, rtol=1e-11, atol=1e-15)
    assert ours.sum() == pytest.approx(1, abs=1e-15)


def test_even_checkpoints_fold_like_a_shadow():
    """Every 40 updates as `ema_params(every=40)` does, where the first fold copies."""
    betas = reference.betas("power", 400, 5.0)
    params = np.random.default_rng(0).standard_normal((400, 3))
    ours = reconstruction.decay_coefficients(
        ema_optax.power(exponent=5.0), range(40, 401, 40)
    )
    expected = reference.average(params, betas, every=40)
    np.testing.assert_allclose(ours @ params[39::40], expected, rtol=1e-12)


@pytest.mark.parametrize(
    "steps", [[], [10, 10], [20, 10], [-5, 5], [1.0, 2.0], [[1, 2], [3, 4]], 5]
)
def test_checkpoints_have_ascending_steps(steps):
    """Whole numbers of updates; anything else is refused."""
    with pytest.raises(ValueError, match="ascending whole numbers ≥ 0"):
        reconstruction.decay_coefficients(0.99, steps)


def test_learning_rates_and_coefficients_are_inverse():
    """Each way round, to float64's last digits; falling multipliers weigh ≥ 0."""
    rng = np.random.default_rng(0)
    multipliers = np.sort(rng.uniform(0, 1, 12))[::-1]
    coefficients = reconstruction.lr_decay_coefficients(multipliers)
    assert coefficients.shape == (13,)
    assert np.all(coefficients >= 0)
    assert coefficients.sum() == pytest.approx(1, abs=1e-15)
    np.testing.assert_allclose(
        reconstruction.lr_decay(coefficients), multipliers, atol=1e-15
    )
    weights = rng.dirichlet(np.ones(9))
    np.testing.assert_allclose(
        reconstruction.lr_decay_coefficients(reconstruction.lr_decay(weights)),
        weights,
        atol=1e-15,
    )
    rising = reconstruction.lr_decay_coefficients([0.2, 1.0])
    np.testing.assert_allclose(rising, [0.8, -0.8, 1.0])
    np.testing.assert_array_equal(reconstruction.lr_decay_coefficients([]), [1.0])


@pytest.mark.parametrize("multipliers", [[1.2], [-0.1], [np.nan], 0.5])
def test_multipliers_are_between_0_and_1(multipliers):
    """Others are no decay of the learning rate."""
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        reconstruction.lr_decay_coefficients(multipliers)


@pytest.mark.long
@pytest.mark.parametrize(
    "multipliers",
    [[1, 0.75, 0.5, 0.25, 0.125], [0.9, 0.5, 0.5, 0.1, 0.0], [1, 1, 1, 1, 1]],
)
def test_a_merge_is_the_run_with_a_decayed_learning_rate(multipliers):
    """Where gradients do not depend on the params: to float32's rounding, 1e-6.

    A multiplier used one interval late moves it by 1e-2.
    """
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(1 + rng.standard_normal((5, 20, 6)), jnp.float32)
    start = {"w": jnp.ones(6)}

    def train(scales):
        """SGD for five intervals of 20 steps; the params before and after each."""
        params, saved = start, [start]
        for scale, interval in zip(scales, gradients, strict=True):
            optimizer = optax.sgd(0.01 * scale)
            state = optimizer.init(params)
            for gradient in interval:
                updates, state = optimizer.update({"w": gradient}, state)
                params = optax.apply_updates(params, updates)
            saved.append(params)
        return saved

    coefficients = reconstruction.lr_decay_coefficients(multipliers)
    merged = reconstruction.merge(train([1.0] * 5), coefficients)
    decayed = train(multipliers)[-1]
    assert np.max(np.abs(decayed["w"] - start["w"])) > 0.1
    np.testing.assert_allclose(merged["w"], decayed["w"], rtol=0, atol=1e-6)


def test_a_shadow_is_a_run_with_a_decayed_learning_rate():
    """`lr_decay` of a profile: an update counts with all averaged after it."""
    betas = reference.betas("warmup", 60, 0.9)
    updates = np.random.default_rng(0).standard_normal((60, 4))
    params = np.cumsum(updates, axis=0)  # from 0
    run = ema_optax.profile(ema_optax.warmup(0.9), 60)
    multipliers = reconstruction.lr_decay([run.initial_weight, *run.weights])
    expected = reference.average(params, betas, start=np.zeros(4))
    np.testing.assert_allclose(multipliers @ updates, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "schedule",
    ["linear", "1-sqrt", "cosine", ema_optax.power(0.1), lambda x: 1 - x * x],
    ids=["linear", "1-sqrt", "cosine", "decay", "function"],
)
def test_a_merge_by_name(schedule):
    """Bit for bit that of the schedule's coefficients, of steps or evenly spaced."""
    trees = _trees(5)
    steps = [100, 200, 500, 600, 1000]
    for given, times in (({"steps": steps}, steps), ({}, [1, 2, 3, 4, 5])):
        weights = reconstruction.schedule_coefficients(schedule, times)
        named = reconstruction.merge(trees, schedule, **given)
        jax.tree.map(
            np.testing.assert_array_equal, named, reconstruction.merge(trees, weights)
        )


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        ("1-sqr", None, "no schedule '1-sqr'. The nearest are '1-sqrt'"),
        ("linear", [1, 2], r"a step for each of the 3 trees, got 2: steps=\[1, 2\]"),
        ("linear", [1, 3, 2], "ascending"),
        ([0.2, 0.3, 0.5], [1, 2, 3], "coefficients are numbers here.*Leave steps out"),
    ],
)
def test_a_merge_by_name_refuses(coefficients, steps, message):
    """Names that are none, steps that are not one a tree, or that nobody needs."""
    with pytest.raises(ValueError, match=message):
        reconstruction.merge(_trees(3), coefficients, steps=steps)
