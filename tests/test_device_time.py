"""The time of a GPU, as the benchmarks read it from a profile."""

import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from tests import scripts

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "device_time.py"

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="the benchmarks travel with the source"
)


@pytest.fixture(scope="module")
def device_time():
    return scripts.loaded(SCRIPT)


def _name(kind, pid, name, tid=0):
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": {"name": name}}


def _ran(pid, tid, start, microseconds, **details):
    span = {"ts": start, "dur": microseconds}
    return {"ph": "X", "pid": pid, "tid": tid, "name": "x", **span, "args": details}


KERNEL = {"kernel_details": "regs:32 grid:132,1,1 block:128,1,1"}
# A GPU with two streams and the lines that the profiler derives from them; a host.
NAMES = [
    _name("process_name", 1, "/device:GPU:0"),
    _name("thread_name", 1, "Stream #13(Compute,MemcpyD2D)", 13),
    _name("thread_name", 1, "Stream #20(MemcpyH2D)", 20),
    _name("thread_name", 1, "XLA Ops", 99),
    _name("process_name", 701, "/host:CPU"),
    _name("thread_name", 701, "Stream of thoughts", 13),
    {"ph": "M", "pid": 1, "name": "process_sort_index", "args": {"sort_index": 1}},
]
EVENTS = [
    _ran(1, 13, 100.0, 10.0, **KERNEL),
    _ran(1, 13, 112.5, 7.5, **KERNEL),
    _ran(1, 13, 130.0, 1.0, memcpy_details="size:4"),
    _ran(1, 20, 115.0, 10.0, memcpy_details="size:4"),  # 5 of them beside the kernel
    _ran(1, 20, 116.0, 2.0, memcpy_details="size:4"),  # all of these beside others
    _ran(1, 13, 121.0, 2.0, memset_details="size:4"),
    _ran(1, 99, 100.0, 30.0, **KERNEL),
    _ran(701, 13, 0.0, 1000.0, **KERNEL),
    {},
]


@pytest.mark.parametrize("order", [1, -1])
def test_a_gpu_is_at_work_while_any_stream_is(device_time, tmp_path, order):
    """10 + 7.5 + 5 + 1 µs, of two kernels: not 32.5, and not what other lines show."""
    folder = tmp_path / "plugins" / "profile" / "2026_01_01_00_00_00"
    folder.mkdir(parents=True)
    with gzip.open(folder / "perfetto_trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [*NAMES, *EVENTS][::order]}, file)
    seconds, kernels = device_time.read(tmp_path)
    assert seconds == pytest.approx(23.5e-6, rel=1e-9)
    assert kernels == 2


def test_a_call_on_this_machine(device_time, tmp_path):
    """What the profiler writes can be read; without a GPU nothing is profiled."""
    x = jnp.ones(1000)
    square = jax.jit(lambda x: x * x)
    made = []

    def call():
        made.append(square(x))

    cost = device_time.measure(call, lambda: jax.block_until_ready(made), calls=3)
    if jax.default_backend() == "gpu":
        assert len(made) == 7
        assert cost.kernels == 1
        assert 0 < cost.device < 1
        assert cost.host > 0
    else:
        assert cost is None
        assert made == []
    with jax.profiler.trace(tmp_path, create_perfetto_trace=True):
        square(x).block_until_ready()
    seconds, kernels = device_time.read(tmp_path)
    assert (seconds > 0) == (kernels == 1) == (jax.default_backend() == "gpu")
