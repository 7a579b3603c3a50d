"""Find the shadow in any optimizer state, and put it where the model expects params."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ema_optax import bema, placement, trees
from ema_optax.states import (
    BemaParamsState,
    EmaParamsState,
    NamedShadowsState,
    record_of,
    stored_shadow,
)

_BEMA = " (bema_params)"  # after the path of a state, in errors


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
    shadow = joined(find(opt_state, params, name))
    if params is None:
        return jax.tree.map(_own, shadow)
    shadow = trees.arranged(shadow, params)
    difference = trees.difference(shadow, params, ("shadow", "params"))
    if difference:
        raise ValueError(
            f"The shadow does not fit these params: {difference}. Pass the params that "
            "the optimizer state belongs to."
        )
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
    params = shadow_params(parts["opt_state"], parts["params"], name=name)
    if isinstance(train_state, Mapping):
        return type(train_state)({**train_state, "params": params})  # pyright: ignore
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


def is_ema_state(node: Any) -> bool:
    """Returns whether a node of an optimizer state holds shadows."""
    return isinstance(node, EmaParamsState)


def ema_states(opt_state: Any) -> dict[str, EmaParamsState]:
    """Returns every state that holds shadows, by its path."""
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_ema_state)[0]
    return {trees.path_name(path): node for path, node in nodes if is_ema_state(node)}


def bema_states(opt_state: Any) -> dict[str, BemaParamsState]:
    """Returns every state of `bema_params`, by its path and what it is."""

    def found(node: Any) -> bool:
        return isinstance(node, BemaParamsState)

    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=found)[0]
    return {
        f"{trees.path_name(path)}{_BEMA}": node for path, node in nodes if found(node)
    }


def names_of(state: EmaParamsState) -> list[str]:
    """Returns the names of a state's shadows; an empty one where they have none."""
    return list(stored_shadow(state)) if isinstance(state, NamedShadowsState) else [""]


def find(opt_state: Any, params: Any, name: str | None) -> dict[str, Any]:
    """Returns the shadows called `name`, by the path of their state.

    Not copied; where there are params, where those live.

    Raises:
        ValueError: If there is none, or several and none was named.
    """
    states, bemas = ema_states(opt_state), bema_states(opt_state)
    if not states and not bemas:
        raise ValueError(
            f"There is no shadow in this {type(opt_state).__name__}. Chain the average "
            "last: optax.chain(optimizer, ema_optax.ema_params(0.9999)), and pass the "
            "whole optimizer state."
        )
    held = {path: _held(state, params) for path, state in states.items()}
    named = {p: held[p] for p, s in states.items() if isinstance(s, NamedShadowsState)}
    unnamed = {p: held[p] for p in states if p not in named}
    names = sorted({key for shadows in named.values() for key in shadows})
    if name is None and not named:
        return unnamed | {at: _read(at, s, params) for at, s in bemas.items()}
    if name is None and not unnamed and not bemas and len(names) == 1:
        return {p: shadows[names[0]] for p, shadows in named.items()}
    chosen = {p: shadows[name] for p, shadows in named.items() if name in shadows}
    if not chosen:
        asked = "none was asked for" if name is None else f"{name!r} is none of them"
        have = f"shadows named {', '.join(names)}" if names else "one unnamed shadow"
        call = f"name={names[0]!r}" if names else "no name"
        if names and bemas:
            have += f" and one without a name at '{min(bemas)}'"
            call += ", or with the part of the state that holds the one without"
        raise ValueError(
            f"The optimizer state has {have}, and {asked}. Call "
            f"shadow_params(opt_state, params) with {call}."
        )
    return chosen


def _held(state: EmaParamsState, params: Any) -> Any:
    """Returns the shadows of a state; where there are params, where those live."""
    record = record_of(state)
    homes = record.homes if record else None
    if homes is None or params is None:
        return state.shadow

    def one(shadow: Any) -> Any:
        leaves, structure = jax.tree.flatten(shadow, is_leaf=trees.is_placeholder)
        pairs = zip(leaves, homes, strict=True)
        return jax.tree.unflatten(
            structure, [placement.gather(leaf, home) for leaf, home in pairs]
        )

    if isinstance(state, NamedShadowsState):
        return {name: one(shadow) for name, shadow in state.shadow.items()}
    return one(state.shadow)


def _read(at: str, state: BemaParamsState, params: Any) -> Any:
    if params is None:
        raise ValueError(
            f"The shadow at '{at}' is computed from the live params, and there are "
            "none. Call shadow_params(opt_state, params). The average without its "
            "correction is the state's `average`."
        )
    return bema.corrected(state, trees.arranged(params, state.average))


def joined(shadows: Mapping[str, Any]) -> Any:
    """Returns the one tree of shadows that cover disjoint leaves.

    Args:
        shadows: Trees of one structure by the paths of their states, not copied.

    Raises:
        ValueError: If a leaf is averaged in more than one of them.
    """
    (path, joined), *others = shadows.items()
    for other_path, other in others:
        leaves, structure = jax.tree.flatten(joined, is_leaf=trees.is_placeholder)
        more = jax.tree.leaves(other, is_leaf=trees.is_placeholder)
        if jax.tree.structure(other, is_leaf=trees.is_placeholder) != structure or any(
            not trees.is_placeholder(a) and not trees.is_placeholder(b)
            for a, b in zip(leaves, more, strict=True)
        ):
            advice = (
                "Give them names, in one transform: "
                "ema_params({'fast': 0.99, 'slow': 0.9999})"
            )
            if (path + other_path).endswith(_BEMA):
                advice = (
                    "Give the one of ema_params a name: ema_params({'slow': 0.999})"
                )
            raise ValueError(
                f"The optimizer state has several shadows of the same params, at "
                f"'{path}' and '{other_path}'. {advice}, and read "
                "shadow_params(opt_state, params, name='slow'); or pass the part of "
                "the state that holds the one you mean."
            )
        both = [
            b if trees.is_placeholder(a) else a
            for a, b in zip(leaves, more, strict=True)
        ]
        joined = jax.tree.unflatten(structure, both)
    return joined


def _fill(shadow: Any, param: Any) -> Any:
    if trees.is_placeholder(shadow):
        return _own(param)
    return jnp.array(shadow, dtype=jnp.result_type(param))


def _own(leaf: Any) -> Any:
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
