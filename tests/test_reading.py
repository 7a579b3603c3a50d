"""Reads few bytes at once, none twice; casts as JAX does; tells damage from others."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import leaves, targets
from ema_optax.checkpoint import CorruptCheckpointError
from tests.older import enable_x64
from tests.reads import watched

P = PartitionSpec
MESH = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
OPTIMIZER = optax.chain(optax.adam(1e-3), ema_optax.ema_params(0.9))
FLOAT = np.dtype(np.float32)
LEAF = 4000  # bytes of each of the leaves below


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A step of twelve leaves in each of params, shadow and both moments."""
    folder = tmp_path_factory.mktemp("run")
    params = {f"w{i:02}": jnp.arange(1000.0) + i for i in range(12)}
    checkpoint.save(folder, params, OPTIMIZER.init(params), step=1)
    return folder


def _params():
    return {f"w{i:02}": jnp.zeros(1000) for i in range(12)}


def _resume(root):
    return checkpoint.resume(root, _params(), OPTIMIZER.init(_params()))


READERS = {
    "restore": lambda root: checkpoint.restore(root, "shadow"),
    "restore like": lambda root: checkpoint.restore(root, "params", like=_params()),
    "resume": _resume,
    "verify": checkpoint.verify,
}


# How much at once, and how often.


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bound", [1, LEAF, 3 * LEAF + 1])
def test_bytes_in_flight_are_bounded(root, monkeypatch, reader, bound):
    """By the bound; a leaf that is larger than it is read alone."""
    monkeypatch.setattr(leaves, "_IN_FLIGHT", bound)
    with watched() as reads:
        READERS[reader](root)
    assert reads.peak == max(bound - bound % LEAF, LEAF)
    assert reads.in_flight == 0


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ahead", [1, 5, 256])
def test_nothing_is_read_twice(root, monkeypatch, reader, ahead):
    """However many leaves are opened ahead, and placed together."""
    monkeypatch.setattr(leaves, "_OPEN", ahead)
    monkeypatch.setattr(leaves, "_TOGETHER", ahead * LEAF)
    with watched() as reads:
        READERS[reader](root)
    assert len(set(reads.parts)) == len(reads.parts)
    count = {"resume": 48, "verify": 48}.get(reader, 12)
    assert sum(bounds == ((0, 1000),) for *_, bounds in reads.parts) == count


@pytest.mark.parametrize("bound", [1, 3])
def test_verifying_holds_a_leaf_or_two(root, monkeypatch, bound):
    """That in hand and the one before it; what is in flight is bounded apart."""
    monkeypatch.setattr(leaves, "_IN_FLIGHT", bound * LEAF)
    with watched() as reads:
        checkpoint.verify(root)
    assert LEAF <= reads.most_held <= 2 * LEAF
    assert reads.held == 0


def test_what_is_placed_is_let_go_of(root, monkeypatch):
    """Cast on the host, the array as it was read is not kept: at most one batch is."""
    monkeypatch.setattr(leaves, "_TOGETHER", 2 * LEAF)
    like = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params())
    with watched() as reads:
        checkpoint.restore(root, "params", like=like)
    assert reads.most_held <= 5 * LEAF
    assert reads.held == 0


@pytest.mark.parametrize("verify", [True, False])
def test_one_leaf_for_several_slots_is_read_once(root, verify):
    """Each in its own dtype, of its own type, and none is another's memory."""
    like = {
        "a": jnp.zeros(1000),
        "b": jax.ShapeDtypeStruct((1000,), jnp.bfloat16),
        "c": np.zeros(1000, np.float64),
        "d": np.zeros(1000, np.float32),
        "e": np.zeros(1000, np.float32),
        "f": jax.ShapeDtypeStruct(
            (1000,), jnp.float16, sharding=NamedSharding(MESH, P("x"))
        ),
    }
    with watched() as reads:
        got = checkpoint.restore(
            root, "params", like, rename=dict.fromkeys(like, "w03"), verify=verify
        )
    assert reads.parts == [("params", "w03", ((0, 1000),))]
    expected = np.arange(1000.0) + 3
    for name, leaf in like.items():
        assert got[name].dtype == leaf.dtype
        assert isinstance(got[name], np.ndarray) == isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(got[name], expected.astype(leaf.dtype))
    assert got["f"].sharding == like["f"].sharding
    got["d"][:] = -1
    for name in "abcef":
        np.testing.assert_array_equal(
            got[name], expected.astype(like[name].dtype), err_msg=name
        )


