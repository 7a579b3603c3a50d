"""Finds all averages of an optimizer state in one search, and puts them back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema_optax._averages import bema, packing, rings
from ema_optax._averages.average import Average
from ema_optax._averages.order import warn_unless_last
from ema_optax._averages.states import (
    BemaParamsState,
    EmaMadeBy,
    EmaParamsState,
    NamedShadowsState,
    RingState,
)
from ema_optax._decays.decay import Decay
from ema_optax._messages import arguments
from ema_optax._placement import leaf_placement
from ema_optax._trees import mistaken, naming, trees


class EmaAverage(Average):
    """One shadow of an `EmaParamsState`."""

    made_by: EmaMadeBy | None

    @property
    def decay(self) -> Decay | None:
        """The decay; None where the state does not record it."""
        return self.made_by.decay(self.name) if self.made_by else None

    def read(self, params: optax.Params | None) -> optax.Params:
        """Reads the shadow; with params, moves it to where they live."""
        shardings = self.made_by.shardings if self.made_by else None
        if shardings is None or params is None:
            return self.tree
        leaves, structure = jax.tree.flatten(self.tree, is_leaf=trees.is_placeholder)
        pairs = zip(leaves, shardings, strict=True)
        gathered = [leaf_placement.gather(leaf, sharding) for leaf, sharding in pairs]
        return jax.tree.unflatten(structure, gathered)

    def decay_at(self, count: jax.Array) -> jax.Array | None:
        """Returns β at an update; None where the decay is unknown."""
        return self.decay(jnp.maximum(count, 1)) if self.decay else None

    def weight_of_fold(self, count: jax.Array) -> jax.Array | None:
        """Returns 1 − Πβ of the fold at `count`; None where the decay is unknown."""
        if self.decay is None or self.every is None:
            return None
        return self.decay.newest_weight(jnp.maximum(count, self.every), self.every)

    def log_kept(self, steps: jax.Array) -> jax.Array:
        """Returns log β at each of the steps."""
        assert self.decay is not None
        return jnp.log1p(-self.decay.newest_weight(steps))

    def is_rounded_by_chance(self, dtype: np.dtype) -> bool:
        """Whether a shadow of a dtype is rounded stochastically."""
        record = self.made_by
        stochastic = record is not None and record.rounding == "stochastic"
        return super().is_rounded_by_chance(dtype) or (
            stochastic and dtype.name == "float32"
        )


class Kind(NamedTuple):
    """How a kind of state gives and takes its averages; a new kind is a row of `KINDS`.

    Attributes:
        averages: Lists the averages of a state at a path.
        without: Reduces a state to the part that is stored as optimizer state.
        put_back: Rebuilds the state from that part, the state as it was, and the tree
            of each average.
    """

    averages: Callable[[str, Any], list[Average]]
    without: Callable[[Any], Any]
    put_back: Callable[[Any, Any, Sequence[optax.Params]], Any]


def _shadows_of(path: str, state: EmaParamsState) -> list[Average]:
    shadow = packing.unpacked(state.shadow)
    by_name = shadow if isinstance(state, NamedShadowsState) else {"": shadow}
    return [
        EmaAverage(path, name, state.count, state.made_by, tree)
        for name, tree in by_name.items()
    ]


def _put_shadows_back(
    rest: EmaParamsState, old: EmaParamsState, shadows: Sequence[optax.Params]
) -> EmaParamsState:
    old_shadow: Any = old.shadow
    shadow: Any = shadows[0]
    if isinstance(old, NamedShadowsState):
        shadow = dict(zip(old_shadow, shadows, strict=True))
    shadow = packing.packed_like(shadow, old_shadow)
    return old._replace(count=rest.count, shadow=shadow)


KINDS: Mapping[type, Kind] = {
    EmaParamsState: Kind(
        _shadows_of,
        lambda state: state._replace(shadow=None, made_by=None),
        _put_shadows_back,
    ),
    # What the shadow is computed from stays part of the optimizer state.
    BemaParamsState: Kind(
        lambda path, state: [bema.average_of(path, state)],
        lambda state: state._replace(made_by=None),
        lambda rest, old, _: rest._replace(made_by=old.made_by),
    ),
    RingState: Kind(
        lambda path, state: [rings.average_of(path, state)],
        lambda state: state._replace(made_by=None),
        lambda rest, old, _: rest._replace(made_by=old.made_by),
    ),
}


# Ends of the places of averages that cannot have names.
_WITHOUT_NAMES = (bema.CALLED, rings.CALLED)


class Averages:
    """All averages of an optimizer state, in the order of their places."""

    def __init__(
        self, opt_state: optax.OptState, call: str = "", params: object = None
    ) -> None:
        self._opt_state, self._call, self._params = opt_state, call, params
        pairs, self._structure = jax.tree_util.tree_flatten_with_path(
            opt_state, is_leaf=lambda node: _kind(node) is not None
        )
        self._nodes = [node for _, node in pairs]
        for path, node in pairs:
            if _kind(node):
                where = trees.path_name(path)
                warn_unless_last(opt_state, path, where, lambda n: _kind(n) is not None)
        self._of_nodes = [
            (kind.averages(trees.path_name(path), node), kind) if kind else ([], None)
            for path, node in pairs
            for kind in [_kind(node)]
        ]
        self._averages = [each for listed, _ in self._of_nodes for each in listed]

    def __iter__(self) -> Iterator[Average]:
        return iter(self._averages)

    def __len__(self) -> int:
        return len(self._averages)

    @property
    def names(self) -> list[str]:
        """The names of the averages, sorted; an empty one where one has none."""
        return sorted({average.name for average in self})

    def of(self, name: str | None) -> list[Average]:
        """Returns the averages of a name, as `naming.chosen` takes it, or the only one.

        Raises:
            ValueError: If there is none, or there are several and no name is given.
        """
        if not self._averages:
            raise ValueError(self.none())
        if name is None and len(self.names) == 1:
            return self._averages
        stored = [naming.tree_of(each) for each in self.names]
        call = f"Call {self._call} with name="
        if name is None:
            names = naming.spelled(stored)
            raise ValueError(
                f"The optimizer state has the shadows {', '.join(map(repr, names))}, "
                f"and none was asked for. {call}{names[0]!r}."
            )
        arguments.a_name(name, "name", "slow")
        tree = naming.chosen(name, [naming.PARAMS, *stored], call)
        if tree == naming.PARAMS:
            raise ValueError(
                f"{name!r} are the raw params, and this is of a shadow. "
                f"{call}{naming.spelled(stored)[-1]!r}."
            )
        return [average for average in self if naming.tree_of(average.name) == tree]

    def none(self) -> str:
        """Writes the error for a state without an average."""
        return mistaken.without_average(
            self._opt_state,
            self._params,
            self._call,
            lambda other: len(Averages(other)) > 0,
        )

    def rest(self) -> optax.OptState:
        """Returns the optimizer state with None for each shadow and record."""
        return jax.tree.unflatten(
            self._structure,
            [
                kind.without(node) if kind else node
                for node, (_, kind) in zip(self._nodes, self._of_nodes, strict=True)
            ],
        )

    def put_back(
        self, rest: optax.OptState, shadows: Sequence[optax.Params]
    ) -> optax.OptState:
        """Rebuilds the optimizer state with other shadows.

        Args:
            rest: A tree as `rest` returns it.
            shadows: The tree of each average, in their order; not used where the
                shadow is computed.

        Raises:
            ValueError: If there are not as many as averages.
        """
        if len(shadows) != len(self):
            raise ValueError(f"{len(self)} averages take as many, got {len(shadows)}.")
        left = iter(shadows)
        nodes = [
            kind.put_back(node, old, [next(left) for _ in listed]) if kind else node
            for node, old, (listed, kind) in zip(
                self._structure.flatten_up_to(rest),
                self._nodes,
                self._of_nodes,
                strict=True,
            )
        ]
        return jax.tree.unflatten(self._structure, nodes)


def find(
    opt_state: optax.OptState,
    *,
    call: str = "shadow_params(opt_state, params)",
    params: object = None,
) -> Averages:
    """Finds all averages of an optimizer state in one search.

    Args:
        opt_state: The optimizer state, or the state of an average itself.
        call: The user's call, for errors.
        params: The user's params, for errors.

    Raises:
        TypeError: If it is an optimizer, or an object of Flax NNX.
    """
    mistaken.check_opt_state(opt_state, call)
    return Averages(opt_state, call, params)


def whole(shadows: Mapping[str, optax.Params], params: optax.Params) -> optax.Params:
    """Joins shadows of disjoint leaves into one tree of the structure of the params.

    Args:
        shadows: Trees by the places of their averages, not copied.
        params: The params that the optimizer state belongs to.

    Raises:
        ValueError: If two of them average a leaf, or the params do not fit.
    """
    shadow = joined({at: trees.arranged(x, params) for at, x in shadows.items()})
    difference = trees.difference(shadow, params, ("shadow", "params"))
    if difference:
        raise ValueError(mistaken.misfit(shadow, params, difference))
    return shadow


def joined(shadows: Mapping[str, optax.Params]) -> optax.Params:
    """Joins shadows that cover disjoint leaves into one tree.

    Args:
        shadows: Trees of one structure by the places of their averages, not copied. A
            placeholder may stand for a part of the structure.

    Raises:
        ValueError: If a leaf is averaged in more than one of them.
    """
    (path, joined), *others = shadows.items()
    for other_path, other in others:
        try:
            joined = _joined(joined, other)
        except _OverlapError:
            advice = (
                "Give them names, in one transform: "
                "ema_params({'fast': 0.99, 'slow': 0.9999})"
            )
            if any(each.endswith(_WITHOUT_NAMES) for each in (path, other_path)):
                advice = (
                    "Give the one of ema_params a name: ema_params({'slow': 0.999})"
                )
            raise ValueError(
                f"The optimizer state has several shadows of the same params, at "
                f"'{path}' and '{other_path}'. {advice}, and read "
                "shadow_params(opt_state, params, name='slow'); or pass the part of "
                "the state that holds the one you mean."
            ) from None
    return joined


class _OverlapError(Exception):
    """Two shadows have the same leaf, or are of different trees."""


def _joined(ours: Any, theirs: Any) -> Any:
    """Joins two trees level by level; where one has a placeholder, takes the other."""
    if trees.is_placeholder(ours):
        return theirs
    if trees.is_placeholder(theirs):
        return ours
    children, structure = jax.tree.flatten(ours, is_leaf=lambda x: x is not ours)
    more, others = jax.tree.flatten(theirs, is_leaf=lambda x: x is not theirs)
    if structure != others or jax.tree_util.all_leaves([ours]):
        raise _OverlapError
    pairs = zip(children, more, strict=True)
    return jax.tree.unflatten(structure, [_joined(*pair) for pair in pairs])


def _kind(node: object) -> Kind | None:
    return next((kind for of, kind in KINDS.items() if isinstance(node, of)), None)
