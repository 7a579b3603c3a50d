"""Small leaves of a tree side by side in flat buffers, and the tree that they are."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ema_optax._trees import trees

# Bytes of the largest leaf that is packed. From benchmarks/optimizer_step.py: what a
# kernel and a dispatch for each leaf cost is saved, and each byte is copied once more.
SMALL = 64 * 1024
_SPECS = ("sharding", "sharding_names", "out_sharding")  # of Flax's variables


class Group(NamedTuple):
    """Leaves that lie one after the other in one buffer.

    Attributes:
        leaves: Their numbers, placeholders counted, as `trees.flatten` does.
        shapes: Their shapes.
    """

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


class Layout(NamedTuple):
    """Where each leaf of a tree lies; hashable.

    Attributes:
        structure: Of the tree; placeholders count as leaves.
        groups: Those that share a buffer. The others lie apart, in their order.
    """

    structure: Any
    groups: tuple[Group, ...]

    def apart(self) -> list[int]:
        """Returns the numbers of the leaves that are in no group."""
        packed = {i for group in self.groups for i in group.leaves}
        return [i for i in range(self.structure.num_leaves) if i not in packed]


class Packed:
    """A tree whose small leaves lie in flat buffers: a pytree node of few leaves.

    Attributes:
        flat: One array of one dimension for each group of the layout.
        apart: The other leaves, placeholders among them.
        layout: Which is which.
    """

    def __init__(self, flat: Any, apart: Any, layout: Layout) -> None:
        self.flat, self.apart, self.layout = flat, apart, layout

    def __repr__(self) -> str:
        return f"Packed(flat={self.flat!r}, apart={self.apart!r})"

    def __reduce__(self) -> Any:  # a structure with nodes of its own cannot be pickled
        numbers = range(self.layout.structure.num_leaves)
        skeleton = jax.tree.unflatten(self.layout.structure, numbers)
        return _unpickle, (self.flat, self.apart, skeleton, self.layout.groups)

    def tree(self) -> Any:
        """Returns the tree, with arrays for what is packed; or abstract ones."""
        leaves: list[Any] = [None] * self.layout.structure.num_leaves
        for i, leaf in zip(self.layout.apart(), self.apart, strict=True):
            leaves[i] = leaf
        for group, flat in zip(self.layout.groups, self.flat, strict=True):
            start = 0
            for i, shape in zip(group.leaves, group.shapes, strict=True):
                leaves[i] = _part(flat, start, shape)
                start += math.prod(shape)
        return jax.tree.unflatten(self.layout.structure, leaves)

    def outline(self) -> Any:
        """Returns the tree with shapes and dtypes for what is packed: no array is cut.

        What only compares trees takes this one.
        """
        flat = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.flat)
        return Packed(flat, self.apart, self.layout).tree()

    def columns(self) -> list[tuple[Any, tuple[int, ...]]]:
        """Returns each array that is folded, and the leaves that lie in it."""
        groups = [group.leaves for group in self.layout.groups]
        return [
            *zip(self.flat, groups, strict=True),
            *(
                (leaf, (i,))
                for i, leaf in zip(self.layout.apart(), self.apart, strict=True)
                if not trees.is_placeholder(leaf)
            ),
        ]

    def with_columns(self, arrays: Sequence[Any]) -> "Packed":
        """Returns the same with other arrays, in the order of `columns`."""
        flat, rest = arrays[: len(self.flat)], iter(arrays[len(self.flat) :])
        apart = [x if trees.is_placeholder(x) else next(rest) for x in self.apart]
        return Packed(tuple(flat), tuple(apart), self.layout)


def check_can_pack(params: Any) -> None:
    """Refuses params whose packed shadow would lose what is known of each leaf.

    Raises:
        ValueError: If they are Optax's stand-in for params, or Flax's variables that
            say how they are sharded.
    """
    if type(params).__module__.startswith("optax."):
        raise ValueError(
            "pack_small keeps the shadows of several params in one array: "
            "optax.tree.map_params cannot tell whose it is. Leave pack_small out."
        )
    nodes = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "get_metadata"))
    for node in nodes:
        known = node.get_metadata() if hasattr(node, "get_metadata") else {}
        if any(known.get(key) is not None for key in _SPECS):
            raise ValueError(
                "pack_small keeps no partition specs, which Flax's variables have here "
                "(with_partitioning): shadows would lie whole on every device. Leave "
                "pack_small out."
            )


def plan(tree: object, kinds: Sequence[Hashable | None]) -> Layout:
    """Returns a layout in which small leaves of one kind share a buffer.

    Args:
        tree: Of arrays and placeholders.
        kinds: For each leaf, placeholders counted, what those that share a buffer have
            in common, such as dtype and devices; None for those that share none.
    """
    _, leaves, structure = trees.flatten(tree)
    members: dict[Hashable, list[int]] = {}
    for i, (leaf, kind) in enumerate(zip(leaves, kinds, strict=True)):
        if kind is not None and not trees.is_placeholder(leaf):
            size = math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize
            if 0 < size <= SMALL:
                members.setdefault(kind, []).append(i)
    groups = [
        Group(tuple(numbers), tuple(tuple(jnp.shape(leaves[i])) for i in numbers))
        for numbers in members.values()
        if len(numbers) > 1
    ]
    return Layout(structure, tuple(groups))


def pack(tree: object, layout: Layout) -> Packed:
    """Returns a tree in a layout.

    Leaves may all have the same further axes in front: of a state that is stacked, as
    under `jax.vmap`, or replicated.

    Raises:
        ValueError: If the tree has another structure, or leaves of other shapes.
    """
    leaves = layout.structure.flatten_up_to(tree)
    flat = [_joined([leaves[i] for i in g.leaves], g.shapes) for g in layout.groups]
    return Packed(tuple(flat), tuple(leaves[i] for i in layout.apart()), layout)


def _joined(leaves: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> jax.Array:
    front = jnp.shape(leaves[0])[: jnp.ndim(leaves[0]) - len(shapes[0])]
    for leaf, shape in zip(leaves, shapes, strict=True):
        if jnp.shape(leaf) != (*front, *shape):
            raise ValueError(
                f"A leaf of shape {jnp.shape(leaf)} takes the place of one of "
                f"{(*front, *shape)} in a shadow that is packed (pack_small=True): its "
                "neighbours would get its values. Start with optimizer.init(params)."
            )
    if not front:
        return concatenated(leaves)
    return jnp.concatenate([jnp.reshape(x, (*front, -1)) for x in leaves], axis=-1)


def concatenated(leaves: Sequence[Any]) -> jax.Array:
    """Returns arrays of any shapes as one of one dimension, of a dtype they all fit."""
    flat = [jnp.ravel(leaf) for leaf in leaves]
    if any(isinstance(leaf, Tracer) for leaf in flat):
        # One kernel: jnp's own goes by sixteens.
        dtype = jnp.result_type(*flat)
        return jax.lax.concatenate([leaf.astype(dtype) for leaf in flat], 0)
    return jnp.concatenate(flat)


def unpacked(node: Any) -> Any:
    """Returns what may be packed, or a dict of it, as trees."""
    if isinstance(node, Packed):
        return node.tree()
    if _is_dict_of_packed(node):
        return {name: value.tree() for name, value in node.items()}
    return node


def packed_like(value: Any, node: Any) -> Any:
    """Returns a tree, or a dict of trees, packed as `node` is; None as it is.

    Args:
        value: A tree, or where `node` is a dict of packed trees, a dict of trees.
        node: What may be packed. Where it is not, the value is returned as it is.
    """
    if isinstance(value, Packed) or value is None:
        return value
    if isinstance(node, Packed):
        return pack(value, node.layout)
    if _is_dict_of_packed(node) and set(value) == set(node):
        return {name: packed_like(tree, node[name]) for name, tree in value.items()}
    return value


def _is_dict_of_packed(node: object) -> bool:
    return isinstance(node, dict) and any(isinstance(v, Packed) for v in node.values())


def _part(flat: Any, start: int, shape: tuple[int, ...]) -> Any:
    if isinstance(flat, jax.ShapeDtypeStruct):
        shape = (*flat.shape[:-1], *shape)
        return jax.ShapeDtypeStruct(shape, flat.dtype, sharding=flat.sharding)
    front = jnp.shape(flat)[:-1]  # of a state that is stacked or replicated
    if front:
        size = math.prod(shape)
        return jnp.reshape(flat[..., start : start + size], (*front, *shape))
    # Compiled once for each shape, not for each place.
    return _sliced(flat, start, shape)


@functools.partial(jax.jit, static_argnums=2)
def _sliced(flat: jax.Array, start: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(flat, (start,), (math.prod(shape),)).reshape(shape)


def _unpickle(flat: Any, apart: Any, skeleton: Any, groups: Any) -> Packed:
    return Packed(flat, apart, Layout(trees.flatten(skeleton)[2], groups))


def _flatten_with_keys(node: Packed) -> Any:
    keys = (jax.tree_util.GetAttrKey("flat"), jax.tree_util.GetAttrKey("apart"))
    return list(zip(keys, (node.flat, node.apart), strict=True)), node.layout


def _unflatten(layout: Layout, children: Any) -> Packed:
    flat, apart = children
    return Packed(flat, apart, layout)


jax.tree_util.register_pytree_with_keys(
    Packed,
    _flatten_with_keys,
    _unflatten,
    lambda node: ((node.flat, node.apart), node.layout),
)
