"""`ring`, which keeps the last k params; reading computes their mean."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ema_optax._averages import due
from ema_optax._averages.average import Average
from ema_optax._averages.states import RingMadeBy, RingState
from ema_optax._averages.update import (
    check_period,
    check_state,
    matching_leaves,
    new_params,
    require_params,
)
from ema_optax._placement import leaf_placement, transfers
from ema_optax._trees import selection, trees

_STATIC = ("k", "every")  # static_args of optax.inject_hyperparams


def ring(
    k: int,
    *,
    every: int = 1,
    mask: selection.Mask | None = None,
    shadow_sharding: object = None,
    params_sharding: object = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the params of the last k folds; the shadow is their plain mean.

    Chain it last, after the optimizer. Updates pass through untouched. At every
    `every`-th update p, what the model holds after it, takes the place of the oldest of
    k slots, and `ema_optax.shadow_params(opt_state, params)` returns the mean of those
    that are filled: of the last min(k, folds) copies. Before the first fold that is the
    params at init.

    Unlike `window(n)`, whose one tree begins again, the mean is of k copies at every
    step, for k trees of memory. The slots are copies in the params' own dtypes; the
    mean is computed in float32 or wider, as the newest copy plus the mean distance of
    all from it: copies that are equal have themselves as their mean. An update that
    does not fold moves nothing, and one that does writes one slot.

    An element of p that is not finite takes the value of the copy before. Where that is
    none either, as in params that start so, it is left out of the mean, which is not
    finite only where no copy is. Integer, bool and PRNG-key leaves, and those the mask
    leaves out, are not averaged. From update 2³¹ − 1 on, where counts stay, one slot is
    written again and again, or none with `every` above 1.

    Args:
        k: Number of copies, ≥ 1. The state is k times the params that are averaged.
        every: Updates between copies, ≥ 1.
        mask: Which leaves are averaged, as in `ema_params`.
        shadow_sharding: Where each copy lives, as in `ema_params`:
            `placement.over_axis("data")` splits it, `placement.in_host_memory()` takes
            it off the device. It is given a param without the axis of slots.
        params_sharding: Where the params live, if they do not show it.

    Returns:
        A transform with state `RingState`.

    Raises:
        ValueError, TypeError: If an argument is no whole number ≥ 1, or params and
            state do not fit each other.

    Source: LAWA, Kaddour 2022, arXiv:2209.14981, there of params at ends of epochs.

    >>> optimizer = optax.chain(optax.sgd(1.0), ring(2))
    >>> params = {"w": jnp.array([0.0])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...     updates, state = optimizer.update({"w": jnp.array([-1.0])}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> from ema_optax import shadow_params
    >>> params["w"], shadow_params(state, params)["w"]  # 3, and (2 + 3)/2
    (Array([3.], dtype=float32), Array([2.5], dtype=float32))
    """
    k = check_period(k, "k", _STATIC, one="the newest copy alone")
    made_by = RingMadeBy(k, check_period(every, "every", _STATIC))

    def placed(params: Any) -> leaf_placement.LeafShardings | None:
        chosen = selection.averaged_only(params, mask)
        return leaf_placement.leaf_shardings(chosen, shadow_sharding, params_sharding)

    def init(params: Any) -> Any:
        shardings = placed(params)
        chosen = selection.averaged_only(params, mask)
        leaves, structure = jax.tree.flatten(chosen, is_leaf=trees.is_placeholder)
        slots = [
            leaf if trees.is_placeholder(leaf) else _copies(leaf, k, sharding)
            for leaf, sharding in zip(
                leaves, shardings or [None] * len(leaves), strict=True
            )
        ]
        slots = jax.tree.unflatten(structure, slots)
        return RingState(jnp.zeros([], jnp.int32), slots, made_by.at(shardings))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        require_params(params, "ring")
        check_state(state, RingState, "ring")
        count = jnp.asarray(optax.safe_increment(state.count))
        shardings = state.made_by.shardings if state.made_by else None
        # A state that was made by hand, or unpickled, does not know its shardings.
        if shardings is None and shadow_sharding is not None:
            shardings = placed(params)
        slots = _updated(state, updates, params, count, made_by, shardings)
        return updates, RingState(count, slots, made_by.at(shardings))

    return optax.GradientTransformationExtraArgs(init, update)


