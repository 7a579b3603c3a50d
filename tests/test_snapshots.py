"""Snapshots on disk: what is written, what is read back, and what is kept."""

import asyncio
import shutil
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint import v1
from orbax.checkpoint.checkpoint_manager import StepAlreadyExistsError

import ema_optax
from ema_optax import checkpoint, reconstruction
from ema_optax._checkpoint import background, sealed
from ema_optax.checkpoint import CorruptCheckpointError
from tests import launch, older, reference
from tests.same import assert_same

# After a failed read or write, callbacks of TensorStore find their event loop closed,
# and are reported as "Event loop is closed" when they are collected.
fails_on_purpose = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

GAMMA = {"narrow": 16.97, "wide": 6.94}
DECAYS = {name: ema_optax.power(exponent=g) for name, g in GAMMA.items()}
TRANSFORM = ema_optax.ema_params(DECAYS)
OPTIMIZER = optax.chain(optax.adam(0.1), TRANSFORM)


class Pair(typing.NamedTuple):
    left: typing.Any
    right: typing.Any


ODD = {
    "mlp/~/linear_0": {"w": jnp.zeros((5, 4)), "b.c": jnp.zeros(4)},
    "list": [jnp.zeros(2) for _ in range(11)],  # of which '10' comes after '9'
    "tuple": (jnp.zeros(3), None, {"x y%20#": jnp.zeros(2)}),
    "pair": Pair(jnp.zeros(2), jnp.zeros((1, 300))),
    "scalar": jnp.zeros(()),
    "complex": jnp.zeros(3, jnp.complex64),
    "naïve µ": jnp.zeros(2),
}


def state_of(params, count, transform=TRANSFORM):
    """A state whose shadows are noise of the count: half of them small numbers."""
    state, rng = transform.init(params), np.random.default_rng(count)

    def noise(leaf):
        values = rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-7, 3, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    shadow = jax.tree.map(noise, state.shadow)
    return state._replace(count=jnp.int32(count), shadow=shadow)


