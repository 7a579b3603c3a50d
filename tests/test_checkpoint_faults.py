"""Nothing lost, nothing silently wrong: damage, kills, full disks, wrong folders."""

import contextlib
import functools
import gc
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

import ema_optax
from ema_optax import checkpoint
from ema_optax._checkpoint import manifest, saving, sealed
from ema_optax.checkpoint import CorruptCheckpointError
from tests import launch
from tests.programs import format_1, saving_run

# After a failed read or write, callbacks of TensorStore find their event loop closed,
# and are reported as "Event loop is closed" when they are collected.
fails_on_purpose = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def _quick_to_collect():
    """What is there before the tests need not be searched again after each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _collect_within_the_test(_quick_to_collect):
    yield
    gc.collect()


OPTIMIZER = optax.chain(optax.adam(1e-3), ema_optax.ema_params(0.9))
MODEL = {
    # More than 1 kB, which OCDBT stores as they are; less goes into its nodes.
    "dense": {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(32, jnp.bfloat16)},
    "table": np.zeros((20, 30), np.float32),
    "seen": jnp.int32(0),
}
KERNEL = "leaf 'dense/kernel' of the shadow"


@functools.cache
def _run(step):
    """Params and optimizer state of a step, with something different in every leaf."""
    rng = np.random.default_rng(step)

    def filled(leaf):
        kind = np.asarray if isinstance(leaf, np.ndarray) else jnp.asarray
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return kind(rng.integers(1, 2**30), leaf.dtype)
        return kind(rng.normal(size=leaf.shape).astype(leaf.dtype))

    return jax.tree.map(filled, (MODEL, OPTIMIZER.init(MODEL)))


def _shadow(step):
    return ema_optax.shadow_params(_run(step)[1], _run(step)[0])


def _assert_same(got, expected):
    """Bit for bit, in dtype and structure."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run of steps 1, 2, 3, not to be touched."""
    root = tmp_path_factory.mktemp("run")
    for step in (1, 2, 3):
        checkpoint.save(root, *_run(step), step=step)
    return root


