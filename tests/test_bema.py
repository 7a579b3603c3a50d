"""BEMA: numbers against float64, states, what is read and when, and checkpoints."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import ema_optax
from ema_optax import bema_params, checkpoint, shadow_params
from tests.reference import relative_rms
from tests.runs import drifting, follow
from tests.same import assert_same

BOUND = 2e-6  # a count that is one off in a or in b changes at least twice as much


def reference(
    held, start, every, *, ema_power=0.5, bias_power=0.2, lag=10, multiplier=1.0,
    min_newest_weight=0.0, off_in_b=0, off_in_a=0,
):  # fmt: skip
    """TRL's callback in float64: returns s, and s + a·(p − p₀) after the last update.

    `off_in_b` and `off_in_a` are added to the count t, to see what mistakes change.
    """
    anchor = np.asarray(start, np.float64)
    average = anchor.copy()
    for t, params in enumerate(np.asarray(held, np.float64), start=1):
        if t % every == 0:
            b = (lag + multiplier * (t + off_in_b)) ** (-ema_power)
            b = max(b, min_newest_weight)
            average = (1 - b) * average + b * params
    a = (lag + multiplier * (len(held) + off_in_a)) ** (-bias_power)
    return average, average + a * (np.asarray(held[-1], np.float64) - anchor)


@pytest.fixture(scope="module")
def path():
    return drifting(2403, 64)


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (2002, {"every": 7}),
        (2003, {"every": 7}),  # read one update after a fold
        (2400, {"every": 400}),
        (2403, {}),
        (2000, {"every": 1, "ema_power": 0.7, "bias_power": 0.4, "lag": 3}),
        (2001, {"every": 7, "multiplier": 0.3, "lag": 0.5, "ema_power": 0.9}),
        # (10 + t)^−.5 reaches .0235 at t = 1801: the bound is in force after that.
        (2002, {"every": 7, "min_newest_weight": 0.0235}),
    ],
)
def test_exact_over_2000_noisy_steps(path, steps, options):
    """Average and what is read are TRL's; the likely mistakes lie outside the bound."""
    state, held = follow(bema_params(**options), path[: steps + 1])
    options = {"every": 400, **options}
    average, read = reference(held, path[0], **options)
    shadow = shadow_params(state, {"w": jnp.asarray(held[-1])})["w"]
    assert int(state.count) == steps
    np.testing.assert_array_equal(state.anchor["w"], path[0])
    assert relative_rms(state.average["w"], average) <= BOUND
    assert relative_rms(shadow, read) <= BOUND
    before = np.concatenate([path[:1], held[:-1]])
    mistakes = [
        average,
        reference(before, path[0], **options)[1],
        *(reference(held, path[0], off_in_a=d, **options)[1] for d in (-1, 1)),
        *(reference(held, path[0], off_in_b=d, **options)[1] for d in (-1, 1)),
    ]
    if "min_newest_weight" in options:
        unbounded = {**options, "min_newest_weight": 0.0}
        mistakes.append(reference(held, path[0], **unbounded)[1])
    for mistake in mistakes:
        assert relative_rms(mistake, read) > 2 * BOUND


def test_powers_of_zero(path):
    """κ = 0: s is the params of the last fold. η = 0: the whole way is added."""
    transform = bema_params(every=3, ema_power=0.0, bias_power=0.0)
    state, held = follow(transform, path[:12])
    np.testing.assert_array_equal(state.average["w"], held[8])
    read = shadow_params(state, {"w": jnp.asarray(held[-1])})["w"]
    np.testing.assert_allclose(read, held[8] + held[10] - path[0], rtol=0, atol=1e-6)


