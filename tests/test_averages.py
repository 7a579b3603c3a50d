"""The one search: what it lists, how it is read, and how it is put back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import checkpoint, ema_params, metrics, shadow_params, with_shadow
from ema_optax._averages import averages, packing
from ema_optax._averages.average import Average
from ema_optax._averages.averages import Kind, find, joined
from tests.same import assert_same

PARAMS = {"a": jnp.arange(2.0), "b": jnp.ones(3), "n": jnp.int32(1)}
NAMED = ema_params({"slow": 0.99, "fast": lambda t: 0.5}, every=3)
BEMA = ema_optax.bema_params(every=2)


def test_it_lists_each_average_with_what_is_known_of_it():
    """In the order of the state; a state of several names lists each."""
    optimizer = optax.chain(optax.adam(0.1), NAMED, optax.chain(BEMA))
    state = optimizer.init(PARAMS)
    found = find(state)
    assert len(found) == 3
    slow, fast, bema = found
    assert [each.path for each in found] == ["1", "1", "2/0"]
    assert [each.name for each in found] == ["slow", "fast", ""]
    assert (slow.decay, fast.decay, bema.decay) == (ema_optax.warmup(0.99), None, None)
    assert [each.every for each in found] == [3, 3, 2]
    assert [each.is_computed for each in found] == [False, False, True]
    assert slow.made_by is fast.made_by is state[1].made_by
    assert bema.made_by is state[2][0].made_by
    assert slow.tree is state[1].shadow["slow"]
    assert bema.tree is state[2][0].average
    assert bema.count is state[2][0].count
    assert [each.path for each in find(state[1])] == ["", ""]
    by_hand = ema_optax.EmaParamsState(jnp.int32(3), PARAMS)
    [average] = find(by_hand)
    assert (average.made_by, average.decay, average.every) == (None, None, None)
    assert len(find(optax.adam(0.1).init(PARAMS))) == 0


def test_it_reads_without_copying_where_the_shadow_is_kept():
    """An EMA's is the array of the state; BEMA's is computed, and needs the params."""
    state = optax.chain(NAMED, BEMA).init(PARAMS)
    slow, _, bema = find(state)
    assert slow.read(PARAMS)["a"] is state[0].shadow["slow"]["a"]
    assert slow.read(None) is state[0].shadow["slow"]
    moved = {**PARAMS, "a": PARAMS["a"] + 1}
    np.testing.assert_allclose(bema.read(moved)["a"], PARAMS["a"] + 10**-0.2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"at '1 \(bema_params\)' is computed"):
        bema.read(None)


@pytest.mark.parametrize("pack", [False, True])
def test_what_is_taken_out_can_be_put_back(pack):
    """Other trees in the order of iteration, packed where those before were."""
    decays = {"slow": 0.99, "fast": 0.5}
    optimizer = optax.chain(
        optax.adam(0.1), ema_params(decays, pack_small=pack), BEMA, ema_params(0.9)
    )
    state = optimizer.init(PARAMS)
    found = find(state)
    rest = found.rest()
    assert rest[1].shadow is None
    assert rest[1].count is state[1].count
    assert rest[2].average is state[2].average
    assert not any(part.made_by for part in rest[1:])
    assert rest[3].shadow is None
    assert_same(found.put_back(rest, [each.tree for each in found]), state)
    # Counts of the rest are kept, and each tree goes to its own place.
    later = jax.tree.map(lambda x: x + 1, rest)
    trees = [
        None if each.is_computed else jax.tree.map(lambda x, i=i: x + i, each.tree)
        for i, each in enumerate(found, start=1)
    ]
    new = found.put_back(later, trees)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert isinstance(new[1].shadow["slow"], packing.Packed) == pack
    assert [int(new[i].count) for i in (1, 2, 3)] == [1, 1, 1]
    for name, path, plus in zip(
        [each.name for each in found], [1, 1, None, 3], [1, 2, None, 4], strict=True
    ):
        if path is not None:
            [average] = [x for x in find(new[path]) if x.name == name]
            np.testing.assert_array_equal(average.tree["a"], PARAMS["a"] + plus)
    np.testing.assert_array_equal(new[2].average["a"], PARAMS["a"] + 1)
    with pytest.raises(ValueError, match="4 averages take as many, got 3"):
        found.put_back(rest, trees[:3])


def test_parts_are_joined_and_overlaps_are_named():
    """Disjoint parts give one tree, in any number."""
    kinds = {"x": ema_params(0.9), "y": BEMA}
    optimizer = optax.multi_transform(
        {**kinds, "rest": optax.identity()}, {"a": "x", "b": "y", "n": "rest"}
    )
    found = find(optimizer.init(PARAMS)).of(None)
    whole = joined({each.where: each.tree for each in found})
    assert_same(whole, {**PARAMS, "n": optax.MaskedNode()})
    with pytest.raises(ValueError, match="several shadows of the same params, at"):
        joined({"0": found[0].tree, "1": found[0].tree})


@pytest.fixture
def searches(monkeypatch):
    """How often a whole optimizer state is searched for averages."""
    roots = []
    flatten = jax.tree_util.tree_flatten_with_path

    def counted(tree, is_leaf=None, **options):
        whole = isinstance(tree, tuple) and tree and isinstance(tree[0], Marked)
        if whole and is_leaf and is_leaf(tree[1]):  # Orbax looks for other leaves
            roots.append(tree)
        return flatten(tree, is_leaf=is_leaf, **options)

    monkeypatch.setattr(jax.tree_util, "tree_flatten_with_path", counted)
    return roots


class Marked(tuple):
    """State of the first transform in a chain, by which its state is known."""


jax.tree_util.register_pytree_node(Marked, lambda _: ((), None), lambda *_: Marked())

FIRST = optax.GradientTransformation(
    lambda params: Marked(), lambda updates, state, params=None: (updates, state)
)


@pytest.mark.parametrize("average", [ema_params(0.9), BEMA], ids=["ema", "bema"])
@pytest.mark.parametrize(
    "call",
    [
        lambda state: shadow_params(state, PARAMS),
        lambda state: with_shadow({"params": PARAMS, "opt_state": state}),
        lambda state: metrics(state, PARAMS),
        lambda state: checkpoint.EmaSave(PARAMS, state),
        find,
    ],
    ids=["shadow_params", "with_shadow", "metrics", "EmaSave", "find"],
)
def test_each_call_searches_once(call, average, searches):
    state = optax.chain(FIRST, average).init(PARAMS)
    call(state)
    assert len(searches) == 1


OPTIMIZERS = [optax.adam(0.1), optax.chain(ema_params(0.9)), optax.MultiSteps(BEMA, 2)]


@pytest.mark.parametrize(
    "optimizer",
    OPTIMIZERS,
    ids=["alone", "chained", "wrapped"],
)
def test_an_optimizer_in_place_of_its_state_is_named(optimizer):
    """With the call that works."""
    for call, text in (
        (lambda: shadow_params(optimizer, PARAMS), "shadow_params"),
        (lambda: metrics(optimizer, PARAMS), "metrics"),
        (
            lambda: with_shadow({"params": PARAMS, "opt_state": optimizer}),
            "shadow_params",
        ),
    ):
        with pytest.raises(
            TypeError, match=rf"an optimizer \(a .*Call {text}\(opt_state, params\)"
        ):
            call()


@pytest.mark.parametrize("average", [ema_params(0.9), BEMA], ids=["ema", "bema"])
def test_a_save_and_a_resume_search_once(average, searches, tmp_path):
    """And what a step holds is built once, for all that a manager asks of it."""
    state = optax.chain(FIRST, average).init(PARAMS)
    checkpoint.save(tmp_path, PARAMS, state)
    assert len(searches) == 1
    checkpoint.resume(tmp_path, PARAMS, state)
    assert len(searches) == 2


class Doubled(NamedTuple):
    """State of a third kind of average, whose shadow is half of what it keeps."""

    count: jax.Array
    double: dict[str, jax.Array]
    made_by: None = None


class HalfAverage(Average):
    """Its average."""

    is_computed = True

    def read(self, params):
        return jax.tree.map(lambda x: x / 2, self.tree)

    def decay_at(self, count):
        return None

    def weight_of_fold(self, count):
        return None

    def log_kept(self, steps):
        raise AssertionError("not asked where the decay is unknown")


def test_a_third_kind_is_a_row(monkeypatch, tmp_path):
    """What reads, measures and saves averages takes it without a change."""
    row = Kind(
        lambda path, state: [HalfAverage(path, "", state.count, None, state.double)],
        lambda state: state,
        lambda rest, old, _: rest,
    )
    monkeypatch.setitem(averages.KINDS, Doubled, row)
    params = {"w": jnp.arange(3.0)}
    state = (optax.EmptyState(), Doubled(jnp.int32(2), {"w": 2 * params["w"]}))
    assert_same(shadow_params(state, params), params)
    assert_same(with_shadow({"params": params, "opt_state": state})["params"], params)
    assert metrics(state, params).keys() == {
        "distance", "nonfinite_params", "nonfinite_shadow",
    }  # fmt: skip
    checkpoint.save(tmp_path, params, state)
    assert_same(checkpoint.restore(tmp_path, "shadow", params), params)
    assert_same(checkpoint.resume(tmp_path, params, state), (params, state))
