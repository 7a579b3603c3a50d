"""Layouts of other programs, written by the real library where it is installed."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import layouts
from ema_optax._messages import layout_names
from tests import foreign

PARAMS, AVERAGE = foreign.params(), foreign.average()
SHADOW = AVERAGE | {"table": PARAMS["table"]}
FLOATS = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([0.5])}
MEAN = {"w": jnp.asarray([0.75, -1.0]), "b": jnp.asarray([0.25])}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "ours"


def adopted(tmp_path, tree, **call):
    """Adopts a tree that was saved as a step, and returns what was done."""
    return checkpoint.adopt(
        foreign.save(tmp_path / "theirs", tree), tmp_path / "ours", **call
    )


def test_every_layout_has_a_name_and_a_line():
    assert {each.name for each in layouts.LAYOUTS} == set(layout_names.LAYOUTS)


@pytest.mark.parametrize("name", ["ema_params", "params_ema", "ema", "ema_state"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_flax_train_states(name, wrapped, tmp_path, out):
    """A field of a real TrainState; `ema_state` may hold the params among others."""
    pytest.importorskip("flax")
    from flax import struct
    from flax.training import train_state

    mean = {"params": AVERAGE, "decay": 0.5} if wrapped else AVERAGE

    class State(train_state.TrainState):
        mean: Any = struct.field(default=None)

    made = State.create(apply_fn=None, params=PARAMS, tx=optax.identity(), mean=mean)
    tree = {k: getattr(made, k) for k in ("step", "params", "opt_state")}
    done = adopted(tmp_path, {"state": tree | {name: made.mean}})
    assert done.layout == "flax"
    assert done.params == "state/params"
    assert done.shadow == f"state/{name}" + ("/params" if wrapped else "")
    assert done.beside == ({f"state/{name}/decay": 0.5} if wrapped else {})
    foreign.same(checkpoint.restore(out, "shadow", like=PARAMS), SHADOW)


def test_a_flax_train_state_as_it_is(tmp_path, out):
    """Saved whole, with Adam's state."""
    pytest.importorskip("flax")
    from flax.training import train_state

    class State(train_state.TrainState):
        ema_params: Any = None

    made = State.create(
        apply_fn=None, params=FLOATS, tx=optax.adam(0.1), ema_params=MEAN
    )
    made = made.apply_gradients(grads=FLOATS)
    done = adopted(tmp_path, made)
    assert (done.params, done.shadow) == ("params", "ema_params")
    foreign.same(checkpoint.restore(out, "shadow", like=FLOATS), MEAN)
    foreign.same(checkpoint.restore(out, "params", like=FLOATS), made.params)


@pytest.mark.long
@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_nnx(pure, whole, tmp_path, out):
    """The real nnx.EMA, as a State or as dicts, whole or its params alone."""
    nnx = pytest.importorskip("flax.nnx")
    if not hasattr(nnx, "EMA"):
        pytest.skip("this Flax has no nnx.EMA")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    ema = nnx.EMA(model, decay=0.5)
    optimizer.update(model, nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model))
    ema.update(model)
    mean = nnx.state(ema) if whole else ema.params
    tree = {"model": nnx.state(model), "ema": mean, "optimizer": nnx.state(optimizer)}
    if pure:
        tree = {name: nnx.to_pure_dict(state) for name, state in tree.items()}
    done = adopted(tmp_path, tree)
    assert (done.layout, done.params) == ("nnx", "model")
    assert done.averaged == ("bias", "kernel")
    found = checkpoint.restore(out, "shadow", like=nnx.state(model, nnx.Param))
    foreign.same(nnx.to_pure_dict(found), nnx.to_pure_dict(ema.params))
    found = checkpoint.restore(out, "params", like=nnx.state(model, nnx.Param))
    foreign.same(nnx.to_pure_dict(found), nnx.to_pure_dict(nnx.state(model)))


