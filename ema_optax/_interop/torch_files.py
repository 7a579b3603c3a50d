"""Tensors of PyTorch's and Hugging Face's files by name, each read when asked for."""

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from ema_optax._messages import extras
from ema_optax._messages.text import brief, one_line, some

SAFETENSORS = ".safetensors"
PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_DEEPEST = 64  # containers in containers
_MOST = 2**22  # containers and values in one file

# Names of dtypes in safetensors' headers; those of 8 bits and less are quantized.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_HELD = frozenset([*_DTYPES.values(), "complex128"])


def is_averaged(dtype: str) -> bool:
    """Tells whether averages fold tensors of a dtype: floating and complex ones."""
    return dtype.startswith(("float", "bfloat", "complex"))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        shape: Lengths of the axes.
        dtype: NumPy's name of it, or the file's where NumPy has none.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_averaged(self) -> bool:
        """Whether averages fold the tensor."""
        return is_averaged(self.dtype)

    @property
    def is_held(self) -> bool:
        """Whether NumPy can hold the tensor as numbers: not where it is quantized."""
        return self.dtype in _HELD


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Holds the tensors of a file, or of several that are one.

    Attributes:
        origin: The file, or its index, for errors.
        entries: Name → tensor; keys of nested dicts are joined by dots.
        values: Name → number, text or whatever else is no tensor.
        nested: Keys at the top that are dicts or lists, and no parts of names.
    """

    origin: str
    entries: Mapping[str, Entry]
    values: Mapping[str, object]
    nested: frozenset[str]
    _read: Callable[[str], np.ndarray]

    def raw(self, name: str) -> np.ndarray:
        """Reads a tensor that NumPy can hold, whatever its values are."""
        return self._read(name)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor, as a view of the file where possible.

        Raises:
            ValueError: If NumPy cannot hold the tensor, or an element is not finite.
        """
        entry = self.entries[name]
        if not entry.is_held:
            raise ValueError(
                f"'{name}' in {self.origin} is {entry.dtype}, which cannot be held as "
                "the values of a parameter. Convert it to float32 first, or leave it "
                f'out: rules=[Rule("{name}", None), Rule("**", "**")].'
            )
        array = self.raw(name)
        if entry.is_averaged and not np.isfinite(array).all():
            bad = array.size - int(np.isfinite(array).sum())
            raise ValueError(
                f"'{name}' in {self.origin} has {bad:,} of {array.size:,} elements "
                "that are NaN or infinite. Take a checkpoint from before, or leave a "
                f'mask out: rules=[Rule("{name}", None), Rule("**", "**")].'
            )
        return array

    def number(self, name: str) -> int | None:
        """Looks up a whole number that is recorded as a tensor or value, or None."""
        entry = self.entries.get(name)
        if entry is not None and not entry.is_averaged and entry.shape in ((), (1,)):
            return int(self._read(name).reshape(()))
        value = self.values.get(name)
        return value if type(value) is int else None


def opened(path: Path) -> Tensors:
    """Opens one file of weights, by its ending.

    Raises:
        ModuleNotFoundError: If the library that reads the file is not installed.
        OSError: If the file cannot be read.
        ValueError: If the file is none of PyTorch's or Hugging Face's, is damaged, or
            holds objects that only running its code would bring.
    """
    if path.name.endswith(".index.json"):
        return _sharded(path)
    if path.suffix == SAFETENSORS:
        return _safetensors(path)
    if path.suffix in PICKLED:
        return _pickled(path)
    endings = ", ".join((SAFETENSORS, ".index.json", *PICKLED))
    raise ValueError(f"{path} is no file of weights: those end in {endings}.")


