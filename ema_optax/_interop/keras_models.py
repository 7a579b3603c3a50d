"""Keras models on JAX: their variables as trees, and the average of `use_ema`."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax._decays.decay import Decay
from ema_optax._decays.decays import constant
from ema_optax._decays.derived_decays import start_after
from ema_optax._messages import arguments, extras
from ema_optax._messages.text import brief, nearest, some
from ema_optax._trees import trees

# Nested dicts by the variables' paths, or one value for each variable, in their order.
Values: TypeAlias = Mapping[str, Any] | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class KerasAverage:
    """The average that a Keras optimizer keeps with `use_ema=True`.

    Attributes:
        tree: The averages of the trainable variables, in the layout of `split`.
        count: Updates that the average has seen.
        decay: Decay of the average: `start_after(constant(ema_momentum), 1)`. None
            where no decay is the same: with `gradient_accumulation_steps` Keras folds
            at each batch, and an `ema_momentum` of 1 keeps the first update for ever.
    """

    tree: dict[str, Any]
    count: int
    decay: Decay | None


def split(
    model: Any,
    params: Values | None = None,
    rest: Values | None = None,
    *,
    copy: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a Keras model into two trees: trainable variables, and the others.

        params, rest = ema_optax.keras.split(model)
        checkpoint.save("run", params, optimizer.init(params), step=10)

    Each tree is nested dicts by the variables' paths, `dense/kernel`. The second holds
    BatchNorm's statistics and the states of seed generators. The arrays are copies, as
    `fit` donates the model's own; in a callback, copies of that moment.

    Keras counts names through the whole process: the first model that a program builds
    has `sequential/dense/kernel`, the next by the same code
    `sequential_1/dense_1/kernel`. Call `keras.utils.clear_session()` before each, and
    their paths are the same. Names that you give to layers fix the paths of params, but
    not those of seed generators, which take no name.

    Args:
        model: A Keras model that is built, on the backend `jax`.
        params: Other values of the trainable variables to arrange so: the list that a
            loop around `model.stateless_call` has, or its shadow. None for the model's.
        rest: The same of `model.non_trainable_variables`.
        copy: Whether the arrays are copies. Without, they are the model's own, and gone
            after its next step of `fit`.

    Raises:
        RuntimeError: If Keras runs on another backend.
        TypeError: If `model` is no Keras model.
        ValueError: If the model is not built, two variables have one path, or the
            values do not fit its variables.

    Example, with `KERAS_BACKEND=jax` in the environment:

        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        params, _ = ema_optax.keras.split(model)
        params["sequential"]["dense"]["kernel"]
    """
    slots = _slots(model, "ema_optax.keras.split")
    replacements = (params, rest)
    make = _maker(copy)
    trainable, others = (
        trees.nested({path: make(x) for path, x in _fitted(part, values).items()})
        for part, values in zip(slots, replacements, strict=True)
    )
    return trainable, others


def update(
    model: Any,
    params: Values | None = None,
    rest: Values | None = None,
    *,
    copy: bool = True,
) -> None:
    """Puts trees, or lists of values, into the variables of a Keras model.

        like, _ = ema_optax.keras.split(model)
        ema_optax.keras.update(model, checkpoint.restore("run", "shadow", like=like))

    All of it or nothing: every variable gets its value, or all stay as they are. Values
    are copied, and floats cast to the variables' floats; nothing else is cast.

    Args:
        model: A Keras model that is built, on the backend `jax`.
        params: Values of its trainable variables: a tree as of `split`, or a list
            in the order of `model.trainable_variables`. None leaves them alone.
        rest: The same of `model.non_trainable_variables`.
        copy: Whether the model gets copies. Without, it takes the arrays themselves
            where they need no cast, and a step of `fit` donates them.

    Raises:
        RuntimeError: If Keras runs on another backend.
        TypeError: If `model` is no Keras model.
        ValueError: If the model is not built, or a value is missing, is of no variable,
            or has another shape or kind than its variable.
    """
    slots = _slots(model, "ema_optax.keras.update")
    make = _maker(copy)
    assignments: list[tuple[Any, Any]] = []
    for part, values in zip(slots, (params, rest), strict=True):
        if values is not None:
            fitted = _fitted(part, values)
            assignments += [
                (variable, make(fitted[path], variable.dtype))
                for path, variable in part.variables.items()
            ]
    old_values = [variable.value for variable, _ in assignments]
    try:
        for variable, value in assignments:
            variable.assign(value)
    except BaseException:
        for (variable, _), value in zip(assignments, old_values, strict=True):
            variable.assign(value)
        raise


