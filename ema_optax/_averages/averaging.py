"""`ema_params`, the transform that averages the params, and the bare fold."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from ema_optax._averages import fold, overwriting, packing
from ema_optax._averages.states import (
    EmaMadeBy,
    EmaParamsState,
    NamedShadowsState,
    written,
)
from ema_optax._averages.update import (
    check_period,
    check_state,
    fold_update,
    matching_leaves,
    require_params,
)
from ema_optax._decays.decay import Decay, check_decay, check_wide_enough
from ema_optax._decays.decays import DecayLike, as_decay
from ema_optax._messages import arguments
from ema_optax._messages.text import brief
from ema_optax._placement import leaf_placement
from ema_optax._trees import selection, trees

_STATIC = ("every", "overwrite_every")  # static_args of optax.inject_hyperparams


def ema_params(
    decay: DecayLike | Mapping[str, DecayLike],
    *,
    mask: selection.Mask | None = None,
    every: int = 1,
    overwrite_every: int | None = None,
    shadow_dtype: DTypeLike | None = None,
    rounding: str | None = None,
    pack_small: bool = False,
    shadow_sharding: object = None,
    params_sharding: object = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the params: the shadow.

    Chain it last, after the optimizer: before it, it would average params + gradients,
    of which reading and saving warn. Updates pass through untouched, and each fold is

        s ← s + w·(p − s),    w = 1 − Πβ over the updates since the last fold,

    where p is what the model holds after `optax.apply_updates`. Read the shadow with
    `ema_optax.shadow_params`.

    >>> optimizer = optax.chain(optax.sgd(0.1), ema_params(0.9999))
    >>> params = {"w": jnp.array([1.0])}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": jnp.array([1.0])}, state, params)
    >>> state[1].shadow["w"]  # 1 + (1 − 2/11)·(0.9 − 1)
    Array([0.9181818], dtype=float32)

    Args:
        decay: A float β in [0, 1), which means `warmup(β)`; a `Decay`; any callable
            from the 1-based step to β; or a dict from names to these, for several
            shadows in one pass.
        mask: Leaves that are averaged: a tree of bools like the params (or a prefix of
            it), or a function from params to one.
        every: Updates between folds, ≥ 1. The average stays as long: each fold takes
            the product of the decays. Other updates cost nothing.
        overwrite_every: Updates, ≥ 1, between those after which the params become the
            shadow; None leaves the params alone.
        shadow_dtype: Dtype of the shadow: "bfloat16", "float32" or "float64". None is
            float32 for narrower params and their own dtype otherwise.
        rounding: "stochastic" for float32 shadows that would stand still; None rounds
            bfloat16 ones so, and wider ones to nearest.
        pack_small: Whether shadows of small leaves share a few arrays.
        shadow_sharding: Where the shadow lives, if not with its params.
        params_sharding: Where the params live, if they do not show it.

    Returns:
        A transform with state `EmaParamsState`.

    Raises:
        ValueError, TypeError: If an argument is outside its interval, or params and
            shadow do not fit each other.

    What is averaged: floating and complex leaves that the mask does not leave out.
    Elements of p that are not finite are left out of a fold: there the shadow holds.

    When: the count of updates stays at 2³¹ − 1, where int32 ends. From there every
    update is folded as number 2³¹ − 1, with its weight; with `every` above 1 none is,
    for that is a prime: the shadow stays. `metrics` shows the decay; a run that long
    starts a new count. Inside `optax.MultiSteps` one real update counts as one; around
    it, one micro-batch would.

    With `overwrite_every`, as with Keras' `ema_overwrite_frequency`, the model holds
    p + (s − p), which is s to the last bit where s/2 ≤ p ≤ 2s, and within 1 ulp of the
    larger of |p| and |s − p| elsewhere.

    How it is stored: bfloat16 shadows are rounded stochastically, from a hash of
    element and count, with an error of about 1e-2 at any β. `rounding="stochastic"`
    does so for float32 ones: they then follow where (1−β)·|p−s| is below half an ulp of
    s, and rounding to nearest would not move; worth it beyond β = .9999 where params
    settle, for an error of 1e-5 anywhere.

    `pack_small` keeps the shadows of leaves of up to 64 KiB side by side in a few large
    arrays, so that thousands of them are folded at once; worth it where a model has
    hundreds. What is read, and our checkpoints, are as without it; the state has fewer
    leaves, and its `shadow.tree()` is the tree. Leaves that are sharded or placed are
    left apart; `init` under `jit`, on a mesh whose axes are not Explicit, needs
    `params_sharding` to know them. On TPUs all are left apart: there XLA takes a kernel
    for each leaf to gather them.

    Where it lives: `shadow_sharding` is a sharding, a function from path and param
    (with shape, dtype and sharding) to one, or a tree of these like the params, or a
    prefix of it, with None where a shadow follows its param. `placement` has two:
    `over_axis` and `in_host_memory`. The params keep their sharding.
    `params_sharding`, a sharding or a tree of them, is needed with it where the params
    do not show theirs: `init` under `jit`, on a mesh whose axes are not Explicit.

    `optax.inject_hyperparams` needs `static_args=("decay", "every",
    "overwrite_every")`, or without `"decay"` to inject a float β; and with
    `"shadow_sharding"` where that is a function.
    """
    decays = _decays_by_name(decay)
    every = check_period(every, "every", _STATIC)
    if overwrite_every is not None:
        overwrite_every = check_period(overwrite_every, "overwrite_every", _STATIC)
        if len(decays) > 1:
            raise ValueError(
                f"overwrite_every writes one shadow into the params, got "
                f"{len(decays)}: {', '.join(decays)}. Give it a transform of its own."
            )
    dtype = fold.check_shadow_dtype(shadow_dtype)
    stochastic = fold.check_rounding(rounding, dtype)
    several = isinstance(decay, Mapping)
    kind = NamedShadowsState if several else EmaParamsState
    made_by = EmaMadeBy(
        written(_recordable(decay, decays)),
        every,
        "stochastic" if stochastic else "nearest",
    )

    def init(params: Any) -> Any:
        def started() -> Any:
            starts = [
                leaf
                if trees.is_placeholder(leaf)
                else leaf_placement.put_as_shadow(fold.start(leaf, dtype), sharding)
                for leaf, sharding in zip(
                    leaves, shardings or [None] * len(leaves), strict=True
                )
            ]
            tree = jax.tree.unflatten(structure, starts)
            return packing.pack(tree, layout) if layout else tree

        chosen = selection.averaged_only(params, mask)
        shardings = leaf_placement.leaf_shardings(
            chosen, shadow_sharding, params_sharding
        )
        leaves, structure = jax.tree.flatten(chosen, is_leaf=trees.is_placeholder)
        layout = None
        if arguments.flag(pack_small, "pack_small"):
            packing.check_can_pack(params)
            layout = packing.plan(chosen, _kinds(chosen, shardings, params_sharding))
        shadow = {name: started() for name in decays} if several else started()
        return kind(jnp.zeros([], jnp.int32), shadow, made_by.at(shardings))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        require_params(params, "ema_params")
        check_state(state, EmaParamsState, "ema_params")
        count = jnp.asarray(optax.safe_increment(state.count))
        shardings = state.made_by.shardings if state.made_by else None
        # A state that was made by hand, or unpickled, does not know its shardings.
        if shardings is None and shadow_sharding is not None:
            shardings = leaf_placement.leaf_shardings(
                selection.averaged_only(params, mask), shadow_sharding, params_sharding
            )
        shadows = fold_update(
            _shadows_by_name(state.shadow, decays, several),
            [functools.partial(d.newest_weight, every=every) for d in decays.values()],
            updates,
            params,
            count=count,
            every=every,
            shardings=shardings,
            stochastic=stochastic,
        )
        if overwrite_every is not None:
            due = count % overwrite_every == 0
            shadow = packing.unpacked(shadows[0])
            updates = overwriting.updates_to_shadow(
                updates, params, shadow, due, shardings
            )
        shadow = dict(zip(decays, shadows, strict=True)) if several else shadows[0]
        return updates, kind(count, shadow, made_by.at(shardings))

    return optax.GradientTransformationExtraArgs(init, update)


