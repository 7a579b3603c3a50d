"""Finds the shadows of a step: their trees, places in the params, and entries."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ema_optax._averages import averages
from ema_optax._averages.average import Average
from ema_optax._averages.averages import Averages
from ema_optax._averages.states import BemaMadeBy, RingMadeBy
from ema_optax._checkpoint.entries import AverageEntry, Computed, Count
from ema_optax._checkpoint.manifest import SHADOW
from ema_optax._messages import text
from ema_optax._trees import trees
from ema_optax._trees.locating import (
    Shape,
    Shapes,
    misfit,
    named_alike,
    nearest_misfit,
    outline_of,
    places_of,
    under,
)
from ema_optax._trees.naming import tree_of


class Part(NamedTuple):
    """An average, where in the params its tree sits, and its shadow."""

    average: Average
    place: str
    tree: optax.Params


def parts_of(
    of_state: Averages, params: optax.Params, averaged: str | Mapping[str, str] | None
) -> list[Part]:
    """Returns the shadow of each average, and where in the params it sits.

    Raises:
        ValueError: If one sits nowhere, or may sit at several places.
    """
    places = _located(of_state, params, averaged)
    return [
        Part(average, place, _read(average, params, place))
        for average, place in zip(of_state, places, strict=True)
    ]


def joined(parts: Iterable[Part]) -> dict[str, Any]:
    """Joins the shadows of disjoint parts; returns them by the names of their trees.

    Raises:
        ValueError: If a leaf is averaged in more than one of them.
    """
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for average, place, tree in parts:
        at = by_name.setdefault(tree_of(average.name), {}).setdefault(place, {})
        at[average.where] = tree
    return {
        name: _assembled({at: averages.joined(each) for at, each in places.items()})
        for name, places in by_name.items()
    }


def entries(parts: Iterable[Part]) -> dict[str, AverageEntry]:
    """Returns decay, every and count of each shadow's tree, and where it sits.

    Decay and every are None where they are unknown, and where groups of params that
    are joined in one tree have different ones; the count is then that of the last.
    """
    by_tree: dict[str, AverageEntry] = {}
    computed = []
    for part in parts:
        if part.average.is_computed:
            computed.append(part)
            continue
        name, entry = tree_of(part.average.name), _entry_of(part)
        by_tree[name] = _merged(by_tree[name], entry) if name in by_tree else entry
    if computed:
        known = by_tree.get(SHADOW, _entry_of(computed[-1]))
        by_tree[SHADOW] = dataclasses.replace(
            known,
            bema=_arguments_of(computed, BemaMadeBy),
            ring=_arguments_of(computed, RingMadeBy),
            places={**known.places, **_places(computed)},
        )
    return by_tree


def _entry_of(part: Part) -> AverageEntry:
    average = part.average
    count = _count(average.count)
    return AverageEntry(average.decay, average.every, count, places=_places([part]))


def _places(parts: Iterable[Part]) -> dict[str, str]:
    return {part.average.path: part.place for part in parts if part.place}


def _merged(one: AverageEntry, other: AverageEntry) -> AverageEntry:
    return AverageEntry(
        one.decay if one.decay == other.decay else None,
        one.every if one.every == other.every else None,
        other.count,
        places={**one.places, **other.places},
    )


def _arguments_of(
    parts: Iterable[Part], maker: type[BemaMadeBy | RingMadeBy]
) -> tuple[dict[str, float], ...]:
    records = (part.average.made_by for part in parts)
    return tuple(each._asdict() for each in records if isinstance(each, maker))


def computed_of(of_state: Iterable[Average]) -> tuple[Computed, ...]:
    """Returns the calls that make the computed averages of a state."""
    parts = [Part(average, "", ()) for average in of_state if average.is_computed]
    entry = AverageEntry(
        None,
        None,
        0,
        bema=_arguments_of(parts, BemaMadeBy),
        ring=_arguments_of(parts, RingMadeBy),
    )
    return entry.computed


def _located(
    of_state: Averages, params: optax.Params, asked: str | Mapping[str, str] | None
) -> list[str]:
    """Returns the place in the params of each average's tree.

    Args:
        of_state: The averages of a state.
        params: The params to save.
        asked: The place where they sit, or for several averages that of each, by the
            place of its state; None finds them.

    Raises:
        ValueError: If one sits nowhere, or may sit at several places.
    """
    leaves = _shapes_of(params)
    if not (asked is None or isinstance(asked, (str, Mapping))):
        raise TypeError(
            f"averaged is a path in the params such as 'params', or maps the averages' "
            f"paths in the state to such; got {text.brief(asked)}."
        )
    if isinstance(asked, Mapping):
        unknown = [at for at in asked if not any(_is_of(each, at) for each in of_state)]
        if unknown:
            states = [average.path for average in of_state]
            raise ValueError(
                f"averaged has the key {unknown[0]!r}, where the state has no "
                f"average: they are at {', '.join(map(repr, states))}."
            )
    return [
        _place_of(average, leaves, _asked_of(average, asked), params)
        for average in of_state
    ]


def _shapes_of(tree: optax.Params) -> dict[str, Shape]:
    """Returns the shapes of the leaves of a tree, by path."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {trees.path_name(path): np.shape(leaf) for path, leaf in pairs}


