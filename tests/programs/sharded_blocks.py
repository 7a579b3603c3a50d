"""Blocks of sharded leaves on eight devices; test_blocks has a pytest run it."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import checksums, manifest, opening
from ema_optax.checkpoint import CorruptCheckpointError
from tests.reads import watched

P = PartitionSpec
BLOCK = 4096  # less than 1 kB OCDBT would put into its nodes
LINE = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
GRID = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
SHARDINGS = {
    "rows": NamedSharding(LINE, P("x")),
    "columns": NamedSharding(LINE, P(None, "x")),
    "both": NamedSharding(GRID, P("x", "y")),
    "some": NamedSharding(GRID, P("y")),  # and four replicas of each
    "everywhere": NamedSharding(LINE, P()),
    "one": SingleDeviceSharding(jax.devices()[3]),
}
REPLICATED = SHARDINGS["some"], SHARDINGS["everywhere"]
WHOLE = np.random.default_rng(0).normal(size=(320, 192)).astype(np.float32)
TRANSFORM = ema_optax.ema_params(0.9)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK", BLOCK)
        patch.setattr(checksums, "_SMALLEST", 64)
        yield


@pytest.fixture(scope="module", params=SHARDINGS)
def saved(request, tmp_path_factory):
    """A step whose leaves were sharded so."""
    root = tmp_path_factory.mktemp(request.param)
    params = {"w": jax.device_put(WHOLE, SHARDINGS[request.param]), "b": jnp.ones(8)}
    checkpoint.save(root, params, TRANSFORM.init(params), step=1)
    return root, SHARDINGS[request.param]


def _item(root):
    return epath.Path(root) / "1" / "default"


def _sums(root):
    item = _item(root)
    return manifest.read_sums(item, manifest.read_manifest(item))


def test_pieces_are_blocks_of_the_shards(saved):
    """Each of at most a block, no larger than a shard; together they fill the leaf.

    TensorStore's chunks are the blocks, but where replicas share the writing: Orbax
    then cuts what each of them writes.
    """
    root, sharding = saved
    assert checkpoint.describe(root).format == 2
    described = manifest.read_manifest(_item(root))
    structures = {name: tree.structure for name, tree in described.trees.items()}
    store = opening.Store(_item(root), structures)
    for tree in ("params", "shadow"):
        filled = np.zeros(WHOLE.shape, int)
        pieces = _sums(root)[tree]["w"]
        for piece in pieces:
            assert checksums.size(piece.bounds) * 4 <= BLOCK
            filled[checksums.slices(piece.bounds)] += 1
        assert (filled == 1).all()
        [block] = {tuple(b - a for a, b in piece.bounds) for piece in pieces}
        shard = sharding.shard_shape(WHOLE.shape)
        assert all(n % b == 0 for n, b in zip(shard, block, strict=True))
        chunks = opening.parse(store.metadata(tree, "w").result())["chunks"]
        assert np.prod(chunks) * 4 <= BLOCK
        if sharding not in REPLICATED:
            assert tuple(chunks) == block


@pytest.mark.parametrize("target", SHARDINGS)
def test_read_back_on_any_sharding(saved, target):
    """To the bit, each element read once, in whole blocks."""
    root, _ = saved
    sharding = SHARDINGS[target]
    like = {
        "w": jax.ShapeDtypeStruct(WHOLE.shape, jnp.float32, sharding=sharding),
        "b": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    for tree in ("params", "shadow"):
        with watched() as reads:
            got = checkpoint.restore(root, tree, like=like)["w"]
        assert got.sharding == sharding
        np.testing.assert_array_equal(np.asarray(got), WHOLE)
        assert reads.bytes == WHOLE.nbytes + 32
    state = jax.eval_shape(TRANSFORM.init, like)
    params, state = checkpoint.resume(root, like, state)
    np.testing.assert_array_equal(np.asarray(params["w"]), WHOLE)
    np.testing.assert_array_equal(np.asarray(state.shadow["w"]), WHOLE)
    checkpoint.verify(root)


def test_a_shard_that_cuts_through_blocks_reads_no_others(saved):
    """The rows 70 to 80: the blocks they touch, less than a quarter of the leaf.

    Sharded columns are cut into columns alone, as Orbax does.
    """
    root, sharding = saved
    touched = [
        piece.bounds
        for piece in _sums(root)["params"]["w"]
        if piece.bounds[0][0] < 80 and piece.bounds[0][1] > 70
    ]
    box = checksums.hull(touched)
    with watched() as reads:
        got = checkpoint.stored(root, "params").read("w", np.s_[70:80, 0:192])
    np.testing.assert_array_equal(got, WHOLE[70:80])
    assert [bounds for _, _, bounds in reads.parts] == [box]
    assert checksums.size(box) == sum(map(checksums.size, touched))
    if sharding != SHARDINGS["columns"]:
        assert reads.bytes <= WHOLE.nbytes / 4


@pytest.mark.parametrize("verify", [True, False])
def test_slots_that_overlap_are_read_once(saved, verify):
    """One leaf on two shardings, and a slot of NumPy: the parts of all come at once."""
    root, _ = saved
    like = {
        name: jax.ShapeDtypeStruct(WHOLE.shape, jnp.float32, sharding=sharding)
        for name, sharding in SHARDINGS.items()
    }
    like["numpy"] = np.zeros_like(WHOLE)
    with watched() as reads:
        got = checkpoint.restore(
            root, "params", like, rename=dict.fromkeys(like, "w"), verify=verify
        )
    assert reads.bytes == WHOLE.nbytes
    for name, leaf in got.items():
        np.testing.assert_array_equal(np.asarray(leaf), WHOLE, err_msg=name)


@pytest.mark.parametrize("verify", [True, False])
def test_a_sharding_that_does_not_divide_is_no_damage(tmp_path, verify):
    """The leaf is named, of numbers as of keys."""
    keys = jax.random.split(jax.random.key(0), 9)
    params = {"w": jnp.zeros(9), "k": keys}
    checkpoint.save(tmp_path, params, TRANSFORM.init(params))
    for name, dtype in (("w", jnp.float32), ("k", keys.dtype)):
        like = jax.ShapeDtypeStruct((9,), dtype)
        like = types.SimpleNamespace(
            shape=(9,), dtype=like.dtype, sharding=SHARDINGS["rows"]
        )
        words = rf"(?s)leaf '{name}' of the params.*not damaged"
        with pytest.raises(ValueError, match=words) as error:
            checkpoint.restore(tmp_path, "params", {name: like}, verify=verify)
        assert not isinstance(error.value, CorruptCheckpointError)


def test_damage_in_a_block_is_named_on_any_sharding(saved, tmp_path):
    """With the bounds of the block, and the step's own shards do not matter."""
    _, sharding = saved
    params = {"w": jax.device_put(WHOLE, sharding)}
    checkpoint.save(tmp_path, params, TRANSFORM.init(params), step=1)
    piece = _sums(tmp_path)["params"]["w"][7]
    _flip(tmp_path, WHOLE[checksums.slices(piece.bounds)])
    named = ", ".join(rf"\[{a}, {b}\]" for a, b in piece.bounds)
    for target in SHARDINGS.values():
        like = {"w": jax.ShapeDtypeStruct(WHOLE.shape, jnp.float32, sharding=target)}
        with pytest.raises(CorruptCheckpointError, match=rf"within \[{named}\]"):
            checkpoint.restore(tmp_path, "params", like=like)
        got = checkpoint.restore(tmp_path, "shadow", like=like)["w"]
        np.testing.assert_array_equal(np.asarray(got), WHOLE)


def _flip(root, block):
    """Flips a bit of the first row of a block, in the params, which lie apart."""
    row = block[0].tobytes()
    for path in pathlib.Path(_item(root)).rglob("*"):
        if path.is_file() and "ema_optax" not in path.parts[len(root.parts) + 2 :]:
            data = bytearray(path.read_bytes())
            if (at := data.find(row)) >= 0:
                data[at + 3] ^= 4
                path.write_bytes(bytes(data))
                return
    pytest.fail("the block was not found")
