"""README: short, with the two commands that set up the library and its tests.

Its code, commands and links are tested with those of the other pages, in test_docs.py.
"""

import pytest

from tests import pages

pytestmark = pytest.mark.skipif(
    not pages.README.exists(), reason="the README travels with the source"
)


def test_the_two_commands_are_there():
    """One line sets up and runs the main job, one sets up and passes the tests."""
    lines = pages.README.read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("ema-optax demo")
    assert commands[1].endswith("pytest -n 2")


def test_it_is_read_in_five_minutes():
    """What does not fit has a page in docs/."""
    assert len(pages.README.read_text().split()) <= 800
