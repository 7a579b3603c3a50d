"""Which variable of a TensorFlow checkpoint is what, by the names it gives them.

A shadow is called `scope/w/ExponentialMovingAverage`, after its variable `scope/w`; so
is whatever an optimizer keeps of it, `scope/w/Adam`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from ema_optax.text import some

_COUNTERS = re.compile(r"beta[12]_power(_\d+)?")
_NOT_NUMBERS = {"string": "text", "resource": "no numbers", "variant": "no numbers"}


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable in a TensorFlow checkpoint.

    Attributes:
        name: What TensorFlow calls it.
        key: What the checkpoint calls it: the name, or the path to the object.
        shape: Its shape.
        dtype: By TensorFlow's name.
        role: What it is, where the checkpoint itself says that it is no parameter.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    role: str | None = None


@dataclasses.dataclass(frozen=True)
class Roles:
    """What each variable is.

    Attributes:
        params: The parameters, by name, which is their path too.
        shadow: The averages, by the names of their parameters.
        step: The `global_step`, if there is one.
        left_out: What the others are, by name.
    """

    params: Mapping[str, Variable]
    shadow: Mapping[str, Variable]
    step: Variable | None
    left_out: Mapping[str, str]


def roles(variables: Iterable[Variable], average: str, where: str) -> Roles:
    """Tells parameters, averages, the step and the rest apart.

    Args:
        variables: All of the checkpoint.
        average: Last part of an average's name.
        where: The checkpoint, for errors.

    Raises:
        ValueError: If there is no average, or it cannot be told of which variable.

    >>> names = ["w", "w/ExponentialMovingAverage", "w/Adam", "b"]
    >>> found = roles(
    ...     [Variable(n, n, (3,), "float32") for n in names],
    ...     "ExponentialMovingAverage",
    ...     "model.ckpt",
    ... )
    >>> sorted(found.params), list(found.shadow), found.left_out
    (['b', 'w'], ['w'], {'w/Adam': "slot 'Adam'"})
    """
    named: dict[str, Variable] = {}
    for variable in sorted(variables, key=lambda v: v.name):
        same = named.setdefault(variable.name, variable)
        if same is not variable:
            raise ValueError(
                f"{where} holds two variables called '{variable.name}', '{same.key}' "
                f"and '{variable.key}': names tell which average belongs to which. "
                "Give the model's variables names of their own, and save it again."
            )
    params: dict[str, Variable] = {}
    shadow: dict[str, Variable] = {}
    left_out: dict[str, str] = {}
    step = _step(named)
    for name, variable in named.items():
        parent, _, last = name.rpartition("/")
        role = variable.role or _NOT_NUMBERS.get(variable.dtype)
        if role is None and variable.dtype.startswith(("qint", "quint")):
            role = "quantized"
        if role is None and _COUNTERS.fullmatch(last):
            role = "an optimizer's counter"
        if role is None and last == average:
            shadow[parent] = variable
            continue
        if role is None and any(above in named for above in _above(name)):
            role = f"slot '{last}'"
        if role is not None:
            left_out[name] = role
        elif variable is not step:
            params[name] = variable
    for name in set(shadow) - set(params):
        left_out[shadow.pop(name).name] = "average of no parameter in the checkpoint"
    if not shadow:
        raise ValueError(_without_shadow(params, left_out, average, where))
    for name, variable in shadow.items():
        raw = params[name]
        if (raw.shape, raw.dtype) != (variable.shape, variable.dtype):
            raise ValueError(
                f"'{name}' is {raw.dtype}{list(raw.shape)} in {where}, and its average "
                f"'{variable.name}' is {variable.dtype}{list(variable.shape)}: they "
                "are not of one variable. Pass the checkpoint of one run."
            )
    left_out = {name: left_out[name] for name in sorted(left_out)}
    return Roles(params, shadow, step, left_out)


def _step(named: Mapping[str, Variable]) -> Variable | None:
    steps = [
        variable
        for name, variable in named.items()
        if name.rpartition("/")[2] == "global_step"
        and variable.shape == ()
        and variable.dtype in ("int32", "int64")
    ]
    at_top = [variable for variable in steps if variable.name == "global_step"]
    return next(iter(at_top or steps), None)


def _above(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _without_shadow(
    params: Mapping[str, Variable],
    left_out: Mapping[str, str],
    average: str,
    where: str,
) -> str:
    held = (
        f"{len(params)} variables, such as {some(map(repr, params))}"
        if params
        else "none"
    )
    slots = sorted({role for role in left_out.values() if role.startswith("slot ")})
    beside = f", and beside them {some(slots)}" if slots else ""
    orphans = [name for name in left_out if name.rpartition("/")[2] == average]
    if orphans:
        return (
            f"{where} holds averages, such as {some(map(repr, orphans))}, and none of "
            f"the variables that they are of; it holds {held}. Pass a checkpoint with "
            "both, as tf.compat.v1.train.Saver() writes it."
        )
    return (
        f"No variable in {where} has an average called '{average}'. It holds {held}"
        f"{beside}. If the average has another name, pass average=…; a checkpoint "
        "without one has nothing to bring here."
    )
