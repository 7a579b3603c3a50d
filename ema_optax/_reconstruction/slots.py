"""Puts the leaves of a sum of trees into the structure of params, or of the trees."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from ema_optax._messages import arguments
from ema_optax._placement.leaf_placement import default_sharding, is_bound
from ema_optax._reconstruction.sums import InMemory, Source, Target
from ema_optax._trees import selection, trees

_Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct


class Slots:
    """Trees to be summed, as sources that fit each other, and the result's structure.

    Args:
        given: Trees of arrays, or sources.
        params: What the result should be like. None is like the last of the trees, in
            float32 or wider.
        dtype: Of the result's averaged leaves, or None for that of the params.

    Attributes:
        sources: The trees.
        targets: Dtype and sharding of each averaged leaf of the result, by path.

    Raises:
        ValueError: If the trees, or the params, do not fit each other.
    """

    def __init__(
        self, given: Sequence[Any], params: optax.Params | None, dtype: DTypeLike | None
    ) -> None:
        self.sources = [t if isinstance(t, Source) else InMemory(t) for t in given]
        stored = self.sources[0].leaves
        for number, source in enumerate(self.sources):
            _check_same(stored, source.leaves, number)
        if dtype is not None:
            dtype = arguments.dtype(dtype, "dtype")
        self._like = params
        dtypes: dict[str, Any] = {}
        if params is None:
            dtypes = {path: trees.wide(leaf.dtype) for path, leaf in stored.items()}
            if not isinstance(given[-1], Source):
                self._like = given[-1]
        self.targets: dict[str, Target] = {}
        slots = self._slots() if self._like is not None else dict(stored)
        for path, slot in slots.items():
            if path not in stored:
                continue
            if _kind(slot) != _kind(stored[path]):
                raise ValueError(
                    f"'{path}' is {trees.describe(slot)} in the params and "
                    f"{trees.describe(stored[path])} in the trees that are summed."
                )
            kind = dtypes.get(path, slot.dtype)
            if dtype is not None:
                kind = _in_kind_of(kind, dtype)
            sharding = getattr(slot, "sharding", None) if is_bound(slot) else None
            sharding = sharding or default_sharding()
            self.targets[path] = Target(jnp.dtype(kind), sharding)
        missing = [path for path in stored if path not in self.targets]
        if missing:
            raise ValueError(
                f"The params have no leaf '{missing[0]}', which was averaged. Pass "
                "params of the same model."
            )

    def filled(self, sums: Sequence[Mapping[str, jax.Array]]) -> list[Any]:
        """Builds trees of the sums; leaves that are not averaged are the params'."""
        if self._like is None:
            return [trees.nested(leaves) for leaves in sums]
        paths, slots, structure = trees.flatten(self._like)
        pairs = list(zip(paths, slots, strict=True))
        return [
            structure.unflatten(
                [leaves[p] if p in leaves else _own(p, slot) for p, slot in pairs]
            )
            for leaves in sums
        ]

    def _slots(self) -> dict[str, _Leaf]:
        paths, leaves, _ = trees.flatten(self._like)
        return {
            path: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
            for path, leaf in zip(paths, leaves, strict=True)
            if selection.is_averaged(leaf)
        }


def _check_same(
    first: Mapping[str, _Leaf], other: Mapping[str, _Leaf], number: int
) -> None:
    odd = sorted(set(first) ^ set(other))
    misfits = [p for p in first if not odd and _kind(first[p]) != _kind(other[p])]
    if odd:
        which = "lacks" if odd[0] in first else "also has"
        raise ValueError(
            f"The trees are not of one model: number {number} {which} '{odd[0]}'."
        )
    if misfits:
        path = misfits[0]
        raise ValueError(
            f"The trees are not of one model: '{path}' is "
            f"{trees.describe(first[path])} in the first and "
            f"{trees.describe(other[path])} in number {number}."
        )


def _kind(leaf: _Leaf) -> tuple[tuple[int, ...], bool]:
    """Returns the shape, and whether numbers are complex: sums need both alike."""
    return tuple(leaf.shape), jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _own(path: str, slot: object) -> object:
    if isinstance(slot, jax.ShapeDtypeStruct):
        if 0 in slot.shape:
            return jnp.zeros(slot.shape, slot.dtype)
        raise ValueError(
            f"'{path}' was not averaged, and the params are abstract there. Pass "
            "params that hold it."
        )
    return jnp.copy(slot) if isinstance(slot, jax.Array) else slot


def _in_kind_of(kind: DTypeLike, dtype: DTypeLike) -> DTypeLike:
    """Returns a floating dtype, or its complex counterpart for a complex leaf."""
    if jnp.issubdtype(kind, jnp.complexfloating):
        return "complex128" if jnp.finfo(dtype).bits == 64 else "complex64"
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating one, got {jnp.dtype(dtype)}.")
    return dtype
