"""Two processes train; one is killed in a save; other numbers of processes go on."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import orbax.checkpoint as ocp
import pytest

from ema_optax import checkpoint
from tests import many_hosts

KILLED = {"before_writing": 1, "before_the_commit": 1, "in_the_commit": 0}  # which one
NEWEST = {"before_writing": 1, "before_the_commit": 2, "in_the_commit": 3}  # whole step
MESH = jax.make_mesh((1,), ("data",))


def _together(folder, when):
    """Returns the exit codes and what was written of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.many_hosts", str(rank), port, folder, when],
            cwd=pathlib.Path(__file__).parent.parent,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each start of the two processes left, in the order in which they ran."""
    folder = tmp_path_factory.mktemp("hosts")
    for when, rank in KILLED.items():
        codes, outputs = _together(folder, when)
        assert codes[rank] == -signal.SIGKILL, outputs[rank][-4000:]
        # The other one does not wait for ever: JAX aborts it.
        assert codes[1 - rank] == -signal.SIGABRT, outputs[1 - rank][-4000:]
        shutil.copytree(folder / "run", folder / when)
    return folder


def _assert_whole(run, folder, newest):
    """Every step up to the newest holds what the undisturbed run held."""
    assert checkpoint.describe(run).step == newest
    for step in range(1, newest + 1):
        checkpoint.verify(run, step=step)
        expected = many_hosts.recorded(folder, step)
        got = checkpoint.resume(run, *many_hosts.started(MESH), step=step)
        many_hosts.assert_same(got, expected, "run")
        for tree in many_hosts.TREES:
            got = checkpoint.restore(run, tree, like=many_hosts.model(), step=step)
            many_hosts.assert_same(got, expected, f"trees/{tree}")


@pytest.mark.parametrize("when", KILLED)
def test_a_process_killed_in_a_save(folder, when):
    """Earlier steps are whole, one process restores them, and the next save works."""
    run, newest = folder / when, NEWEST[when]
    names = {path.name for path in run.iterdir()}
    unfinished = {name for name in names if "tmp" in name}
    assert names - unfinished == {str(step) for step in range(1, newest + 1)}
    assert len(unfinished) == 1
    _assert_whole(run, folder, newest)
    params, state = checkpoint.resume(run, *many_hosts.started(MESH))
    with ocp.CheckpointManager(run) as manager:
        assert manager.latest_step() == newest
        manager.save(newest + 1, args=checkpoint.EmaSave(params, state))
        manager.wait_until_finished()
    checkpoint.verify(run, step=newest + 1)
    got = checkpoint.resume(run, *many_hosts.started(MESH))
    many_hosts.assert_same(got, many_hosts.recorded(folder, newest), "run")


def test_two_new_processes_go_on(folder):
    """To the last step, bit for bit; and they reshard, and meet damage."""
    run = checkpoint.resume(folder / "in_the_commit", *many_hosts.started(MESH), step=3)
    checkpoint.save(folder / "alone", *run, step=3)
    codes, outputs = _together(folder, "never")
    for code, output in zip(codes, outputs, strict=True):
        assert code == 0, output[-4000:]
        assert "done\n" in output
    for name in ("run", "data", "model", "both"):
        checkpoint.verify(folder / name)
        got = checkpoint.resume(folder / name, *many_hosts.started(MESH))
        expected = many_hosts.recorded(folder, many_hosts.STEPS)
        many_hosts.assert_same(got, expected, "run")
