"""What one step stores: params, shadows and the rest of the state, and its manifest.

Built once for each save, before anything is written, and passed on.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore
from jax.typing import ArrayLike, DTypeLike

from ema_optax._averages import averages
from ema_optax._checkpoint import checksums
from ema_optax._checkpoint.entries import AverageEntry, LeafEntry, Structure, TreeEntry
from ema_optax._checkpoint.manifest import (
    FORMAT,
    PARAMS,
    STATE,
    WITHOUT_BLOCKS,
    Manifest,
)
from ema_optax._checkpoint.shadows import Part, entries, joined, parts_of
from ema_optax._checkpoint.untrusted import DEPTH, is_deep, misplaced
from ema_optax._messages import arguments
from ema_optax._trees import mistaken, trees
from ema_optax._version import __version__

SNAPSHOT_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Step:
    """The trees of a step and their manifest. Holds views and copies no array.

    Attributes:
        trees: `params`, `shadow` or `shadow/NAME`, and `state`: the optimizer state
            with None for each shadow. As Orbax stores them. Of a snapshot only shadows;
            of a single average its params, and a shadow without leaves of its own.
        leaves: Tree → path → leaf.
        manifest: What the step says of itself.
    """

    trees: Mapping[str, optax.Params]
    leaves: Mapping[str, Mapping[str, ArrayLike]]
    manifest: Manifest


def of_run(
    params: optax.Params,
    opt_state: optax.OptState,
    extra: object,
    averaged: str | Mapping[str, str] | None,
) -> Step:
    """Returns a step of params, shadows and state. Computes what is read so.

    Raises:
        ValueError: If the state holds no shadow, if it cannot be told of which part of
            the params it is, or if names would collide on disk.
        TypeError: If a leaf cannot be stored, or `extra` is not JSON.
    """
    call = "EmaSave(params, opt_state)"
    mistaken.check_no_nnx(params, "params", call)
    found = averages.find(opt_state, call=call, params=params)
    if not found:
        raise ValueError(
            f"{found.none()} Without an average, save with "
            "orbax.checkpoint.args.StandardSave."
        )
    try:
        parts = parts_of(found, params, averaged)
    except ValueError:
        _leaves_by_path(PARAMS, params)  # what cannot be stored at all is said first
        raise
    everything = {PARAMS: params, **joined(parts), STATE: found.rest()}
    return of_trees(everything, entries(parts), extra)


def of_shadows(
    opt_state: optax.OptState, dtype: DTypeLike | None, extra: object
) -> Step:
    """Returns a step of the shadows alone, in a dtype of at most their own width.

    Raises:
        ValueError: If there is no shadow, or `dtype` is no floating one.
        TypeError: If `extra` is not JSON.
    """
    found = averages.find(opt_state, call="SnapshotSave(opt_state)")
    stored = [average for average in found if not average.is_computed]
    if not stored:
        raise ValueError(
            "There is no shadow in this optimizer state to save. Chain one last: "
            "optax.chain(optimizer, ema_optax.ema_params({'a': ema_optax.power(0.05), "
            "'b': ema_optax.power(0.1)}))."
        )
    parts = [Part(average, "", average.tree) for average in stored]
    shadows = joined(parts)
    if dtype is not None:
        kind = arguments.dtype(dtype, "dtype")
        if kind.name not in SNAPSHOT_DTYPES:
            raise ValueError(
                f"A snapshot's dtype is one of {', '.join(SNAPSHOT_DTYPES)}, or None "
                f"for that of the shadow; got {kind.name}."
            )
        shadows = _narrowed(shadows, kind)
    return of_trees(shadows, entries(parts), extra)


def of_trees(
    everything: Mapping[str, Any], described: Mapping[str, AverageEntry], extra: object
) -> Step:
    """Returns trees by name as a step of ours.

    Args:
        everything: The trees; those without leaves are not stored, but for the params.
        described: What is known of each average. These trees are in the manifest even
            where they have no leaves of their own.
        extra: Anything that is JSON.

    Raises:
        ValueError: If names would collide on disk.
        TypeError: If a leaf cannot be stored, or `extra` is not JSON.
    """
    stored: dict[str, Any] = {}
    leaves: dict[str, dict[str, Any]] = {}
    for name, tree in everything.items():
        by_path = _leaves_by_path(name, tree)
        if by_path or name == PARAMS:
            stored[name] = jax.tree.map(_storable_or_none, tree)
            leaves[name] = by_path
    for name in described:
        leaves.setdefault(name, {})
    entries = {
        name: TreeEntry(
            structure=structure_of(stored.get(name, {})),
            leaves={path: _entry(leaf) for path, leaf in by_path.items()},
            average=described.get(name),
        )
        for name, by_path in leaves.items()
    }
    in_blocks = any(
        checksums.is_cut(leaf) for each in leaves.values() for leaf in each.values()
    )
    manifest = Manifest(
        format=FORMAT if in_blocks else WITHOUT_BLOCKS,
        version=__version__,
        processes=jax.process_count(),
        trees=entries,
        extra=_json(extra),
    )
    return Step(stored, leaves, manifest)


def is_empty(leaf: Any) -> bool:
    """Returns whether a leaf has no elements: Orbax refuses it, nothing is lost."""
    return 0 in np.shape(leaf)


def is_key(leaf: object) -> bool:
    """Returns whether a leaf is an array of PRNG keys, concrete or abstract."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _leaves_by_path(name: str, tree: object) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    files: dict[str, str] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = trees.path_name(key_path)
        # Orbax joins keys by dots, and would store two such leaves as one.
        file = jax.tree_util.keystr(key_path, simple=True, separator=".")
        if path in leaves or file in files:
            raise ValueError(
                f"Two leaves of the {name} have one name on disk: '{path}' and "
                f"'{files.get(file, path)}'. Rename one of them."
            )
        wrong = misplaced(path)
        if wrong:
            raise ValueError(
                f"Cannot save {path[:100]!r} of the {name}: it {wrong}. Rename its "
                "keys."
            )
        if not is_empty(leaf):
            leaves[path], files[file] = _storable(leaf, f"'{path}' of the {name}"), path
    return leaves


