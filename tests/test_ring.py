"""ring(k): the mean of the last k params, its slots, what it costs, and checkpoints."""

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import RingState, checkpoint, placement, ring, shadow_params
from tests.older import enable_x64
from tests.reference import relative_rms
from tests.runs import drifting
from tests.same import assert_same

BOUND = 2e-7  # of the mean; a copy one fold too old changes at least 1e-2 of it


def run(transform, path):
    """Yields the state and the params the model holds after each update, jitted."""
    step = jax.jit(transform.update)
    params = {"w": path[0]}
    state = transform.init(params)
    for target in path[1:]:
        updates = {"w": (target - params["w"]).astype(params["w"].dtype)}
        _, state = step(updates, state, params)
        params = optax.apply_updates(params, updates)
        yield state, params


def last(held, k):
    """Returns the float64 mean of the last k."""
    return np.mean([np.asarray(p["w"], np.float64) for p in held[-k:]], axis=0)


@pytest.fixture(scope="module")
def path():
    return jnp.asarray(drifting(14, 16), jnp.float32)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_the_mean_of_the_last_k_folds_at_every_update(path, k, every):
    """Of those there are; before the first fold the params at init, to the last bit."""
    kept = []
    for t, (state, params) in enumerate(run(ring(k, every=every), path), start=1):
        if t % every == 0:
            kept.append(params)
        shadow = shadow_params(state, params)["w"]
        assert int(state.count) == t
        if not kept:
            np.testing.assert_array_equal(shadow, path[0])
            continue
        assert relative_rms(shadow, last(kept, k)) <= BOUND
        for wrong in (k + 1, k - 1):
            if 0 < wrong < len(kept) and len(kept) >= k:
                assert relative_rms(last(kept, wrong), last(kept, k)) > 100 * BOUND
        np.testing.assert_array_equal(
            state.slots["w"][(len(kept) - 1) % k], kept[-1]["w"]
        )
    assert state.slots["w"].shape == (k, 16)


