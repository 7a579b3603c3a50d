"""Arrays of steps that Orbax wrote for others, of any of its layouts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._checkpoint.errors import CorruptCheckpointError, as_cause
from ema_optax._checkpoint.foreign import (
    Foreign,
    Leaf,
    Node,
    is_too_deep,
    leaf_at,
    leaves_of,
    read_json,
)
from ema_optax._checkpoint.untrusted import refusal
from ema_optax._messages import text
from ema_optax._trees import trees

METADATA = "_METADATA"  # what Orbax writes into the folder of a tree

# Read at once: Orbax reads side by side, and parses the metadata once a call.
_BATCH = 2**25  # bytes


class OrbaxStep(Foreign):
    """The trees of a step; where there are several, below the names of their items."""

    def __init__(
        self, place: epath.Path, items: Sequence[epath.Path], number: int | None
    ) -> None:
        """Reads what arrays there are.

        Args:
            place: The folder of the step.
            items: Those of its trees.
            number: Of the step.

        Raises:
            CorruptCheckpointError: If the metadata are damaged.
            OSError: If they cannot be read.
        """
        names = {item.name: item for item in items} if len(items) > 1 else {}
        # Of each tree: the keys above it, and its folder.
        self._items: dict[tuple[str, ...], epath.Path] = {(): items[0]}
        if names:
            self._items = {(name,): item for name, item in names.items()}
        self._trees = {above: _tree(item, above) for above, item in self._items.items()}
        tree = {name: self._trees[(name,)] for name in names} or self._trees[()]
        super().__init__(str(place), "an Orbax step", number, tree)

    def read(self, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the arrays of some paths; see `Foreign`."""
        wanted = set(paths)
        for above, item in self._items.items():
            here = leaves_of(self._trees[above])
            for batch in _batches([leaf for leaf in here if leaf.path in wanted]):
                yield from self._read(above, item, batch)

    def _read(
        self, above: tuple[str, ...], item: epath.Path, batch: Sequence[Leaf]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Reads some leaves of one tree; the others are placeholders for Orbax."""
        now = {leaf.path for leaf in batch}

        def asked(leaf: Any) -> Any:
            return 0 if isinstance(leaf, Leaf) and leaf.path in now else ...

        tree = jax.tree.map(asked, self._trees[above])
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        handler = ocp.PyTreeCheckpointHandler()
        try:
            args = ocp.args.PyTreeRestore(item=tree, restore_args=how)
            found = handler.restore(item, args=args)
        except (ValueError, OSError, MemoryError, RuntimeError, KeyError) as error:
            names = text.some(repr(leaf.path) for leaf in batch)
            what = f"{item}: {names} cannot be read"
            if isinstance(error, KeyError):
                error = ValueError(f"it has no {error}")
            raise as_cause(error, what) from error
        finally:
            handler.close()
        names, arrays, _ = trees.flatten(found)
        prefix = "".join(f"{name}/" for name in above)
        by_path = {
            f"{prefix}{name}".rstrip("/"): array
            for name, array in zip(names, arrays, strict=True)
            if array is not ...
        }
        for leaf in batch:
            array = np.asarray(by_path[leaf.path])
            if array.shape != leaf.shape or array.dtype.name != leaf.dtype:
                raise CorruptCheckpointError(
                    f"{item}: '{leaf.path}' is {array.dtype}{list(array.shape)}, its "
                    f"metadata say {leaf}."
                )
            yield leaf.path, array


def _batches(leaves: Sequence[Leaf]) -> Iterator[list[Leaf]]:
    batch: list[Leaf] = []
    for leaf in leaves:
        if batch and sum(each.bytes for each in batch) + leaf.bytes > _BATCH:
            yield batch
            batch = []
        batch.append(leaf)
    if batch:
        yield batch


def _tree(item: epath.Path, above: tuple[str, ...]) -> Node:
    """Returns the arrays of an item, nested as Orbax nests them."""
    _check_metadata(item)
    problem = refusal(item, 0)
    if problem:
        raise CorruptCheckpointError(f"{item} is not read: {problem}.")
    handler = ocp.PyTreeCheckpointHandler()
    try:
        found = handler.metadata(item)
    except (ValueError, OSError, MemoryError, RuntimeError, TypeError, KeyError) as e:
        cause = e if isinstance(e, (OSError, MemoryError)) else ValueError(str(e))
        raise as_cause(cause, f"{item} cannot be read") from e
    finally:
        handler.close()

    def nested(node: Any, keys: tuple[str, ...]) -> Node:
        if isinstance(node, Mapping):
            return {str(k): nested(v, (*keys, str(k))) for k, v in node.items()}
        if isinstance(node, (list, tuple)):
            return [nested(v, (*keys, str(i))) for i, v in enumerate(node)]
        shape, dtype = getattr(node, "shape", None), getattr(node, "dtype", None)
        if shape is None or dtype is None:  # nothing, or a text
            return None
        return leaf_at(keys, shape, np.dtype(dtype).name, str(item))

    return nested(getattr(found, "tree", found), above)


def _check_metadata(item: epath.Path) -> None:
    """Refuses metadata that Orbax would recurse into, or read without bound."""
    told = read_json(item / METADATA).get("tree_metadata")
    if not isinstance(told, dict):
        raise CorruptCheckpointError(
            f"{item / METADATA} lists no arrays. If it was copied, copy it again."
        )
    for name, entry in told.items():
        keys = entry.get("key_metadata") if isinstance(entry, dict) else None
        if not isinstance(keys, list) or is_too_deep(keys):
            raise CorruptCheckpointError(
                f"{item / METADATA} has an entry {text.brief(name)} that is none of "
                "Orbax."
            )


def trees_in(folder: epath.Path, entries: Mapping[str, bool]) -> list[epath.Path]:
    """Returns the folders of the trees that a step is or holds."""
    if METADATA in entries:
        return [folder]
    names = [name for name in sorted(entries) if entries[name]]
    found = storage.side_by_side(
        lambda name: METADATA in (storage.listed(folder / name) or {}), names
    )
    return [folder / name for name, good in zip(names, found, strict=True) if good]
