"""A training run on any number of processes; test_many_hosts starts it.

python -m tests.programs.many_hosts RANK PORT COUNT FOLDER

Its gradients are exact: sums of small whole numbers over a batch of a power of two, the
same in whatever order devices add them up. So a run that goes on, in the layout that it
had, must hold what the one that was not interrupted held, to the bit.
"""

import functools
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1

import ema_optax
from ema_optax import checkpoint, placement
from ema_optax._checkpoint import saving
from tests import launch

STEPS, BREAK = 5, 3  # of a run; and where others go on, saved from there on
BATCH, WIDTH, OUT = 16, 32, 48
# Between layouts: XLA fuses other operations, and a fused a·b + c is rounded once. One
# step more or less moves every leaf by at least 1e-3; they are seen to differ by 2e-7.
ROUNDING = 1e-6
OPTIMIZER = optax.chain(
    optax.adam(0.01),
    ema_optax.ema_params(0.9, shadow_sharding=placement.over_axis("data")),
)


def device_mesh(*axes):
    """Returns a mesh of all devices: over "data", or in two columns over "model"."""
    devices = np.array(jax.devices())
    return Mesh(devices.reshape((-1, 2)[: len(axes)]), axes)


def layouts():
    """Returns where params can live, by name: mesh, and spec of the matrices."""
    found = {
        "spread": (device_mesh("data"), P()),  # only the shadow is sharded: ZeRO 1
        "fsdp": (device_mesh("data"), P("data")),
    }
    if jax.device_count() > 1:
        found["model"] = (device_mesh("data", "model"), P(None, "model"))
    return found


def initial():
    """Returns the params that every run starts with."""
    rng = np.random.default_rng(0)
    return {
        "dense": {
            "kernel": rng.normal(size=(WIDTH, OUT)).astype(np.float32),
            "bias": rng.normal(size=OUT).astype(np.float32),
        },
        "scale": rng.normal(size=3).astype(np.float32),  # no axis divides it
    }


def place(leaf, mesh, spec):
    """Returns where a layout puts a param."""
    return NamedSharding(mesh, spec if leaf.ndim == 2 else P())


def started(mesh, spec):
    """Returns params where a layout puts them, and a new optimizer state."""

    def put(leaf):
        here = place(leaf, mesh, spec)
        return jax.make_array_from_callback(leaf.shape, here, lambda i: leaf[i])

    params = jax.tree.map(put, initial())
    return params, OPTIMIZER.init(params)


def loss(params, x, y):
    """Returns a loss whose gradient, ∑ x·sign(residual) / 16, has no rounding."""
    residual = x @ params["dense"]["kernel"] + params["dense"]["bias"] - y
    shift = params["scale"] - x[:, :3].mean(axis=0)
    return jnp.abs(residual).sum(axis=1).mean() + (shift**2).sum()


@functools.cache
def trainer(mesh, spec):
    """Returns a step, compiled for a layout, that donates its state."""

    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    places = jax.tree.map(lambda leaf: place(leaf, mesh, spec), initial())
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=(places, None))


def batch(mesh, step):
    """Returns the batch of a step; each process makes the rows of its devices."""
    rng = np.random.default_rng(step)
    rows = NamedSharding(mesh, P("data"))
    x = rng.integers(-4, 5, size=(BATCH, WIDTH)).astype(np.float32)
    y = rng.integers(-30, 31, size=(BATCH, OUT)).astype(np.float32)
    return [
        jax.make_array_from_callback(whole.shape, rows, lambda i, w=whole: w[i])
        for whole in (x, y)
    ]


def train(layout, params, state, steps, each=lambda *_: None):
    """Trains on, and hands what there is after each step to `each`."""
    mesh, step = layout[0], trainer(*layout)
    for number in steps:
        params, state = step(params, state, *batch(mesh, number))
        each(number, params, state)
    return params, state