@pytest.mark.long
def test_bfloat16_params(path):
    """The average is float32 and exact; what is read is rounded once, to bfloat16."""
    start = jnp.asarray(path[:2001], jnp.bfloat16)
    state, held = follow(bema_params(every=7), start)
    live = jnp.asarray(held, jnp.bfloat16)  # XLA fuses the rounding of `held` away
    average, read = reference(live.astype(jnp.float32), start[0], 7)
    assert state.average["w"].dtype == jnp.float32
    assert state.anchor["w"].dtype == jnp.bfloat16
    assert relative_rms(state.average["w"], average) <= BOUND
    shadow = shadow_params(state, {"w": live[-1]})["w"]
    assert shadow.dtype == jnp.bfloat16
    # Of a sum in bfloat16 most elements would differ; here those next to a tie may.
    exact = jnp.asarray(read.astype(np.float32), jnp.bfloat16)
    assert np.mean(np.asarray(shadow == exact)) > 0.98


def test_it_folds_what_the_model_holds_after_the_update():
    """bfloat16 params: the rounded sum is averaged, not the exact one."""
    params = {"w": jnp.asarray([1.0], jnp.bfloat16)}
    transform = bema_params(every=1)
    updates = {"w": jnp.asarray([1e-3], jnp.bfloat16)}  # lost: 1 + 1e-3 rounds to 1
    out, state = transform.update(updates, transform.init(params), params)
    assert state.average["w"][0] == 1.0
    assert out["w"] is updates["w"]


def test_a_bfloat16_average(path):
    """shadow_dtype is as in ema_params: rounded by chance, right on average."""
    state, held = follow(bema_params(every=7, shadow_dtype="bfloat16"), path[:2003])
    average, _ = reference(held, path[0], 7)
    assert state.average["w"].dtype == jnp.bfloat16
    assert state.anchor["w"].dtype == jnp.float32
    assert relative_rms(state.average["w"], average) < 2e-2


def test_complex_params():
    """Real and imaginary parts are averaged and corrected alike."""
    params = {"w": jnp.asarray([1 + 2j], jnp.complex64)}
    transform = bema_params(every=1, lag=3)  # b = 1/2, a = 4^−.2 at t = 1
    updates = {"w": jnp.asarray([-1 + 1j], jnp.complex64)}
    _, state = transform.update(updates, transform.init(params), params)
    np.testing.assert_allclose(state.average["w"], [0.5 + 2.5j], rtol=1e-6)
    read = shadow_params(state, {"w": jnp.asarray([0 + 3j], jnp.complex64)})["w"]
    expected = 0.5 + 2.5j + 4**-0.2 * (-1 + 1j)
    np.testing.assert_allclose(read, [expected], rtol=1e-6)


def test_leaves_that_are_not_averaged():
    """Integers, bools, keys, None and masked leaves: placeholders, read from params."""
    params = {
        "w": jnp.arange(4.0),
        "b": jnp.ones(2, jnp.bfloat16),
        "steps": jnp.int32(7),
        "on": jnp.array(True),
        "key": jax.random.key(3),
        "none": None,
    }
    placeholder = optax.MaskedNode()

    def all_but_b(tree):
        return {name: tree[name] is not None and name != "b" for name in tree}

    transform = bema_params(every=1, mask=all_but_b)
    state = transform.init(params)
    updates = {**params, "key": None, "w": jnp.ones(4)}
    _, state = transform.update(updates, state, params)
    for tree in (state.average, state.anchor):
        left_out = sorted(name for name in tree if tree[name] == placeholder)
        assert left_out == ["b", "key", "on", "steps"]
        assert tree["none"] is None
    new = {**params, "w": params["w"] + 1}
    read = shadow_params(state, new)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, params)
    b, a = 11**-0.5, 11**-0.2
    np.testing.assert_allclose(read["w"], params["w"] + b + a, rtol=1e-6)
    assert read["steps"] == 7
    assert read["key"] == params["key"]


