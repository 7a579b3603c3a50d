"""Soups, against references in NumPy and cases computed by hand."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import ema_optax
from ema_optax import checkpoint, reconstruction
from ema_optax._reconstruction import sums
from ema_optax.reconstruction import EvaluationWarning, soup


def models(count=6, seed=0, spread=1.0):
    """Models around one point, each with leaves of three kinds."""
    rng = np.random.default_rng(seed)
    center = rng.normal(size=(4, 3))
    return [
        {
            "w": jnp.asarray(center + spread * rng.normal(size=(4, 3)), jnp.float32),
            "b": [jnp.asarray(rng.normal(size=2), jnp.bfloat16)],
            "n": jnp.int32(i),
        }
        for i in range(count)
    ]


def distance(target):
    """A loss: the squared distance of w to a target, as NumPy sees it."""

    def evaluate(params):
        return float(np.sum((np.asarray(params["w"], np.float64) - target) ** 2))

    return evaluate


def greedy(values, evaluate, *, sign):
    """Recipe 1 of arXiv:2203.05482, on all models in memory."""
    order = sorted(range(len(values)), key=lambda i: sign * evaluate(values[i]))
    members = order[:1]
    for i in order[1:]:
        with_it = np.mean([values[j] for j in [*members, i]], axis=0)
        now = np.mean([values[j] for j in members], axis=0)
        if sign * evaluate(with_it) <= sign * evaluate(now):
            members.append(i)
    return members


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("maximize", [False, True])
def test_a_greedy_soup_is_that_of_the_reference(seed, maximize):
    """The same members in the same order, and their mean in float64."""
    trees = models(seed=seed)
    values = [np.asarray(tree["w"], np.float64) for tree in trees]
    target = np.mean(values[:3], axis=0)
    sign = -1 if maximize else 1
    made = soup(trees, lambda p: sign * distance(target)(p), maximize=maximize)
    expected = greedy(values, lambda v: sign * np.sum((v - target) ** 2), sign=sign)
    assert list(made.members) == expected
    assert 1 < len(expected) < 6
    mean = np.mean([values[i] for i in expected], axis=0)
    np.testing.assert_allclose(made.tree["w"], mean, rtol=6e-8)  # rounded once
    assert made.score == pytest.approx(sign * np.sum((mean - target) ** 2), rel=1e-5)
    np.testing.assert_allclose(
        made.scores, [sign * np.sum((v - target) ** 2) for v in values], rtol=1e-6
    )
    weights = [1 / len(expected) if i in expected else 0 for i in range(6)]
    np.testing.assert_array_equal(made.coefficients, weights)
    assert int(made.tree["n"]) == 5
    assert made.tree["b"][0].dtype == jnp.float32


def test_a_greedy_soup_by_hand():
    """Of 1, 2, 3, 9 to 2.4: 2; with 3 it is 2.5; with 1 it is 2, worse; 9 is worse."""
    trees = [{"w": jnp.array([x])} for x in (1.0, 2.0, 3.0, 9.0)]
    asked = []

    def evaluate(params):
        asked.append(float(params["w"][0]))
        return [abs(asked[-1] - 2.4)] * 2  # several values: their mean

    told = []
    made = soup(trees, evaluate, progress=lambda *x: told.append(x))
    assert asked == [1, 2, 3, 9, 2.5, 2, pytest.approx(14 / 3)]
    assert made.members == (1, 2)
    assert float(made.tree["w"][0]) == 2.5
    assert made.score == pytest.approx(0.1)
    assert told[-1] == (7, 7)


def test_a_member_that_changes_nothing_is_added():
    """As the paper has it: the mean must be no worse."""
    trees = [{"w": jnp.ones(2)}] * 3
    assert soup(trees, lambda params: 1.0).members == (0, 1, 2)


@pytest.mark.filterwarnings("always::ema_optax.reconstruction.EvaluationWarning")
def test_evaluations_that_fail():
    """Their models are left out, and the others are chosen from; none is an error."""
    trees = [{"w": jnp.array([x])} for x in (1.0, 2.0, 3.0, 4.0)]

    def evaluate(params):
        value = float(params["w"][0])
        if value == 1.0:
            raise RuntimeError("out of\nmemory")
        return {2.0: np.nan, 3.5: np.inf}.get(value, abs(value - 3.2))

    with pytest.warns(EvaluationWarning) as told:
        made = soup(trees, evaluate)
    assert made.members == (2,)
    assert np.isnan(made.scores[:2]).all()
    texts = [str(warning.message) for warning in told]
    assert "raised RuntimeError: out of memory for model 0" in texts[0]
    assert "gave nan for model 1" in texts[1]
    assert "gave inf for the mean with model 3" in texts[2]
    assert told[0].filename == __file__
    with (
        pytest.warns(EvaluationWarning),
        pytest.raises(ValueError, match="none of the 4 models a finite score"),
    ):
        soup(trees, lambda params: None)


def stock(offsets):
    """Equation 3 of arXiv:2403.19522, by all pairs of flat offsets."""
    n = len(offsets)
    cosines = [
        a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        for a, b in itertools.combinations(offsets, 2)
    ]
    cosine = np.mean(cosines)
    return n * cosine / (1 + (n - 1) * cosine)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_model_stock_is_that_of_the_reference(count):
    """The ratio of each leaf, and where it leads from the start."""
    start = {"w": jnp.zeros((4, 3)), "b": [jnp.zeros(2)], "n": jnp.int32(0)}
    trees = models(count, seed=3, spread=0.5)
    for tree in trees:
        tree["b"] = [jnp.abs(tree["b"][0]).astype(jnp.float32)]
    made = soup(trees, method="stock", start=start)
    for path, pick in (("w", lambda t: t["w"]), ("b/0", lambda t: t["b"][0])):
        held = [np.asarray(pick(tree), np.float64).reshape(-1) for tree in trees]
        ratio = stock(held)
        assert 0.1 < ratio < 1
        assert made.ratios[path] == pytest.approx(ratio, rel=1e-12)
        np.testing.assert_allclose(
            np.ravel(pick(made.tree)), ratio * np.mean(held, axis=0), atol=1e-6
        )
    assert made.coefficients is None
    assert made.score is None


def test_a_model_stock_by_hand():
    """Orthogonal offsets stay at the start, equal ones are the mean; so are others."""
    start = {name: jnp.array([1.0, 1.0]) for name in "abcd"}
    offsets = {
        "a": [[1, 0], [0, 1]],  # orthogonal: 0
        "b": [[1, 0], [3, 0]],  # of one direction: 1
        "c": [[1, 0], [1, 1]],  # at 45°: 2c/(1+c), c = 1/√2
        "d": [[1, 0], [-1, 0.5]],  # apart: nothing is common
    }
    trees = [
        {name: start[name] + jnp.array(pair[i]) for name, pair in offsets.items()}
        for i in range(2)
    ]
    made = soup(trees, method="stock", start=start)
    c = np.sqrt(0.5)
    expected = {"a": 0, "b": 1, "c": 2 * c / (1 + c), "d": 0}
    assert made.ratios == pytest.approx(expected, abs=1e-7)
    np.testing.assert_allclose(made.tree["b"], [3, 1], atol=1e-6)
    np.testing.assert_allclose(made.tree["d"], [1, 1], atol=1e-6)
    still = soup([start, start], method="stock", start=start)
    np.testing.assert_array_equal(still.tree["a"], start["a"])
    assert set(still.ratios.values()) == {0.0}


def test_a_uniform_soup():
    """The mean of all, evaluated where asked for."""
    trees = models()
    made = soup(trees, lambda params: 3, method="uniform")
    mean = np.mean([np.asarray(tree["w"], np.float64) for tree in trees], axis=0)
    np.testing.assert_allclose(made.tree["w"], mean, rtol=6e-8)  # rounded once
    assert (made.score, made.members) == (3.0, tuple(range(6)))
    assert soup(trees, method="uniform").score is None


def test_models_on_disk_and_params(tmp_path):
    """One at a time from disk; the result is like the params."""
    trees = models(3)
    for i, tree in enumerate(trees):
        opt_state = ema_optax.ema_params(0.9).init(tree)
        checkpoint.save(tmp_path, tree, opt_state, step=i)
    stored = [checkpoint.stored(tmp_path, "params", step=i) for i in range(3)]
    target = np.asarray(trees[0]["w"])
    for method, start in (("greedy", None), ("stock", trees[1])):
        evaluate = distance(target) if method == "greedy" else None
        options = {"method": method, "start": start, "params": trees[2]}
        ours = soup(stored, evaluate, **options)
        same = soup(trees, evaluate, **options)
        assert ours.members == same.members
        assert ours.tree["b"][0].dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.tree["w"], same.tree["w"])


class Counted(reconstruction.Source):
    """A source that counts what is read."""

    def __init__(self, tree, reads):
        self._inner = sums.InMemory(tree)
        self.leaves, self._reads = self._inner.leaves, reads

    def read(self, path, index):
        self._reads.append(path)
        return self._inner.read(path, index)


def test_a_stock_reads_each_leaf_once():
    """Leaf by leaf, of all models."""
    reads = []
    trees = models(4)
    soup([Counted(t, reads) for t in trees], method="stock", start=trees[0])
    assert sorted(reads) == ["b/0"] * 4 + ["w"] * 4
    assert reads[:4] == [reads[0]] * 4


TREES = models(2)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        (TREES[:1], {"method": "uniform"}, "at least two models"),
        ([], {"method": "uniform"}, "at least two models"),
        (TREES, {}, "needs evaluate.*method='uniform'"),
        (TREES, {"method": "stok"}, "one of greedy, uniform, stock.*nearest are 'stoc"),
        (TREES, {"method": "stock"}, "needs start=…"),
        (TREES, {"method": "uniform", "start": TREES[0]}, "others take none"),
        ([TREES[0], {"w": jnp.ones(2)}], {"method": "uniform"}, "not of one model"),
        (TREES, {"method": "stock", "start": {"w": jnp.ones(2)}}, "lacks 'b/0'"),
        (
            TREES,
            {"method": "stock", "start": {**TREES[0], "w": jnp.ones(2)}},
            r"'w' is float32\[2\] in it and float32\[4,3\] in the models",
        ),
    ],
    ids=[
        "one model",
        "no models",
        "no evaluate",
        "misspelt method",
        "stock without start",
        "uniform with start",
        "two structures",
        "start lacks a leaf",
        "start of another shape",
    ],
)
def test_what_is_refused(given, arguments, message):
    """Models that are none or do not fit, and what a method lacks."""
    with pytest.raises(ValueError, match=message):
        soup(given, **arguments)
