"""Two processes, one, and one of many devices go on with each other's runs; one dies.

In real processes, joined by `jax.distributed`. See tests/launch.py: none can hang.
"""

import signal
import sys
import time

import jax
import pytest

from ema_optax import checkpoint
from tests import killed_hosts, launch
from tests.programs import many_hosts, saving_hosts, saving_run
from tests.programs.many_hosts import BREAK, ROUNDING, STEPS

pytestmark = pytest.mark.long


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
    output = launch.run("tests.programs.many_hosts", 2, folder)
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
    output = launch.run("tests.programs.many_hosts", 1, folder, count=1, devices=4)
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


@pytest.mark.once
def test_a_process_dies_in_a_save(tmp_path):
    """The last whole step is found, is whole, and two new ones go on."""
    checkpoint.save(tmp_path, *saving_run.run(1), step=1)
    for newest, (when, (_, rank)) in enumerate(saving_hosts.TRAPS.items(), start=1):
        outputs = killed_hosts.kill(tmp_path, when, rank)
        assert killed_hosts.said(outputs, "resumed") == [newest, newest]
        # The next was being saved, and is not there; of the last every bit is.
        assert max(killed_hosts.said(outputs, "saved")) == newest + 1
        assert any("tmp" in path.name for path in tmp_path.iterdir())
        assert checkpoint.describe(tmp_path).step == newest + 1
        run = checkpoint.resume(tmp_path, *saving_run.run(0))
        for leaf, expected in zip(
            jax.tree.leaves(run),
            jax.tree.leaves(saving_run.run(newest + 1)),
            strict=True,
        ):
            assert leaf.dtype == expected.dtype
            assert bool((leaf == expected).all())
    newest += 1
    with launch.launched("tests.programs.saving_hosts", tmp_path, "2") as processes:
        assert processes.wait() == [0, 0], processes.report()
        outputs = [processes.output(rank) for rank in (0, 1)]
    assert killed_hosts.said(outputs, "resumed") == [newest, newest]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {str(newest + 1), str(newest + 2)}  # and nothing unfinished
    for step in (newest + 1, newest + 2):
        checkpoint.verify(tmp_path, step=step)


def test_a_process_that_hangs_says_where():
    """It is killed, and what it was waiting for is in the error."""
    with launch.launched("tests.test_many_hosts") as processes:
        processes.wait_for(1, lambda lines: "joined" in lines, within=90)
        with pytest.raises(AssertionError, match=r"(?s)not all .*in _wait_for"):
            processes.wait(within=0.5)
    codes = processes.codes()  # with jax 0.7 the other may end itself first
    assert -signal.SIGKILL in codes
    assert all(codes)


def _wait_for_nobody():
    print("joined", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    launch.join(*sys.argv[1:3])
    _wait_for_nobody()
