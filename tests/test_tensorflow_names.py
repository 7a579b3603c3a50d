"""What each variable of a TensorFlow checkpoint is, told by its name alone."""

import sys

import pytest

from ema_optax import cli, interop
from ema_optax.interop.tensorflow_names import Roles, Variable, roles

AVERAGE = "ExponentialMovingAverage"


def told(*names: str | Variable, average: str = AVERAGE) -> Roles:
    """Returns the roles of variables, by default of float32[2]."""
    variables = [
        Variable(n, n, (2,), "float32") if isinstance(n, str) else n for n in names
    ]
    return roles(variables, average, "model.ckpt-7")


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
        interop.import_tensorflow("model.ckpt-7", tmp_path / "out")
    command = ["import-tf", "model.ckpt-7", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 1
    assert capsys.readouterr().err == (
        "'ema-optax import-tf' needs tensorflow, which is not installed. "
        "Run: pip install 'ema-optax[cli,tensorflow]'\n"
    )
    assert not any(tmp_path.iterdir())
