"""Default devices and abstract meshes on eight devices; test_devices runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import checkpoint, placement, reconstruction, shadow_params
from ema_optax._placement import leaf_placement
from tests.same import assert_same

OPTIMIZER = optax.chain(optax.adam(0.1), ema_optax.ema_params(ema_optax.power(0.1)))
EXPLICIT = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
AUTO = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))


def make_params(sharding=None):
    params = {"w": jnp.arange(16.0).reshape(8, 2), "k": jax.random.key(3)}
    params["w"] = jax.device_put(params["w"], sharding)
    return params


def saved(folder, params):
    numbers = {"w": params["w"]}
    state = OPTIMIZER.init(numbers)
    for step in (1, 2):
        updates, state = OPTIMIZER.update(numbers, state, numbers)
        numbers = optax.apply_updates(numbers, updates)
        checkpoint.save(folder, {**params, **numbers}, state, step=step)
    return {**params, **numbers}, state


@pytest.mark.parametrize("device", [2, 7])
def test_all_land_on_the_default_device(tmp_path, device):
    """As `jnp.zeros` does: restored, resumed, merged, reconstructed, from the host."""
    params, state = saved(tmp_path, make_params())
    like = jax.eval_shape(lambda: params)
    with jax.default_device(jax.devices()[device]):
        expected = jnp.zeros(1).devices()
        numbers = {"w": like["w"]}
        target = jax.eval_shape(OPTIMIZER.init, numbers)
        last = [checkpoint.stored(tmp_path, step=step) for step in (1, 2)]
        found = [
            checkpoint.restore(tmp_path, like=like),
            checkpoint.restore(tmp_path),
            checkpoint.resume(tmp_path, like, target),
            checkpoint.resume(tmp_path, *jax.eval_shape(lambda: (params, state))),
            reconstruction.merge(last, [0.5, 0.5]),
            reconstruction.merge([{"w": jnp.ones(2)}] * 2, [0.5, 0.5]),
            reconstruction.reconstruct(
                checkpoint.snapshots(tmp_path, verify=False), width=0.1
            ).tree,
        ]
    for tree in found:
        for leaf in jax.tree.leaves(tree):
            assert leaf.devices() == expected
    with jax.default_device("cpu"):
        assert checkpoint.restore(tmp_path)["w"].devices() == {jax.devices()[0]}


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec("x", "y"), PartitionSpec(None, "y")],
    ids=["both axes", "one axis"],
)
def test_a_target_of_eval_shape_on_an_explicit_mesh(tmp_path, spec):
    """Its shardings have no devices: those of the params are meant."""
    sharding = NamedSharding(EXPLICIT, spec)
    params, state = saved(tmp_path, make_params(sharding))
    abstract = jax.eval_shape(OPTIMIZER.init, {"w": params["w"]})
    for given in (abstract, state):
        found = checkpoint.resume(tmp_path, params, given)
        assert_same(found, (params, state))
        for leaf in (found[0]["w"], found[1][-1].shadow["w"]):
            assert leaf.sharding == sharding
        # With JAX 0.12 eval_shape says nothing of arrays like `jnp.zeros_like`.
        momentum = optax.tree.get(found[1], "mu")["w"]
        known = optax.tree.get(given, "mu")["w"].sharding
        assert momentum.sharding == sharding if known else not momentum.committed
    like = jax.eval_shape(lambda p: jax.tree.map(jnp.copy, p), params)
    assert leaf_placement.is_abstract(like["w"].sharding)
    with pytest.raises(ValueError, match=r"has no devices.*not damaged.*") as error:
        checkpoint.restore(tmp_path, like=like)
    assert not isinstance(error.value, checkpoint.CorruptCheckpointError)
    with jax.set_mesh(EXPLICIT):
        assert checkpoint.restore(tmp_path, like=like)["w"].sharding == sharding
    step = jax.jit(OPTIMIZER.update)  # what is bound to no device can be used with it
    params, state = found
    numbers = {"w": params["w"]}
    assert step(numbers, state, numbers)[1][-1].shadow["w"].sharding == sharding


def test_a_target_of_eval_shape_beside_params_on_a_mesh(tmp_path):
    """On axes that are Auto it says nothing of devices, and can be used with any."""
    params, state = saved(
        tmp_path, make_params(NamedSharding(AUTO, PartitionSpec("x")))
    )
    abstract = jax.eval_shape(OPTIMIZER.init, {"w": params["w"]})
    found, opt_state = checkpoint.resume(tmp_path, params, abstract)
    numbers = {"w": found["w"]}
    new = jax.jit(OPTIMIZER.update)(numbers, opt_state, numbers)[1]
    assert int(new[-1].count) == int(state[-1].count) + 1


@pytest.mark.parametrize("jitted", [False, True])
def test_over_axis_after_an_init_under_jit(tmp_path, jitted):
    """Read, folded, saved and resumed outside of jit, as after a plain init."""
    sharding = NamedSharding(EXPLICIT, PartitionSpec(None, "y"))
    params = {"w": jax.device_put(jnp.arange(16.0).reshape(8, 2), sharding)}
    average = ema_optax.ema_params(0.9, shadow_sharding=placement.over_axis("x"))
    state = (jax.jit(average.init) if jitted else average.init)(params)
    for update in (average.update, jax.jit(average.update)):
        _, state = update(params, state, params)
        found = shadow_params(state, params)
        assert found["w"].sharding == sharding
        assert state.shadow["w"].sharding.spec == PartitionSpec("x", "y")
        with jax.set_mesh(EXPLICIT):
            assert jax.jit(shadow_params)(state, params)["w"].shape == (8, 2)
    checkpoint.save(tmp_path, params, state)
    again = checkpoint.resume(tmp_path, params, state)
    np.testing.assert_array_equal(again[1].shadow["w"], state.shadow["w"])


def test_one_conditional_for_all_leaves():
    """On the steps between nothing is fetched, whatever the number of leaves."""
    sharding = NamedSharding(AUTO, PartitionSpec())
    params = {f"w{i}": jax.device_put(jnp.ones((8, 4)) * i, sharding) for i in range(9)}
    average = ema_optax.ema_params(
        ema_optax.constant(0.5),
        overwrite_every=2,
        shadow_sharding=placement.over_axis("x"),
    )
    optimizer = optax.chain(optax.sgd(0.1), average)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    compiled = step.lower(params, state, params).compile().as_text()
    assert compiled.count(" conditional(") == 1
    expected = {name: np.asarray(x, np.float64) for name, x in params.items()}
    shadow = dict(expected)
    for at in range(1, 5):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
        for name in expected:
            new = expected[name] * 0.9
            shadow[name] = shadow[name] + 0.5 * (new - shadow[name])
            expected[name] = shadow[name] if at % 2 == 0 else new
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)
