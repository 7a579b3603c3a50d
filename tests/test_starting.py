"""An average from elsewhere in a fresh state: its count, its place, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import placement
from ema_optax._averages.starting import settled_count
from tests import older, reference
from tests.same import assert_same

PARAMS = {"dense": {"w": jnp.linspace(-1, 1, 6).reshape(2, 3)}, "n": jnp.int32(3)}
SHADOW = {"dense": {"w": np.linspace(3, 5, 6).reshape(2, 3)}, "n": np.int32(0)}


def chain(*averages):
    return optax.chain(optax.sgd(0.1), *averages)


def continued(optimizer, state, times):
    """The shadow after some updates, and the params that it folded."""
    params, seen = PARAMS, []
    for i in range(times):
        grads = jax.tree.map(
            lambda x, i=i: jnp.full_like(x, i + 1) if x.ndim else jnp.zeros_like(x),
            params,
        )
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["dense"]["w"], np.float64))
    return np.asarray(ema_optax.shadow_params(state)["dense"]["w"]), seen, state


@pytest.mark.parametrize("count", [0, 1, 57, 120_000])
def test_an_average_goes_on_from_its_count(count):
    """As in float64; a count off by one is 30 times beyond the bound at 57."""
    optimizer = chain(ema_optax.ema_params(0.9999))
    state = ema_optax.started_from(optimizer.init(PARAMS), SHADOW, count=count)
    shadow, params, state = continued(optimizer, state, 20)
    decays = reference.betas("warmup", count + 20, 0.9999)[count:]
    expected = reference.average(params, decays, start=SHADOW["dense"]["w"])
    np.testing.assert_allclose(shadow, expected, rtol=2e-6)
    assert int(state[1].count) == count + 20


def test_without_its_count_an_average_is_lost():
    """What the docstring says: 0.5 % are left of it after four updates."""
    optimizer = chain(ema_optax.ema_params(0.9999))
    state = optimizer.init(jax.tree.map(jnp.zeros_like, PARAMS))
    kept = np.prod(reference.betas("warmup", 4, 0.9999))
    assert 0.004 < kept < 0.006
    alone = {
        "dense": {"w": jnp.asarray(SHADOW["dense"]["w"])},
        "n": state[1].shadow["n"],
    }
    for given, left in (
        (state[1]._replace(shadow=alone), kept),
        (ema_optax.started_from(state, SHADOW, count=120_000)[1], 0.9999**4),
    ):
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        given = (state[0], given)
        for _ in range(4):
            _, given = optimizer.update(zeros, given, zeros)
        shadow = ema_optax.shadow_params(given)["dense"]["w"]
        np.testing.assert_allclose(shadow, left * SHADOW["dense"]["w"], rtol=1e-6)


def test_the_rest_of_the_state_is_as_it_was():
    """Only shadow and count change; the result has arrays of its own."""
    optimizer = optax.chain(optax.adam(0.1), ema_optax.ema_params(0.99))
    given = jax.tree.map(jnp.asarray, SHADOW)
    state = optimizer.init(PARAMS)
    found = ema_optax.started_from(state, given, count=7)
    assert_same(found[0], state[0])
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert_same(found[1].shadow["dense"], given["dense"])
    here, there = found[1].shadow["dense"]["w"], given["dense"]["w"]
    assert here.unsafe_buffer_pointer() != there.unsafe_buffer_pointer()
    jitted = jax.jit(lambda s, x: ema_optax.started_from(s, x, count=7))
    assert_same(jitted(state, given), found)


@pytest.mark.parametrize(
    "options",
    [
        {"pack_small": True},
        {"shadow_dtype": "bfloat16"},
        {"shadow_sharding": placement.in_host_memory()},
    ],
    ids=["packed", "bfloat16", "host"],
)
@older.in_host_memory_or_not
def test_a_shadow_lies_where_the_state_keeps_it(options):
    """Packed, narrower, in the host's memory: as after init."""
    params = PARAMS | {"more": jnp.ones(4)}
    shadow = SHADOW | {"more": np.full(4, 2.5)}
    state = chain(ema_optax.ema_params(0.9, **options)).init(params)
    found = ema_optax.started_from(state, shadow, count=5)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
    for x, slot in pairs:
        assert (x.dtype, x.shape, x.sharding) == (slot.dtype, slot.shape, slot.sharding)
    read = ema_optax.shadow_params(found, params)
    kept = "bfloat16" if "shadow_dtype" in options else "float32"
    expected = jnp.asarray(shadow["dense"]["w"], kept).astype("float32")
    assert_same(read["dense"]["w"], expected)


