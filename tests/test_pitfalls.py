"""The traps that parameter averages fall into, one test each."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import shadow_params
from ema_optax.reconstruction import Snapshot, reconstruct
from tests.older import enable_x64

ODD = {
    "w": jnp.asarray([1.0, 2.0]),
    "half": jnp.asarray([1.0], jnp.bfloat16),
    "complex": jnp.asarray([1 + 2j], jnp.complex64),
    "step": jnp.int32(7),
    "flag": jnp.asarray(True),
    "key": jax.random.key(0),
    "none": None,
    "nothing": {},
    "empty": jnp.zeros((0, 3)),
    "scalar": jnp.float32(4.0),
}


def _zeros(params):
    return jax.tree.map(
        lambda p: jnp.zeros_like(p) if jnp.issubdtype(p.dtype, jnp.inexact) else p,
        params,
    )


def _train_step(optimizer):
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def _sgd_ema(decay=0.9, rate=0.1, **options):
    return optax.chain(optax.sgd(rate), ema_optax.ema_params(decay, **options))


def test_donation_right_after_init():
    """The shadow has buffers of its own: params and state can both be donated."""
    for dtype in (jnp.float32, jnp.bfloat16):
        optimizer = _sgd_ema()
        params = {"w": jnp.ones(8, dtype), "n": jnp.ones(3)}
        state = optimizer.init(params)
        step = jax.jit(_train_step(optimizer), donate_argnums=(0, 1))
        grads = jax.tree.map(jnp.ones_like, params)
        params, state = step(params, state, grads)
        params, state = step(params, state, grads)
        assert int(state[1].count) == 2


def test_reading_survives_donation_of_the_state():
    """What shadow_params returned is still there after the next donated step."""
    optimizer = _sgd_ema(mask={"w": True, "frozen": False})
    params = {"w": jnp.ones(8), "frozen": jnp.ones(3)}
    state = optimizer.init(params)
    evaluated = shadow_params(state, params)
    stored = shadow_params(state)
    step = jax.jit(_train_step(optimizer), donate_argnums=(0, 1))
    step(params, state, jax.tree.map(jnp.ones_like, params))
    assert float(evaluated["w"].sum() + evaluated["frozen"].sum()) == 11.0
    assert float(stored["w"].sum()) == 8.0


def test_odd_leaves_are_never_touched():
    """Integers, bools, keys, None and empty nodes: placeholders, read from params."""
    transform = ema_optax.ema_params(ema_optax.constant(0.5))
    state = transform.init(ODD)
    placeholder = optax.MaskedNode()
    for name in ("step", "flag", "key"):
        assert state.shadow[name] == placeholder
    assert state.shadow["none"] is None
    assert state.shadow["half"].dtype == jnp.float32
    assert state.shadow["complex"].dtype == jnp.complex64
    updates = _zeros(ODD) | {"complex": jnp.asarray([2 - 4j], jnp.complex64)}
    out, state = jax.jit(transform.update)(updates, state, ODD)
    assert out["step"] == ODD["step"]
    np.testing.assert_allclose(state.shadow["complex"], [2 + 0j])
    now = {**ODD, "step": jnp.int32(99)}
    read = shadow_params(state, now)
    assert jax.tree.structure(read) == jax.tree.structure(now)
    assert read["step"] == 99
    assert read["step"].dtype == jnp.int32
    assert read["half"].dtype == jnp.bfloat16
    assert jnp.array_equal(
        jax.random.key_data(read["key"]), jax.random.key_data(ODD["key"])
    )
    assert read["empty"].shape == (0, 3)


def test_a_nan_in_one_element_leaves_that_element_alone():
    """It holds while the param is not finite, the others fold on, then it recovers."""
    transform = ema_optax.ema_params(ema_optax.constant(0.5))
    params = {"w": jnp.asarray([1.0, 1.0, 1.0])}
    state = transform.init(params)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        updates = {"w": jnp.asarray([bad, 1.0, 0.0])}
        _, state = jax.jit(transform.update)(updates, state, params)
    np.testing.assert_allclose(state.shadow["w"], [1.0, 1.875, 1.0])
    updates = {"w": jnp.asarray([1.0, 1.0, 0.0])}
    _, state = transform.update(updates, state, params)
    np.testing.assert_allclose(state.shadow["w"], [1.5, 1.9375, 1.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shadow_that_started_non_finite_recovers(dtype):
    """A NaN at init does not stay for ever; an infinity that is meant does stay."""
    transform = ema_optax.ema_params(0.9, shadow_dtype=dtype)
    state = transform.init({"w": jnp.asarray([jnp.nan, -jnp.inf, 3e38])})
    params = {"w": jnp.asarray([2.0, -jnp.inf, -3e38])}
    _, state = transform.update(_zeros(params), state, params)
    shadow = np.asarray(state.shadow["w"], np.float32)
    assert shadow[0] == 2.0
    assert shadow[1] == -np.inf
    assert np.isfinite(shadow[2])  # p − s overflows: held


def test_multi_transform_and_masked():
    """Each group's shadow is found, and joined with the others and the raw rest."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)}
    optimizer = optax.multi_transform(
        {"ema": _sgd_ema(ema_optax.constant(0.5)), "raw": optax.sgd(0.1)},
        {"a": "ema", "b": "raw", "c": "ema"},
    )
    step = jax.jit(_train_step(optimizer))
    new, state = step(
        params, optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    )
    read = shadow_params(state, new)
    np.testing.assert_allclose(read["a"], 0.95)
    np.testing.assert_allclose(read["b"], 0.9)

    two = optax.multi_transform(
        {
            "x": _sgd_ema(ema_optax.constant(0.5)),
            "y": _sgd_ema(ema_optax.constant(0.0)),
        },
        {"a": "x", "b": "y", "c": "x"},
    )
    new, state = jax.jit(_train_step(two))(
        params, two.init(params), jax.tree.map(jnp.ones_like, params)
    )
    read = shadow_params(state, new)
    np.testing.assert_allclose(read["a"], 0.95)
    np.testing.assert_allclose(read["b"], 0.9)

    masked = optax.masked(
        ema_optax.ema_params(ema_optax.constant(0.5)),
        {"a": True, "b": False, "c": True},
    )
    state = masked.init(params)
    _, state = masked.update(jax.tree.map(jnp.ones_like, params), state, params)
    read = shadow_params(state, params)
    np.testing.assert_allclose(read["a"], 1.5)
    np.testing.assert_allclose(read["b"], 1.0)


