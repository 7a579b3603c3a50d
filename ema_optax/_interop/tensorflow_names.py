"""Tells what each variable of a TensorFlow checkpoint is, by its name.

A shadow is called `scope/w/ExponentialMovingAverage`, after its variable `scope/w`; so
is whatever an optimizer keeps of it, `scope/w/Adam`. Made inside
`tf.compat.v1.variable_scope("train")`, both begin with `train/`.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from ema_optax._messages.text import some

_COUNTERS = re.compile(r"beta[12]_power(_\d+)?")
# What TensorFlow's own optimizers call what they keep of a variable.
_SLOTS = re.compile(
    r"(Adam|AdamW|Momentum|RMSProp|Adagrad|AdagradDA|Adadelta|Adafactor|Ftrl|LAMB|LARS"
    r"|ProximalAdagrad|GradientDescent|ExponentialMovingAverage)(_\d+)?"
)
_NOT_NUMBERS = {"string": "text", "resource": "no numbers", "variant": "no numbers"}


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable in a TensorFlow checkpoint.

    Attributes:
        name: What TensorFlow calls it.
        key: What the checkpoint calls it: the name, or the path to the object.
        shape: Shape of the variable.
        dtype: By TensorFlow's name.
        role: Role of the variable, where the checkpoint says that it is no parameter.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    role: str | None = None


@dataclasses.dataclass(frozen=True)
class Roles:
    """Sorts the variables of a checkpoint by what they are.

    Attributes:
        params: The parameters, by path: their name, and `NAME/value` where the name is
            a scope of others too.
        shadow: The averages, by the paths of their parameters.
        step: The `global_step`, if there is one.
        left_out: Names of the other variables → what each is.
        scopes: Scopes in which averages were made, `""` for none.
    """

    params: Mapping[str, Variable]
    shadow: Mapping[str, Variable]
    step: Variable | None
    left_out: Mapping[str, str]
    scopes: tuple[str, ...]


def roles(
    variables: Iterable[Variable], average: str, where: str, scope: str | None = None
) -> Roles:
    """Tells parameters, averages, the step and the rest apart.

    Args:
        variables: All variables of the checkpoint.
        average: Last part of an average's name.
        where: The checkpoint, for errors.
        scope: Scope in which the averages were made, `""` for none; None for any.

    Raises:
        ValueError: If there is no average, or names do not tell of which variable.

    >>> names = ["w", "w/ExponentialMovingAverage", "w/Adam", "b"]
    >>> sorted_out = roles(
    ...     [Variable(n, n, (3,), "float32") for n in names],
    ...     "ExponentialMovingAverage",
    ...     "model.ckpt",
    ... )
    >>> sorted(sorted_out.params), list(sorted_out.shadow), sorted_out.left_out
    (['b', 'w'], ['w'], {'w/Adam': "slot 'Adam'"})
    """
    named: dict[str, Variable] = {}
    for variable in sorted(variables, key=lambda v: v.name):
        first = named.setdefault(variable.name, variable)
        if first is not variable:
            raise ValueError(
                f"{where} holds two variables called '{variable.name}', '{first.key}' "
                f"and '{variable.key}': names tell which average belongs to which. "
                "Give the model's variables names of their own, and save it again."
            )
    owners = _owners(named, average, scope, where)
    scopes = {_scope_of(name, owner) for name, owner in owners.items()}
    names_beneath = collections.Counter(
        name.rpartition("/")[2] for name in named if _holder(name, named, scopes)
    )
    step = _step(named)
    params: dict[str, Variable] = {}
    left_out: dict[str, str] = {}
    for name, variable in named.items():
        if name in owners:
            continue
        last = name.rpartition("/")[2]
        holder = _holder(name, named, scopes)
        role = variable.role or _NOT_NUMBERS.get(variable.dtype)
        if role is None and variable.dtype.startswith(("qint", "quint")):
            role = "quantized"
        if role is None and _COUNTERS.fullmatch(last):
            role = "an optimizer's counter"
        if role is None and last == average:
            role = _why_not(name, owners)
        if role is None and holder and name not in owners.values():
            # A slot has the shape of its variable, or lies under several variables.
            # Else it is a parameter, in a module that has a parameter's name.
            alike = named[holder].shape == variable.shape or names_beneath[last] > 1
            is_slot = alike or average in holder.split("/")
            role = f"slot '{last}'" if is_slot or _SLOTS.fullmatch(last) else None
        if role is not None:
            left_out[name] = role
        elif variable is not step:
            params[name] = variable
    shadow: dict[str, Variable] = {}
    for name, owner in sorted(owners.items()):
        if owner not in params:
            left_out[name] = "average of no parameter in the checkpoint"
        elif owner in shadow:
            raise ValueError(
                f"'{owner}' has two averages in {where}, '{shadow[owner].name}' and "
                f"'{name}'. Pass the scope of one: "
                f"scope={_scope_of(shadow[owner].name, owner)!r}."
            )
        else:
            shadow[owner] = named[name]
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
    paths = _paths(params)
    return Roles(
        {paths[name]: variable for name, variable in params.items()},
        {paths[name]: variable for name, variable in shadow.items()},
        step,
        {name: left_out[name] for name in sorted(left_out)},
        tuple(sorted({_scope_of(v.name, name) for name, v in shadow.items()})),
    )


def _owners(
    named: Mapping[str, Variable], average: str, scope: str | None, where: str
) -> dict[str, str]:
    """Names the variable of each average that has one."""
    numbers = {
        name: variable
        for name, variable in named.items()
        if variable.role is None and variable.dtype not in _NOT_NUMBERS
    }
    averages = {
        name: name.rpartition("/")[0]
        for name in numbers
        if name.rpartition("/")[2] == average
    }
    if scope is not None:
        scope = scope.strip("/")
        inside = {
            name: base[len(scope) :].strip("/")
            for name, base in averages.items()
            if f"{base}/".startswith(f"{scope}/" if scope else "")
        }
        owners = {name: owner for name, owner in inside.items() if owner in numbers}
        if not owners:
            known_scopes = {
                _scope_of(n, o) for n, o in _owners(named, average, None, where).items()
            }
            raise ValueError(
                f"No average in {where} was made in the scope {scope!r}. "
                f"Averages are in {some(map(repr, sorted(known_scopes))) or 'none'}."
            )
        return owners
    owners = {name: base for name, base in averages.items() if base in numbers}
    direct = set(owners.values())
    for name, base in averages.items():
        if name in owners:
            continue
        for owner in _endings(base):
            variable = numbers.get(owner)
            alike = variable is not None and (variable.shape, variable.dtype) == (
                named[name].shape,
                named[name].dtype,
            )
            if alike and owner not in direct:
                owners[name] = owner
                break
    return owners


def _scope_of(average: str, owner: str) -> str:
    """Returns the scope that an average of a variable was made in."""
    return average.rpartition("/")[0].removesuffix(owner).strip("/")


def _why_not(name: str, owners: Mapping[str, str]) -> str:
    """Says why an average is left out."""
    base = name.rpartition("/")[0]
    for owner in _endings(base):
        if owner in owners.values():
            return (
                f"another average of '{owner}', of the scope '{_scope_of(name, owner)}'"
            )
    return "average of no parameter in the checkpoint"


def _holder(
    name: str, named: Mapping[str, Variable], scopes: Collection[str]
) -> str | None:
    """Names the variable that another one's name lies under, if there is one."""
    for scope in {"", *scopes}:
        if not scope or name.startswith(f"{scope}/"):
            for above in reversed(_above(name[len(scope) :].strip("/"))):
                if above in named:
                    return above
    return None


def _paths(params: Collection[str]) -> dict[str, str]:
    """Gives each parameter a path: no leaf of a tree may have others beneath it."""
    scopes = {above for name in params for above in _above(name)}
    paths = {}
    for name in params:
        path = name
        if name in scopes:
            path = f"{name}/value"
            while path in params or path in scopes:
                path += "_"
        paths[name] = path
    return paths


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


def _endings(name: str) -> list[str]:
    """Lists the endings of a name, without its first scopes, the longest first."""
    parts = name.split("/")
    return ["/".join(parts[i:]) for i in range(1, len(parts))]


def _without_shadow(
    params: Mapping[str, Variable],
    left_out: Mapping[str, str],
    average: str,
    where: str,
) -> str:
    contents = (
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
            f"the variables that they are of; it holds {contents}. Pass a checkpoint "
            "with both, as tf.compat.v1.train.Saver() writes it."
        )
    return (
        f"No variable in {where} has an average called '{average}'. It holds {contents}"
        f"{beside}. If the average has another name, pass average=…; a checkpoint "
        "without one has nothing to bring here."
    )
