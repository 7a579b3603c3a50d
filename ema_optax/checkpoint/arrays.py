"""The arrays of a step as TensorStore opens them, before Orbax reads them.

Orbax writes one OCDBT store a folder, and in it one zarr array a leaf, whose name is
the keys of the leaf joined by dots.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import tensorstore as ts
from etils import epath

from ema_optax.checkpoint import manifest
from ema_optax.checkpoint.contents import PARAMS

_KEY = 64  # numbers in the data of a PRNG key; 2 or 4 in those of JAX


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
    store = {**_store(item, tree), "path": _prefix(tree, keys)}
    spec = {"driver": "zarr", "kvstore": store}
    return ts.open(spec, open=True, read=True, context=known)


def unlike(metadata: Any, stored: Mapping[str, Any]) -> str | None:
    """Returns how an array is not what the manifest says of it, or None.

    Its chunks count too: to read one element TensorStore makes a whole one of them.
    And we compress nothing, which could be of any size.

    Args:
        metadata: The zarr metadata of the array.
        stored: What the manifest says of the leaf.
    """
    fields = ("shape", "chunks", "dtype")
    if not isinstance(metadata, dict) or not {*fields} <= set(metadata):
        return "it is no array"
    shape, chunks, dtype = (metadata[field] for field in fields)
    for numbers in (shape, chunks):
        if not isinstance(numbers, list) or not all(
            type(n) is int and n >= 0 for n in numbers
        ):
            return "it is an array of no shape"
    wanted = list(stored["shape"])
    if stored["kind"].startswith("key:") and shape[: len(wanted)] == wanted:
        # The data of keys have a dimension more, of a few numbers.
        wanted += [n for n in shape[len(wanted) :][:1] if n <= _KEY]
    if shape != wanted:
        return f"it is {tuple(shape)}, its manifest says {stored['shape']}"
    if len(chunks) != len(shape) or any(
        n > max(whole, 1) for n, whole in zip(chunks, shape, strict=True)
    ):
        return f"it is {tuple(shape)}, in chunks of {chunks}"
    if metadata.get("compressor") is not None or metadata.get("filters"):
        return "it is compressed, as none of ours is"
    if _itemsize(dtype) != jnp.dtype(stored["dtype"]).itemsize:
        return f"it is of {str(dtype)[:50]}, its manifest says {stored['dtype']}"
    return None


def first_unlike(
    item: epath.Path, described: Mapping[str, Any], places: Iterable[Any]
) -> str | None:
    """Returns how a leaf is not what the manifest says, or None.

    The places are of trees in one store.

    Raises:
        ValueError: If there is no such array.
    """
    places, keys = list(places), {}
    for tree in {place.tree for place in places}:
        keys[tree] = names(described["trees"][tree]["structure"])
    store = _store(item, places[0].tree)
    opened = ts.KvStore.open(store, context=context()).result()
    found = [
        opened.read(f"{_prefix(place.tree, keys[place.tree][place.path])}.zarray")
        for place in places
    ]
    for place, future in zip(places, found, strict=True):
        read = future.result()
        if read.state != "value":
            raise ValueError("its array is not there")
        stored = described["trees"][place.tree]["leaves"][place.path]
        wrong = unlike(json.loads(read.value), stored)
        if wrong:
            return wrong
    return None


def _store(item: epath.Path, tree: str) -> dict[str, Any]:
    folder = item if tree == PARAMS else item / manifest.FOLDER
    return {"driver": "ocdbt", "base": _base(folder)}


def _prefix(tree: str, keys: tuple[str, ...]) -> str:
    """Returns what the files of an array begin with: nothing where it is the tree."""
    name = ".".join(keys if tree == PARAMS else (tree, *keys))
    return f"{name}/" if name else ""


def _itemsize(dtype: Any) -> int | None:
    """Returns the bytes of a dtype by its name in zarr; None of what has none."""
    try:
        return jnp.dtype(dtype).itemsize if isinstance(dtype, str) else None
    except TypeError:
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
