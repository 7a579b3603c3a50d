"""What the tests need on versions that lack a newer name, or why they are skipped."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from ema_optax._placement.leaf_placement import cuts_in_loops
from ema_optax._placement.memories import is_kept

try:
    from flax import nnx
except ModuleNotFoundError:  # some stages of CI have no Flax
    nnx = None

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # jax 0.7
    from jax.experimental import enable_x64 as enable_x64

LACKS_NNX = not hasattr(nnx, "as_pure")
needs_nnx = pytest.mark.skipif(
    LACKS_NNX, reason="Flax lacks nnx.as_pure, which 0.12.7 has"
)
# Where compiled programs do not keep it, init says so, and all else is the same.
in_host_memory_or_not = pytest.mark.filterwarnings(
    "ignore:The shadow stays in device memory"
)


def has_host_memory():
    """Returns whether compiled programs leave anything in the host's memory."""
    return is_kept("pinned_host", jax.default_backend())


def skip_without_host_memory():
    """Skips a test of what is in the host's memory."""
    if not has_host_memory():
        pytest.skip("what this JAX compiles for CPUs leaves nothing in pinned_host")


def skip_where_no_loop_cuts():
    """Skips a test of what is cut into parts, where every update cuts it."""
    if not cuts_in_loops(jax.default_backend()):
        pytest.skip("XLA of this JAX aborts where a loop on CPUs cuts arrays")


@functools.cache
def takes_one_array():
    """Returns whether Orbax saves a tree that is one array."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ocp.PyTreeCheckpointer().save(f"{folder}/one", jnp.ones(2))
        except ValueError:
            return False
    return True


def skip_without_one_array():
    """Skips a test of params that are one array, which are refused in words."""
    if not takes_one_array():
        pytest.skip("this Orbax saves no tree that is one array")