def test_inject_hyperparams_names_the_static_args_it_needs():
    """It turns `every` into an array: the error names the arguments to add."""
    params = {"w": jnp.ones(2)}
    inject = optax.inject_hyperparams(ema_optax.ema_params)
    with pytest.raises(TypeError, match=r"static_args=\('every', 'overwrite_every'\)"):
        inject(0.9).init(params)


def test_inject_hyperparams_in_float32():
    """With static_args a float β is injected, can be set, and warms up as ever."""
    inject = optax.inject_hyperparams(
        ema_optax.ema_params, static_args=("every", "overwrite_every")
    )
    injected, plain = inject(decay=0.9), ema_optax.ema_params(0.9)
    params = {"w": jnp.ones(2)}
    a, b = injected.init(params), plain.init(params)
    assert a.hyperparams["decay"].dtype == jnp.float32
    updates = {"w": jnp.full(2, 0.5)}
    update = jax.jit(injected.update)
    for _ in range(100):
        _, a = update(updates, a, params)
        _, b = plain.update(updates, b, params)
    np.testing.assert_allclose(shadow_params(a)["w"], shadow_params(b)["w"], rtol=1e-6)
    a.hyperparams["decay"] = jnp.float32(0.0)
    _, a = update(updates, a, params)
    np.testing.assert_allclose(shadow_params(a)["w"], 1.5)


