"""Errors for what is no optimizer state, or no params, with the call that works."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema_optax._trees import trees
from ema_optax._trees.locating import outline_of, places_of

_OBJECTS = {"Module", "Object", "Pytree", "Optimizer"}  # of Flax NNX


def check_opt_state(opt_state: object, call: str) -> None:
    """Refuses an argument that is no optimizer state at all.

    Args:
        opt_state: The argument.
        call: The user's call.

    Raises:
        TypeError: If it is an optimizer, or an object of Flax NNX.
    """
    if isinstance(opt_state, (optax.GradientTransformation, optax.MultiSteps)):
        raise TypeError(
            f"This is an optimizer (a {type(opt_state).__name__}), not its state. Call "
            f"{call} with the state that optimizer.init(params) and optimizer.update "
            "return."
        )
    check_no_nnx(opt_state, "an optimizer state", call)
    if isinstance(opt_state, (str, bytes)) or callable(opt_state):
        raise TypeError(
            f"This is a {type(opt_state).__name__}, not an optimizer state: {call}."
        )


def check_no_nnx(given: object, wanted: str, call: str) -> None:
    """Refuses modules and optimizers of Flax NNX, which hold params but are no tree.

    Args:
        given: The argument.
        wanted: What it should be, such as "an optimizer state".
        call: The user's call.

    Raises:
        TypeError: If it is such an object.
    """
    if not _nnx_names(given) & _OBJECTS:
        return
    saving = any(word in call.lower() for word in ("save", "resume"))
    instead = (
        "pass *ema_optax.nnx.split(model, optimizer) for both"
        if saving
        else "pass optimizer.opt_state and nnx.state(model, nnx.Param), or call "
        "ema_optax.nnx.shadow_copy(model, optimizer)"
    )
    raise TypeError(
        f"This is an object of Flax NNX (a {type(given).__name__}), not {wanted}. In "
        f"{call} {instead}."
    )


def without_average(
    opt_state: object, other: object, call: str, holds_average: Callable[[Any], bool]
) -> str:
    """Writes the error for an optimizer state without an average.

    Args:
        opt_state: The argument for the optimizer state.
        other: The argument for the params.
        call: The user's call.
        holds_average: Whether a tree holds an average.
    """
    kind = type(opt_state).__name__
    if other is not None and holds_average(other):
        return f"The arguments are swapped, no shadow is in the {kind}: call {call}."
    if "State" in _nnx_names(opt_state):
        return (
            "There is no shadow in this State of Flax NNX, in which an optimizer state "
            "has lost its types. Pass optimizer.opt_state itself; to save and resume, "
            "*ema_optax.nnx.split(model, optimizer)."
        )
    return (
        f"There is no shadow in this {kind}. Chain the average last: "
        "optax.chain(optimizer, ema_optax.ema_params(0.9999)), and pass the whole "
        "optimizer state."
    )


def misfit(shadow: object, params: object, difference: str) -> str:
    """Writes the error for params that a shadow does not fit.

    Where the params hold a tree that the shadow does fit, as variables with statistics
    do, the error names it.

    Args:
        shadow: The averaged tree.
        params: The argument for the params.
        difference: Where the two first differ.
    """
    outline = outline_of(shadow)
    inside = {
        trees.path_name(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if hasattr(leaf, "shape") or isinstance(leaf, (bool, int, float, complex))
    }
    if list(outline.shapes) == [""] and len(inside) > 1:
        return (
            f"The shadow is one array of {np.prod(outline.shapes[''])} elements, as "
            "inside optax.flatten, and these params are a tree. Chain the average "
            "after it: optax.chain(optax.flatten(optimizer), "
            "ema_optax.ema_params(0.9999))."
        )
    places = [place for place in places_of(outline, inside) if place]
    if len(places) == 1 and outline.shapes:
        return (
            f"The shadow is of what these params hold at '{places[0]}': pass that part "
            f"alone, such as variables['{places[0]}']. ({difference}.)"
        )
    return (
        f"The shadow does not fit these params: {difference}. Pass the params that the "
        "optimizer state belongs to."
    )


def _nnx_names(given: object) -> set[str]:
    return {
        kind.__name__
        for kind in type(given).__mro__
        if kind.__module__.startswith("flax.nnx")
    }
