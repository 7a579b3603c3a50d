"""One of two processes that save as fast as they can; killed_hosts kills one.

python -m tests.programs.saving_hosts RANK PORT FOLDER WHEN

WHEN is a moment in `TRAPS`, of the second save, at which one of the processes kills
itself; a number of saves after which both end well; or "never".
"""

import itertools
import os
import signal
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ema_optax import checkpoint
from ema_optax._checkpoint import saving
from tests import launch
from tests.programs import saving_run


def run(step):
    """The run of `saving_run`, its matrices sharded over the devices of all."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def put(leaf):
        leaf = np.asarray(leaf)
        here = NamedSharding(mesh, P("data") if leaf.ndim == 2 else P())
        return jax.make_array_from_callback(leaf.shape, here, lambda i: leaf[i])

    return jax.tree.map(put, saving_run.run(step))


def assert_here(found, expected):
    """Asserts that what lies on this process is as expected, in its place."""
    for leaf, value in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(value)[shard.index])


def die(*_, **__):
    """Ends this process as a machine that fails does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_writing():
    """Process 1 is asked for its part, and has written nothing."""
    if jax.process_index() == 1:
        checkpoint.EmaHandler.async_save = die


def between_its_files():
    """The data of process 1 may be there, its checksums are not."""
    if jax.process_index() == 1:
        saving.write_sidecars = die


def before_the_commit():
    """The part of process 1 is on disk, and process 0 waits to hear so."""
    write = saving.write_sidecars

    def write_and_die(*args):
        write(*args)
        die()

    if jax.process_index() == 1:
        saving.write_sidecars = write_and_die


def in_the_commit():
    """Process 0 has merged what all have written, and not yet renamed it."""
    merge = saving.finalize

    def merge_and_die(*args):
        merge(*args)
        die()

    saving.finalize = merge_and_die


TRAPS = {  # and who dies
    "before_writing": (before_writing, 1),
    "between_its_files": (between_its_files, 1),
    "before_the_commit": (before_the_commit, 1),
    "in_the_commit": (in_the_commit, 0),
}


def main(rank, port, folder, when):
    """Goes on after the newest step; prints each step known to be committed."""
    launch.join(rank, port, heartbeat=30 if when.isdigit() else 4)
    saves = saving_run.manager(folder)
    newest = saves.latest_step()
    if newest is not None:
        params, state = checkpoint.resume(folder, *run(0))
        assert_here((params, state), saving_run.run(newest))
        shadow = checkpoint.restore(folder, like=params)
        assert_here(shadow, saving_run.run(newest)[1].shadow)
    print("resumed", newest, flush=True)
    for turn in itertools.count(1):
        step = (newest or 0) + turn
        if when in TRAPS and turn == 2:
            saves.wait_until_finished()
            print("saved", step - 1, flush=True)
            TRAPS[when][0]()
        saves.save(step, args=checkpoint.EmaSave(*run(step)))
        if turn > 1:  # a save waits for the one before
            print("saved", step - 1, flush=True)
        if when == str(turn):
            saves.close()
            print("saved", step, flush=True)
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