@pytest.mark.parametrize(
    "init",
    [lambda f: f, jax.jit],
    ids=["eager", "jit"],
)
def test_params_average_and_anchor_share_no_buffer(init):
    """A step that donates params and state runs, and the first params are kept."""
    optimizer = optax.chain(optax.sgd(0.5), bema_params(every=2))
    params = {"w": jnp.arange(4.0), "b": jnp.ones(2, jnp.bfloat16)}
    first = jax.tree.map(np.array, params)
    state = init(optimizer.init)(params)
    leaves = jax.tree.leaves((params, state[1].average, state[1].anchor))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        before = shadow_params(state, params)
        params, state = step(params, state)
        assert np.isfinite(before["w"]).all()  # what was read outlives the donation
    jax.tree.map(np.testing.assert_array_equal, state[1].anchor, first)


def test_one_trace_and_a_stable_state():
    """Structure, shapes, dtypes and weak types stay, from init on; one trace."""
    params = {"w": jnp.ones(8, jnp.bfloat16), "x": 1.0, "y": jnp.asarray(2.0), "n": 3}
    transform = bema_params(every=3)
    traces = []

    def step(updates, state, params):
        traces.append(1)
        return transform.update(updates, state, params, value=0.0)

    update = jax.jit(step)
    state = first = transform.init(params)
    for _ in range(5):
        _, state = update({**params, "n": 0}, state, params)
    assert len(traces) == 1
    described = [
        jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), s)
        for s in (first, state)
    ]
    assert described[0] == described[1]
    assert jax.tree.structure(first) == jax.tree.structure(state)


def test_updates_that_do_not_fold_copy_no_tree():
    """The compiled step needs no temporary tree, and moves two trees more than Adam."""
    params = {f"w{i}": jnp.ones((256, 256)) for i in range(4)}
    size = sum(leaf.nbytes for leaf in params.values())

    def compiled(optimizer):
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        return step.lower(params, optimizer.init(params), params).compile()

    adam = optax.adam(1e-3)
    alone, both = compiled(adam), compiled(optax.chain(adam, bema_params(every=10)))
    extra = both.cost_analysis()["bytes accessed"]
    extra -= alone.cost_analysis()["bytes accessed"]
    assert extra / size < 3.05
    temporary = both.memory_analysis().temp_size_in_bytes
    assert temporary - alone.memory_analysis().temp_size_in_bytes < 0.05 * size


