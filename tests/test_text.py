"""Text for errors: bounded whatever it is of, and which installation helps."""

import sys

import pytest

from ema_optax._messages import extras, text


def _nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb", r"'a\nb'"),
        (None, "None"),
        ((1, 2.5), "(1, 2.5)"),
        ([1, {"a": 1}, "x"], "[1, …, 'x']"),
        ({}, "a dict of 0"),
        ({1, 2}, "a set of 2"),
        ([0] * 33, "a list of 33"),
    ],
    ids=["line break", "None", "tuple", "nested list", "dict", "set", "long list"],
)
def test_brief(value, expected):
    """A few words."""
    assert text.brief(value) == expected


def test_brief_is_safe():
    """For any depth, and for integers that Python does not write."""
    assert text.brief(_nested(100_000)) == "[…]"
    assert text.brief(10**5000) == "a very large int"
    assert text.brief([10**5000]) == "[a very large int]"


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"x" * 10**6, ["x" * 99] * 32, 10**999],
    ids=["text", "bytes", "list", "number"],
)
def test_brief_is_bounded(value):
    """With a sign where it was cut."""
    assert len(text.brief(value)) == 101
    assert text.brief(value).endswith("…")
    assert len(text.brief(value, 5)) == 6


def test_one_line():
    """Pages of text become a line, cut off unless all of it is asked for."""
    error = ValueError("a\n\n  b\t" + "c" * 400)
    assert text.one_line(error, None) == "a b " + "c" * 400
    assert text.one_line(error) == "a b " + "c" * 296 + "…"
    assert text.one_line(" short \n") == "short"


def test_nearest():
    """The most alike first; the first ones where none is."""
    names = ["params", "shadow", "shadow/fast", "state"]
    assert text.nearest("shadw", names).startswith("The nearest are 'shadow', 'shadow/")
    assert (
        text.nearest("xyz", names) == "The nearest are 'params', 'shadow', 'shadow/f"
        "ast'."
    )
    assert text.nearest("s" * 10**6, ["shadow"]) == "The nearest are 'shadow'."


def test_advice_names_extras_that_exist():
    """Of pyproject.toml; what ema-optax itself requires is no extra."""

    def advice(module, **more):
        return extras.advice("f", ModuleNotFoundError(name=module), **more)

    end = "which is not installed. Run: pip install"
    assert advice("rich.console") == f"f needs rich, {end} 'ema-optax[cli]'"
    assert advice("flax", extra="a,b") == f"f needs flax, {end} 'ema-optax[a,b]'"
    assert advice("kiwisolver") == f"f needs kiwisolver, {end} kiwisolver"
    assert "[" not in advice("orbax.checkpoint")
    assert advice("orbax").endswith("pip install ema-optax")
    assert advice("ema_optax.nothing") is None
    assert advice(None) is None


def test_needed_by(monkeypatch):
    """The error keeps the module's name; others pass as they are."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"\[cli\]'. Or not.$") as caught,
        extras.needed_by("f", "Or not."),
    ):
        import shtab  # noqa: F401
    assert caught.value.name == "shtab"
    with pytest.raises(ModuleNotFoundError) as caught, extras.needed_by("f"):
        import ema_optax.nothing  # noqa: F401
    assert "f needs" not in str(caught.value)
