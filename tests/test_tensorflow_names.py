"""What each variable of a TensorFlow checkpoint is, told by its name alone."""

import sys

import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax._interop.tensorflow_names import Roles, Variable, roles

AVERAGE = "ExponentialMovingAverage"


def told(
    *names: str | Variable, average: str = AVERAGE, scope: str | None = None
) -> Roles:
    """Returns the roles of variables, by default of float32[2]."""
    variables = [
        Variable(n, n, (2,), "float32") if isinstance(n, str) else n for n in names
    ]
    return roles(variables, average, "model.ckpt-7", scope)


def test_params_shadows_and_the_rest():
    """A slot is what lies under a variable; scopes and odd names are not."""
    step = Variable("global_step", "global_step", (), "int64")
    found = told(
        "enc/w",
        f"enc/w/{AVERAGE}",
        f"enc/w/{AVERAGE}_1",
        "enc/w/Adam",
        "enc/w/Adam_1",
        "enc/w_1",
        "enc/Adam/w",  # a scope that somebody called Adam
        f"{AVERAGE}/w",
        "Mean",
        "beta1_power",
        "opt/beta2_power_1",
        "loss/ExponentialMovingAverage",  # of a tensor, which is no variable
        "loss/ExponentialMovingAverage/loss/ExponentialMovingAverage/biased",
        Variable("vocabulary", "vocabulary", (), "string"),
        Variable("table", "table", (), "resource"),
        Variable("q", "q", (), "qint8"),
        step,
    )
    assert set(found.params) == {
        "enc/w",
        "enc/w_1",
        "enc/Adam/w",
        f"{AVERAGE}/w",
        "Mean",
    }
    assert {k: v.name for k, v in found.shadow.items()} == {"enc/w": f"enc/w/{AVERAGE}"}
    assert found.step is step
    assert found.left_out == {
        f"enc/w/{AVERAGE}_1": f"slot '{AVERAGE}_1'",
        "enc/w/Adam": "slot 'Adam'",
        "enc/w/Adam_1": "slot 'Adam_1'",
        "beta1_power": "an optimizer's counter",
        "opt/beta2_power_1": "an optimizer's counter",
        f"loss/{AVERAGE}": "average of no parameter in the checkpoint",
        f"loss/{AVERAGE}/loss/{AVERAGE}/biased": "slot 'biased'",
        "vocabulary": "text",
        "table": "no numbers",
        "q": "quantized",
    }


def test_a_parameter_whose_name_is_a_scope():
    """`a` beside `a/b`: both are parameters, and a nested tree can hold both."""
    found = told("a", f"a/{AVERAGE}", "a/Adam", "a/b", f"a/b/{AVERAGE}", "a/b/Adam")
    assert {k: v.name for k, v in found.params.items()} == {
        "a/value": "a",
        "a/b": "a/b",
    }
    assert {k: v.name for k, v in found.shadow.items()} == {
        "a/value": f"a/{AVERAGE}",
        "a/b": f"a/b/{AVERAGE}",
    }
    assert set(found.left_out) == {"a/Adam", "a/b/Adam"}
    taken = told("a", "a/value", f"a/{AVERAGE}", f"a/value/{AVERAGE}")
    assert {k: v.name for k, v in taken.params.items()} == {
        "a/value_": "a",
        "a/value": "a/value",
    }


def test_a_slot_or_a_parameter_beneath_another():
    """Without an average it is a slot, unless its shape and name are nobody else's."""
    other = Variable("a/b", "a/b", (3, 4), "float32")
    rows = [Variable(f"{of}/vr", "", (1,), "float32") for of in "ac"]
    inside = Variable(f"a/{AVERAGE}/local_step", "", (), "float32")
    ours = Variable("a/Adam", "", (7,), "float32")
    found = told(
        "a", f"a/{AVERAGE}", "c", f"c/{AVERAGE}", "c/own", other, *rows, inside, ours
    )
    assert set(found.params) == {"a/value", "a/b", "c"}
    assert set(found.left_out) == {
        "a/vr",
        "c/vr",
        inside.name,
        "a/Adam",
        "c/own",
    }


