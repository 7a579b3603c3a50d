"""Checkpoints: every way in and out, the model's slots, resuming, and strangers."""

import subprocess
import sys
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1

import ema_optax
from ema_optax import checkpoint
from tests.same import assert_same


def make_params():
    """A model with what models have: nesting, bfloat16, integers, keys, odd names."""
    return {
        "encoder": {
            "kernel": jnp.arange(12.0).reshape(4, 3),
            "bias": jnp.arange(3, dtype=jnp.bfloat16),
        },
        "layers": [jnp.ones(2), (jnp.full(3, 2.0), None)],
        "mlp/~/linear_0": jnp.full(2, 3.0),
        "steps": jnp.int32(7),
        "key": jax.random.key(3),
        "empty": jnp.zeros((0, 2)),
    }


def update(optimizer, params, state, times=1):
    """Trains on gradients that differ from step to step; keys and integers stay."""
    numbers, rest = eqx.partition(params, lambda x: eqx.is_inexact_array(x))

    @jax.jit
    def step(numbers, state):
        count = state[1].count if hasattr(state[1], "count") else 0
        grads = jax.tree.map(lambda p: jnp.sin(p + count).astype(p.dtype), numbers)
        updates, state = optimizer.update(grads, state, numbers)
        return optax.apply_updates(numbers, updates), state

    for _ in range(times):
        numbers, state = step(numbers, state)
    return eqx.combine(numbers, rest), state


def make_optimizer(decay=0.9, **options):
    return optax.chain(
        optax.adam(0.1), ema_optax.ema_params(decay, **options), optax.identity()
    )


def numbers_of(params):
    return eqx.filter(params, eqx.is_inexact_array)


def trained(optimizer=None, times=5):
    optimizer = optimizer or make_optimizer()
    params = make_params()
    return update(optimizer, params, optimizer.init(numbers_of(params)), times)


@pytest.fixture(scope="module")
def run():
    """Params and state after five updates; nothing may change them."""
    return trained()


@pytest.fixture(scope="module")
def shadow(run):
    """The shadow as the whole model: what is not averaged comes from the params."""
    params, state = run
    averaged = ema_optax.shadow_params(state, numbers_of(params))
    return eqx.combine(averaged, params)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpoint.save(folder, *run, step=5, extra={"note": "five updates"})
    return folder


def test_functions_on_a_directory(run, shadow, saved):
    """Each tree comes back bit for bit in the model's slot, and the run as it was."""
    params, state = run
    assert_same(checkpoint.restore(saved, "params", like=make_params()), params)
    assert_same(checkpoint.restore(saved, like=make_params()), shadow)
    for step in (None, 5):  # the folder of the step itself
        restored = checkpoint.restore(saved / "5", like=make_params(), step=step)
        assert_same(restored, shadow)
    blank = make_optimizer().init(numbers_of(make_params()))
    assert_same(checkpoint.resume(saved, make_params(), blank), (params, state))


def test_with_a_manager_in_the_background(run, shadow, tmp_path):
    """Asynchronous saves, retention and best-of are the manager's own."""
    params, state = run
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda m: m["score"])
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step, score in enumerate([0.1, 0.9, 0.2, 0.8]):
            args = checkpoint.EmaSave(params, state)
            manager.save(step, args=args, metrics={"score": score})
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 3]
        assert manager.best_step() == 1
        like = make_params()
        restored = manager.restore(3, args=checkpoint.EmaRestore("shadow", like))
        assert_same(restored, shadow)
        again = manager.restore(1, args=checkpoint.EmaResume(params, state))
        assert_same(again, (params, state))
    assert_same(checkpoint.restore(tmp_path, like=like, step=1), shadow)


def test_donating_right_after_an_asynchronous_save(tmp_path):
    """The next donated step may overwrite the buffers: what was saved is as it was."""
    optimizer = make_optimizer()
    params = {"w": jnp.arange(300_000.0)}
    state = optimizer.init(params)

    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    expected = {}
    with ocp.CheckpointManager(tmp_path) as manager:
        for number in range(4):
            expected[number] = np.array(params["w"])
            manager.save(number, args=checkpoint.EmaSave(params, state))
            params, state = step(params, state)
        manager.wait_until_finished()
    for number, values in expected.items():
        restored = checkpoint.restore(tmp_path, "params", step=number)
        np.testing.assert_array_equal(restored["w"], values)


