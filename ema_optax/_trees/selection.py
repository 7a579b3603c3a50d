"""Selects the leaves that are averaged: floating and complex, less those masked."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema_optax._messages.text import brief, structural

Mask: TypeAlias = Any | Callable[[Any], Any]
"""A tree of bools like the params or a prefix of it, or a function from them to one."""


def is_averaged(leaf: Any) -> bool:
    """Whether a leaf can be averaged: a floating or complex number, or an array.

    Integers, bools, PRNG keys and objects that are no arrays are not.

    >>> is_averaged(jnp.ones(2)), is_averaged(jnp.arange(2)), is_averaged(None)
    (True, False, False)
    """
    if hasattr(leaf, "dtype"):
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    return isinstance(leaf, (float, complex))


def _holds_bools(mask: object) -> bool:
    """Whether a mask is a tree of bools, though it can be called: an Equinox module."""
    leaves = jax.tree.leaves(mask)
    return any(isinstance(leaf, (bool, np.bool_)) for leaf in leaves)


def averaged_only(params: Any, mask: Mask | None) -> Any:
    """Replaces leaves that are not averaged by placeholders.

    Args:
        params: Any tree.
        mask: A tree of bools like the params (or a prefix of it), or a function from
            params to one: True where a leaf is averaged.

    Raises:
        ValueError: If the mask does not fit, or holds anything but bools.

    >>> averaged_only({"w": 1.0, "b": 2.0, "n": 3}, {"w": True, "b": False, "n": True})
    {'b': MaskedNode(), 'n': MaskedNode(), 'w': 1.0}
    """

    def choose(averaged: object, part: object) -> Any:
        if not isinstance(averaged, (bool, np.bool_)):
            raise ValueError(
                "mask must hold bools, True where a leaf is averaged, got "
                f"{brief(averaged)}."
            )
        return jax.tree.map(
            lambda p: p if averaged and is_averaged(p) else optax.MaskedNode(),
            part,
        )

    if not jax.tree.leaves(params):
        # optax.tree.map_params initialises a leafless stand-in for params, which no
        # mask fits; there is nothing to choose either.
        return params
    tree = True if mask is None else mask
    if callable(mask) and not _holds_bools(mask):
        tree = mask(params)
    try:
        structure = jax.tree.structure(tree)
        parts = structure.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"mask does not fit the params: {structural(error)} Give a tree of "
            "bools like the params (or a prefix), or a function from params to one."
        ) from None
    chosen = [choose(m, p) for m, p in zip(jax.tree.leaves(tree), parts, strict=True)]
    return jax.tree.unflatten(structure, chosen)