def test_averages_made_in_a_scope():
    """TensorFlow puts the scope before the whole name; so it does for slots."""
    names = ["conv/w", "conv/b", "train/conv/w/Adam"]
    found = told(*names, f"train/conv/w/{AVERAGE}", f"a/b/conv/b/{AVERAGE}")
    assert set(found.params) == {"conv/w", "conv/b"}
    assert {k: v.name for k, v in found.shadow.items()} == {
        "conv/w": f"train/conv/w/{AVERAGE}",
        "conv/b": f"a/b/conv/b/{AVERAGE}",
    }
    assert found.scopes == ("a/b", "train")
    assert found.left_out == {"train/conv/w/Adam": "slot 'Adam'"}
    # Of another shape, it is of a variable that is not there.
    wide = Variable(f"train/conv/w/{AVERAGE}", "", (9,), "float32")
    with pytest.raises(ValueError, match="none of the variables"):
        told("conv/w", wide)


def test_averages_in_several_scopes():
    """Its own place is the first; of two others the caller names one."""
    near = told("w", f"w/{AVERAGE}", f"train/w/{AVERAGE}")
    assert near.shadow["w"].name == f"w/{AVERAGE}"
    assert near.scopes == ("",)
    assert "'w', of the scope 'train'" in near.left_out[f"train/w/{AVERAGE}"]
    two = ["w", f"slow/w/{AVERAGE}", f"fast/w/{AVERAGE}"]
    with pytest.raises(ValueError, match=r"'w' has two averages.*scope='fast'"):
        told(*two)
    assert told(*two, scope="slow").shadow["w"].name == f"slow/w/{AVERAGE}"
    assert told(*two, f"w/{AVERAGE}", scope="").shadow["w"].name == f"w/{AVERAGE}"
    with pytest.raises(ValueError, match=r"scope 'slwo'. Averages are in 'fast', 'slo"):
        told(*two, scope="slwo")


def test_an_average_of_another_name():
    """The others are slots then."""
    found = told("w", "w/Slow", f"w/{AVERAGE}", average="Slow")
    assert found.shadow["w"].name == "w/Slow"
    assert found.left_out == {f"w/{AVERAGE}": f"slot '{AVERAGE}'"}


@pytest.mark.parametrize(
    ("shape", "dtype", "is_step"),
    [((), "int64", True), ((), "int32", True), ((), "float32", False)],
)
def test_the_step_is_a_whole_number(shape, dtype, is_step):
    """A global_step of another kind is a variable like others."""
    odd = Variable("train/global_step", "", shape, dtype)
    found = told("w", f"w/{AVERAGE}", odd)
    assert (found.step is odd) == is_step
    assert (odd.name in found.params) == (not is_step)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["w", "b"], r"No variable in model\.ckpt-7 has .* 2 variables, such as 'b'"),
        (["w", "w/Adam", "w/Ema"], "beside them slot 'Adam', slot 'Ema'.*average=…"),
        ([f"w/{AVERAGE}"], f"averages, such as 'w/{AVERAGE}', and none of the var"),
        ([], "It holds none"),
        (
            ["w", Variable(f"w/{AVERAGE}", "", (3,), "float32")],
            r"'w' is float32\[2\] .* is float32\[3\]",
        ),
        (
            ["w", Variable(f"w/{AVERAGE}", "", (2,), "bfloat16")],
            r"'w' is float32\[2\] .* is bfloat16\[2\]",
        ),
        (
            [Variable("w", "a/w", (), "float32"), Variable("w", "b/w", (), "float32")],
            "two variables called 'w', 'a/w' and 'b/w'",
        ),
    ],
)
def test_what_cannot_be_told(names, says):
    """No average, an average of another variable, and two variables of one name."""
    with pytest.raises(ValueError, match=says):
        told(*names)


def test_without_tensorflow(monkeypatch, tmp_path, capsys):
    """The extra that brings it is named, by the function and by the command."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ModuleNotFoundError, match=r"'ema-optax\[tensorflow\]'"):
        ema_optax.tensorflow.import_checkpoint("model.ckpt-7", tmp_path / "out")
    command = ["import-tf", "model.ckpt-7", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 1
    assert capsys.readouterr().err == (
        "'ema-optax import-tf' needs tensorflow, which is not installed. "
        "Run: pip install 'ema-optax[cli,tensorflow]'\n"
    )
    assert not any(tmp_path.iterdir())
