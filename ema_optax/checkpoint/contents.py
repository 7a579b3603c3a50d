"""What a step holds: params, shadows and the rest of the state, as trees by name."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ema_optax import shadows, trees
from ema_optax.checkpoint import computed
from ema_optax.checkpoint.manifest import FORMAT, LIBRARY
from ema_optax.checkpoint.wellformed import DEPTH, is_deep, misplaced
from ema_optax.decay import Decay
from ema_optax.states import (
    EmaParamsState,
    NamedShadowsState,
    bema_record_of,
    record_of,
)

PARAMS, SHADOW, STATE = "params", "shadow", "state"
SNAPSHOT_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Contents:
    """The trees of a step and what the manifest says of them.

    Attributes:
        trees: `params`, `shadow` or `shadow/NAME`, and `state`: the optimizer state
            with None for each shadow. As Orbax stores them. Of a snapshot only shadows;
            of a single average its params, and a shadow without leaves of its own.
        leaves: Tree → path → leaf.
        manifest: JSON-able.
    """

    trees: Mapping[str, Any]
    leaves: Mapping[str, Mapping[str, Any]]
    manifest: Mapping[str, Any]


def contents(params: Any, opt_state: Any, extra: Any, version: str) -> Contents:
    """Returns what to store. Copies no array; computes the shadow of `bema_params`.

    Raises:
        ValueError: If the state holds no shadow, or names would collide on disk.
        TypeError: If a leaf cannot be stored, or `extra` is not JSON.
    """
    averages, rest = split(opt_state, computed.computed_shadows(opt_state, params))
    if not averages:
        raise ValueError(
            "There is no shadow in this optimizer state to save. Chain the average "
            "last: optax.chain(optimizer, ema_optax.ema_params(0.9999)). Without an "
            "average, save with orbax.checkpoint.args.PyTreeSave."
        )
    everything = {PARAMS: params, **averages, STATE: rest}
    described = {**averages_of(opt_state)}
    for state in shadows.bema_states(opt_state).values():
        here = _average(None, bema_record_of(state).every, state.count)
        here["bema"] = computed.arguments(opt_state)
        described[SHADOW] = {**here, **described.get(SHADOW, {})}
    return assembled(everything, described, extra, version)


def snapshot(opt_state: Any, dtype: Any, extra: Any, version: str) -> Contents:
    """Returns the shadows alone, in a dtype of at most their own width.

    Raises:
        ValueError: If there is no shadow, or `dtype` is no floating one.
        TypeError: If `extra` is not JSON.
    """
    averages, _ = split(opt_state)
    if not averages:
        raise ValueError(
            "There is no shadow in this optimizer state to save. Chain one last: "
            "optax.chain(optimizer, ema_optax.ema_params({'a': ema_optax.power(0.05), "
            "'b': ema_optax.power(0.1)}))."
        )
    if dtype is not None:
        if jnp.dtype(dtype).name not in SNAPSHOT_DTYPES:
            raise ValueError(
                f"A snapshot's dtype is one of {', '.join(SNAPSHOT_DTYPES)}, or None "
                f"for that of the shadow; got {jnp.dtype(dtype).name}."
            )
        averages = _narrowed(averages, jnp.dtype(dtype))
    return assembled(averages, averages_of(opt_state), extra, version)


def assembled(
    everything: Mapping[str, Any],
    averages: Mapping[str, Any],
    extra: Any,
    version: str,
) -> Contents:
    """Returns trees by name as a step of ours.

    Args:
        everything: The trees; those without leaves are not stored, but for the params.
        averages: Tree → decay, every and count of it, as `averages_of` gives. These
            trees are in the manifest even where they have no leaves of their own.
        extra: Anything that is JSON.
        version: Of this library.

    Raises:
        ValueError: If names would collide on disk.
        TypeError: If a leaf cannot be stored, or `extra` is not JSON.
    """
    stored: dict[str, Any] = {}
    leaves: dict[str, dict[str, Any]] = {}
    for name, tree in everything.items():
        found = _leaves_by_path(name, tree)
        if found or name == PARAMS:
            stored[name], leaves[name] = jax.tree.map(_storable_or_none, tree), found
    for name in averages:
        leaves.setdefault(name, {})
    manifest = {
        "format": FORMAT,
        "library": LIBRARY,
        "version": version,
        "processes": jax.process_count(),
        "extra": _json(extra),
        "averages": averages,
        "trees": {
            name: {
                "structure": _structure(stored.get(name, {})),
                "leaves": {path: _describe(x) for path, x in found.items()},
            }
            for name, found in leaves.items()
        },
    }
    return Contents(stored, leaves, manifest)


def split(
    opt_state: Any, beside: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Any]:
    """Returns the shadows by the names of their trees, and the state without them.

    Args:
        opt_state: The optimizer state.
        beside: Shadows without a name that are in no state, by their place.
    """
    found: dict[str, dict[str, Any]] = {}
    for path, state in shadows.ema_states(opt_state).items():
        for name, tree in shadow_trees(state).items():
            found.setdefault(name, {})[path] = tree
    if beside:
        found.setdefault(SHADOW, {}).update(beside)
    averages = {name: shadows.joined(parts) for name, parts in found.items()}

    def without(node: Any) -> Any:
        return node._replace(shadow=None) if shadows.is_ema_state(node) else node

    return averages, jax.tree.map(without, opt_state, is_leaf=shadows.is_ema_state)


def shadow_trees(state: EmaParamsState) -> dict[str, Any]:
    """Returns the shadows of one state by the names of their trees."""
    held = state.shadow
    if isinstance(state, NamedShadowsState):
        return {tree_of(name): tree for name, tree in held.items()}
    return {SHADOW: held}


def tree_of(name: str) -> str:
    """Returns the tree that the shadow of a name is stored as; of none, of `""`."""
    return f"{SHADOW}/{name}" if name else SHADOW


def is_empty(leaf: Any) -> bool:
    """Returns whether a leaf has no elements: Orbax refuses it, nothing is lost."""
    return 0 in np.shape(leaf)


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of PRNG keys, concrete or abstract."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _leaves_by_path(name: str, tree: Any) -> dict[str, Any]:
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


def _storable(leaf: Any, what: str) -> Any:
    if isinstance(leaf, (np.generic, complex)):
        return np.asarray(leaf)  # Orbax would lose the dtype
    if _is_local(leaf):
        return np.asarray(leaf)  # such as the count that optimizer.init makes
    if isinstance(leaf, (jax.Array, np.ndarray, bool, int, float)):
        return leaf
    raise TypeError(
        f"Cannot save {what}: it is a {type(leaf).__name__}. Keep only arrays and "
        "numbers in params, as equinox.partition(model, equinox.is_array) does."
    )


def _is_local(leaf: Any) -> bool:
    """Returns whether an array is on one of several processes alone.

    Each has its own, and should have the same: Orbax would refuse it.
    """
    several = isinstance(leaf, jax.Array) and jax.process_count() > 1
    return several and leaf.is_fully_addressable and not is_key(leaf)


def _storable_or_none(leaf: Any) -> Any:
    return None if is_empty(leaf) else _storable(leaf, "a leaf")


def _narrowed(tree: Any, dtype: np.dtype) -> Any:
    """Returns a tree whose wider floating leaves are rounded to `dtype`."""

    def cast(leaf: Any) -> Any:
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        wider = real and jnp.finfo(leaf.dtype).bits > jnp.finfo(dtype).bits
        return leaf.astype(dtype) if wider else leaf

    return jax.tree.map(cast, tree)


def _json(extra: Any) -> Any:
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


def averages_of(opt_state: Any) -> dict[str, Any]:
    """Returns decay, every and count of each shadow's tree.

    Decay and every are None where they are unknown, and where groups of params that
    are joined in one tree have different ones.
    """
    found: dict[str, Any] = {}
    for state in shadows.ema_states(opt_state).values():
        record = record_of(state)
        for name in shadows.names_of(state):
            tree = tree_of(name)
            decay = record.decays.get(name) if record else None
            every = record.every if record else None
            here = _average(decay, every, state.count)
            alike = found.setdefault(tree, here) == here
            found[tree] = here if alike else _average(None, None, state.count)
    return found


def _average(decay: Decay | None, every: int | None, count: Any) -> dict[str, Any]:
    if isinstance(count, jax.Array) and not count.is_fully_addressable:
        count = count.addressable_shards[0].data
    return {
        "decay": json.loads(decay.to_json()) if decay else None,
        "every": every,
        "count": np.asarray(count).tolist(),
    }


def _describe(leaf: Any) -> dict[str, Any]:
    """Returns shape, dtype and kind of a leaf, in JSON."""
    if is_key(leaf):
        impl = str(jax.random.key_impl(leaf))
        return {"shape": list(leaf.shape), "dtype": "uint32", "kind": f"key:{impl}"}
    if isinstance(leaf, (bool, int, float)):
        dtype = str(np.asarray(leaf).dtype)
        return {"shape": [], "dtype": dtype, "kind": type(leaf).__name__}
    kind = "jax" if isinstance(leaf, jax.Array) else "numpy"
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "kind": kind}


def _structure(tree: Any) -> Any:
    """Returns a tree as Orbax nests it, in JSON: dicts, lists, and paths as leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [trees.path_name(path) for path, _ in pairs]
    named = jax.tree.unflatten(treedef, paths)

    def nested(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {str(key): nested(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)) and not hasattr(node, "_fields"):
            return [nested(value) for value in node]
        return node if isinstance(node, str) else None

    if isinstance(named, str):
        return named
    return nested(ocp.tree.serialize_tree(named, keep_empty_nodes=True))
