"""What holds for all tests and the processes they start; how rows of tables are named.

The tests are of one device. A GPU multiplies float32 matrices in TF32, of 10 bits, and
a process takes most of its memory as it starts: neither is what a test is about. JAX
reads all three from the environment, here and in every process that a test starts.
"""

import os

import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

collect_ignore = ["programs"]  # some act as they are imported


def pytest_make_parametrize_id(val):
    """Names the rows of a table by their values, where the table gives no ids."""
    from tests import ids

    return ids.readable(val)


def pytest_collection_modifyitems(items):
    """Refuses rows that have only a number; skips examples of NNX on an old Flax."""
    from tests import ids, older

    for item in items:
        if item.path.name == "nnx_modules.py":
            item.add_marker(older.needs_nnx)
        call = getattr(item, "callspec", None)
        if call and (counted := ids.positional(call.id, call.params)):
            raise pytest.UsageError(
                f"{item.nodeid} does not say what its {', '.join(counted)} is. "
                'Give the row an id, as in pytest.param(…, id="two steps").'
            )