def save_snapshots(folder, counts, params=ODD, **options):
    with ocp.CheckpointManager(folder) as manager:
        for count in counts:
            args = checkpoint.SnapshotSave(state_of(params, count), **options)
            assert manager.save(count, args=args)
        manager.wait_until_finished()


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def size_of(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def data_file(folder, array):
    """Returns the one file that holds an array, and where in it."""
    wanted = np.asarray(array).tobytes()
    files = [p for p in folder.rglob("*") if p.is_file() and wanted in p.read_bytes()]
    [path] = files
    return path, path.read_bytes().index(wanted)


def flip(folder, array):
    path, offset = data_file(folder, array)
    data = bytearray(path.read_bytes())
    data[offset + 700] ^= 8
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_only_the_shadows_are_written(tmp_path, dtype):
    """Their bytes in that dtype, rounded once, and all there is to know of them."""
    params = {"w": jnp.ones((512, 600)), "b": jnp.ones(512), "n": jnp.int32(3)}
    state = state_of(params, 7)
    chain = optax.chain(optax.adam(0.1), optax.identity()).init(params), state
    with ocp.CheckpointManager(tmp_path) as manager:
        args = checkpoint.SnapshotSave(chain, dtype=dtype, extra={"run": (1, 2)})
        manager.save(3, args=args)
        manager.wait_until_finished()
    kind = jnp.dtype(dtype or "float32")
    stored = 2 * 513 * 512 * kind.itemsize + 2 * (600 - 513) * 512 * kind.itemsize
    stored += 2 * 512 * kind.itemsize
    assert stored <= size_of(tmp_path) <= 1.05 * stored
    found = checkpoint.describe(tmp_path)
    assert (found.step, found.extra) == (3, {"run": [1, 2]})
    assert set(found.trees) == {"shadow/narrow", "shadow/wide"}
    assert not found.state.leaves
    for name, shadow in state.shadow.items():
        tree = found.trees[f"shadow/{name}"]
        assert (tree.decay, tree.every, tree.count) == (DECAYS[name], 1, 7)
        assert tree.leaves["w"] == checkpoint.Leaf((512, 600), kind.name)
        restored = checkpoint.restore(tmp_path, f"shadow/{name}")
        like = {"w": params["w"], "b": params["b"]}
        slot = checkpoint.restore(tmp_path, f"shadow/{name}", like=like)
        for leaf in ("w", "b"):
            once = np.asarray(shadow[leaf]).astype(kind)  # NumPy's rounding to nearest
            assert restored[leaf].dtype == kind
            assert bits(restored[leaf]) == bits(once)
            assert bits(slot[leaf]) == bits(once.astype(np.float32))


def test_what_is_asked_of_a_snapshot_in_vain(tmp_path):
    """Raw params, a run to resume, and leaves that were not averaged: said so."""
    params = {"w": jnp.ones(2), "n": jnp.int32(3)}
    save_snapshots(tmp_path, [4], params)
    with pytest.raises(ValueError, match="no tree 'params'; there are 'narrow', "):
        checkpoint.restore(tmp_path, "params", like=params)
    with pytest.raises(ValueError, match=r"no optimizer state.*EmaSave wrote"):
        checkpoint.resume(tmp_path, params, TRANSFORM.init(params))
    with pytest.raises(ValueError, match="no leaf 'n' in the shadow/wide"):
        checkpoint.restore(tmp_path, "shadow/wide", like=params)
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.raises(ValueError, match="no tree 'shadow'; there are"):
            manager.restore(4, args=checkpoint.EmaRestore(like=params))
        with pytest.raises(ValueError, match="no tree 'params'; there are"):
            manager.restore(4)
        assert manager.item_metadata(4) is None
    state = TRANSFORM.init(params)
    for dtype in ("int8", "float64", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=f"float16, bfloat16, .*got {dtype}"):
            checkpoint.SnapshotSave(state, dtype=dtype).contents()
    with pytest.raises(ValueError, match="no shadow in this optimizer state"):
        checkpoint.SnapshotSave(optax.adam(0.1).init(params)).contents()
    with pytest.raises(TypeError, match="extra must be JSON"):
        checkpoint.SnapshotSave(state, extra=state).contents()


def test_a_narrow_shadow_is_not_widened(tmp_path):
    """bfloat16 stays bfloat16 where float32 is allowed, and complex stays complex."""
    transform = ema_optax.ema_params(DECAYS["wide"], shadow_dtype="bfloat16")
    params = {"w": jnp.ones(2000), "z": jnp.ones(3, jnp.complex64)}
    state = state_of(params, 2, transform)
    for step, dtype in enumerate(("float32", "float16", None)):
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(step, args=checkpoint.SnapshotSave(state, dtype=dtype))
        restored = checkpoint.restore(tmp_path, "shadow")
        assert restored["w"].dtype == jnp.bfloat16
        assert bits(restored) == bits(state.shadow)
    kinds = {snapshot.dtype for snapshot in checkpoint.snapshots(tmp_path)}
    assert kinds == {np.dtype(ml_dtypes.bfloat16)}


STRANGER = """
import sys, warnings, absl.logging
absl.logging.set_verbosity("fatal")
warnings.simplefilter("ignore")
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
root, number = sys.argv[1:]
step, item = f"{root}/{number}", f"{root}/{number}/default"
number = int(number)
load_raw = getattr(v1, "load", v1.load_pytree)
for load in (
    lambda: load_raw(step),
    lambda: load_raw(item),
    lambda: v1.load_checkpointables(step)["default"],
    lambda: ocp.CheckpointManager(root).restore(number),
    lambda: ocp.CheckpointManager(root).restore(number, args=ocp.args.PyTreeRestore()),
    lambda: ocp.CheckpointManager(root).restore(
        number, args=ocp.args.StandardRestore()),
    lambda: ocp.PyTreeCheckpointer().restore(item),
    lambda: ocp.StandardCheckpointer().restore(item),
    lambda: ocp.StandardCheckpointer().restore(step),
):
    try:
        tree = load()
        print(sorted(tree), float(tree["w"].sum()))
    except (ValueError, KeyError, FileNotFoundError) as error:
        print("error", type(error).__name__)
assert not [name for name in sys.modules if name.startswith("ema_optax")]
"""


def as_a_stranger(folder, step):
    """Returns a line for each way to load a step without this library."""
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(step)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.long
def test_a_stranger_gets_no_average_for_the_model(tmp_path):
    """Whoever loads a snapshot without this library meets an error."""
    save_snapshots(tmp_path, [4], {"w": jnp.ones(2)})
    lines = as_a_stranger(tmp_path, 4)
    assert len(lines) == 9
    assert {line.split()[0] for line in lines} == {"error"}, lines


@pytest.mark.long
def test_a_stranger_gets_the_one_average_that_was_saved(tmp_path):
    """`save_average`: by every name, stored once, and nothing is overwritten."""
    rng = np.random.default_rng(0)
    tree = {"w": jnp.asarray(rng.normal(size=(300, 100)), jnp.float32), "n": 3}
    decay = ema_optax.power(0.03)
    checkpoint.save_average(tmp_path, tree, step=40, decay=decay, extra="note")
    assert size_of(tmp_path) < 1.2 * tree["w"].nbytes
    data_file(tmp_path, tree["w"])  # in one file alone
    for name in ("params", "shadow"):
        restored = checkpoint.restore(tmp_path, name, like=tree)
        assert jax.tree.structure(restored) == jax.tree.structure(tree)
        assert bits(restored) == bits(tree)
        source = checkpoint.stored(tmp_path, name)
        assert set(source.leaves) == {"w"}
        assert bits(reconstruction.merge([source], [1.0])) == bits(tree["w"])
    found = checkpoint.describe(tmp_path)
    assert (found.step, found.extra) == (40, "note")
    average = found.trees["shadow"]
    assert (average.decay, average.count, average.leaves) == (decay, 40, {})
    checkpoint.verify(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="40 exists, and nothing is overwritten"):
        checkpoint.save_average(tmp_path, {"w": jnp.ones(2)}, step=40)
    assert sorted(tmp_path.rglob("*")) == before
    assert bits(checkpoint.restore(tmp_path, like=tree)) == bits(tree)
    with pytest.raises(ValueError, match="no optimizer state"):
        checkpoint.resume(tmp_path, tree, TRANSFORM.init(tree))
    with pytest.raises(ValueError, match=r"it has shadow: power\(.*, 40 updates"):
        checkpoint.snapshots(tmp_path)  # its leaves are not those of a shadow alone
    lines = as_a_stranger(tmp_path, 40)
    values = [line.rsplit(" ", 1) for line in lines]
    for names, total in values[:1] + values[2:8]:  # not of an item, nor of a step's
        assert names == "['n', 'w']", lines
        assert float(total) == pytest.approx(float(tree["w"].sum()), rel=1e-6)


@pytest.mark.long
def test_an_average_beside_its_params(tmp_path):
    """`save_average(params=…)`: each under its name; params fill what is not averaged.

    Whoever loads the step without this library gets the params.
    """
    params = {"w": jnp.ones(2), "b": jnp.zeros(3, jnp.bfloat16), "n": jnp.int32(3)}
    average = {"w": jnp.full(2, 0.25), "b": jnp.full(3, 0.5, jnp.bfloat16)}
    checkpoint.save_average(tmp_path, average, params=params, step=40)
    for name, expected in (("params", params), ("shadow", {**params, **average})):
        assert bits(checkpoint.restore(tmp_path, name, like=params)) == bits(expected)
    shadow = checkpoint.describe(tmp_path).trees["shadow"]
    assert (shadow.decay, shadow.count, set(shadow.leaves)) == (None, 40, {"w", "b"})
    checkpoint.verify(tmp_path)
    with pytest.raises(ValueError, match="no optimizer state"):
        checkpoint.resume(tmp_path, params, TRANSFORM.init(params))
    values = [line.rsplit(" ", 1) for line in as_a_stranger(tmp_path, 40)]
    for names, total in values[:1] + values[2:8]:  # not of an item, nor of a step's
        assert names == "['b', 'n', 'w']"
        assert float(total) == 2  # of w


@pytest.mark.long
def test_training_goes_on_while_they_are_written(tmp_path):
    """Two managers in the background at once, unwaited for: each step is as it was.

    The buffers are donated to the next step, deleted, or overwritten where they are of
    NumPy: 2 MB a step, so that writing is not done when that happens.
    """
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=200_000), jnp.float32),
        "s": jnp.ones(()),
    }
    state = OPTIMIZER.init(params)
    table = np.zeros(20_000, np.float32)

    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.cos(p + state[1].count), params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    expected, last = {}, 8
    with (
        ocp.CheckpointManager(tmp_path / "run") as run,
        ocp.CheckpointManager(tmp_path / "small") as small,
    ):
        for number in range(1, last + 1):
            params, state = step(params, state)
            table += 1
            held = {"model": params, "table": table}, (state, table)
            expected[number] = jax.tree.map(np.array, held)
            # Saved in turns: neither manager is always the one that the other meets.
            saves = [
                (run, checkpoint.EmaSave(*held)),
                (small, checkpoint.SnapshotSave(held[1], dtype="float16")),
            ]
            for manager, args in saves[:: 1 if number % 2 else -1]:
                assert manager.save(number, args=args)
            if number % 3 == 0:
                copies = jax.tree.map(jnp.array, (params, state))
                jax.tree.map(lambda leaf: leaf.delete(), (params, state))
                params, state = copies
        run.wait_until_finished()
        small.wait_until_finished()
    blank = jax.eval_shape(OPTIMIZER.init, params)
    like = {"model": params, "table": table}
    for number, (model, (saved, _)) in expected.items():
        resumed = checkpoint.resume(tmp_path / "run", like, (blank, table), step=number)
        assert bits(resumed) == bits((model, (saved, model["table"])))
        for name, shadow in saved[1].shadow.items():
            small_one = tmp_path / "small" / str(number)
            restored = checkpoint.restore(small_one, f"shadow/{name}")
            assert bits(restored) == bits(
                jax.tree.map(lambda x: x.astype("f2"), shadow)
            )


