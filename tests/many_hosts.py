"""One of two processes that train on shared batches; test_many_hosts starts them.

python -m tests.many_hosts RANK PORT FOLDER WHEN

WHEN says at which moment of its second save one of them is killed: a name in `TRAPS`.
With "never" both go on to see what was saved on other meshes, and when it is damaged.
"""

import os
import pathlib
import shutil
import signal
import sys

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ema_optax
from ema_optax import checkpoint, placement
from ema_optax.checkpoint import saving

STEPS = 5  # of the whole run; each start of the processes does two and saves both
DECAYS = {"plain": ema_optax.warmup(0.9), "spread": ema_optax.power(0.1)}
OPTIMIZER = optax.chain(
    optax.adam(0.01),
    ema_optax.ema_params({"plain": DECAYS["plain"]}),
    ema_optax.ema_params(
        {"spread": DECAYS["spread"]}, shadow_sharding=placement.over_axis("data")
    ),
)
TREES = ("params", "shadow/plain", "shadow/spread")

# How process 1 sees its copy of a step damaged, and what it is restored onto.
COLUMNS, EVERYWHERE = P(None, "data"), P()
SEEN = (
    ("flipped", COLUMNS),
    ("cut", COLUMNS),
    ("gone", COLUMNS),
    ("flipped", EVERYWHERE),
    ("no checksums", COLUMNS),
    ("no manifest", COLUMNS),
)


def model():
    """Returns the params of an MLP: large enough for data files, and odd."""
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "hidden": {"kernel": drawn(32, 48), "bias": drawn(48)},
        "output": {"kernel": drawn(48, 8), "bias": drawn(8)},
        "scale": drawn(3),  # no axis divides it
    }


def started(mesh):
    """Returns params that every device of a mesh has, and the optimizer's state."""
    params = jax.device_put(model(), NamedSharding(mesh, P()))
    return params, OPTIMIZER.init(params)


def loss(params, x, y):
    """Returns the mean over the batches of all processes."""
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    out = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return jnp.mean((params["scale"].sum() * out - y) ** 2)


@jax.jit(donate_argnums=(0, 1))
def train_step(params, state, x, y):
    """Returns params and state after one update."""
    grads = jax.grad(loss)(params, x, y)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def batch(mesh, step):
    """Returns a batch of which each process has read its own half."""
    rng = np.random.default_rng((step, jax.process_index()))
    rows = NamedSharding(mesh, P("data"))
    return [
        jax.make_array_from_process_local_data(
            rows, rng.normal(size=(8, width)).astype(np.float32)
        )
        for width in (32, 8)
    ]


def whole(tree):
    """Returns every leaf in full, by its path, on every process."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    everywhere = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), P())
    gathered = jax.jit(lambda leaves: leaves, out_shardings=everywhere)(
        [leaf for _, leaf in leaves]
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for (path, _), leaf in zip(leaves, gathered, strict=True)
    }


def named(params, state):
    """Returns what a checkpoint of a run holds, by names that the tests use."""
    shadows = {
        f"shadow/{name}": ema_optax.shadow_params(state, params, name=name)
        for name in DECAYS
    }
    return whole({"run": (params, state), "trees": {"params": params, **shadows}})


def assert_same(tree, expected, prefix):
    """Asserts that a tree has the bits that were recorded under a prefix."""
    found = whole(tree)
    assert {f"{prefix}/{path}" for path in found} == {
        path for path in expected if path.startswith(f"{prefix}/")
    }
    for path, value in found.items():
        assert value.dtype == expected[f"{prefix}/{path}"].dtype
        assert value.tobytes() == expected[f"{prefix}/{path}"].tobytes(), path


def recorded(folder, step):
    """Returns what the run that was not interrupted held after a step."""
    with np.load(folder / f"expected_{step}.npz") as file:
        return dict(file)


def record(folder, mesh):
    """Trains without a checkpoint, and writes down what there is after each step."""
    params, state = started(mesh)
    for step in range(1, STEPS + 1):
        params, state = train_step(params, state, *batch(mesh, step))
        found = named(params, state)
        if jax.process_index() == 0:
            np.savez(folder / f"expected_{step}.npz", **found)
    multihost_utils.sync_global_devices("recorded")


def die(*_, **__):
    """Ends this process as a machine that fails does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_writing():
    """Process 1 is killed when it is asked for its part, and has written nothing."""
    if jax.process_index() == 1:
        checkpoint.EmaHandler.async_save = die


def before_the_commit():
    """Process 1 is killed when its part is on disk, and process 0 waits for it."""
    if jax.process_index() != 1:
        return
    save = checkpoint.EmaHandler.async_save

    class Written:
        def __init__(self, futures):
            self.futures = futures

        def result(self, timeout=None):
            for future in self.futures:
                future.result(timeout)
            die()

    async def save_and_die(self, directory, args):
        return [Written(await save(self, directory, args))]

    checkpoint.EmaHandler.async_save = save_and_die