def update_shadow(
    shadow: optax.Params,
    params: optax.Params,
    decay: ArrayLike | Decay,
    *,
    count: ArrayLike | None = None,
) -> Any:
    """Folds params into a shadow once: s + (1−β)·(p − s), for loops without Optax.

    For target networks, and for what `ema_params` cannot see: statistics, params that
    are changed by hand. Leaves of the shadow that are no floating or complex arrays,
    such as step counters, are returned as they are.

    Args:
        shadow: A tree of arrays; start it as a copy of the params, in float32 or wider.
        params: A tree of the same structure and shapes, of any dtypes.
        decay: β in [0, 1), the weight kept on the shadow: a number, or a scalar array
            of float32 or wider. Or a `Decay`, taken at step `count` and exact where a
            β in float32 is not.
        count: 1-based number of the fold, a Python integer or an integer scalar.
            Needed with a `Decay`, and for bfloat16 shadows, whose stochastic rounding
            is drawn from it.

    Returns:
        The new shadow, in the dtypes of the old.

    Raises:
        ValueError, TypeError: If `decay` is outside [0, 1) or narrower than float32, if
            the trees differ, or if `count` is missing.

    >>> shadow = update_shadow({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, 0.98)
    >>> shadow["w"]
    Array([0.02], dtype=float32)
    """
    if count is not None:
        arguments.one_number(count, "count")
    weight = fold.split_weight(_newest_weight(decay, count))
    leaves = matching_leaves(shadow, params)
    paths, _, structure = trees.flatten(shadow)
    new = structure.flatten_up_to(params)
    seeds = fold.fold_seeds(0 if count is None else count, len(leaves))
    for i, leaf in enumerate(leaves):
        if not selection.is_averaged(leaf):
            continue
        leaf = jnp.asarray(leaf)
        if jnp.finfo(leaf.dtype).bits < 32 and (
            count is None or leaf.dtype != jnp.bfloat16
        ):
            raise ValueError(
                f"update_shadow got a {leaf.dtype} shadow at '{paths[i]}', which "
                "rounding to nearest would freeze. Start the shadow as float32, or "
                "as bfloat16 and pass count=step for stochastic rounding."
            )
        leaves[i] = fold.fold(leaf, new[i], weight, seeds[i])
    return jax.tree.unflatten(structure, leaves)


