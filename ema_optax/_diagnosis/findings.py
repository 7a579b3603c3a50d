"""The result of a diagnosis: findings and their figures, as text and as JSON."""

# pyright: strict

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from ema_optax._messages.text import one_line

Severity: TypeAlias = Literal["problem", "warning", "note"]
Figures: TypeAlias = Mapping[str, Any]

_ORDER: Mapping[str, int] = {"problem": 0, "warning": 1, "note": 2}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Names one cause, its figures, and what to do.

    Attributes:
        what: Key of the cause, such as `"initial_weight"` or `"lag"`.
        severity: `"problem"` where the average is not what was meant, `"warning"` where
            it is likely worse than it could be, `"note"` for what is good to know.
        sentence: The observation, with its figures.
        remedy: What to do.
        figures: Numbers by name.
        shadow: Name of the shadow; empty for a shadow without a name.
    """

    what: str
    severity: Severity
    sentence: str
    remedy: str
    figures: Figures = dataclasses.field(default_factory=dict[str, Any])
    shadow: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Holds all findings on the averages of a state; print it to read them.

    Attributes:
        findings: The findings, the worst first; empty where nothing is wrong.
        figures: Figures of each shadow, by its name: decay, every, count,
            initial_weight, mean_age, effective_size, distance and others, where known.
        evaluated: The evaluated points s + λ(p − s) of each shadow, by its name: `at`
            (λ), `value`, `standard_error` and `problem`.
        unchecked: Checks that were not possible, and why.
    """

    findings: tuple[Finding, ...]
    figures: Mapping[str, Figures]
    evaluated: Mapping[str, tuple[Figures, ...]] = dataclasses.field(
        default_factory=dict[str, tuple[Figures, ...]]
    )
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Writes the figures of each shadow, then each finding and its remedy."""
        lines: list[str] = []
        for name, figures in self.figures.items():
            lines.append(f"{_called(name)}: {_summary(figures)}")
            if points := self.evaluated.get(name):
                along = ", ".join(map(_point, points))
                lines.append(f"  along s + λ(p − s), λ: {along}")
        several = len(self.figures) > 1
        for finding in self.findings:
            whose = f" of {_called(finding.shadow)}" if several else ""
            sentence = one_line(finding.sentence, None)
            lines.append(f"{finding.severity}{whose}: {sentence}")
            lines.append(f"  → {one_line(finding.remedy, None)}")
        if not self.findings:
            lines.append(
                "nothing found in what was looked at"
                if self.unchecked
                else "nothing found: the average is what it was meant to be"
            )
        lines += [f"not looked at: {one_line(why, None)}" for why in self.unchecked]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Returns a JSON object of all fields; numbers that are not finite are null."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=2)


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sorts findings, the worst first; the order within a severity stays."""
    return tuple(sorted(findings, key=lambda finding: _ORDER[finding.severity]))


def percent(share: float) -> str:
    """Returns a share of one in percent, to three digits.

    >>> percent(0.90483), percent(3e-6), percent(1.0)
    ('90.5 %', '< 0.001 %', '100 %')
    """
    if 0 < share < 1e-5:
        return "< 0.001 %"
    digits = np.format_float_positional(
        100 * share, precision=3, fractional=False, trim="-"
    )
    return f"{digits} %"


def number(value: float) -> str:
    """Returns a number of updates or params, to three digits.

    >>> number(9999.4), number(1.44)
    ('9,999', '1.44')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _called(name: str) -> str:
    return f"shadow {one_line(name)!r}" if name else "shadow"


def _summary(figures: Figures) -> str:
    parts = [one_line(figures["decay"] or "decay not recorded")]
    if (every := figures["every"]) is not None and every > 1:
        parts.append(f"every {every:,} updates")
    parts.append(f"{figures['count']:,} updates seen")
    if (age := figures.get("mean_age")) is not None:
        size, initial = figures["effective_size"], figures["initial_weight"]
        parts.append(f"mean age {number(age)}")
        parts.append(f"effective size {number(size)}")
        parts.append(f"{percent(initial)} initial params")
    if (distance := figures.get("distance")) is not None:
        parts.append(f"distance to the params {distance:.3g}")
    return ", ".join(parts)


def _point(point: Figures) -> str:
    value, error = point["value"], point["standard_error"]
    if point["problem"]:
        return f"{point['at']:g}: {one_line(point['problem'], 80)}"
    noise = "" if error is None else f" ± {error:.2g}"
    return f"{point['at']:g}: {value:.6g}{noise}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, Any]", value)
        return {key: _plain(inner) for key, inner in mapping.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in cast("list[Any]", value)]
    # JSON has neither NaN nor infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