def whole(tree):
    """Returns every leaf in full, by its path, on every process."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    gathered = gather()([leaf for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for (path, _), leaf in zip(leaves, gathered, strict=True)
    }


@functools.cache
def gather():
    """Returns a function that gives every device every leaf, compiled once a tree."""
    everywhere = NamedSharding(device_mesh("all"), P())
    return jax.jit(lambda leaves: leaves, out_shardings=everywhere)


def assert_same(tree, expected, name):
    """Asserts that a tree has the bits that were recorded under a name."""
    found = {f"{name}/{path}": value for path, value in whole(tree).items()}
    assert set(found) == {path for path in expected if path.startswith(f"{name}/")}
    for path, value in found.items():
        assert value.dtype == expected[path].dtype
        assert value.tobytes() == expected[path].tobytes(), path


def assert_near(found, expected):
    """Asserts that each leaf is within the rounding between layouts."""
    for path, value in found.items():
        off = np.abs(np.float64(value) - expected[path]).max()
        assert off <= ROUNDING * np.abs(expected[path]).max(), path


def assert_placed(tree, like):
    """Asserts that each leaf has the sharding that was asked for."""
    for leaf, slot in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(slot.sharding, leaf.ndim)


def record(run, step, params, state):
    """Writes down all that a run holds and all that can be restored of it, by name."""
    trees = {"params": params, "shadow": state[1].shadow}
    found = whole({"run": (params, state), **trees})
    if jax.process_index() == 0:
        np.savez(run.with_name(f"{run.name}_{step}.npz"), **found)


def recorded(run, step):
    """Returns what a run in one layout held after a step, never interrupted."""
    with np.load(run.with_name(f"{run.name}_{step}.npz")) as file:
        return dict(file)


def go_on(source):
    """Resumes a run in every layout, restores its trees, and trains to the end."""
    step, expected, end = BREAK, recorded(source, BREAK), recorded(source, STEPS)
    for name, layout in layouts().items():
        like = started(*layout)
        for tree in ("params", "shadow"):
            got = checkpoint.restore(source, tree, like=like[0], step=step)
            assert_placed(got, like[0])
            assert_same(got, expected, tree)
        params, state = checkpoint.resume(source, *like, step=step)
        assert_placed((params, state), like)
        assert_same((params, state), expected, "run")
        kernels = params["dense"]["kernel"], state[1].shadow["dense"]["kernel"]
        parts = [kernel.addressable_shards[0].data.size for kernel in kernels]
        n = WIDTH * OUT // jax.device_count()
        both = {"spread": [WIDTH * OUT, n], "fsdp": [n, n], "model": [WIDTH * OUT // 2]}
        assert parts == (both[name] + [n])[:2]
        got = train(layout, params, state, range(step + 1, STEPS + 1))
        if source.name == name and jax.device_count() == 4:
            assert_same(got, end, "run")
        assert_near({f"run/{path}": leaf for path, leaf in whole(got).items()}, end)


def uninterrupted(folder):
    """Trains in each layout, saving in the background, and records what there was."""
    for name, layout in layouts().items():
        with ocp.CheckpointManager(folder / name) as manager:

            def each(step, params, state, name=name, manager=manager):
                if step >= BREAK:
                    manager.save(step, args=checkpoint.EmaSave(params, state))
                    record(folder / name, step, params, state)

            train(layout, *started(*layout), range(1, STEPS + 1), each)
            manager.wait_until_finished()
    multihost_utils.sync_global_devices("recorded")


def reshard(folder):
    """Saves from one layout what another had saved, until it is back in the first."""
    source, every = folder / "spread", layouts()
    for name in ("model", "fsdp", "model", "spread"):
        run = checkpoint.resume(source, *started(*every[name]), step=BREAK)
        assert_same(run, recorded(folder / "spread", BREAK), "run")
        source = source / f"then_{name}"
        checkpoint.save(source, *run, step=BREAK)


def trains_during_a_v1_save(folder):
    """The background of a save has no collective that could meet those of a step."""
    saves, layout = [], layouts()["fsdp"]

    def each(step, *run):
        place, trees = folder / "v1" / str(step), {"default": checkpoint.EmaSave(*run)}
        saves.append(v1.save_checkpointables_async(place, trees))

    params, state = train(layout, *started(*layout), range(1, STEPS + 1), each)
    for save in saves:
        save.result(timeout=60)
    assert_same((params, state), recorded(folder / "fsdp", STEPS), "run")
    for number in (BREAK, STEPS):
        got = checkpoint.resume(folder / "v1", params, state, step=number)
        assert_same(got, recorded(folder / "fsdp", number), "run")


def flip(path, needle):
    """Flips a bit of the bytes that a file holds somewhere."""
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 5] ^= 4
    path.write_bytes(data)


def damages(item, expected):
    """Returns ways to damage an item, by name."""
    # What one device of process 1 wrote of the shadow, and reads if it is to have it.
    needle = expected["shadow/dense/kernel"][:, 36:].tobytes()
    files = [path for path in item.rglob("*") if path.is_file()]
    (data,) = [path for path in files if needle in path.read_bytes()]
    beside = item / "ema_optax"
    return {
        "a flipped bit": lambda: flip(data, needle),
        "a file cut short": lambda: data.write_bytes(data.read_bytes()[:100]),
        "a file gone": data.unlink,
        "checksums gone": (beside / "checksums" / "0.json").unlink,
        "a manifest cut short": lambda: (beside / "manifest.json").write_text("{"),
        "a manifest gone": (beside / "manifest.json").unlink,
    }


def one_reads_damage(view):
    """What one process cannot read is an error on both, which name the way out."""
    mesh, _ = layouts()["spread"]
    source = view.with_name("spread")
    expected = recorded(source, STEPS)
    columns = started(mesh, P(None, "data"))
    whole_kernel = started(mesh, P())
    for name, like in [
        ("a flipped bit", columns),
        ("a file cut short", columns),
        ("a file gone", columns),
        ("a flipped bit", whole_kernel),
        ("checksums gone", columns),
        ("a manifest cut short", columns),
        ("a manifest gone", whole_kernel),
    ]:
        shutil.copytree(source, view)
        if jax.process_index() == 1:
            damages(view / str(STEPS) / "default", expected)[name]()
        multihost_utils.sync_global_devices(f"{name} seen by one")
        for read in (
            lambda like=like: checkpoint.restore(view, like=like[0]),
            lambda like=like: checkpoint.resume(view, *like),
            lambda: checkpoint.verify(view),
        ):
            with pytest.raises(
                checkpoint.CorruptCheckpointError,
                match=f"Step {STEPS} .* is whole is {STEPS - 1}: pass step={STEPS - 1}",
            ):
                read()
        if jax.process_index() == 1 and "manifest" in name:  # and asks nobody
            for alone in (checkpoint.describe, checkpoint.stored):
                with pytest.raises(checkpoint.CorruptCheckpointError, match="manifest"):
                    alone(view)
        got = checkpoint.restore(view, like=like[0], step=STEPS - 1)
        assert_same(got, recorded(source, STEPS - 1), "shadow")
        print("refused:", name, flush=True)
        shutil.rmtree(view)


def one_finds_nothing(view):
    """A folder, a step or an item that only one of them sees is an error on both."""
    like, other = started(*layouts()["fsdp"]), jax.process_index() == 1
    folder = view.parent
    for read in (checkpoint.restore, checkpoint.resume):
        args = like[:1] if read is checkpoint.restore else like
        first = ("shadow", *args) if read is checkpoint.restore else args
        here = view if other else folder / "fsdp"
        with pytest.raises(RuntimeError, match="process 0 5, process 1 none"):
            read(here, *first)
        with pytest.raises(RuntimeError, match="process 0 5, process 1 none"):
            read(folder / "fsdp", *first, step=60 if other else STEPS)
        with pytest.raises(ValueError, match="ask for different steps"):
            read(folder / "fsdp", *first, step=BREAK if other else STEPS)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read(folder / "nothing", *first)
    shutil.copytree(folder / "fsdp", view)
    if other:  # a file system that shows the newest step late, then only to process 1
        shutil.move(view / str(STEPS), view / "late")
    multihost_utils.sync_global_devices("one sees an older step")
    with pytest.raises(RuntimeError, match="process 0 5, process 1 none"):
        checkpoint.resume(view, *like)
    if other:
        shutil.move(view / "late", view / str(STEPS))
    else:
        shutil.rmtree(view / str(STEPS))
    multihost_utils.sync_global_devices("the other one sees it")
    got = checkpoint.resume(view, *like)
    assert_same(got, recorded(folder / "fsdp", STEPS - 1), "run")
    item = view / str(STEPS - 1) / "default"
    if other:
        shutil.rmtree(item / "ema_optax")
    multihost_utils.sync_global_devices("one item is not ours")
    wrong = (ValueError, "not saved by ema") if other else (RuntimeError, "another pro")
    with pytest.raises(wrong[0], match=wrong[1]):
        checkpoint.EmaRestore(like=like[0]).read(item)
    shutil.rmtree(view)


def one_cannot_save(folder):
    """Both are told, nothing of it is committed, and the next save works."""
    params, state = started(*layouts()["fsdp"])
    other = jax.process_index() == 1

    def fail(*_):
        raise OSError(28, "No space left on device")

    def attempt(save, where, here, elsewhere):
        with pytest.MonkeyPatch.context() as patch:
            if other and where:
                patch.setattr(saving, where, fail)
            with pytest.raises(Exception, match=here if other else elsewhere):
                save()

    root = folder / "failing"
    checkpoint.save(root, params, state, step=1)
    told = "another process could not save its part"
    attempt(
        lambda: checkpoint.save(root, params, state, step=2, extra={1}),
        None,
        "extra must be JSON",
        "extra must be JSON",
    )
    extra = fail if other else None
    attempt(
        lambda: checkpoint.save(root, params, state, step=2, extra=extra),
        None,
        "extra must be JSON",
        told,
    )
    attempt(
        lambda: checkpoint.save(root, params, state, step=2),
        "write_sidecars",
        "Could not write step 2 .*No space left",
        f"Could not write step 2 .*{told}",
    )
    multihost_utils.sync_global_devices("after failed saves")
    assert [path.name for path in root.iterdir()] == ["1"]
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.options.AsyncOptions(timeout_secs=5)
    )
    manager = ocp.CheckpointManager(root, options=options)
    args = checkpoint.EmaSave(params, state)
    attempt(lambda: manager.save(2, args=args), "_host_parts", "No space", told)
    manager.save(3, args=args)
    manager.wait_until_finished()

    def in_the_background():
        manager.save(4, args=args)
        manager.wait_until_finished()

    # Which barrier ends first is left to chance. The processes are out of step then:
    # such a program has to start anew.
    late = "[Tt]imed out"
    attempt(in_the_background, "write_sidecars", f"No space left|{late}", late)


def main(rank, port, count, folder):
    """Goes on with runs of one process and of two; two processes also make theirs."""
    launch.join(rank, port, count=int(count))
    folder = pathlib.Path(folder)
    if count == "2":
        uninterrupted(folder)
        reshard(folder)
        trains_during_a_v1_save(folder)
    for source in ("spread", "fsdp", "model", "alone"):
        go_on(folder / source)
    if count == "2":
        view = folder / f"seen_by_{rank}"
        one_reads_damage(view)
        one_finds_nothing(view)
        one_cannot_save(folder)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