@pytest.fixture
def root(three_steps, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(three_steps, tmp_path / "run")


def _item(root, step=3):
    return root / str(step) / "default"


def _data_file(item, array):
    """Returns the file that holds an array, and where in it."""
    wanted = np.asarray(array).tobytes()
    found = {
        path: path.read_bytes().find(wanted)
        for path in item.rglob("*")
        if path.is_file() and wanted in path.read_bytes()
    }
    [(path, offset)] = found.items()
    return path, offset


def _kernel_file(item):
    step = int(item.parent.name)
    return _data_file(item, _shadow(step)["dense"]["kernel"])


def _flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def _flip_kernel(item):
    path, offset = _kernel_file(item)
    _flip(path, 8 * (offset + 5000) + 3)


def _truncate(item):
    path, offset = _kernel_file(item)
    os.truncate(path, offset + 5000)


def _delete(item):
    _kernel_file(item)[0].unlink()


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _reseal(path, change):
    """Edits what a file says and gives it a seal that fits."""
    content = sealed.read_sealed(epath.Path(path))
    change(content)
    sealed.write_sealed(epath.Path(path), content)


def _manifest(item):
    return item / "ema_optax" / "manifest.json"


def _sums(item):
    return item / "ema_optax" / "checksums" / "0.json"


def _edit_sum(content):
    [piece] = content["shadow"]["dense/kernel"]
    piece[1] = "0" * 16


# What is done to the newest step, and what the error must name.
DAMAGES = {
    "flipped bit": (_flip_kernel, KERNEL),
    "truncated data": (_truncate, "of the shadow"),
    "deleted data": (_delete, "of the shadow"),
    "edited manifest": (
        lambda item: _edit(_manifest(item), '"every": 1', '"every": 2'),
        "manifest.json",
    ),
    "truncated manifest": (lambda item: os.truncate(_manifest(item), 700), "manifest"),
    "deleted manifest": (lambda item: _manifest(item).unlink(), "manifest.json"),
    "edited checksums": (
        lambda item: _edit(_sums(item), '"dense/kernel"', '"dense/kernels"'),
        "0.json",
    ),
    "deleted checksums": (lambda item: shutil.rmtree(_sums(item).parent), "0.json"),
    "checksum of other data": (lambda item: _reseal(_sums(item), _edit_sum), KERNEL),
    "checksum left out": (
        lambda item: _reseal(
            _sums(item), lambda sums: sums["shadow"].pop("dense/kernel")
        ),
        KERNEL,
    ),
}


def _by_manager(root):
    with ocp.CheckpointManager(root) as manager:
        return manager.restore(3, args=checkpoint.EmaRestore(like=MODEL))


READERS = {
    "restore": lambda root: checkpoint.restore(root, like=MODEL),
    "resume": lambda root: checkpoint.resume(root, MODEL, OPTIMIZER.init(MODEL)),
    "verify": checkpoint.verify,
    "manager": _by_manager,
}


@fails_on_purpose
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(root, damage, reader):
    """Step, tree and leaf or file, and the newest older step that is whole."""
    spoil, named = DAMAGES[damage]
    spoil(_item(root))
    with pytest.raises(CorruptCheckpointError) as caught:
        READERS[reader](root)
    text = str(caught.value)
    assert f"Step 3 of {root} is damaged" in text
    assert named in text
    assert "pass step=2" in text
    assert len(text) < 1000  # TensorStore's own run to pages
    _assert_same(checkpoint.restore(root, like=MODEL, step=2), _shadow(2))


@fails_on_purpose
@pytest.mark.parametrize(
    ("tree", "path", "change"),
    [
        ("shadow", "dense/kernel", {"shape": [32, 128]}),
        ("shadow", "dense/kernel", {"shape": [64, 32]}),
        ("shadow", "dense/kernel", {"dtype": "int32"}),
        ("params", "table", {"shape": [30, 20]}),
        ("params", "table", {"dtype": "int32"}),
    ],
)
def test_a_manifest_that_does_not_fit_its_arrays(root, tree, path, change):
    """Its seal is right, the arrays are others: still no array comes back wrong."""
    _reseal(
        _manifest(_item(root)),
        lambda content: content["trees"][tree]["leaves"][path].update(change),
    )
    for read in (checkpoint.verify, lambda r: checkpoint.restore(r, tree)):
        with pytest.raises(CorruptCheckpointError, match="pass step=2") as caught:
            read(root)
        assert f"leaf '{path}' of the {tree}" in str(caught.value)
    # With a target it is the target that does not fit what the manifest says.
    with pytest.raises(ValueError, match=f"'{path}' is .* on disk"):
        checkpoint.restore(root, tree, like=MODEL)
    with pytest.raises(ValueError, match=f"{path}' is .* on disk"):
        checkpoint.resume(root, MODEL, OPTIMIZER.init(MODEL))


@fails_on_purpose
def test_the_step_to_go_back_to_is_whole(root):
    """Damaged older steps are passed over."""
    _flip_kernel(_item(root, 3))
    _flip_kernel(_item(root, 2))
    for read in READERS.values():
        with pytest.raises(CorruptCheckpointError, match=r"Step 3 .*pass step=1"):
            read(root)
    _truncate(_item(root, 1))
    with pytest.raises(CorruptCheckpointError, match="No older step is whole"):
        checkpoint.restore(root, like=MODEL)


@fails_on_purpose
def test_describe_reads_no_damaged_manifest(root):
    """The same error, with the same way out."""
    _manifest(_item(root)).write_text("{}")
    with pytest.raises(CorruptCheckpointError, match=r"Step 3 .*pass step=2"):
        checkpoint.describe(root)


def test_verify_false_skips_it(root):
    """On explicit request the one flipped bit comes back as it is on disk."""
    _flip_kernel(_item(root))
    state = OPTIMIZER.init(MODEL)
    with ocp.CheckpointManager(root) as manager:
        args = checkpoint.EmaRestore("shadow", like=MODEL, verify=False)
        found = [
            checkpoint.restore(root, like=MODEL, verify=False),
            checkpoint.resume(root, MODEL, state, verify=False)[1][1].shadow,
            manager.restore(3, args=args),
        ]
    for tree in found:
        wrong = np.asarray(tree["dense"]["kernel"] != _shadow(3)["dense"]["kernel"])
        assert wrong.sum() == 1
    checkpoint.restore(root, "params", like=MODEL)  # which are not damaged


@fails_on_purpose
def test_any_flipped_bit_is_found_or_harmless(root):
    """Over all files of an item: an error, or exactly what was saved."""
    for step in (1, 2):
        shutil.rmtree(root / str(step))
    files = sorted(path for path in _item(root).rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    state, described = OPTIMIZER.init(MODEL), checkpoint.describe(root)
    rng = random.Random(0)
    found = 0
    for turn in range(40):  # half of them where most bytes are, half in any file
        path = rng.choices(files, weights=sizes if turn % 2 else None)[0]
        whole = path.read_bytes()
        _flip(path, rng.randrange(8 * len(whole)))
        try:
            _assert_same(checkpoint.resume(root, MODEL, state), _run(3))
            assert checkpoint.describe(root) == described
        except CorruptCheckpointError:
            found += 1
        path.write_bytes(whole)
    assert found >= 10  # most files hold bytes that no read needs
    checkpoint.verify(root)


@pytest.mark.once
def test_killed_at_any_moment(tmp_path):
    """What was committed is whole and is found; the next process goes on."""
    rng = random.Random(0)
    kills = unfinished = 0
    checkpoint.save(tmp_path, *saving_run.run(1), step=1)
    newest = 1
    while kills < 7 or (unfinished < 3 and kills < 20):  # enough that met a save
        kills += 1
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.saving_run", str(tmp_path)],
            cwd=pathlib.Path(__file__).parent.parent,
            env=launch.on_cpu(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdout.readline() == "ready\n"
        lines = [child.stdout.readline() for _ in range(rng.randrange(4))]
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        lines += child.communicate()[0].splitlines()
        committed = [int(line) for line in lines]
        names = [path.name for path in tmp_path.iterdir()]
        unfinished += any("tmp" in name for name in names)
        described = checkpoint.describe(tmp_path)
        assert described.step >= max(committed, default=newest)
        newest = described.step
        params, state = checkpoint.resume(tmp_path, *saving_run.run(0))
        _assert_same((params, state), saving_run.run(newest))
        steps = sorted(int(name) for name in names if name.isdigit())
        for step in steps[-saving_run.KEPT :]:  # older ones may be half removed
            checkpoint.verify(tmp_path, step=step)
            got = checkpoint.restore(tmp_path, like=params, step=step)
            _assert_same(got, saving_run.run(step)[1].shadow)
    assert unfinished >= 3
    assert newest > 4
    with saving_run.manager(tmp_path) as manager:
        assert manager.latest_step() == newest
        args = checkpoint.EmaSave(*saving_run.run(newest + 1))
        assert manager.save(newest + 1, args=args)
        manager.wait_until_finished()
    assert checkpoint.describe(tmp_path).step == newest + 1
    checkpoint.verify(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {str(newest), str(newest + 1)}


@contextlib.contextmanager
def _full_disk(size):
    """Lets this process write no file longer than a number of bytes."""
    resource = pytest.importorskip("resource", reason="limits need Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _listing(root):
    return {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file()
    }


# The kernels are 16 kB: with 10 kB they fail, with 700 bytes everything does.
@fails_on_purpose
@pytest.mark.parametrize("size", [10_000, 700])
def test_full_disk(root, size):
    """One clear error; earlier steps are whole; nothing of the new one is left."""
    before = _listing(root)
    with (
        _full_disk(size),
        pytest.raises(OSError, match=r"not write step 4 to .*; earlier steps") as e,
    ):
        checkpoint.save(root, *_run(4), step=4)
    assert len(str(e.value)) < 600
    assert _listing(root) == before
    assert {path.name for path in root.iterdir()} == {"1", "2", "3"}
    for step in (1, 2, 3):
        checkpoint.verify(root, step=step)
    checkpoint.save(root, *_run(4), step=4)  # once there is room again
    _assert_same(checkpoint.restore(root, like=MODEL), _shadow(4))


@fails_on_purpose
def test_full_disk_in_the_background(root):
    """Waiting raises it; the step before is found; later saves work."""
    with ocp.CheckpointManager(root) as manager:
        with _full_disk(10_000):
            manager.save(4, args=checkpoint.EmaSave(*_run(4)))
            with pytest.raises((OSError, ValueError), match=r"[Ff]ail|[Ww]rit"):
                manager.wait_until_finished()
        _assert_same(checkpoint.restore(root, like=MODEL), _shadow(3))
        manager.save(5, args=checkpoint.EmaSave(*_run(5)))
        manager.wait_until_finished()
    _assert_same(checkpoint.restore(root, like=MODEL), _shadow(5))
    checkpoint.verify(root)
    checkpoint.verify(root, step=3)


@fails_on_purpose
def test_a_manifest_that_cannot_be_written(root, monkeypatch):
    """It is part of the commit: without it there is no step."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    with ocp.CheckpointManager(root) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(saving, "write_sidecars", fail)
            manager.save(4, args=checkpoint.EmaSave(*_run(4)))
            with pytest.raises(OSError, match="No space left"):
                manager.wait_until_finished()
        assert checkpoint.describe(root).step == 3
        manager.save(5, args=checkpoint.EmaSave(*_run(5)))
        manager.wait_until_finished()
    _assert_same(checkpoint.restore(root, like=MODEL), _shadow(5))


@fails_on_purpose
def test_a_save_that_fails_at_once(root, monkeypatch):
    """It raises from `save`, leaves no thread waiting, and commits nothing."""

    def fail(*_, **__):
        raise MemoryError("no room for a copy")

    with ocp.CheckpointManager(root) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(saving.checksums, "host_parts", fail)
            with pytest.raises(MemoryError, match="no room for a copy"):
                manager.save(4, args=checkpoint.EmaSave(*_run(4)))
        assert checkpoint.describe(root).step == 3
        manager.save(5, args=checkpoint.EmaSave(*_run(5)))
        manager.wait_until_finished()
    _assert_same(checkpoint.restore(root, like=MODEL), _shadow(5))


def test_a_step_that_is_there_is_not_overwritten(root):
    """Neither a checkpoint nor somebody's files in a folder of that name."""
    (root / "4").mkdir()
    (root / "4" / "thesis.txt").write_text("precious")
    before = _listing(root)
    for step in (3, 4):
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            checkpoint.save(root, *_run(1), step=step)
    assert _listing(root) == before
    assert (root / "4" / "thesis.txt").read_text() == "precious"


def test_places_where_nothing_can_be_written(tmp_path):
    """A file where a folder should be: an OSError that names it; the file stays."""
    file = tmp_path / "file"
    file.write_text("precious")
    for place in (file, file / "below"):
        with pytest.raises(OSError, match=r"Could not write step 0 to .*file"):
            checkpoint.save(place, *_run(1))
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [file]


def test_places_where_nothing_is(tmp_path):
    """Each reader says what it found there, and makes nothing."""
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "empty").mkdir()
    unfinished = tmp_path / "unfinished" / "7.orbax-checkpoint-tmp"
    (unfinished / "default" / "ema_optax").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for place, text in {
        "nothing": "does not exist",
        "file": "is a file",
        "empty": "holds no checkpoint",
        "unfinished": "holds no checkpoint",
    }.items():
        for name, read in READERS.items():
            if name != "manager":
                with pytest.raises(FileNotFoundError, match=text):
                    read(tmp_path / place)
        with pytest.raises(FileNotFoundError, match=text):
            checkpoint.describe(tmp_path / place, step=3)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_step_that_is_not_there(root):
    """The steps that are there are listed."""
    with pytest.raises(FileNotFoundError, match="no step 9; it has 1, 2, 3"):
        checkpoint.restore(root, step=9)


@fails_on_purpose
def test_steps_of_another_library(root):
    """They are not called damaged, nor passed over for an older step of ours."""
    with ocp.CheckpointManager(root) as manager:
        manager.save(4, args=ocp.args.PyTreeSave(_run(4)[0]))
        manager.wait_until_finished()
    text = "was not saved by ema_optax"
    for name, read in READERS.items():
        if name != "manager":
            with pytest.raises(ValueError, match=f"Step 4 .*{text}.*1, 2, 3"):
                read(root)
    with (
        ocp.CheckpointManager(root) as manager,
        pytest.raises(ValueError, match=text) as caught,
    ):
        manager.restore(4, args=checkpoint.EmaRestore(like=MODEL))
    assert not isinstance(caught.value, CorruptCheckpointError)
    _assert_same(checkpoint.restore(root, like=MODEL, step=3), _shadow(3))


def test_the_newest_of_steps_without_a_manager(tmp_path):
    """Their folders are items themselves: by number, and only what is committed."""
    with ocp.AsyncCheckpointer(checkpoint.EmaHandler()) as checkpointer:
        for step in (9, 10, 11):
            args = checkpoint.EmaSave(*_run(step), extra=step)
            checkpointer.save(tmp_path / str(step), args=args)
        checkpointer.wait_until_finished()
    for name in ("1.orbax-checkpoint-tmp", "best"):
        shutil.copytree(tmp_path / "9", tmp_path / name)
    assert checkpoint.describe(tmp_path).extra == 11
    assert checkpoint.describe(tmp_path / "best").extra == 9
    for place, step in ((tmp_path, None), (tmp_path / "10", None), (tmp_path, 10)):
        found = checkpoint.describe(place, step=step)
        assert found.step == (11 if place == tmp_path and step is None else 10)
        assert found.extra == found.step


def test_a_newer_format(root):
    """Not damage: the error says which version of the library reads it."""
    _reseal(
        _manifest(_item(root)), lambda c: c.update(format=3, version="9.1.0", new=[])
    )
    for read in (*READERS.values(), checkpoint.describe):
        with pytest.raises(ValueError, match=r"'ema-optax>=9\.1\.0'") as caught:
            read(root)
        assert not isinstance(caught.value, CorruptCheckpointError)


@pytest.mark.parametrize("step", [100, 200])
def test_format_1_is_read(step):
    """Checkpoints of version 0.1.0 come back to the bit; see programs/format_1.py."""
    folder, params = format_1.FOLDER, format_1.params()
    model = jax.eval_shape(format_1.params)
    before = _listing(folder)
    checkpoint.verify(folder, step=step)
    got = checkpoint.restore(folder, "params", like=model, step=step)
    _assert_same(got, params)
    names = {"shadow": 0.0} if step == 100 else {"shadow/fast": 0, "shadow/slow": 32}
    for name, offset in names.items():
        got = checkpoint.restore(folder, name, like=model, step=step)
        state = ema_optax.EmaParamsState(jnp.int32(0), format_1.shadow(offset))
        _assert_same(got, ema_optax.shadow_params(state, params))
    optimizer = format_1.optimizer(step)
    got = checkpoint.resume(folder, params, optimizer.init(params), step=step)
    _assert_same(got, (params, format_1.opt_state(step)))
    assert _listing(folder) == before


def test_format_1_is_described():
    """Everything that is there to know without reading an array."""
    found = checkpoint.describe(format_1.FOLDER)
    assert (found.step, found.version, found.format) == (200, "0.1.0", 1)
    assert found.extra == format_1.EXTRA
    assert sorted(found.trees) == ["params", "shadow/fast", "shadow/slow"]
    assert found.trees["shadow/fast"].decay == ema_optax.constant(0.9)
    assert found.trees["shadow/slow"].decay == ema_optax.power(exponent=6.94)
    assert found.trees["shadow/fast"].every == 2
    assert found.trees["shadow/slow"].count == 200
    assert dict(found.trees["params"].leaves) == {
        "dense/kernel": checkpoint.Leaf((2, 3), "float32"),
        "dense/bias": checkpoint.Leaf((3,), "bfloat16"),
        "layers/0": checkpoint.Leaf((1,), "float32"),
        "layers/1": checkpoint.Leaf((2,), "float32"),
        "seen": checkpoint.Leaf((), "int32"),
        "key": checkpoint.Leaf((), "uint32", key="threefry2x32"),
    }
    assert found.trees["shadow/slow"].bytes == 4 * (6 + 3 + 1 + 2)
    older = checkpoint.describe(format_1.FOLDER, step=100).trees["shadow"]
    assert (older.decay, older.count) == (ema_optax.warmup(0.999), 100)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ([], "no format"),
        ({"format": "1"}, "no format"),
        ({"format": 1, "version": "0.1.0"}, "'processes' is missing"),
        (
            {"format": 1, "version": "", "processes": 1, "averages": {}, "trees": {}},
            "it has no trees",
        ),
    ],
)
def test_a_sealed_manifest_that_says_nothing(tmp_path, content, wrong):
    """Well sealed and yet no manifest: damage, said in one line."""
    state = ema_optax.ema_params(0.9).init({"w": jnp.ones(2)})
    checkpoint.save(tmp_path, {"w": jnp.ones(2)}, state)
    item = epath.Path(tmp_path / "0" / "default")
    sealed.write_sealed(manifest.manifest_path(item), content)
    with pytest.raises(checkpoint.CorruptCheckpointError, match=wrong):
        checkpoint.describe(tmp_path)
