"""Moves arrays between a file and a tree: split, stacked, turned, joined."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ema_optax._messages import extras
from ema_optax._messages.text import brief, one_line, some

Shape: TypeAlias = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of an axis, which one of several arrays takes from a joined one."""

    axis: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """How one array is made of others, known by their shapes alone.

    In this order: a part of each is taken, they are stacked, their axes are rearranged,
    one of the stack is taken, and what is left is joined.

    Attributes:
        sources: Names, or paths, of the arrays that it is made of.
        shapes: Theirs.
        shape: What comes out has it.
        part: What is taken of each.
        counts: Lengths of the axes that are stacked, as many sources a member.
        pattern: Of `einops.rearrange`, or None for as they lie.
        sizes: Of axes in the pattern.
        index: Of what is taken, on the first axes.
        axis: That members are joined along, or None for one member.
    """

    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...] = dataclasses.field(init=False)
    part: Part | None = None
    counts: tuple[int, ...] = ()
    pattern: str | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    index: tuple[int, ...] = ()
    axis: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self._planned())

    def __call__(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Returns the array; where nothing is stacked or joined, a view.

        Args:
            arrays: In the order of the sources, of their shapes, all of one dtype.

        Raises:
            ValueError: If they are others.
        """
        left = [np.asarray(array) for array in arrays]
        if tuple(array.shape for array in left) != self.shapes:
            raise ValueError(
                f"{some(self.sources)} have the shapes {some(map(str, self.shapes))}, "
                f"got arrays of {some(str(array.shape) for array in left)}."
            )
        dtypes = {array.dtype.name: name for array, name in zip(left, self.sources)}  # noqa: B905
        if len(dtypes) > 1:
            which = ", ".join(f"'{name}' is {kind}" for kind, name in dtypes.items())
            raise ValueError(
                f"Arrays that become one are of one dtype: {which}. Convert them first."
            )
        if self.part is not None:
            left = [_taken(array, self.part) for array in left]
        if self.counts:
            size = math.prod(self.counts)
            left = [
                np.stack(left[at : at + size]).reshape(*self.counts, *left[at].shape)
                for at in range(0, len(left), size)
            ]
        if self.pattern is not None:
            left = [rearranged(array, self.pattern, self.sizes) for array in left]
        left = [array[self.index] for array in left]
        return left[0] if self.axis is None else np.concatenate(left, axis=self.axis)

    def __str__(self) -> str:
        """Returns what is done, in words for a table; `""` for nothing."""
        done = []
        if self.part is not None:
            done.append(f"[{self.part.start}:{self.part.stop}] of {self.part.axis}")
        if self.counts:
            done.append(f"stack {'×'.join(map(str, self.counts))}")
        if self.pattern is not None:
            sizes = "".join(f", {name}={size}" for name, size in self.sizes.items())
            done.append(f"{self.pattern}{sizes}")
        if self.index:
            done.append(f"[{','.join(map(str, self.index))}]")
        if self.axis is not None:
            done.append(f"join {len(self.members())} on {self.axis}")
        return "; ".join(done)

    def members(self) -> list[tuple[int, ...]]:
        """Returns the shapes of what is joined.

        Raises:
            ValueError: If a step does not fit the shapes.
        """
        shapes = list(self.shapes)
        if self.part is not None:
            length = self.part.stop - self.part.start
            shapes = [_with_axis(s, self.part.axis, length) for s in shapes]
        if self.counts:
            size = math.prod(self.counts)
            for at in range(len(shapes)):
                first = at - at % size
                if shapes[at] != shapes[first]:
                    raise ValueError(
                        f"'{self.sources[first]}' is {shapes[first]} and "
                        f"'{self.sources[at]}' is {shapes[at]}: what is stacked has "
                        "one shape"
                    )
            shapes = [(*self.counts, *shape) for shape in shapes[::size]]
        if self.pattern is not None:
            shapes = [turned(shape, self.pattern, self.sizes) for shape in shapes]
        return [shape[len(self.index) :] for shape in shapes]

    def _planned(self) -> tuple[int, ...]:
        shapes = self.members()
        if self.axis is None:
            return shapes[0]
        axis = checked_axis(self.axis, shapes[0])
        rests = [_with_axis(shape, axis, 0) for shape in shapes]
        if any(rest != rests[0] for rest in rests):
            raise ValueError(
                f"what is joined along axis {self.axis} differs elsewhere: "
                f"{some(map(str, shapes), 8)}"
            )
        return _with_axis(shapes[0], axis, sum(shape[axis] for shape in shapes))


def rearranged(array: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Returns an array with its axes as an einops pattern says, a view if it can.

    Raises:
        ModuleNotFoundError: If einops is not installed.
        ValueError: If the pattern does not fit the array's shape.
    """
    with extras.needed_by("rearrange"):
        import einops
    try:
        return einops.rearrange(array, pattern, **sizes)
    except (einops.EinopsError, RuntimeError, ValueError, TypeError) as error:
        reason = one_line(str(error).strip().split("\n")[-1]).rstrip(".")
        if "infer" in reason:
            reason += '; give them, as in sizes={"h": 12}'
        raise ValueError(
            f"rearrange {brief(pattern, 200)} with sizes {_written(sizes)} and the "
            f"shape {array.shape}: {reason}"
        ) from None


def turned(shape: Shape, pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape that an array of one shape is rearranged to.

    Raises:
        ModuleNotFoundError: If einops is not installed.
        ValueError: If the pattern does not fit the shape.
    """
    # Without memory: one byte, whatever the shape.
    stand_in = np.broadcast_to(np.zeros((), np.bool_), tuple(shape))
    return rearranged(stand_in, pattern, sizes).shape


def checked_axis(axis: int, shape: Shape) -> int:
    """Returns an axis counted from the first.

    Raises:
        ValueError: If the shape does not have it.
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is none of the shape {tuple(shape)}")
    return axis % len(shape)


def parts(
    shape: Shape, axis: int, count: int, lengths: Sequence[int] | None
) -> list[Part]:
    """Returns the parts that a joined array is split into.

    Raises:
        ValueError: If it does not split so.
    """
    axis = checked_axis(axis, shape)
    whole = shape[axis]
    if lengths is None:
        if whole % count:
            raise ValueError(
                f"axis {axis} of the shape {tuple(shape)} does not split into {count} "
                "equal parts; give lengths"
            )
        lengths = [whole // count] * count
    elif sum(lengths) != whole:
        raise ValueError(
            f"lengths {tuple(lengths)} are {sum(lengths)} in all, and axis {axis} of "
            f"the shape {tuple(shape)} is {whole}"
        )
    stops = np.cumsum(lengths).tolist()
    return [Part(axis, b - n, b) for b, n in zip(stops, lengths, strict=True)]


def _taken(array: np.ndarray, part: Part) -> np.ndarray:
    return array[(slice(None),) * part.axis + (slice(part.start, part.stop),)]


def _with_axis(shape: Shape, axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _written(sizes: Mapping[str, int]) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in sizes.items()) + "}"