def test_openpi(tmp_path, out):
    """By its training/checkpoints.py: the item `params` is the average, or raw.

    It is raw where the item `train_state` has no params.
    """
    keyed = {name: {"value": leaf} for name, leaf in FLOATS.items()}
    mean = {name: {"value": leaf} for name, leaf in MEAN.items()}
    rest = {"step": 300, "opt_state": [{"mu": keyed}]}
    source = foreign.composite(
        tmp_path / "theirs",
        params={"params": mean},
        train_state={**rest, "params": keyed},
    )
    done = checkpoint.adopt(source, out)
    assert (done.layout, done.params) == ("openpi", "train_state/params")
    foreign.same(checkpoint.restore(out, "shadow", like=FLOATS), MEAN)
    source = foreign.composite(
        tmp_path / "raw", params={"params": mean}, train_state={**rest, "params": {}}
    )
    with pytest.raises(ValueError, match="has no average"):
        checkpoint.adopt(source, tmp_path / "no")
    checkpoint.adopt(source, tmp_path / "copy", params="params/params", shadow=None)
    foreign.same(checkpoint.restore(tmp_path / "copy", "params", like=FLOATS), MEAN)


class KauldronState(NamedTuple):
    """State of kauldron.optim.ema_params, by its source (kauldron 1.4.2)."""

    count: Any
    ema_params: Any


@pytest.mark.parametrize("named", [False, True])
def test_kauldron(named, tmp_path, out):
    """In a chain or a named one, with the count that it keeps."""
    state = KauldronState(jnp.int32(77), AVERAGE)
    adam = optax.adam(0.1).init(PARAMS)
    opt_state = {"adam": adam, "ema": state} if named else (adam, state)
    done = adopted(tmp_path, {"params": PARAMS, "opt_state": opt_state, "step": 80})
    assert (done.layout, done.params, done.count) == ("kauldron", "params", 77)
    assert not done.zero_started
    assert checkpoint.describe(out).trees["shadow"].count == 77
    foreign.same(checkpoint.restore(out, "shadow", like=PARAMS), SHADOW)


class ParamEmaState(NamedTuple):
    """State of axlearn's optimizers.param_ema, by its source; optax.ema's is alike."""

    count: Any
    ema: Any


def test_axlearn(tmp_path, out):
    """It begins at zero, with a bias correction or without: that has to be told."""
    learner = {"ema": ParamEmaState(jnp.int32(2), MEAN), "optimizer": {"mu": FLOATS}}
    tree = {"model": FLOATS, "learner": learner}
    with pytest.raises(ValueError, match="may have begun at zero"):
        adopted(tmp_path, tree)
    done = checkpoint.adopt(tmp_path / "theirs", out, zero_started=False)
    assert (done.layout, done.params, done.count) == ("axlearn", "model", 2)
    foreign.same(checkpoint.restore(out, "shadow", like=FLOATS), MEAN)
    again = tmp_path / "divided"
    decay = ema_optax.constant(0.5)
    checkpoint.adopt(tmp_path / "theirs", again, zero_started=True, decay=decay)
    found = checkpoint.restore(again, "shadow", like=FLOATS)
    foreign.same(found, jax.tree.map(lambda x: x / 0.75, MEAN))


def test_levanter(tmp_path, out):
    """Its TrainerState by its source: model_averaging.model beside model."""
    mean = {"model": AVERAGE, "tot_weight": jnp.float32(1)}
    tree = {"step": 3, "model": PARAMS, "opt_state": {"mu": PARAMS}}
    done = adopted(tmp_path, tree | {"model_averaging": mean})
    assert (done.layout, done.params) == ("levanter", "model")
    foreign.same(checkpoint.restore(out, "shadow", like=PARAMS), SHADOW)