def test_an_update_that_does_not_fold_changes_no_slot(path):
    """And each fold changes one, the oldest."""
    before, changed = None, []
    for state, _ in run(ring(3, every=2), path):
        if before is not None:
            differ = np.any(np.asarray(before != state.slots["w"]), axis=1)
            changed.append(np.flatnonzero(differ).tolist())
        before = state.slots["w"]
    assert changed[:7] == [[0], [], [1], [], [2], [], [0]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_slots_are_copies_in_the_dtype_of_the_params(path, dtype):
    """The mean is computed wider, and rounded once where it is read into a slot."""
    moves = path * (1 + 1j) if dtype == "complex64" else path
    held = []
    for state, params in run(ring(4), moves.astype(dtype)):
        held.append(params)
        wide = shadow_params(state)["w"]
        assert state.slots["w"].dtype == dtype
        assert wide.dtype == np.promote_types(dtype, np.float32)
        copies = np.asarray([p["w"] for p in held[-4:]]).astype(np.complex128)
        np.testing.assert_allclose(wide, copies.mean(axis=0), rtol=3e-7)
        assert shadow_params(state, params)["w"].dtype == dtype


@pytest.mark.long
def test_float64_stays():
    """Copies and mean."""
    with enable_x64(True):
        path = jnp.asarray(drifting(9, 4), jnp.float64)
        held = []
        for state, params in run(ring(3), path):
            held.append(params)
            dtype = state.slots["w"].dtype
        shadow = shadow_params(state, params)["w"]
        assert shadow.dtype == dtype == jnp.float64
        np.testing.assert_allclose(shadow, last(held, 3), rtol=1e-15)


def test_equal_copies_are_their_own_mean():
    """To the last bit, for any k: a sum over k and a division would round."""
    value = jnp.asarray([0.1, 1 / 3, 3e38, 1e-30, -7.7], jnp.float32)
    for k in (3, 7, 49):
        transform = ring(k)
        state = transform.init({"w": value})
        state = state._replace(count=jnp.int32(k))
        np.testing.assert_array_equal(shadow_params(state)["w"], value)


@pytest.mark.long
def test_what_is_not_finite_takes_the_copy_before():
    """One that never was finite is left out of the mean, and not all of it is NaN."""
    path = jnp.asarray(
        [[1, jnp.nan, jnp.nan], [2, 3, jnp.nan], [jnp.inf, 5, jnp.nan], [4, 7, jnp.nan]]
    )
    transform = ring(3)
    state = transform.init({"w": path[0]})
    for params in path[1:]:
        zero = {"w": jnp.zeros(3)}
        _, state = transform.update(zero, state, {"w": params})
    np.testing.assert_array_equal(state.slots["w"][:, 0], [2, 2, 4])
    np.testing.assert_allclose(shadow_params(state)["w"], [8 / 3, 5, np.nan], rtol=1e-6)
    # Of a copy at init that is no number, beside a finite one.
    _, state = transform.update(
        {"w": jnp.zeros(1)},
        ring(3).init({"w": jnp.asarray([jnp.nan])}),
        {"w": jnp.asarray([jnp.nan])},
    )
    _, state = transform.update({"w": jnp.zeros(1)}, state, {"w": jnp.asarray([5.0])})
    np.testing.assert_array_equal(shadow_params(state)["w"], [5])


def test_only_numbers_that_the_mask_has_are_kept():
    """Others have no slots, and reading fills them from the params."""
    params = {
        "w": jnp.ones(2),
        "frozen": jnp.ones(3),
        "n": jnp.int32(7),
        "key": jax.random.key(0),
        "none": None,
        "scale": 2.0,
    }
    mask = {**dict.fromkeys(params, True), "frozen": False, "none": None}
    state = ring(4, mask=mask).init(params)
    shapes = {key: getattr(x, "shape", None) for key, x in state.slots.items()}
    assert shapes == {
        **dict.fromkeys(params), "w": (4, 2), "scale": (4,),
    }  # fmt: skip
    read = shadow_params(state, params)
    assert read["frozen"].shape == (3,)
    assert (int(read["n"]), float(read["scale"])) == (7, 2.0)


@pytest.mark.long
def test_stacked_states_are_read_alike():
    """Of members under vmap each is the mean of its own."""
    members = jnp.asarray(drifting(3, 4))[:, None] * jnp.arange(1.0, 4)[:, None]
    transform = ring(2)
    states = jax.vmap(transform.init)({"w": members[0]})
    for params in members[1:]:
        zero = {"w": jnp.zeros((3, 4))}
        _, states = jax.vmap(transform.update)(zero, states, {"w": params})
    assert states.slots["w"].shape == (3, 2, 4)
    shadow = shadow_params(states, {"w": members[-1]})["w"]
    np.testing.assert_allclose(shadow, members[-2:].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("every", [1, 4])
def test_no_update_copies_the_ring(every):
    """Compiled, and donated: an update of 64 slots reads and writes one or none.

    All slots are 64 times a param; a copy of them would be 128 times its bytes. In
    float32: XLA's CPU rewrites a whole bfloat16 buffer to set one row of it.
    """
    optimizer = optax.chain(optax.sgd(0.1), ring(64, every=every))
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    state = optimizer.init(params)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    bytes_ = sum(x.nbytes for x in params.values())
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * bytes_
    assert memory.alias_size_in_bytes >= 65 * bytes_
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert cost["bytes accessed"] <= 16 * bytes_
    lines = compiled.as_text().splitlines()
    assert not [
        x for x in lines if "[64,64,64]" in x.partition("copy(")[0] and "copy(" in x
    ]


def test_one_program_for_all_steps_without_a_sync(path):
    """Shapes, dtypes and structure stay, and nothing is asked of the device."""
    transform = ring(3, every=2)
    step = jax.jit(lambda u, s, p: transform.update(u, s, p)[1])
    params = {"w": path[0]}
    state = transform.init(params)
    with jax.transfer_guard_device_to_host("disallow"):
        for _ in range(7):
            state = step(params, state, params)
    assert step._cache_size() == 1
    fresh = transform.init(params)
    assert_same(
        jax.tree.map(jnp.zeros_like, state), jax.tree.map(jnp.zeros_like, fresh)
    )
    again = jax.jit(transform.init)(params)
    assert_same(again, transform.init(params))


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 3])
def test_slots_in_the_memory_of_the_host(path, every):
    """Where JAX has one: the same numbers; an abstract init knows where, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = ring(3, every=every, shadow_sharding=placement.in_host_memory())
        runs = zip(run(there, path), run(ring(3, every=every), path), strict=True)
        for (state, params), (plain, _) in runs:
            np.testing.assert_array_equal(state.slots["w"], plain.slots["w"])
            assert_same(shadow_params(state, params), shadow_params(plain, params))
            assert state.slots["w"].sharding == there.init(params).slots["w"].sharding
    assert shadow_params(state, params)["w"].sharding.memory_kind != "pinned_host"


def test_it_survives_what_states_go_through():
    """Copies, pickles and maps are read like the state itself."""
    params = {"w": jnp.arange(2.0)}
    transform = ring(2, every=3)
    state = transform.init(params)
    for other in (
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        jax.tree.map(jnp.copy, state),
        transform.update(params, state, params)[1],
    ):
        assert jax.tree.structure(other) == jax.tree.structure(state)
        np.testing.assert_array_equal(shadow_params(other)["w"], params["w"])
    assert repr(state).startswith("RingState(count=")


def test_init_shares_no_buffer():
    """A step may donate params and state together."""
    params = {"w": jnp.ones(3)}
    state = ring(1).init(params)
    assert (
        state.slots["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()
    )


def test_figures():
    """Those that are known of a mean: no decay, and no dead zone."""
    transform = ring(2)
    state = transform.init({"w": jnp.asarray([3.0, 4.0])})
    figures = ema_optax.metrics(state, {"w": jnp.asarray([3.0, 9.0])})
    assert figures.keys() == {"distance", "nonfinite_params", "nonfinite_shadow"}
    assert figures["distance"] == 1


def test_with_shadow_and_a_second_average():
    """Two averages where one was meant are refused; one with a name is read by it."""
    params = {"w": jnp.ones(2)}
    both = optax.chain(ema_optax.ema_params(0.9), ring(2))
    state = both.init(params)
    with pytest.raises(ValueError, match=r"'0' and '1 \(ring\)'.*a name: ema_params"):
        shadow_params(state, params)
    named = optax.chain(ema_optax.ema_params({"ema": 0.9}), ring(2)).init(params)
    with pytest.raises(ValueError, match="the shadows 'shadow', 'ema', and none was"):
        shadow_params(named, params)
    read = ema_optax.with_shadow({"params": params, "opt_state": named[1]})
    np.testing.assert_array_equal(read["params"]["w"], 1)
    with pytest.raises(ValueError, match=r"at '1 \(ring\)' is computed.*slots=…"):
        ema_optax.started_from(
            optax.chain(optax.sgd(0.1), ring(2)).init(params), params, count=3
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, p: ring(0), ValueError, "k must be .*≥ 1, got 0.*newest copy alone"),
        (lambda s, p: ring(2.0), ValueError, r"k must be .* got 2\.0"),
        (lambda s, p: ring(True), ValueError, "k must be .* got True"),
        (lambda s, p: ring(2, every=0), ValueError, "every must be .* got 0"),
        (lambda s, p: ring(2, mask={"v": True}).init(p), ValueError, "mask does not"),
        (lambda s, p: ring(2).update(p, s), ValueError, "ring averages .*without them"),
        (lambda s, p: ring(2).update(p, (), p), TypeError, "The state of ring is what"),
        (lambda s, p: ring(2).update(p, s, {"v": p["w"]}), ValueError, "only in the"),
        (lambda s, p: ring(2).update({}, s, p), ValueError, "do not fit each other"),
        (
            lambda s, p: ring(3).update(p, s, p),
            ValueError,
            "of 2 slots.*ring.3.* has 3",
        ),
        (lambda s, p: shadow_params(s, {"w": jnp.ones(3)}), ValueError, r"\[3\]"),
        (lambda s, p: shadow_params(s._replace(made_by=None)), ValueError, "made by h"),
        (
            lambda s, p: ring(2, shadow_sharding="data").init(p),
            TypeError,
            "which is no sharding",
        ),
        (
            lambda s, p: optax.inject_hyperparams(ring)(k=3).init(p),
            TypeError,
            r"k must be a Python integer.*static_args=\('k', 'every'\)",
        ),
    ],
)
def test_errors_say_what_was_wrong(call, error, message):
    """With the value and the call that works."""
    params = {"w": jnp.ones(2)}
    with pytest.raises(error, match=message):
        call(ring(2).init(params), params)


# Checkpoints.


def chain(average):
    return optax.chain(optax.adam(0.1), average)


OPTIMIZER = chain(ring(3, every=2))


def make_params():
    return {
        "encoder": {"w": jnp.arange(12.0).reshape(4, 3), "empty": jnp.zeros((0, 2))},
        "layers": [jnp.ones(2), (jnp.arange(3, dtype=jnp.bfloat16), None)],
    }


@jax.jit
def train(params, state):
    grads = jax.tree.map(jnp.sin, params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def runs():
    """A run after each of its updates, from none to 12."""
    params = make_params()
    found = [(params, OPTIMIZER.init(params))]
    for _ in range(12):
        found.append(train(*found[-1]))
    return found


@pytest.fixture(scope="module")
def saved(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(folder, *runs[7], step=7)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("at", [0, 1, 2, 5, 6, 7])
def test_a_resumed_run_repeats_the_bits(runs, tmp_path, at):
    """Saved and resumed at any step, it goes on as if it had not stopped."""
    checkpoint.save(tmp_path, *runs[at], step=at)
    blank = jax.eval_shape(OPTIMIZER.init, make_params())
    again = tuple(checkpoint.resume(tmp_path, make_params(), blank))
    for expected in runs[at:]:
        assert_same(again, expected)
        again = train(*again)


def test_a_checkpoint_holds_what_is_read(runs, saved):
    """The tree "shadow" is shadow_params bit for bit; the slots are in the state."""
    params, state = runs[7]
    shadow = shadow_params(state, params)
    assert_same(checkpoint.restore(saved, "shadow", like=make_params()), shadow)
    assert checkpoint.restore(saved)["layers"]["1"]["0"].dtype == jnp.float32
    found = checkpoint.describe(saved)
    tree = found.trees["shadow"]
    assert (tree.decay, tree.every, tree.count) == (None, 2, 7)
    leaves = {"encoder/w", "layers/0", "layers/1/0"}
    assert set(tree.leaves) == leaves
    assert found.state.leaves["1/slots/layers/1/0"].dtype == "bfloat16"
    ours = {path for path in found.state.leaves if path.startswith("1/")}
    assert ours == {"1/count", *(f"1/slots/{x}" for x in leaves)}
    checkpoint.verify(saved)


def test_inspect_names_the_ring(saved, capsys):
    """In the place of a decay."""
    from ema_optax import _cli as cli

    assert cli.main(["inspect", str(saved)]) == 0
    assert "ring(k=3, every=2)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("average", "message"),
    [
        (
            ring(4, every=2),
            r"of ring\(k=3, every=2\).*has ring\(k=4, every=2\)\. Chain",
        ),
        (
            ring(3),
            r"of ring\(k=3, every=2\).*has ring\(k=3, every=1\)\. Pass accept_new",
        ),
        (ema_optax.ema_params(0.9), r"of ring\(k=3, every=2\).*has no ring"),
        (ema_optax.bema_params(), r"of ring\(k=3, every=2\).*has bema_params\(every"),
        (optax.identity(), r"of ring\(k=3, every=2\).*has no ring"),
    ],
    ids=["another k", "another every", "ema_params", "bema_params", "no average"],
)
def test_resuming_with_another_average_is_refused(saved, average, message):
    """The error names that of the checkpoint and that of the chain."""
    with pytest.raises(ValueError, match=message):
        checkpoint.resume(saved, make_params(), chain(average).init(make_params()))


def test_what_can_go_on_is_accepted(runs, saved):
    """Another `every` keeps the slots; another k or kind has no place for them."""
    blank = chain(ring(3)).init(make_params())
    _, state = checkpoint.resume(saved, make_params(), blank, accept_new_decay=True)
    assert_same(state[1].slots, runs[7][1][1].slots)
    for other in (ring(4, every=2), ema_optax.bema_params()):
        with pytest.raises(ValueError, match="Cannot resume: the checkpoint's shadow"):
            checkpoint.resume(
                saved,
                make_params(),
                chain(other).init(make_params()),
                accept_new_decay=True,
            )


@pytest.mark.long
def test_a_changed_run_takes_what_fits(runs, saved):
    """The ring of the params that stay goes on; that of a new one starts as it."""
    more = {**make_params(), "head": jnp.full(2, 7.0)}
    for given in (OPTIMIZER.init, OPTIMIZER.init(more)):
        back = checkpoint.resume(saved, more, given, missing="start")
        slots = back.opt_state[1].slots
        assert_same(slots["encoder"], runs[7][1][1].slots["encoder"])
        np.testing.assert_array_equal(slots["head"], np.full((3, 2), 7.0))
        assert int(back.opt_state[1].count) == 7
    longer = chain(ring(5, every=2))
    for given in (longer.init, longer.init(make_params())):
        back = checkpoint.resume(saved, make_params(), given, missing="start")
        assert int(back.opt_state[1].count) == 0
        assert_same(shadow_params(back.opt_state, back.params), runs[7][0])
        assert any("slots" in slot for slot in back.changes.started)


def test_a_manager_of_orbax_saves_it_in_the_background(runs, tmp_path):
    """With EmaSave, EmaRestore and EmaResume; donating right after changes nothing."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        params, state = jax.tree.map(jnp.copy, runs[7])
        manager.save(7, args=checkpoint.EmaSave(params, state))
        jax.jit(OPTIMIZER.update, donate_argnums=(1,))(params, state, params)
        manager.wait_until_finished()
        found = manager.restore(7, args=checkpoint.EmaResume(*runs[0]))
        assert_same(tuple(found), runs[7])
        shadow = manager.restore(7, args=checkpoint.EmaRestore(like=make_params()))
    assert_same(shadow, shadow_params(runs[7][1], runs[7][0]))


