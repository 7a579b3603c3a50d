"""Checks a decay and a count, without arrays: start, lag, size, other counts."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from ema_optax._averages.states import BemaMadeBy
from ema_optax._decays.decay import Decay, Floats
from ema_optax._decays.decays import fraction, power
from ema_optax._diagnosis.findings import Finding, number, percent
from ema_optax._diagnosis.lengths import (
    LAST,
    Length,
    length,
    length_of_mean,
    updates_until,
    weight_of_fold,
)
from ema_optax._messages.text import one_line

_LEFT = 0.01  # weight of the initial params: a smaller one does not matter
_EARLY = 10  # folds: before them every average is at its beginning
_LONG = 1 / 3  # of a run: the params of its middle count most
_GOOD = 0.05  # of a run: about the mean age of power(0.05) and fraction(0.05)
_SEVERAL = 2.0  # params: an average of fewer smooths nothing
_SETTLED = 2**21  # updates: by then any average is as long as it gets
# Names in the states of Optax: the number of updates; in MultiSteps the number of
# applied updates, and the gradients that wait for the next one.
COUNT, APPLIED, WAITING = "count", "gradient_step", "mini_step"
_SHORTER = 0.9  # of the mean age that all updates would have given


@dataclasses.dataclass(frozen=True)
class Record:
    """Records how an average was made, and how many updates it has seen.

    Attributes:
        shadow: Name of the shadow.
        count: Updates that the average has seen.
        decay: Decay of the average; None where it is not known.
        every: Updates between folds; None where that is not known.
        text: The decay in words; None where it is not known.
        is_bema: Whether `bema_params` made the average: reading corrects its lag.
        by_chance: Names of the dtypes that are rounded stochastically.
        copies: Slots of a ring, which has no decay: it is the mean of so many of the
            newest params. None for averages that are folded.
    """

    shadow: str
    count: int
    decay: Decay | None
    every: int | None
    text: str | None
    is_bema: bool = False
    by_chance: tuple[str, ...] = ("bfloat16",)
    copies: int | None = None

    @property
    def length(self) -> Length | None:
        """Length of the average; None where its decay is not known."""
        if self.copies and self.every:
            return length_of_mean(self.copies, self.count, self.every)
        if self.decay is None or self.every is None:
            return None
        return length(self.decay, self.count, self.every)

    @property
    def newest_weight(self) -> float | None:
        """Weight of the params in the newest fold; None before the first fold."""
        if self.decay is None or self.every is None or self.count < self.every:
            return None
        return weight_of_fold(self.decay, self.count, self.every)

    def figures(self) -> dict[str, Any]:
        """Returns decay, every, count and, where the decay is known, the length."""
        known = self.length
        return {
            "decay": self.text,
            "every": self.every,
            "count": self.count,
            **(dataclasses.asdict(known) if known else {}),
        }

    def finding(self, what: str, severity: Any, *texts: str, **figures: Any) -> Finding:
        """Builds a finding on this shadow from a sentence and a remedy."""
        return Finding(what, severity, *texts, figures=figures, shadow=self.shadow)


@dataclasses.dataclass(frozen=True, repr=False)
class BemaDecay(Decay, registered=False):
    """Spreads 1 − b of each fold of BEMA over its updates, as a decay does."""

    made_by: BemaMadeBy

    def _log_product(self, t: Floats, k: int, xp: ModuleType) -> Floats:
        bema = self.made_by
        b = (bema.lag + bema.multiplier * t) ** -bema.ema_power
        return k / bema.every * xp.log1p(-xp.maximum(b, bema.min_newest_weight))


def check(
    record: Record,
    *,
    others: Mapping[str, int],
    batch_sizes: tuple[int, int] | None = None,
) -> Iterator[Finding]:
    """Yields the findings on a record.

    Args:
        record: The record of one average.
        others: Counts of updates in the optimizer state, by their places.
        batch_sizes: The batch size that the decay was chosen for, and that of the run.
    """
    # An average that was never folded has no length to check.
    unfolded = list(_unfolded(record))
    yield from unfolded or [*_checked_length(record), *_other_counts(record, others)]
    if batch_sizes:
        yield from _batches(record, *batch_sizes)


def why_unknown(record: Record) -> str:
    """Writes why the length of a shadow could not be checked."""
    whose = f" of {one_line(record.shadow)!r}" if record.shadow else ""
    cause = (
        "the decay is not recorded, as it is a callable or was injected, or is not of "
        "this library"
        if record.text is None
        else f"the decay is {record.text}, and how many updates lie between two folds "
        "is not recorded, as of an average from elsewhere"
    )
    return f"weight on the initial params, lag and dead zone{whose}: {cause}"


def is_count(path: str, leaf: Any) -> bool:
    """Returns whether a leaf of an optimizer state counts updates."""
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    return (
        _key(path) in (COUNT, APPLIED, WAITING)
        and shape == ()
        and np.issubdtype(np.dtype(dtype), np.integer)
    )


def shorter(mean_age: float) -> str:
    """Writes the call of a decay whose mean age, β/(1−β), is so many updates.

    >>> shorter(50)
    'warmup(0.98)'
    """
    weight = 1 / (1 + max(mean_age, 0.0))
    digits = max(0, 1 - math.floor(math.log10(weight)))
    return f"warmup({1 - round(weight, digits):.{digits}f})".replace("0)", ")")


def _unfolded(record: Record) -> Iterator[Finding]:
    every = record.every or 1
    if record.count == 0:
        yield record.finding(
            "never_folded",
            "problem",
            "The average has seen no update: it is a copy of the initial params.",
            "Pass the optimizer state that optimizer.update returned, not that of "
            "optimizer.init; and keep what it returns.",
            count=0,
        )
    elif record.count < every:
        yield record.finding(
            "never_folded",
            "problem",
            f"The average folds every {every:,} updates and has seen "
            f"{record.count:,}: it is a copy of the initial params.",
            f"Evaluate it from update {every:,} on, or fold more often: a smaller "
            "`every` is an average as long.",
            count=record.count,
            every=every,
        )


def _checked_length(record: Record) -> Iterator[Finding]:
    decay, every, known = record.decay, record.every, record.length
    if decay is None or every is None or known is None:
        return
    count = record.count
    weight = record.newest_weight
    early = count <= _EARLY * every
    if weight == 0 and weight_of_fold(decay, max(count - every, every), every) == 0:
        yield record.finding(
            "standing_still",
            "warning",
            f"At update {count:,} the decay is 1: the average does not follow the "
            "params any more.",
            f"{record.text} ends before the run does: give it the number of updates "
            "of the whole run.",
            count=count,
        )
        return
    if not early and _is_copying(decay, count):
        yield record.finding(
            "not_started",
            "warning",
            f"At update {count:,} the average still copies the params: they are alike.",
            f"{record.text} starts later. Evaluate it after that, or start it sooner.",
            count=count,
        )
        return
    if known.initial_weight >= _LEFT:
        until = updates_until(decay, every, _LEFT)
        if until is None or until > _EARLY * every:
            yield _initial(record, known, until)
    elif not (early or record.is_bema) and known.mean_age > _LONG * count:
        yield _lag(record, known)
    elif known.effective_size < _SEVERAL:
        later = max(count, _SETTLED, min(1000 * every, LAST))
        if length(decay, later, every).effective_size < _SEVERAL:
            yield _short(record, known, length(decay, later, 1))


def _is_copying(decay: Decay, count: int) -> bool:
    """Returns whether a decay copies the params now, and will fold them later."""
    return math.isinf(decay.log_product(count)) and math.isfinite(
        decay.log_product(LAST)
    )


def _initial(record: Record, known: Length, until: int | None) -> Finding:
    share = known.initial_weight
    end = (
        "and they stay: the decay does not forget them"
        if until is None
        else f"below 1 % after update {until:,}"
    )
    remedy = (
        "Fold more often, with a smaller `every`, or with a larger min_newest_weight."
        if record.is_bema
        else "Use warmup(β) or debiased(β), such as warmup"
        f"({_beta(record)}): they do not wait that out."
    )
    return record.finding(
        "initial_weight",
        "problem" if share > 0.1 else "warning",
        f"{percent(share)} of the average are still the initial params, after "
        f"{record.count:,} updates; {end}.",
        remedy,
        initial_weight=share,
        count=record.count,
        below_one_percent_at=until,
    )


def _beta(record: Record) -> str:
    assert record.decay is not None
    return f"{record.decay(record.count):.6g}"


def _lag(record: Record, known: Length) -> Finding:
    share = known.mean_age / record.count
    return record.finding(
        "lag",
        "warning",
        f"The averaged params are {number(known.mean_age)} updates old in the mean, "
        f"{percent(share)} of a run of {record.count:,}: the average is of what the "
        "model was long ago.",
        f"Take a shorter one: power(0.05) or fraction(0.05), whose length is a share "
        f"of any run, or {shorter(_GOOD * record.count)}.",
        mean_age=known.mean_age,
        share=share,
        count=record.count,
    )


def _short(record: Record, known: Length, each_update: Length) -> Finding:
    decay, every = record.decay, record.every
    assert decay is not None
    assert every is not None
    size = f"{known.effective_size:.2f}"
    if each_update.effective_size >= _SEVERAL:
        advised = max(1, int(each_update.mean_age / 5))
        sentence = (
            f"With every={every:,} the average is of {size} params, where each update "
            f"would give {number(each_update.effective_size)}: a fold replaces all "
            "that was averaged before."
        )
        remedy = f"Fold more often, such as every={advised:,}, or take a larger β."
    else:
        sentence = f"The average is of {size} params: there is nothing to smooth."
        remedy = (
            "Take a larger β: 0.99 averages over about 200 params, 0.999 over 2,000."
        )
    return record.finding(
        "too_short",
        "warning",
        sentence,
        remedy,
        effective_size=known.effective_size,
        every=every,
        effective_size_every_update=each_update.effective_size,
    )


def _other_counts(record: Record, others: Mapping[str, int]) -> Iterator[Finding]:
    """Compares the count of the average with the largest count of the optimizer.

    Where gradients are accumulated, only the count of applied updates compares: other
    counts are of micro-batches, or lie inside. An average may well have seen more
    updates than the optimizer, as after `started_from`. It is said to count
    micro-batches only where its count is a whole multiple of the optimizer's.
    """
    applied = {at: n for at, n in others.items() if _key(at) == APPLIED}
    counts = applied or {at: n for at, n in others.items() if _key(at) == COUNT}
    if not counts:
        return
    place, updates = max(counts.items(), key=lambda pair: pair[1])
    waiting = others.get(place.removesuffix(APPLIED) + WAITING, 0)
    seen = record.count - waiting
    if applied and updates and seen >= 2 * updates:
        if seen % updates == 0:
            yield _micro_batches(record, place, updates, seen // updates)
    elif updates > record.count and _is_younger(record, updates):
        yield record.finding(
            "restarted",
            "warning",
            f"The average has seen {record.count:,} updates, where the optimizer has "
            f"seen {updates:,} (at {place!r}): it was started anew, and is shorter "
            "than the run would give.",
            "Resume the count with the shadow, with checkpoint.resume; or put it back, "
            f"with started_from(opt_state, shadow, count={updates}).",
            count=record.count,
            optimizer_count=updates,
        )


def _key(path: str) -> str:
    return path.rpartition("/")[2]


def _micro_batches(record: Record, place: str, updates: int, batches: int) -> Finding:
    return record.finding(
        "micro_batches",
        "problem",
        f"The average has seen {record.count:,} updates, where the optimizer has "
        f"applied {updates:,} (at {place!r}): it counts each of {batches:,} "
        f"micro-batches, and is {batches:,} times shorter than its decay says.",
        "Chain it inside: optax.MultiSteps(optax.chain(optimizer, ema_params(…)), "
        f"{batches}).",
        count=record.count,
        optimizer_count=updates,
        micro_batches=batches,
    )


def _is_younger(record: Record, updates: int) -> bool:
    """Returns whether an average of all updates would be clearly longer."""
    known = record.length
    if known is None or record.decay is None or record.every is None:
        return record.count * 2 <= updates
    whole = length(record.decay, updates, record.every)
    return known.mean_age < _SHORTER * whole.mean_age


def _batches(record: Record, chosen_for: int, batch: int) -> Iterator[Finding]:
    factor = batch / chosen_for
    decay, known = record.decay, record.length
    if decay is None or known is None or factor == 1:
        return
    if isinstance(decay, (power, fraction)):  # a share of the run, in any batch
        return
    yield record.finding(
        "batch_size",
        "warning",
        f"The decay {record.text} was chosen for batches of {chosen_for:,}, and of "
        f"{batch:,} it averages over {factor:.3g} times as many examples: their mean "
        f"age is {number(known.mean_age * batch)} examples.",
        f"Scale it: scale_to_batch(…, {factor:.6g}), which is β to that power.",
        factor=factor,
        mean_age_in_examples=known.mean_age * batch,
    )