CALLED = " (ring)"  # after the path of a state, in errors


def average_of(path: str, state: RingState) -> "RingAverage":
    """Returns the average of a state at a path."""
    return RingAverage(
        path, "", state.count, state.made_by, _outline(state), slots=state.slots
    )


@dataclasses.dataclass(frozen=True)
class RingAverage(Average):
    """The average of a `RingState`: the mean of the params in its slots."""

    made_by: RingMadeBy | None
    is_computed = True
    fields = ("slots",)
    source = "the params at its last folds"
    slots: optax.Params = ()

    @property
    def where(self) -> str:
        """Its place in errors."""
        return self.path + CALLED

    def read(self, params: optax.Params | None) -> optax.Params:
        """Computes the mean, in float32 or wider, in arrays of its own.

        Args:
            params: Not used. The state may be stacked by `jax.vmap`.

        Raises:
            ValueError: If the state was made by hand.
        """
        del params
        if self.made_by is None:
            raise ValueError(
                "This RingState was made by hand and does not say its k and every, "
                "which reading it needs. Start from ring(...).init(params), and put "
                "other values in with state._replace(count=…, slots=…)."
            )
        leaves, structure = jax.tree.flatten(self.slots, is_leaf=trees.is_placeholder)
        every = self.made_by.every
        shardings = self.made_by.shardings or [None] * len(leaves)
        for i, (leaf, sharding) in enumerate(zip(leaves, shardings, strict=True)):
            if not trees.is_placeholder(leaf):
                slots = leaf_placement.put_on_device(leaf, _of_slots(sharding))
                leaves[i] = leaf_placement.put_as_param(
                    _mean(slots, self.count, every), sharding
                )
        return jax.tree.unflatten(structure, leaves)

    def decay_at(self, count: jax.Array) -> jax.Array | None:
        """Returns None: the oldest copy leaves all at once."""

    def weight_of_fold(self, count: jax.Array) -> jax.Array | None:
        """Returns None: nothing is folded into anything."""

    def log_kept(self, steps: jax.Array) -> jax.Array:
        """Returns −inf at folds: the first leaves nothing of the initial params."""
        assert self.made_by is not None
        return jnp.where(steps % self.made_by.every == 0, -jnp.inf, 0.0)


def _copies(param: Any, k: int, sharding: leaf_placement.LeafSharding | None) -> Any:
    """Copies a param k times, into one buffer, sharded alike."""
    shape, dtype = (k, *jnp.shape(param)), jnp.result_type(param)
    own = getattr(param, "sharding", None)
    if isinstance(param, jax.ShapeDtypeStruct):
        own = sharding.shadow if sharding else own
        return jax.ShapeDtypeStruct(shape, dtype, sharding=own and _with_axis(own))
    copies = jnp.broadcast_to(jnp.asarray(param, dtype), shape)
    is_traced = isinstance(param, Tracer)
    if sharding is None and not is_traced and leaf_placement.is_bound(param):
        # XLA may have chosen another sharding for the copies than the param's own.
        return copies if own is None else jax.device_put(copies, _with_axis(own))
    return leaf_placement.put_as_shadow(copies, _of_slots(sharding))


