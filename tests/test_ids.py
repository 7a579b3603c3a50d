"""Ids of rows: read from plain values, and from nothing that differs between runs."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from tests import ids


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["--steps", "0"], "--steps 0"),
        ([1, (2, 3)], "1,(2,3)"),
        ({"every": 2, "decay": 0.9}, "every=2,decay=0.9"),
        ({"b", "a"}, "a,b"),
        (r"\[0, 1\), got 1.0", "[0, 1), got 1.0"),
        ("≥ 1\n  of two", "1 of two"),
        ("word " * 99, "word word word word word word wo"),
        ("ema_optax.checkpoint.CorruptCheckpointError",) * 2,
        (0.1 + 0.2, "0.3"),
        (np.float32(0.5), "0.5"),
        (np.dtype("int8"), "int8"),
        (jnp.ones((2, 3), jnp.bfloat16), "bfloat16[2,3]"),
        (ema_optax.start_after(0.9, 5), "start_after(warmup(0.9),5)"),
        (OSError(28, "No space left"), "OSError(28,No space left)"),
        (functools.partial(max, 1), "max(1)"),
        (lambda: ema_optax.power(0.1), "power"),
        (pathlib.Path("/somewhere/else/run"), "run"),
        (slice(3, 4), "3:4"),
        (b"\xffTAR", "TAR"),
        ([], "[]"),
        ("", "''"),
    ],
)
def test_a_value_is_named(value, expected):
    assert ids.readable(value) == expected


@pytest.mark.parametrize(
    "value",
    [object(), optax.sgd(0.1), lambda x: 1],
    ids=["object", "transform", "lambda"],
)
def test_what_has_no_words_needs_an_id(value):
    """No address and no foreign repr: the table says what it is."""
    assert ids.readable(value) is None


def test_a_counted_row_is_found():
    """Which pytest names by argument and number, and not a value that looks so."""
    values = {"call": object(), "name": "name1"}
    assert ids.positional("call0-name1", values) == ["call"]
    assert ids.positional("an object-name1", values) == []
    assert ids.positional("<lambda>-name1", {"f": lambda x: 1}) == ["f"]
