"""What the tests and the processes that they start are given, GPU or not."""

import pathlib
import subprocess
import sys

import pytest

from tests import launch

PRODUCT = """
import jax, jax.numpy as jnp
x = jnp.ones((2, 2))
print(jax.jit(jnp.matmul).lower(x, x).as_text().count("HIGHEST"))
"""


@pytest.mark.long
@pytest.mark.parametrize("started", [False, True])
def test_matrices_are_multiplied_in_float32(started, capsys):
    """Both, where a GPU would round them to TF32; in a process of a test too."""
    if started:
        command = [sys.executable, "-c", PRODUCT]
        told = subprocess.run(command, capture_output=True, text=True).stdout
    else:
        exec(PRODUCT, {})
        told = capsys.readouterr().out
    assert told == "2\n"


@pytest.mark.long
def test_devices_of_the_cpu_are_asked_for_with_the_cpu():
    """XLA's flag alone says nothing where JAX takes a GPU: one place knows both."""
    flag = "_".join(["xla_force_host_platform", "device_count"])
    files = pathlib.Path(__file__).parent.rglob("*.py")
    assert [path.name for path in files if flag in path.read_text()] == ["launch.py"]
    assert launch.on_cpu(3)["JAX_PLATFORMS"] == "cpu"
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=launch.on_cpu(3), capture_output=True
    )
    assert done.stdout.split() == [b"cpu", b"3"], done.stderr