def test_a_checkpointer_without_a_background(run, shadow, tmp_path):
    """Orbax's synchronous Checkpointer saves the same, and metadata are its own."""
    params, state = run
    checkpointer = ocp.Checkpointer(checkpoint.EmaHandler())
    checkpointer.save(tmp_path / "5", args=checkpoint.EmaSave(params, state, {"a": 1}))
    assert checkpoint.describe(tmp_path).extra == {"a": 1}
    assert_same(checkpoint.restore(tmp_path, like=make_params()), shadow)
    assert_same(checkpoint.restore(tmp_path, "params", like=make_params()), params)
    assert_same(checkpoint.resume(tmp_path, params, state), (params, state))
    assert "encoder" in str(checkpointer.metadata(tmp_path / "5").item_metadata)


def test_beside_other_items_in_a_composite(run, shadow, tmp_path):
    """One item among others, under the name that the user gives it."""
    params, state = run
    args = ocp.args.Composite
    with ocp.CheckpointManager(tmp_path) as manager:
        meta = ocp.args.JsonSave({"epoch": 3})
        manager.save(0, args=args(state=checkpoint.EmaSave(params, state), meta=meta))
        manager.wait_until_finished()
        found = manager.restore(
            0,
            args=args(
                state=checkpoint.EmaResume(params, state), meta=ocp.args.JsonRestore()
            ),
        )
    assert found["meta"] == {"epoch": 3}
    assert_same(found["state"], (params, state))
    assert_same(checkpoint.restore(tmp_path, like=params), shadow)


def test_under_orbax_v1(run, shadow, saved, tmp_path):
    """v1 saves and loads the same steps, at once or in the background."""
    params, state = run
    path = tmp_path / "v1"
    v1.save_checkpointables(path, {"default": checkpoint.EmaSave(params, state)})
    for step in (path, saved / "5"):
        asked = {"default": checkpoint.EmaRestore("shadow", make_params())}
        assert_same(v1.load_checkpointables(step, asked)["default"], shadow)
        resumed = {"default": checkpoint.EmaResume(params, state)}
        assert_same(v1.load_checkpointables(step, resumed)["default"], (params, state))
    assert_same(checkpoint.restore(path, like=make_params()), shadow)
    later = {"default": checkpoint.EmaSave(params, state)}
    v1.save_checkpointables_async(tmp_path / "later", later).result()
    assert_same(checkpoint.restore(tmp_path / "later", like=make_params()), shadow)
    with v1.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_checkpointables(7, later)
    assert checkpoint.describe(tmp_path / "run").step == 7


STRANGER = """
import sys, warnings, absl.logging
absl.logging.set_verbosity("fatal")
warnings.simplefilter("ignore")
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
root = sys.argv[1]
item = root + "/5/default"
found = [
    getattr(v1, "load", v1.load_pytree)(root + "/5"),
    ocp.CheckpointManager(root).restore(5),
    ocp.CheckpointManager(root).restore(5, args=ocp.args.PyTreeRestore()),
    ocp.CheckpointManager(root).restore(5, args=ocp.args.StandardRestore()),
    ocp.PyTreeCheckpointer().restore(item),
    ocp.StandardCheckpointer().restore(item),
]
assert not [name for name in sys.modules if name.startswith("ema_optax")]
for tree in found:
    print(float(tree["encoder"]["kernel"].sum()), *sorted(tree))
"""


def test_a_stranger_gets_raw_params(run, saved):
    """Every default load, without this library: the params, never the shadow."""
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(saved)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    raw = float(run[0]["encoder"]["kernel"].sum())
    for line in done.stdout.splitlines():
        total, *names = line.split()
        assert float(total) == pytest.approx(raw, rel=1e-6)
        assert set(names) == set(make_params())
    assert len(done.stdout.splitlines()) == 6


