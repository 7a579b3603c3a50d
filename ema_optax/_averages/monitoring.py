"""Figures on how well a shadow follows its params, for a logger at every step."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from ema_optax._averages import averages
from ema_optax._averages.average import Average
from ema_optax._trees import trees

_BLOCK = 4096  # updates whose decays are computed together
_NOTHING_LEFT = -100.0  # as the log of a weight: below what float32 can show


def metrics(
    opt_state: optax.OptState, params: optax.Params, *, name: str | None = None
) -> dict[str, jax.Array]:
    """Computes scalars that show whether a shadow follows its params.

    They fit any logger's scalar call, and the function can be jitted. Over the averaged
    leaves, with s the shadow, p the params, and elements that are not finite left out
    of sums:

    - `decay`: β at the newest update; for `bema_params` 1 − b at its newest fold.
    - `initial_weight`: the share of the initial params in the shadow, Πβ over its
      folds.
    - `distance`: ‖p − s‖ / ‖s‖.
    - `dead_zone`: the distance |p − s| / |s| of an element below which its shadow does
      not move, where it is rounded to nearest: 2^−(m+1) / w, for m bits of mantissa
      and the weight w of a fold. 0 where it is rounded stochastically. A `distance`
      that nears it calls for `rounding="stochastic"` or folds at every k-th update.
    - `nonfinite_params`, `nonfinite_shadow`: numbers of elements.

    `decay`, `initial_weight` and `dead_zone` are left out where the state does not know
    its decay: a callable or an injected one. `initial_weight` and `dead_zone` are those
    of folds, and so depend on `every`.

    For `bema_params` s is the average before its correction: folds change it, and it
    stands still where they are too small. The correction that `shadow_params` adds
    follows the params at every update. For `ring` there are `distance` and the numbers
    of elements.

    Args:
        opt_state: The optimizer state.
        params: The live params.
        name: Which shadow, as in `shadow_params`. None takes all of them; the keys of
            named ones are then `NAME/decay` and so on.

    Returns:
        float32[] by key, and int32[] for numbers of elements.

    Raises:
        ValueError: If there is no shadow, or no such name, or it does not fit; or if
            the state is stacked: `jax.vmap(metrics)` gives the figures of each.
        TypeError: If `opt_state` is an optimizer.

    >>> import optax, ema_optax
    >>> optimizer = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.999))
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> state = optimizer.init(params)
    >>> grads = {"w": jnp.array([1.0, jnp.nan])}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> found = metrics(state, optax.apply_updates(params, updates))
    >>> {key: round(float(value), 4) for key, value in list(found.items())[:3]}
    {'decay': 0.1818, 'initial_weight': 0.1818, 'distance': 0.0198}
    >>> int(found["nonfinite_params"]), int(found["nonfinite_shadow"])
    (1, 0)
    """
    listed = averages.find(opt_state, call="metrics(opt_state, params)", params=params)
    if name is not None or len(listed.names) < 2:
        return _metrics(listed.of(name), params)
    return {
        f"{key}/{what}" if key else what: value
        for key in listed.names
        for what, value in _metrics(
            [average for average in listed if average.name == key], params
        ).items()
    }


def _metrics(chosen: Sequence[Average], params: optax.Params) -> dict[str, jax.Array]:
    kept = {each.where: each.kept(params) for each in chosen}
    shadow = averages.whole(kept, params)
    figures: dict[str, jax.Array] = {}
    first = chosen[0]
    alike = all(
        (type(each), each.decay, each.made_by)
        == (type(first), first.decay, first.made_by)
        for each in chosen
    )
    count = first.count
    if jnp.ndim(count):
        raise ValueError(
            f"The optimizer state is stacked: its count is of shape {count.shape}. "
            "For figures of each member call jax.vmap(ema_optax.metrics)(opt_state, "
            "params)."
        )
    weight = first.weight_of_fold(count) if alike else None
    decay = first.decay_at(count) if alike else None
    if decay is not None:
        figures["decay"] = decay
        figures["initial_weight"] = jnp.exp(_total_log(first))
    leaves = jax.tree.leaves(shadow, is_leaf=trees.is_placeholder)
    pairs = [
        (s, p)
        for s, p in zip(
            leaves, jax.tree.leaves(params, is_leaf=trees.is_placeholder), strict=True
        )
        if not trees.is_placeholder(s)
    ]
    apart, size, bad = jnp.float32(0), jnp.float32(0), [jnp.int32(0), jnp.int32(0)]
    for s, p in pairs:
        wide = trees.wide(s.dtype)
        s, p = s.astype(wide), jnp.asarray(p).astype(wide)
        fine = jnp.isfinite(s) & jnp.isfinite(p)
        apart += jnp.sum(jnp.where(fine, jnp.abs(p - s), 0) ** 2).astype(jnp.float32)
        size += jnp.sum(jnp.where(fine, jnp.abs(s), 0) ** 2).astype(jnp.float32)
        for i, x in enumerate((p, s)):
            bad[i] += jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
    figures["distance"] = jnp.sqrt(apart / jnp.where(size == 0, 1, size))
    if weight is not None:
        halves = [_half_ulp(s, first) for s, _ in pairs]
        figures["dead_zone"] = max(halves, default=0.0) / weight
    figures |= {"nonfinite_params": bad[0], "nonfinite_shadow": bad[1]}
    return {
        key: value if value.dtype == jnp.int32 else value.astype(jnp.float32)
        for key, value in figures.items()
    }


def _half_ulp(shadow: jax.Array, average: Average) -> float:
    """Returns half an ulp of 1 in a shadow's dtype; 0 where rounding is stochastic."""
    if average.is_rounded_by_chance(shadow.dtype):
        return 0.0
    return math.ldexp(1.0, -jnp.finfo(shadow.dtype).nmant - 1)


def _total_log(average: Average) -> jax.Array:
    """Sums the log of the share of the initial params, for any kind of average.

    Few decays have a closed form for it, so the logs of all updates are summed, in
    blocks, until nothing is left.
    """
    folded = average.count - average.count % (average.every or 1)

    def going_on(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, total = carry
        return (first <= folded) & (total > _NOTHING_LEFT)

    def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, total = carry
        steps = first + jnp.arange(_BLOCK, dtype=first.dtype)
        logs = average.log_kept(steps)
        return first + _BLOCK, total + jnp.sum(jnp.where(steps <= folded, logs, 0))

    start = jnp.int32(1), jnp.zeros([], float)
    return jax.lax.while_loop(going_on, add, start)[1]
