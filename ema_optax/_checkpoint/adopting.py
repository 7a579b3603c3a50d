"""Adopting: params and average of another program's checkpoint become one of ours."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from ema_optax._checkpoint import adopted_arrays, pairing
from ema_optax._checkpoint.adopted_arrays import Arrays
from ema_optax._checkpoint.directory import save_average
from ema_optax._checkpoint.foreign import Foreign, Leaf
from ema_optax._checkpoint.foreign_steps import opened
from ema_optax._checkpoint.layouts import size
from ema_optax._checkpoint.pairing import AUTO, Choice
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.steps import is_taken
from ema_optax._decays.decay import Decay
from ema_optax._decays.decays import constant, debiased
from ema_optax._messages import arguments, text
from ema_optax._messages.progress import Progress

_DECAY = re.compile(r".*(decay|beta).*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Adopted:
    """What became of another program's checkpoint.

    Attributes:
        source: Where it is.
        kind: What wrote it, in words.
        layout: The layout by which params and average were found, or None.
        path: The folder of ours.
        step: Number of the step in it.
        params: Path of the params in the source.
        shadow: Path of the average; None where it starts as a copy of the params.
        averaged: Paths of the params that have an average.
        raw: Floating params without one, which are raw in both trees.
        others: How many params are no floats, and are not averaged.
        narrow: Averages narrower than float32, whose small updates were rounded away.
        bytes: Of `params` and `shadow` as they were.
        left_out: What else is in the source, in bytes.
        count: Updates that the average has seen.
        count_from: Where that number is from.
        decay: What it was averaged with, or None.
        zero_started: Whether it began at zero and was divided by 1−β^count.
        beside: Numbers that lie beside the average and may be its decay.
        distance: Norm of average − params over that of the params; None of a dry run.
    """

    source: str
    kind: str
    layout: str | None
    path: str
    step: int
    params: str
    shadow: str | None
    averaged: tuple[str, ...]
    raw: tuple[str, ...]
    others: int
    narrow: tuple[str, ...]
    bytes: Mapping[str, int]
    left_out: Mapping[str, int]
    count: int
    count_from: str
    decay: Decay | None
    zero_started: bool
    beside: Mapping[str, float]
    distance: float | None = None


def adopt(
    source: epath.PathLike,
    out: epath.PathLike,
    *,
    params: str | None = None,
    shadow: str | None = AUTO,
    like: str | None = None,
    step: int | None = None,
    count: int | str | None = None,
    decay: Decay | None = None,
    zero_started: bool | None = None,
    partial: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> Adopted:
    """Turn a checkpoint of another program into one of ours, params and average.

    Read are steps of Orbax of any layout, whatever devices they were saved from,
    folders of zarr arrays as axlearn and Levanter write them, and msgpack files of
    `flax.serialization`. Values and dtypes stay as they are. Of a step with several
    items, paths begin with the item's name. Optimizer states are left out.

    Where params and average lie is found by the names that known programs give them,
    if that is unmistakable. Memory holds both and 64 MiB or one leaf more; a msgpack
    file whole.

    Args:
        source: The folder of a `CheckpointManager`, of one of its steps, or of an item
            in it, also `gs://…`; or a msgpack file.
        out: Folder of the checkpoint to write, made if missing.
        params: Path of the params in it, such as `"state/params"`; None finds them.
        shadow: Path of their average; "auto" finds it. None where there is none: it
            starts as a copy of the params, float32 where they are narrower, with count
            0.
        like: Layout to look for, instead of all: "flax", "nnx", "openpi", "kauldron",
            "haiku", "axlearn", "levanter", "optax" or "ema_optax".
        step: Number of the step to read and write, ≥ 0; None for the newest, by the
            name of its folder.
        count: Updates that the average has seen, ≥ 0, or the path of that number in
            the source; None for the one beside the average, else the step.
        decay: What it was averaged with, for `describe`, and for `zero_started`.
        zero_started: Whether the average began at zero, and was not divided by
            1−β^count yet. Then that is done, in float64; it needs `decay=constant(β)`
            and `count`. None for what the layout says.
        partial: Whether floating params may have no average: raw in both trees.
        dry_run: Whether to look and check, and write nothing.
        progress: As in `reconstruction.merge`: True draws a bar, a function is called.

    Raises:
        CorruptCheckpointError: If the source is damaged.
        FileExistsError: If the step is in `out` already; nothing is overwritten.
        FileNotFoundError: If there is no checkpoint.
        ModuleNotFoundError: If msgpack is not installed, for such a file.
        ValueError: If the source is one of ours, if trees, structure, shapes or dtypes
            do not fit, if several do, or if a value is not finite.

    >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
    >>> from ema_optax import checkpoint
    >>> params, average = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(f"{folder}/theirs") as manager:
    ...         state = {"params": params, "ema_params": average}
    ...         _ = manager.save(300, args=ocp.args.StandardSave(state))
    ...     done = adopt(f"{folder}/theirs", f"{folder}/ours")
    ...     checkpoint.restore(f"{folder}/ours", "shadow", like=params)
    {'w': Array([0., 0.], dtype=float32)}
    >>> done.layout, done.shadow, done.step
    ('flax', 'ema_params', 300)
    """
    _check_kinds(params, shadow, like, count, decay)
    partial = arguments.flag(partial, "partial")
    dry_run = arguments.flag(dry_run, "dry_run")
    if zero_started is not None:
        zero_started = arguments.flag(zero_started, "zero_started")
    root = absolute(out)
    found = opened(source, step)
    choice = pairing.choose(found, params, shadow, like, partial=partial)
    number = _number(found, step)
    if not dry_run and is_taken(root / str(number)):
        raise FileExistsError(
            f"{root / str(number)} exists, and nothing is overwritten. Pass another "
            "folder, or remove it first."
        )
    seen, seen_from = _count(found, choice, count, number)
    divided = _zero_started(found, choice, zero_started)
    weight = 1.0
    if divided:
        decay, weight = _division(decay, seen, seen_from)
    arrays = None
    if not dry_run:
        arrays = adopted_arrays.read(found, choice, weight, progress)
    done = Adopted(
        source=found.place,
        kind=found.kind,
        layout=choice.layout,
        path=str(root),
        step=number,
        params=choice.params,
        shadow=choice.shadow,
        averaged=tuple(choice.average),
        raw=choice.raw,
        others=len(choice.leaves) - len(choice.average) - len(choice.raw),
        narrow=_narrow(choice),
        bytes={"params": size(choice.leaves), "shadow": size(choice.average)},
        left_out=_left_out(found, choice),
        count=seen,
        count_from=seen_from,
        decay=decay,
        zero_started=divided,
        beside=_beside(found, choice),
        distance=arrays and arrays.distance,
    )
    if arrays:
        _write(root, done, arrays)
    return done


def _write(root: epath.Path, done: Adopted, arrays: Arrays) -> None:
    origin = {
        "source": done.source,
        "kind": done.kind,
        "layout": done.layout,
        "params": done.params,
        "shadow": done.shadow or "none: a copy of the params",
        "count": done.count_from,
        "decay": "not recorded" if done.decay is None else "as told",
        "zero_started": done.zero_started,
        "without_average": len(done.raw),
    }
    save_average(
        root,
        arrays.shadow,
        params=arrays.params,
        step=done.step,
        count=done.count,
        decay=done.decay,
        extra={"from": origin},
    )


def _check_kinds(
    params: object, shadow: object, like: object, count: object, decay: object
) -> None:
    if params is not None:
        arguments.a_name(params, "params", "state/params")
    if shadow is not None:
        arguments.a_name(shadow, "shadow", "state/ema_params")
    if like is not None:
        arguments.a_name(like, "like", "flax")
    if count is not None and not isinstance(count, str):
        arguments.whole(count, "count", 0, "count=300 is after 300 updates.")
    if decay is not None and not isinstance(decay, Decay):
        raise TypeError(
            f"decay is what it was averaged with, such as ema_optax.constant(0.9999), "
            f"or None where that is not known; got {text.brief(decay)}."
        )


def _number(source: Foreign, step: int | None) -> int:
    if step is not None:
        return arguments.whole(step, "step", 0, "step=300 is the 300th update.")
    if source.number is not None:
        return source.number
    say = "step=0, or whichever it is of"
    leaf = source.leaves.get("step")
    if leaf is not None and leaf.is_counter:
        say = f"step={_read(source, leaf)}, which its leaf 'step' has"
    raise ValueError(f"The name of {source.place} holds no number. Pass {say}.")


def _count(
    source: Foreign, choice: Choice, count: int | str | None, step: int
) -> tuple[int, str]:
    """Returns how many updates the average has seen, and where that is from."""
    if choice.shadow is None:
        if count is not None:
            raise ValueError(
                f"count={count!r} is that of an average, and shadow=None says that "
                "there is none: its count is 0. Leave count out."
            )
        return 0, "none: it starts as a copy"
    if count is not None and not isinstance(count, str):
        return arguments.whole(count, "count", 0, "count=300"), "as told"
    path = choice.count if count is None else count.strip("/")
    if path is None:
        return step, "the step's number"
    leaf = source.leaves.get(path) or source.leaves.get(f"{path}/value")
    if leaf is None:
        raise ValueError(
            f"{source.place} has no number at count={path!r}. "
            f"{text.nearest(path, _counters(source))}"
        )
    if not leaf.is_counter:
        raise ValueError(
            f"count={path!r} of {source.place} is {leaf}, not one whole number. Pass "
            "count=300, or the path of an integer without dimensions: "
            f"{text.nearest(path, _counters(source))}"
        )
    seen = _read(source, leaf)
    if seen < 0:
        raise ValueError(
            f"'{path}' of {source.place} is {seen}: the average has not begun. Pass "
            "shadow=None to begin from a copy of the params."
        )
    return seen, f"'{path}'"


def _counters(source: Foreign) -> list[str]:
    return [path for path, leaf in source.leaves.items() if leaf.is_counter]


def _read(source: Foreign, leaf: Leaf) -> int:
    ((_, array),) = source.read([leaf.path])
    return int(array)


def _zero_started(source: Foreign, choice: Choice, told: bool | None) -> bool:
    """Returns whether the average has to be divided by 1−β^count."""
    if choice.shadow is None:
        if told:
            raise ValueError(
                "zero_started=True is of an average, and shadow=None says that there "
                "is none. Leave one of them out."
            )
        return False
    known = choice.zero_started
    if choice.layout == "haiku":
        known = _haiku_zero_started(source, choice)
        if told and known is False:
            raise ValueError(
                f"The averages in '{choice.shadow}' are divided already: Haiku keeps "
                "those that are not as 'hidden'. Leave zero_started out."
            )
    if told is not None:
        return told
    if known is None:
        raise ValueError(
            f"Averages such as '{choice.shadow}' may have begun at zero, which nothing "
            "in the checkpoint says. If it did, pass zero_started=True and "
            "decay=constant(0.9999), or whichever it was, to divide by 1−β^count. Pass "
            "zero_started=False if it began as a copy, or was debiased at each step."
        )
    return known


def _haiku_zero_started(source: Foreign, choice: Choice) -> bool | None:
    """Returns False where Haiku has divided an average; None where it may not have."""
    for leaf in choice.average.values():
        hidden = f"{leaf.path.removesuffix('average')}hidden"
        found = dict(source.read([leaf.path, hidden]))
        if not np.array_equal(found[leaf.path], found[hidden]):
            return False
    return None


def _division(decay: Decay | None, count: int, count_from: str) -> tuple[Decay, float]:
    """Returns the decay of an average that began at zero, and its weights' sum."""
    if not isinstance(decay, (constant, debiased)):
        raise ValueError(
            "An average that began at zero is divided by 1−β^count, which needs its "
            f"decay=constant(0.9999) or whichever it was; got {text.brief(decay)}."
        )
    if count_from == "the step's number":
        raise ValueError(
            "An average that began at zero is divided by 1−β^count, which needs the "
            f"updates that it has seen. Pass count={count} if it saw all of the run's."
        )
    if count == 0:
        raise ValueError(
            "An average that began at zero and has seen 0 updates holds nothing. Pass "
            "shadow=None to begin from a copy of the params."
        )
    beta = float(decay.decay)
    weight = 1.0 if beta == 0 else float(-np.expm1(count * np.log(np.float64(beta))))
    return debiased(beta), weight