def test_without_like_it_is_nested_dicts(run, shadow, saved):
    """Dicts by the parts of the paths, in the dtypes stored, on the default device."""
    tree = checkpoint.restore(saved)
    stored = run[1][1].shadow["encoder"]["bias"]  # float32, of bfloat16 params
    assert tree["encoder"]["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(tree["encoder"]["bias"], stored)
    assert isinstance(tree["encoder"]["kernel"], jax.Array)
    np.testing.assert_array_equal(tree["layers"]["1"]["0"], shadow["layers"][1][0])
    linear = tree["mlp"]["~"]["linear_0"]
    np.testing.assert_array_equal(linear, shadow["mlp/~/linear_0"])
    assert tree["steps"] == 7


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs(), (4, 3)))
        self.bias = nnx.Param(jnp.zeros(3))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.encoder = Encoder(rngs)


class Linear(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    name: str = eqx.field(static=True, default="linear")


class Pair(typing.NamedTuple):
    kernel: typing.Any
    bias: typing.Any


@pytest.mark.parametrize(
    ("like", "get"),
    [
        (lambda: nnx.state(Model(nnx.Rngs(0))), lambda t: t["encoder"]["kernel"][...]),
        (
            lambda: {"encoder": Linear(jnp.zeros((4, 3)), jnp.zeros(3))},
            lambda t: t["encoder"].kernel,
        ),
        (
            lambda: {
                "encoder": Pair(np.zeros((4, 3), np.float32), np.float32([0] * 3))
            },
            lambda t: t["encoder"].kernel,
        ),
        (
            lambda: jax.eval_shape(lambda: {"encoder": {"kernel": jnp.zeros((4, 3))}}),
            lambda t: t["encoder"]["kernel"],
        ),
    ],
    ids=["nnx.State", "Equinox", "NamedTuple of NumPy", "abstract part"],
)
def test_any_tree_is_a_model_slot(shadow, saved, like, get):
    """Slots are found by path, whatever the containers; only those asked for."""
    like = like()
    tree = checkpoint.restore(saved, like=like)
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    np.testing.assert_array_equal(get(tree), shadow["encoder"]["kernel"])
    kinds = [isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)]
    assert kinds == [isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(like)]


def test_nnx_params_are_saved_and_restored_as_they_are(tmp_path):
    """An nnx.State goes in and out, and fits a plain dict of its arrays too."""
    params = nnx.state(Model(nnx.Rngs(1)), nnx.Param)
    transform = ema_optax.ema_params(0.9)
    checkpoint.save(tmp_path, params, transform.init(params))
    fresh = nnx.state(Model(nnx.Rngs(2)), nnx.Param)
    restored = checkpoint.restore(tmp_path, like=fresh)
    assert_same(restored, params)
    plain = checkpoint.restore(tmp_path)
    np.testing.assert_array_equal(
        plain["encoder"]["kernel"], params["encoder"]["kernel"][...]
    )


def test_shardings_are_honoured(shadow, saved):
    """Restored onto any mesh of this machine, and without one onto the first device."""
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    target = jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=sharding)
    tree = checkpoint.restore(saved, like={"encoder": {"kernel": target}})
    kernel = tree["encoder"]["kernel"]
    assert kernel.sharding == sharding
    np.testing.assert_array_equal(kernel, shadow["encoder"]["kernel"])
    target = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    tree = checkpoint.restore(saved, like={"encoder": {"kernel": target}})
    assert tree["encoder"]["kernel"].devices() == {jax.devices()[0]}


