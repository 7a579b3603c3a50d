"""Large leaves lie and are verified in blocks: what is cut, saved, read and damaged."""

import itertools
import os
import pathlib
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from hypothesis import given, settings

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import checksums, manifest, opening
from ema_optax._checkpoint.pieces import Piece
from ema_optax.checkpoint import CorruptCheckpointError
from tests import launch
from tests.reads import watched
from tests.same import assert_same

BLOCK = 4096
OPTIMIZER = optax.chain(
    optax.masked(optax.adam(1e-3), lambda params: {n: n != "seen" for n in params}),
    ema_optax.ema_params({"a": ema_optax.power(0.1), "b": 0.9}),
)
SHADOWS = ("shadow/a", "shadow/b")
CUT = {"wide": (32, 25), "table": (25, 11), "half": (30, 50), "deep": (4, 6, 8, 5)}
EIGHT = pathlib.Path(__file__).parent / "programs" / "sharded_blocks.py"


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK", BLOCK)
        patch.setattr(checksums, "_SMALLEST", 64)
        yield


def _model():
    rng = np.random.default_rng(0)
    return {
        "wide": jnp.asarray(rng.normal(size=(96, 100)), jnp.float32),
        "table": rng.normal(size=(50, 33)),  # NumPy, float64
        "half": jnp.asarray(rng.normal(size=(60, 100)), jnp.bfloat16),
        "deep": jnp.asarray(rng.normal(size=(4, 6, 8, 20)), jnp.float32),
        "prime": jnp.asarray(rng.normal(size=1031), jnp.float32),
        "small": jnp.arange(8.0),
        "key": jax.random.split(jax.random.key(3), 1500),  # 12 kB, which Orbax writes
        "seen": jnp.int32(7),
    }


@pytest.fixture(scope="module")
def run():
    """Params and state after two updates."""
    params = {name: x for name, x in _model().items() if name != "key"}
    state = OPTIMIZER.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
        _, state = OPTIMIZER.update(grads, state, params)
    return params, state


