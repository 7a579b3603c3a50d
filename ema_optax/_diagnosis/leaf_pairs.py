"""A shadow beside its params, leaf by leaf: what cannot move, is equal, not finite."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ema_optax._diagnosis.findings import Finding, percent
from ema_optax._diagnosis.records import Record
from ema_optax._messages.text import some

_BLOCK = 2**21  # elements that are looked at together, in float64
_MOST = 0.5  # of the elements: the average as a whole is concerned
_NEAR = 2  # ulps: of elements that are so near it does not matter

_STATISTICS = (
    {"mean", "var"},  # Flax
    {"running_mean", "running_var"},  # torch, Equinox
    {"moving_mean", "moving_variance"},  # Keras, TensorFlow
)
_COLLECTION = "batch_stats"
_NORM = re.compile(r"(^|/)(batch_?norm(ali[sz]ation)?|bn)_?\d*/", re.IGNORECASE)


@dataclasses.dataclass
class Pairs:
    """Sums over the averaged leaves, to which each is added and then let go of.

    Attributes:
        record: How the average was made.
        elements: Numbers that were added, two for a complex one.
        finite: Those that are finite in shadow and params.
        apart: Those that differ.
        stuck: Those that would be folded and not change, though they differ by more
            than two units in the last place.
        noisy: Those that are rounded by chance, and nearer than half such a unit.
        bad_shadow: Those that are not finite in the shadow.
        bad_params: Those that are not finite in the params.
        first_bad: Path of the first leaf with such.
        dtypes: Of the shadow's leaves, by name, with the elements that are stuck or
            noisy.
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
        """Adds a leaf, of the same shape in both, of any floating or complex dtype."""
        shadow, param = (_as_reals(np.asarray(x)).reshape(-1) for x in (shadow, param))
        for start in range(0, shadow.size, _BLOCK):
            end = start + _BLOCK
            self._add(path, shadow[start:end], param[start:end])

    def _add(self, path: str, shadow: np.ndarray, param: np.ndarray) -> None:
        dtype = shadow.dtype
        with np.errstate(over="ignore", invalid="ignore"):
            held = param.astype(dtype)  # as a shadow would start
        equal = (held == shadow) | ((held != held) & (shadow != shadow))
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
        with np.errstate(over="ignore", invalid="ignore"):  # next to the largest
            ulps = np.spacing(np.abs(shadow)).astype(np.float64)
        if dtype.name in self.record.by_chance:
            hit = (np.abs(change) < ulps / 2) & (change != 0)
            self.noisy += (found := int(hit.sum()))
        else:
            with np.errstate(over="ignore"):
                folded = (s + self._weight * change).astype(dtype)
            hit = (folded == shadow) & (np.abs(change) > _NEAR * ulps)
            self.stuck += (found := int(hit.sum()))
        self.dtypes[dtype.name] = self.dtypes.get(dtype.name, 0) + found

    @property
    def distance(self) -> float | None:
        """‖p − s‖ / ‖s‖ over what is finite; None without any."""
        if not self.finite:
            return None
        return float(np.sqrt(self._squares[0] / (self._squares[1] or 1.0)))

    def figures(self) -> dict[str, Any]:
        """Returns the sums by name; shares are of the elements that are averaged."""
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
        copied = self._weight == 1  # the newest fold was a copy, and meant as one
        if not self.apart and not copied and record.count >= (record.every or 1):
            yield find(
                "equal",
                "problem",
                f"All {self.elements:,} averaged elements equal the params to the bit: "
                "the average is the raw params.",
                "Pass the live params, not those that were read from the shadow; and "
                "see that the optimizer's updates are applied. After overwrite_every "
                "wrote the average into the params it is so until the next update.",
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
                "with optimizer.init of finite params.",
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
    """Returns the paths that are running statistics by their names.

    >>> statistics_in(["bn/mean", "bn/var", "bn/scale", "head/mean"])
    ['bn/mean', 'bn/var']
    """
    known = list(paths)
    keys: dict[str, set[str]] = {}
    for path in known:
        parent, _, key = path.rpartition("/")
        keys.setdefault(parent, set()).add(key)

    def is_statistic(path: str) -> bool:
        parent, _, key = path.rpartition("/")
        return _COLLECTION in path.split("/")[:-1] or any(
            key in pair and pair <= keys[parent] for pair in _STATISTICS
        )

    return [path for path in known if is_statistic(path)]


def norms_in(paths: Iterable[str]) -> list[str]:
    """Returns the paths that are of batch norms by the names of their layers.

    >>> norms_in(["BatchNorm_0/scale", "bn1/bias", "Dense_0/kernel"])
    ['BatchNorm_0/scale', 'bn1/bias']
    """
    return [path for path in paths if _NORM.search(path)]


def stale_statistics(record: Record, paths: list[str]) -> Finding:
    """Builds the finding on statistics that are read from the params."""
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