def test_floats_are_cast_and_nothing_else(shadow, saved):
    """float32 ↔ bfloat16 as `like` asks; floats, integers and keys stay apart."""
    like = {"encoder": {"kernel": jnp.zeros((4, 3), jnp.bfloat16)}}
    tree = checkpoint.restore(saved, like=like)
    expected = shadow["encoder"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(tree["encoder"]["kernel"], expected)
    # The shadow of bfloat16 params is float32: asked for, all of its bits come.
    like = {"encoder": {"bias": jnp.zeros(3, jnp.float32)}}
    wide = checkpoint.restore(saved, like=like)["encoder"]["bias"]
    assert wide.dtype == jnp.float32
    assert np.any(np.asarray(wide.astype(jnp.bfloat16), np.float32) != wide)
    for slot, target in [
        ({"encoder": {"kernel": jnp.zeros((4, 3), jnp.int32)}}, "float32 on disk"),
        ({"steps": jnp.float32(0)}, "int32 on disk and float32"),
        ({"steps": jnp.int8(0)}, "int32 on disk and int8"),
        ({"key": jnp.zeros(2, jnp.uint32)}, r"'key' is \(\) on disk"),
        ({"key": jnp.uint32(0)}, "PRNG keys and numbers are not converted"),
        ({"encoder": {"kernel": jnp.zeros((3, 4))}}, r"\(4, 3\) on disk and \(3, 4\)"),
        ({"encoder": {"kernel": jnp.zeros((4, 3), complex)}}, "complex64"),
    ]:
        with pytest.raises(ValueError, match=target):
            checkpoint.restore(saved, like=slot)


def test_rename_maps_slots_to_stored_paths(shadow, saved):
    """Other names, whole prefixes, two slots from one leaf, and two leaves swapped."""
    kernel, layer = shadow["encoder"]["kernel"], shadow["layers"][0]
    like = {"tower": {"kernel": kernel}, "a": {"w": kernel}, "b": kernel}
    rename = {"tower": "encoder", "a/w": "encoder/kernel", "b": "encoder/kernel"}
    tree = checkpoint.restore(saved, like=like, rename=rename)
    for leaf in (tree["tower"]["kernel"], tree["a"]["w"], tree["b"]):
        np.testing.assert_array_equal(leaf, kernel)
    like = {"layers": [layer], "mlp/~/linear_0": layer}
    rename = {"layers/0": "mlp/~/linear_0", "mlp/~/linear_0": "layers/0"}
    swapped = checkpoint.restore(saved, like=like, rename=rename)
    np.testing.assert_array_equal(swapped["layers"][0], shadow["mlp/~/linear_0"])
    np.testing.assert_array_equal(swapped["mlp/~/linear_0"], layer)


@pytest.mark.parametrize(
    ("like", "rename", "wrong"),
    [
        ({"encodr": {"kernel": 0}}, None, r"no leaf 'encodr/kernel'.*'encoder/kernel'"),
        ({"a": 0}, {"a": "encoder/kernl"}, r"'encoder/kernl'.*slot 'a'.*'encoder/kern"),
        (
            {"steps": 0},
            {"stepz": "steps"},
            r"rename has 'stepz', which is, or begins, no slot.*'steps'",
        ),
        (None, {"a": "steps"}, "pass like="),
    ],
)
def test_names_that_match_nothing_are_errors(saved, like, rename, wrong):
    """With the nearest names, never the raw weights instead."""
    with pytest.raises(ValueError, match=wrong):
        checkpoint.restore(saved, like=like, rename=rename)


def test_only_the_chosen_tree_is_read(run, tmp_path):
    """With the params' data files damaged the shadow still restores, and back."""
    optimizer = make_optimizer()
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(50_000))}
    params, state = update(optimizer, params, optimizer.init(params), 3)
    checkpoint.save(tmp_path, params, state)
    needle = np.asarray(params["w"]).tobytes()
    files = [p for p in tmp_path.rglob("*") if p.is_file() and needle in p.read_bytes()]
    assert len(files) == 1  # stored once
    files[0].write_bytes(b"")
    restored = checkpoint.restore(tmp_path, "shadow", like=params)
    assert_same(restored, ema_optax.shadow_params(state, params))
    with pytest.raises(checkpoint.CorruptCheckpointError):
        checkpoint.restore(tmp_path, "params", like=params)


def test_five_steps_saved_and_five_more_are_ten(tmp_path):
    """Bit for bit, warm-up count included: the eleventh step is the same too."""
    optimizer = make_optimizer({"fast": 0.99, "slow": ema_optax.power(0.1)}, every=3)
    straight = trained(optimizer, times=11)
    params, state = trained(optimizer, times=5)
    checkpoint.save(tmp_path, params, state, step=5)
    blank = optimizer.init(numbers_of(make_params()))
    params, state = checkpoint.resume(tmp_path, make_params(), blank)
    assert int(state[1].count) == 5
    assert_same(update(optimizer, params, state, 6), straight)


def test_resume_into_abstract_targets(run, saved):
    """eval_shape of init is enough: no memory for a state that is thrown away."""
    params, state = run
    blank = jax.eval_shape(make_optimizer().init, numbers_of(params))
    assert_same(checkpoint.resume(saved, params, blank), (params, state))


