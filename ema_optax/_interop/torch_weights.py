"""Separates the tensors of a source into raw weights and average."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import PurePath

from ema_optax._interop import torch_finding, torch_layouts
from ema_optax._interop.torch_files import Entry, Tensors
from ema_optax._interop.torch_layouts import Layout
from ema_optax._trees import trees

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


@dataclasses.dataclass(frozen=True)
class Weights:
    """Holds the tensors of one model in a file.

    Attributes:
        tensors: All tensors of the file.
        names: Names of the model's tensors → names in the file.
        where: Place of the model's tensors, in words.
        wrapper: Prefix that was taken off all names.
    """

    tensors: Tensors
    names: Mapping[str, str]
    where: str
    wrapper: str

    @property
    def entries(self) -> dict[str, Entry]:
        """The tensors, by the model's names."""
        return {name: self.tensors.entries[full] for name, full in self.names.items()}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Holds raw weights and average; one of the two may be missing.

    Attributes:
        raw: The raw weights.
        average: The average.
        layout: Layout of the source.
        average_layout: Layout of the file with the average.
    """

    raw: Weights | None
    average: Weights | None
    layout: Layout
    average_layout: Layout

    def __iter__(self) -> Iterator[Weights]:
        """Yields raw weights and average, each where there is one."""
        yield from (x for x in (self.raw, self.average) if x is not None)

    @property
    def main(self) -> Weights:
        """The raw weights, or the average where that is alone."""
        weights = self.raw or self.average
        assert weights is not None  # each layout has one of the two
        return weights


def pair_of(
    own: Tensors,
    beside: Tensors | None,
    *,
    params: str | None,
    shadow: str | None,
    layout: str | None,
) -> Pair:
    """Pairs the raw weights of a source with their average.

    Args:
        own: Tensors of the source.
        beside: Tensors of the file with the average, where that is another.
        params: Where the raw weights are, as `import_checkpoint` takes it.
        shadow: Where the average is.
        layout: Name of the source's layout.

    Raises:
        ValueError: If raw weights and average cannot be told apart, or differ in names
            or shapes.
    """
    if layout is not None and (params is not None or shadow is not None):
        raise ValueError(
            f"layout={layout!r} says where raw weights and average are, and so do "
            "params and shadow. Pass one or the other."
        )
    if beside is None:
        own_layout = _layout(own, params, shadow, layout)
        raw, average = _split(own, own_layout)
        pair = Pair(raw, average, own_layout, own_layout)
    else:
        own_layout = _layout(own, params, None, layout)
        raw, average = _split(own, own_layout)
        if raw is None or average is not None:
            raise ValueError(
                f"{own.origin} has an average of its own, {own_layout.what}, and so "
                f"has {beside.origin}. Say which are the raw weights, params="
                f'"{own_layout.params or "**"}", or import {own.origin} alone.'
            )
        average_layout = _layout(beside, None, shadow, None)
        # A file beside raw weights that has one set of tensors has the average.
        only, average = _split(beside, average_layout)
        pair = Pair(raw, average or only, own_layout, average_layout)
    _check_alike(pair)
    return pair


def _layout(
    tensors: Tensors, params: str | None, shadow: str | None, name: str | None
) -> Layout:
    if params is None and shadow is None:
        return torch_finding.find_layout(tensors, name)
    return torch_finding.make_layout(tensors, params, shadow)


def _split(tensors: Tensors, layout: Layout) -> tuple[Weights | None, Weights | None]:
    raw = average = None
    if layout.params is not None:
        names = torch_layouts.names_of(tensors, layout.params)
        if layout.split is None:
            raw = _weights(tensors, names, layout.params)
        else:
            names, others = layout.split(tensors, names)
            raw = _weights(tensors, names, layout.params)
            return raw, _weights(tensors, others, str(layout.shadow))
    if layout.shadow is not None:
        names = torch_layouts.names_of(tensors, layout.shadow)
        average = _weights(tensors, names, layout.shadow)
    return raw, average


def _weights(tensors: Tensors, names: Mapping[str, str], pattern: str) -> Weights:
    wrapper = ""
    while True:
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) and name != prefix for name in names):
                wrapper += prefix
                names = {name.removeprefix(prefix): x for name, x in names.items()}
                break
        else:
            break
    file = PurePath(tensors.origin).name
    where = file if pattern == "**" else f"{pattern} of {file}"
    return Weights(tensors, names, where, wrapper)


def _check_alike(pair: Pair) -> None:
    """Refuses raw weights and average of different names or shapes."""
    if pair.raw is None or pair.average is None:
        return
    average, raw = pair.average.entries, pair.raw.entries
    if pair.average_layout.is_partial:
        raw = {name: x for name, x in raw.items() if name in average}
    difference = trees.difference(average, raw, ("average", "raw weights"))
    if difference:
        raise ValueError(
            f"The average, {pair.average.where}, and the raw weights, {pair.raw.where},"
            f" are not of one model: {difference}."
        )
