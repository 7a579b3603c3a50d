"""The states of averages: plain pytrees, with a static record of their arguments."""

# pyright: strict, reportMissingTypeStubs=false

import functools
import json
from typing import Any, NamedTuple, Self

import jax
import optax

from ema_optax._decays.decay import Decay
from ema_optax._placement.leaf_placement import LeafShardings


class _Placed:
    """A record that knows, beside its fields, where shadows live.

    A serializer of states writes the fields and drops the shardings; the next update
    finds them again. So do pickles, as devices cannot be pickled.

    Attributes:
        shardings: Shardings of each leaf; None where all shadows are with their params.
    """

    shardings: LeafShardings | None = None

    def at(self, shardings: LeafShardings | None) -> Self:
        """Copies the record, with other shardings."""
        placed = type(self)(*self)  # pyright: ignore
        placed.shardings = shardings
        return placed

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, type(self))
            and tuple(self) == tuple(other)  # pyright: ignore
            and self.shardings == other.shardings
        )

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple has a __ne__ of its own

    def __hash__(self) -> int:
        return hash((*self, self.shardings))  # pyright: ignore

    def __getstate__(self) -> None:
        """Pickles the fields alone."""

    def __deepcopy__(self, _: object) -> Self:
        return self  # it is immutable


class _EmaFields(NamedTuple):
    decays: str
    every: int
    rounding: str


@jax.tree_util.register_static
class EmaMadeBy(_Placed, _EmaFields):
    """Arguments of `ema_params`, kept with its state; no leaves, hashable.

    They are text and numbers alone, which any serializer of states can write.

    Attributes:
        decays: JSON object from the name of each shadow (`""` where it has none) to its
            decay, or to null where that cannot be recorded: a callable, or an injected
            array.
        every: Updates between folds.
        rounding: `"stochastic"`, or `"nearest"`, which leaves out bfloat16.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the shadows; an empty one where they have none."""
        return tuple(_parsed(self.decays))

    def decay(self, name: str) -> Decay | None:
        """Returns the decay of a shadow; None where it could not be recorded."""
        return _parsed(self.decays).get(name)


@jax.tree_util.register_static
class BemaMadeBy(NamedTuple):
    """Arguments of `bema_params`, kept with its state; no leaves, hashable."""

    every: int
    ema_power: float
    bias_power: float
    lag: float
    multiplier: float
    min_newest_weight: float

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
        return f"bema_params({given})"


class _RingFields(NamedTuple):
    k: int
    every: int


@jax.tree_util.register_static
class RingMadeBy(_Placed, _RingFields):
    """Arguments of `ring`, kept with its state; no leaves, hashable.

    Attributes:
        k: Number of slots.
        every: Updates between copies.
    """

    def __str__(self) -> str:
        return f"ring(k={self.k}, every={self.every})"


class EmaParamsState(NamedTuple):
    """Holds the count and the shadow of `ema_params`.

    Attributes:
        count: int32[], the number of updates seen.
        shadow: A tree like the params, with `optax.MaskedNode()` where a leaf is not
            averaged; in a `NamedShadowsState` a dict of such trees. With `pack_small`,
            packed: read it with `ema_optax.shadow_params`.
        made_by: Arguments of `ema_params`, without leaves; None by hand.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    shadow: optax.Params
    made_by: EmaMadeBy | None = None


class NamedShadowsState(EmaParamsState):
    """Holds the shadows of `ema_params` by the names of their decays.

    A type of its own, because params may be a dict of like trees themselves.
    """


class BemaParamsState(NamedTuple):
    """Holds what `shadow_params` computes the average of `bema_params` from.

    Attributes:
        count: int32[], the number of updates seen.
        average: s, a tree like the params, with `optax.MaskedNode()` where a leaf is
            not averaged.
        anchor: p₀, the params at init in their own dtypes, with the same placeholders.
        made_by: Arguments of `bema_params`, without leaves; None by hand.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    average: optax.Params
    anchor: optax.Params
    made_by: BemaMadeBy | None = None


class RingState(NamedTuple):
    """Holds the params of `ring`, whose mean `shadow_params` computes.

    Attributes:
        count: int32[], the number of updates seen.
        slots: A tree like the params, each leaf with an axis of k in front, in the
            params' dtypes; with `optax.MaskedNode()` where a leaf is not averaged. Fold
            number i, from 1, is in slot (i−1) mod k; the others hold the params at
            init.
        made_by: Arguments of `ring`, without leaves; None by hand.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    slots: optax.Params
    made_by: RingMadeBy | None = None


def written(decays: dict[str, Decay | None]) -> str:
    """Writes decays by name as the JSON that `EmaMadeBy` holds."""
    return json.dumps(
        {
            name: json.loads(decay.to_json()) if decay else None
            for name, decay in decays.items()
        }
    )


@functools.cache
def _parsed(decays: str) -> dict[str, Decay | None]:
    fields: dict[str, Any] = json.loads(decays)
    return {
        name: Decay.from_json(field) if field else None
        for name, field in fields.items()
    }
