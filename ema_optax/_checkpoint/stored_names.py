"""What a resumed run's trees, params and state are called in the checkpoint."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ema_optax._averages.average import Average
from ema_optax._checkpoint.manifest import PARAMS, SHADOW, Manifest
from ema_optax._checkpoint.restoring import is_turned
from ema_optax._checkpoint.state_nodes import Part, split
from ema_optax._messages import text
from ema_optax._trees.locating import named_alike, under
from ema_optax._trees.naming import tree_of
from ema_optax._trees.renaming import Renames

SLOTS = "slots of this run's params to stored paths, and averages to stored ones"


class StoredNames:
    """The names on disk of a run's averages, params, and parts of its state.

    Attributes:
        stored_params: The paths of the stored params as their optimizer was given them.
    """

    def __init__(
        self,
        rename: Mapping[str, str] | None,
        manifest: Manifest,
        slots: Mapping[str, Any],
    ) -> None:
        """Parts the names of trees from those of params.

        Args:
            rename: `shadow` or `shadow/NAME` of this run to one of the checkpoint, and
                slots of the params to stored paths.
            manifest: Of the checkpoint.
            slots: This run's params by path.

        Raises:
            ValueError: If a name is of no tree and no slot, or of both.
        """
        rename = {} if rename is None else rename
        Renames(rename, SLOTS)  # says what is wrong with it
        self._manifest, self._slots = manifest, slots
        self._trees = {
            tree: stored
            for tree, stored in rename.items()
            if _is_tree(tree) and _is_tree(stored)
        }
        if PARAMS in manifest.trees:
            stored = manifest.trees[PARAMS].leaves
            turned = {k: v for k, v in rename.items() if k not in self._trees}
            if turned and is_turned(turned, slots, stored):
                path, slot = next(iter(turned.items()))
                raise ValueError(
                    "rename maps slots of this run to stored paths, and here it is "
                    f"the other way round: pass rename={{{slot!r}: {path!r}, …}}."
                )
        for tree, stored in self._trees.items():
            if stored not in manifest.averages:
                raise ValueError(
                    f"rename has {tree!r}: {text.brief(stored)}, and the checkpoint "
                    f"has {_listed(manifest.averages)}."
                )
            if any(f"{slot}/".startswith(f"{tree}/") for slot in slots):
                raise ValueError(
                    f"rename has {tree!r}, which is an average and the beginning of a "
                    f"param. For the params write {tree + '/**'!r}: {stored + '/**'!r}."
                )
        self._renames = Renames(
            {k: v for k, v in rename.items() if k not in self._trees}, SLOTS
        )
        self._paths = {slot: str(self._renames(slot)) for slot in slots}
        self._renames.check_used(slots, "slot of this run's params")
        self._check_stored()
        self._places = with_beginnings(
            place
            for average in manifest.averages.values()
            for place in average.places.values()
        )
        self.stored_params = frozenset(
            param for path in self._stored_paths() for param in self._seen(path)
        )

    @property
    def places(self) -> set[str]:
        """Where in the stored params averages sit, and what those places begin with."""
        return self._places

    def tree(self, name: str) -> str:
        """Returns the tree on disk that the average of a name goes on from."""
        tree = tree_of(name)
        return self._trees.get(tree, tree)

    def path(self, slot: str) -> str:
        """Returns the path on disk of a param of this run."""
        return self._paths.get(slot, slot)

    def check_trees(self, found: Iterable[Average]) -> None:
        """Refuses the name of an average that this run does not have.

        Raises:
            ValueError: If there is one.
        """
        trees = {tree_of(average.name) for average in found}
        for tree in self._trees:
            if tree not in trees:
                raise ValueError(
                    f"rename has {tree!r}, and the optimizer state has "
                    f"{_listed(trees)}."
                )

    def parts(
        self, leaves: Mapping[str, Any], places: Iterable[str]
    ) -> tuple[dict[str, Part], dict[str, str]]:
        """Splits the paths of this run's optimizer state.

        Args:
            leaves: Its leaves by path.
            places: Where in this run's params its averages sit.

        Returns:
            The parts, by path; and by path the slot of the param that it is of.
        """
        known: dict[str, list[str]] = {}
        for place in sorted(with_beginnings(places) | self._places):
            for slot in self._slots:
                if slot == place:
                    known.setdefault("", []).append(slot)
                elif not place or slot.startswith(f"{place}/"):
                    inside = slot[len(place) :].removeprefix("/")
                    known.setdefault(inside, []).append(slot)
        parts = {path: split(path, known) for path in leaves}
        slots: dict[str, str] = {}
        for path, part in parts.items():
            if part.param is not None:
                of = known[part.param]
                above = [slot.removesuffix(part.param).strip("/") for slot in of]
                alike = named_alike(above, path)
                slots[path] = under(alike[0], part.param) if alike else of[0]
                if not part.param and np.shape(leaves[path]) != np.shape(
                    self._slots[slots[path]]
                ):
                    del slots[path]  # beside params that are one array, a count
        return parts, slots

    def as_given(self, slot: str) -> list[str]:
        """Returns what a param may be called in the stored state, the likeliest first.

        An optimizer may have been given a part of the params: its paths begin there.
        """
        return self._seen(self.path(slot))

    def _check_stored(self) -> None:
        """Refuses a name for which the checkpoint has no param.

        Raises:
            ValueError: If there is one: it would start what was meant to go on.
        """
        stored = self._stored_paths()
        for key, slots in self._renames.used.items():
            paths = [self._paths[slot] for slot in slots]
            if paths and not any(path in stored for path in paths):
                raise ValueError(
                    f"rename has {text.brief(key)}, and the checkpoint has no param "
                    f"'{paths[0]}'. {text.nearest(paths[0], stored)}"
                )

    def _stored_paths(self) -> Collection[str]:
        stored = self._manifest.trees.get(PARAMS)
        return stored.leaves if stored else ()

    def _seen(self, path: str) -> list[str]:
        """Returns a stored path as seen from each place above it, the deepest first."""
        deepest = sorted(self._places, key=len, reverse=True)
        return [
            path[len(place) :].removeprefix("/")
            for place in deepest
            if not place or f"{path}/".startswith(f"{place}/")
        ]


def with_beginnings(places: Iterable[str]) -> set[str]:
    """Returns places in a tree and all above them.

    >>> sorted(with_beginnings(["params/encoder"]))
    ['', 'params', 'params/encoder']
    """
    found = {""}
    for place in places:
        keys = place.split("/")
        found |= {"/".join(keys[:i]) for i in range(1, len(keys) + 1)}
    return found


def _is_tree(name: str) -> bool:
    return name == SHADOW or name.startswith(f"{SHADOW}/")


def _listed(trees: Iterable[str]) -> str:
    return text.some(map(repr, sorted(trees)), 8) or "no average"
