"""An average inside an optimizer state: what it is, and how it is read."""

# pyright: strict, reportMissingTypeStubs=false

import abc
import dataclasses
from typing import ClassVar

import jax
import numpy as np
import optax

from ema_optax._averages.states import BemaMadeBy, EmaMadeBy, RingMadeBy
from ema_optax._decays.decay import Decay


@dataclasses.dataclass(frozen=True)
class Average(abc.ABC):
    """One average of a state.

    Attributes:
        path: Of its state inside the optimizer state.
        name: Where the state has several; else empty.
        count: int32[], the number of updates seen.
        made_by: What the transform was given; None by hand.
        tree: What the state keeps, with placeholders where a leaf is not averaged; of
            several params its shapes alone.
        is_computed: Whether the shadow is computed when it is read, from what stays
            part of the optimizer state.
        fields: Those of the state that it is computed from. They start as the params.
        source: What that is, in errors.
        where: Its place in errors.
    """

    path: str
    name: str
    count: jax.Array
    made_by: EmaMadeBy | BemaMadeBy | RingMadeBy | None
    tree: optax.Params
    is_computed: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""

    @property
    def where(self) -> str:
        """Its place in errors."""
        return self.path

    @property
    def every(self) -> int | None:
        """Updates between folds; None where unknown."""
        return self.made_by.every if self.made_by else None

    @property
    def decay(self) -> Decay | None:
        """The decay, where it can be written down."""
        return None

    @abc.abstractmethod
    def read(self, params: optax.Params | None) -> optax.Params:
        """Returns the shadow, in float32 or wider, where the params live.

        Args:
            params: The live params; None for the shadow as it is kept.

        Raises:
            ValueError: If it cannot be read without them.
        """

    def kept(self, params: optax.Params) -> optax.Params:
        """Returns what is folded, which may be corrected where the shadow is read."""
        return self.read(params)

    @abc.abstractmethod
    def decay_at(self, count: jax.Array) -> jax.Array | None:
        """Returns the weight that the update `count` left to the shadow, or None."""

    @abc.abstractmethod
    def weight_of_fold(self, count: jax.Array) -> jax.Array | None:
        """Returns the weight of the params in the fold at `count`; None if unknown."""

    @abc.abstractmethod
    def log_kept(self, steps: jax.Array) -> jax.Array:
        """Returns the log of what each of the updates left of all before it."""

    def is_rounded_by_chance(self, dtype: np.dtype) -> bool:
        """Returns whether a shadow of a dtype is rounded stochastically."""
        return dtype.name == "bfloat16"