@contextlib.contextmanager
def swapped(model: Any, params: Values, *, copy: bool = True) -> Iterator[Any]:
    """Puts other params into a Keras model, and always puts its own back.

        with ema_optax.keras.swapped(model, ema_optax.keras.average(model).tree):
            model.evaluate(images, labels)

    What is written into the trainable variables inside is gone after the `with`.

    Args:
        model: A Keras model that is built, on the backend `jax`.
        params: As in `update`: an average, a shadow.
        copy: Whether the model gets copies, as in `update`. Without, call no `fit`
            inside.

    Yields:
        The model.

    Raises:
        RuntimeError, TypeError, ValueError: As in `update`.
    """
    # After `fit` with use_ema=True the optimizer shares these arrays and donates them.
    own_params, _ = split(model, copy=copy)
    update(model, params, copy=copy)
    try:
        yield model
    finally:
        update(model, own_params, copy=False)


def average(model: Any, optimizer: Any = None) -> KerasAverage:
    """Takes out the average that a Keras optimizer keeps with `use_ema=True`.

        class Keep(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                average = ema_optax.keras.average(self.model)
                raw, _ = ema_optax.keras.split(self.model)
                checkpoint.save_average(
                    "run", average.tree, params=raw, step=average.count,
                    decay=average.decay,
                )

    At its end `fit` writes the average over the model's variables: the raw params are
    gone then. A callback, which runs before that, has both.

    Args:
        model: A Keras model that is built, on the backend `jax`.
        optimizer: The optimizer of your own loop; None for the one of `compile`.

    Raises:
        RuntimeError: If Keras runs on another backend.
        TypeError: If `model` or `optimizer` is not one of Keras.
        ValueError: If the optimizer has no average, has made no update, or averages
            other variables than the model trains.

    Source: `ema_momentum` in the documentation of `keras.optimizers.Optimizer`.
    """
    keras = _keras("ema_optax.keras.average")
    part, _ = _slots(model, "ema_optax.keras.average")
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                "The model has no optimizer: it was not compiled. Pass the one that "
                "trains it: ema_optax.keras.average(model, optimizer)."
            )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            f"optimizer is a keras.optimizers.Optimizer, got {brief(optimizer)}. The "
            "shadow in a state of Optax is shadow_params(opt_state, params)."
        )
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scale
    if not optimizer.use_ema:
        raise ValueError(
            f"This {type(optimizer).__name__} keeps no average: it was made without "
            "use_ema=True. The params alone are ema_optax.keras.split(model)."
        )
    averages = _averages(optimizer, part)
    count = int(optimizer.iterations)
    if not count:
        raise ValueError(
            "The optimizer has made no update yet, and its average is all zeros. "
            "Train first: Keras starts it at the first update."
        )
    momentum = optimizer.ema_momentum
    has_decay = momentum < 1 and not optimizer.gradient_accumulation_steps
    decay = start_after(constant(momentum), 1) if has_decay else None
    tree = trees.nested({path: jnp.array(v.value) for path, v in averages.items()})
    return KerasAverage(tree, count, decay)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Holds some variables of a model by their paths, and the group's name."""

    name: str
    variables: Mapping[str, Any]


def _keras(caller: str) -> ModuleType:
    keras = _imported(caller)
    if keras.config.backend() != "jax":
        raise RuntimeError(
            f"Keras runs on {keras.config.backend()} here, and {caller} reads the "
            "variables of Keras on JAX. Set the environment variable KERAS_BACKEND=jax "
            "before keras is imported for the first time."
        )
    return keras


def _maker(copy: bool) -> Callable[..., jax.Array]:
    return jnp.array if arguments.flag(copy, "copy") else jnp.asarray


def _imported(caller: str) -> ModuleType:
    with extras.needed_by(caller):
        import keras  # pyright: ignore[reportMissingImports] an extra
    return keras


def _slots(model: Any, caller: str) -> tuple[_Part, _Part]:
    """Splits the variables of a model into those that are trained and the others."""
    keras = _keras(caller)
    if not isinstance(model, keras.Model):
        raise TypeError(f"{caller} takes a keras.Model, got {brief(model)}.")
    if not model.built or not model.variables:
        raise ValueError(
            f"The model '{model.name}' has no variables yet: it is not built. Call it "
            "on a batch, or model.build(input_shape), or give it a keras.Input."
        )
    return (
        _Part("trainable variables", _by_path(model.trainable_variables)),
        _Part("other variables", _by_path(model.non_trainable_variables)),
    )