def _assembled(by_place: Mapping[str, Any]) -> Any:
    """Joins trees that sit at places of one tree."""
    if list(by_place) == [""]:
        return by_place[""]
    leaves: dict[str, Any] = {}
    for place, tree in by_place.items():
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            path = under(place, trees.path_name(key_path))
            if path in leaves:
                raise ValueError(
                    f"'{path}' of the params has two averages in this optimizer state. "
                    "Give them names: ema_params({'fast': 0.99, 'slow': 0.9999})."
                )
            leaves[path] = leaf
    return trees.nested(leaves)


def _read(average: Average, params: optax.Params, place: str) -> Any:
    """Returns the shadow to store; a computed one is computed with the live params.

    It is in float32 or wider: restored in the params' dtypes it is the result of
    `shadow_params`. The params are matched by path.
    """
    if not average.is_computed:
        return average.tree
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    live = {trees.path_name(path): leaf for path, leaf in pairs}

    def param(key_path: object, _: object) -> Any:
        return live[under(place, trees.path_name(key_path))]

    return average.read(jax.tree_util.tree_map_with_path(param, average.tree))


def _count(count: object) -> Count:
    if isinstance(count, jax.Array) and not count.is_fully_addressable:
        count = count.addressable_shards[0].data
    return np.asarray(count).tolist()


def _is_of(average: Average, at: str) -> bool:
    return not at or f"{average.path}/".startswith(f"{at}/")


def _asked_of(average: Average, asked: str | Mapping[str, str] | None) -> str | None:
    if not isinstance(asked, Mapping):
        return asked
    return next((place for at, place in asked.items() if _is_of(average, at)), None)


def _place_of(
    average: Average, leaves: Shapes, asked: str | None, params: optax.Params
) -> str:
    outline = outline_of(average.tree)
    if asked is not None:
        path = misfit(outline, leaves, asked)
        if path is None:
            return asked
        shape = leaves.get(under(asked, path))
        raise ValueError(
            f"{_called(average)} does not sit at averaged={text.brief(asked)}: "
            f"there '{path}' is {'missing' if shape is None else shape}, and averaged "
            f"it is {outline.shapes[path]}. {_fits(places_of(outline, leaves))}"
        )
    places = places_of(outline, leaves)
    if len(places) > 1:
        places = named_alike(places, average.path) or places
    if len(places) == 1:
        return places[0]
    inside = [each.path for each in Averages(params)]
    if inside:
        raise ValueError(
            f"These params hold an optimizer state, with an average at '{inside[0]}'. "
            "Of a train state save the two apart: EmaSave(train_state.params, "
            "train_state.opt_state)."
        )
    if places:
        key = average.path.partition("/")[0]
        raise ValueError(
            f"{_called(average)} fits these params at several places: "
            f"{text.some(map(_name, places), 8)}. Say which the optimizer was given: "
            f"averaged={places[0]!r}; of several averages each by its place in the "
            f"state, averaged={{{key!r}: {places[0]!r}, …}}."
        )
    path = nearest_misfit(outline, leaves)
    raise ValueError(
        f"{_called(average)} does not sit in these params: it has '{path}' of shape "
        f"{outline.shapes[path]}. {text.nearest(path, leaves)} Save what "
        "optimizer.init was given, alone or inside a larger tree such as "
        "{'params': …, 'batch_stats': …}. A wrapper that rebuilds the tree, such as "
        "optax.flatten, goes around the optimizer alone: "
        "optax.chain(optax.flatten(optimizer), ema_optax.ema_params(…))."
    )


def at_its_place(tree: Any, params: optax.Params) -> Any:
    """Puts an average that no state holds where it sits in the params, by path.

    Args:
        tree: The average, of the params or a part of them.
        params: The params to save beside it; None where there are none.

    Raises:
        ValueError: If it is empty or an optimizer state, or if it sits nowhere in the
            params, or may sit at several places.
    """
    inside = [average.path for average in Averages(tree)]
    if inside:
        raise ValueError(
            f"This is an optimizer state, with an average at '{inside[0]}', and no "
            "average itself. Pass shadow_params(opt_state, params)."
        )
    outline = outline_of(tree)
    if not outline.shapes:
        raise ValueError(
            f"The average has no leaf: got {text.brief(tree)}. Pass a tree like the "
            "params, such as shadow_params(opt_state, params)."
        )
    if params is None:
        return tree
    leaves = _shapes_of(params)
    if misfit(outline, leaves, "") is None:  # its own paths say where it sits
        return tree
    places = places_of(outline, leaves)
    if len(places) == 1:
        return _assembled({places[0]: tree})
    if places:
        raise ValueError(
            f"The average fits these params at several places: "
            f"{text.some(map(_name, places), 8)}. Pass it with the keys above it, as "
            "the params have them."
        )
    path = nearest_misfit(outline, leaves)
    theirs = (
        f"theirs is {leaves[path]}"
        if path in leaves
        else f"they lack it. {text.nearest(path, leaves)[:-1]}"
    )
    raise ValueError(
        f"The average does not sit in these params: it has '{path}' of shape "
        f"{outline.shapes[path]}, and {theirs}. Pass the average of these params."
    )


def _called(average: Average) -> str:
    return f"The tree averaged at '{average.path}'" if average.path else "The average"


def _fits(places: Sequence[str]) -> str:
    return f"It fits at: {', '.join(map(_name, places)) or 'no place'}."


def _name(place: str) -> str:
    return repr(place) if place else "the whole ('')"