def test_inject_hyperparams_on_bfloat16_params_is_refused():
    """There .999 would be 1.0 and the shadow frozen; hyperparam_dtype makes it work."""
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    static = ("every", "overwrite_every")
    inject = optax.inject_hyperparams(ema_optax.ema_params, static_args=static)
    with pytest.raises(TypeError, match=r"cannot tell 0.999 from 1.*hyperparam_dtype"):
        inject(decay=0.999).init(params)
    works = optax.inject_hyperparams(
        ema_optax.ema_params, static_args=static, hyperparam_dtype=jnp.float32
    )(decay=0.999)
    _, state = works.update(params, works.init(params), params)
    np.testing.assert_allclose(shadow_params(state)["w"], 1 + 9 / 11, rtol=1e-6)


def test_inject_hyperparams_takes_a_decay_for_a_schedule_from_zero():
    """That would be one step late: the error says which static_args keep it whole."""
    inject = optax.inject_hyperparams(
        ema_optax.ema_params, static_args=("every", "overwrite_every")
    )
    with pytest.raises(ValueError, match=r"static_args=\('decay', 'every'\)"):
        inject(decay=ema_optax.uniform()).init({"w": jnp.ones(2)})


def test_multi_steps_inside_folds_once_per_real_update():
    """Inside MultiSteps(k) count and shadow move once every k micro-batches."""
    params = {"w": jnp.ones(2)}
    optimizer = optax.MultiSteps(_sgd_ema(ema_optax.constant(0.5)), 4)
    state = optimizer.init(params)
    step = jax.jit(_train_step(optimizer))
    for _ in range(8):
        params, state = step(params, state, {"w": jnp.ones(2)})
    np.testing.assert_allclose(params["w"], 0.8, rtol=1e-6)
    np.testing.assert_allclose(shadow_params(state)["w"], 0.875, rtol=1e-6)
    assert int(state.inner_opt_state[1].count) == 2


def test_multi_steps_in_front_needs_every():
    """Chained after MultiSteps it sees micro-batches: `every=k` folds the real ones."""
    inner = optax.MultiSteps(optax.sgd(0.1), 4)
    optimizer = optax.chain(
        optax.GradientTransformationExtraArgs(inner.init, inner.update),
        ema_optax.ema_params(ema_optax.constant(0.5**0.25), every=4),
    )
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    step = jax.jit(_train_step(optimizer))
    for _ in range(8):
        params, state = step(params, state, {"w": jnp.ones(2)})
    np.testing.assert_allclose(shadow_params(state)["w"], 0.875, rtol=1e-6)


def test_apply_if_finite_around_the_chain():
    """A step that is not finite moves neither params nor shadow nor count."""
    optimizer = optax.apply_if_finite(_sgd_ema(ema_optax.constant(0.5)), 5)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    step = jax.jit(_train_step(optimizer))
    params, state = step(params, state, {"w": jnp.asarray([jnp.nan, 1.0])})
    assert int(state.inner_state[1].count) == 0
    np.testing.assert_array_equal(shadow_params(state)["w"], [1.0, 1.0])
    params, state = step(params, state, {"w": jnp.ones(2)})
    np.testing.assert_allclose(shadow_params(state)["w"], 0.95)


def test_two_averages_in_one_state():
    """optax.tree.get gives up on two counts; shadow_params asks for a name."""
    params = {"w": jnp.ones(2)}
    twice = optax.chain(ema_optax.ema_params(0.9), ema_optax.ema_params(0.99))
    with pytest.raises(ValueError, match=r"several shadows.*'0' and '1'.*name='slow'"):
        shadow_params(twice.init(params), params)
    named = ema_optax.ema_params({"fast": 0.9, "slow": 0.99})
    read = shadow_params(named.init(params), params, name="slow")
    np.testing.assert_array_equal(read["w"], 1.0)


