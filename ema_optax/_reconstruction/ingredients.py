"""The trees that averages are made of: of snapshots, or of the checkpoints of a run."""

import dataclasses
import importlib
import os
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema_optax._messages.text import some
from ema_optax._reconstruction.merging import merge
from ema_optax._reconstruction.slots import Slots
from ema_optax._reconstruction.sums import InMemory, Source
from ema_optax._reconstruction.widths import Snapshot
from ema_optax._trees import selection, trees


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """Trees that are summed, and what a sum is like.

    Attributes:
        steps: Of the trees, in order.
        exponents: Of snapshots; None of checkpoints.
        trees: Trees of arrays, or sources.
        like: What a sum is like; None as in `merge`.
        origin: Where they come from, for people.
    """

    steps: tuple[float, ...]
    exponents: tuple[float, ...] | None
    trees: Sequence[Any] = dataclasses.field(repr=False)
    like: optax.Params | None = dataclasses.field(repr=False)
    origin: Mapping[str, str]

    def check(self) -> None:
        """Refuses trees that do not fit each other, or the params, as `ValueError`."""
        sources = [_source(tree) for tree in self.trees]
        first = _shapes(sources[0])
        for step, source in zip(self.steps, sources, strict=True):
            names = f"tree of step {self.steps[0]:g}", f"tree of step {step:g}"
            apart = trees.difference(first, _shapes(source), names)
            if apart:
                raise ValueError(
                    f"These are not of one model: {apart}. Leave the steps of another "
                    "run out, or move them to a folder of their own."
                )
        Slots(self.trees, self.like, None)

    def summed(self, weights: np.ndarray) -> list[Any]:
        """Returns a tree for each row of weights, in one pass over those that count.

        Args:
            weights: float64[results, trees].
        """
        used = np.flatnonzero(np.any(weights != 0, axis=0))
        given = [self.trees[i] for i in used.tolist()]
        # 0·inf is NaN: a tree that one of the sums leaves out may have diverged.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
            found = merge(given, weights[:, used], params=self.like)
        for row, result in enumerate(found):
            alone = weights[row : row + 1]
            if len(found) > 1 and np.any(alone[:, used] == 0) and not _finite(result):
                found[row] = self.summed(alone)[0]
        return found

    def fingerprint(self) -> str:
        """Returns what tells these trees, and their contents, from others."""
        import xxhash  # with the first digest, and not with ema_optax

        digest = xxhash.xxh3_128(repr((self.steps, self.exponents)).encode())
        for tree in self.trees:
            digest.update(_source(tree).fingerprint())
        return digest.hexdigest()


def of_snapshots(
    snapshots: Sequence[Snapshot],
    like: optax.Params | None,
    origin: Mapping[str, str] | None = None,
) -> Ingredients:
    """Returns snapshots as ingredients, in the order of their steps."""
    ordered = sorted(snapshots, key=lambda s: (s.step, s.exponent))
    return Ingredients(
        steps=tuple(s.step for s in ordered),
        exponents=tuple(s.exponent for s in ordered),
        trees=[s.tree for s in ordered],
        like=like,
        origin=dict(origin or {}),
    )


def snapshots_of(
    run: str, item: str | None, params: optax.Params | None
) -> tuple[list[Snapshot], Ingredients]:
    """Returns the snapshots in the steps of a run, plain and as ingredients."""
    found: list[Snapshot] = _checkpoint().snapshots(run, item=item)
    if params is None:
        params = _like_snapshots(run, item, found)
    origin = {"run": _name(run), "tree": "snapshots"}
    return found, of_snapshots(found, params, origin)


def checkpoints_of(
    run: str, tree: str, item: str | None, params: optax.Params | None
) -> Ingredients:
    """Returns a tree of each step of a run as ingredients.

    Raises:
        ValueError: If a step has no such tree.
    """
    checkpoint = _checkpoint()
    steps = sorted(checkpoint.describe(run, item=item).steps)
    found = [checkpoint.stored(run, tree, step=step, item=item) for step in steps]
    if params is None:
        # A sum has the dtypes of the newest step, and its leaves that are not averaged.
        params = _abstract(found[-1].leaves)
        if set(found[-1].entries) != set(found[-1].leaves):
            whole = checkpoint.restore(run, tree, step=steps[-1], item=item)
            params = _over(whole, found[-1].leaves)
    origin = {"run": _name(run), "tree": tree}
    return Ingredients(tuple(steps), None, found, params, origin)


def save(out: str, tree: Any, **settings: Any) -> None:
    """Writes an average as a checkpoint, as `checkpoint.save_average` does."""
    _checkpoint().save_average(out, tree, **settings)


def check_free(out: str, step: int) -> None:
    """Refuses a folder that has such a step already, or steps of a run.

    Raises:
        FileExistsError: If it has, or is a file.
    """
    if os.path.isfile(out):
        raise FileExistsError(f"out={out!r} is a file. Pass a folder of its own.")
    try:
        steps = _checkpoint().describe(out).steps
    except FileNotFoundError:
        return
    raise FileExistsError(
        f"out={out!r} holds steps already: {some(map(str, steps))}. Pass a folder of "
        f"its own, for step {step}."
    )


def _checkpoint() -> types.ModuleType:
    """Returns the room that reads runs; by its name, as it imports this one."""
    return importlib.import_module("ema_optax.checkpoint")


def _like_snapshots(
    run: str, item: str | None, snapshots: Sequence[Snapshot]
) -> optax.Params:
    """Returns what an average is like: the whole model where params of its step are."""
    checkpoint = _checkpoint()
    averaged = snapshots[-1].tree.leaves
    for step in sorted(checkpoint.describe(run, item=item).steps, reverse=True):
        held = checkpoint.describe(run, step=step, item=item).trees
        if "params" not in held or not any(
            _folded(tree) == snapshots[-1].step for tree in held.values()
        ):
            continue
        params = checkpoint.stored(run, "params", step=step, item=item)
        like = {p: leaf for p, leaf in params.leaves.items() if p in averaged}
        if set(params.entries) == set(like):
            return _abstract(like)
        return _over(checkpoint.restore(run, "params", step=step, item=item), like)
    return _abstract(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, trees.wide(leaf.dtype))
            for path, leaf in averaged.items()
        }
    )


def _folded(tree: Any) -> int | None:
    """Returns the updates that a shadow had seen at its last fold."""
    if not isinstance(tree.count, int):
        return None
    return tree.count - tree.count % (tree.every or 1)


def _abstract(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    return trees.nested(
        {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in leaves.items()}
    )


def _over(whole: Any, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Returns a tree as nested dicts, with some of its leaves abstract."""
    paths, values, _ = trees.flatten(whole)
    return trees.nested({**dict(zip(paths, values, strict=True)), **leaves})


def _source(tree: Any) -> Source:
    return tree if isinstance(tree, Source) else InMemory(tree)


def _shapes(source: Source) -> dict[str, Any]:
    """Returns the leaves by path, which two trees of one model have in common."""
    return dict(sorted(source.leaves.items()))


def _finite(tree: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if selection.is_averaged(leaf)]
    return all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)


def _name(run: str) -> str:
    return run.rstrip("/").rpartition("/")[2]
