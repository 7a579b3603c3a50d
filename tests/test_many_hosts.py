"""Two processes, one, and one of many devices go on with each other's runs; one dies.

In real processes, joined by `jax.distributed`. See tests/launch.py: none can hang.
"""

import random
import re
import signal
import sys
import time

import jax
import pytest

from ema_optax import checkpoint
from tests import launch, many_hosts, saving_hosts, saving_run
from tests.many_hosts import BREAK, ROUNDING, STEPS

# (rank, seconds): who is killed, and how long after a step was known to be committed.
# About as long as a save takes here; whatever they meet has to hold anywhere.
MOMENTS = [
    (rank, random.Random(seed).uniform(0.0, 0.3)) for seed, rank in enumerate([1, 0])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What this process saved, then two of two devices each, after their own checks."""
    folder = tmp_path_factory.mktemp("hosts")
    layout = many_hosts.layouts()["spread"]

    def each(step, *run):
        if step >= BREAK:
            checkpoint.save(folder / "alone", *run, step=step)
            many_hosts.record(folder / "alone", step, *run)

    many_hosts.train(layout, *many_hosts.started(*layout), range(1, STEPS + 1), each)
    output = launch.run("tests.many_hosts", 2, folder)
    assert output.count("refused:") == 7
    assert output.endswith("done\n")
    return folder


def test_saves_that_failed_on_one_process_left_the_step_before(folder):
    """Both were told each time; what they had committed is whole, and one goes on."""
    root, layout = folder / "failing", many_hosts.layouts()["fsdp"]
    assert checkpoint.describe(root).step == 3
    checkpoint.verify(root)
    checkpoint.save(root, *many_hosts.started(*layout), step=5)
    checkpoint.verify(root)


@pytest.mark.parametrize("source", ["spread", "fsdp", "model"])
def test_one_device_goes_on_with_the_run_of_two_processes(folder, source):
    """Restored to the bit; trained on, it ends where the two of them did."""
    many_hosts.go_on(folder / source)


def test_four_devices_of_one_process_go_on(folder):
    """From runs of two processes and of one; to the bit where the layout is alike."""
    output = launch.run("tests.many_hosts", 1, folder, count=1, devices=4)
    assert output.endswith("done\n")


def test_the_layouts_agree_and_one_step_less_would_show(folder):
    """All are within the bound between layouts; the step before is 1000 times off."""
    names = ("alone", "spread", "fsdp", "model")
    first = many_hosts.recorded(folder / "alone", STEPS)
    for name in names:
        many_hosts.assert_near(many_hosts.recorded(folder / name, STEPS), first)
    before = many_hosts.recorded(folder / "alone", STEPS - 1)
    floats = [path for path, value in first.items() if value.dtype == "float32"]
    assert len(floats) == 18  # params and shadow, each twice, and Adam's moments
    for path in floats:
        off = abs(first[path] - before[path]).max() / abs(first[path]).max()
        assert off > 1000 * ROUNDING, path


def test_what_was_resharded_on_the_way_is_read_by_one(folder):
    """Data-sharded → model-sharded → data-sharded, each time saved: the same bits."""
    steps = sorted((folder / "spread").rglob(f"then_*/{BREAK}"))
    assert len(steps) == 4
    expected = many_hosts.recorded(folder / "spread", BREAK)
    layout = many_hosts.layouts()["spread"]
    for step in steps:
        checkpoint.verify(step.parent)
        run = checkpoint.resume(step.parent, *many_hosts.started(*layout))
        many_hosts.assert_same(run, expected, "run")


def _killed(root, when, rank, delay=None):
    """Starts two processes in a run; one is killed. Returns what both wrote."""
    with launch.launched("tests.saving_hosts", root, when) as processes:
        if delay is not None:
            processes.wait_for(
                rank,
                lambda lines: any(line.startswith("saved") for line in lines),
                within=90,
            )
            time.sleep(delay)
            processes.kill(rank)
        codes = processes.wait()
        assert codes[rank] == -signal.SIGKILL, processes.report()
        # The other one is ended by JAX when no heartbeat comes, or meets an error.
        assert codes[1 - rank] not in (0, -signal.SIGKILL), processes.report()
        return [processes.output(each) for each in (0, 1)]


def _said(outputs, word):
    """Returns the numbers that the processes said something of."""
    return [int(n) for n in re.findall(rf"^{word} (\d+)$", "\n".join(outputs), re.M)]


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """A run in which one process was killed again and again; checked after each."""
    root = tmp_path_factory.mktemp("killed")
    checkpoint.save(root, *saving_run.run(1), step=1)
    newest, unfinished = 1, 0
    rounds = [(when, rank) for when, (_, rank) in saving_hosts.TRAPS.items()]
    for moment in [*rounds, *[("never", *moment) for moment in MOMENTS]]:
        outputs = _killed(root, *moment)
        assert _said(outputs, "resumed") == [newest, newest]
        committed = max(_said(outputs, "saved"))
        assert committed > newest, outputs
        unfinished += any("tmp" in path.name for path in root.iterdir())
        found = checkpoint.describe(root).step
        assert found >= committed
        if moment[0] in saving_hosts.TRAPS:
            assert found == committed == newest + 1  # and the next was being saved
        newest = found
        run = checkpoint.resume(root, *saving_run.run(0))
        for leaf, expected in zip(
            jax.tree.leaves(run), jax.tree.leaves(saving_run.run(newest)), strict=True
        ):
            assert leaf.dtype == expected.dtype
            assert bool((leaf == expected).all())
    assert unfinished >= len(rounds)
    return root, newest


@pytest.mark.once
def test_a_process_dies_in_a_save(kills):
    """Whenever: the last whole step is found, is whole, and two new ones go on."""
    root, newest = kills
    with launch.launched("tests.saving_hosts", root, "2") as processes:
        assert processes.wait() == [0, 0], processes.report()
        outputs = [processes.output(rank) for rank in (0, 1)]
    assert _said(outputs, "resumed") == [newest, newest]
    names = {path.name for path in root.iterdir()}
    assert names == {str(newest + 1), str(newest + 2)}  # and nothing unfinished
    for step in (newest + 1, newest + 2):
        checkpoint.verify(root, step=step)


def test_a_process_that_hangs_says_where():
    """It is killed, and what it was waiting for is in the error."""
    with launch.launched("tests.test_many_hosts") as processes:
        processes.wait_for(1, lambda lines: "joined" in lines, within=90)
        with pytest.raises(AssertionError, match=r"(?s)not all .*in _wait_for"):
            processes.wait(within=0.5)
    assert processes.codes() == [-signal.SIGKILL] * 2


def _wait_for_nobody():
    print("joined", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    launch.join(*sys.argv[1:3])
    _wait_for_nobody()
