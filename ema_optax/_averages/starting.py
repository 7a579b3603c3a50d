"""Starts an optimizer state from an average that a program has, with its count."""

# pyright: reportMissingTypeStubs=false

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ema_optax._averages import averages
from ema_optax._averages.average import Average
from ema_optax._decays.decay import Decay
from ema_optax._messages import arguments
from ema_optax._messages.text import brief, nearest
from ema_optax._placement import leaf_placement
from ema_optax._trees import mistaken, trees
from ema_optax._trees.locating import under

SETTLED = "settled"
_MOST = 2**31 - 1  # the largest int32, where a count stays
_CALL = "started_from(opt_state, shadow, count=…)"


def started_from(
    opt_state: optax.OptState,
    shadow: optax.Params,
    *,
    count: int | str,
    name: str | None = None,
) -> Any:
    """Continues an average from elsewhere in a fresh optimizer state.

    The count belongs to the average: a decay that warms up is short where the count is
    small. With the shadow alone, as `state._replace(shadow=…)` puts it in, the warm-up
    starts again, without a warning: after four updates 0.5 % of the old average is left
    (2/11 · 3/12 · 4/13 · 5/14).

    >>> import optax, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> optimizer = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.9999))
    >>> state = optimizer.init(params)
    >>> state = started_from(state, {"w": jnp.full(2, 0.5)}, count=120_000)
    >>> state[1].count, state[1].shadow["w"]
    (Array(120000, dtype=int32), Array([0.5, 0.5], dtype=float32))

    Args:
        opt_state: `optimizer.init(params)`, with `ema_params` anywhere in it. Only the
            average is changed.
        shadow: A tree like the params, of floats of any width. It is copied, in the
            dtype and to the devices of the state; leaves that are not averaged are not
            used.
        count: Number of updates that the average has seen, in [0, 2³¹); all of them
            count where it was folded every few. `"settled"` where that is not known:
            the smallest count at which the decay, to float32, has its final value.
        name: Name of the shadow, as in `shadow_params`, where there are several.

    Raises:
        ValueError: If the tree or a shape differs, if there is no such average, if
            reading computes it, as with BEMA, if `count` is out of range, or the decay
            does not settle.
        TypeError: If `count` is no number, or a leaf is not of floats.
    """
    listed = averages.find(opt_state, call=_CALL)
    chosen = listed.of(name)
    mistaken.check_no_nnx(shadow, "a tree of arrays", _CALL)
    for average in chosen:
        if average.is_computed:
            raise ValueError(
                f"The average at '{average.where}' is computed from {average.source}, "
                "which no average from elsewhere has. Chain ema_params for this one; "
                "or of such a run put all it has into the state: state._replace("
                f"count=…, {', '.join(f'{field}=…' for field in average.fields)})."
            )
    number = _number(count, chosen)
    _check_shared(listed, chosen, number)
    ours = {id(average) for average in chosen}
    shadows = [
        _copied(average.tree, shadow) if id(average) in ours else average.tree
        for average in listed
    ]
    counts = {under(average.path, "count") for average in chosen}

    def counted(path: Any, leaf: Any) -> Any:
        if trees.path_name(path) not in counts:
            return leaf
        return _placed(jnp.full(jnp.shape(leaf), number, leaf.dtype), leaf)

    rest = jax.tree_util.tree_map_with_path(counted, listed.rest())
    return listed.put_back(rest, shadows)


