"""What holds for all tests and the processes they start; what pytest must not collect.

The tests are of one device. A GPU multiplies float32 matrices in TF32, of 10 bits, and
a process takes most of its memory as it starts: neither is what a test is about. JAX
reads all three from the environment, here and in every process that a test starts.
"""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

collect_ignore = ["programs"]  # some act as they are imported


def pytest_collection_modifyitems(items):
    """Skips the package's examples of NNX modules where Flax is too old for them."""
    from tests import older

    for item in items:
        if item.path.name == "nnx_modules.py":
            item.add_marker(older.needs_nnx)