def _narrow(choice: Choice) -> tuple[str, ...]:
    if choice.shadow is None:
        return ()
    return tuple(
        path
        for path, leaf in choice.average.items()
        if adopted_arrays.is_narrow(leaf.dtype)
    )


def _beside(source: Foreign, choice: Choice) -> dict[str, float]:
    """Returns numbers beside an average whose names say that they are its decay."""
    if choice.shadow is None:
        return {}
    above = {choice.shadow.rpartition("/")[0]}
    above |= {path.rpartition("/")[0] for path in above}
    found = [
        leaf
        for leaf in source.leaves.values()
        if not leaf.shape
        and leaf.is_averaged
        and leaf.path.removesuffix("/value").rpartition("/")[0] in above
        and _DECAY.fullmatch(leaf.path.removesuffix("/value").rpartition("/")[2])
    ]
    return {path: float(x) for path, x in source.read([leaf.path for leaf in found])}


def _left_out(source: Foreign, choice: Choice) -> dict[str, int]:
    """Returns the outermost trees of which nothing is adopted, and their bytes."""
    kept = [x.path for each in (choice.leaves, choice.average) for x in each.values()]
    kept += [choice.count] if choice.count else []
    above = {path[:i] for path in kept for i in _ends(path)}
    found: dict[str, int] = {}
    for path, leaf in source.leaves.items():
        if choice.shadow and path.startswith(f"{choice.shadow}/"):
            continue  # what is beside the averages, or of params that are no floats
        top = next((path[:i] for i in _ends(path) if path[:i] not in above), None)
        if top is not None:
            found[top] = found.get(top, 0) + leaf.bytes
    return found


def _ends(path: str) -> list[int]:
    """Returns where each key of a path ends."""
    return [i for i, letter in enumerate(path) if letter == "/"] + [len(path)]