def test_threads_that_await_one_folder(tmp_path):
    """One may find it to be awaited and await what another has put in its place."""
    gate = background.Gate()
    gate.opened.set()
    folder = background.GatedFolder(epath.Path(tmp_path), gate) / "item"
    there = asyncio.run(folder.await_creation())
    assert there == asyncio.run(there.await_creation()) == epath.Path(tmp_path / "item")
    assert not isinstance(
        there, v1.path.PathAwaitingCreation
    )  # for those who come later


@pytest.mark.long
def test_a_run_and_its_snapshot_in_one_step(tmp_path):
    """Two items of a Composite, step after step; each is whole."""
    params, args = {"w": jnp.ones(5000)}, ocp.args.Composite
    states = {number: state_of(params, number) for number in range(1, 6)}
    with ocp.CheckpointManager(tmp_path) as manager:
        for number, state in states.items():
            snapshot = checkpoint.SnapshotSave(state, dtype="bfloat16")
            model = checkpoint.EmaSave(params, state)
            assert manager.save(number, args=args(snapshot=snapshot, model=model))
        manager.wait_until_finished()
    for number, state in states.items():
        for item in ("snapshot", "model"):
            folder = tmp_path / str(number) / item
            checkpoint.verify(folder)
            restored = checkpoint.restore(folder, "shadow/wide")["w"]
            expected = np.asarray(state.shadow["wide"]["w"])
            narrow = item == "snapshot"
            assert bits(restored) == bits(
                expected.astype(ml_dtypes.bfloat16) if narrow else expected
            )


@fails_on_purpose
def test_what_float16_cannot_hold(tmp_path):
    """The save fails, where its error is met; no step says inf. Earlier ones stay."""
    params = {"w": jnp.ones(3), "deep": [jnp.ones((4, 5))]}
    state = state_of(params, 1)
    too_much = jax.tree.map(lambda x: x, state)
    too_much.shadow["wide"]["deep"][0] = jnp.zeros((4, 5)).at[2, 1].set(70000.0)
    wrong = r"'deep/0' of the shadow/wide does not fit float16.*dtype='bfloat16'"
    bad = checkpoint.SnapshotSave(too_much, dtype="float16")
    most = {"w": jnp.full(3, 65519.0), "deep": [jnp.full((4, 5), -65504.0)]}
    just = state._replace(shadow=dict.fromkeys(GAMMA, most))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=checkpoint.SnapshotSave(just, dtype="float16"))
        manager.save(2, args=bad)
        with pytest.raises(OverflowError, match=wrong):
            manager.wait_until_finished()
        manager.save(3, args=bad)
        with pytest.raises(OverflowError, match=wrong):
            manager.save(4, args=checkpoint.SnapshotSave(state, dtype="float16"))
        manager.save(5, args=checkpoint.SnapshotSave(too_much, dtype="bfloat16"))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 5]
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        with pytest.raises(OverflowError, match=wrong):
            manager.save(6, args=bad)
        assert manager.all_steps() == [1, 5]
    restored = checkpoint.restore(tmp_path, "shadow/wide", step=1)
    assert set(np.asarray(restored["w"])) == {np.float16(65504)}
    checkpoint.verify(tmp_path, step=5)


