"""One of two processes that save is killed; what both had said, and what is left."""

import re
import signal
import time

from tests import launch


def kill(root, when, rank, delay=None):
    """Starts two processes in a run; one is killed. Returns what both wrote.

    Args:
        root: Folder of the run.
        when: A moment of `saving_hosts.TRAPS`, or "never".
        rank: Which is killed.
        delay: Seconds after the first step was known to be committed, for "never".
    """
    with launch.launched("tests.programs.saving_hosts", root, when) as processes:
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


def said(outputs, word):
    """Returns the numbers that the processes said something of."""
    return [int(n) for n in re.findall(rf"^{word} (\d+)$", "\n".join(outputs), re.M)]