def _safetensors(path: Path) -> Tensors:
    with extras.needed_by("import of safetensors files"):
        from safetensors import SafetensorError, safe_open
    with path.open("rb") as file:  # raises for a folder, and for a missing file
        head = file.read(8)
    try:
        # Checks the header, its size, and the place of each tensor.
        safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file: {one_line(error)}. It is damaged, "
            "or the rest was not downloaded: bring it again."
        ) from error
    length = struct.unpack("<Q", head)[0]
    with path.open("rb") as file:
        file.seek(8)
        # Two tensors of one name are refused; the library silently keeps the last.
        header = _parsed(file.read(length), str(path))
    header.pop("__metadata__", None)
    entries = {
        name: Entry(tuple(x["shape"]), _dtype(x["dtype"])) for name, x in header.items()
    }
    # The library's own reader copies what it has mapped: twice the memory.
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))[8 + length :]

    def read(name: str) -> np.ndarray:
        start, stop = header[name]["data_offsets"]
        entry = entries[name]
        return data[start:stop].view(jnp.dtype(entry.dtype)).reshape(entry.shape)

    return Tensors(str(path), entries, {}, frozenset(), read)


def _dtype(name: str) -> str:
    return _DTYPES.get(name, name)


def shards_of(index: Path) -> dict[Path, list[str]]:
    """Reads the files that an index lists, and the tensors in each.

    Raises:
        ValueError: If `index` is no index, or names files elsewhere.
    """
    content = _parsed(index.read_bytes(), str(index))
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(
            f"{index} is no index of shards: it has no weight_map from the names of "
            "tensors to files. Pass one file, or the folder of the model."
        )
    listed: dict[Path, list[str]] = {}
    for name, file in table.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & {*"/\\"}:
            raise ValueError(
                f"{index} says that '{name}' is in {brief(file)}, which is no file "
                "beside it. Shards lie in the folder of their index."
            )
        if file.endswith(".index.json"):
            raise ValueError(f"{index} lists an index, {brief(file)}, as a shard.")
        listed.setdefault(index.parent / file, []).append(name)
    return listed


def _sharded(index: Path) -> Tensors:
    """Opens the files that an index lists, as one."""
    listed = shards_of(index)
    missing = [path.name for path in listed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} lists {len(listed)} shards, and {some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it. Bring all of them."
        )
    shards = {path.name: opened(path) for path in listed}
    owners: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.entries:
            if name in owners:
                raise ValueError(
                    f"'{name}' is in both {owners[name]} and {file}, shards of {index}."
                    " Which is right is not known: bring the model again."
                )
            owners[name] = file
    expected = {name: path.name for path, names in listed.items() for name in names}
    for name, file in expected.items():
        if owners.get(name) != file:
            where = f"it is in {owners[name]}" if name in owners else "no shard has it"
            raise ValueError(
                f"{index} says that '{name}' is in {file}, and {where}. Index and "
                "shards are of different models, or of different saves."
            )
    unlisted = [name for name in owners if name not in expected]
    if unlisted:
        raise ValueError(
            f"{owners[unlisted[0]]} has {some(map(repr, unlisted))}, which {index} "
            "does not list. Index and shards are of different models, or saves."
        )
    return Tensors(
        str(index),
        {name: shards[file].entries[name] for name, file in owners.items()},
        {},
        frozenset(),
        lambda name: shards[owners[name]].raw(name),
    )


def _parsed(text: bytes, where: str) -> Any:
    """Parses JSON, and refuses an object with a name twice."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            most_common = collections.Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"it has {brief(most_common[0][0])} twice")
        return members

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read: {one_line(error)}.") from None


def settings(folder: Path) -> Mapping[str, object]:
    """Reads the `config.json` of a folder; nothing where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    content = _parsed(path.read_bytes(), str(path))
    return content if isinstance(content, dict) else {}


