"""Restoring: a chosen tree in the model's slot, or a whole run to go on with."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ema_optax import shadows, trees
from ema_optax.checkpoint import computed
from ema_optax.checkpoint.contents import (
    PARAMS,
    SHADOW,
    STATE,
    is_empty,
    is_key,
    shadow_trees,
    split,
    tree_of,
)
from ema_optax.checkpoint.reading import Place, read, read_manifest, stored_leaf
from ema_optax.decay import Decay
from ema_optax.states import record_of


def restore_tree(
    item: epath.Path,
    tree: str,
    like: Any,
    rename: Mapping[str, str] | None,
    *,
    verify: bool,
) -> Any:
    """Returns one tree of an item in the slots of `like`, or as a nested dict.

    Leaves that are not averaged come from the params. See `directory.restore`.
    """
    described = read_manifest(item)
    sources = sources_of(described, tree)
    if like is None:
        if rename:
            raise ValueError(
                "rename maps the slots of `like` to stored paths: pass like=…, for "
                "example jax.eval_shape(model.init, …)."
            )
        wanted = {place: _default_sharding() for place in sources.values()}
        found = read(item, described, _readable(described, wanted), verify=verify)
        return trees.nested({path: found[place] for path, place in sources.items()})
    pairs, structure = jax.tree_util.tree_flatten_with_path(like)
    slots = {trees.path_name(path): target for path, target in pairs}
    places = _places(slots, sources, rename or {}, tree)
    wanted = {}
    for slot, place in places.items():
        _check_fits(stored_leaf(described, place), slots[slot], slot, exact=False)
        wanted.setdefault(place, _sharding(slots[slot]))
    found = read(item, described, _readable(described, wanted), verify=verify)
    leaves = [
        _fill(found[places[slot]], target)
        if slot in places
        else _without_elements(target)
        for slot, target in slots.items()
    ]
    return jax.tree.unflatten(structure, leaves)


def restore_run(
    item: epath.Path,
    params: Any,
    opt_state: Any,
    *,
    accept_new_decay: bool,
    verify: bool,
) -> tuple[Any, Any]:
    """Returns params and optimizer state exactly as saved. See `directory.resume`."""
    described = read_manifest(item)
    if STATE not in described["trees"]:
        raise ValueError(
            f"Cannot resume from {item}: it holds {', '.join(described['trees'])} and "
            "no optimizer state. Resume from a step that EmaSave wrote."
        )
    averages, rest = split(opt_state)
    _check_averages(described, opt_state, averages, accept_new_decay)
    unread = computed.computed_paths(opt_state)
    wanted: dict[Place, Any] = {}
    for name, tree in {PARAMS: params, **averages, STATE: rest}.items():
        stored = described["trees"].get(name, {"leaves": {}})["leaves"]
        if name == SHADOW:
            stored = {path: leaf for path, leaf in stored.items() if path not in unread}
        pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
        ours = {trees.path_name(path): x for path, x in pairs if not is_empty(x)}
        if set(ours) != set(stored):
            odd = min(set(ours) ^ set(stored))
            who = "only the checkpoint has" if odd in stored else "the checkpoint lacks"
            raise ValueError(
                f"Cannot resume: {who} '{odd}' in the {_called(name)}. Build model and "
                "optimizer as for the saved run; or take the weights alone, "
                "checkpoint.restore(directory, 'params', like=params), and start with "
                "optimizer.init(params): the shadow then starts as a copy of them."
            )
        for path, target in ours.items():
            _check_fits(stored[path], target, f"{_called(name)}: {path}", exact=True)
            wanted[Place(name, path)] = _sharding(target)
    found = read(item, described, _readable(described, wanted), verify=verify)

    def fill(name: str, tree: Any) -> Any:
        def value(path: Any, target: Any) -> Any:
            if is_empty(target):
                return _without_elements(target)
            return _fill(found[Place(name, trees.path_name(path))], target)

        return jax.tree_util.tree_map_with_path(value, tree)

    def put_back(node: Any, old: Any) -> Any:
        if not shadows.is_ema_state(node):
            return node
        filled = {name: fill(name, tree) for name, tree in shadow_trees(old).items()}
        by_name = {n.removeprefix(f"{SHADOW}/"): tree for n, tree in filled.items()}
        return old._replace(count=node.count, shadow=filled.get(SHADOW, by_name))

    new_state = jax.tree.map(
        put_back, fill(STATE, rest), opt_state, is_leaf=shadows.is_ema_state
    )
    return fill(PARAMS, params), new_state


def sources_of(described: Mapping[str, Any], tree: str) -> dict[str, Place]:
    """Returns where each leaf of a tree lies: averaged ones in it, others in params.

    Raises:
        ValueError: If the checkpoint has no such tree.
    """
    have = [name for name in described["trees"] if name != STATE]
    named = [name for name in have if name.startswith(f"{SHADOW}/")]
    if tree == SHADOW and SHADOW not in have and len(named) == 1:
        tree = named[0]
    if tree not in have:
        raise ValueError(
            f"The checkpoint has no tree {tree!r}; it has "
            f"{', '.join(map(repr, have))}. Pass tree={(named or have)[-1]!r}."
        )
    params = described["trees"].get(PARAMS, {"leaves": {}})["leaves"]
    sources = {path: Place(PARAMS, path) for path in params}
    return sources | {p: Place(tree, p) for p in described["trees"][tree]["leaves"]}


def _places(
    slots: Mapping[str, Any],
    sources: Mapping[str, Place],
    rename: Mapping[str, str],
    tree: str,
) -> dict[str, Place]:
    """Returns the stored leaf of each slot that has elements."""
    unused = set(rename)
    places = {}
    for slot, target in slots.items():
        prefix = _prefix(slot, rename)
        path = slot if prefix is None else rename[prefix] + slot[len(prefix) :]
        unused.discard(prefix or "")
        if is_empty(target):
            continue
        if path not in sources:
            raise ValueError(
                f"There is no leaf '{path}' in the {tree} for the slot '{slot}'. "
                f"{_nearest(path, sources)} Map slots to stored paths with "
                f"rename={{{slot!r}: …}}."
            )
        places[slot] = sources[path]
    if unused:
        name = min(unused)
        raise ValueError(
            f"rename has the slot '{name}', which `like` does not. "
            f"{_nearest(name, slots)}"
        )
    return places


def _prefix(slot: str, rename: Mapping[str, str]) -> str | None:
    """Returns the longest key of `rename` that is the slot or a part of its path."""
    fits = [key for key in rename if slot == key or slot.startswith(f"{key}/")]
    return max(fits, key=len, default=None)


def _nearest(path: str, names: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(path, names, n=3, cutoff=0.3) or list(names)[:3]
    return f"The nearest are {', '.join(repr(name) for name in near)}."


def _check_averages(
    described: Mapping[str, Any],
    opt_state: Any,
    averages: Mapping[str, Any],
    accept_new_decay: bool,
) -> None:
    saved = described["averages"]
    computed.check_same_arguments(
        saved.get(SHADOW, {}), opt_state, accept_new=accept_new_decay
    )
    ours = {*averages, *([SHADOW] if computed.arguments(opt_state) else [])}
    if set(saved) != ours:
        there = ", ".join(sorted(saved)) or "no shadow"
        here = ", ".join(sorted(ours)) or "no shadow"
        raise ValueError(
            f"Cannot resume: the checkpoint has {there}, the optimizer state has "
            f"{here}. Chain ema_params with the decays of the saved run "
            f"({_decays_text(saved)}); or take the weights alone, "
            "checkpoint.restore(directory, 'params', like=params), and start with "
            "optimizer.init(params): a started shadow is a copy of the params."
        )
    if accept_new_decay:
        return
    for state in shadows.ema_states(opt_state).values():
        record = record_of(state)
        if record is None:
            continue
        for name in shadows.names_of(state):
            tree, decay = tree_of(name), record.decays.get(name)
            before = saved[tree]["decay"]
            changed = decay and before and Decay.from_json(before) != decay
            if changed or record.every != (saved[tree]["every"] or record.every):
                raise ValueError(
                    f"Cannot resume unasked: '{tree}' was averaged with "
                    f"{_decays_text({tree: saved[tree]})}, and would go on with "
                    f"{decay} at every={record.every}. Pass accept_new_decay=True to "
                    "keep the shadow and go on so; or restore the params and start "
                    "with optimizer.init(params), whose shadow is a copy of them."
                )


def _decays_text(averages: Mapping[str, Any]) -> str:
    texts = []
    for tree, saved in averages.items():
        if saved.get("bema"):
            texts.append(f"{tree}: {computed.text(saved['bema'])}")
            continue
        decay = Decay.from_json(saved["decay"]) if saved["decay"] else "a callable"
        texts.append(f"{tree}: {decay} at every={saved['every'] or 'unknown'}")
    return "; ".join(texts)


def _called(tree: str) -> str:
    return "optimizer state" if tree == STATE else tree


def _check_fits(
    stored: Mapping[str, Any], target: Any, slot: str, *, exact: bool
) -> None:
    if tuple(stored["shape"]) != tuple(np.shape(target)):
        raise ValueError(
            f"'{slot}' is {tuple(stored['shape'])} on disk and {np.shape(target)} in "
            "the target. Build the model as for the saved run, or rename slots to the "
            "leaves that fit."
        )
    if stored["kind"].startswith("key:") or is_key(target):
        if not (stored["kind"].startswith("key:") and is_key(target)):
            raise ValueError(
                f"'{slot}' is {stored['kind']} on disk and {_dtype(target)} in the "
                "target: PRNG keys and numbers are not converted."
            )
        return
    have, want = jnp.dtype(stored["dtype"]), _dtype(target)
    if have == want or (not hasattr(target, "dtype") and have.kind == want.kind):
        return
    for kind in (jnp.floating, jnp.complexfloating):
        alike = jnp.issubdtype(have, kind) and jnp.issubdtype(want, kind)
        if alike and not exact:
            return
    advice = (
        "A resumed run goes on in the dtypes it was saved in."
        if exact
        else "Only floats are cast, and only to floats: ask for the stored dtype."
    )
    raise ValueError(f"'{slot}' is {have} on disk and {want} in the target. {advice}")


def _dtype(target: Any) -> Any:
    return target.dtype if hasattr(target, "dtype") else np.asarray(target).dtype


def _default_sharding() -> Any:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _sharding(target: Any) -> Any:
    """Returns where a leaf goes; None for what is not bound to a device."""
    if isinstance(target, (np.ndarray, np.generic, bool, int, float)):
        return None
    if _is_free(target):
        return None
    return getattr(target, "sharding", None) or _default_sharding()


def _is_free(target: Any) -> bool:
    """Returns whether an array is bound to no device, as JAX makes them.

    Such as the count of a state beside params on a mesh: restored onto a device, it
    could not be used with them.
    """
    return isinstance(target, jax.Array) and not getattr(target, "committed", True)


def _readable(
    described: Mapping[str, Any], wanted: Mapping[Place, Any]
) -> dict[Place, Any]:
    """Has NumPy read what JAX cannot hold, or what was a number or NumPy array."""

    def how(place: Place, sharding: Any) -> Any:
        stored = stored_leaf(described, place)
        if stored["kind"].startswith("key:"):
            return sharding or _default_sharding()
        wide = jax.dtypes.canonicalize_dtype(jnp.dtype(stored["dtype"]))
        fits = wide == jnp.dtype(stored["dtype"])
        return sharding if stored["kind"] == "jax" and fits else None

    return {place: how(place, sharding) for place, sharding in wanted.items()}


def _fill(value: Any, target: Any) -> Any:
    """Returns a leaf that was read as the target wants it."""
    if isinstance(target, (bool, int, float)):
        return type(target)(value)
    if is_key(target):
        return value
    if isinstance(target, (np.ndarray, np.generic)):
        return np.asarray(value).astype(target.dtype)
    if not isinstance(value, jax.Array):
        array = np.asarray(value).astype(target.dtype)
        if _is_free(target):
            return jnp.asarray(array)
        return jax.device_put(array, _sharding(target))
    return value if value.dtype == target.dtype else value.astype(target.dtype)


def _without_elements(target: Any) -> Any:
    make = np.zeros if isinstance(target, np.ndarray) else jnp.zeros
    return make(target.shape, target.dtype)