def test_multi_steps_counts_real_updates():
    """Inside MultiSteps t is the number of real updates, in folds and in reading."""
    inner = optax.chain(optax.sgd(1.0), bema_params(every=2, lag=2))
    optimizer = optax.MultiSteps(inner, 3)
    params = {"w": jnp.zeros(2)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(9):
        updates, state = update({"w": -jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
    # Params 1, 2, 3 after three real updates; folded at t = 2 with b = 4^−.5.
    expected = 0.5 * 2 + 5**-0.2 * 3
    np.testing.assert_allclose(shadow_params(state, params)["w"], expected, rtol=1e-6)


@pytest.mark.long
def test_reading_under_jit_vmap_and_eval_shape():
    """Found in any state; stacked states are read with a count each."""
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    transform = optax.chain(optax.sgd(-1.0), bema_params(every=1))
    states = jax.vmap(transform.init)(params)
    updates, states = jax.vmap(transform.update)(params, states, params)
    states = (states[0], states[1]._replace(count=jnp.arange(3)))
    new = optax.apply_updates(params, updates)
    stacked = shadow_params(states, new)["w"]
    each = jax.vmap(shadow_params)(states, new)["w"]
    np.testing.assert_allclose(stacked, each, rtol=1e-6)
    for t in range(3):
        p = np.asarray(params["w"][t])
        expected = p + 11**-0.5 * p + (10 + t) ** -0.2 * p
        np.testing.assert_allclose(stacked[t], expected, rtol=1e-6)
    shapes = jax.eval_shape(shadow_params, states, new)
    assert shapes["w"] == jax.ShapeDtypeStruct((3, 2), jnp.float32)
    trained = {"params": new, "opt_state": states}
    evaluated = ema_optax.with_shadow(trained)
    np.testing.assert_array_equal(evaluated["params"]["w"], stacked)


def test_what_is_not_finite_poisons_nothing():
    """It is not folded; where p, p₀ or the sum is not finite, s alone is read."""
    start = jnp.asarray([0.0, jnp.nan, 1.0, 1.0, -6e4], jnp.float16)
    transform = bema_params(every=1, lag=3)  # b = 1/2, a = 4^−.2 = .758 at t = 1
    params = {"w": start}
    updates = {"w": jnp.asarray([1, 0, jnp.inf, jnp.nan, 1.2e5], jnp.float32)}
    updates["w"] = updates["w"].at[1].set(jnp.nan)
    _, state = transform.update(updates, transform.init(params), params)
    live = {"w": jnp.asarray([1.0, 2.0, jnp.inf, jnp.nan, 6e4], jnp.float16)}
    np.testing.assert_array_equal(state.average["w"][jnp.array([0, 2, 3])], [0.5, 1, 1])
    _, state = bema_params(every=1, lag=3).update(
        {"w": jnp.zeros(5)}, state._replace(count=state.count * 0), live
    )
    # The second takes p where it started as NaN; the last would be 9.1e4 > 65504.
    read = shadow_params(state, live)["w"]
    assert np.isfinite(np.asarray(read, np.float32)).all()
    np.testing.assert_allclose(
        read[:4].astype(jnp.float32), [0.75 + 4**-0.2, 2, 1, 1], rtol=1e-3
    )
    assert read[4] == state.average["w"][4].astype(jnp.float16)


def test_two_kinds_in_one_state():
    """Two averages where one was meant are refused, with what was found and a way."""
    params = {"w": jnp.ones(2)}

    def state(*transforms):
        return optax.chain(*transforms).init(params)

    ema, bema = ema_optax.ema_params(0.9), bema_params()
    named = ema_optax.ema_params({"ema": 0.9})
    both = r"several shadows.*'0' and '1 \(bema_params\)'.*a name: ema_params"
    for transforms in ((ema, bema), (bema, ema)):
        with pytest.raises(
            ValueError, match=r"several shadows.*bema_params\)'.*a name"
        ):
            shadow_params(state(*transforms), params)
    with pytest.raises(ValueError, match=both):
        shadow_params(state(ema, bema), params)
    with pytest.raises(ValueError, match=r"'0 \(bema_.*'1 \(bema_.*part of the state"):
        shadow_params(state(bema, bema), params)
    with pytest.raises(ValueError, match="the shadows 'shadow', 'ema', and none was"):
        shadow_params(state(named, bema), params)
    alone = shadow_params(state(named, bema), params, name="shadow")
    np.testing.assert_array_equal(
        alone["w"], shadow_params(bema.init(params), params)["w"]
    )
    read = shadow_params(state(named, bema), name="ema")
    np.testing.assert_array_equal(read["w"], 1.0)
    np.testing.assert_array_equal(shadow_params(state(named, bema)[1], params)["w"], 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, p: shadow_params(s), ValueError, r"live params.*opt_state, params"),
        (lambda s, p: shadow_params(s, {"v": p["w"]}), ValueError, "'w' is only in"),
        (lambda s, p: shadow_params(s, {"w": jnp.ones(3)}), ValueError, r"\[3\]"),
        (lambda s, p: shadow_params(s, p, name="x"), ValueError, "no tree 'x'"),
        (lambda s, p: bema_params().update(p, s), ValueError, r"bema_params.*without"),
        (
            lambda s, p: bema_params().update(p, s, {"v": p["w"]}),
            ValueError,
            "only in the shadow",
        ),
        (
            lambda s, p: shadow_params(s._replace(made_by=None), p),
            ValueError,
            "made by hand.*_replace",
        ),
        (lambda s, p: bema_params(every=0), ValueError, "every.*≥ 1, got 0"),
        (lambda s, p: bema_params(every=2.5), ValueError, "every.*got 2.5"),
        (lambda s, p: bema_params(every=True), ValueError, "every.*got True"),
        (lambda s, p: bema_params(lag=0), ValueError, "lag ρ > 0 updates.*got 0"),
        (lambda s, p: bema_params(lag=-1), ValueError, "lag.*got -1"),
        (lambda s, p: bema_params(lag=float("nan")), ValueError, "lag.*got nan"),
        (lambda s, p: bema_params(lag=float("inf")), ValueError, "lag.*got inf"),
        (lambda s, p: bema_params(lag="10"), TypeError, "lag.*number, got str"),
        (lambda s, p: bema_params(ema_power=-0.5), ValueError, "ema_power.*got -0.5"),
        (lambda s, p: bema_params(bias_power=-0.2), ValueError, "bias_power.*-0.2"),
        (lambda s, p: bema_params(bias_power=np.nan), ValueError, "bias_power.*nan"),
        (lambda s, p: bema_params(multiplier=-1), ValueError, "multiplier.*got -1"),
        (lambda s, p: bema_params(min_newest_weight=1.1), ValueError, "got 1.1"),
        (lambda s, p: bema_params(min_newest_weight=-0.1), ValueError, "got -0.1"),
        (
            lambda s, p: bema_params(lag=0.25, multiplier=0),
            ValueError,
            r"weight.*= 2, more than all.*lag ≥ 1",
        ),
        (lambda s, p: bema_params(shadow_dtype="int8"), ValueError, "shadow_dtype"),
        (
            lambda s, p: optax.inject_hyperparams(bema_params)(every=3).init(p),
            TypeError,
            r"every.*static_args=\('every', 'ema_power'",
        ),
        (
            lambda s, p: optax.inject_hyperparams(bema_params, static_args="every")(
                every=3, lag=3
            ).init(p),
            TypeError,
            r"got .*static_args=\('every', 'ema_power'",
        ),
    ],
)
def test_errors_say_what_was_wrong(call, error, message):
    """With the value and the call that works."""
    params = {"w": jnp.ones(2)}
    state = bema_params().init(params)
    with pytest.raises(error, match=message):
        call(state, params)


def test_the_arguments_survive_what_states_go_through():
    """Copies, pickles, maps and _replace can be read like the state itself."""
    params = {"w": jnp.arange(2.0)}
    transform = bema_params(every=2, bias_power=0.5, lag=3)
    state = transform.init(params)
    new = {"w": params["w"] + 1}
    for other in (
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        jax.tree.map(jnp.copy, state),
        jax.jit(transform.init)(params),
        bema_params(every=2, bias_power=0.5, lag=3).init(params),
        transform.update(jax.tree.map(jnp.zeros_like, params), state, params)[1],
    ):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        read = shadow_params(other._replace(count=jnp.int32(1)), new)
        np.testing.assert_allclose(read["w"], params["w"] + 0.5, rtol=1e-6)
    assert repr(state).startswith("BemaParamsState(count=")


# Checkpoints.


def make_optimizer(average=None, **options):
    average = average or bema_params(**{"every": 2, **options})
    return optax.chain(optax.adam(0.1), average, optax.identity())


@functools.cache
def compiled_step(optimizer):
    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def trained(optimizer, params, state, times):
    for _ in range(times):
        params, state = compiled_step(optimizer)(params, state)
    return params, state


OPTIMIZER = make_optimizer()


def make_params():
    return {
        "encoder": {"w": jnp.arange(12.0).reshape(4, 3), "empty": jnp.zeros((0, 2))},
        "layers": [jnp.ones(2), (jnp.arange(3, dtype=jnp.bfloat16), None)],
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with step 5 of a run, and the params and state saved there."""
    params = make_params()
    run = trained(OPTIMIZER, params, OPTIMIZER.init(params), 5)
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(folder, *run, step=5)
    return folder, run


def test_a_checkpoint_holds_what_is_read(saved):
    """The tree "shadow" is shadow_params bit for bit, and float32 without `like`."""
    folder, (params, state) = saved
    shadow = shadow_params(state, params)
    assert_same(checkpoint.restore(folder, "shadow", like=make_params()), shadow)
    assert_same(checkpoint.restore(folder, "params", like=make_params()), params)
    wide = checkpoint.restore(folder)["layers"]["1"]["0"]
    assert wide.dtype == jnp.float32
    assert not np.array_equal(wide, shadow["layers"][1][0].astype(jnp.float32))
    checkpoint.verify(folder)


def test_the_average_and_the_first_params_are_stored_once(saved):
    """In the state; described with every and count, and no decay."""
    folder, _ = saved
    found = checkpoint.describe(folder)
    shadow = found.trees["shadow"]
    assert (shadow.decay, shadow.every, shadow.count) == (None, 2, 5)
    leaves = ["encoder/w", "layers/0", "layers/1/0"]
    assert sorted(shadow.leaves) == leaves
    ours = sorted(path for path in found.state.leaves if path.startswith("1/"))
    assert ours == sorted(
        [
            "1/count",
            *(f"1/{tree}/{x}" for tree in ("anchor", "average") for x in leaves),
        ]
    )
    assert set(found.trees) == {"params", "shadow"}


def test_a_resumed_run_repeats_the_bits(saved):
    """5 updates, a save, a resume and 5 more are 10 updates."""
    folder, run = saved
    blank = jax.eval_shape(OPTIMIZER.init, make_params())
    resumed = checkpoint.resume(folder, make_params(), blank)
    assert_same(resumed, run)
    ten = trained(OPTIMIZER, make_params(), OPTIMIZER.init(make_params()), 10)
    again = trained(OPTIMIZER, *resumed, 5)
    assert_same(again, ten)
    assert_same(shadow_params(again[1], again[0]), shadow_params(ten[1], ten[0]))


def test_a_manager_saves_it_in_the_background(tmp_path):
    """Donating right after the save changes nothing of what was saved."""
    optimizer = make_optimizer()
    params = {"w": jnp.arange(1000.0)}
    state = optimizer.init(params)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    expected = {}
    with ocp.CheckpointManager(tmp_path) as manager:
        for number in range(3):
            expected[number] = np.array(shadow_params(state, params)["w"])
            manager.save(number, args=checkpoint.EmaSave(params, state))
            params, state = step(params, state)
        manager.wait_until_finished()
        args = checkpoint.EmaRestore("shadow", like=params)
        assert manager.restore(0, args=args)["w"][1] == 1
    for number, values in expected.items():
        restored = checkpoint.restore(tmp_path, like=params, step=number)
        np.testing.assert_array_equal(restored["w"], values)


@pytest.mark.parametrize(
    ("average", "message"),
    [
        (ema_optax.ema_params(0.9), r"of bema_params\(every=2.*has no bema_params"),
        (ema_optax.ema_params({"a": 0.9}), r"of bema_params\(every=2.*no bema_params"),
        (
            optax.identity(),
            r"of bema_params\(every=2.*no bema_params.*missing='start'",
        ),
        (
            bema_params(every=3),
            r"every=2, .*has bema_params\(every=3.*accept_new_decay",
        ),
        (bema_params(every=2, lag=9), r"lag=10\.0.*lag=9\.0.*accept_new_decay=True"),
    ],
    ids=[
        "ema_params",
        "named ema_params",
        "no average",
        "another every",
        "another lag",
    ],
)
def test_resuming_with_another_average_is_refused(saved, average, message):
    """The error names the average of the checkpoint and that of the chain."""
    folder, _ = saved
    blank = make_optimizer(average).init(make_params())
    with pytest.raises(ValueError, match=message):
        checkpoint.resume(folder, make_params(), blank)


def test_other_arguments_can_be_accepted(saved):
    """With accept_new_decay the average goes on under the new ones; kinds never mix."""
    folder, (_, state) = saved
    blank = make_optimizer(lag=9).init(make_params())
    accepted = checkpoint.resume(folder, make_params(), blank, accept_new_decay=True)
    assert_same(accepted[1][1].average, state[1].average)
    blank = make_optimizer(ema_optax.ema_params(0.9)).init(make_params())
    with pytest.raises(ValueError, match="has no bema_params"):
        checkpoint.resume(folder, make_params(), blank, accept_new_decay=True)


def test_a_run_with_ema_params_is_not_resumed_as_bema(tmp_path):
    """An EMA is no average to correct: refused, whatever was accepted."""
    optimizer = make_optimizer(ema_optax.ema_params(0.9))
    checkpoint.save(tmp_path, make_params(), optimizer.init(make_params()))
    blank = make_optimizer().init(make_params())
    for accept in (False, True):
        with pytest.raises(ValueError, match=r"of no bema_params, .*has bema_params\("):
            checkpoint.resume(tmp_path, make_params(), blank, accept_new_decay=accept)


def test_beside_a_named_average(tmp_path):
    """Both are saved, each under its name, and both are resumed."""
    averages = optax.chain(ema_optax.ema_params({"ema": 0.9}), bema_params(every=2))
    optimizer = make_optimizer(averages)
    params = make_params()
    params, state = trained(optimizer, params, optimizer.init(params), 3)
    checkpoint.save(tmp_path, params, state)
    ema = shadow_params(state, params, name="ema")
    bema = shadow_params(state[1][1], params)
    assert_same(checkpoint.restore(tmp_path, "shadow/ema", like=params), ema)
    assert_same(checkpoint.restore(tmp_path, "shadow", like=params), bema)
    blank = optimizer.init(make_params())
    assert_same(checkpoint.resume(tmp_path, params, blank), (params, state))
    message = r"has shadow, shadow/ema, .* has shadow\. .*shadow: bema_params\("
    with pytest.raises(ValueError, match=message):
        checkpoint.resume(tmp_path, params, make_optimizer().init(params))


def test_disjoint_parts_are_joined(tmp_path):
    """BEMA of one part and an EMA of another: one shadow, saved and resumed."""
    labels = {"a": "bema", "b": "ema"}
    kinds = {"bema": bema_params(every=2), "ema": ema_optax.ema_params(0.9)}
    optimizer = optax.chain(optax.sgd(0.1), optax.partition(kinds, labels))
    params = {"a": jnp.arange(2.0), "b": jnp.ones(3)}
    params, state = trained(optimizer, params, optimizer.init(params), 3)
    shadow = shadow_params(state, params)
    assert not np.array_equal(shadow["a"], params["a"])
    assert not np.array_equal(shadow["b"], params["b"])
    checkpoint.save(tmp_path, params, state)
    assert_same(checkpoint.restore(tmp_path, like=params), shadow)
    blank = optimizer.init(params)
    assert_same(checkpoint.resume(tmp_path, params, blank), (params, state))


def test_saving_with_other_params(tmp_path):
    """Params may have more leaves than the optimizer was given, and not fewer."""
    numbers = {"w": jnp.arange(3.0), "key": None}
    params = {"w": jnp.arange(3.0) + 1, "key": jax.random.key(0)}
    state = bema_params().init(numbers)
    checkpoint.save(tmp_path, params, state)
    restored = checkpoint.restore(tmp_path, like={"w": jnp.zeros(3)})
    np.testing.assert_allclose(restored["w"], numbers["w"] + 10**-0.2, rtol=1e-6)
    with pytest.raises(ValueError, match="does not sit in these params: it has 'w'"):
        checkpoint.save(tmp_path, {"v": params["w"]}, state, step=1)
