"""Masks and labels for whole parts of the params do what those for each leaf do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import checkpoint, shadow_params
from tests.same import assert_same

PARAMS = {
    "encoder": {"w": jnp.arange(3.0), "b": {"x": jnp.ones(2), "y": [jnp.ones(2)]}},
    "head": {"w": jnp.full(2, 3.0), "none": None, "empty": {}},
    "scale": jnp.float32(2),
}
WHOLE_PARTS = {"encoder": True, "head": False, "scale": True}
AVERAGES = {
    "ema": lambda: ema_optax.ema_params(0.9),
    "packed": lambda: ema_optax.ema_params(0.9, pack_small=True),
    "named": lambda: ema_optax.ema_params({"fast": 0.5}),
    "bema": ema_optax.bema_params,
    "window": lambda: ema_optax.ema_params(ema_optax.window(3)),
    "ring": lambda: ema_optax.ring(2),
}


def of_each_leaf(mask):
    """The mask with a value for each leaf of the params."""
    return jax.tree.map(
        lambda value, part: jax.tree.map(lambda _: value, part), mask, PARAMS
    )


def masked(average, mask):
    return optax.chain(optax.sgd(0.1), optax.masked(average(), mask))


def labelled(average, mask):
    labels = jax.tree.map({True: "averaged", False: "raw"}.get, mask)
    averaged = optax.chain(optax.sgd(0.1), average())
    transforms = {"averaged": averaged, "raw": optax.sgd(0.1)}
    return optax.multi_transform(transforms, labels)


def in_two_groups(average, mask):
    labels = jax.tree.map({True: "one", False: "other"}.get, mask)
    chains = {name: optax.chain(optax.sgd(0.1), average()) for name in ("one", "other")}
    return optax.multi_transform(chains, labels)


def trained(optimizer, steps=5):
    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("wrapped", [masked, labelled, in_two_groups])
def test_parts_are_as_their_leaves(wrapped, average, tmp_path):
    """Read, measured, diagnosed, saved, restored and resumed."""
    params, state = trained(wrapped(average, of_each_leaf(WHOLE_PARTS)))
    optimizer = wrapped(average, WHOLE_PARTS)
    same, parts = trained(optimizer)
    assert_same(same, params)
    shadow = shadow_params(state, params)
    assert not np.array_equal(shadow["encoder"]["w"], params["encoder"]["w"])
    if wrapped is not in_two_groups:
        assert_same(shadow["head"], params["head"])
    assert_same(shadow_params(parts, params), shadow)
    assert_same(
        ema_optax.with_shadow({"params": params, "opt_state": parts})["params"], shadow
    )
    assert_same(ema_optax.metrics(parts, params), ema_optax.metrics(state, params))
    ours, theirs = (ema_optax.diagnose(each, params) for each in (parts, state))
    assert ours.to_json() == theirs.to_json()
    checkpoint.save(tmp_path, params, parts)
    assert_same(checkpoint.restore(tmp_path, like=params), shadow)
    blank = optimizer.init(PARAMS)
    assert_same(checkpoint.resume(tmp_path, params, blank), (params, parts))


def test_a_shadow_without_params_keeps_its_placeholders():
    """One for a part as for a leaf; two groups become whole."""
    _, state = trained(masked(AVERAGES["ema"], WHOLE_PARTS), 1)
    assert shadow_params(state)["head"] == optax.MaskedNode()
    params, state = trained(in_two_groups(AVERAGES["ema"], WHOLE_PARTS), 1)
    assert_same(shadow_params(state), shadow_params(state, params))


def test_the_whole_tree_as_one_part():
    """A mask of one bool: all of the params, or none of them."""
    params, state = trained(masked(AVERAGES["ema"], mask=False), 2)
    assert_same(shadow_params(state, params), params)


def test_an_average_starts_from_a_tree_with_the_part():
    """Leaves of a part that is not averaged are not used."""
    state = masked(AVERAGES["ema"], WHOLE_PARTS).init(PARAMS)
    half = jax.tree.map(lambda x: x / 2, PARAMS)
    state = ema_optax.started_from(state, half, count=7)
    expected = {**half, "head": PARAMS["head"]}
    assert_same(shadow_params(state, PARAMS), expected)


def test_params_of_other_containers():
    """A part that is masked, in a tree of other containers with the same paths."""
    _, state = trained(masked(AVERAGES["ema"], WHOLE_PARTS), 1)
    head = optax.MaskedNode()
    listed = [{"w": jnp.ones(1)}, {"v": jnp.ones(2), "w": jnp.ones(3)}]
    mask = optax.masked(AVERAGES["ema"](), [True, False])
    state = mask.init(listed)
    as_dict = {"0": listed[0], "1": listed[1]}
    assert state.inner_state.shadow[1] == head
    assert_same(shadow_params(state, as_dict), as_dict)


def test_a_part_that_is_missing_is_an_error():
    """Masked or not, the params are those of the state."""
    _, state = trained(masked(AVERAGES["ema"], WHOLE_PARTS), 1)
    for name in WHOLE_PARTS:
        fewer = {key: part for key, part in PARAMS.items() if key != name}
        with pytest.raises(ValueError, match=f"'{name}.* is only in the shadow"):
            shadow_params(state, fewer)
    with pytest.raises(ValueError, match="'more' is only in the params"):
        shadow_params(state, {**PARAMS, "more": jnp.ones(1)})


def test_groups_that_share_a_leaf_of_a_part_are_told():
    """One averages a part, the other a leaf of it."""
    optimizer = optax.chain(
        optax.masked(AVERAGES["ema"](), WHOLE_PARTS),
        optax.masked(
            AVERAGES["ema"](),
            of_each_leaf({"encoder": True, "head": False, "scale": False}),
        ),
    )
    with pytest.raises(ValueError, match="several shadows of the same params"):
        shadow_params(optimizer.init(PARAMS), PARAMS)
