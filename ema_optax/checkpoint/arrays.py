"""The arrays of a step as TensorStore opens them, before Orbax reads them.

Orbax writes one OCDBT store a folder, and in it one zarr array a leaf, whose name is
the keys of the leaf joined by dots.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorstore as ts
from etils import epath

from ema_optax.checkpoint import manifest
from ema_optax.checkpoint.contents import PARAMS


def context() -> ts.Context:
    """Returns what keeps the index of one store: its folder may be written anew."""
    return ts.Context({"cache_pool": {"total_bytes_limit": 2**20}})


def names(structure: Any) -> dict[str, tuple[str, ...]]:
    """Returns the keys that Orbax nests each leaf of a tree under, by its path."""
    return dict(_keys(structure, ()))


def opened(
    item: epath.Path, tree: str, keys: tuple[str, ...], known: ts.Context
) -> Any:
    """Returns the future of a leaf's array."""
    folder, name = item / manifest.FOLDER, ".".join((tree, *keys))
    if tree == PARAMS:
        folder, name = item, ".".join(keys)
    store = {"driver": "ocdbt", "base": _base(folder), "path": f"{name}/"}
    spec = {"driver": "zarr", "kvstore": store}
    return ts.open(spec, open=True, read=True, context=known)


def unlike(array: Any, stored: Mapping[str, Any]) -> str | None:
    """Returns how an array is not what the manifest says of it, or None.

    Its chunks count too: to read one element TensorStore makes a whole one of them.
    """
    shape = tuple(stored["shape"])
    chunk = array.chunk_layout.read_chunk.shape or shape
    if stored["kind"].startswith("key:"):  # the data of keys have dimensions more
        if array.shape[: len(shape)] != shape or math.prod(array.shape) > 64 * max(
            math.prod(shape), 1
        ):
            return f"it is {array.shape}, its manifest says keys of {list(shape)}"
        shape = array.shape
    if array.shape != shape:
        return f"it is {array.shape}, its manifest says {list(shape)}"
    if any(n > max(whole, 1) for n, whole in zip(chunk, shape, strict=True)):
        return f"it is {shape}, in chunks of {list(chunk)}"
    return None


def first_unlike(
    item: epath.Path, described: Mapping[str, Any], places: Iterable[Any]
) -> str | None:
    """Returns which leaf is not what the manifest says, and how; or None."""
    known, keys, found = context(), {}, []
    for place in places:
        if place.tree not in keys:
            keys[place.tree] = names(described["trees"][place.tree]["structure"])
        future = opened(item, place.tree, keys[place.tree][place.path], known)
        found.append((place, future))
    for place, future in found:
        stored = described["trees"][place.tree]["leaves"][place.path]
        wrong = unlike(future.result(), stored)
        if wrong:
            return wrong
    return None


def _keys(node: Any, above: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(node, str):
        yield node, above
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _keys(value, (*above, key))
    elif isinstance(node, list):
        for key, value in enumerate(node):
            yield from _keys(value, (*above, str(key)))


def _base(folder: epath.Path) -> Any:
    """Returns a folder as TensorStore names it: a URL only where it is one."""
    text = str(folder)
    if "://" in text:
        return f"{text}/"
    return {"driver": "file", "path": f"{text}/"}
