"""The manifest and the checksums as types: what is written is read as it was."""

import json

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

import ema_optax
from ema_optax._checkpoint import manifest
from ema_optax._checkpoint.entries import AverageEntry, LeafEntry, TreeEntry
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.manifest import Manifest
from ema_optax._checkpoint.pieces import Piece, parse_sums
from ema_optax._checkpoint.sealed import read_sealed
from ema_optax._trees import naming
from tests.programs import format_1

ITEM = epath.Path(format_1.FOLDER / "100" / "default")
LEAF = LeafEntry((2, 3), "float32")


def content(step=100):
    """The JSON of a manifest that version 0.1.0 wrote."""
    folder = epath.Path(format_1.FOLDER / str(step) / "default")
    return read_sealed(manifest.manifest_path(folder))


def through_json(value):
    return json.loads(json.dumps(value))


# --- What is written is read ---


@pytest.mark.parametrize("step", [100, 200])
def test_format_1_is_written_as_it_was(step):
    """To the byte: types lose nothing, and add nothing."""
    folder = epath.Path(format_1.FOLDER / str(step) / "default")
    written, read = content(step), manifest.read_manifest(folder)
    assert json.dumps(read.to_json()) == json.dumps(written)
    sums = manifest.read_sums(folder, read)
    assert json.dumps(sums) == json.dumps(
        read_sealed(manifest.checksums_path(folder, 0))
    )


def test_what_format_1_says():
    read = manifest.read_manifest(ITEM)
    assert (read.format, read.version, read.processes) == (1, "0.1.0", 1)
    assert read.extra == format_1.EXTRA
    assert read.averages == {"shadow": AverageEntry(ema_optax.warmup(0.999), 1, 100)}
    params, shadow = read.trees["params"], read.trees["shadow"]
    assert params.leaves["dense/kernel"] == LEAF
    key = params.leaves["key"]
    assert (key.key, key.is_key, key.bytes) == ("threefry2x32", True, 4)
    assert (LEAF.key, LEAF.is_key, LEAF.bytes) == (None, False, 24)
    assert (params.decay, params.every, params.count) == (None, None, None)
    assert (shadow.every, shadow.count, shadow.bytes) == (1, 100, 4 * (6 + 3 + 1 + 2))
    sums = manifest.read_sums(ITEM, read)
    assert sums["params"]["dense/bias"] == (Piece(((0, 3),), "75893bfcdce6b56b"),)


def test_names_of_shadows():
    for name, tree in {"": "shadow", "a/b": "shadow/a/b"}.items():
        assert naming.tree_of(name) == tree
        assert naming.name_of(tree) == name


KEYS = st.text("abz/.é ", min_size=1, max_size=4).filter(
    lambda key: not key.startswith("/") and ".." not in key.split("/")
)
LEAVES = st.builds(
    LeafEntry,
    st.lists(st.integers(0, 2**12), max_size=4).map(tuple),
    st.sampled_from(["float32", "bfloat16", "int4", "bool", "uint32", "complex64"]),
    st.sampled_from(["jax", "numpy", "bool", "int", "float", "key:rbg"]),
)
DECAYS = st.none() | st.sampled_from(
    [
        ema_optax.power(0.1),
        ema_optax.warmup(0.999),
        ema_optax.start_after(ema_optax.half_life(300.0), 5),
    ]
)
COUNTS = st.recursive(
    st.integers(0, 2**63 - 1), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
AVERAGES = st.builds(
    AverageEntry,
    DECAYS,
    st.none() | st.integers(1, 2**63 - 1),
    COUNTS,
    st.lists(
        st.dictionaries(KEYS, st.integers() | st.floats(allow_nan=False), max_size=2),
        max_size=2,
    ).map(tuple),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@st.composite
def trees(draw):
    """A structure whose leaves have paths of their own."""
    paths = draw(st.lists(KEYS, unique=True, max_size=6))
    node = [*paths, None, {}, []]
    while len(node) > 1 and draw(st.booleans()):
        some, node = node[:2], node[2:]
        keys = draw(st.lists(KEYS, unique=True, min_size=2, max_size=2))
        wrap = draw(st.booleans())
        node.append(some if wrap else dict(zip(keys, some, strict=False)))
    leaves = {path: draw(LEAVES) for path in paths}
    return TreeEntry(node, leaves, draw(st.none() | AVERAGES))


MANIFESTS = st.builds(
    Manifest,
    st.just(manifest.FORMAT),
    st.sampled_from(["0.1.0", "1!2.0rc1.post1+local", "9"]),
    st.integers(1, 2**20),
    st.dictionaries(KEYS, trees(), min_size=1, max_size=3),
    JSON,
)


@pytest.mark.long
@given(MANIFESTS)
@settings(max_examples=50, deadline=None)
def test_a_manifest_comes_back_as_it_was(value):
    """Through JSON, types included: shapes are tuples, and 1 is no 1.0."""
    got = Manifest.parse(through_json(value.to_json()))
    assert got == value
    assert repr(got) == repr(value)


def test_files_come_back_as_they_were(tmp_path):
    """Those of several processes, as one."""
    item = epath.Path(tmp_path)
    tree = TreeEntry({"w": "w"}, {"w": LEAF})
    written = Manifest(manifest.FORMAT, "0.2.0", 2, {"params": tree, "state": tree}, 1)
    halves = [Piece(((0, 1), (0, 3)), "a"), Piece(((1, 2), (0, 3)), "b")]
    manifest.write_manifest(item, written)
    for process, piece in enumerate(halves):
        manifest.write_sums(item, process, {"params": {"w": (piece,)}})
    assert manifest.read_manifest(item) == written
    sums = manifest.read_sums(item, written)
    assert sums == {"params": {"w": tuple(halves)}, "state": {}}
    manifest.checksums_path(item, 1).unlink()
    with pytest.raises(CorruptCheckpointError, match=r"1\.json cannot be read"):
        manifest.read_sums(item, written)
    manifest.write_sums(item, 1, {"shadow": {}})
    with pytest.raises(CorruptCheckpointError, match="of trees that the manifest has"):
        manifest.read_sums(item, written)


def test_blocks_that_fill_a_leaf_come_back(tmp_path):
    """Of format 2 a leaf has many pieces, and a scalar one without bounds."""
    blocks = tuple(Piece(((i, i + 1),), f"{i:x}") for i in range(1000))
    sums = {"params": {"w": blocks, "s": (Piece((), "0"),)}}
    assert parse_sums(through_json(sums)) == sums
