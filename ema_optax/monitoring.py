"""How a shadow does, in figures that a logger can take at every step."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ema_optax import shadows, trees
from ema_optax.decay import Decay
from ema_optax.states import EmaParamsState, record_of

_BLOCK = 4096  # updates whose decays are looked at together
_NOTHING_LEFT = -100.0  # as the log of a weight: below what float32 can show


def metrics(
    opt_state: Any, params: Any, *, name: str | None = None
) -> dict[str, jax.Array]:
    """Returns scalars that tell whether a shadow follows its params.

    For any logger's scalar call; can be jitted. Over the averaged leaves, with s the
    shadow, p the params, and elements that are not finite left out of sums:

    - `decay`: β at the newest update.
    - `initial_weight`: what the shadow still holds of the initial params, Πβ.
    - `distance`: ‖p − s‖ / ‖s‖.
    - `dead_zone`: the distance |p − s| / |s| of an element below which its shadow does
      not move, where it is rounded to nearest: 2^−(m+1) / w, for m bits of mantissa
      and the weight w of a fold. 0 where it is rounded stochastically. A `distance`
      that nears it calls for `rounding="stochastic"` or folds at every k-th update.
    - `nonfinite_params`, `nonfinite_shadow`: numbers of elements.

    The first two are left out where the state does not know its decay: a callable or
    an injected one. `initial_weight` and `dead_zone` are of folds, so `every` is in
    them.

    Args:
        opt_state: The optimizer state.
        params: The live params.
        name: Which shadow. None takes all of them; the keys of named ones are then
            `NAME/decay` and so on.

    Returns:
        float32[] by key, and int32[] for numbers of elements.

    Raises:
        ValueError: If there is no shadow of `ema_params`, or no such name.

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
    states = shadows.ema_states(opt_state)
    if not states:
        raise ValueError(
            f"There is no shadow of ema_params in this {type(opt_state).__name__}. "
            "Chain one last: optax.chain(optimizer, ema_optax.ema_params(0.9999))."
        )
    names = sorted(
        {key for state in states.values() for key in shadows.names_of(state)}
    )
    if name is not None or names == [""]:
        return _metrics(opt_state, params, name)
    return {
        f"{key}/{what}" if key else what: value
        for key in names
        for what, value in _metrics(opt_state, params, key or None).items()
    }


def _metrics(opt_state: Any, params: Any, name: str | None) -> dict[str, jax.Array]:
    shadow = shadows.joined(shadows.find(opt_state, params, name))
    difference = trees.difference(shadow, params, ("shadow", "params"))
    if difference:
        raise ValueError(f"The shadow does not fit these params: {difference}.")
    found: dict[str, jax.Array] = {}
    states = [
        state
        for state in shadows.ema_states(opt_state).values()
        if (name or "") in shadows.names_of(state)
    ]
    decay, every, stochastic = _one_record(states, name or "")
    count = states[0].count
    if decay is not None:
        step = jnp.maximum(count, 1)
        found["decay"] = decay(step)
        found["initial_weight"] = jnp.exp(_total_log(decay, count, every))
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
    found["distance"] = jnp.sqrt(apart / jnp.where(size == 0, 1, size))
    if decay is not None:
        weight = decay.newest_weight(jnp.maximum(count, every), every)
        halves = [_half_ulp(s, stochastic) for s, _ in pairs]
        found["dead_zone"] = jnp.float32(max(halves, default=0.0)) / weight
    found |= {"nonfinite_params": bad[0], "nonfinite_shadow": bad[1]}
    return {
        key: value if value.dtype == jnp.int32 else value.astype(jnp.float32)
        for key, value in found.items()
    }


def _one_record(
    states: Sequence[EmaParamsState], name: str
) -> tuple[Decay | None, int, bool]:
    """Returns decay, every and rounding of states that agree; no decay otherwise."""
    known = [
        (record.decays.get(name), record.every, record.stochastic)
        for record in map(record_of, states)
        if record is not None
    ]
    alike = len(known) == len(states) and all(each == known[0] for each in known)
    return known[0] if alike else (None, 1, False)


def _half_ulp(shadow: jax.Array, stochastic: bool) -> float:
    """Returns half an ulp of 1 in a shadow's dtype; 0 where chance decides."""
    kind = jnp.finfo(shadow.dtype)
    by_chance = shadow.dtype == jnp.bfloat16 or (
        stochastic and shadow.dtype == jnp.float32
    )
    return 0.0 if by_chance else math.ldexp(1.0, -kind.nmant - 1)


def _total_log(decay: Decay, count: jax.Array, every: int) -> jax.Array:
    """Returns the log of what is left of the initial params, for any decay.

    Few have a closed form for it, so all updates are looked at, in blocks, until
    nothing is left.
    """
    folded = count - count % every

    def going_on(carry: Any) -> jax.Array:
        first, total = carry
        return (first <= folded) & (total > _NOTHING_LEFT)

    def add(carry: Any) -> Any:
        first, total = carry
        steps = first + jnp.arange(_BLOCK)
        logs = jnp.log1p(-decay.newest_weight(steps))
        return first + _BLOCK, total + jnp.sum(jnp.where(steps <= folded, logs, 0))

    start = jnp.int32(1), jnp.zeros([], float)
    return jax.lax.while_loop(going_on, add, start)[1]
