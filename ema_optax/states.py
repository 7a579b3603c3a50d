"""The state of an average: a count, its shadows, and a record of what made them."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from ema_optax import packing
from ema_optax.families import Decay
from ema_optax.placement import LeafShardings


class Record(NamedTuple):
    """What a transform was given, kept with its state.

    Attributes:
        decays: Each shadow's decay by name (`""` where it has none), or None where it
            cannot be written down: a plain callable, or an injected array.
        every: Updates between folds.
        homes: Where each leaf of a shadow lives; None where it is with its param.
        stochastic: Whether float32 shadows are rounded stochastically.
    """

    decays: Mapping[str, Decay | None]
    every: int
    homes: LeafShardings | None = None
    stochastic: bool = False


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


class BemaRecord(NamedTuple):
    """What `bema_params` was given, kept with its state; hashable."""

    every: int
    ema_power: float
    bias_power: float
    lag: float
    multiplier: float
    min_newest_weight: float

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
        return f"bema_params({given})"


class BemaParamsState(NamedTuple):
    """State of `bema_params`, from which `shadow_params` computes the shadow.

    Attributes:
        count: int32[], the number of updates seen.
        average: s, a tree like the params, with `optax.MaskedNode()` where a leaf is
            not averaged.
        anchor: p₀, the params at init in their own dtypes, with the same placeholders.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    average: Any
    anchor: Any


class _Recorded:
    """Mixed into the states that a transform makes; `record` is part of their type.

    A pytree node keeps its type through every transformation and has no room for
    static data beside its leaves; a field would be saved, mapped over and counted.
    """

    record: ClassVar[Any]
    made_by: ClassVar[tuple[Any, tuple[Any, ...]]]  # what made the type, and from what

    def __reduce__(self) -> Any:
        state: Any = self
        return _unpickle, (*self.made_by, tuple(state))


class _AsTrees:
    """Mixed into the states of `ema_params`, so that nobody sees what is packed."""

    @property
    def shadow(self) -> Any:
        return packing.unpacked(stored_shadow(self))

    def _replace(self, **fields: Any) -> Any:
        if "shadow" in fields:
            fields["shadow"] = packing.packed_like(
                fields["shadow"], stored_shadow(self)
            )
        state: Any = super()
        return state._replace(**fields)


def stored_shadow(state: Any) -> Any:
    """Returns the shadow of a state of `ema_params` as it is stored: maybe packed."""
    return state[1]


def record_of(state: EmaParamsState) -> Record | None:
    """Returns what made a state, or None for one made by hand or by another library."""
    return state.record if isinstance(state, _Recorded) else None


def bema_record_of(state: BemaParamsState) -> BemaRecord:
    """Returns what made a state of `bema_params`.

    Raises:
        ValueError: If it was made by hand, and does not say.
    """
    if isinstance(state, _Recorded):
        return state.record
    raise ValueError(
        "This BemaParamsState was made by hand and does not say its bias_power, lag "
        "and multiplier, which reading it needs. Start from bema_params(...)"
        ".init(params), and put other values in with state._replace(count=…, "
        "average=…, anchor=…)."
    )


@functools.cache
def state_type(
    named: bool,
    decays: tuple[tuple[str, Decay | None], ...],
    every: int,
    homes: LeafShardings | None,
    stochastic: bool,
) -> type[EmaParamsState]:
    """Returns the type of a transform's states, the same for the same arguments."""
    base = NamedShadowsState if named else EmaParamsState
    made_by = (state_type, (named, decays, every, homes, stochastic))
    bases = (_Recorded, _AsTrees, base)
    return _recorded(bases, Record(dict(decays), every, homes, stochastic), made_by)


@functools.cache
def bema_state_type(record: BemaRecord) -> type[BemaParamsState]:
    """Returns the type of the states of `bema_params`, the same for the same record."""
    bases = (_Recorded, BemaParamsState)
    return _recorded(bases, record, (bema_state_type, (record,)))


def _recorded(bases: tuple[type, ...], record: Any, made_by: Any) -> Any:
    members = {"record": record, "made_by": made_by, "__doc__": bases[-1].__doc__}
    return type(bases[-1].__name__, bases, members)


def _unpickle(make_type: Any, key: Any, fields: Any) -> Any:
    return make_type(*key)(*fields)