@pytest.mark.parametrize("keys", ["flat", "axlearn"])
def test_folders_of_zarr_arrays(keys, tmp_path, out):
    """As JAX's own serialization writes them, for axlearn below `gda`."""
    from jax.experimental.array_serialization import serialization

    tree = {"model": FLOATS, "model_averaging": {"model": MEAN}}
    if keys == "axlearn":
        tree = {
            "model": FLOATS,
            "learner": {"ema": {"count": jnp.int32(4), "ema": MEAN}},
        }
    root = tmp_path / "step-40" / ("gda" if keys == "axlearn" else "")
    paths, arrays = zip(*jax.tree_util.tree_flatten_with_path(tree)[0], strict=True)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p in paths]
    specs = [serialization.get_tensorstore_spec(str(root / name)) for name in names]
    serialization.run_serialization(list(arrays), specs)
    done = checkpoint.adopt(tmp_path / "step-40", out, zero_started=False)
    assert done.step == 40
    assert done.layout == ("axlearn" if keys == "axlearn" else "levanter")
    foreign.same(checkpoint.restore(out, "shadow", like=FLOATS), MEAN)
    foreign.same(checkpoint.restore(out, "params", like=FLOATS), FLOATS)
    array = next(root.rglob(".zarray"))
    array.write_text(json.dumps(json.loads(array.read_text()) | {"shape": [-1]}))
    with pytest.raises(checkpoint.CorruptCheckpointError, match="of no shape"):
        checkpoint.adopt(tmp_path / "step-40", tmp_path / "no")


def haiku_run(zero_debias, warmup_length, ignore=""):
    """Returns params, the average that Haiku gives, and its state, after 5 updates."""
    hk = pytest.importorskip("haiku")
    net = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))
    params = net.init(jax.random.key(0), jnp.ones((1, 4)))
    average = hk.transform_with_state(
        lambda tree: hk.EMAParamsTree(0.9, zero_debias, warmup_length, ignore)(tree)
    )
    _, state = average.init(None, params)
    mean = params
    for i in range(5):
        params = jax.tree.map(lambda x: x + 0.1 * i, params)  # noqa: B023
        mean, state = average.apply(None, state, None, params)
    return params, mean, state


@pytest.mark.long
def test_haiku(tmp_path, out):
    """`average` is divided already, `hidden` is not: the first is taken."""
    params, mean, state = haiku_run(True, 0)
    done = adopted(tmp_path, {"params": params, "ema_state": state})
    assert (done.layout, done.count, done.zero_started) == ("haiku", 5, False)
    assert done.left_out == {}
    foreign.same(checkpoint.restore(out, "shadow", like=params), mean)
    call = {"zero_started": True, "decay": ema_optax.constant(0.9)}
    with pytest.raises(ValueError, match="are divided already"):
        checkpoint.adopt(tmp_path / "theirs", tmp_path / "no", **call)


def test_haiku_without_debiasing(tmp_path, out):
    """`average` is `hidden`: whether it began at zero has to be told."""
    params, _, state = haiku_run(False, 0)
    _, expected, _ = haiku_run(True, 0)
    with pytest.raises(ValueError, match="may have begun at zero"):
        adopted(tmp_path, {"params": params, "ema_state": state})
    call = {"zero_started": True, "decay": ema_optax.constant(0.9)}
    checkpoint.adopt(tmp_path / "theirs", out, **call)
    found = checkpoint.restore(out, "shadow", like=params)
    # Haiku divides in float32, by a power of a rounded decay; one update more or less
    # would be off by 10 %.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
    )


def test_haiku_leaves_what_it_was_told_to_ignore(tmp_path, out):
    params, mean, state = haiku_run(True, 0, ".*linear_1/b")
    with pytest.raises(ValueError, match=r"'mlp/~/linear_1/b'.*partial=True"):
        adopted(tmp_path, {"params": params, "ema_state": state})
    done = checkpoint.adopt(tmp_path / "theirs", out, partial=True)
    assert done.raw == ("mlp/~/linear_1/b",)
    foreign.same(checkpoint.restore(out, "shadow", like=params), mean)


def test_haiku_before_its_warm_up_has_ended(tmp_path):
    """Its counter is negative until the average begins."""
    params, _, state = haiku_run(False, 9)
    with pytest.raises(ValueError, match="is -4: the average has not begun"):
        adopted(tmp_path, {"params": params, "ema_state": state}, zero_started=False)


