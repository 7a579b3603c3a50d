"""The errors that docs/troubleshooting.md quotes are those of the package."""

import ast
import pathlib
import re

import pytest

import ema_optax
from tests import pages

PAGE = pages.DOCS / "troubleshooting.md"

pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the page travels with the source"
)


def quoted():
    """What the page quotes: bold code."""
    return re.findall(r"\*\*`([^`]+)`\*\*", PAGE.read_text())


def texts():
    """All texts of the package, with … for the values that f-strings put in."""
    for source in pathlib.Path(ema_optax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", "") for part in node.values)
                yield "".join(p if isinstance(p, str) else "…" for p in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_quoted_errors_are_in_the_package():
    """As the package words them; a reworded error fails here."""
    everything = "\n".join(texts())
    assert len(quoted()) > 50
    assert [text for text in quoted() if text not in everything] == []


def test_findings_are_those_of_diagnose():
    """The table has each finding that the docstring of `diagnose` names."""
    (table,) = re.findall(
        r"## What diagnose says\n(.*?)\n## ", PAGE.read_text(), flags=re.S
    )
    rows = "\n".join(row.split("|")[1] for row in re.findall(r"^\| `.*$", table, re.M))
    listed = re.findall(r"`(\w+)`", rows)
    assert len(listed) == len(set(listed))
    described = ema_optax.diagnose.__doc__.split("Args:")[0]
    named = set(re.findall(r"`([a-z_]+)`", described)) - {"evaluate", "jit"}
    assert set(listed) == named