def settled_count(decay: Decay) -> int:
    """Finds the smallest count from which a decay has its final value, to float32.

    Raises:
        ValueError: If it does not settle before counts end, or settles at β = 1.

    >>> from ema_optax import warmup
    >>> settled_count(warmup(0.9999))  # (1 + t)/(10 + t) ≥ 0.9999
    89990
    """
    end = np.float32(decay.newest_weight(_MOST))

    def is_settled(step: int) -> bool:
        return np.float32(decay.newest_weight(step)) == end

    # Probes lie near both ends of the counts, where a decay that repeats for ever, as a
    # window does, has other values.
    probes = [*(2**i for i in range(31)), *(_MOST - 2**i for i in range(30))]
    unsettled = max((step for step in probes if not is_settled(step)), default=0)
    if unsettled >= 2**30 or end == 0:
        problem = (
            "ends at a weight of 0 for new params, where the shadow stands still"
            if end == 0
            else "depends on the count for ever"
        )
        raise ValueError(
            f"count={SETTLED!r} is for a decay that comes to its end, and {decay} "
            f"{problem}. Pass the number of updates that the average has seen, such as "
            "count=120_000."
        )
    low, high = unsettled, max(2 * unsettled, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_settled(middle) else (middle, high)
    return high


def _number(count: object, chosen: list[Average]) -> int:
    if not isinstance(count, str):
        example = f"count=120_000; {SETTLED!r} where it is not known."
        number = arguments.whole(count, "count", 0, example)
        if number > _MOST:
            raise ValueError(f"count must be below 2³¹, got {number:,}. {example}")
        return number
    if count != SETTLED:
        raise ValueError(
            f"count is the number of updates that the average has seen, or "
            f"{SETTLED!r} where that is not known; got {brief(count)}."
        )
    counts: list[int] = []
    for average in chosen:
        if average.decay is None:
            raise ValueError(
                f"count={SETTLED!r} needs a decay that the state records, and the one "
                f"at '{average.where}' is a callable, or was injected. Pass the number "
                "of updates that the average has seen, such as count=120_000."
            )
        # The next fold takes the decays of the last `every` updates.
        counts.append(settled_count(average.decay) + (average.every or 1) - 1)
    return max(counts)


def _check_shared(
    listed: averages.Averages, chosen: list[Average], number: int
) -> None:
    """Refuses another count for a state whose other shadows have a count already."""
    for average in chosen:
        others = [
            each.name
            for each in listed
            if each.path == average.path and each.name != average.name
        ]
        if not others or isinstance(average.count, Tracer):
            continue
        seen = np.asarray(average.count)
        if np.any((seen != 0) & (seen != number)):
            raise ValueError(
                f"The shadows {', '.join(map(repr, [average.name, *others]))} share "
                f"one count, which is {brief(seen.tolist())} already, and would become "
                f"{number}. Chain a transform for each: ema_params({{'fast': 0.99}}), "
                "ema_params({'slow': 0.9999})."
            )


def _copied(ours: Any, theirs: Any) -> Any:
    """Copies a tree into the structure, dtypes and places of a shadow, by paths."""
    paths, slots, structure = trees.flatten(ours)
    paths = _told_apart(paths)
    given, values, _ = trees.flatten(theirs)
    pairs = zip(_told_apart(given), values, strict=True)
    leaves = {path: leaf for path, leaf in pairs if not trees.is_placeholder(leaf)}
    averaged = dict(zip(paths, slots, strict=True))
    others = [path for path, slot in averaged.items() if trees.is_placeholder(slot)]
    problem = None
    for path, slot in averaged.items():
        if trees.is_placeholder(slot):
            continue
        if path not in leaves:
            problem = f"it has no '{path}'. {nearest(path, leaves)}"
        elif jnp.shape(leaves[path]) != jnp.shape(slot):
            shapes = f"{jnp.shape(leaves[path])}, and averaged it is {jnp.shape(slot)}"
            problem = f"'{path}' is of shape {shapes}."
        if problem:
            break
    for path in leaves:
        unknown = path not in averaged and not any(
            f"{path}/".startswith(f"{other}/") for other in others
        )
        if unknown and not problem:
            problem = f"it has '{path}'. {nearest(path, averaged)}"
    if problem:
        raise ValueError(
            f"The shadow does not fit the optimizer state: {problem} Pass a tree like "
            "the params that optimizer.init was given, with each leaf that is averaged."
        )
    return jax.tree.unflatten(
        structure,
        [
            slot if trees.is_placeholder(slot) else _leaf(slot, leaves[path], path)
            for path, slot in averaged.items()
        ],
    )


def _told_apart(paths: list[str]) -> list[str]:
    """Numbers paths that several leaves share, as `{"a/b": …, "a": {"b": …}}` has."""
    seen: collections.Counter[str] = collections.Counter()
    numbered: list[str] = []
    for path in paths:
        seen[path] += 1
        numbered.append(path if seen[path] == 1 else f"{path} ({seen[path]})")
    return numbered


def _leaf(slot: Any, leaf: Any, path: str) -> Any:
    kind = jnp.result_type(leaf) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    complex_too = jnp.issubdtype(slot.dtype, jnp.complexfloating)
    if not jnp.issubdtype(kind, jnp.inexact if complex_too else jnp.floating):
        raise TypeError(
            f"'{path}' of the shadow is {brief(leaf)}, and the average is kept as "
            f"{slot.dtype}. Pass floats: leaf.astype('float32')."
        )
    return _placed(jnp.array(leaf, dtype=slot.dtype), slot)


def _placed(array: jax.Array, slot: Any) -> jax.Array:
    """Moves an array to where another one lies, if that is bound to its devices."""
    sharding = getattr(slot, "sharding", None)
    if (
        isinstance(array, Tracer)
        or not isinstance(sharding, jax.sharding.Sharding)
        or not leaf_placement.is_bound(slot)
        or array.sharding == sharding
    ):
        return array
    return jax.device_put(array, sharding)
