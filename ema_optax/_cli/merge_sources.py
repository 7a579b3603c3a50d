"""The checkpoints that are merged: found, opened as sources, and compared."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ema_optax import checkpoint, safetensors
from ema_optax._checkpoint import foreign_steps, storage
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.steps import items_in
from ema_optax._interop import safetensors_sources
from ema_optax._trees import trees
from ema_optax.reconstruction import Source

OURS, THEIRS, TENSORS = "ema_optax", "another program", "a program as safetensors"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Checkpoints that can be merged.

    Attributes:
        places: Path of each by its step, or by its position from 1 where several RUNs
            are passed.
        left_out: Names beside the checkpoints that are no checkpoint of the run.
    """

    places: Mapping[int, str]
    left_out: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Opened:
    """The checkpoints that are merged, of one model.

    Attributes:
        steps: Number of each, ascending.
        places: Path of each.
        sources: Source of each.
        kind: The program that saved all of them.
        tree: Name of the tree that is merged.
        others: Reads the leaves of the last checkpoint that are not merged.
    """

    steps: Sequence[int]
    places: Sequence[str]
    sources: Sequence[Source]
    kind: str
    tree: str
    others: Callable[[], Mapping[str, Any]]

    @property
    def is_verified(self) -> bool:
        """Whether values are compared with checksums as they are read."""
        return self.kind == OURS


def find(runs: Sequence[str], item: str | None) -> Checkpoints:
    """Finds the checkpoints of a run; several runs are one checkpoint each.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If a folder has the checkpoints of several runs.
    """
    if len(runs) > 1:
        return Checkpoints(dict(enumerate(runs, 1)), ())
    (run,) = runs
    left_out: Sequence[str] = ()
    if "://" not in run:
        path = Path(run)
        if path.is_dir():
            numbered, beside = safetensors_sources.checkpoints_in(path)
            left_out = [each.name for each in beside]
            if numbered:
                return Checkpoints(
                    {n: str(each) for n, each in numbered.items()}, left_out
                )
        if safetensors_sources.has_safetensors(path):
            return Checkpoints({0: run}, left_out)
    folders = foreign_steps.folders_of(run)
    if not folders and _kind(run) != THEIRS:
        checkpoint.describe(run, item=item)  # raises, and says what is there instead
    elif not folders:
        foreign_steps.opened(run, None)  # raises where it is no checkpoint either
    return Checkpoints(
        {n: str(path) for n, path in folders.items()} or {0: run}, left_out
    )


def opened(
    places: Mapping[int, str], tree: str | None, item: str | None, *, mixed: bool
) -> Opened:
    """Opens checkpoints, and compares their leaves.

    Args:
        places: Paths of the checkpoints, by step, ascending.
        tree: Name of the tree to read of each; None for the params.
        item: Name of the item, where a step of ours has several.
        mixed: Whether dtypes may differ.

    Raises:
        ValueError: If different programs wrote them, or they are not of one model.
    """
    kinds = [_kind(place) for place in places.values()]
    if len(set(kinds)) > 1:
        first, other = kinds[0], next(kind for kind in kinds if kind != kinds[0])
        paths = list(places.values())
        raise ValueError(
            f"{paths[0]} was saved by {first} and {paths[kinds.index(other)]} by "
            f"{other}: they are of two runs. Merge those of one."
        )
    (kind,) = set(kinds)
    sources: list[Any] = []
    others: Callable[[], Mapping[str, Any]]
    for place in places.values():
        if kind == OURS:
            sources.append(checkpoint.stored(place, tree or "params", item=item))
        elif item is not None:
            raise ValueError(
                f"{place} was saved by {kind}. Its items are the beginnings of paths: "
                f"pass --tree {item}/params, or what is in it, instead of --item."
            )
        elif kind == TENSORS:
            sources.append(safetensors.stored(place, tree))
        else:
            # All steps are read at the path that was found in the first.
            tree = (tree or sources[0].tree) if sources else tree
            sources.append(checkpoint.stored_by_others(place, tree))
    last, paths = sources[-1], list(places.values())
    if kind == OURS:
        tree_name = tree or "params"
        others = functools.partial(_others_of_ours, last, paths[-1], tree_name, item)
    else:
        tree_name = (last.tree if kind == THEIRS else tree) or "/"
        others = last.read_others
    _check_alike(paths, sources, mixed=mixed)
    return Opened(list(places), paths, sources, kind, tree_name, others)