def test_a_diverged_run_in_float16_is_saved_as_it_is(tmp_path):
    """Params and optimizer state may hold inf: only what was rounded is refused."""
    params = {"w": jnp.asarray([1.0, jnp.inf, jnp.nan], jnp.float16)}
    optimizer = optax.chain(optax.trace(0.9), ema_optax.ema_params(0.9))
    state = optimizer.init({"w": jnp.ones(3, jnp.float16)})
    state = (state[0]._replace(trace=params), state[1])
    checkpoint.save(tmp_path / "now", params, state)
    with ocp.CheckpointManager(tmp_path / "later") as manager:
        manager.save(0, args=checkpoint.EmaSave(params, state))
    for folder in ("now", "later"):
        resumed = checkpoint.resume(tmp_path / folder, params, state)
        assert bits(resumed) == bits((params, state))


def facts(found):
    return [(snapshot.step, snapshot.exponent) for snapshot in found]


@pytest.mark.parametrize("every", [1, 10])
def test_a_snapshot_ends_at_the_last_fold(tmp_path, every):
    """Whatever the update it was saved at: the averages themselves tell."""
    path = np.random.default_rng(0).normal(size=(36, 3)).astype(np.float32)
    transform = ema_optax.ema_params(DECAYS, every=every)
    state = transform.init({"w": jnp.asarray(path[0])})
    update = jax.jit(transform.update)
    saved = {25: 7, 30: 8, 35: 9}  # after these updates, as steps of other numbers
    for t in range(1, 36):
        # Params that are replaced by the path, whose next point is the update.
        _, state = update({"w": jnp.asarray(path[t])}, state, {"w": jnp.zeros(3)})
        if t in saved:
            checkpoint.save(tmp_path, {"w": path[t]}, state, step=saved[t])
    found = checkpoint.snapshots(tmp_path)
    ends = [25, 30, 35] if every == 1 else [20, 30]
    names = ("wide", "narrow")  # in the order of their exponents
    assert facts(found) == sorted((end, GAMMA[n]) for end in ends for n in names)
    for snapshot, name in zip(found, 3 * names, strict=True) if every == 1 else ():
        read = snapshot.tree.read("w", (slice(None),))
        betas = reference.betas("power", 35, GAMMA[name])
        expected = reference.average(path[1 : snapshot.step + 1], betas)
        np.testing.assert_allclose(read, expected, rtol=3e-6)  # a step apart: 1e-1
    if every == 10:  # and the fold at 20 is what was saved at 25
        read = checkpoint.stored(tmp_path, "shadow/wide", step=7).read(
            "w", (slice(0, 3),)
        )
        betas = reference.betas("power", 35, GAMMA["wide"])
        expected = reference.average(path[1:26], betas, every)
        np.testing.assert_allclose(read, expected, rtol=3e-6)


def test_which_steps_and_names_are_snapshots(tmp_path):
    """Both kinds of steps; not those of others, nor shadows that were never folded."""
    params = {"w": jnp.ones(3)}
    save_snapshots(tmp_path, [0, 4, 30], params, dtype="float16")
    checkpoint.save(tmp_path, params, state_of(params, 20), step=90)  # of another run
    (tmp_path / "notes 7").mkdir()
    (tmp_path / "8.orbax-checkpoint-tmp").mkdir()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(100, args=ocp.args.PyTreeSave(params))  # the newest is no one's
    found = checkpoint.snapshots(tmp_path)
    both = [(step, g) for step in (4, 20, 30) for g in (6.94, 16.97)]
    assert facts(found) == both
    assert [snapshot.dtype for snapshot in found[::2]] == ["f2", "f4", "f2"]
    for names in (["wide"], ("wide", "other"), "wide"):
        wide = checkpoint.snapshots(tmp_path, names=names)
        assert facts(wide) == both[::2]
    assert facts(checkpoint.snapshots(tmp_path / "90")) == both[2:4]
    assert facts(checkpoint.snapshots(tmp_path / "90" / "default")) == both[2:4]
    never = r"folded at least once.*it has shadow/narrow: power\(.*\), 0 updates, shad"
    with pytest.raises(ValueError, match=never):
        checkpoint.snapshots(tmp_path / "0")
    with pytest.raises(ValueError, match=r"names w, ide .*has shadow/narrow: .*wide:"):
        checkpoint.snapshots(tmp_path, names=["w", "ide"])
    shutil.copytree(tmp_path / "100", tmp_path / "others" / "100")
    with pytest.raises(ValueError, match=r"Step 100 .* not saved by ema_optax"):
        checkpoint.snapshots(tmp_path / "others")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.snapshots(tmp_path / "nowhere")


