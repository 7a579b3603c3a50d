"""One update of a tree: which leaves fold, when, and with what weight."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ema_optax._averages import due, fold, packing
from ema_optax._messages.text import brief, structural
from ema_optax._placement import leaf_placement, transfers
from ema_optax._trees import trees


def fold_update(
    shadows: Sequence[Any],
    newest_weights: Sequence[Callable[[jax.Array], jax.Array]],
    updates: optax.Updates,
    params: optax.Params,
    *,
    count: jax.Array,
    every: int,
    shardings: leaf_placement.LeafShardings | None = None,
    stochastic: bool = False,
) -> list[Any]:
    """Folds the params after an update into shadows, where a fold is due.

    Args:
        shadows: Trees like the params, with placeholders at the same leaves; or packed.
        newest_weights: For each shadow, a function from the count to the weight w of
            new params.
        updates: Updates that `optax.apply_updates` will add to the params.
        params: The params before the update.
        count: int32[], the 1-based number of the update.
        every: Updates between folds, ≥ 1.
        shardings: Shardings of each leaf and its param; None where they are alike.
        stochastic: Whether float32 shadows are rounded stochastically.

    Raises:
        ValueError: If shadows, updates and params do not fit each other.
    """
    stored = [_Stored(shadow, params) for shadow in shadows]
    averaged = sorted({i for each in stored for part in each.parts for i in part})
    by_leaf = {i: shardings[i] if shardings else None for i in averaged}
    new = new_params(updates, params, by_leaf)
    parts = [part for each in stored for part in each.parts]
    decays = [i for i, each in enumerate(stored) for _ in each.parts]
    arrays = dict(enumerate(array for each in stored for array in each.arrays))
    sharding = {n: by_leaf[part[0]] for n, part in enumerate(parts)}

    def fold_all(held: dict[int, Any], given: Any) -> dict[int, Any]:
        weights, seeds, new = given
        return {
            n: fold.fold(s, new[n], weights[decays[n]], seeds[n], stochastic=stochastic)
            for n, s in held.items()
        }

    def fold_there(held: dict[int, Any], given: Any) -> dict[int, Any]:
        """Folds shadows on the device, and moves them to where they are stored."""
        in_place, weights, seeds, new = given
        chosen = dict.fromkeys(parts[n] for n in held)
        gathered = {part: _gathered([new[i] for i in part]) for part in chosen}
        on_device = {
            n: leaf_placement.whole_until_fold(gathered[parts[n]], sharding[n])
            for n in held
        }
        held, on_device = (
            {n: leaf_placement.put_on_device(x, sharding[n]) for n, x in each.items()}
            for each in (held, on_device)
        )
        given = weights, seeds, on_device
        folded = {}
        # A loop folds fetched arrays in place; else the device would hold them twice.
        if in_place is not None:
            rows = {
                n: s for n, s in held.items() if transfers.is_by_row(s, sharding[n])
            }
            held = {n: s for n, s in held.items() if n not in rows}
            folded = due.where_due(fold_all, in_place, rows, given)
        folded |= fold_all(held, given)
        return {
            n: leaf_placement.put_as_shadow(s, sharding[n]) for n, s in folded.items()
        }

    # For every=1 it is always True, but XLA must not know: it would unroll the loop.
    is_due = count > 0 if every == 1 else count % every == 0
    weights = [fold.split_weight(weight(count)) for weight in newest_weights]
    given = weights, fold.fold_seeds(count, len(parts)), new
    # Each group in a loop of its own, which XLA does not reorder: in straight code it
    # fetches all from the host's memory first, and the device holds the whole tree for
    # a moment. One loop around them all would have TPUs transpose narrow arrays.
    folded = {}
    for group in transfers.host_groups(arrays, sharding):
        held = {n: arrays.pop(n) for n in group}
        folded |= due.where_due(fold_there, is_due, held, (is_due, *given))
    if every == 1:
        folded |= fold_there(arrays, (None, *given))
    elif arrays:
        folded |= due.where_due(fold_there, is_due, arrays, (None, *given))
    ordered = (folded[n] for n in range(len(folded)))
    return [each.with_arrays([next(ordered) for _ in each.arrays]) for each in stored]


def new_params(
    updates: optax.Updates,
    params: optax.Params,
    shardings: Mapping[int, leaf_placement.LeafSharding | None],
) -> dict[int, Any]:
    """Computes the params after an update, by the numbers of the averaged leaves.

    Args:
        updates: Updates that `optax.apply_updates` will add to the params.
        params: The params before the update.
        shardings: For the number of each averaged leaf, the shardings of its shadow and
            param.

    Raises:
        ValueError: If updates and params do not fit each other.
    """
    old, structure = jax.tree.flatten(params, is_leaf=trees.is_placeholder)
    deltas = _matching_updates(updates, structure)
    return {
        i: leaf_placement.put_as_param(optax.apply_updates(old[i], deltas[i]), sharding)
        for i, sharding in shardings.items()
    }


class _Stored:
    """A shadow as the arrays that are folded, each of one leaf or of several.

    Attributes:
        arrays: The arrays.
        parts: For each array, the numbers of its leaves among those of the params.
    """

    def __init__(self, shadow: Any, params: optax.Params) -> None:
        packed = isinstance(shadow, packing.Packed)
        # nnx.Optimizer inits with Flax's variables and updates with their arrays.
        tree = shadow.outline() if packed else shadow
        if packed and trees.flatten(tree)[0] == trees.flatten(params)[0]:
            tree = trees.arranged(tree, params)
        leaves = matching_leaves(tree, params)
        if packed:
            columns = shadow.columns()
        else:
            columns = [
                (leaf, (i,))
                for i, leaf in enumerate(leaves)
                if not trees.is_placeholder(leaf)
            ]
        self._shadow = shadow
        self.arrays = [array for array, _ in columns]
        self.parts = [part for _, part in columns]

    def with_arrays(self, arrays: list[Any]) -> Any:
        """Rebuilds the shadow with other arrays."""
        if isinstance(self._shadow, packing.Packed):
            return self._shadow.with_columns(arrays)
        leaves, structure = jax.tree.flatten(self._shadow, is_leaf=trees.is_placeholder)
        for (i,), array in zip(self.parts, arrays, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(structure, leaves)


def _gathered(new: list[jax.Array]) -> jax.Array:
    return new[0] if len(new) == 1 else packing.concatenated(new)


def matching_leaves(shadow: optax.Params, params: optax.Params) -> list[Any]:
    """Returns the leaves of a shadow, placeholders included.

    Raises:
        ValueError: If the params do not fit it.
    """
    difference = trees.difference(shadow, params, ("shadow", "params"))
    if difference:
        raise ValueError(
            f"Shadow and params do not fit each other: {difference}. If the model "
            "changed, start a new shadow with optimizer.init(params)."
        )
    return jax.tree.leaves(shadow, is_leaf=trees.is_placeholder)


def require_params(params: optax.Params | None, transform: str) -> None:
    """Refuses an update without params.

    Raises:
        ValueError: If `params` is None.
    """
    if params is None:
        raise ValueError(
            f"{transform} averages the params and was called without them. Call "
            "optimizer.update(updates, state, params)."
        )


def check_state(state: object, kind: type, transform: str) -> None:
    """Refuses an argument that is no state of a transform.

    Raises:
        TypeError: If it is of another type.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"The state of {transform} is what its init(params) returned; got "
            f"{brief(state)}. Call optimizer.update(updates, state, params)."
        )


def check_period(
    value: object,
    name: str,
    static_args: tuple[str, ...],
    one: str = "every update",
) -> int:
    """Checks a number of updates, and returns it as an integer.

    Args:
        value: The argument.
        name: Its name.
        static_args: Arguments that `optax.inject_hyperparams` must leave alone.
        one: Meaning of 1, for errors.

    Raises:
        TypeError: If it is an array.
        ValueError: If it is not a whole number ≥ 1.
    """
    if isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} must be a Python integer, got an array. optax.inject_hyperparams "
            f"turns every number into an array: pass it static_args={static_args}."
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"{name} must be a whole number of updates ≥ 1, got {brief(value)}. "
            f"{name}=1 means {one}."
        )
    if value >= 2**31:
        raise ValueError(
            f"{name} must be below 2³¹, where counts of updates end, got {value:,}."
        )
    return int(value)


def _matching_updates(updates: optax.Updates, structure: Any) -> list[Any]:
    try:
        return structure.flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(
            f"Updates and params do not fit each other: {structural(error)} Pass the "
            "params that the gradients were taken for."
        ) from None