@pytest.mark.long
def test_several_shadows_by_name(tmp_path):
    """Each is a tree; a single one needs no name; of several, one must be asked for."""
    optimizer = make_optimizer({"fast": 0.5, "slow": 0.99})
    params, state = trained(optimizer)
    checkpoint.save(tmp_path, params, state)
    numbers = numbers_of(params)
    for name in ("fast", "slow"):
        restored = checkpoint.restore(tmp_path, f"shadow/{name}", like=params)
        expected = ema_optax.shadow_params(state, numbers, name=name)
        assert_same(restored, eqx.combine(expected, params))
    with pytest.raises(ValueError, match=r"no tree 'shadow'.*'fast', 'slow'"):
        checkpoint.restore(tmp_path, "shadow")
    with pytest.raises(ValueError, match="no tree 'state'"):
        checkpoint.restore(tmp_path, "state")
    only = make_optimizer({"one": 0.5})
    checkpoint.save(tmp_path, *trained(only), step=1)
    assert checkpoint.restore(tmp_path, "shadow")["steps"] == 7


def test_a_changed_chain_leaves_old_shadows_readable(run, shadow, saved):
    """To restore needs no optimizer; resume says what differs, and the way on."""
    params, _ = run
    assert_same(checkpoint.restore(saved, like=params), shadow)
    numbers = numbers_of(params)
    longer = optax.chain(optax.clip(1.0), *[make_optimizer()]).init(numbers)
    with pytest.raises(ValueError, match=r"Cannot resume: .*'0/0/count'|'1/0/.*init"):
        checkpoint.resume(saved, params, longer)
    without = optax.chain(optax.adam(0.1)).init(numbers)
    with pytest.raises(ValueError, match=r"no shadow.*warmup\(decay=0.9.*copy of the"):
        checkpoint.resume(saved, params, without)
    other = make_optimizer(0.99).init(numbers)
    with pytest.raises(ValueError, match=r"decay=0.9,.*decay=0.99.*accept_new_decay"):
        checkpoint.resume(saved, params, other)
    rarer = make_optimizer(0.9, every=5).init(numbers)
    with pytest.raises(ValueError, match="every=5"):
        checkpoint.resume(saved, params, rarer)
    _, state = checkpoint.resume(saved, params, other, accept_new_decay=True)
    _, onward = update(make_optimizer(0.99), params, state)
    assert int(onward[1].count) == 6
    half = {
        **params,
        "encoder": {**params["encoder"], "kernel": jnp.zeros((4, 3), "f2")},
    }
    blank = make_optimizer().init(numbers_of(half))
    with pytest.raises(ValueError, match="goes on in the dtypes it was saved in"):
        checkpoint.resume(saved, half, blank)


