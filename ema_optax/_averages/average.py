"""The interface of an average inside an optimizer state: its data, how it is read."""

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
        path: Path of its state inside the optimizer state.
        name: Its name, where the state has several; else empty.
        count: int32[], the number of updates seen.
        made_by: Arguments of the transform; None for a state made by hand.
        tree: The tree that the state keeps, with placeholders where a leaf is not
            averaged; of several params the shapes alone.
        is_computed: Whether reading computes the shadow, from fields that stay part of
            the optimizer state.
        fields: Those fields of the state. They start as the params.
        source: Name of what they hold, in errors.
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
        """The decay; None where the state does not record it."""
        return None

    @abc.abstractmethod
    def read(self, params: optax.Params | None) -> optax.Params:
        """Reads the shadow, in float32 or wider, where the params live.

        Args:
            params: The live params; None for the shadow as it is kept.

        Raises:
            ValueError: If it cannot be read without params.
        """

    def kept(self, params: optax.Params) -> optax.Params:
        """Reads the average as it is folded, before any correction."""
        return self.read(params)

    @abc.abstractmethod
    def decay_at(self, count: jax.Array) -> jax.Array | None:
        """Returns the weight that the update `count` left to the shadow; or None."""

    @abc.abstractmethod
    def weight_of_fold(self, count: jax.Array) -> jax.Array | None:
        """Returns the weight of the params in the fold at `count`; None if unknown."""

    @abc.abstractmethod
    def log_kept(self, steps: jax.Array) -> jax.Array:
        """Returns the log of the share that each update left of all before it."""

    def is_rounded_by_chance(self, dtype: np.dtype) -> bool:
        """Whether a shadow of a dtype is rounded stochastically."""
        return dtype.name == "bfloat16"
