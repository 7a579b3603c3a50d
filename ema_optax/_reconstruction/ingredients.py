"""Trees that an average is merged from: snapshots, or the checkpoints of a run."""

import dataclasses
import importlib
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ema_optax._messages.text import some
from ema_optax._reconstruction.merging import merge
from ema_optax._reconstruction.slots import Slots
from ema_optax._reconstruction.sums import InMemory, Source
from ema_optax._reconstruction.widths import Snapshot
from ema_optax._trees import trees


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """Trees to merge, and the structure of the result.

    Attributes:
        steps: The step of each tree, in order.
        exponents: The exponent γ of each snapshot; None for checkpoints.
        trees: Trees of arrays, or sources.
        like: Params that give the result its structure; None as in `merge`.
        origin: Where the trees come from, for people to read.
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
            difference = trees.difference(first, _shapes(source), names)
            if difference:
                raise ValueError(
                    f"These are not of one model: {difference}. Leave the steps of "
                    "another run out, or move them to a folder of their own."
                )
        Slots(self.trees, self.like, None)

    def summed(self, weights: np.ndarray) -> list[Any]:
        """Merges the trees once for each row of weights, in one pass over them.

        Args:
            weights: float64[results, trees].
        """
        return merge(self.trees, weights, params=self.like)

    def fingerprint(self) -> str:
        """Computes a digest of the steps, exponents and contents of the trees."""
        import xxhash  # loaded with the first digest, not with ema_optax

        digest = xxhash.xxh3_128(repr((self.steps, self.exponents)).encode())
        for tree in self.trees:
            digest.update(_source(tree).fingerprint())
        return digest.hexdigest()


def of_snapshots(
    snapshots: Sequence[Snapshot],
    like: optax.Params | None,
    origin: Mapping[str, str] | None = None,
) -> Ingredients:
    """Wraps snapshots as ingredients, in the order of their steps."""
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
    """Opens the snapshots of a run, as a list and as ingredients."""
    snapshots: list[Snapshot] = _checkpoint().snapshots(run, item=item)
    if params is None:
        params = _like_snapshots(run, item, snapshots)
    origin = {"run": _name(run), "tree": "snapshots"}
    return snapshots, of_snapshots(snapshots, params, origin)


def checkpoints_of(
    run: str, tree: str, item: str | None, params: optax.Params | None
) -> Ingredients:
    """Opens one tree of each step of a run, as ingredients.

    Raises:
        ValueError: If a step has no such tree.
    """
    checkpoint = _checkpoint()
    steps = sorted(checkpoint.describe(run, item=item).steps)
    sources = [checkpoint.stored(run, tree, step=step, item=item) for step in steps]
    if params is None:
        # A sum has the dtypes of the newest step, and its leaves that are not averaged.
        newest = sources[-1]
        params = _abstract(newest.leaves)
        if set(newest.entries) != set(newest.leaves):
            model = checkpoint.restore(run, tree, step=steps[-1], item=item)
            params = _over(model, newest.leaves)
    origin = {"run": _name(run), "tree": tree}
    return Ingredients(tuple(steps), None, sources, params, origin)


def save(out: str, tree: Any, **settings: Any) -> None:
    """Saves an average as a checkpoint with `checkpoint.save_average`."""
    _checkpoint().save_average(out, tree, **settings)


def check_free(out: str, step: int) -> None:
    """Refuses a folder for the result that holds steps already.

    Raises:
        FileExistsError: If it holds steps, or is a file.
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
    """Imports the room that reads runs, by name: it imports this one."""
    return importlib.import_module("ema_optax.checkpoint")


def _like_snapshots(
    run: str, item: str | None, snapshots: Sequence[Snapshot]
) -> optax.Params:
    """Builds the structure of an average: that of the model, where its step has params.

    Without such a step the averaged leaves alone, in float32 or wider.
    """
    checkpoint = _checkpoint()
    averaged = snapshots[-1].tree.leaves
    for step in sorted(checkpoint.describe(run, item=item).steps, reverse=True):
        stored = checkpoint.describe(run, step=step, item=item).trees
        if "params" not in stored or not any(
            _last_fold(tree) == snapshots[-1].step for tree in stored.values()
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


def _last_fold(tree: Any) -> int | None:
    """Returns the number of the update at which a shadow last folded."""
    if not isinstance(tree.count, int):
        return None
    return tree.count - tree.count % (tree.every or 1)


def _abstract(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    return trees.nested(
        {p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for p, leaf in leaves.items()}
    )


def _over(model: Any, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Returns a model as nested dicts, with abstract leaves in the place of some."""
    paths, values, _ = trees.flatten(model)
    return trees.nested({**dict(zip(paths, values, strict=True)), **leaves})


def _source(tree: Any) -> Source:
    return tree if isinstance(tree, Source) else InMemory(tree)


def _shapes(source: Source) -> dict[str, Any]:
    """Returns the leaves of a source by path, sorted: equal for trees of one model."""
    return dict(sorted(source.leaves.items()))


def _name(run: str) -> str:
    return run.rstrip("/").rpartition("/")[2]