def check_finite(result: Any, chosen: Opened) -> None:
    """Refuses a merge with values that are not finite, and names their checkpoint.

    Infinities that are alike in all checkpoints are constants, such as masks.

    Raises:
        ValueError: If the merge has such values.
    """
    paths, leaves, _ = trees.flatten(result)
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in chosen.sources[0].leaves:
            continue
        array = np.asarray(leaf).astype(trees.wide(leaf.dtype), copy=False)
        bad = ~np.isfinite(array)
        if not bad.any():
            continue
        whole = (slice(None),) * array.ndim
        originals = np.stack(
            [
                source.read(path, whole)[bad].astype(array.dtype)
                for source in chosen.sources
            ]
        )
        constant = np.all(originals == array[bad], axis=0)
        for place, values in zip(chosen.places, originals, strict=True):
            diverged = int((~np.isfinite(values) & ~constant).sum())
            if diverged:
                raise ValueError(
                    f"'{path}' of {place} has {diverged:,} of {array.size:,} elements "
                    "that are not finite. Leave this checkpoint out, and those after "
                    "it where the run diverged."
                )
        overflowed = int((~constant).sum())
        if overflowed:
            raise ValueError(
                f"'{path}' of the merge has {overflowed:,} of {array.size:,} elements "
                f"that do not fit {leaf.dtype}. Pass --dtype float32."
            )


def _kind(place: str) -> str:
    if "://" not in place and safetensors_sources.has_safetensors(Path(place)):
        return TENSORS
    root = absolute(place)
    if storage.listed(root) is None and not storage.is_file(root):
        raise FileNotFoundError(f"There is no checkpoint at {place}.")
    return OURS if items_in(root) else THEIRS


def _others_of_ours(
    source: checkpoint.StoredTree, place: str, tree: str, item: str | None
) -> Mapping[str, Any]:
    if set(source.entries) == set(source.leaves):
        return {}
    whole = checkpoint.restore(place, tree, item=item)
    paths, leaves, _ = trees.flatten(whole)
    pairs = zip(paths, leaves, strict=True)
    return {path: leaf for path, leaf in pairs if path not in source.leaves}


def _check_alike(
    places: Sequence[str], sources: Sequence[Source], *, mixed: bool
) -> None:
    """Refuses checkpoints whose leaves differ in name, shape or dtype."""
    first = sources[0].leaves
    for place, source in zip(places, sources, strict=True):
        odd = sorted(set(first) ^ set(source.leaves))
        if odd:
            owner, other = (places[0], place) if odd[0] in first else (place, places[0])
            more = f" and {len(odd) - 1:,} more" if len(odd) > 1 else ""
            raise ValueError(
                f"The checkpoints are not of one model: '{odd[0]}'{more} is only in "
                f"{owner}, not in {other}."
            )
        for path, leaf in source.leaves.items():
            if _is_same(first[path], leaf, mixed=mixed):
                continue
            advice = "The checkpoints are not of one model"
            if leaf.shape == first[path].shape and not mixed:
                advice = "Say by --dtype float32 which dtype the merge has"
            raise ValueError(
                f"'{path}' is {trees.describe(first[path])} in {places[0]} and "
                f"{trees.describe(leaf)} in {place}. {advice}."
            )


def _is_same(a: jax.ShapeDtypeStruct, b: jax.ShapeDtypeStruct, *, mixed: bool) -> bool:
    complex_ = [jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (a, b)]
    same = a.dtype == b.dtype or (mixed and complex_[0] == complex_[1])
    return a.shape == b.shape and same
