"""Opens the stored array of a leaf with TensorStore, and compares it with its entry.

Orbax writes one OCDBT store a folder, and in it one zarr array a leaf, whose name is
the keys of the leaf joined by dots. The params are in the item's own folder, so that
any program loads those; all else is in the folder `ema_optax` inside it.
"""

from collections.abc import Iterator, Mapping

import tensorstore as ts
from etils import epath

from ema_optax.checkpoint.entries import LeafEntry, Structure
from ema_optax.checkpoint.manifest import FOLDER, PARAMS

_KEY = 64  # numbers in the data of a PRNG key; 2 or 4 in those of JAX
_CACHE = 2**20  # bytes of each store's index that are kept


class Store:
    """The arrays of an item, opened by tree and path."""

    def __init__(self, item: epath.Path, structures: Mapping[str, Structure]) -> None:
        self._item, self._structures = item, structures
        # Of its own: another step may be written anew into the same folder.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
        self._names: dict[str, dict[str, str]] = {}

    def open(self, tree: str, path: str) -> "ts.Future[ts.TensorStore]":
        """Returns the future of a leaf's array."""
        folder = self._item if tree == PARAMS else self._item / FOLDER
        store = {
            "driver": "ocdbt",
            "base": _base(folder),
            "path": self._name(tree, path),
        }
        spec = {"driver": "zarr", "kvstore": store}
        return ts.open(spec, open=True, read=True, context=self._context)

    def _name(self, tree: str, path: str) -> str:
        """Returns what the files of an array begin with: nothing for a bare array."""
        if tree not in self._names:
            above = () if tree == PARAMS else (tree,)
            self._names[tree] = dict(_names(self._structures[tree], above))
        return self._names[tree][path]


def difference(array: "ts.TensorStore", entry: LeafEntry) -> str | None:
    """Returns how an array is not what the manifest says of it, or None.

    Its chunks count too: to read one element TensorStore makes a whole one of them.
    And we compress nothing, which could be of any size.
    """
    metadata = array.spec().to_json()["metadata"]
    shape, chunks = tuple(array.shape), tuple(metadata["chunks"])
    wanted = entry.shape
    if entry.is_key and shape[: len(wanted)] == wanted:
        # The data of keys have a dimension more, of a few numbers.
        wanted += tuple(n for n in shape[len(wanted) :][:1] if n <= _KEY)
    if shape != wanted:
        return f"it is {shape}, its manifest says {list(entry.shape)}"
    if any(n > max(whole, 1) for n, whole in zip(chunks, shape, strict=True)):
        return f"it is {shape}, in chunks of {list(chunks)}"
    if metadata.get("compressor") is not None or metadata.get("filters"):
        return "it is compressed, as none of ours is"
    dtype = array.dtype.numpy_dtype.name
    if dtype != entry.dtype:
        return f"it is of {dtype}, its manifest says {entry.dtype}"
    return None


def _names(node: Structure, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield node, f"{'.'.join(above)}/" if above else ""
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _names(value, (*above, key))
    elif isinstance(node, list):
        for key, value in enumerate(node):
            yield from _names(value, (*above, str(key)))


def _base(folder: epath.Path) -> str | dict[str, str]:
    """Returns a folder as TensorStore names it: a URL only where it is one."""
    text = str(folder)
    if "://" in text:
        return f"{text}/"
    return {"driver": "file", "path": f"{text}/"}