def test_optax_ema_in_an_optimizer_averages_updates(tmp_path, out):
    """Refused by name and unasked, with the reason; `like` claims another."""
    optimizer = optax.chain(optax.adam(0.1), optax.ema(0.9))
    tree = {"params": FLOATS, "opt_state": optimizer.init(FLOATS)}
    reason = "'opt_state/1/ema' is the state of optax.ema, which averages the updates"
    with pytest.raises(ValueError, match=reason):
        adopted(tmp_path, tree)
    source = tmp_path / "theirs"
    with pytest.raises(ValueError, match=f"{reason}.*shadow=None.*like='axlearn'"):
        checkpoint.adopt(source, out, shadow="opt_state/1/ema")
    call = {"shadow": "opt_state/1/ema", "like": "axlearn", "zero_started": False}
    done = checkpoint.adopt(source, out, **call)
    assert (done.params, done.count) == ("params", 0)


def test_optax_ema_fed_with_params(tmp_path, out):
    """Beside the params it averages those, from zero: the real one, divided."""
    average = optax.ema(0.9)
    state, values = average.init(FLOATS), FLOATS
    for i in range(3):
        values = jax.tree.map(lambda x: x + i, FLOATS)  # noqa: B023
        debiased, state = average.update(values, state)
    tree = {"params": values, "ema_state": state, "opt_state": []}
    with pytest.raises(ValueError, match="may have begun at zero"):
        adopted(tmp_path, tree)
    call = {"zero_started": True, "decay": ema_optax.constant(0.9)}
    done = checkpoint.adopt(tmp_path / "theirs", out, **call)
    assert (done.layout, done.count) == ("optax", 3)
    found = checkpoint.restore(out, "shadow", like=FLOATS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, debiased
    )


@pytest.mark.parametrize("names", [None, ("a", "b")])
def test_our_state_saved_by_orbax_alone(names, tmp_path, out):
    """The average that StandardSave wrote with the optimizer's state."""
    decay = 0.9 if names is None else dict.fromkeys(names, 0.9)
    optimizer = optax.chain(optax.adam(0.1), ema_optax.ema_params(decay))
    state = optimizer.init(FLOATS)
    updates, state = optimizer.update(FLOATS, state, FLOATS)
    params = optax.apply_updates(FLOATS, updates)
    source = foreign.save(tmp_path / "theirs", {"params": params, "opt_state": state})
    call = {}
    if names:
        with pytest.raises(ValueError, match="2 pairs of params and average"):
            checkpoint.adopt(source, out)
        call = {"shadow": "opt_state/1/shadow/b"}
    done = checkpoint.adopt(source, out, **call)
    assert (done.layout, done.count) == ("ema_optax", 1)
    expected = ema_optax.shadow_params(state, name=names and "b")
    foreign.same(checkpoint.restore(out, "shadow", like=params), expected)