def test_shadows_of_groups_are_joined(tmp_path):
    """multi_transform: one shadow on disk, the raw rest from params, resumed apart."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)}
    ema = optax.chain(optax.sgd(0.1), ema_optax.ema_params(ema_optax.constant(0.5)))
    optimizer = optax.multi_transform(
        {"ema": ema, "raw": optax.sgd(0.1)}, {"a": "ema", "b": "raw", "c": "ema"}
    )
    updates, state = optimizer.update(params, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    checkpoint.save(tmp_path, params, state)
    restored = checkpoint.restore(tmp_path, like=params)
    np.testing.assert_allclose(restored["a"], 0.95)
    np.testing.assert_allclose(restored["b"], 0.9)
    blank = optimizer.init(params)
    assert_same(checkpoint.resume(tmp_path, params, blank), (params, state))


def test_describe_reads_no_arrays(run, saved, monkeypatch):
    """Trees, leaves, bytes, decay, every, count, step, version, extra."""
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", None)
    found = checkpoint.describe(saved)
    assert (found.step, found.version) == (5, ema_optax.__version__)
    assert found.extra == {"note": "five updates"}
    assert set(found.trees) == {"params", "shadow"}
    shadow = found.trees["shadow"]
    assert (shadow.count, shadow.every) == (5, 1)
    assert shadow.decay == ema_optax.warmup(0.9)
    assert shadow.leaves["encoder/bias"] == checkpoint.Leaf((3,), "float32")
    assert shadow.bytes == 4 * (12 + 3 + 2 + 3 + 2)
    assert "steps" in found.trees["params"].leaves
    assert "steps" not in shadow.leaves
    assert found.state.leaves


def test_what_cannot_be_stored_is_said_before_anything_is_written(tmp_path):
    """No shadow, objects, colliding names, extra that is no JSON, a bad step."""
    state = ema_optax.ema_params(0.9).init({"w": jnp.ones(2)})
    target = tmp_path / "new"
    for params, opt_state, options, error, wrong in [
        ({"w": jnp.ones(2)}, optax.adam(0.1).init({}), {}, ValueError, "no shadow"),
        ({"w": "text"}, state, {}, TypeError, "'w' of the params: it is a str"),
        (
            {"a.b": jnp.ones(2), "a": {"b": jnp.ones(3)}},
            state,
            {},
            ValueError,
            "one name on disk",
        ),
        ({"w": jnp.ones(2)}, state, {"extra": {"x": object()}}, TypeError, "JSON"),
        ({"w": jnp.ones(2)}, state, {"step": -1}, ValueError, "got -1"),
    ]:
        with pytest.raises(error, match=wrong):
            checkpoint.save(target, params, opt_state, **options)
    assert not target.exists()


def test_leaves_of_all_kinds_come_back(tmp_path):
    """NumPy, Python numbers, float8, int4, complex: as they were."""
    params = {
        "numpy": np.arange(3.0),
        "float": 2.5,
        "int": 3,
        "bool": True,
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "int4": jnp.ones(3, jnp.int4),
        "complex": jnp.ones(2, jnp.complex64) * 1j,
        "scalar": np.float32(1.5),
    }
    state = ema_optax.ema_params(0.9, mask={k: k == "complex" for k in params}).init(
        params
    )
    checkpoint.save(tmp_path, params, state)
    restored = checkpoint.restore(tmp_path, "params", like=params)
    for name, value in params.items():
        assert np.asarray(restored[name]).dtype == np.asarray(value).dtype, name
        np.testing.assert_array_equal(restored[name], value)
    assert isinstance(restored["numpy"], np.ndarray)
    assert restored["bool"] is True


def test_what_a_manager_says_of_a_step_is_a_target(tmp_path):
    """Its metadata, as Orbax's guide restores; 64 bits come back as they were saved."""
    params = {"w": jnp.ones(2), "n": np.array([2**40 + 7]), "x": np.array([1e300])}
    mask = {"w": True, "n": False, "x": False}
    state = ema_optax.ema_params(0.9, mask=mask).init(params)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=checkpoint.EmaSave(params, state))
        manager.wait_until_finished()
        like = manager.item_metadata(1).tree
        found = manager.restore(1, args=checkpoint.EmaRestore("params", like=like))
    assert isinstance(found["w"], jax.Array)
    for name in params:
        assert found[name].dtype == params[name].dtype
        np.testing.assert_array_equal(found[name], params[name])


@pytest.mark.parametrize("dtype", ["float8_e4m3", "uint4", "uint2", "<U3", "M8[s]"])
def test_dtypes_that_cannot_be_stored_are_refused_by_path(tmp_path, dtype):
    """In the params as in the optimizer state; nothing is written."""
    leaf = jnp.ones(4).astype(dtype) if dtype[0] in "fu" else np.zeros(4, dtype)
    params = {"w": jnp.ones(2), "quantized": leaf}
    average = ema_optax.ema_params(0.9, mask={"w": True, "quantized": False})
    state = average.init(params)
    with pytest.raises(TypeError, match=r"'quantized' of the params: it is of "):
        checkpoint.save(tmp_path, params, state)
    with pytest.raises(TypeError, match="'1/quantized' of the state: it is of "):
        checkpoint.save(tmp_path, {"w": params["w"]}, (average.init(params), params))
    assert not list(tmp_path.iterdir())


def test_python_complex_numbers_come_back(tmp_path):
    """Stored as complex128, and back in its slot a number of Python."""
    params = {"w": jnp.ones(2), "z": 1.5 - 2.5j}
    state = ema_optax.ema_params(0.9, mask={"w": True, "z": False}).init(params)
    checkpoint.save(tmp_path, params, state)
    assert checkpoint.restore(tmp_path, "params", like=params)["z"] == params["z"]
    assert type(checkpoint.resume(tmp_path, params, state)[0]["z"]) is complex
    assert checkpoint.restore(tmp_path)["z"] == params["z"]
