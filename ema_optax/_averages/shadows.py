"""Reads the shadow from any optimizer state, and puts it where a model has params."""

import copy as copying
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp

from ema_optax._averages import averages
from ema_optax._messages import arguments
from ema_optax._trees import mistaken, naming, trees


def shadow_params(
    opt_state: Any, params: Any = None, *, name: str | None = None, copy: bool = True
) -> Any:
    """Reads the shadow from an optimizer state, wherever it is in it.

    Works through `optax.chain`, `MultiSteps`, `masked`, `inject_hyperparams` and every
    other state that is a pytree. Shadows of disjoint parts of the params, as under
    `optax.multi_transform`, are joined.

    The arrays are copies: they outlive a train step that donates its state. Under
    `jax.jit` they cost what its results cost.

    Args:
        opt_state: The optimizer state, or the state of an average itself.
        params: The live params. With them the result has exactly their structure and
            dtypes, and the leaves that are not averaged are theirs. Needed with
            `bema_params`, whose shadow is computed from them.
        name: Name of the shadow, needed where there are several: as on disk `"fast"`,
            or the name of its tree, `"shadow/fast"`. `"shadow"` is the only one, or the
            one without a name; `"params"` are the params.
        copy: Whether the arrays are copies. With False, arrays that need no cast and no
            transfer are those of the state and the params, which saves the memory of a
            tree in an evaluation between two steps. Donate neither of the two while the
            result is used.

    Returns:
        A tree like the params. Without `params`: the shadow as it is stored, with
        `optax.MaskedNode()` where a leaf is not averaged.

    Raises:
        ValueError: If there is no shadow or no such name, if there are several and none
            was named, or if the params are missing or do not fit it.

    >>> import optax, ema_optax
    >>> params = {"w": jnp.ones(2, jnp.bfloat16), "steps": jnp.int32(7)}
    >>> state = optax.chain(optax.identity(), ema_optax.ema_params(0.99)).init(params)
    >>> shadow_params(state, params)
    {'steps': Array(7, dtype=int32), 'w': Array([1, 1], dtype=bfloat16)}
    """
    return read(opt_state, params, name, "shadow_params(opt_state, params)", copy)


def read(
    opt_state: Any, params: Any, name: str | None, call: str, copy: bool = True
) -> Any:
    """Reads the shadow as `shadow_params` does; errors name another call."""
    mistaken.check_opt_state(opt_state, "shadow_params(opt_state, params)")
    copy = arguments.flag(copy, "copy")
    if name == naming.PARAMS:
        if params is None:
            raise ValueError(
                "The raw params are not in an optimizer state. Pass them: "
                "shadow_params(opt_state, params, name='params')."
            )
        return owned(params, copy=copy)
    chosen = averages.find(opt_state, call=call, params=params).of(name)
    shadows = {each.where: each.read(params) for each in chosen}
    if params is None:
        return owned(averages.joined(shadows), copy=copy)
    shadow = averages.whole(shadows, params)
    slots, structure = jax.tree.flatten(params, is_leaf=trees.is_placeholder)
    leaves = jax.tree.leaves(shadow, is_leaf=trees.is_placeholder)
    pairs = zip(leaves, slots, strict=True)
    return jax.tree.unflatten(structure, [_fill(*pair, copy) for pair in pairs])


def owned(tree: Any, *, copy: bool = True) -> Any:
    """Copies the arrays of a tree, so that donating others leaves them alone."""
    if not copy:
        return tree
    return jax.tree.map(
        lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def with_shadow(train_state: Any, *, name: str | None = None, copy: bool = True) -> Any:
    """Puts the shadow in the place of a train state's params, for evaluation.

    Keep training from the original: the result's optimizer state still belongs to the
    raw params.

    Args:
        train_state: Anything with `params` and `opt_state`: Flax's `TrainState`, a
            dataclass, a NamedTuple, or a dict with these keys.
        name: Which shadow, as in `shadow_params`.
        copy: Whether its arrays are copies, as in `shadow_params`. With False, donate
            neither of the two train states while both are used.

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
    call = "with_shadow(train_state)"
    params = read(parts["opt_state"], parts["params"], name, call, copy)
    if isinstance(train_state, MutableMapping):  # also with a constructor of its own
        changed = copying.copy(train_state)
        changed["params"] = params
        return changed
    if isinstance(train_state, Mapping):
        return type(train_state)({**train_state, "params": params})  # pyright: ignore[reportCallIssue]
    if hasattr(train_state, "replace"):
        return train_state.replace(params=params)
    if hasattr(train_state, "_replace"):
        return train_state._replace(params=params)
    if dataclasses.is_dataclass(train_state) and not isinstance(train_state, type):
        # Not dataclasses.replace: an Equinox module may have an `__init__` of its own.
        changed = copying.copy(train_state)
        object.__setattr__(changed, "params", params)
        return changed
    raise TypeError(
        f"with_shadow cannot replace the params of a {type(train_state).__name__}: it "
        "has neither replace() nor _replace() and is no dataclass. Call "
        "shadow_params(opt_state, params)."
    )


def _fill(shadow: object, param: object, copy: bool) -> Any:
    if trees.is_placeholder(shadow):
        return owned(param, copy=copy)
    make = jnp.array if copy else jnp.asarray
    return make(shadow, dtype=jnp.result_type(param))
