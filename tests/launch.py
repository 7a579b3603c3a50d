"""Processes of one `jax.distributed` program: started, joined, and always ended.

Nothing here waits without a bound. A process that does is told to write down where each
of its threads is, and is killed; so is one whose peers have failed.
"""

import contextlib
import faulthandler
import inspect
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import absl.logging
import jax

ROOT = pathlib.Path(__file__).parent.parent
LIMIT = 200  # seconds that a process may take; it ends itself if nobody is left to
GRACE = 20  # seconds that it may go on after another one has failed


class Processes:
    """Those that one launch started, in the order of their ranks."""

    def __init__(self, started, logs):
        self._started, self._logs = started, logs

    def output(self, rank):
        """Returns what a process has written until now, errors included."""
        return self._logs[rank].read_text(errors="replace")

    def codes(self):
        """Returns each one's exit code; None where it runs."""
        return [process.poll() for process in self._started]

    def kill(self, rank):
        """Ends a process as a machine that fails does, with what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._started[rank].pid, signal.SIGKILL)

    def wait_for(self, rank, reached, within):
        """Waits until the lines that a process wrote are enough, or it has ended."""
        end = time.monotonic() + within
        while not reached(self.output(rank).splitlines()):
            if self._started[rank].poll() is not None:
                return
            if time.monotonic() > end:
                raise AssertionError(f"not there in {within} s\n{self.report()}")
            time.sleep(0.005)

    def wait(self, within=LIMIT - 20):
        """Returns the exit codes, once all have ended."""
        end = time.monotonic() + within
        while None in self.codes():
            now = time.monotonic()
            if any(self.codes()):  # one failed or was killed
                end = min(end, now + GRACE)
            if now > end:
                raise AssertionError(f"not all ended\n{self.report()}")
            time.sleep(0.02)
        return self.codes()

    def report(self):
        """Returns what all have written, and where those are that still run."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)  # see join
        time.sleep(1)
        return "\n".join(
            f"--- process {rank}, exit code {code} ---\n{self.output(rank)[-8000:]}"
            for rank, code in enumerate(self.codes())
        )


def on_cpu(devices=1, flags=""):
    """Returns the environment of a process whose devices are so many of the CPU.

    Where there is a GPU, JAX would take that instead, of which there may be one.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
    }


def run_on_eight_devices(path, flags=""):
    """Runs all tests of a file in a process that has eight devices; all must pass."""
    # Without options such as workers: not for these few.
    environment = on_cpu(8, flags) | {"PYTEST_ADDOPTS": ""}
    # With a folder of its own: those of other runs it would clear away beside them.
    with tempfile.TemporaryDirectory() as folder:
        options = ("-p", "no:cacheprovider", f"--basetemp={folder}/its")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, path],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@contextlib.contextmanager
def launched(module, *arguments, count=2, devices=2):
    """Starts `python -m MODULE RANK PORT ARGUMENTS…` for each rank; kills what is left.

    The port is held while they run, by a socket that does not listen. Nothing else is
    given it, and the coordinator can bind it, as gRPC asks to reuse ports: a second one
    that had chosen the same would bind it too, and each would get the other's peers.
    """
    environment = on_cpu(devices) | {"PYTHONFAULTHANDLER": "1"}
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        logs = [pathlib.Path(folder) / str(rank) for rank in range(count)]
        started = []
        processes = Processes(started, logs)
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, "-m", module, str(rank), port]
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        [*command, *map(str, arguments)],
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # one group, to be killed together
                    )
                started.append(process)
            yield processes
        finally:
            for rank, process in enumerate(started):
                processes.kill(rank)
                process.wait(10)


def run(module, *arguments, count=2, devices=2):
    """Starts processes that must all end well; returns what process 0 wrote."""
    with launched(module, *arguments, count=count, devices=devices) as processes:
        codes = processes.wait()
        assert codes == [0] * count, processes.report()
        return processes.output(0)


def join(rank, port, *, count=2, heartbeat=60):
    """Called first in each process: makes it one of several, none of which can hang."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    absl.logging.set_verbosity("fatal")
    if count == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known = inspect.signature(jax.distributed.initialize).parameters
    bound = {"shutdown_timeout_seconds": 30}  # not in jax 0.7
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        int(rank),
        coordinator_bind_address=f"127.0.0.1:{port}",  # seen by nobody else
        initialization_timeout=60,
        heartbeat_timeout_seconds=heartbeat,
        **(bound if bound.keys() <= known.keys() else {}),
    )
