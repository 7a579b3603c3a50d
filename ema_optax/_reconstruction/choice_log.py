"""The log of a choice: its evaluations in a file, from which a stopped run goes on.

The first line of JSON says what is chosen from. Each evaluation adds a line, written
with one call and synced. A line that a crash cut off is dropped.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax

from ema_optax._messages import arguments
from ema_optax._reconstruction.scores import Score, of_samples
from ema_optax._reconstruction.searching import Value

_KIND = "ema_optax.choose"
_LARGEST = 2**26  # bytes; a larger file is no log of evaluations


class Entry(NamedTuple):
    """One evaluation: the value that was tried, and its score or its failure."""

    over: str
    value: Value
    score: Score | None
    failure: str | None


class Log:
    """The file of one choice.

    Attributes:
        entries: Evaluations that the file held when it was opened.
    """

    def __init__(self, file: object, sources: Mapping[str, str]) -> None:
        """Opens a log, or begins one.

        Args:
            file: Path on this machine.
            sources: For each name that is searched, the fingerprint of its trees.

        Raises:
            OSError: If it cannot be read or written.
            ValueError: If it is the log of another choice, or no log.
        """
        self._file = arguments.local_file(file, "log", "choice.jsonl")
        head = _line({_KIND: 1, "sources": dict(sources)})
        content = _content(self._file)
        complete = content[: content.rfind(b"\n") + 1]
        if not complete and head.startswith(content):  # empty, or cut off in its head
            self._write(head, keep=0)
            self.entries: list[Entry] = []
            return
        first, *others = [_parsed(line) for line in complete.splitlines()] or [None]
        if not isinstance(first, dict) or _KIND not in first:
            raise ValueError(
                f"log={str(self._file)!r} is a file of something else, and stays as it "
                "is. Pass one that is not there yet."
            )
        before = first.get("sources")
        if before != dict(sources):
            names = ", ".join(before) if isinstance(before, dict) else "?"
            raise ValueError(
                f"{self._file} is the log of another choice, over {names}: its steps, "
                "their contents, or what is chosen among are others. Pass another "
                "log=…, or remove it."
            )
        self.entries = [
            self._entry(number, content)
            for number, content in enumerate(others, start=2)
        ]
        if len(complete) < len(content):
            self._write(b"", keep=len(complete))

    def append(self, entry: Entry) -> None:
        """Appends an evaluation, and waits until the disk has it."""
        score = entry.score
        fields: dict[str, Any] = {"over": entry.over, "value": entry.value}
        if score is not None:
            fields |= {"score": score.value, "error": score.error}
            fields |= {"samples": score.samples} if score.samples else {}
        else:
            fields["failure"] = entry.failure
        self._write(_line(fields))

    def _write(self, line: bytes, keep: int | None = None) -> None:
        """Appends a line; first cuts the file to `keep` bytes where that is given."""
        if jax.process_index() != 0:  # all processes evaluate; one of them writes
            return
        file = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if keep is not None:
                os.ftruncate(file, keep)
            if os.write(file, line) < len(line):
                raise OSError(f"{self._file} could not be written: the disk is full.")
            os.fsync(file)
        finally:
            os.close(file)

    def _entry(self, number: int, content: object) -> Entry:
        entry = _entry(content)
        if entry is None:
            raise ValueError(
                f"Line {number} of {self._file} is no evaluation of a choice. Remove "
                "the line, or pass another log=…."
            )
        return entry


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _content(file: Path) -> bytes:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return b""
    if not file.is_file() or size > _LARGEST:
        raise ValueError(
            f"log={str(file)!r} is no file of evaluations. Pass one that is not there "
            "yet."
        )
    return file.read_bytes()


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _entry(content: object) -> Entry | None:
    if not isinstance(content, dict):
        return None
    over, value = content.get("over"), content.get("value")
    failure, samples = content.get("failure"), content.get("samples")
    score, error = content.get("score"), content.get("error")
    if not isinstance(over, str) or not (isinstance(value, str) or _is_number(value)):
        return None
    if isinstance(failure, str):
        return Entry(over, value, None, failure)
    if isinstance(samples, list):
        return (
            Entry(over, value, _mean(samples), None) if _are_samples(samples) else None
        )
    if not _is_number(score) or (error is not None and not _is_number(error)):
        return None
    if error is not None and error < 0:
        return None
    return Entry(over, value, Score(score, error), None)


def _mean(samples: Sequence[float]) -> Score:
    return of_samples([float(x) for x in samples])


def _are_samples(samples: Sequence[object]) -> bool:
    return len(samples) > 1 and all(map(_is_number, samples))


def _is_number(value: object) -> TypeGuard[int | float]:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
