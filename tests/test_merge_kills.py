"""`ema-optax merge` killed at moments of its work: nothing appears, or all of it.

`python -m tests.test_merge_kills 50` kills at so many, and prints what was there. Each
merge is a fork of a process that has imported everything, and started nothing yet.
"""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np
import pytest

from ema_optax import _cli as cli
from ema_optax import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 6
LEAVES = 12


def write(run):
    for step in range(1, STEPS + 1):
        tree = {str(i): jnp.full((200, 200), float(step * i)) for i in range(LEAVES)}
        checkpoint.save_average(run, tree, step=step)


def merge(run, out):
    assert cli.main(["merge", str(run), "--out", str(out), "--json"]) == 0


def check(run, out):
    """Looks at what a merge left; returns whether it is there, whole.

    What a kill leaves is in nobody's way: another merge ends as if it were not.
    """
    there = True
    try:
        checkpoint.describe(out)
    except FileNotFoundError:
        there = False
        merge(run, out)
    checkpoint.verify(out)
    tree = checkpoint.restore(out, "params")
    for i in range(LEAVES):
        np.testing.assert_array_equal(tree[str(i)], np.float32(3.5 * i))
    return there


def forked(work, after=None):
    """Works in a process of its own, killed after some seconds; returns its seconds."""
    begin = time.monotonic()
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert after is not None or status == 0, status
    return time.monotonic() - begin


def kills(count):
    """Kills at moments over the duration of a merge, and a tenth more."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        run = root / "run"
        forked(lambda: write(run))
        whole = min(forked(lambda i=i: merge(run, root / f"w{i}")) for i in range(3))
        for i in range(count):
            out = root / f"out_{i}"
            after = 1.1 * whole * i / max(count - 1, 1)
            forked(lambda out=out: merge(run, out), after)
        marks = root / "marks"

        def look():
            there = [check(run, root / f"out_{i}") for i in range(count)]
            marks.write_text("".join("x" if each else "." for each in there))

        forked(look)
        return whole, marks.read_text()


@pytest.mark.once
def test_a_killed_merge_is_nothing_or_all():
    """At six moments; a merge after it finds no obstacle, and is whole."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_merge_kills", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    marks = done.stdout.splitlines()[-1]
    assert len(marks) == 6
    assert marks[0] == "."


if __name__ == "__main__":
    seconds, marks = kills(int(sys.argv[1]))
    print(
        f"{seconds:.2f} s a merge; of {len(marks)} killed {marks.count('x')} had ended"
    )
    print(marks)