@pytest.mark.long
def test_beside_a_named_average(tmp_path):
    """Both are saved, each under its name, and both are resumed."""
    optimizer = chain(optax.chain(ema_optax.ema_params({"ema": 0.9}), ring(2)))
    params = make_params()
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    checkpoint.save(tmp_path, params, state)
    mean = shadow_params(state[1][1], params)
    assert_same(checkpoint.restore(tmp_path, "shadow", like=params), mean)
    blank = optimizer.init(make_params())
    assert_same(checkpoint.resume(tmp_path, params, blank), (params, state))


def test_joined_with_another_average(tmp_path):
    """A ring of one part and BEMA of another: one shadow, with both in the manifest."""
    kinds = {"ring": ring(2), "bema": ema_optax.bema_params(every=1)}
    optimizer = optax.chain(
        optax.sgd(0.1), optax.partition(kinds, {"a": "ring", "b": "bema"})
    )
    params = {"a": jnp.arange(2.0), "b": jnp.ones(3)}
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    params = optax.apply_updates(params, updates)
    checkpoint.save(tmp_path, params, state)
    assert_same(checkpoint.restore(tmp_path, like=params), shadow_params(state, params))
    assert_same(
        checkpoint.resume(tmp_path, params, optimizer.init(params)), (params, state)
    )


def test_a_state_is_a_plain_tuple():
    """Its leaves are the count and the slots."""
    state = ring(2).init({"w": jnp.ones(3)})
    assert isinstance(state, RingState)
    assert [x.shape for x in jax.tree.leaves(state)] == [(), (2, 3)]