def in_the_commit():
    """Process 0 is killed when all is written and merged, but not yet renamed."""
    finalize = saving.finalize

    def finalize_and_die(*args):
        finalize(*args)
        die()

    saving.finalize = finalize_and_die


TRAPS = {
    "before_writing": before_writing,
    "before_the_commit": before_the_commit,
    "in_the_commit": in_the_commit,
}


def train(folder, mesh, when):
    """Goes on after the newest step of a run for two, bit for bit."""
    params, state = started(mesh)
    with ocp.CheckpointManager(folder / "run") as manager:
        done = manager.latest_step() or 0
        if done:
            params, state = checkpoint.resume(folder / "run", params, state)
            assert_same((params, state), recorded(folder, done), "run")
        for step in (done + 1, done + 2):
            params, state = train_step(params, state, *batch(mesh, step))
            for leaf in jax.tree.leaves(params):
                assert leaf.sharding.is_fully_replicated
            for path, size in (("hidden", 32 * 12), ("output", 12 * 8)):
                kernel = state[2].shadow["spread"][path]["kernel"]
                assert kernel.addressable_shards[0].data.size == size
            assert_same((params, state), recorded(folder, step), "run")
            if step == done + 2 and when in TRAPS:
                TRAPS[when]()
            manager.save(step, args=checkpoint.EmaSave(params, state))
            manager.wait_until_finished()
    return params, state


def targets(run, mesh, spec):
    """Returns an abstract run whose matrices are sharded by a spec."""

    def placed(leaf):
        here = spec if leaf.ndim == 2 else P()
        sharding = NamedSharding(mesh, here)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, run)


def assert_placed(tree, like):
    """Asserts that each leaf has the sharding that was asked for."""
    for leaf, slot in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == slot.sharding


def reshard(folder, mesh):
    """One process → two, replicated → over the data axis → over the model axis."""
    params, state = started(mesh)
    alone = checkpoint.resume(folder / "alone", params, state)
    assert_same(alone, recorded(folder, 3), "run")

    expected = recorded(folder, STEPS)
    square = jax.make_mesh((2, 2), ("data", "model"))
    source = folder / "run"
    for name, on, spec in (
        ("data", mesh, P("data")),
        ("model", square, P(None, "model")),
        ("both", square, P("model", "data")),
    ):
        like = targets(alone, on, spec)
        for tree in TREES:
            got = checkpoint.restore(source, tree, like=like[0])
            assert_same(got, expected, f"trees/{tree}")
            assert_placed(got, like[0])
        run = checkpoint.resume(source, *like)
        assert_placed(run, like)
        assert_same(run, expected, "run")
        source = folder / name  # what the next one reads
        checkpoint.save(source, *run, step=STEPS)


def flip(path, needle):
    """Flips a bit of the bytes that a file holds somewhere."""
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 5] ^= 4
    path.write_bytes(data)


def damage(item, expected):
    """Returns ways to damage an item, by name."""
    kernel = expected["run/1/2/shadow/spread/hidden/kernel"]
    needle = kernel[:, 36:].tobytes()  # what one device of process 1 wrote
    files = [path for path in item.rglob("*") if path.is_file()]
    (data,) = [path for path in files if needle in path.read_bytes()]
    beside = item / "ema_optax"
    return {
        "flipped": lambda: flip(data, needle),
        "cut": lambda: os.truncate(data, 100),
        "gone": data.unlink,
        "no checksums": (beside / "checksums" / "0.json").unlink,
        "no manifest": (beside / "manifest.json").unlink,
    }


def one_sees_damage(folder, mesh):
    """What one process cannot read, both refuse; neither waits for the other."""
    expected, run = recorded(folder, STEPS), started(mesh)
    view = folder / f"seen_by_{jax.process_index()}"
    for name, spec in SEEN:
        shutil.copytree(folder / "run", view)
        if jax.process_index() == 1:
            damage(view / str(STEPS) / "default", expected)[name]()
        multihost_utils.sync_global_devices(f"{name} {spec} seen by one")
        like = targets(run, mesh, spec)
        text = f"is whole is {STEPS - 1}: pass step={STEPS - 1}"
        with pytest.raises(checkpoint.CorruptCheckpointError, match=text):
            checkpoint.restore(view, "shadow/spread", like=like[0])
        with pytest.raises(checkpoint.CorruptCheckpointError, match=text):
            checkpoint.resume(view, *like)
        got = checkpoint.restore(view, "shadow/spread", like[0], step=STEPS - 1)
        assert_same(got, recorded(folder, STEPS - 1), "trees/shadow/spread")
        print("refused:", name, spec, flush=True)
        shutil.rmtree(view)


def main(rank, port, folder, when):
    """Trains, is killed or not, and reads what is there."""
    absl.logging.set_verbosity("fatal")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}",
        num_processes=2,
        process_id=int(rank),
        heartbeat_timeout_seconds=6,
        shutdown_timeout_seconds=10,
    )
    folder = pathlib.Path(folder)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    if not (folder / "run").exists():
        record(folder, mesh)
    train(folder, mesh, when)
    if when == "never":
        reshard(folder, mesh)
        one_sees_damage(folder, mesh)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