def test_averages_that_are_no_snapshots(tmp_path):
    """Another decay, groups with decays of their own, members of a vmap: said so."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}

    def saved(state, step, params=params):
        checkpoint.save(tmp_path, params, state, step=step)
        return tmp_path / str(step)

    def groups(**decays):
        transforms = {n: ema_optax.ema_params(d) for n, d in decays.items()}
        both = optax.multi_transform(transforms, {"a": "a", "b": "b"})
        return both.update(params, both.init(params), params)[1]

    other = ema_optax.ema_params({"x": 0.9, "y": lambda step: 0.5})
    state = other.update(params, other.init(params), params)[1]
    with pytest.raises(
        ValueError, match=r"x: warmup\(decay=0.9.*y: another average, 1"
    ):
        checkpoint.snapshots(saved(state, 1))
    differ = groups(a=DECAYS["wide"], b=DECAYS["narrow"])
    with pytest.raises(ValueError, match="it has shadow: another average, 1 upd"):
        checkpoint.snapshots(saved(differ, 2))
    assert checkpoint.describe(tmp_path).trees["shadow"].decay is None
    assert bits(checkpoint.resume(tmp_path, params, differ)) == bits((params, differ))
    alike = groups(a=DECAYS["wide"], b=DECAYS["wide"])
    assert facts(checkpoint.snapshots(saved(alike, 3))) == [(1, 6.94)]
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    members = jax.vmap(ema_optax.ema_params(DECAYS["wide"]).init)(stacked)
    with pytest.raises(ValueError, match=r"under vmap, with counts \[0, 0\]"):
        checkpoint.snapshots(saved(members, 4, stacked))


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """Two snapshots of a tree with odd names, not to be touched."""
    folder = tmp_path_factory.mktemp("odd")
    save_snapshots(folder, [3, 6], ODD)
    return folder


@pytest.mark.parametrize("name", ["a b", "%20", "a#b?c&d", "snäpshöts 雪", "x%2Fy:z"])
def test_odd_names_of_folders_and_leaves(odd_run, tmp_path, name):
    """Read bit for bit, whole and in parts, whatever they are called."""
    folder = shutil.copytree(odd_run, tmp_path / name)
    checkpoint.verify(folder)
    found = checkpoint.snapshots(folder)
    assert [snapshot.step for snapshot in found] == [3, 3, 6, 6]
    for snapshot, shadow in zip(found[::2], ("wide", "wide"), strict=True):
        expected = state_of(ODD, snapshot.step).shadow[shadow]
        merged = reconstruction.merge([snapshot.tree], [1.0], params=ODD)
        assert jax.tree.structure(merged) == jax.tree.structure(ODD)
        assert bits(merged) == bits(expected)
    part = found[-1].tree.read("mlp/~/linear_0/w", (slice(1, 3), slice(None)))
    whole = state_of(ODD, 6).shadow["narrow"]["mlp/~/linear_0"]["w"]
    np.testing.assert_array_equal(part, whole[1:3])


def test_a_relative_folder(odd_run, monkeypatch):
    """Snapshots are read from where they were found, wherever the process goes on."""
    monkeypatch.chdir(odd_run.parent)
    found = checkpoint.snapshots(odd_run.name)
    monkeypatch.chdir("/")
    expected = state_of(ODD, 3).shadow["wide"]
    assert bits(reconstruction.merge([found[0].tree], [1.0], params=ODD)) == bits(
        expected
    )


def test_a_step_that_was_written_anew(tmp_path):
    """What is read is what is there now: nothing is kept of a removed folder."""
    for value in (1.0, 2.0):
        tree = {"w": jnp.full(5000, value), "b": jnp.full(3, value)}
        checkpoint.save_average(tmp_path, tree, step=1)
        source = checkpoint.stored(tmp_path)
        assert bits(reconstruction.merge([source], [1.0], params=tree)) == bits(tree)
        shutil.rmtree(tmp_path / "1")


MODEL = {"w": jnp.zeros((40, 50)), "b": jnp.zeros(30)}


@pytest.fixture
def four(tmp_path):
    save_snapshots(tmp_path, [10, 20, 30, 40], MODEL)
    return tmp_path


@fails_on_purpose
@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "remove"])
def test_damaged_data_is_found_on_reading(four, how):
    """The error names step and leaf, and comes through a reconstruction."""
    array = state_of(MODEL, 20).shadow["wide"]["w"]
    found = checkpoint.snapshots(four)
    path, offset = data_file(four / "20", array)
    if how == "flip":
        flip(four / "20", array)
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[: offset + 100])
    elif how == "delete":
        path.unlink()
    else:
        shutil.rmtree(four / "20")
    with pytest.raises(CorruptCheckpointError) as caught:
        reconstruction.reconstruct(found, width=0.11, params=MODEL)
    text = str(caught.value)
    assert "Leave this step out" in text
    assert f"{four / '20' / 'default'}" in text
    if how != "remove":
        assert f"Step 20 of {four} is damaged" in text
        assert "of the shadow/" in text
    assert len(text) < 1000
    rest = [snapshot for snapshot in found if snapshot.step != 20]
    reconstruction.reconstruct(rest, width=0.11, params=MODEL)
    if how == "flip":
        assert "leaf 'w' of the shadow/wide" in text
        unverified = checkpoint.snapshots(four, verify=False)
        read = unverified[2].tree.read("w", (slice(None), slice(None)))
        assert np.sum(read != np.asarray(array)) == 1


@fails_on_purpose
def test_a_damaged_manifest_is_found_at_once(four):
    """The step is named; with its folder elsewhere the others are used."""
    item = four / "30" / "default"
    whole = sealed.read_sealed(epath.Path(item / "ema_optax" / "manifest.json"))
    (item / "ema_optax" / "manifest.json").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match=r"Step 30 .*move its folder"):
        checkpoint.snapshots(four)
    # Sealed again with a shape that is another: still no part comes back wrong.
    whole["trees"]["shadow/wide"]["leaves"]["w"]["shape"] = [50, 40]
    sealed.write_sealed(epath.Path(item / "ema_optax" / "manifest.json"), whole)
    for verify in (True, False):
        source = checkpoint.stored(four, "shadow/wide", step=30, verify=verify)
        with pytest.raises(CorruptCheckpointError, match=r"'w' .* is \(40, 50\), its"):
            source.read("w", (slice(None), slice(None)))
    shutil.move(four / "30", four / "broken")
    assert [s.step for s in checkpoint.snapshots(four)][::2] == [10, 20, 40]


@pytest.mark.long
def test_stopped_and_resumed_the_snapshots_are_the_same(tmp_path):
    """Bit for bit; a manager passes over a step that is there: it is not replaced."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.cos(p + state[1].count), params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(folder, params, state, stop):
        saved = []
        with (
            ocp.CheckpointManager(folder / "run") as run,
            ocp.CheckpointManager(folder / "small") as small,
        ):
            for number in range(int(state[1].count) + 1, stop + 1):
                params, state = step(params, state)
                if number % 4 == 0:
                    run.save(number, args=checkpoint.EmaSave(params, state))
                if number % 2 == 0:
                    args = checkpoint.SnapshotSave(state, dtype="float16")
                    saved.append(small.save(number, args=args))
        return saved

    params = jax.tree.map(lambda x: x + 1.0, MODEL)
    start = params, OPTIMIZER.init(params)
    train(tmp_path / "straight", *start, 14)
    train(tmp_path / "stopped", *start, 11)
    again = checkpoint.resume(tmp_path / "stopped" / "run", *start)
    assert int(again[1][1].count) == 8
    # Step 10 is there: `save` returns False. Only with force is it an error.
    assert train(tmp_path / "stopped", *again, 14) == [False, True, True]
    with ocp.CheckpointManager(tmp_path / "stopped" / "small") as manager:
        args = checkpoint.SnapshotSave(again[1])
        with pytest.raises(StepAlreadyExistsError):
            manager.save(10, args=args, force=True)
    straight, stopped = (
        checkpoint.snapshots(tmp_path / run / "small")
        for run in ("straight", "stopped")
    )
    assert facts(straight) == facts(stopped)
    assert [snapshot.step for snapshot in straight][::2] == [2, 4, 6, 8, 10, 12, 14]
    for a, b in zip(straight, stopped, strict=True):
        for leaf, index in (("w", (slice(None),) * 2), ("b", (slice(None),))):
            assert bits(a.tree.read(leaf, index)) == bits(b.tree.read(leaf, index))


