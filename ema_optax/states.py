"""The state of an average: a count, its shadows, and a record of what made them."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import jax

from ema_optax.families import Decay


class Record(NamedTuple):
    """What a transform was given, kept with its state.

    Attributes:
        decays: Each shadow's decay by name (`""` where it has none), or None where it
            cannot be written down: a plain callable, or an injected array.
        every: Updates between folds.
    """

    decays: Mapping[str, Decay | None]
    every: int


class EmaParamsState(NamedTuple):
    """State of `ema_params`.

    Attributes:
        count: int32[], the number of updates seen.
        shadow: A tree like the params, with `optax.MaskedNode()` where a leaf is not
            averaged; or, in a `NamedShadowsState`, a dict of such trees.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    shadow: Any


class NamedShadowsState(EmaParamsState):
    """State of `ema_params` with decays by name: `shadow` maps each name to a tree.

    A type of its own, because params may be a dict of like trees themselves.
    """


class _Recorded:
    """Mixed into the states that a transform makes; `record` is part of their type.

    A pytree node keeps its type through every transformation and has no room for
    static data beside its leaves; a field would be saved, mapped over and counted.
    """

    record: ClassVar[Record]

    def __reduce__(self) -> Any:
        state: Any = self
        named = isinstance(self, NamedShadowsState)
        key = (named, tuple(self.record.decays.items()), self.record.every)
        return _unpickle, (key, tuple(state))


def record_of(state: EmaParamsState) -> Record | None:
    """Returns what made a state, or None for one made by hand or by another library."""
    return state.record if isinstance(state, _Recorded) else None


@functools.cache
def state_type(
    named: bool, decays: tuple[tuple[str, Decay | None], ...], every: int
) -> type[EmaParamsState]:
    """Returns the type of a transform's states, the same for the same arguments."""
    base = NamedShadowsState if named else EmaParamsState
    members = {"record": Record(dict(decays), every), "__doc__": base.__doc__}
    return cast(Any, type(base.__name__, (_Recorded, base), members))


def _unpickle(key: Any, fields: Any) -> EmaParamsState:
    return state_type(*key)(*fields)