def _decays_by_name(
    decay: DecayLike | Mapping[str, DecayLike],
) -> dict[str, Decay]:
    if not isinstance(decay, Mapping):
        return {"": as_decay(decay)}
    for name in decay:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(
                f"A shadow's name is a non-empty text without '/', got "
                f"{brief(name)}. Write "
                "ema_params({'fast': 0.99, 'slow': 0.9999})."
            )
    if not decay:
        raise ValueError(
            "ema_params got an empty dict of decays: there is nothing to average. "
            "Write ema_params({'fast': 0.99, 'slow': 0.9999})."
        )
    return {name: as_decay(value) for name, value in decay.items()}


def _recordable(
    given: DecayLike | Mapping[str, DecayLike], decays: Mapping[str, Decay]
) -> dict[str, Decay | None]:
    """Selects the decays that the state can record; None for the others.

    An array is not recorded, even where its value is known now: the same transform may
    be made again with a traced one, and their states must have one structure.
    """
    arguments = given if isinstance(given, Mapping) else {"": given}
    return {
        name: decay
        if decay.is_json and not isinstance(arguments[name], jax.Array)
        else None
        for name, decay in decays.items()
    }


def _shadows_by_name(
    shadow: object, decays: Mapping[str, Decay], several: bool
) -> list[Any]:
    if not several:
        return [shadow]
    if not isinstance(shadow, Mapping) or set(shadow) != set(decays):
        names = sorted(shadow) if isinstance(shadow, Mapping) else type(shadow).__name__
        raise ValueError(
            f"The state holds the shadows {names}, ema_params was given decays for "
            f"{sorted(decays)}. Use the names that the state was made with, or call "
            "optimizer.init(params) to start new shadows as copies of the params."
        )
    return [shadow[name] for name in decays]


def _kinds(
    chosen: Any, shardings: leaf_placement.LeafShardings | None, params_sharding: Any
) -> list[tuple[Any, ...] | None]:
    """Returns for each leaf the kind it is packed with; None to leave it apart."""
    _, leaves, _ = trees.flatten(chosen)
    devices = leaf_placement.replicated_on(chosen, params_sharding)
    return [
        None
        if trees.is_placeholder(leaf) or (shardings and shardings[i]) or on is None
        else (jnp.result_type(leaf), on)
        for i, (leaf, on) in enumerate(zip(leaves, devices, strict=True))
    ]


def _newest_weight(decay: Any, count: Any) -> Any:
    if isinstance(decay, Decay):
        if count is None:
            raise ValueError(
                f"update_shadow takes {decay!r} at a step: pass count=step, the "
                "1-based number of this fold."
            )
        return decay.newest_weight(count)
    if np.ndim(decay) and not isinstance(decay, Tracer):
        raise TypeError(
            f"update_shadow takes one β, a number in [0, 1), or a Decay; got "
            f"{brief(decay)}."
        )
    if isinstance(decay, (str, bytes)):
        raise TypeError(f"update_shadow takes β as a number, got {brief(decay)}.")
    check_wide_enough(decay)
    if isinstance(decay, Tracer):
        return 1 - decay
    check_decay(float(decay), "update_shadow")
    return 1 - float(decay)