def test_averages_by_name_and_in_groups():
    """The others stay; a count that another one set is not overwritten unsaid."""
    optimizer = chain(ema_optax.ema_params({"fast": 0.9, "slow": 0.999}))
    state = optimizer.init(PARAMS)
    found = ema_optax.started_from(state, SHADOW, count=40, name="slow")
    assert_same(found[1].shadow["fast"], state[1].shadow["fast"])
    np.testing.assert_allclose(
        found[1].shadow["slow"]["dense"]["w"], SHADOW["dense"]["w"], rtol=1e-7
    )
    both = ema_optax.started_from(found, SHADOW, count=40, name="fast")
    assert int(both[1].count) == 40
    with pytest.raises(ValueError, match=r"share one count, which is 40.*become 41"):
        ema_optax.started_from(found, SHADOW, count=41, name="fast")
    with pytest.raises(ValueError, match="shadows 'fast', 'slow', and none was"):
        ema_optax.started_from(state, SHADOW, count=40)
    groups = optax.multi_transform(
        {name: chain(ema_optax.ema_params(0.9)) for name in "ab"},
        {"dense": {"w": "a"}, "n": "b", "more": "b"},
    )
    params = PARAMS | {"more": jnp.ones(2)}
    state = groups.init(params)
    shadow = SHADOW | {"more": np.full(2, 4.0)}
    found = ema_optax.started_from(state, shadow, count=9)
    read = ema_optax.shadow_params(found, params)
    assert_same(read["more"], jnp.full(2, 4.0))
    for group in found.inner_states.values():
        assert int(group.inner_state[1].count) == 9


SETTLED = {
    "constant": (ema_optax.constant(0.9), 1),
    "warmup": (ema_optax.warmup(0.9), 80),  # 81/90 = 0.9
    "start_after": (ema_optax.start_after(ema_optax.constant(0.9), 500), 501),
    "inverse_power": (ema_optax.inverse_power(0.99, power=1.0), 100),
    "past a power of two": (ema_optax.start_after(ema_optax.constant(0.9), 512), 513),
}


@pytest.mark.parametrize(("decay", "count"), SETTLED.values(), ids=SETTLED)
def test_a_settled_decay_is_at_its_end(decay, count):
    """From this count on all β are the last; one update earlier they are not."""
    assert settled_count(decay) == count
    state = chain(ema_optax.ema_params(decay, every=4)).init(PARAMS)
    state = ema_optax.started_from(state, SHADOW, count="settled")
    assert int(state[1].count) == count + 3  # so is each of the fold's four updates


def test_a_decay_that_never_settles_needs_the_number():
    """Or one whose end is to stand still, or that is not known."""
    for decay, said in {
        ema_optax.uniform(): "depends on the count for ever",
        ema_optax.power(0.05): "depends on the count for ever",
        ema_optax.cosine(0.9, 100): "stands still",
        (lambda step: 0.9): "needs a decay that the state records",
    }.items():
        state = chain(ema_optax.ema_params(decay)).init(PARAMS)
        with pytest.raises(ValueError, match=rf"{said}.*Pass the number of updates"):
            ema_optax.started_from(state, SHADOW, count="settled")
        found = ema_optax.started_from(state, SHADOW, count=11)
        assert int(found[1].count) == 11


def test_refused_in_words():
    """A count of another kind, trees and leaves that do not fit, BEMA, no average."""
    state = chain(ema_optax.ema_params(0.9)).init(PARAMS)
    for count, error, said in [
        (-1, ValueError, r"≥ 0, got -1.*'settled' where it is not known"),
        (2**31, ValueError, "below 2³¹, got 2,147,483,648"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
        (1.5, TypeError, "got 1.5"),
        ("end", ValueError, "got 'end'"),
    ]:
        with pytest.raises(error, match=said):
            ema_optax.started_from(state, SHADOW, count=count)
    with pytest.raises(TypeError, match="count"):
        ema_optax.started_from(state, SHADOW)
    for shadow, error, said in [
        ({"dense": {}}, ValueError, "it has no 'dense/w'"),
        (
            {"dense": {"w": np.ones((3, 2))}, "n": 0},
            ValueError,
            r"\(3, 2\), and averaged it is \(2, 3\)",
        ),
        ({"dense": {"w": np.ones((2, 3), int)}, "n": 0}, TypeError, "Pass floats"),
        ({"dense": {"w": optax.MaskedNode()}, "n": 0}, ValueError, "no 'dense/w'"),
        (SHADOW | {"more": np.ones(2)}, ValueError, "it has 'more'. The nearest"),
        (None, ValueError, "does not fit the optimizer state"),
    ]:
        with pytest.raises(error, match=said):
            ema_optax.started_from(state, shadow, count=1)
    bema = chain(ema_optax.bema_params()).init(PARAMS)
    with pytest.raises(ValueError, match=r"params of its first update.*anchor=…"):
        ema_optax.started_from(bema, SHADOW, count=1)
    with pytest.raises(ValueError, match="There is no shadow"):
        ema_optax.started_from(chain().init(PARAMS), SHADOW, count=1)
    with pytest.raises(TypeError, match="This is an optimizer"):
        ema_optax.started_from(chain(), SHADOW, count=1)


def test_paths_that_two_leaves_share():
    """Each leaf has its own, in the order of the tree."""
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(3)}}
    state = ema_optax.ema_params(0.9).init(params)
    shadow = jax.tree.map(lambda x: x + 5, params)
    assert_same(ema_optax.started_from(state, shadow, count=3).shadow, shadow)