def _pickled(path: Path) -> Tensors:
    """Opens a file of `torch.save`, by a reader that runs nothing of the file."""
    torch = _torch()
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on how it reads
            # timm's checkpoints hold the arguments of the run: names and values.
            allowed = torch.serialization.safe_globals([argparse.Namespace])
            with allowed:
                content = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=is_zip
                )
    except Exception as error:  # whatever a damaged or hostile file makes it raise
        raise ValueError(_refused(torch, path, error)) from error
    tensors: dict[str, Any] = {}
    values: dict[str, object] = {}
    for name, leaf in _leaves(content, str(path)):
        group = tensors if isinstance(leaf, torch.Tensor) else values
        if name in tensors or name in values:
            raise ValueError(f"{path} has two entries that are called '{name}'.")
        group[name] = leaf
    entries = {name: _entry(torch, tensor) for name, tensor in tensors.items()}
    top = content.items() if isinstance(content, Mapping) else ()
    nested = frozenset(str(k) for k, v in top if isinstance(v, (Mapping, list, tuple)))

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach().resolve_conj().resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has none
            return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return Tensors(str(path), entries, values, nested, read)


def _torch() -> ModuleType:
    with extras.needed_by("import of .pt, .pth, .ckpt and .bin files"):
        import torch  # pyright: ignore[reportMissingImports] an extra
    return torch


def _refused(torch: ModuleType, path: Path, error: Exception) -> str:
    """Explains why a file is not read, and how to make one that is."""
    text = str(error)
    classes: list[str] = []
    with contextlib.suppress(Exception):  # torch lists the classes of zip files alone
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    classes = [name for name in classes if name != "argparse.Namespace"]
    classes = classes or re.findall(r"(?:GLOBAL|class) ([\w.]+\.\w+)", text)[:1]
    if classes or re.search(r"(?i)unsupported (?:global|class)", text):
        listed = f": {some(sorted(classes))}" if classes else ""
        return (
            f"{path} holds more than tensors, numbers and texts{listed}, and to load "
            "that would run code that the file chooses. If you trust who wrote it, "
            "write the weights alone, in the environment of the run: "
            f"d = torch.load({path.name!r}, weights_only=False, map_location='cpu'); "
            "torch.save({'model': d['model'], 'ema': d['ema']}, 'weights.pt'), with "
            "the keys that it has."
        )
    # Leaves out torch's advice to run the file.
    inner = re.search(r"WeightsUnpickler error:(.*?)(?:Check the doc|$)", text, re.S)
    reason = one_line(inner[1] if inner else text) or type(error).__name__
    return (
        f"{path} is no whole file of torch.save: {reason.rstrip('.')}. It is damaged, "
        "or the rest was not downloaded: bring it again."
    )


def _leaves(content: object, origin: str) -> Iterator[tuple[str, object]]:
    """Yields the leaves of dicts, lists and namespaces, with keys joined by dots."""
    seen = 0
    pending: list[tuple[str, int, object]] = [("", 0, content)]
    while pending:
        name, depth, node = pending.pop()
        seen += 1
        if seen > _MOST or depth > _DEEPEST:
            raise ValueError(
                f"{origin} nests more than {_DEEPEST} deep, or more than {_MOST:,} "
                "values: it is no file of weights."
            )
        node = vars(node) if isinstance(node, argparse.Namespace) else node
        if isinstance(node, Mapping):
            pairs = [(str(key), value) for key, value in node.items()]
        elif isinstance(node, (list, tuple)):
            pairs = [(str(at), value) for at, value in enumerate(node)]
        else:
            yield name, node
            continue
        pairs.reverse()  # `pop` takes from the end
        pending += [(f"{name}.{k}" if name else k, depth + 1, v) for k, v in pairs]


def _entry(torch: ModuleType, tensor: Any) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    kind = type(tensor)
    if kind not in (torch.Tensor, torch.nn.Parameter):
        dtype = f"a {kind.__name__}"
    elif tensor.is_nested:
        return Entry((), "a nested tensor")
    elif tensor.is_meta:
        dtype = f"{dtype} without values, on the device meta"
    elif tensor.layout != torch.strided:
        dtype = f"{dtype}, {str(tensor.layout).removeprefix('torch.')}"
    return Entry(tuple(tensor.shape), dtype)