def _storable(leaf: object, what: str) -> Any:
    if isinstance(leaf, (np.generic, complex)):
        leaf = np.asarray(leaf)  # Orbax would lose the dtype
    if _is_local(leaf):
        leaf = np.asarray(leaf)  # such as the count that optimizer.init makes
    if isinstance(leaf, (jax.Array, np.ndarray)):
        if not is_key(leaf) and not _has_dtype(str(leaf.dtype)):
            raise TypeError(
                f"Cannot save {what}: it is of {leaf.dtype}, which TensorStore, where "
                "Orbax stores arrays, does not have. Save it as another dtype: "
                "leaf.astype('float32') or jax.lax.bitcast_convert_type(leaf, 'uint8')."
            )
        return leaf
    if isinstance(leaf, (bool, int, float)):
        return leaf
    raise TypeError(
        f"Cannot save {what}: it is a {type(leaf).__name__}. Keep only arrays and "
        "numbers in params, as equinox.partition(model, equinox.is_array) does."
    )


@functools.cache
def _has_dtype(name: str) -> bool:
    try:
        return tensorstore.dtype(name).numpy_dtype.name == jnp.dtype(name).name
    except (TypeError, ValueError):
        return False


def _is_local(leaf: Any) -> bool:
    """Returns whether an array is on one of several processes alone.

    Each has its own, and should have the same: Orbax would refuse it.
    """
    several = isinstance(leaf, jax.Array) and jax.process_count() > 1
    return several and leaf.is_fully_addressable and not is_key(leaf)


def _storable_or_none(leaf: object) -> Any:
    return None if is_empty(leaf) else _storable(leaf, "a leaf")


def _narrowed(tree: Any, dtype: np.dtype) -> Any:
    """Returns a tree whose wider floating leaves are rounded to `dtype`."""

    def cast(leaf: Any) -> Any:
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        wider = real and jnp.finfo(leaf.dtype).bits > jnp.finfo(dtype).bits
        return leaf.astype(dtype) if wider else leaf

    return jax.tree.map(cast, tree)


def _json(extra: object) -> Any:
    """Returns `extra` as it will be read, where keys are strings and tuples lists."""
    try:
        written = json.loads(json.dumps(extra))
        if is_deep(written):
            raise ValueError(f"it is nested more than {DEPTH} deep")
        return written
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"extra must be JSON, to be written into the manifest: {error}. Arrays "
            "belong into params, or pass array.tolist()."
        ) from error


def _entry(leaf: Any) -> LeafEntry:
    if is_key(leaf):
        impl = str(jax.random.key_impl(leaf))
        return LeafEntry(tuple(leaf.shape), "uint32", impl)
    if isinstance(leaf, (bool, int, float)):
        return LeafEntry((), str(np.asarray(leaf).dtype), kind=type(leaf).__name__)
    kind = "jax" if isinstance(leaf, jax.Array) else "numpy"
    return LeafEntry(tuple(leaf.shape), str(leaf.dtype), kind=kind)


def structure_of(tree: object) -> Structure:
    """Returns a tree as Orbax nests it, in JSON: dicts, lists, and paths as leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [trees.path_name(path) for path, _ in pairs]
    named = jax.tree.unflatten(treedef, paths)

    def nested(node: object) -> Any:
        if isinstance(node, Mapping):
            return {str(key): nested(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)) and not hasattr(node, "_fields"):
            return [nested(value) for value in node]
        return node if isinstance(node, str) else None

    if isinstance(named, str):
        return named
    return nested(ocp.tree.serialize_tree(named, keep_empty_nodes=True))