# What a leaf becomes.


def _odd_numbers(dtype):
    """Ordinary ones, ties, and those at the ends of each floating dtype."""
    rng = np.random.default_rng(0)
    numbers = [*rng.normal(size=200), 0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan]
    for kind in (jnp.float16, jnp.bfloat16, jnp.float32):
        info = jnp.finfo(kind)
        with np.errstate(all="ignore"):
            ends = np.array([info.max, info.tiny, info.smallest_subnormal], np.float64)
            for end in ends:
                half = 2.0 ** (-info.nmant - 2)
                numbers += [end, -end, end * 1.5, end / 2, end * 2, end * 0.7]
                numbers += [end * (1 + half), end * (1 + 2 * half), end * (1 - half)]
        one = 1 + 2.0 ** (-info.nmant - 1)  # a tie
        numbers += [one, one + 2.0**-30, one - 2.0**-30, 3 * one]
    with np.errstate(all="ignore"):
        return np.array(numbers, np.float64).astype(dtype)


def _restored(tmp_path, array, dtype, target):
    params = {"w": array, "x": jnp.zeros(2)}
    checkpoint.save(
        tmp_path, params, ema_optax.ema_params(0.9).init({"x": params["x"]})
    )
    like = {"w": target(array.shape, dtype), "x": jnp.zeros(2)}
    return checkpoint.restore(tmp_path, "params", like)["w"]