def packed(tree):
    serialization = pytest.importorskip("flax.serialization")
    return serialization.to_bytes(tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_msgpack_files(dtype, tmp_path, out):
    """What flax.serialization wrote of a train state, bit for bit."""
    mean = jax.tree.map(lambda x: x.astype(dtype), MEAN)
    tree = {"step": 300, "params": FLOATS, "ema_params": mean, "ema_decay": 0.5}
    file = tmp_path / "checkpoint_300"
    file.write_bytes(packed(tree | {"opt_state": optax.adam(0.1).init(FLOATS)}))
    done = checkpoint.adopt(file, out)
    assert (done.layout, done.step, done.beside) == ("flax", 300, {"ema_decay": 0.5})
    foreign.same(checkpoint.restore(out, "shadow"), jax.tree.map(np.asarray, mean))
    foreign.same(checkpoint.restore(out, "params", like=FLOATS), FLOATS)
    with pytest.raises(FileNotFoundError, match="one of its files: checkpoint_300"):
        checkpoint.adopt(tmp_path, tmp_path / "no")


def test_msgpack_of_params_alone(tmp_path, out):
    """A file of params has no number, and no average."""
    (tmp_path / "model.msgpack").write_bytes(packed(FLOATS))
    with pytest.raises(ValueError, match="holds no number"):
        checkpoint.adopt(tmp_path / "model.msgpack", out, params="", shadow=None)
    call = {"params": "", "shadow": None, "step": 5}
    checkpoint.adopt(tmp_path / "model.msgpack", out, **call)
    foreign.same(checkpoint.restore(out, "params", like=FLOATS), FLOATS)


def test_msgpack_of_large_arrays_in_parts(tmp_path, out, monkeypatch):
    """Flax cuts arrays above a size."""
    serialization = pytest.importorskip("flax.serialization")
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    tree = {"params": {"w": jnp.arange(12.0).reshape(3, 4)}}
    (tmp_path / "m_1").write_bytes(packed(tree))
    assert b"chunked_array" in (tmp_path / "m_1").read_bytes()
    checkpoint.adopt(tmp_path / "m_1", out, shadow=None)
    foreign.same(checkpoint.restore(out, "params", like=tree["params"]), tree["params"])


def hostile():
    """Yields files that are none, by what is wrong with them."""
    import msgpack

    def array(*parts):
        return msgpack.packb({"params": msgpack.ExtType(1, msgpack.packb(parts))})

    good = packed({"params": FLOATS})
    deep = b"\x91" * 500 + b"\x01"
    parts = {"__msgpack_chunked_array__": True, "shape": {"0": 9}, "chunks": {"0": 1}}
    yield from {
        "cut": good[:-3],
        "more": good + b"x",
        "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00",
        "empty": b"",
        "deep": deep,
        "deeper": b"\x81\xa1a" * 5000 + b"\x01",
        "claims": array([2**40], "float32", b"abcd"),
        "negative": array([-1], "float32", b"abcd"),
        "objects": array([1], "object", b"12345678"),
        "a dtype of code": array([1], "O8", b"12345678"),
        "no triple": array([1]),
        "a shape of text": array("a", "float32", b"abcd"),
        "unknown": msgpack.packb({"params": msgpack.ExtType(9, b"abc")}),
        "parts": msgpack.packb({"params": {"w": parts}}),
        "away": msgpack.packb({"..": {"..": 1.5}}),
        "huge header": b"\xdd\xff\xff\xff\xff",
    }.items()


HOSTILE = (
    *("cut", "more", "a pickle", "empty", "deep", "deeper", "claims", "negative"),
    *("objects", "a dtype of code", "no triple", "a shape of text", "unknown"),
    *("parts", "away", "huge header"),
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_msgpack_files(name, tmp_path, out):
    """One clear error of a kind that callers expect, and nothing is run or written."""
    pytest.importorskip("flax")
    files = dict(hostile())
    assert set(files) == set(HOSTILE)
    (tmp_path / "m_1").write_bytes(files[name])
    with pytest.raises(checkpoint.CorruptCheckpointError, match=str(tmp_path)):
        checkpoint.adopt(tmp_path / "m_1", out, shadow=None)
    assert not out.exists()


def test_two_arrays_of_one_path(tmp_path, out):
    """Keys with slashes, as Haiku's, may fall together."""
    tree = {"params": {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}}
    (tmp_path / "m_1").write_bytes(packed(tree))
    with pytest.raises(ValueError, match="two arrays of one path, 'params/a/b'"):
        checkpoint.adopt(tmp_path / "m_1", out, shadow=None)


def test_a_step_of_texts_alone(tmp_path, out):
    with ocp.CheckpointManager(tmp_path / "theirs") as manager:
        manager.save(1, args=ocp.args.Composite(note=ocp.args.JsonSave({"a": 1})))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint that is known"):
        checkpoint.adopt(tmp_path / "theirs", out)
