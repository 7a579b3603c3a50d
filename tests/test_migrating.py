"""MIGRATING.md: our blocks run, those of other libraries are Python, commands parse."""

import ast
import pathlib
import re
import shlex

import jax.numpy as jnp
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint

PAGE = pathlib.Path(__file__).parent.parent / "MIGRATING.md"

pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the page travels with the source"
)


def blocks(kind):
    """The blocks of the page whose fence says that they are of a kind."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(found) > 10
    return found


def test_our_blocks_run(tmp_path, monkeypatch):
    """In one namespace, beside a run that came in."""
    monkeypatch.chdir(tmp_path)
    held, raw = {"w": jnp.full(3, 0.5)}, {"w": jnp.ones(3)}
    decay = ema_optax.warmup(0.9999)
    checkpoint.save_average("imported", held, params=raw, step=300, decay=decay)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, PAGE.name, "exec"), namespace)
    assert namespace["found"].changes.taken


def test_blocks_of_other_libraries_are_python():
    """Two lines at least; they are not run, as most of them do not install here."""
    for block in blocks("python theirs"):
        ast.parse(block)
        assert len(block.splitlines()) >= 2


def test_commands_parse(tmp_path, monkeypatch, capsys):
    """Each gets as far as its missing source, or a package that is not installed."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "ema-optax"
        assert cli.main(arguments) == 1
        told = capsys.readouterr().err
        missing = "no such|no .* at|There is no|does not exist|needs"
        assert re.search(missing, told, re.I)
        assert not list(tmp_path.iterdir())