def thinned(steps, at_most):
    """Yields what is saved so far and what of it is kept, one save after another."""
    policy, kept = checkpoint.KeepSnapshots(at_most), []
    for number, step in enumerate(steps, start=1):
        kept = [*kept, step]
        infos = [types.SimpleNamespace(step=s) for s in kept]
        keep = policy.should_preserve(infos, context=None)
        kept = [s for s, k in zip(kept, keep, strict=True) if k]
        yield steps[:number], kept


@pytest.mark.parametrize("at_most", [2, 3, 8, 9, 32])
@pytest.mark.parametrize(
    ("first", "gap"), [(100, 100), (5, 7), (0, 10), (1_000_003, 250), (1, 1)]
)
def test_snapshots_are_kept_evenly(at_most, first, gap):
    """All while they are few; then evenly over the whole run, and the newest."""
    for saved, kept in thinned(list(range(first, first + 200 * gap, gap)), at_most):
        assert len(kept) <= at_most
        assert kept[-1] == saved[-1]
        if len(saved) <= at_most:
            assert kept == saved
            continue
        assert len(kept) >= at_most / 2
        gaps = np.diff(kept)
        assert len(set(gaps[:-1].tolist())) <= 1, kept
        assert gaps[-1] <= max(gaps[:-1], default=gaps[-1])
        if at_most >= 8:  # the run's beginning is not lost
            assert kept[0] - first < max(gaps)


IRREGULAR = {
    "saved more often later": [*range(1000, 20_000, 1000), *range(20_100, 90_000, 100)],
    "saved less often later": [*range(50, 9000, 50), *range(9000, 99_000, 300)],
    "and when told to stop": sorted({*range(100, 60_000, 100), 6137, 20_011, 41_903}),
    "by the clock": [1000 * i + (7919 * i) % 61 for i in range(1, 600)],
    "a long gap": [*range(100, 5000, 100), *range(90_000, 120_000, 100)],
}


@pytest.mark.parametrize("at_most", [16, 64])
@pytest.mark.parametrize("name", IRREGULAR)
def test_irregular_snapshots_are_kept_sensibly(at_most, name):
    """No part of the run that was saved is without: gaps of a few of its parts."""
    far = 4.5 if name == "a long gap" else 2.5
    for saved, kept in thinned(IRREGULAR[name], at_most):
        assert len(kept) <= at_most
        assert kept[-1] == saved[-1]
        part = (saved[-1] - saved[0]) / at_most
        nearest = np.abs(np.subtract.outer(saved, kept)).min(axis=1)
        assert nearest.max() <= far * part
    assert len(kept) >= at_most / 4 or name == "a long gap"


