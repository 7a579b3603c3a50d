"""Find the shadow in any optimizer state, and put it where the model expects params."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ema_optax._averages import averages
from ema_optax._trees import mistaken, trees


def shadow_params(
    opt_state: Any, params: Any = None, *, name: str | None = None
) -> Any:
    """Returns the shadow found anywhere in an optimizer state.

    Works through `optax.chain`, `MultiSteps`, `masked`, `inject_hyperparams` and every
    other state that is a pytree. Shadows of disjoint parts of the params, as under
    `optax.multi_transform`, are joined.

    The arrays are copies: they outlive a train step that donates its state. Under
    `jax.jit` the copy costs nothing.

    Args:
        opt_state: The optimizer state, or the state of an average itself.
        params: The live params. With them the result has exactly their structure and
            dtypes, and the leaves that are not averaged are theirs. Needed with
            `bema_params`, whose shadow is computed from them.
        name: Which shadow, where the decays were given by name or there are several.

    Returns:
        A tree like the params. Without `params`: the shadow as it is stored, with
        `optax.MaskedNode()` where a leaf is not averaged.

    Raises:
        ValueError: If there is no shadow or no such name, if there are several and none
            was named, or if the params do not fit it or are missing.

    >>> import optax, ema_optax
    >>> params = {"w": jnp.ones(2, jnp.bfloat16), "steps": jnp.int32(7)}
    >>> state = optax.chain(optax.identity(), ema_optax.ema_params(0.99)).init(params)
    >>> shadow_params(state, params)
    {'steps': Array(7, dtype=int32), 'w': Array([1, 1], dtype=bfloat16)}
    """
    return read(opt_state, params, name, "shadow_params(opt_state, params)")


def read(opt_state: Any, params: Any, name: str | None, call: str) -> Any:
    """Returns the shadow as `shadow_params` does, for a call that errors name."""
    mistaken.check_opt_state(opt_state, "shadow_params(opt_state, params)")
    found = averages.find(opt_state, call=call, params=params).of(name)
    shadow = averages.joined({each.where: each.read(params) for each in found})
    if params is None:
        return jax.tree.map(_own, shadow)
    shadow = trees.arranged(shadow, params)
    difference = trees.difference(shadow, params, ("shadow", "params"))
    if difference:
        raise ValueError(mistaken.misfit(shadow, params, difference))
    slots, structure = jax.tree.flatten(params, is_leaf=trees.is_placeholder)
    leaves = jax.tree.leaves(shadow, is_leaf=trees.is_placeholder)
    return jax.tree.unflatten(structure, map(_fill, leaves, slots))


def with_shadow(train_state: Any, *, name: str | None = None) -> Any:
    """Returns a train state whose params are the shadow, for evaluation.

    Keep training from the original: the result's optimizer state still belongs to the
    raw params.

    Args:
        train_state: Anything with `params` and `opt_state`: Flax's `TrainState`, a
            dataclass, a NamedTuple, or a dict with these keys.
        name: Which shadow, as in `shadow_params`.

    Raises:
        TypeError: If it is no such object.
        ValueError: As in `shadow_params`.

    >>> import optax, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> state = {"params": params, "opt_state": ema_optax.ema_params(0.99).init(params)}
    >>> with_shadow(state)["params"]
    {'w': Array([1., 1.], dtype=float32)}
    """
    if isinstance(train_state, Mapping):
        parts = train_state
    else:
        names = ("params", "opt_state")
        parts = {n: getattr(train_state, n) for n in names if hasattr(train_state, n)}
    if "params" not in parts or "opt_state" not in parts:
        raise TypeError(
            f"with_shadow needs something with 'params' and 'opt_state', got "
            f"{type(train_state).__name__}. For other layouts call "
            "shadow_params(opt_state, params)."
        )
    params = read(parts["opt_state"], parts["params"], name, "with_shadow(train_state)")
    if isinstance(train_state, Mapping):
        return type(train_state)({**train_state, "params": params})  # pyright: ignore[reportCallIssue]
    if hasattr(train_state, "replace"):
        return train_state.replace(params=params)
    if hasattr(train_state, "_replace"):
        return train_state._replace(params=params)
    if dataclasses.is_dataclass(train_state) and not isinstance(train_state, type):
        return dataclasses.replace(train_state, params=params)
    raise TypeError(
        f"with_shadow cannot replace the params of a {type(train_state).__name__}: it "
        "has neither replace() nor _replace() and is no dataclass. Call "
        "shadow_params(opt_state, params)."
    )


def _fill(shadow: object, param: object) -> Any:
    if trees.is_placeholder(shadow):
        return _own(param)
    return jnp.array(shadow, dtype=jnp.result_type(param))


def _own(leaf: object) -> Any:
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
