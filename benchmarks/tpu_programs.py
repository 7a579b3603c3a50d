"""What a compiled TPU program does to memory, read from its scheduled text.

XLA's own `bytes accessed` counts an array once when it is fetched into VMEM ahead of
its use and again where it is used. Here only what lies in HBM or on the host counts.
"""

import collections
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Instructions that move nothing: they name what is there, or become part of others.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "opt-barrier", "add-dependency", "partition-id", "replica-id"),
)
_MOVES = "copy", "slice", "dynamic-slice"  # read as many bytes as they write
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_MEMORIES = {None: "hbm", "0": "hbm", "5": "host"}  # S(1) is VMEM, S(2) a semaphore


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        type: Of the result: an array such as `f32[8]{0:T(256)S(1)}`, or a tuple.
        opcode: Such as `fusion`.
        operands: Their names.
        rest: Operands and attributes as text.
    """

    type: str
    opcode: str
    operands: list[str]
    rest: str


def work(text: str) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Counts what a program does where it does most, and where it does least.

    The two differ where it has conditionals, of which they take the dearest and the
    cheapest branch, or loops of unknown length, which run once and not at all.

    Args:
        text: `jax.stages.Compiled.as_text()` of a program for TPUs.

    Returns:
        Counters of bytes read and written in `hbm` and on the `host`, of `kernels`, and
        of each collective by its name.
    """
    computations, entry = _parsed(text)
    return _Program(computations, max).work(entry), _Program(computations, min).work(
        entry
    )


class _Program:
    """The computations of a program, and which of several branches is taken."""

    def __init__(
        self, computations: dict[str, dict[str, Instruction]], choose: Callable
    ) -> None:
        self._computations, self._choose = computations, choose

    @functools.cache  # noqa: B019 lives as long as one call of `work`
    def work(self, name: str) -> collections.Counter[str]:
        """Counts what a scheduled computation does."""
        lines = self._computations[name]
        total = collections.Counter()
        for line in lines.values():
            called = _called(line)
            if line.opcode == "conditional":
                total += self._choose(map(self.work, called), key=_cost)
            elif line.opcode == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest)
                rounds = int(known[1]) if known else self._choose(0, 1)
                total += _times(rounds, self.work(called[-1]))
            elif line.opcode == "call":
                total += self.work(called[0])
            elif line.opcode not in _FREE:
                total += self._collectives(line)
                total += self._moved(line, lines)
        return total

    def _collectives(self, line: Instruction) -> collections.Counter[str]:
        """Counts those of an instruction and of what is fused into it."""
        if line.opcode.removesuffix("-start") in COLLECTIVES:
            return collections.Counter([line.opcode.removesuffix("-start")])
        inner = (self._computations[name].values() for name in _called(line))
        return sum(
            (self._collectives(each) for lines in inner for each in lines),
            collections.Counter(),
        )

    def _moved(
        self, line: Instruction, lines: dict[str, Instruction]
    ) -> collections.Counter[str]:
        """Counts the bytes that an instruction reads and writes, and whether it works.

        What is asynchronous counts where it is done, with the type of its result.
        """
        written = _arrays(line.type)
        if line.opcode.endswith(("-start", "-update")) or not written:
            return collections.Counter()
        if "ConcatBitcast" in line.rest:  # pieces of a prefetch, seen as one array
            return collections.Counter()
        start = line
        while start.opcode.endswith(("-done", "-update")):
            start = lines[start.operands[0]]
        read = [_arrays(lines[name].type) for name in start.operands]
        if start.opcode.removesuffix("-start") in _MOVES:
            read = [[(read[0][0][0], written[0][1])]]
        if start.opcode == "fusion":
            inner = self._computations[_called(start)[0]]
            read = [_used(inner, i, arrays) for i, arrays in enumerate(read)]
        total = collections.Counter(kernels=int(line is start))
        for memory, size in [*itertools.chain(*read), *written]:
            total[memory] += size
        return total


def _parsed(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the instructions of each computation by name, and the entry's name."""
    computations, entry, lines = {}, "", {}
    for row in text.splitlines():
        if head := _HEAD.match(row):
            lines = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(row):
            name, kind, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", re.split(r"\), \w+=", rest)[0])
            lines[name] = Instruction(kind, opcode, operands, rest)
    return computations, entry


def _called(line: Instruction) -> list[str]:
    """Returns the computations that an instruction calls, in their order."""
    groups = re.findall(
        r"\b(?:\w*computations?|calls|to_apply|condition|body)=\{?((?:%[\w.\-]+,? ?)+)",
        line.rest,
    )
    return re.findall(r"%([\w.\-]+)", " ".join(groups))


def _used(
    inner: dict[str, Instruction], number: int, arrays: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Returns what a fusion reads of an operand: its slices, if it only cuts it."""
    names = {
        name
        for name, line in inner.items()
        if line.opcode == "parameter" and line.rest.startswith(f"{number})")
    }
    users = [line for line in inner.values() if names & set(line.operands)]
    cut = all(line.opcode in _MOVES for line in users)
    if not arrays or not users or not cut:
        return arrays
    sizes = (size for line in users for _, size in _arrays(line.type))
    return [(arrays[0][0], sum(sizes))]


def _arrays(kind: str) -> list[tuple[str, int]]:
    """Returns memory and bytes of each array in a type, scalars left out."""
    found = []
    for dtype, shape, layout in _ARRAY.findall(kind):
        if shape:
            bits = int(re.sub(r"\D", "", dtype) or 8)
            space = re.search(r"S\((\d+)\)", layout)
            memory = _MEMORIES.get(space and space[1], "vmem")
            size = math.prod(map(int, shape.split(","))) * bits // 8
            found.append((memory, size))
    return found


def _times(rounds: int, each: collections.Counter[str]) -> collections.Counter[str]:
    return collections.Counter({key: rounds * value for key, value in each.items()})


def _cost(total: collections.Counter[str]) -> tuple[int, int]:
    return total["hbm"] + total["host"], total["kernels"]