@pytest.mark.long
def test_a_manager_keeps_snapshots(tmp_path):
    """The policy as Orbax calls it, beside an interval of saves and a resumed run."""
    params = {"w": jnp.ones(3)}
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=7, preservation_policy=checkpoint.KeepSnapshots(at_most=4)
    )
    for stop in (45, 120):
        with ocp.CheckpointManager(tmp_path, options=options) as manager:
            for number in range(1 + (manager.latest_step() or 0), stop):
                args = checkpoint.SnapshotSave(state_of(params, number))
                manager.save(number, args=args)
            manager.wait_until_finished()
            kept = manager.all_steps()
        assert kept == ([14, 28, 42] if stop == 45 else [56, 112, 119])
    assert [s.step for s in checkpoint.snapshots(tmp_path)][::2] == kept
    with pytest.raises(ValueError, match="at_most ≥ 2, got 1"):
        checkpoint.KeepSnapshots(1)


def test_params_of_several_steps_are_merged(tmp_path):
    """Leaf by leaf from disk; a shadow with the params' leaves that it has not."""
    params = {"w": jnp.arange(6.0).reshape(2, 3), "raw": jnp.ones(2), "n": jnp.int32(3)}
    mask = {"w": True, "raw": False, "n": False}
    transform = ema_optax.ema_params(0.9, mask=mask)
    for step in (1, 2, 3):
        held = jax.tree.map(lambda x, step=step: x * step, params)
        checkpoint.save(tmp_path, held, transform.init(params), step=step)
    steps = [checkpoint.stored(tmp_path, "params", step=step) for step in (1, 2, 3)]
    assert steps[0].leaves["w"] == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert set(steps[0].leaves) == {"w", "raw"}
    merged = reconstruction.merge(steps, [0.5, 0.25, 0.25], params=params)
    np.testing.assert_array_equal(merged["w"], np.arange(6.0).reshape(2, 3) * 1.75)
    np.testing.assert_array_equal(merged["raw"], [1.75, 1.75])
    assert merged["n"] == 3
    shadow = checkpoint.stored(tmp_path, step=3)
    merged = reconstruction.merge([shadow], [1.0])
    np.testing.assert_array_equal(merged["w"], params["w"])
    np.testing.assert_array_equal(merged["raw"], [3.0, 3.0])
    with pytest.raises(ValueError, match="no tree 'shadow/fast'; there are 'params'"):
        checkpoint.stored(tmp_path, "shadow/fast")
    with pytest.raises(FileNotFoundError, match="no step 9; it has 1, 2, 3"):
        checkpoint.stored(tmp_path, step=9)


def test_a_tree_that_is_one_array(tmp_path):
    """Params without a container have a name on disk too."""
    older.skip_without_one_array()
    params, transform = jnp.arange(3.0), ema_optax.ema_params(DECAYS["wide"])
    state = state_of(params, 2, transform)
    checkpoint.save(tmp_path, params, state)
    [snapshot] = checkpoint.snapshots(tmp_path)
    merged = reconstruction.merge([snapshot.tree], [1.0], params=params)
    assert bits(merged) == bits(state.shadow)
    held = checkpoint.stored(tmp_path, "params")
    assert bits(reconstruction.merge([held], [1.0], params=params)) == bits(params)


def test_an_orbax_that_takes_no_bare_array(tmp_path, monkeypatch):
    """It asks for the truth of the params: the error says what helps, for these."""

    async def refuse(handler, directory, args):
        raise ValueError("Found empty item.")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", refuse)
    for params, told in (
        (jnp.arange(3.0), r"bare array \(Found .*pip install -U orbax-checkpoint"),
        ({"w": jnp.arange(3.0)}, r"as they were\. Found empty item"),
    ):
        with pytest.raises(OSError, match=told):
            checkpoint.save(tmp_path, params, state_of(params, 2))


def test_under_orbax_v1(tmp_path):
    """v1 writes the same snapshots, at once or in the background, and reads them."""
    states = {number: state_of(MODEL, number) for number in (1, 2, 3)}
    asked = {n: {"default": checkpoint.SnapshotSave(s)} for n, s in states.items()}
    v1.save_checkpointables(tmp_path / "1", asked[1])
    v1.save_checkpointables_async(tmp_path / "2", asked[2]).result()
    with v1.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(3, asked[3])
    found = checkpoint.snapshots(tmp_path, names=["wide"])
    assert facts(found) == [(1, 6.94), (2, 6.94), (3, 6.94)]
    for snapshot in found:
        merged = reconstruction.merge([snapshot.tree], [1.0], params=MODEL)
        assert bits(merged) == bits(states[snapshot.step].shadow["wide"])
    restore = {"default": checkpoint.EmaRestore("shadow/narrow", like=MODEL)}
    restored = v1.load_checkpointables(tmp_path / "2", restore)["default"]
    assert bits(restored) == bits(states[2].shadow["narrow"])
    with pytest.raises(KeyError) as caught:  # v1 wraps what a handler raises
        v1.load_checkpointables(tmp_path / "2")
    assert "no tree 'params'" in str(caught.value.__cause__)
    assert v1.checkpointables_metadata(tmp_path / "2").metadata["default"] is None