@pytest.fixture(scope="module")
def root(run, tmp_path_factory):
    """A run of one step, not to be touched."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, *run, step=1)
    return folder


def _item(root, step=1):
    return epath.Path(root) / str(step) / "default"


def _sums(root, step=1):
    item = _item(root, step)
    return manifest.read_sums(item, manifest.read_manifest(item))


def _chunks(root, tree, path, step=1):
    """The shape of what TensorStore stores a leaf in."""
    item = _item(root, step)
    described = manifest.read_manifest(item)
    structures = {name: entry.structure for name, entry in described.trees.items()}
    metadata = opening.Store(item, structures).metadata(tree, path).result()
    return tuple(opening.parse(metadata)["chunks"])


# What is cut.


@pytest.mark.long
@pytest.mark.parametrize("path", [*CUT, "prime", "small", "seen"])
def test_pieces_are_blocks_that_fill_the_leaf(root, run, path):
    """None is larger than a block, but where a prime length would end in crumbs."""
    leaf = run[0][path]
    pieces = _sums(root)["params"][path]
    filled = np.zeros(leaf.shape, int)
    for piece in pieces:
        filled[checksums.slices(piece.bounds)] += 1
        part = np.asarray(leaf)[checksums.slices(piece.bounds)]
        assert piece.xxh3 == checksums.digest(part)
        if path in CUT:
            assert part.shape == CUT[path]
            assert part.nbytes <= BLOCK
    assert (filled == 1).all()
    assert (len(pieces) > 1) == (path in CUT)
    assert _chunks(root, "params", path) == CUT.get(path, leaf.shape)


@pytest.mark.parametrize("tree", SHADOWS)
def test_shadows_and_state_are_cut_alike(root, tree):
    """In float32, so the bfloat16 leaf in smaller blocks; the moments as the params."""
    assert _chunks(root, tree, "wide") == CUT["wide"]
    assert _chunks(root, tree, "half") == (30, 25)
    for path, pieces in _sums(root)["state"].items():
        if path.endswith("mu/wide"):
            assert _chunks(root, "state", path) == CUT["wide"]
            assert len(pieces) == 12
            break
    else:
        pytest.fail("no moment was found")


def test_the_format_says_whether_leaves_are_cut(root, run, tmp_path):
    """Earlier versions read what has no blocks."""
    assert checkpoint.describe(root).format == 2
    small = {name: run[0][name] for name in ("small", "prime", "seen")}
    checkpoint.save(tmp_path, small, ema_optax.ema_params(0.9).init(small))
    assert checkpoint.describe(tmp_path).format == 1
    assert all(
        len(pieces) == 1
        for leaves in _sums(tmp_path, 0).values()
        for pieces in leaves.values()
    )


def test_a_leaf_of_a_block_is_whole_and_of_one_more_is_cut(tmp_path):
    """1024 float32 are a block."""
    for rows, form in ((1024, 1), (1026, 2)):
        params = {"w": jnp.arange(float(rows))}
        checkpoint.save(
            tmp_path, params, ema_optax.ema_params(0.9).init(params), step=rows
        )
        assert checkpoint.describe(tmp_path, step=rows).format == form
    assert _chunks(tmp_path, "params", "w", 1026) == (513,)


@pytest.mark.parametrize("snapshot", [False, True])
def test_keys_of_many_numbers_are_whole(tmp_path, snapshot):
    """12 kB of keys: Orbax writes them in one chunk, and versions before read them."""
    params = {"w": jnp.ones(4), "key": _model()["key"]}
    state = ema_optax.ema_params(ema_optax.power(0.1)).init(params)
    if snapshot:
        state = state, params["key"]
    checkpoint.save(tmp_path, params, state)
    assert checkpoint.describe(tmp_path).format == 1
    [piece] = _sums(tmp_path, 0)["params"]["key"]
    assert piece.bounds == ((0, 1500),) or piece.bounds == ((0, 1500), (0, 2))
    checkpoint.verify(tmp_path)
    assert_same(checkpoint.resume(tmp_path, params, state), (params, state))


SHAPES = [
    (96, 100), (1030,), (2048,), (6, 350), (4, 6, 8, 20), (2, 1031), (1, 1, 5000),
    (37, 41), (128, 128), (3, 3, 3, 3, 60),
]  # fmt: skip


def test_blocks_are_orbax_chunks(tmp_path):
    """Asked for chunks of a block, it cuts each shape as we do."""
    arrays = {str(i): np.ones(shape, np.float32) for i, shape in enumerate(SHAPES)}
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=BLOCK), arrays)
    folder = epath.Path(tmp_path) / "x"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
    handler.save(folder, args=ocp.args.PyTreeSave(arrays, save_args=args))
    handler.finalize(folder)
    store = opening.Store(folder, {"params": {n: n for n in arrays}})
    for name, array in arrays.items():
        chunks = opening.parse(store.metadata("params", name).result())["chunks"]
        block = checksums.block_shape(array.shape, [False] * array.ndim, 4)
        if np.prod(chunks) * 4 < 64:  # crumbs are what we do not ask for
            assert block is None, array.shape
        else:
            assert (block or array.shape) == tuple(chunks), array.shape
    handler.close()


# Saved, and read back.


def test_all_comes_back_to_the_bit(root, run):
    """By every way of reading, also of parts of it."""
    params, state = run
    checkpoint.verify(root)
    assert_same(checkpoint.resume(root, params, OPTIMIZER.init(params)), run)
    assert_same(checkpoint.restore(root, "params"), params)
    for name in ("a", "b"):
        got = checkpoint.restore(root, f"shadow/{name}", like=params)
        expected = ema_optax.shadow_params(state, params, name=name)
        # JAX has no float64 here; the slot has.
        assert_same(got, {**expected, "table": np.float64(expected["table"])})
        stored = checkpoint.stored(root, f"shadow/{name}")
        wide = np.asarray(state[1].shadow[name]["wide"])
        for index in (np.s_[5:7, 3:4], np.s_[23:25, 24:51], np.s_[0:96, 0:100]):
            np.testing.assert_array_equal(stored.read("wide", index), wide[index])


def test_snapshots_are_cut_too(run, tmp_path):
    """In the narrower dtype that they are saved in."""
    state = run[1]
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=checkpoint.SnapshotSave(state, dtype="float16"))
        manager.wait_until_finished()
    assert checkpoint.describe(tmp_path).format == 2
    assert _chunks(tmp_path, "shadow/a", "wide") == (48, 25)
    [snapshot] = checkpoint.snapshots(tmp_path)
    wide = np.asarray(state[1].shadow["a"]["wide"].astype(jnp.float16))
    index = np.s_[20:30, 40:60]
    np.testing.assert_array_equal(snapshot.tree.read("wide", index), wide[index])
    checkpoint.verify(tmp_path)


@pytest.mark.parametrize(
    ("index", "blocks"),
    [
        (np.s_[3:4, 3:4], {((0, 32), (0, 25))}),
        (np.s_[32:64, 0:25], {((32, 64), (0, 25))}),
        (np.s_[31:33, 24:26], {((0, 64), (0, 50))}),
        (np.s_[0:96, 99:100], {((0, 96), (75, 100))}),
    ],
)
def test_a_part_reads_the_blocks_it_touches(root, index, blocks):
    """As one box, and no other byte of the leaf."""
    stored = checkpoint.stored(root, "params")
    with watched() as reads:
        stored.read("wide", index)
    assert {bounds for _, _, bounds in reads.parts} == blocks
    assert len(reads.parts) == 1


def test_a_part_takes_few_bytes_from_disk(tmp_path):
    """A row of 4 MB is a block or two of 4 kB, and the index: not the leaf."""
    if not os.path.exists("/proc/self/io"):
        pytest.skip("needs /proc")
    params = {"w": jnp.arange(2.0**20).reshape(1024, 1024)}
    checkpoint.save(tmp_path, params, ema_optax.ema_params(0.9).init(params))
    stored = checkpoint.stored(tmp_path, "params")
    stored.read("w", np.s_[0:1, 0:1])  # opens the store, and reads the checksums

    def came():
        text = pathlib.Path("/proc/self/io").read_text()
        return int(re.search(r"rchar: (\d+)", text)[1])

    before = came()
    got = stored.read("w", np.s_[700:701, 512:513])
    assert came() - before < 100_000
    assert got == 700 * 1024 + 512


# Damaged.


def _damage(root, leaf, bounds):
    """Flips a bit in the one block of a leaf."""
    block = np.asarray(leaf)[checksums.slices(bounds)].tobytes()
    for path in pathlib.Path(_item(root)).rglob("*"):
        if path.is_file() and block in (data := path.read_bytes()):
            at = data.find(block) + len(block) // 2
            data = bytearray(data)
            data[at] ^= 16
            path.write_bytes(bytes(data))
            return
    pytest.fail("the block was not found")


def test_damage_is_named_by_its_block_and_seen_there_alone(run, tmp_path):
    """Its bounds are those of the block; what lies in others is read as before."""
    params, state = run
    checkpoint.save(tmp_path, params, state, step=1)
    shadow = np.asarray(state[1].shadow["a"]["wide"])
    _damage(tmp_path, shadow, ((32, 64), (25, 50)))
    named = r"leaf 'wide' of the shadow/a: .*within \[\[32, 64\], \[25, 50\]\]"
    for read in (
        lambda: checkpoint.verify(tmp_path),
        lambda: checkpoint.restore(tmp_path, "shadow/a", like=params),
        lambda: checkpoint.resume(tmp_path, params, OPTIMIZER.init(params)),
        lambda: checkpoint.stored(tmp_path, "shadow/a").read(
            "wide", np.s_[63:65, 30:31]
        ),
    ):
        with pytest.raises(CorruptCheckpointError, match=named):
            read()
    stored = checkpoint.stored(tmp_path, "shadow/a")
    for index in (np.s_[0:32, 0:100], np.s_[32:64, 0:25], np.s_[64:96, 25:50]):
        np.testing.assert_array_equal(stored.read("wide", index), shadow[index])
    assert_same(checkpoint.restore(tmp_path, "params", like=params), params)
    unverified = checkpoint.restore(tmp_path, "shadow/a", like=params, verify=False)
    assert (np.asarray(unverified["wide"]) != shadow).sum() == 1


def test_sums_with_a_gap_or_of_another_shape_are_refused(run, tmp_path):
    """Where a piece is missing nothing vouches for the data there."""
    params, state = run
    checkpoint.save(tmp_path, params, state, step=1)
    sums = {tree: dict(leaves) for tree, leaves in _sums(tmp_path).items()}
    whole = sums["params"]["wide"]
    for pieces, message in (
        (whole[:5] + whole[6:], "its checksums cover 8800 elements of 9600"),
        ((*whole[:5], Piece(((0, 24), (0, 101)), "0")), "of another shape than"),
        ((*whole[:5], Piece(((0, 24),), "0")), "of another shape than"),
        ((), "its checksums cover 0 elements of 9600"),
    ):
        sums["params"]["wide"] = pieces
        manifest.write_sums(_item(tmp_path), 0, sums)
        for read in (checkpoint.verify, lambda at: checkpoint.restore(at, "params")):
            with pytest.raises(CorruptCheckpointError, match=message):
                read(tmp_path)


# Sharded.


@pytest.mark.long
def test_eight_devices():
    """All of sharded_blocks.py, in a process that has them."""
    launch.run_on_eight_devices(EIGHT)


# The arithmetic of boxes.


def _bounds_of(mask):
    """The smallest box around what is set."""
    return tuple((int(axis.min()), int(axis.max()) + 1) for axis in np.nonzero(mask))


@st.composite
def boxes(draw, shape):
    """A box of at least one element within a shape."""
    box = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        box.append((start, draw(st.integers(start + 1, n))))
    return tuple(box)


@st.composite
def tilings(draw):
    """A shape, and pieces that fill it: boxes that are split again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    pieces = [checksums.whole(shape)]
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(pieces) - 1))
        axes = [i for i, (a, b) in enumerate(pieces[at]) if b - a > 1]
        if axes:
            axis = draw(st.sampled_from(axes))
            box = list(pieces.pop(at))
            a, b = box[axis]
            cut = draw(st.integers(a + 1, b - 1))
            for half in ((a, cut), (cut, b)):
                pieces.append((*box[:axis], half, *box[axis + 1 :]))
    return shape, draw(st.permutations(pieces))


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(tilings(), st.data())
def test_cover_is_the_closure_of_what_a_part_touches(tiling, data):
    """Against a map of which piece owns each element; a gap in it is an error."""
    shape, bounds = tiling
    part = data.draw(boxes(shape))
    pieces = [Piece(box, str(i)) for i, box in enumerate(bounds)]
    lost = data.draw(st.sampled_from([None, *range(len(pieces))]))
    owner = np.full(shape, -1)
    for i, box in enumerate(bounds):
        if i != lost:
            owner[checksums.slices(box)] = i
    box = part
    while True:
        owners = np.unique(owner[checksums.slices(box)])
        touched = np.isin(owner, owners[owners >= 0])
        touched[checksums.slices(box)] = True
        if shape == () or _bounds_of(touched) == box:
            break
        box = _bounds_of(touched)
    kept = [piece for i, piece in enumerate(pieces) if i != lost]
    if (owner[checksums.slices(box)] < 0).any():
        with pytest.raises(ValueError, match="its checksums cover"):
            checksums.cover(kept, part, shape)
        return
    found, inside = checksums.cover(kept, part, shape)
    assert found == box
    assert {piece.xxh3 for piece in inside} == {str(i) for i in owners}
    assert len(inside) == len(owners)


