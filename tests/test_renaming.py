"""Paths are renamed by themselves, by beginnings and by patterns."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax._trees.renaming import Renames

PATHS = ["enc/l_0/kernel", "enc/l_0/bias", "enc/l_12/kernel", "kernel", "kernel/kernel"]


def renamed(rename, paths=PATHS, **options):
    renames = Renames(rename, **options)
    return [renames(path) for path in paths]


@pytest.mark.parametrize(
    ("rename", "new"),
    [
        # Everywhere, with the last key of a path where two would fit.
        (
            {"**/kernel": "**/weight"},
            [
                "enc/l_0/weight",
                "enc/l_0/bias",
                "enc/l_12/weight",
                "weight",
                "kernel/weight",
            ],
        ),
        # Part of a key, and a beginning: what follows stays.
        (
            {"enc/l_*": "h/*"},
            ["h/0/kernel", "h/0/bias", "h/12/kernel", "kernel", "kernel/kernel"],
        ),
        # Exactly one key is not any number of them.
        ({"*/kernel": "*/w"}, [*PATHS[:4], "kernel/w"]),
        # First a beginning, then a pattern on what came out.
        (
            {"enc": "model/enc", "model/**/kernel": "m/**/weight"},
            ["m/enc/l_0/weight", "model/enc/l_0/bias", "m/enc/l_12/weight", *PATHS[3:]],
        ),
        # A leaf's own path decides alone; the first of two patterns too.
        (
            {"**/kernel": "**/weight", "**/l_0/**": "**/first/**", "kernel": "w"},
            [
                "enc/l_0/weight",
                "enc/first/bias",
                "enc/l_12/weight",
                "w",
                "kernel/weight",
            ],
        ),
    ],
)
def test_patterns(rename, new):
    """What each path becomes, and nothing else."""
    found = renamed(rename)
    if "kernel" in rename:  # as a beginning of kernel/kernel too
        new = [*new[:4], "w/weight"]
    assert found == new


def test_two_patterns_may_swap():
    """Only one pattern decides for a path, so none undoes another."""
    swap = {"**/a": "**/b", "**/b": "**/a"}
    assert renamed(swap, ["x/a", "x/b", "a"]) == ["x/b", "x/a", "b"]


def test_what_each_key_fitted():
    """Every path is listed once for each key that decided on it."""
    renames = Renames({"enc": "e", "**/kernel": "**/w", "kernel": "k"})
    for path in PATHS:
        renames(path)
    assert renames.used == {
        "enc": PATHS[:3],
        "**/kernel": [PATHS[0], PATHS[2], PATHS[4]],
        "kernel": [PATHS[3], PATHS[4]],
    }


def test_special_characters_are_themselves():
    """Dots, brackets and pluses are no expression."""
    paths = ["a.b/w", "axb/w", "c[0]+/w"]
    assert renamed({"a.*": "*"}, paths) == ["b/w", "axb/w", "c[0]+/w"]
    assert renamed({"c[0]*": "d*"}, paths)[2] == "d+/w"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("**/kernel", "weight", "has none"),
        ("**/kernel", "*/weight", r"with \*\*, and .* has \*:"),
        ("*/kernel", "*/*", r"has \* \*:"),
    ],
)
def test_both_sides_have_the_same_wildcards(key, value, says):
    """Otherwise nobody can say what stands where."""
    with pytest.raises(ValueError, match=says):
        Renames({key: value})


def test_a_pattern_that_fits_nothing_is_an_error():
    """With the nearest that is there; one hidden by an earlier pattern too."""
    for rename in [{"**/kernle": "**/weight"}, {"*": "*", "**/bias": "**/b"}]:
        renames = Renames(rename)
        for path in PATHS:
            renames(path)
        with pytest.raises(ValueError, match="fits no leaf"):
            renames.check_used(PATHS, "leaf")


@pytest.fixture
def run(tmp_path):
    layer = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.arange(3.0)}
    params = {"enc": {f"l_{i}": {k: v + i for k, v in layer.items()} for i in (0, 12)}}
    checkpoint.save_average(tmp_path / "run", params, params=params, step=3)
    return tmp_path / "run", params


def test_restore_into_a_model_of_other_names(run):
    """Slots by pattern, each with the leaf that is meant."""
    folder, params = run
    like = {
        "h": {
            str(i): {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(3)} for i in (0, 12)
        }
    }
    rename = {"h/*": "enc/l_*", "**/weight": "**/kernel"}
    # One pattern decides: a slot's beginning is not enough here.
    with pytest.raises(ValueError, match="no leaf 'enc/l_0/weight'"):
        checkpoint.restore(folder, "shadow", like, rename=rename)
    rename = {"h/*/weight": "enc/l_*/kernel", "h/*": "enc/l_*"}
    found = checkpoint.restore(folder, "shadow", like, rename=rename)
    for i, (slot, leaf) in itertools.product(
        (0, 12), [("weight", "kernel"), ("bias", "bias")]
    ):
        np.testing.assert_array_equal(
            found["h"][str(i)][slot], params["enc"][f"l_{i}"][leaf]
        )


def test_the_command_lists_what_each_pattern_fitted(run, tmp_path, capsys):
    """And the file holds those names; a pattern may leave out."""
    numpy = pytest.importorskip("safetensors.numpy")
    folder, params = run
    names, out = tmp_path / "names.json", tmp_path / "model.safetensors"
    names.write_text(json.dumps({"**/kernel": "**/weight", "**/l_0/bias": None}))
    command = ["export", str(folder), "--rename", str(names), "--out", str(out)]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "**/kernel -> **/weight: 2 leaves, enc/l_0/kernel -> enc.l_0.weight, "
        "enc/l_12/kernel -> enc.l_12.weight" in lines
    )
    assert "**/l_0/bias -> left out: 1 leaves, enc/l_0/bias -> left out" in lines
    assert set(numpy.load_file(out)) == {
        "enc.l_0.weight",
        "enc.l_12.weight",
        "enc.l_12.bias",
    }
    done = ema_optax.safetensors.export(
        folder, out, rename={"**/kernel": "**/weight"}, overwrite=True
    )
    assert done.renamed == {"**/kernel": ["enc/l_0/kernel", "enc/l_12/kernel"]}
    np.testing.assert_array_equal(
        numpy.load_file(out)["enc.l_0.weight"], params["enc"]["l_0"]["kernel"]
    )