ON_EIGHT_DEVICES = """
import sys, pathlib, absl.logging
absl.logging.set_verbosity("fatal")
import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ema_optax
from ema_optax import checkpoint, reconstruction

root, devices = pathlib.Path(sys.argv[1]), np.array(jax.devices())
assert len(devices) == 8
def sharded(shape, *spec):
    names = ("d", "e")[: len(shape)]
    return NamedSharding(Mesh(devices.reshape(shape), names), PartitionSpec(*spec))

line = sharded((8,), "d")
params = {"w": jnp.zeros((16, 24)), "n": jnp.zeros(24, int), "s": jnp.zeros(())}
decays = {"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}
transform = ema_optax.ema_params(decays)
state, rng, kept = transform.init(params), np.random.default_rng(0), {}
with ocp.CheckpointManager(root) as manager:
    for count in (10, 20, 30):
        plain = {"w": rng.normal(size=(16, 24)).astype("f4"), "s": np.float32(count)}
        kept[count] = plain
        put = {"w": jax.device_put(plain["w"], line), "s": jnp.float32(count)}
        put["n"] = state.shadow["a"]["n"]  # the placeholder
        shadow = {"a": put, "b": jax.tree.map(lambda x: x / 4, put)}
        state = state._replace(count=jnp.int32(count), shadow=shadow)
        manager.save(count, args=checkpoint.SnapshotSave(state, dtype="float16"))
    manager.wait_until_finished()
found = checkpoint.snapshots(root)
snapshots = [
    reconstruction.Snapshot(c, s.exponent, jax.tree.map(lambda x: x / q, half), "f2")
    for c, tree in kept.items()
    for half in [jax.tree.map(lambda x: np.asarray(x, "f2"), tree)]
    for s, q in zip(found, (np.float16(4), np.float16(1)))
]
expected = reconstruction.reconstruct(snapshots, width=0.08)
assert [s.exponent for s in snapshots] == [s.exponent for s in found]
for low, high in ((0, 16), (2, 4), (2, 10), (3, 7), (1, 4)):  # of shards of two rows
    part = found[1].tree.read("w", (slice(low, high), slice(None)))
    np.testing.assert_array_equal(part, kept[10]["w"][low:high].astype("f2"))
for where in (line, sharded((8,)), sharded((8,), None, "d"), sharded((2, 4), "e", "d"),
              jax.sharding.SingleDeviceSharding(devices[3])):
    like = dict(params, w=jax.device_put(params["w"], where))
    got = reconstruction.reconstruct(found, width=0.08, params=like)
    assert got.tree["w"].sharding == where
    assert got.tree["w"].tobytes() == np.asarray(expected.tree["w"]).tobytes()
    assert float(got.tree["s"]) == float(expected.tree["s"])
    for shard in got.tree["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, expected.tree["w"][shard.index])
print("done")
"""


@pytest.mark.long
def test_sharded_snapshots_onto_other_shardings(tmp_path):
    """Written from eight devices, summed onto all of them, some, and one: the same."""
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=launch.on_cpu(8),
    )
    assert done.stdout == "done\n", done.stderr[-3000:]


def test_between_two_folds_there_is_one_snapshot(tmp_path):
    """Saved twice since the last fold, a shadow counts once, least rounded."""
    transform = ema_optax.ema_params(ema_optax.power(0.1), every=4)
    params = {"w": jnp.ones(3)}
    state = transform.init(params)
    with ocp.CheckpointManager(tmp_path) as manager:
        for step in range(1, 12):
            _, state = transform.update({"w": jnp.ones(3)}, state, params)
            if step in (5, 6, 9):
                dtype = None if step == 6 else "float16"
                manager.save(step, args=checkpoint.SnapshotSave(state, dtype=dtype))
        manager.wait_until_finished()
    found = checkpoint.snapshots(tmp_path)
    assert [(s.step, s.dtype.name) for s in found] == [(4, "float32"), (8, "float16")]


def test_an_average_of_a_part_of_the_params_is_saved_at_its_place(tmp_path):
    """Restored, and gone on with by a run that averages that part."""
    average = {"w": jnp.full(3, 5.0)}
    variables = {"params": {"w": jnp.ones(3)}, "batch_stats": jnp.zeros(2)}
    decay = ema_optax.warmup(0.9)
    checkpoint.save_average(tmp_path, average, params=variables, count=100, decay=decay)
    shadow = checkpoint.restore(tmp_path, "shadow", like=variables)
    assert_same(shadow, {**variables, "params": average})
    init = ema_optax.ema_params(0.9).init
    _, state = checkpoint.resume(
        tmp_path, variables, lambda v: init(v["params"]), missing="start"
    )
    assert state.count == 100
    assert_same(state.shadow, average)


@pytest.mark.parametrize(
    ("average", "params", "says"),
    [
        ("state", "w", "This is an optimizer state.*shadow_params"),
        ("state", None, "This is an optimizer state.*shadow_params"),
        ("w", "x", r"it has 'w' of shape \(3,\), and they lack it.*nearest are 'x'"),
        ("w", "short", r"it has 'w' of shape \(3,\), and theirs is \(2,\)"),
        ("w", "twice", "at several places: 'a', 'b'"),
        ("empty", None, "The average has no leaf"),
        ("none", "w", "The average has no leaf"),
    ],
)
def test_what_is_no_average_of_the_params_is_refused(average, params, says, tmp_path):
    """Before anything is written, and not at the first restore."""
    w = {"w": jnp.ones(3)}
    trees = {
        "state": optax.chain(optax.sgd(1.0), ema_optax.ema_params(0.9)).init(w),
        "w": w,
        "x": {"x": jnp.ones(3)},
        "short": {"w": jnp.ones(2)},
        "twice": {"a": w, "b": w},
        "empty": {},
        "none": None,
    }
    with pytest.raises(ValueError, match=says):
        checkpoint.save_average(
            tmp_path / "run", trees[average], params=trees.get(params)
        )
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_an_average_of_some_params_sits_at_its_own_paths(tmp_path):
    """Although it would fit a part of the params, too."""
    params = {"w": jnp.ones(3), "in": {"w": jnp.zeros(3)}}
    checkpoint.save_average(tmp_path, {"w": jnp.full(3, 5.0)}, params=params)
    assert set(checkpoint.describe(tmp_path).trees["shadow"].leaves) == {"w"}