@settings(max_examples=100, deadline=None)
@given(tilings(), st.data())
def test_mismatch_finds_the_piece_of_any_changed_element(tiling, data):
    """And says nothing where none is changed."""
    shape, bounds = tiling
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    pieces = [Piece(b, checksums.digest(array[checksums.slices(b)])) for b in bounds]
    part = data.draw(boxes(shape))
    box, inside = checksums.cover(pieces, part, shape)
    read = np.array(array[checksums.slices(box)])
    assert checksums.mismatch(read, box, inside) is None
    at = tuple(data.draw(st.integers(0, n - 1)) for n in read.shape)
    read[at] += 1
    where = [i + start for i, (start, _) in zip(at, box, strict=True)]
    [bad] = [
        p
        for p in inside
        if all(a <= i < b for i, (a, b) in zip(where, p.bounds, strict=True))
    ]
    said = checksums.mismatch(read, box, inside)
    assert said is not None
    assert said.endswith(f"within {[list(pair) for pair in bad.bounds]}")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_disjoint_joins_what_overlaps_and_nothing_else(data):
    """Until no two share an element: each box is in one, no element in two."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    given_boxes = data.draw(st.lists(boxes(shape), max_size=6))
    masks = []
    for box in given_boxes:
        mask = np.zeros(shape, bool)
        mask[checksums.slices(box)] = True
        masks.append(mask)
    while pair := next(
        ((a, b) for a, b in itertools.combinations(masks, 2) if (a & b).any()), None
    ):
        joined = np.zeros(shape, bool)
        joined[checksums.slices(_bounds_of(pair[0] | pair[1]))] = True
        masks = [m for m in masks if m is not pair[0] and m is not pair[1]] + [joined]
    found = checksums.disjoint(given_boxes)
    assert set(found) == {_bounds_of(mask) for mask in masks}
    assert len(found) == len(masks)
    for box in given_boxes:
        assert sum(checksums.inside(box, other) for other in found) == 1
