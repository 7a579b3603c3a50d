"""One of two processes that train, save and restore together; run by test_processes.

python -m tests.programs.two_processes RANK PORT FOLDER
"""

import pathlib
import sys

import jax

from tests import launch

RANK, FOLDER = int(sys.argv[1]), pathlib.Path(sys.argv[3])
launch.join(RANK, sys.argv[2])

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1

import ema_optax
from ema_optax import checkpoint, reconstruction

DEVICES = np.array(jax.devices())
LINE = Mesh(DEVICES, ("x",))
SQUARE = Mesh(DEVICES.reshape(2, 2), ("x", "y"))
CROSSED = Mesh(DEVICES.reshape(2, 2).T, ("x", "y"))  # shards span both processes
ROWS = NamedSharding(LINE, PartitionSpec("x"))
EVERYWHERE = NamedSharding(LINE, PartitionSpec())
SHAPE = (8, 1200)  # large enough for data files: small values lie in checked nodes


def whole(tree):
    """Returns a tree of arrays in full, on every process."""
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def sharded_state(optimizer, params):
    """Returns a fresh optimizer state, its matrices by rows."""
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = jax.tree.map(lambda x: ROWS if x.ndim == 2 else EVERYWHERE, shapes)
    return jax.jit(optimizer.init, out_shardings=shardings)(params)


def change(folder, params, state):
    """Resumes with a leaf more and clipping in front, which moves the rest."""
    changed = optax.chain(optax.clip(1.0), optax.adam(0.1), ema_optax.ema_params(0.9))
    new = params | {"new": jax.jit(lambda: jnp.ones(SHAPE), out_shardings=ROWS)()}
    found = checkpoint.resume(
        folder, new, lambda p: sharded_state(changed, p), missing="start"
    )
    assert len(found.changes.started) == 4
    shadow = found.opt_state[2].shadow
    assert shadow["w"].sharding == ROWS
    for actual, expected in (
        (shadow, state[1].shadow | {"new": new["new"]}),
        (found.opt_state[2].count, state[1].count),
        (found.opt_state[1][0].mu["w"], state[0][0].mu["w"]),
        (found.params["w"], params["w"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, whole(actual), whole(expected))


def train(optimizer):
    """Three updates of sharded params."""

    def init():
        return {"w": jax.random.normal(jax.random.key(0), SHAPE), "b": jnp.ones(3)}

    params = jax.jit(init, out_shardings={"w": ROWS, "b": EVERYWHERE})()
    state = sharded_state(optimizer, params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    return params, state


def reconstruct(params):
    """Saves sharded snapshots, sums them onto shardings of both, and meets damage."""
    decays = {"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}
    transform = ema_optax.ema_params(decays)
    shapes = jax.eval_shape(transform.init, params)
    shardings = jax.tree.map(lambda x: ROWS if x.ndim == 2 else EVERYWHERE, shapes)
    state = jax.jit(transform.init, out_shardings=shardings)(params)

    @jax.jit
    def update(number, params, state):
        # They move, so that no two shadows hold the same bytes.
        params = jax.tree.map(lambda p: number * p, params)
        return transform.update(jax.tree.map(jnp.sin, params), state, params)[1]

    with ocp.CheckpointManager(FOLDER / "small") as manager:
        for number in range(1, 7):
            state = update(number, params, state)
            args = checkpoint.SnapshotSave(state, dtype="float16")
            manager.save(number, args=args)
        manager.wait_until_finished()
    found = checkpoint.snapshots(FOLDER / "small")
    results = []
    for sharding in (
        ROWS,
        EVERYWHERE,
        NamedSharding(LINE, PartitionSpec(None, "x")),
        NamedSharding(CROSSED, PartitionSpec("x", "y")),
        NamedSharding(CROSSED, PartitionSpec("y")),
    ):
        slot = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
        like = params | {"w": slot}
        got = reconstruction.reconstruct(found, width=0.11, params=like)
        assert got.tree["w"].sharding == sharding
        results.append(whole(got.tree))
        np.testing.assert_array_equal(results[-1]["w"], results[0]["w"])
        np.testing.assert_array_equal(results[-1]["b"], results[0]["b"])
    needle = whole(state.shadow["a"])["w"][6:8].astype("f2").tobytes()
    multihost_utils.sync_global_devices("before damage of a snapshot")
    if RANK == 0:
        np.save(FOLDER / "reconstructed.npy", results[0]["w"])
        flip(FOLDER / "small" / "6", needle)
    multihost_utils.sync_global_devices("after damage of a snapshot")
    rows = (slice(6, 8), slice(None)) if RANK else (slice(0, 2), slice(None))
    # Of the narrowest width; found anew, for what was read may be in memory yet.
    newest = checkpoint.snapshots(FOLDER / "small")[-1].tree
    if RANK == 0:  # reads its own rows, and waits for nobody
        assert newest.read("w", rows).shape == (2, 1200)
    else:
        with pytest.raises(checkpoint.CorruptCheckpointError, match=r"Step 6 .*Leave"):
            newest.read("w", rows)


def flip(folder, needle):
    """Flips a bit in the one file that holds these bytes."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    (path,) = [p for p in files if needle in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 5] ^= 4
    path.write_bytes(data)


def main():
    """Saves under v0 and v1, restores onto other meshes, and meets damage."""
    optimizer = optax.chain(optax.adam(0.1), ema_optax.ema_params(0.9))
    params, state = train(optimizer)
    shadow = whole(ema_optax.shadow_params(state, params))
    with ocp.CheckpointManager(FOLDER / "v0") as manager:
        for number in (1, 2):
            manager.save(number, args=checkpoint.EmaSave(params, state))
        manager.wait_until_finished()
    v1.save_checkpointables(
        FOLDER / "v1" / "2", {"default": checkpoint.EmaSave(params, state)}
    )
    for folder in (FOLDER / "v0", FOLDER / "v1"):
        for mesh, spec in (
            (LINE, PartitionSpec("x")),
            (LINE, PartitionSpec(None, "x")),
            (SQUARE, PartitionSpec("x", "y")),
            (CROSSED, PartitionSpec("x", "y")),
            (SQUARE, PartitionSpec("y")),
        ):
            sharding = NamedSharding(mesh, spec)
            like = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)}
            restored = checkpoint.restore(folder, like=like)
            assert restored["w"].sharding == sharding
            np.testing.assert_array_equal(whole(restored)["w"], shadow["w"])
        resumed = checkpoint.resume(folder, params, state)
        for a, b in zip(
            jax.tree.leaves(resumed), jax.tree.leaves((params, state)), strict=True
        ):
            assert a.sharding == b.sharding
            np.testing.assert_array_equal(whole(a), whole(b))
        change(folder, params, state)

    multihost_utils.sync_global_devices("before damage")
    if RANK == 0:  # in a piece that the other process wrote
        flip(FOLDER / "v0" / "2", shadow["w"][6:8].tobytes())
    multihost_utils.sync_global_devices("after damage")
    for spec in (PartitionSpec("x"), PartitionSpec(None, "x")):
        sharding = NamedSharding(LINE, spec)
        like = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)}
        with pytest.raises(checkpoint.CorruptCheckpointError, match="whole is 1"):
            checkpoint.restore(FOLDER / "v0", like=like)
    reconstruct(params)
    if RANK == 0:
        np.save(FOLDER / "shadow.npy", shadow["w"])
    print("done")


main()
