"""Compares shadow and params leaf by leaf: elements stuck, equal or not finite."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ema_optax._diagnosis.findings import Finding, percent
from ema_optax._diagnosis.records import Record
from ema_optax._messages.text import some

_BLOCK = 2**21  # elements in float64 at a time: 16 MiB an array
_MOST = 0.5  # of the elements: from here on the average as a whole is concerned
_NEAR = 2  # ulps: elements nearer to their params need not move

_STATISTICS = (
    {"mean", "var"},  # Flax
    {"running_mean", "running_var"},  # torch, Equinox
    {"moving_mean", "moving_variance"},  # Keras, TensorFlow
)
_COLLECTION = "batch_stats"
_NORM = re.compile(r"(^|/)(batch_?norm(ali[sz]ation)?|bn)_?\d*/", re.IGNORECASE)


@dataclasses.dataclass
class Pairs:
    """Counts elements over the averaged leaves, which are added one at a time.

    Attributes:
        record: How the average was made.
        elements: Real numbers that were added; a complex number is two.
        finite: Elements that are finite in shadow and params.
        apart: Elements that differ between shadow and params.
        stuck: Elements that a fold would not change, though shadow and params differ by
            more than two units in the last place.
        noisy: Elements that are rounded by chance, where shadow and params differ by
            less than half a unit in the last place.
        bad_shadow: Elements that are not finite in the shadow.
        bad_params: Elements that are not finite in the params.
        first_bad: Path of the first leaf with an element that is not finite.
        dtypes: Number of stuck or noisy elements, by the dtype of the shadow's leaf.
    """

    record: Record
    elements: int = 0
    finite: int = 0
    apart: int = 0
    stuck: int = 0
    noisy: int = 0
    bad_shadow: int = 0
    bad_params: int = 0
    first_bad: str | None = None
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)
    _squares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))

    def __post_init__(self) -> None:
        self._weight = self.record.newest_weight

    def add(self, path: str, shadow: np.ndarray, param: np.ndarray) -> None:
        """Adds a leaf of any floating or complex dtype, as shadow and param."""
        shadow, param = (_as_reals(np.asarray(x)).reshape(-1) for x in (shadow, param))
        for start in range(0, shadow.size, _BLOCK):
            end = start + _BLOCK
            self._add(path, shadow[start:end], param[start:end])

    def _add(self, path: str, shadow: np.ndarray, param: np.ndarray) -> None:
        dtype = shadow.dtype
        with np.errstate(over="ignore", invalid="ignore"):
            stored = param.astype(dtype)  # as a shadow would start
        equal = (stored == shadow) | ((stored != stored) & (shadow != shadow))
        s, p = shadow.astype(np.float64), param.astype(np.float64)
        fine = np.isfinite(s) & np.isfinite(p)
        self.elements += s.size
        self.finite += int(fine.sum())
        self.apart += int(s.size - equal.sum())
        bad_shadow = int(s.size - np.isfinite(s).sum())
        bad_params = int(p.size - np.isfinite(p).sum())
        self.bad_shadow += bad_shadow
        self.bad_params += bad_params
        if (bad_shadow or bad_params) and self.first_bad is None:
            self.first_bad = path
        s, p, shadow = s[fine], p[fine], shadow[fine]
        change = p - s
        self._squares += np.array([change @ change, s @ s])
        if not self._weight or dtype.itemsize > 4:
            return
        # The spacing beside the largest number of a dtype overflows.
        with np.errstate(over="ignore", invalid="ignore"):
            ulps = np.spacing(np.abs(shadow)).astype(np.float64)
        if dtype.name in self.record.by_chance:
            noisy = (np.abs(change) < ulps / 2) & (change != 0)
            self.noisy += (hits := int(noisy.sum()))
        else:
            with np.errstate(over="ignore"):
                folded = (s + self._weight * change).astype(dtype)
            stuck = (folded == shadow) & (np.abs(change) > _NEAR * ulps)
            self.stuck += (hits := int(stuck.sum()))
        self.dtypes[dtype.name] = self.dtypes.get(dtype.name, 0) + hits

    @property
    def distance(self) -> float | None:
        """‖p − s‖ / ‖s‖ over the finite elements; None where there are none."""
        if not self.finite:
            return None
        return float(np.sqrt(self._squares[0] / (self._squares[1] or 1.0)))

    def figures(self) -> dict[str, Any]:
        """Returns the figures by name; shares are of all averaged elements."""
        total = max(self.elements, 1)
        return {
            "distance": self.distance,
            "averaged_elements": self.elements,
            "stuck_share": self.stuck / total if self._weight else None,
            "equal_share": 1 - self.apart / total,
            "nonfinite_params": self.bad_params,
            "nonfinite_shadow": self.bad_shadow,
        }

    def check(self) -> Iterator[Finding]:
        """Yields the findings on the leaves."""
        find, record = self.record.finding, self.record
        if not self.elements:
            yield find(
                "nothing_averaged",
                "problem",
                "No leaf is averaged: reading gives the raw params.",
                "Look at the mask of ema_params: it is True where a leaf is averaged.",
            )
            return
        yield from self._nonfinite()
        # By its decay the newest fold was a copy, or a ring has no other one.
        copied = self._weight == 1 or (
            record.copies and record.length and record.length.effective_size == 1
        )
        if not self.apart and not copied and record.count >= (record.every or 1):
            yield find(
                "equal",
                "problem",
                f"All {self.elements:,} averaged elements equal the params to the bit: "
                "the average is the raw params.",
                "Pass the live params, not those that were read from the shadow. After "
                "overwrite_every wrote the average into the params it is so until the "
                "next update.",
                elements=self.elements,
            )
        if self.stuck > _MOST * self.elements:
            yield self._dead_zone()
        if self.noisy > _MOST * self.elements:
            share = self.noisy / self.elements
            yield find(
                "rounding_noise",
                "warning",
                f"{percent(share)} of the elements are nearer to their params than "
                f"half a unit in the last place of {self._most_hit()}: rounding adds "
                "more noise than the average takes away.",
                'Keep the shadow in float32: ema_params(…, shadow_dtype="float32").',
                share=share,
            )

    def _dead_zone(self) -> Finding:
        share, dtype = self.stuck / self.elements, self._most_hit()
        remedy = (
            'Round by chance, rounding="stochastic"; or fold less often, with a larger '
            "`every`, which is an average as long."
            if dtype == "float32"
            else 'Keep the shadow in float32: ema_params(…, shadow_dtype="float32").'
        )
        return self.record.finding(
            "dead_zone",
            "problem",
            f"{percent(share)} of the elements cannot move: a fold of weight "
            f"{self._weight:.3g} changes them by less than half a unit in the last "
            f"place of {dtype}.",
            remedy,
            share=share,
            newest_weight=self._weight,
        )

    def _most_hit(self) -> str:
        return max(self.dtypes, key=lambda name: self.dtypes[name])

    def _nonfinite(self) -> Iterator[Finding]:
        find, at = self.record.finding, repr(self.first_bad)
        if self.bad_shadow:
            yield find(
                "nonfinite_shadow",
                "problem",
                f"{self.bad_shadow:,} elements of the average are not finite, first at "
                f"{at}.",
                "It started from such params: a fold of finite ones mends it. Start "
                "with optimizer.init of finite params. Or a decay of your own gave a "
                "β outside [0, 1].",
                elements=self.bad_shadow,
            )
        if self.bad_params:
            yield find(
                "nonfinite_params",
                "problem",
                f"{self.bad_params:,} elements of the params are not finite, first at "
                f"{at}; the average holds there.",
                "Go back to a step before, and keep such updates out: "
                "optax.apply_if_finite(optimizer, 5).",
                elements=self.bad_params,
            )


def statistics_in(paths: Iterable[str]) -> list[str]:
    """Returns the paths whose names are those of running statistics.

    >>> statistics_in(["bn/mean", "bn/var", "bn/scale", "head/mean"])
    ['bn/mean', 'bn/var']
    """
    all_paths = list(paths)
    keys: dict[str, set[str]] = {}
    for path in all_paths:
        parent, _, key = path.rpartition("/")
        keys.setdefault(parent, set()).add(key)

    def is_statistic(path: str) -> bool:
        parent, _, key = path.rpartition("/")
        return _COLLECTION in path.split("/")[:-1] or any(
            key in pair and pair <= keys[parent] for pair in _STATISTICS
        )

    return [path for path in all_paths if is_statistic(path)]


def norms_in(paths: Iterable[str]) -> list[str]:
    """Returns the paths whose layers are named like batch norms.

    >>> norms_in(["BatchNorm_0/scale", "bn1/bias", "Dense_0/kernel"])
    ['BatchNorm_0/scale', 'bn1/bias']
    """
    return [path for path in paths if _NORM.search(path)]


def stale_statistics(record: Record, paths: list[str]) -> Finding:
    """Builds the finding on running statistics that come from the raw params."""
    return record.finding(
        "batch_stats",
        "warning",
        f"{len(paths)} leaves are running statistics of the raw params, such as "
        f"{some(map(repr, paths), 2)}: the averaged ones need statistics of their own.",
        REFRESH,
        leaves=len(paths),
    )


REFRESH = (
    "Recompute them with the averaged params: "
    "ema_optax.linen.refresh_batch_stats(…, batches)."
)


def _as_reals(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind != "c":
        return array
    return np.ascontiguousarray(array).reshape(-1).view(f"f{array.dtype.itemsize // 2}")
