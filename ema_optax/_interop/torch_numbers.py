"""Step, count and decay of an import: given, or recorded, and never guessed."""

import dataclasses
from collections.abc import Mapping

from ema_optax._decays.decay import Decay
from ema_optax._interop.torch_files import Tensors
from ema_optax._interop.torch_weights import Pair
from ema_optax._messages import arguments

_NOT_RECORDED = "not recorded"
_GIVEN = "the argument"
_STEPS = ("global_step", "step")  # where programs of their own record it
_MOST = 2**31  # JAX counts in int32


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Holds step, count and decay, and where each comes from.

    Attributes:
        step: Number of the step.
        count: Updates that the average has seen.
        decay: Decay of the average; None where it is not known.
        told_by: Where step, count and decay come from, in words.
    """

    step: int
    count: int
    decay: Decay | None
    told_by: Mapping[str, str]

    @classmethod
    def of(
        cls, pair: Pair, step: int | None, count: int | None, decay: Decay | None
    ) -> "Numbers":
        """Takes numbers from arguments, then the file; step and count from each other.

        Raises:
            ValueError: If an average has neither count nor step.
        """
        told_by: dict[str, str] = {}
        names = (pair.layout.step,) if pair.layout.step else _STEPS
        step = _whole(step, "step", pair.main.tensors, names, told_by)
        average, layout = pair.average, pair.average_layout
        if average is None:
            if count:
                raise ValueError(
                    f"count={count} is of an average, and {pair.main.where} has none: "
                    "it starts as a copy of the params, with count 0."
                )
            told_by["count"] = "the average starts here"
            told_by["decay"] = _GIVEN if decay is not None else "no average yet"
            told_by.setdefault("step", _NOT_RECORDED)
            return cls(step or 0, 0, decay, told_by)
        names = (layout.count,) if layout.count else ()
        count = _whole(count, "count", average.tensors, names, told_by)
        if step is None and count is None:
            raise ValueError(
                f"{average.where} does not record how many updates the average has "
                "seen. Pass count=300000, or the step that it is of, step=300000: an "
                "average that goes on with too small a count forgets itself."
            )
        if step is None:
            step, told_by["step"] = count, "the count"
        if count is None:
            count, told_by["count"] = step, "the step"
        if decay is not None:
            told_by["decay"] = _GIVEN
        else:
            recorded = layout.decay and layout.decay(average.tensors)
            decay, told_by["decay"] = recorded or (None, _NOT_RECORDED)
        assert step is not None
        assert count is not None
        return cls(step, count, decay, told_by)


def _whole(
    value: int | None,
    argument: str,
    tensors: Tensors,
    names: tuple[str, ...],
    told_by: dict[str, str],
) -> int | None:
    """Takes a number from the argument, or the first that is recorded, or None."""
    if value is not None:
        number = arguments.whole(value, argument, 0, f"{argument}=300000")
        told_by[argument] = _GIVEN
    else:
        recorded = {name: tensors.number(name) for name in names}
        numbers = {n: x for n, x in recorded.items() if x is not None and x >= 0}
        if not numbers:
            return None
        told_by[argument], number = next(iter(numbers.items()))
    if number >= _MOST:
        raise ValueError(
            f"{argument} is less than {_MOST:,}, got {number:,} ({told_by[argument]}). "
            f"Pass {argument}=…"
        )
    return number