@pytest.mark.parametrize("have", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("want", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", [jax.ShapeDtypeStruct, np.zeros])
def test_casts_are_those_of_jax(tmp_path, have, want, target):
    """Bit for bit, and without a warning where numbers become infinite.

    Of float64 XLA makes 0 of what is subnormal in float32, and rounds to float16 by way
    of float32: there the host is nearer to the number.
    """
    array = _odd_numbers(jnp.dtype(have))
    got = np.asarray(_restored(tmp_path, array, jnp.dtype(want), target))
    assert got.dtype == want
    with enable_x64(True):
        expected = np.asarray(jnp.asarray(array).astype(want))
    width = f"u{got.dtype.itemsize}"
    differ = got.view(width) != expected.view(width)
    if have == "float64":
        with np.errstate(invalid="ignore"):  # ∞ − ∞
            nearer = np.abs(got - array) < np.abs(expected - array)
        assert np.isin(expected[differ & nearer], (0, 1)).all()
        differ &= ~nearer
    assert not differ.any(), (array[differ], got[differ], expected[differ])


def test_complex_numbers_are_cast(tmp_path):
    array = _odd_numbers(np.float64)[:200] * (1 + 2j)
    got = _restored(tmp_path, array, np.complex64, jax.ShapeDtypeStruct)
    np.testing.assert_array_equal(np.asarray(got), array.astype(np.complex64))
    assert isinstance(got, jax.Array)


def test_targets_of_python_and_numpy(tmp_path):
    """Numbers come back as numbers, arrays of NumPy as such, to be written to."""
    params = {"w": jnp.ones(2), "f": 0.1, "i": 3, "b": True, "n": np.float32(2)}
    params |= {"a": np.arange(3), "z": jnp.zeros(0)}
    state = ema_optax.ema_params(0.9).init({"w": params["w"]})
    checkpoint.save(tmp_path, params, state)
    for like in (params, None):
        got = checkpoint.restore(tmp_path, "params", like)
        assert (got["f"], got["i"], got["b"]) == (0.1, 3, True)
        assert isinstance(got["a"], np.ndarray)
        np.testing.assert_array_equal(got["a"], np.arange(3))
        got["a"][0] = 5
        assert got["n"] == np.float32(2)
        assert got["n"].dtype == np.float32
    got = checkpoint.restore(tmp_path, "params", params)
    kinds = {name: type(got[name]) for name in "fib"}
    assert kinds == {"f": float, "i": int, "b": bool}


def test_what_is_bound_to_no_device_stays_so(root):
    """The count of a state beside params on a mesh, which it is used with."""
    like = {
        name: jax.device_put(x, NamedSharding(MESH, P()))
        for name, x in _params().items()
    }
    state = OPTIMIZER.init(like)
    assert not state[1].count.committed
    params, resumed = checkpoint.resume(root, like, state)
    assert not resumed[1].count.committed
    assert not resumed[0][0].count.committed
    for x in jax.tree.leaves((params, resumed[1].shadow, resumed[0][0].mu)):
        assert x.committed
        assert x.sharding == NamedSharding(MESH, P())
    loose = checkpoint.restore(root, "params", like=_params())
    assert not any(x.committed for x in loose.values())


def test_keys_go_where_they_are_asked_to(tmp_path):
    """Whole, as keys of their own implementation."""
    sharding = NamedSharding(MESH, P("x"))
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 6)
    params = {"k": jax.device_put(keys, sharding), "one": jax.random.key(2)}
    params["w"] = jnp.zeros(2)
    checkpoint.save(tmp_path, params, ema_optax.ema_params(0.9).init(params))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    for like in (params, abstract, None):
        got = checkpoint.restore(tmp_path, "params", like)
        for name in ("k", "one"):
            assert got[name].dtype == params[name].dtype
            np.testing.assert_array_equal(
                jax.random.key_data(got[name]), jax.random.key_data(params[name])
            )
        if like is not None:
            assert got["k"].sharding.is_equivalent_to(sharding, 1)


def test_memory_of_the_host(root):
    """A target in pinned_host memory is filled there."""
    host = NamedSharding(MESH, P("x"), memory_kind="pinned_host")
    like = {"w05": jax.ShapeDtypeStruct((1000,), jnp.bfloat16, sharding=host)}
    got = checkpoint.restore(root, "params", like)["w05"]
    assert got.sharding == host
    np.testing.assert_array_equal(
        np.asarray(got), (np.arange(1000.0) + 5).astype(jnp.bfloat16)
    )


# What is no damage.


class _Uneven:
    """A target that claims a sharding over three devices, of which there are none."""

    def __init__(self, sharding, dtype=FLOAT, shape=(1000,)):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding


@pytest.mark.parametrize(
    "sharding",
    [
        NamedSharding(AbstractMesh((2,), ("x",)), P("x")),
        NamedSharding(AbstractMesh((3,), ("x",)), P("x")),
        NamedSharding(MESH, P(None, "x")),  # of an array with two axes
    ],
    ids=["over 2", "over 3", "two axes"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_sharding_that_does_not_fit_is_no_damage(root, sharding, verify):
    """The leaf is named, and no other step is looked for."""
    like = {"w07": _Uneven(sharding)}
    words = r"(?s)leaf 'w07' of the params.*not damaged"
    with watched() as reads, pytest.raises(ValueError, match=words) as error:
        checkpoint.restore(root, "params", like, verify=verify)
    assert not isinstance(error.value, CorruptCheckpointError)
    assert not reads.parts


def test_a_sharding_that_does_not_fit_keys_is_no_damage(tmp_path):
    """As of numbers."""
    keys = jax.random.split(jax.random.key(1), 6)
    params = {"k": keys, "w": jnp.zeros(2)}
    checkpoint.save(tmp_path, params, ema_optax.ema_params(0.9).init(params))
    for sharding in (
        NamedSharding(MESH, P(None, "x")),
        NamedSharding(AbstractMesh((2,), ("x",)), P("x")),
    ):
        like = {"k": _Uneven(sharding, keys.dtype, (6,))}
        with pytest.raises(
            ValueError, match=r"(?s)leaf 'k' of the params.*not damaged"
        ):
            checkpoint.restore(tmp_path, "params", like)


FAILURES = [
    (PermissionError(13, "Permission denied"), PermissionError),
    (
        ValueError("PERMISSION_DENIED: no access [source locations='x']"),
        PermissionError,
    ),
    (MemoryError("no memory"), MemoryError),
    (
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."),
        MemoryError,
    ),
    (ValueError("UNAVAILABLE: connection reset"), OSError),
    (OSError(5, "Input/output error"), OSError),
]
NAMED = r"leaf '?w\d\d'? of the (shadow|params)|leaf '.*' of the state"


@pytest.mark.parametrize(("failure", "kind"), FAILURES)
@pytest.mark.parametrize("reader", [*READERS, "stored"])
def test_what_fails_for_another_reason_is_not_called_damaged(
    root, failure, kind, reader
):
    """From each way of reading; the leaf is named."""
    readers = READERS | {
        "stored": lambda at: checkpoint.stored(at).read("w01", np.s_[0:5,])
    }
    with watched(failure), pytest.raises(kind, match=NAMED) as error:
        readers[reader](root)
    assert not isinstance(error.value, CorruptCheckpointError)
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("reader", ["restore", "restore like", "resume"])
def test_no_memory_on_the_device_is_no_damage(root, monkeypatch, reader):
    """What was read whole and verified cannot be placed."""

    def device_put(*_):
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while allocating 9 bytes."
        )

    monkeypatch.setattr(targets.jax, "device_put", device_put)
    monkeypatch.setattr(targets.jnp, "asarray", device_put)
    with pytest.raises(MemoryError, match="cannot be placed") as error:
        READERS[reader](root)
    assert "damaged" not in str(error.value)


def test_an_error_of_ours_comes_out_as_it_is(root):
    """Such as an interrupt, or a mistake: not every exception is one of reading."""
    for failure in (KeyError("x"), KeyboardInterrupt()):
        with watched(failure), pytest.raises(type(failure)):
            checkpoint.restore(root, "params")


def _copy(root, tmp_path):
    params = {f"w{i:02}": jnp.arange(1000.0) + i for i in range(12)}
    checkpoint.save(tmp_path, params, OPTIMIZER.init(params), step=1)
    return tmp_path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", ["data", "index", "sums"])
def test_a_missing_file_is_damage(root, tmp_path, reader, what):
    """Of the data, of the store's index, or of the checksums."""
    copy = pathlib.Path(_copy(root, tmp_path)) / "1" / "default"
    files = [path for path in copy.rglob("*") if path.is_file()]
    chosen = {
        "data": [path for path in files if re.fullmatch("[0-9a-f]{32}", path.name)],
        "index": [path for path in files if path.name == "manifest.ocdbt"],
        "sums": [path for path in files if path.name == "0.json"],
    }[what]
    assert chosen
    for path in chosen:
        path.unlink()
    with pytest.raises(CorruptCheckpointError, match=r"Step 1 of .* is damaged"):
        READERS[reader](tmp_path)


def test_metadata_of_orbax_that_is_nested_without_end_is_damage(root, tmp_path):
    """Verifying looks at it, for those who load the step without this library."""
    item = pathlib.Path(_copy(root, tmp_path)) / "1" / "default"
    for text in ("[" * 100_000, "{", '{"a": \udc80}'):
        (item / "_METADATA").write_text(text, errors="surrogateescape")
        with pytest.raises(CorruptCheckpointError, match="_METADATA cannot be read"):
            checkpoint.verify(tmp_path)