def _updated(
    state: RingState,
    updates: optax.Updates,
    params: optax.Params,
    count: jax.Array,
    made_by: RingMadeBy,
    shardings: leaf_placement.LeafShardings | None,
) -> optax.Params:
    """Updates the slots: writes one of them where a copy is due."""
    outline = matching_leaves(_outline(state), params)
    averaged = [i for i, x in enumerate(outline) if not trees.is_placeholder(x)]
    sharding = {i: shardings[i] if shardings else None for i in averaged}
    leaves, structure = jax.tree.flatten(state.slots, is_leaf=trees.is_placeholder)
    for leaf in jax.tree.leaves(state.slots):
        if leaf.shape[0] != made_by.k:
            raise ValueError(
                f"The state is of {leaf.shape[0]} slots, and ring({made_by.k}) has "
                f"{made_by.k}. Use the k that it was made with, or start with "
                "optimizer.init(params)."
            )
    new = new_params(updates, params, sharding)
    folds = count // made_by.every

    def write(held: dict[int, Any], given: Any) -> dict[int, Any]:
        folds, new = given
        return {i: _written(x, new[i], folds, sharding[i]) for i, x in held.items()}

    # For every=1 it is always True, but XLA must not know: it would unroll the loop.
    is_due = count > 0 if made_by.every == 1 else count % made_by.every == 0
    slots = {i: leaves[i] for i in averaged}
    whole = {i: leaf_placement.whole_until_fold(new[i], sharding[i]) for i in averaged}
    # In the host's memory by groups, each in a loop of its own, as `fold_update` does.
    for group in transfers.host_groups(whole, sharding):
        held = {i: slots.pop(i) for i in group}
        for i, x in due.where_due(write, is_due, held, (folds, whole)).items():
            leaves[i] = x
    if made_by.every == 1:
        written = write(slots, (folds, whole))
    else:
        written = due.where_due(write, is_due, slots, (folds, whole)) if slots else {}
    for i, x in written.items():
        leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def _written(
    slots: jax.Array,
    param: jax.Array,
    folds: jax.Array,
    sharding: leaf_placement.LeafSharding | None,
) -> jax.Array:
    """Writes a param into the slot of fold number `folds`, counted from 1."""
    k = slots.shape[0]
    # An element that is not finite takes its value of the copy before.
    before = jax.lax.dynamic_index_in_dim(slots, (folds - 2) % k, keepdims=False)
    before = leaf_placement.put_on_device(before, sharding)
    new = leaf_placement.put_on_device(param.astype(slots.dtype), sharding)
    new = leaf_placement.put_as_shadow(
        jax.lax.select(jnp.isfinite(new), new, before), sharding
    )
    return jax.lax.dynamic_update_index_in_dim(slots, new, (folds - 1) % k, 0)


@functools.partial(jax.jit, static_argnames="every")
def _mean(slots: jax.Array, count: jax.Array, every: int) -> jax.Array:
    """Computes the mean of the filled slots; for stacked states, of each."""
    if jnp.ndim(count):
        return jax.vmap(functools.partial(_mean, every=every))(slots, count)
    k, folds = slots.shape[0], count // every
    # In folds. Before the first fold slot k−1, of age 0, holds the initial params.
    age = (folds - 1 - jnp.arange(k, dtype=folds.dtype)) % k
    filled = (age < jnp.maximum(folds, 1)).reshape(k, *[1] * (slots.ndim - 1))
    x = slots.astype(trees.wide(slots.dtype))
    newest = jax.lax.dynamic_index_in_dim(x, (folds - 1) % k, keepdims=False)
    inside = filled & jnp.isfinite(x)
    apart = jnp.sum(jnp.where(inside, x - newest[None], 0), axis=0)
    mean = newest + apart / jnp.sum(inside, axis=0, dtype=x.dtype)
    return jnp.where(jnp.isfinite(mean), mean, newest)


def _outline(state: RingState) -> optax.Params:
    """Returns the mean as abstract arrays; for stacked states, stacked ones."""
    axis = jnp.ndim(state.count)

    def of(slots: Any) -> jax.ShapeDtypeStruct:
        shape = (*slots.shape[:axis], *slots.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, trees.wide(slots.dtype))

    return jax.tree.map(of, state.slots)


def _of_slots(
    sharding: leaf_placement.LeafSharding | None,
) -> leaf_placement.LeafSharding | None:
    """Adds an axis of slots in front to the shardings of a leaf."""
    return sharding and leaf_placement.LeafSharding(*map(_with_axis, sharding))


def _with_axis(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding) or not len(sharding.spec):
        # XLA writes it so too; two spellings would compile a step twice.
        return sharding
    spec = PartitionSpec(None, *sharding.spec)
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
