"""Warns of an average that is not the last of its chain: it folds no model's params."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

_WATCHES = ("MonitorState", "SnapshotState")  # of Optax; they leave updates alone


class OrderWarning(UserWarning):
    """Warns of an average before transforms of its chain that change the updates.

    Chained before the optimizer, `ema_params` averages params + gradients, which no
    model holds. Where it is meant so, or where a tuple holds states of separate
    transforms side by side, silence it:

    >>> warnings.simplefilter("ignore", OrderWarning)
    """


def warn_unless_last(
    opt_state: optax.OptState,
    path: tuple[Any, ...],
    where: str,
    is_average: Callable[[Any], bool],
) -> None:
    """Warns if transforms that change updates come after an average in its chain.

    Only the state is known. The types of Optax's states show which transforms come
    after; those of a user's own transforms do not show what they do.

    Args:
        opt_state: The optimizer state.
        path: Key path of the average's state in it.
        where: The same path as text.
        is_average: Whether a node is the state of an average.
    """
    node: Any = opt_state
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    for key in path:
        if type(node) is tuple and isinstance(key, jax.tree_util.SequenceKey):
            before, after = node[: key.idx], node[key.idx + 1 :]
        elif not isinstance(node, tuple):
            before = after = ()
        child = _child(node, key)
        if child is None:
            return
        node = child
    if not _lacks_a_rate(before):
        # `scale` and `identity` have the same state, and only the first would matter.
        after = tuple(each for each in after if type(each) is not optax.EmptyState)
    changing = next(filter(None, (_changing(each, is_average) for each in after)), None)
    if changing:
        warnings.warn(
            f"The average at '{where}' of this optimizer state comes before a "
            f"{changing}: what it folds is not what the model holds after the update. "
            "Chain it last, optax.chain(optimizer, ema_optax.ema_params(…)); or see "
            "ema_optax.OrderWarning.",
            OrderWarning,
            stacklevel=5,
        )


def _lacks_a_rate(before: tuple[Any, ...]) -> bool:
    """Whether the last of some states leaves updates without a learning rate.

    So does `scale_by_adam` alone; `adam` is a chain of its own, with the rate in it.
    """
    return (
        bool(before)
        and type(before[-1]).__name__.startswith("ScaleBy")
        and (not isinstance(before[-1], optax.ScaleByScheduleState))
    )


def _child(node: Any, key: Any) -> Any:
    if isinstance(key, jax.tree_util.SequenceKey):
        return node[key.idx]
    if isinstance(key, jax.tree_util.GetAttrKey):
        return getattr(node, key.name)
    if isinstance(key, jax.tree_util.DictKey):
        return node[key.key]
    return None  # a custom node, which does not show its children


def _changing(node: Any, is_average: Callable[[Any], bool]) -> str | None:
    """Names the type of the first state in a node whose transform changes updates."""
    inside = jax.tree.leaves(node, is_leaf=is_average)
    if any(map(is_average, inside)):  # an optimizer of its own beside this one
        return None
    if isinstance(node, optax.MaskedState):
        return _changing(node.inner_state, is_average)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        kind = type(node)
        changes = kind.__module__.startswith("optax") and kind.__name__ not in _WATCHES
        return kind.__name__ if changes else None
    children: list[Any] = []
    if isinstance(node, (tuple, list)):
        children = list(node)
    elif isinstance(node, Mapping):
        children = list(node.values())
    names = (_changing(child, is_average) for child in children)
    return next(filter(None, names), None)
