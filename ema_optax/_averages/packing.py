"""Packs small leaves of a tree side by side into flat buffers, and unpacks them."""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ema_optax._trees import trees

# Bytes of the largest leaf that is packed, from benchmarks/optimizer_step.py: packing
# saves a kernel and a dispatch for each leaf, and copies each byte once more.
SMALL = 64 * 1024
_SPECS = ("sharding", "sharding_names", "out_sharding")  # metadata of Flax's variables


class Group(NamedTuple):
    """Leaves that lie one after the other in one buffer.

    Attributes:
        leaves: Numbers of the leaves, placeholders counted, as in `trees.flatten`.
        shapes: Shapes of the leaves.
    """

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


class Layout(NamedTuple):
    """Where each leaf of a tree lies; hashable.

    Attributes:
        structure: Structure of the tree; placeholders count as leaves.
        groups: Leaves that share a buffer. The others lie apart, in their order.
    """

    structure: Any
    groups: tuple[Group, ...]

    def apart(self) -> list[int]:
        """Lists the numbers of the leaves that are in no group."""
        packed = {i for group in self.groups for i in group.leaves}
        return [i for i in range(self.structure.num_leaves) if i not in packed]


class Packed:
    """A tree whose small leaves lie in flat buffers: a pytree node of few leaves.

    Attributes:
        flat: One array of one dimension for each group of the layout.
        apart: The other leaves, placeholders among them.
        layout: Where each leaf lies.
    """

    def __init__(self, flat: Any, apart: Any, layout: Layout) -> None:
        self.flat, self.apart, self.layout = flat, apart, layout

    def __repr__(self) -> str:
        return f"Packed(flat={self.flat!r}, apart={self.apart!r})"

    def __reduce__(self) -> Any:  # a structure with custom nodes cannot be pickled
        numbers = range(self.layout.structure.num_leaves)
        skeleton = jax.tree.unflatten(self.layout.structure, numbers)
        return _unpickle, (self.flat, self.apart, skeleton, self.layout.groups)

    def tree(self) -> Any:
        """Unpacks the tree; where the buffers are abstract, its leaves are."""
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
        """Unpacks the tree with abstract leaves: no array is cut.

        It is for comparing trees.
        """
        flat = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.flat)
        return Packed(flat, self.apart, self.layout).tree()

    def columns(self) -> list[tuple[Any, tuple[int, ...]]]:
        """Lists each array that is folded, with the numbers of the leaves in it."""
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
        """Replaces the arrays, in the order of `columns`."""
        flat, rest = arrays[: len(self.flat)], iter(arrays[len(self.flat) :])
        apart = [x if trees.is_placeholder(x) else next(rest) for x in self.apart]
        return Packed(tuple(flat), tuple(apart), self.layout)


def check_can_pack(params: Any) -> None:
    """Refuses params whose leaves carry what packing would lose.

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
        metadata = node.get_metadata() if hasattr(node, "get_metadata") else {}
        if any(metadata.get(key) is not None for key in _SPECS):
            raise ValueError(
                "pack_small keeps no partition specs, which Flax's variables have here "
                "(with_partitioning): shadows would lie whole on every device. Leave "
                "pack_small out."
            )


def plan(tree: object, kinds: Sequence[Hashable | None]) -> Layout:
    """Plans a layout in which small leaves of one kind share a buffer.

    Args:
        tree: A tree of arrays and placeholders.
        kinds: For each leaf, placeholders counted, a value that leaves of one buffer
            have in common, such as dtype and devices; None for leaves to keep apart.
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
    """Packs a tree in a layout.

    All leaves may have the same further axes in front: those of a state that is
    stacked, as under `jax.vmap`, or replicated.

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
    """Joins arrays of any shapes into one flat array, in a dtype that fits all."""
    flat = [jnp.ravel(leaf) for leaf in leaves]
    if any(isinstance(leaf, Tracer) for leaf in flat):
        # In one kernel: jnp.concatenate joins sixteen at a time.
        dtype = jnp.result_type(*flat)
        return jax.lax.concatenate([leaf.astype(dtype) for leaf in flat], 0)
    return jnp.concatenate(flat)


def unpacked(node: Any) -> Any:
    """Unpacks a shadow, or each shadow of a dict; others are returned as they are."""
    if isinstance(node, Packed):
        return node.tree()
    if _is_dict_of_packed(node):
        return {name: value.tree() for name, value in node.items()}
    return node


def packed_like(value: Any, node: Any) -> Any:
    """Packs a tree, or each tree of a dict, as `node` is packed.

    Args:
        value: A tree, or where `node` is a dict of packed trees, a dict of trees; None
            is returned as it is.
        node: A shadow, or a dict of shadows. Where it is not packed, the value is
            returned as it is.
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
    front = jnp.shape(flat)[:-1]  # axes of a state that is stacked or replicated
    if front:
        size = math.prod(shape)
        return jnp.reshape(flat[..., start : start + size], (*front, *shape))
    # With a traced start, it is compiled once for each shape, not for each place.
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
