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
    """Marks the rows of a joined array that become one of several arrays."""

    axis: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """Makes one array of others, and knows its shape from theirs alone.

    In this order: a part of each source is taken, sources are stacked into members, the
    axes of members are rearranged, one place of a stack is taken, and members joined.

    Attributes:
        sources: Names, or paths, of the arrays that the result is made of.
        shapes: Shapes of the sources.
        shape: Shape of the result.
        part: The part that is taken of each source.
        counts: Lengths of the stacked axes; each member has a source for each place.
        pattern: Pattern of `einops.rearrange`, or None for axes as they lie.
        sizes: Sizes of axes in the pattern.
        index: The place on the first axes that is taken.
        axis: Axis that members are joined along, or None for one member.
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
        """Makes the array; a view where nothing is stacked or joined.

        Args:
            arrays: The sources in order, of their shapes, all of one dtype.

        Raises:
            ValueError: If shapes or dtypes are others.
        """
        pieces = [np.asarray(array) for array in arrays]
        if tuple(array.shape for array in pieces) != self.shapes:
            raise ValueError(
                f"{some(self.sources)} have the shapes {some(map(str, self.shapes))}, "
                f"got arrays of {some(str(array.shape) for array in pieces)}."
            )
        dtypes = {array.dtype.name: name for array, name in zip(pieces, self.sources)}  # noqa: B905
        if len(dtypes) > 1:
            listed = ", ".join(f"'{name}' is {kind}" for kind, name in dtypes.items())
            raise ValueError(
                f"Arrays that become one are of one dtype: {listed}. Convert them "
                "first."
            )
        if self.part is not None:
            pieces = [_taken(array, self.part) for array in pieces]
        if self.counts:
            size = math.prod(self.counts)
            pieces = [
                np.stack(pieces[at : at + size]).reshape(
                    *self.counts, *pieces[at].shape
                )
                for at in range(0, len(pieces), size)
            ]
        if self.pattern is not None:
            pieces = [rearranged(array, self.pattern, self.sizes) for array in pieces]
        pieces = [array[self.index] for array in pieces]
        return (
            pieces[0] if self.axis is None else np.concatenate(pieces, axis=self.axis)
        )

    def __str__(self) -> str:
        """Lists the steps, in words for a table; `""` for none."""
        steps = []
        if self.part is not None:
            steps.append(f"[{self.part.start}:{self.part.stop}] of {self.part.axis}")
        if self.counts:
            steps.append(f"stack {'×'.join(map(str, self.counts))}")
        if self.pattern is not None:
            sizes = "".join(f", {name}={size}" for name, size in self.sizes.items())
            steps.append(f"{self.pattern}{sizes}")
        if self.index:
            steps.append(f"[{','.join(map(str, self.index))}]")
        if self.axis is not None:
            steps.append(f"join {len(self.members())} on {self.axis}")
        return "; ".join(steps)

    def members(self) -> list[tuple[int, ...]]:
        """Returns the shapes of the members, before any are joined.

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
        without_axis = [_with_axis(shape, axis, 0) for shape in shapes]
        if any(rest != without_axis[0] for rest in without_axis):
            raise ValueError(
                f"what is joined along axis {self.axis} differs elsewhere: "
                f"{some(map(str, shapes), 8)}"
            )
        return _with_axis(shapes[0], axis, sum(shape[axis] for shape in shapes))


def rearranged(array: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Rearranges the axes of an array by an einops pattern; a view where possible.

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
    """Returns the shape that a pattern turns a shape into.

    Raises:
        ModuleNotFoundError: If einops is not installed.
        ValueError: If the pattern does not fit the shape.
    """
    # Without memory: one byte, whatever the shape.
    stand_in = np.broadcast_to(np.zeros((), np.bool_), tuple(shape))
    return rearranged(stand_in, pattern, sizes).shape


def checked_axis(axis: int, shape: Shape) -> int:
    """Counts an axis from the first, also where `axis` is negative.

    Raises:
        ValueError: If the shape does not have it.
    """
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is none of the shape {tuple(shape)}")
    return axis % len(shape)


def parts(
    shape: Shape, axis: int, count: int, lengths: Sequence[int] | None
) -> list[Part]:
    """Splits an axis of a joined array into parts, equal ones or by lengths.

    Raises:
        ValueError: If the axis does not split so.
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
