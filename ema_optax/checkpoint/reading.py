"""Reading leaves of an item: only those wanted, as they were stored, and verified."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ema_optax.checkpoint import arrays, checksums, files, manifest
from ema_optax.checkpoint.agreement import agreed, anywhere
from ema_optax.checkpoint.contents import PARAMS
from ema_optax.checkpoint.manifest import CorruptCheckpointError


class Place(NamedTuple):
    """Where a leaf lies in an item: the name of its tree, and its path there."""

    tree: str
    path: str


# The sharding to read each leaf onto, or None to read it as a NumPy array.
Wanted: TypeAlias = Mapping[Place, Any]


def read(
    item: epath.Path, described: Mapping[str, Any], wanted: Wanted, *, verify: bool
) -> dict[Place, Any]:
    """Reads leaves in the dtype they were saved in, and nothing else.

    All processes must call it alike.

    Args:
        item: Folder of the item.
        described: Its manifest.
        wanted: What to read.
        verify: Whether to compare what was read with the checksums.

    Raises:
        CorruptCheckpointError: On every process, if one of them cannot read its part or
            finds it damaged.
    """
    sums = (
        agreed(lambda: manifest.read_checksums(item, described), _elsewhere(item))
        if verify
        else None
    )
    found: dict[Place, Any] = {}
    problem: str | None = None
    for folder, structure in _stores(item, described):
        here = {place: s for place, s in wanted.items() if place.tree in structure}
        leaves, unreadable = _read_or_blame(item, folder, structure, described, here)
        # Before any collective: whoever could not read must not be waited for.
        if anywhere(unreadable is not None):
            raise CorruptCheckpointError(f"{item}: {unreadable or _ELSEWHERE}.")
        found |= leaves
    if sums is None:
        return found
    for place, leaf in found.items():
        pieces = sums[place.tree].get(place.path, [])
        stored = stored_leaf(described, place)
        wrong = checksums.mismatch(leaf, stored["dtype"], pieces)
        if np.shape(leaf) != tuple(stored["shape"]) and stored["kind"][:4] != "key:":
            wrong = f"it is {np.shape(leaf)}, its manifest says {stored['shape']}"
        if wrong:
            problem = problem or f"leaf '{place.path}' of the {place.tree}: {wrong}"
    if anywhere(problem is not None):
        raise CorruptCheckpointError(f"{item}: {problem or _ELSEWHERE}.")
    return found


_ELSEWHERE = "another process could not read its part, or found it damaged"


def read_manifest(item: epath.Path) -> dict[str, Any]:
    """Returns the manifest of an item; all processes must call it alike."""
    return agreed(lambda: manifest.read_manifest(item), _elsewhere(item))


def _elsewhere(item: epath.Path) -> Exception:
    return RuntimeError(f"{item}: {_ELSEWHERE}.")


def _stores(
    item: epath.Path, described: Mapping[str, Any]
) -> list[tuple[epath.Path, dict[str, Any]]]:
    """Returns the folders that Orbax wrote, each with the structures of its trees."""
    beside = {
        name: tree["structure"]
        for name, tree in described["trees"].items()
        if tree["leaves"] or name == PARAMS
    }
    params = {PARAMS: beside.pop(PARAMS)} if PARAMS in beside else {}
    return [(item, params), (item / manifest.FOLDER, beside)]


def stored_leaf(described: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Returns what a manifest says of a leaf: its shape, dtype and kind."""
    return described["trees"][place.tree]["leaves"][place.path]


def _read_or_blame(
    item: epath.Path,
    folder: epath.Path,
    structure: Mapping[str, Any],
    described: Mapping[str, Any],
    wanted: Wanted,
) -> tuple[dict[Place, Any], str | None]:
    """Returns the leaves, or which one cannot be read and why."""
    if not wanted:
        return {}, None
    try:
        wrong = files.wrong(folder, claimed(described, wanted))
    except OSError as error:
        wrong = _brief(error)
    if wrong:
        return {}, wrong

    def read(places: Wanted) -> dict[Place, Any]:
        unlike = arrays.first_unlike(item, described, places)
        if unlike:
            raise ValueError(unlike)
        return _read_leaves(folder, structure, described, places)

    try:
        return read(wanted), None
    except Exception as error:  # of many types, and naming a file at best
        suspects = list(wanted)
        while len(suspects) > 1:  # by halves: there may be very many
            half = suspects[: len(suspects) // 2]
            try:
                read({place: wanted[place] for place in half})
                suspects = suspects[len(half) :]
            except Exception:
                suspects = half
        [place] = suspects
        try:
            read({place: wanted[place]})
        except Exception as alone:
            leaf = f"leaf '{place.path}' of the {place.tree}"
            return {}, f"{leaf} cannot be read: {_brief(alone)}"
        return {}, _brief(error)


def claimed(described: Mapping[str, Any], places: Iterable[Place]) -> int:
    """Returns the bytes that leaves have, if the manifest is right."""
    stored = (stored_leaf(described, place) for place in places)
    return sum(math.prod(x["shape"]) * jnp.dtype(x["dtype"]).itemsize for x in stored)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]  # TensorStore's run to pages


def _read_leaves(
    folder: epath.Path,
    structure: Mapping[str, Any],
    described: Mapping[str, Any],
    wanted: Wanted,
) -> dict[Place, Any]:
    """Reads the wanted leaves of one store; the others are placeholders, not read."""

    def chosen(node: Any, tree: str) -> Any:
        if isinstance(node, dict):
            return {key: chosen(value, tree) for key, value in node.items()}
        if isinstance(node, list):
            return [chosen(value, tree) for value in node]
        place = Place(tree, node) if node is not None else None
        return _Slot(place) if place in wanted else ocp.PLACEHOLDER

    def arguments(slot: Any) -> Any:
        if not isinstance(slot, _Slot):
            return ocp.RestoreArgs()
        stored, sharding = stored_leaf(described, slot.place), wanted[slot.place]
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        if stored["kind"].startswith("key:"):
            return ocp.ArrayRestoreArgs(sharding=sharding)
        return ocp.ArrayRestoreArgs(
            sharding=sharding,
            global_shape=tuple(stored["shape"]),
            dtype=jnp.dtype(stored["dtype"]),
        )

    slots = {name: chosen(node, name) for name, node in structure.items()}
    target = slots.get(PARAMS, slots)
    restored = ocp.PyTreeCheckpointHandler().restore(
        folder,
        args=ocp.args.PyTreeRestore(
            item=target, restore_args=jax.tree.map(arguments, target)
        ),
    )
    pairs = zip(jax.tree.leaves(target), jax.tree.leaves(restored), strict=True)
    return {slot.place: leaf for slot, leaf in pairs if isinstance(slot, _Slot)}


class _Slot:
    """A leaf to read; no pytree, so that it stays a leaf."""

    def __init__(self, place: Any) -> None:
        self.place = place