def _by_path(variables: Sequence[Any]) -> dict[str, Any]:
    by_path: dict[str, Any] = {}
    for variable in variables:
        if variable.path in by_path:
            raise ValueError(
                f"Two variables of the model have the path '{variable.path}', so that "
                "no tree tells them apart. Give the layers names: "
                "Dense(64, name='encoder')."
            )
        by_path[variable.path] = variable
    return by_path


def _fitted(part: _Part, values: Values | None) -> dict[str, Any]:
    """Gives each path a value of its variable's shape and kind."""
    if values is None:
        return {path: variable.value for path, variable in part.variables.items()}
    if isinstance(values, (list, tuple)):
        fitted = _listed(part, cast("Sequence[Any]", values))
    else:
        paths, leaves, _ = trees.flatten(values)
        fitted = dict(zip(paths, leaves, strict=True))
        _check_paths(part, fitted)
    for path, variable in part.variables.items():
        _check_leaf(path, variable, fitted[path])
    return fitted


def _listed(part: _Part, values: Sequence[Any]) -> dict[str, Any]:
    if len(values) != len(part.variables):
        raise ValueError(
            f"The model has {len(part.variables)} {part.name}, and the list "
            f"{len(values)} values. Pass one for each, in their order, as in "
            "[v.value for v in model.trainable_variables], or a tree by path."
        )
    return dict(zip(part.variables, values, strict=True))


def _check_paths(part: _Part, values: Mapping[str, Any]) -> None:
    """Refuses values without a variable, and variables without a value."""
    extra = [path for path in values if path not in part.variables]
    missing = [path for path in part.variables if path not in values]
    if not extra and not missing:
        return
    if missing:
        what = f"no value for '{missing[0]}'"
        near = nearest(missing[0], extra or values) if values else "The tree is empty."
        count = len(missing)
    else:
        what = f"a value for '{extra[0]}', which the model does not have"
        near, count = nearest(extra[0], part.variables), len(extra)
    more = f" and {count - 1:,} more" if count > 1 else ""
    advice = (
        "A tree has one value for each, as ema_optax.keras.split(model) gives them."
    )
    if missing and sorted(map(_without_numbers, extra)) == sorted(
        map(_without_numbers, missing)
    ):
        advice = (
            "Only numbers differ, which Keras counts up through a process: call "
            "keras.utils.clear_session() before the model is built, and it has the "
            "same paths each time."
        )
    raise ValueError(f"Of the {part.name} the tree has {what}{more}. {near} {advice}")


def _without_numbers(path: str) -> str:
    keys = (key.rstrip("0123456789").removesuffix("_") for key in path.split("/"))
    return "/".join(keys)


def _check_leaf(path: str, variable: Any, value: Any) -> None:
    shape, kind = np.shape(value), jnp.result_type(value)
    if shape != tuple(variable.shape):
        raise ValueError(
            f"'{path}' has the shape {shape}, and its variable {tuple(variable.shape)}."
        )
    floats = (jnp.issubdtype(x, jnp.floating) for x in (kind, variable.dtype))
    if kind != variable.dtype and not all(floats):
        raise ValueError(
            f"'{path}' is {kind}, and its variable {variable.dtype}: only floats are "
            "cast to floats."
        )


def _averages(optimizer: Any, part: _Part) -> dict[str, Any]:
    """Finds the average of each variable in an optimizer, by the variable's path.

    Keras names an average by that path, with `_` for `/`, and `_average` at the end.
    """
    ending = "_average"
    by_name: dict[str, list[Any]] = {}
    for variable in optimizer.variables:
        if variable.name.endswith(ending):
            by_name.setdefault(variable.name, []).append(variable)
    averages: dict[str, Any] = {}
    for path, variable in part.variables.items():
        name = path.replace("/", "_") + ending
        candidates = by_name.get(name, [])
        if not candidates:
            raise ValueError(
                f"The optimizer has no average of '{path}'. It averages the variables "
                "that it was built with, and that one is of another model, or was "
                f"frozen then. It has averages called {some(by_name) or 'nothing'}."
            )
        fitting = [v for v in candidates if tuple(v.shape) == tuple(variable.shape)]
        if len(candidates) > 1 or not fitting:
            raise ValueError(
                f"The optimizer has {len(candidates)} averages called '{name}', "
                f"{len(fitting)} of the shape of '{path}': which it is cannot be told. "
                "Give the layers names that differ in more than '/' and '_'."
            )
        averages[path] = fitting[0]
    unused = by_name.keys() - {v.name for v in averages.values()}
    if unused:
        raise ValueError(
            f"The optimizer averages {len(unused)} variables that the model does not "
            f"train now: {some(sorted(unused))}. Set layer.trainable as it was when "
            "the optimizer was built."
        )
    return averages
