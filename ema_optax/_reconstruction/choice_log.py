"""The evaluations of a choice in a file, so that a run that stopped goes on.

Lines of JSON: what is chosen from first, then one for each evaluation, written with one
call and synced. A line that was cut off by a crash is dropped. The file holds no code.
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
_LARGEST = 2**26  # bytes that are read


class Entry(NamedTuple):
    """An evaluation: what was tried, and its score, or why there is none."""

    over: str
    value: Value
    score: Score | None
    failure: str | None


class Log:
    """The file of one choice.

    Attributes:
        entries: What it held when it was opened.
    """

    def __init__(self, file: object, sources: Mapping[str, str]) -> None:
        """Opens a file, or begins it.

        Args:
            file: Its path, on this machine.
            sources: A fingerprint of what each name is chosen from.

        Raises:
            OSError: If it cannot be read or written.
            ValueError: If it is the log of another choice, or none.
        """
        self._file = arguments.local_file(file, "log", "choice.jsonl")
        head = _line({_KIND: 1, "sources": dict(sources)})
        content = _content(self._file)
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and head.startswith(content):  # nothing, or a part of its head
            self._write(head, keep=0)
            self.entries: list[Entry] = []
            return
        first, *others = [_parsed(line) for line in whole.splitlines()] or [None]
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
        if len(whole) < len(content):
            self._write(b"", keep=len(whole))

    def append(self, entry: Entry) -> None:
        """Writes an evaluation at the end."""
        score = entry.score
        said: dict[str, Any] = {"over": entry.over, "value": entry.value}
        if score is not None:
            said |= {"score": score.value, "error": score.error}
            said |= {"samples": score.samples} if score.samples else {}
        else:
            said["failure"] = entry.failure
        self._write(_line(said))

    def _write(self, line: bytes, keep: int | None = None) -> None:
        """Writes a line at the end, of the first `keep` bytes where that is given."""
        if jax.process_index() != 0:
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
        return Entry(over, value, _of(samples), None) if _are(samples) else None
    if not _is_number(score) or (error is not None and not _is_number(error)):
        return None
    if error is not None and error < 0:
        return None
    return Entry(over, value, Score(score, error), None)


def _of(samples: Sequence[float]) -> Score:
    return of_samples([float(x) for x in samples])


def _are(samples: Sequence[object]) -> bool:
    return len(samples) > 1 and all(map(_is_number, samples))


def _is_number(value: object) -> TypeGuard[int | float]:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
