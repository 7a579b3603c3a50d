"""Opens the array of a leaf with TensorStore, after a check against its entry.

Orbax writes one OCDBT store a folder, and in it one zarr array a leaf, whose name is
the keys of the leaf joined by dots. The params are in the item's own folder, so that
any program loads those; all else is in the folder `ema_optax` inside it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import tensorstore as ts
from etils import epath

from ema_optax._checkpoint.entries import LeafEntry, Structure
from ema_optax._checkpoint.manifest import FOLDER, PARAMS

_KEY = 64  # most numbers in the data of a PRNG key; those of JAX have 2 or 4
_CACHE = 2**20  # bytes that are cached of each store's index
# A read from a bucket that does not answer fails within a minute: TensorStore waits 1
# to 16 s between requests, and more by chance. Its own 32 take a quarter of an hour.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}


class Store:
    """The arrays of an item, opened by tree and path."""

    def __init__(self, item: epath.Path, structures: Mapping[str, Structure]) -> None:
        self._item, self._structures = item, structures
        # A context of its own: a shared cache would hold the index of a step that was
        # since written anew into the same folder.
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": _CACHE},
                "gcs_request_retries": _RETRIES,
            }
        )
        self._names: dict[str, dict[str, str]] = {}
        self._stores: dict[bool, ts.Future[ts.KvStore]] = {}

    def metadata(self, tree: str, path: str) -> "ts.Future[ts.KvStore.ReadResult]":
        """Returns the future of the stored metadata of a leaf's array."""
        is_params = tree == PARAMS
        if is_params not in self._stores:
            spec = {"driver": "ocdbt", "base": self._base(tree)}
            self._stores[is_params] = ts.KvStore.open(spec, context=self._context)
        store = self._stores[is_params].result()
        return store.read(f"{self._name(tree, path)}.zarray")

    def open(
        self, tree: str, path: str, metadata: Mapping[str, object]
    ) -> "ts.Future[ts.TensorStore]":
        """Returns the future of a leaf's array, whose metadata are known."""
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": self._base(tree),
                "path": self._name(tree, path),
            },
            "metadata": metadata,
        }
        # The metadata were checked: TensorStore must not read others in their place.
        return ts.open(
            spec, open=True, read=True, assume_metadata=True, context=self._context
        )

    def _base(self, tree: str) -> str | dict[str, str]:
        return key_value_store(self._item if tree == PARAMS else self._item / FOLDER)

    def _name(self, tree: str, path: str) -> str:
        """Returns the prefix of an array's keys in the store; empty for a bare one."""
        if tree not in self._names:
            above = () if tree == PARAMS else (tree,)
            self._names[tree] = dict(_names(self._structures[tree], above))
        return self._names[tree][path]


def key_value_store(folder: epath.Path) -> str | dict[str, str]:
    """Returns a folder as TensorStore's key-value store: a URL, or driver and path."""
    text = str(folder)
    if "://" in text:
        return f"{text}/"
    return {"driver": "file", "path": f"{text}/"}


def parse(read: "ts.KvStore.ReadResult") -> dict[str, Any]:
    """Parses the metadata of an array.

    Raises:
        ValueError: If there is no such array, or no metadata.
    """
    if read.state != "value":
        raise ValueError("its array is not there")
    metadata = json.loads(read.value)
    if not isinstance(metadata, dict):
        raise ValueError("it is no array")
    return metadata


def difference(metadata: Mapping[str, Any], entry: LeafEntry) -> str | None:
    """Says how an array differs from its entry in the manifest; None if it does not.

    Checked before TensorStore allocates it. Chunks count too: to read one element
    TensorStore allocates a whole chunk. Compressed data is refused: this library writes
    none, and it could expand to any size.
    """
    if not {"shape", "chunks", "dtype"} <= set(metadata):
        return "it is no array"
    shape, chunks = metadata["shape"], metadata["chunks"]
    for numbers in (shape, chunks):
        if not isinstance(numbers, list) or not all(
            type(n) is int and n >= 0 for n in numbers
        ):
            return "it is an array of no shape"
    expected = list(entry.shape)
    if entry.is_key and shape[: len(expected)] == expected:
        # The data of keys have one more dimension, of at most _KEY numbers.
        expected += [n for n in shape[len(expected) :][:1] if n <= _KEY]
    if shape != expected:
        return f"it is {tuple(shape)}, its manifest says {list(entry.shape)}"
    if len(chunks) != len(shape) or any(
        n > max(length, 1) for n, length in zip(chunks, shape, strict=True)
    ):
        return f"it is {tuple(shape)}, in chunks of {chunks}"
    if metadata.get("compressor") is not None or metadata.get("filters"):
        return "it is compressed, and ema_optax compresses no array"
    if not _is_dtype(metadata["dtype"], entry.dtype):
        return (
            f"it is of {str(metadata['dtype'])[:50]}, its manifest says {entry.dtype}"
        )
    return None


def _is_dtype(stored: object, name: str) -> bool:
    """Returns whether a dtype that zarr wrote is the one of a name."""
    try:
        return isinstance(stored, str) and jnp.dtype(stored).name == name
    except TypeError:
        return False


def _names(node: Structure, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield node, f"{'.'.join(above)}/" if above else ""
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _names(value, (*above, key))
    elif isinstance(node, list):
        for key, value in enumerate(node):
            yield from _names(value, (*above, str(key)))
