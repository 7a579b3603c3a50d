"""What a manifest must be before anything that it says is believed.

Whoever can write a checkpoint can seal its manifest: the seal tells damage, not intent.
So shapes are bounded, dtypes are numbers, paths stay inside, and nothing is nested more
deeply than the recursion that reads it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

DEPTH = 100  # of nested containers; each costs what reads it a few frames
_LONGEST = 4096  # of a path
_NDIM = 64  # NumPy's own bound
_BYTES = 2**60  # of a leaf; the sums of many stay far from overflow in float64
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}")
_KIND = re.compile(r"jax|numpy|bool|int|float|key:.{1,64}")
_NUMBERS = "biufc"  # kinds of NumPy's dtypes; those of ml_dtypes are "V" with a name

_KEYS: dict[str, type] = {
    "format": int,
    "version": str,
    "processes": int,
    "averages": dict,
    "trees": dict,
}


def malformed(manifest: Any, newest: int) -> str | None:
    """Returns why a manifest cannot be read, or None.

    Args:
        manifest: Whatever the file held.
        newest: The newest format that this version reads. Of newer ones only their
            number and version are looked at.
    """
    if not isinstance(manifest, dict) or not _is_whole(manifest.get("format")):
        return "it states no format"
    if manifest["format"] > newest:  # and may be built differently
        return _in_version(manifest.get("version"))
    for key, kind in _KEYS.items():
        value = manifest.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"'{key}' is missing or no {kind.__name__}"
    if manifest["processes"] < 1:
        return f"'processes' is {manifest['processes']}"
    if not manifest["trees"]:
        return "it has no trees"
    if is_deep(manifest.get("extra")):
        return f"'extra' is nested more than {DEPTH} deep"
    for name, tree in manifest["trees"].items():
        wrong = misplaced(name) or _in_tree(tree)
        if wrong:
            return f"its tree {_brief(name)} {wrong}"
    for name, average in manifest["averages"].items():
        if name not in manifest["trees"]:
            return f"it has an average {_brief(name)} and no such tree"
        wrong = _in_average(average)
        if wrong:
            return f"its average {_brief(name)} {wrong}"
    return _in_version(manifest["version"])


def misplaced(path: str) -> str | None:
    """Returns why a path cannot be that of a leaf, or None.

    Keys may hold slashes, as Haiku's do; as a whole a path must not lead elsewhere.
    """
    keys = path.split("/")
    if "\0" in path:
        return "holds a NUL"
    if path.startswith("/") or ".." in keys:
        return "leads out of the checkpoint"
    if len(keys) > DEPTH or len(path) > _LONGEST:
        return f"has more than {DEPTH} keys or {_LONGEST} characters"
    return None


def is_deep(value: Any) -> bool:
    """Returns whether lists and dicts are nested more than `DEPTH` deep."""
    return any(depth > DEPTH for _, depth in _nodes(value))


def malformed_sums(content: Any) -> str | None:
    """Returns why the checksums of a process cannot be read, or None."""
    if not isinstance(content, dict):
        return "it holds no trees"
    for name, leaves in content.items():
        if not isinstance(leaves, dict):
            return f"its tree {_brief(name)} has no leaves"
        for path, pieces in leaves.items():
            if not isinstance(pieces, list) or not all(map(_is_piece, pieces)):
                return f"the pieces of {_brief(path)} are not bounds and a checksum"
    return None


def _is_piece(piece: Any) -> bool:
    if not isinstance(piece, list) or len(piece) != 2:
        return False
    bounds, value = piece
    return (
        isinstance(value, str)
        and isinstance(bounds, list)
        and all(
            isinstance(b, list)
            and len(b) == 2
            and all(map(_is_whole, b))
            and 0 <= b[0] <= b[1] < _BYTES
            for b in bounds
        )
    )


def _in_tree(tree: Any) -> str | None:
    if not isinstance(tree, dict) or not {"structure", "leaves"} <= set(tree):
        return "has no structure or no leaves"
    leaves = tree["leaves"]
    if not isinstance(leaves, dict):
        return "has no leaves by path"
    for path, leaf in leaves.items():
        wrong = misplaced(path) or _in_leaf(leaf)
        if wrong:
            return f"has a leaf {_brief(path)} that {wrong}"
    named: set[str] = set()
    for node, depth in _nodes(tree["structure"]):
        if depth > DEPTH:
            return f"is nested more than {DEPTH} deep"
        if isinstance(node, str):
            if node not in leaves or node in named:
                what = "twice" if node in named else "and no such leaf"
                return f"has the path {_brief(node)} in its structure {what}"
            named.add(node)
        elif isinstance(node, dict):
            for key in node:
                wrong = misplaced(key)
                if wrong:
                    return f"has a key {_brief(key)} that {wrong}"
        elif node is not None and not isinstance(node, list):
            return f"has {_brief(node)} in its structure"
    if len(named) < len(leaves):
        odd = min(set(leaves) - named)
        return f"has a leaf {_brief(odd)} that is not in its structure"
    return None


def _nodes(structure: Any) -> Iterator[tuple[Any, int]]:
    """Yields the nodes of a structure with their depths; stops below `DEPTH`."""
    left = [(structure, 0)]
    while left:
        node, depth = left.pop()
        yield node, depth
        if depth <= DEPTH and isinstance(node, (dict, list)):
            below = node.values() if isinstance(node, dict) else node
            left += [(child, depth + 1) for child in below]


def _in_leaf(leaf: Any) -> str | None:
    if not isinstance(leaf, dict) or not {"shape", "dtype", "kind"} <= set(leaf):
        return "lacks shape, dtype or kind"
    shape, dtype, kind = leaf["shape"], leaf["dtype"], leaf["kind"]
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        return f"is of the kind {_brief(kind)}"
    size = _itemsize(dtype)
    if size is None:
        return f"is of the dtype {_brief(dtype)}"
    if not isinstance(shape, list) or len(shape) > _NDIM or not all(map(_is_n, shape)):
        return f"has the shape {_brief(shape)}"
    if math.prod(shape) * size > _BYTES:
        return f"has the shape {_brief(shape)}, more than any disk holds"
    return None


def _itemsize(dtype: Any) -> int | None:
    """Returns the bytes of a dtype of numbers by its name; None of anything else."""
    if not isinstance(dtype, str):
        return None
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):
        return None
    number = found.kind in _NUMBERS or jnp.issubdtype(found, np.number)
    return found.itemsize if number and found.name == dtype else None


def _in_average(average: Any) -> str | None:
    if not isinstance(average, dict) or not {"decay", "every", "count"} <= set(average):
        return "lacks decay, every or count"
    decay, every, count = (average[key] for key in ("decay", "every", "count"))
    if decay is not None and not isinstance(decay, dict):
        return f"has the decay {_brief(decay)}"
    if every is not None and not (_is_whole(every) and 1 <= every < 2**63):
        return f"has every={_brief(every)}"
    if not _all_of(count, lambda n: _is_whole(n) and 0 <= n < 2**63):
        return f"has the count {_brief(count)}"
    bema = average.get("bema", [])
    if not isinstance(bema, list) or not all(isinstance(x, Mapping) for x in bema):
        return f"has the arguments {_brief(bema)} of bema_params"
    if is_deep(average):
        return f"is nested more than {DEPTH} deep"
    return None


def _all_of(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Returns whether a value, or all in lists of it, fit: states may be vmapped."""
    return all(
        fits(node) if not isinstance(node, list) else depth < _NDIM
        for node, depth in _nodes(value)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_n(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _in_version(value: Any) -> str | None:
    # It is told to users, in a command that they may copy into a shell.
    if isinstance(value, str) and _VERSION.fullmatch(value):
        return None
    return f"'version' is no version: {_brief(value)}"


def _brief(value: Any) -> str:
    """Returns what a value is, in a few words, however large or deep it is."""
    if isinstance(value, (dict, list)):
        if isinstance(value, list) and len(value) <= _NDIM:
            inner = ", ".join(_brief(x) if _is_flat(x) else "…" for x in value)
            return f"[{inner}]"[:200]
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _is_flat(value: Any) -> bool:
    return not isinstance(value, (dict, list))
