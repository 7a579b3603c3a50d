"""What a call takes on the GPU and on the host, apart, from JAX's profiler.

The profiler sees what the whole process has the GPU do, so that torch is measured as
JAX is. Two profilers in one process would each keep the other from the GPU's counters.
"""

import gzip
import json
import math
import pathlib
import tempfile
import time
from typing import NamedTuple

import jax


class Cost(NamedTuple):
    """What a call takes, as a mean of several.

    Attributes:
        device: Seconds in which the GPU is at work; NaN if the profiler saw none.
        kernels: Kernels that run; copies are none.
        host: Seconds until the call has handed on its work and returns.
    """

    device: float
    kernels: float
    host: float

    def cells(self):
        """Returns what a table tells of it, below `HEADER`."""
        return [
            f"{1e3 * self.device:.3f}",
            f"{self.kernels:.1f}",
            f"{1e3 * self.host:.3f}",
        ]


HEADER = ["device, ms", "kernels", "host, ms"]
NOTE = """\
On the GPU, of a call: *device* is the time in which it is at work, from a profile;
*host* is the time until the call returns, which does not wait for it. *floor* is the
bytes that a step must move over those of Adam alone, which are 7 trees; a shadow takes
2 more, and one that is folded at every k-th update a k-th of them.
"""


def measure(call, wait, calls=10):
    """Returns the cost of a call, whose work `wait` waits for; None without a GPU."""
    if jax.default_backend() != "gpu":
        return None
    call()  # of warm-up
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - start
    wait()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(calls):
                call()
            wait()
        device, kernels = read(folder)
    return Cost((device or math.nan) / calls, kernels / calls, host / calls)


def read(folder):
    """Returns the seconds in which a GPU was at work, and the kernels that ran.

    Streams alone are looked at: other lines of a GPU show the same work again, by
    module and by operation. What several streams do at the same time counts once.
    """
    (file,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        events = json.load(opened)["traceEvents"]
    named = [e for e in events if e.get("ph") == "M"]
    gpus = {
        e["pid"]
        for e in named
        if e["name"] == "process_name" and e["args"]["name"].startswith("/device:GPU")
    }
    streams = {
        (e["pid"], e["tid"])
        for e in named
        if e["name"] == "thread_name" and e["args"]["name"].startswith("Stream")
    }
    work = [
        e
        for e in events
        if e.get("ph") == "X" and e["pid"] in gpus and (e["pid"], e["tid"]) in streams
    ]
    busy, until = 0.0, -math.inf
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in work):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    kernels = sum("kernel_details" in e.get("args", {}) for e in work)
    return busy / 1e6, kernels  # it tells microseconds
