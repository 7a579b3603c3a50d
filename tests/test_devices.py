"""Default devices and abstract meshes, in a process that has eight devices."""

import pathlib

import pytest

from tests import launch

CHOSEN = pathlib.Path(__file__).parent / "programs" / "chosen_devices.py"


@pytest.mark.long
def test_eight_devices():
    """All of chosen_devices.py, in a process that has them."""
    launch.run_on_eight_devices(CHOSEN)
