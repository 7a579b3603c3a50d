"""How much memory saving NumPy arrays takes, and that they are stored as ever."""

import itertools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ema_optax import checkpoint
from ema_optax._checkpoint import host_arrays
from tests import launch, same

# Memory of a process that saves two trees of the same leaves, in MiB: of the trees, and
# the most that the process held beyond what it had before.
SAVES = """
import resource, sys, numpy as np
from ema_optax import checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def tree(start):
    return {f"w{i}": np.full((4, 2**20), start + i, np.float32) for i in range(8)}

checkpoint.save_average(sys.argv[1], {"w": np.ones(2)}, step=0)  # what Orbax imports
raw, average = tree(0), tree(0.5)
before = peak()
checkpoint.save_average(sys.argv[1], average, params=raw, step=1)
print(peak() - before)
"""


@pytest.mark.long
def test_saving_takes_a_few_leaves_more(tmp_path):
    """256 MiB in 16 leaves take some 64 MiB more, where a copy of all takes 256."""
    done = subprocess.run(
        [sys.executable, "-c", SAVES, str(tmp_path)],
        env=launch.on_cpu(1),
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert float(done.stdout) < 150
    found = checkpoint.restore(tmp_path, "shadow")
    assert all((leaf == float(name[1:]) + 0.5).all() for name, leaf in found.items())


@pytest.mark.parametrize("sizes", [[], [0, 3], [3, 0, 3, 1, 9, 9, 2]])
def test_parts_are_of_eight_bytes_or_one_array(monkeypatch, sizes):
    """All arrays, in order; none is left out, be it empty or too large."""
    monkeypatch.setattr(host_arrays, "_AT_ONCE", 8)
    arrays = [np.ones(size, np.uint8) for size in sizes]
    parts = [arrays[part] for part in host_arrays.parts(arrays)]
    assert [array.size for part in parts for array in part] == sizes
    held = [sum(array.size for array in part) for part in parts]
    assert all(
        size <= 8 or len(part) == 1 for size, part in zip(held, parts, strict=True)
    )
    assert all(a + b > 8 for a, b in itertools.pairwise(held) if b)


def test_every_kind_of_leaf_comes_back(tmp_path):
    """NumPy arrays beside arrays of JAX and numbers, to the bit."""
    tree = {
        "numpy": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "jax": jnp.arange(3.0),
        "narrow": jnp.arange(3.0, dtype=jnp.bfloat16),
        "scalar": np.float32(1.5),
        "number": 2,
    }
    checkpoint.save_average(tmp_path, tree)
    found = checkpoint.restore(tmp_path, "params")
    same.assert_same(
        {k: np.asarray(found[k]) for k in tree},
        {k: np.asarray(v) for k, v in tree.items()},
    )
