"""The states of averages: plain pytrees, with a static record of what made them."""

# pyright: strict, reportMissingTypeStubs=false

import functools
import json
from typing import Any, NamedTuple

import jax
import optax

from ema_optax.decay import Decay
from ema_optax.placement import LeafShardings


class _EmaFields(NamedTuple):
    decays: str
    every: int
    rounding: str


@jax.tree_util.register_static
class EmaMadeBy(_EmaFields):
    """What `ema_params` was given, kept with its state; no leaves, hashable.

    Text and numbers alone, which any serializer of states can write. Where the shadows
    live is kept beside these fields: a serializer drops it, and the next update finds
    it again.

    Attributes:
        decays: JSON object from the name of each shadow (`""` where it has none) to its
            decay, or to null where that cannot be written: a callable, or an injected
            array.
        every: Updates between folds.
        rounding: `"stochastic"`, or `"nearest"`, which leaves out bfloat16.
        shardings: Those of each leaf; None where all shadows are with their params.
    """

    shardings: LeafShardings | None = None

    def at(self, shardings: LeafShardings | None) -> "EmaMadeBy":
        """Returns the same record for shadows that live somewhere."""
        placed = EmaMadeBy(*self)
        placed.shardings = shardings
        return placed

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the shadows; an empty one where they have none."""
        return tuple(_parsed(self.decays))

    def decay(self, name: str) -> Decay | None:
        """Returns the decay of a shadow; None where it could not be written."""
        return _parsed(self.decays).get(name)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, EmaMadeBy)
            and tuple(self) == tuple(other)
            and self.shardings == other.shardings
        )

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple has its own

    def __hash__(self) -> int:
        return hash((*self, self.shardings))

    def __getstate__(self) -> None:
        """Pickles the fields alone: devices cannot be pickled."""

    def __deepcopy__(self, _: object) -> "EmaMadeBy":
        return self  # nothing in it changes


@jax.tree_util.register_static
class BemaMadeBy(NamedTuple):
    """What `bema_params` was given, kept with its state; no leaves, hashable."""

    every: int
    ema_power: float
    bias_power: float
    lag: float
    multiplier: float
    min_newest_weight: float

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
        return f"bema_params({given})"


class EmaParamsState(NamedTuple):
    """State of `ema_params`.

    Attributes:
        count: int32[], the number of updates seen.
        shadow: A tree like the params, with `optax.MaskedNode()` where a leaf is not
            averaged; in a `NamedShadowsState` a dict of such trees. With `pack_small`,
            packed: read it with `ema_optax.shadow_params`.
        made_by: What `ema_params` was given, without leaves; None by hand.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    shadow: optax.Params
    made_by: EmaMadeBy | None = None


class NamedShadowsState(EmaParamsState):
    """State of `ema_params` with decays by name: `shadow` maps each name to a tree.

    A type of its own, because params may be a dict of like trees themselves.
    """


class BemaParamsState(NamedTuple):
    """State of `bema_params`, from which `shadow_params` computes the shadow.

    Attributes:
        count: int32[], the number of updates seen.
        average: s, a tree like the params, with `optax.MaskedNode()` where a leaf is
            not averaged.
        anchor: p₀, the params at init in their own dtypes, with the same placeholders.
        made_by: What `bema_params` was given, without leaves; None by hand.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] as in Optax
    average: optax.Params
    anchor: optax.Params
    made_by: BemaMadeBy | None = None


def written(decays: dict[str, Decay | None]) -> str:
    """Returns decays by name as the JSON that `EmaMadeBy` holds."""
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