def test_no_recompilation_and_a_stable_state():
    """One trace for all steps; structure, shapes, dtypes and shardings stay."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones(8, jnp.bfloat16), sharding), "n": 3}
    for options in (
        {},
        {"every": 3},
        {"shadow_dtype": "bfloat16"},
        {"overwrite_every": 2},
    ):
        transform = ema_optax.ema_params({"a": 0.9}, **options)
        traces = []

        def step(updates, state, params, transform=transform, traces=traces):
            traces.append(1)
            return transform.update(updates, state, params)

        update = jax.jit(step)
        state = first = jax.jit(transform.init)(params)
        assert first.shadow["a"]["w"].sharding == sharding
        for _ in range(5):
            _, state = update({"w": params["w"], "n": 0}, state, params)
        assert len(traces) == 1
        described = [
            jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), s)
            for s in (first, state)
        ]
        assert described[0] == described[1]
        assert state.shadow["a"]["w"].sharding.is_equivalent_to(sharding, 1)


def test_every_does_not_copy_trees_on_steps_that_do_not_fold():
    """The compiled step needs no temporary tree, and reads and writes no more bytes."""
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(4)}
    size = sum(leaf.nbytes for leaf in params.values())

    def compiled(optimizer):
        step = jax.jit(_train_step(optimizer), donate_argnums=(0, 1))
        state = optimizer.init(params)
        return step.lower(params, state, params).compile()

    adam = optax.adam(1e-3)
    alone = compiled(adam)
    for options in ({"every": 10}, {}):
        both = compiled(optax.chain(adam, ema_optax.ema_params(0.9, **options)))
        extra = (
            both.cost_analysis()["bytes accessed"]
            - alone.cost_analysis()["bytes accessed"]
        )
        assert extra / size < 3.05
        temporary = both.memory_analysis().temp_size_in_bytes
        assert temporary - alone.memory_analysis().temp_size_in_bytes < 0.05 * size


def test_extra_args_are_accepted():
    """A chain with a line search passes value and grad on to every transform."""
    transform = ema_optax.ema_params(0.9)
    params = {"w": jnp.ones(2)}
    transform.update(params, transform.init(params), params, value=1.0, grad=params)


def test_tree_map_params_sees_the_shadow_as_params():
    """So sharding rules for params reach the shadow, and leave the count alone."""
    optimizer = _sgd_ema(mask={"w": True, "b": False})
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    marked = optax.tree.map_params(
        optimizer, lambda _: "param", optimizer.init(params), transform_non_params=str
    )
    assert marked[1].shadow["w"] == "param"
    assert marked[1].count == "0"


def test_scan_over_steps_is_the_loop():
    """lax.scan over updates gives what a Python loop of jitted steps gives."""
    transform = ema_optax.ema_params(0.9, every=2)
    params = {"w": jnp.ones(3)}
    rng = np.random.default_rng(0)
    updates = {"w": jnp.asarray(rng.standard_normal((9, 3)), jnp.float32)}

    def step(state, update):
        return transform.update(update, state, params)[1], None

    scanned, _ = jax.lax.scan(step, transform.init(params), updates)
    looped = transform.init(params)
    for t in range(9):
        update = {"w": updates["w"][t]}
        looped = jax.jit(transform.update)(update, looped, params)[1]
    np.testing.assert_allclose(scanned.shadow["w"], looped.shadow["w"], rtol=1e-6)
    assert int(scanned.count) == 9


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 2])
def test_vmap_over_seeds_is_each_seed_alone(every):
    """A batch of models is averaged like each one."""
    transform = ema_optax.ema_params(0.9, every=every)
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    state = jax.vmap(transform.init)(params)
    for _ in range(3):
        _, state = jax.vmap(transform.update)(params, state, params)
    alone = transform.init({"w": params["w"][1]})
    for _ in range(3):
        one = {"w": params["w"][1]}
        _, alone = transform.update(one, alone, one)
    np.testing.assert_allclose(state.shadow["w"][1], alone.shadow["w"], rtol=1e-6)


def test_eval_shape_gives_the_state_without_memory():
    """Abstract init and update, for restoring checkpoints and planning memory."""
    transform = ema_optax.ema_params({"a": 0.9}, shadow_dtype="bfloat16", every=2)
    huge = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
    state = jax.eval_shape(transform.init, huge)
    assert state.shadow["a"]["w"] == jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)
    _, after = jax.eval_shape(transform.update, huge, state, huge)
    assert after == state


def test_before_the_learning_rate_it_averages_something_else():
    """Chained before the optimizer it would see raw gradients: the count still works.

    There is no telling gradients from updates, but the state shows what comes after.
    """
    wrong = optax.chain(ema_optax.ema_params(ema_optax.constant(0.5)), optax.sgd(0.1))
    params = {"w": jnp.ones(2)}
    _, state = wrong.update({"w": jnp.ones(2)}, wrong.init(params), params)
    with pytest.warns(ema_optax.OrderWarning, match="Chain it last"):
        found = shadow_params(state)["w"]
    np.testing.assert_allclose(found, 1.5)  # params + gradients


def test_float64_params_keep_a_float64_shadow():
    """Under x64 the shadow and its weights are float64: exact to 1e-14."""
    with enable_x64(True):
        transform = ema_optax.ema_params(ema_optax.constant(0.99999))
        params = {"w": jnp.zeros(1, jnp.float64)}
        state = transform.init(params)
        for _ in range(3):
            _, state = transform.update({"w": jnp.ones(1)}, state, params)
        assert state.shadow["w"].dtype == jnp.float64
        np.testing.assert_allclose(
            state.shadow["w"], 1 - 0.99999**3, rtol=1e-10, atol=0
        )


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"every": 3, "rounding": "stochastic"},
        {"shadow_dtype": "bfloat16", "pack_small": True},
    ],
)
def test_strict_promotion_gives_the_same_bits(options):
    """jax_numpy_dtype_promotion="strict" refuses what is promoted without being said.

    Folds for two powers and BEMA, their reading, metrics and a reconstruction.
    """
    params = {
        name: jnp.asarray([[1.0, -2.0, 3.0]], dtype)
        for name, dtype in [
            ("half", jnp.float16),
            ("brain", jnp.bfloat16),
            ("single", jnp.float32),
            ("complex", jnp.complex64),
        ]
    }
    powers = {str(w): ema_optax.power(w) for w in (0.05, 0.1)}
    averages = [
        ema_optax.ema_params(powers, **options),
        ema_optax.bema_params(),
        ema_optax.ema_params(0.9, every=2, overwrite_every=2),
    ]

    @jax.jit
    def step(states, p):
        changes = jax.tree.map(lambda x: x * jnp.asarray(-0.1, x.dtype), p)
        new = [a.update(changes, s, p) for a, s in zip(averages, states, strict=True)]
        return [state for _, state in new], optax.apply_updates(p, new[-1][0])

    @jax.jit
    def read(states, p):
        shadows = [shadow_params(states[0], p, name=name) for name in powers]
        shadows += [shadow_params(state, p) for state in states[1:]]
        return shadows, ema_optax.metrics(states[0], p, name="0.05")

    def run():
        states, p, snapshots = [a.init(params) for a in averages], params, []
        for t in range(1, 7):
            states, p = step(states, p)
            snapshots += [
                Snapshot(t, powers[name].exponent, shadow_params(states[0], name=name))
                for name in powers
            ]
        tree = reconstruct(snapshots, width=0.08, params=p).tree
        return states, read(states, p), tree

    expected = jax.tree.leaves(run())
    with jax.numpy_dtype_promotion("strict"):
        actual = jax.tree.leaves(run())
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_warns():
    """A whole small run is silent: dtype truncation and donation warnings are bugs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = _sgd_ema(shadow_dtype="bfloat16", every=2)
        params = {"w": np.ones(3), "scale": 1.0}
        state = optimizer.init(params)
        step = jax.jit(_train_step(optimizer), donate_argnums=1)
        params, state = step(params, state, {"w": np.ones(3), "scale": 1.0})
        shadow_params(state, params)
