"""Whether a run goes on with the averages that it was saved with: refused if not."""

from collections.abc import Callable, Mapping

from ema_optax._averages.average import Average
from ema_optax._averages.averages import Averages
from ema_optax._checkpoint.entries import AverageEntry, Computed
from ema_optax._checkpoint.manifest import SHADOW, Manifest
from ema_optax._checkpoint.shadows import computed_of
from ema_optax._trees.naming import tree_of

START = (
    "Or take what fits: resume(directory, params, optimizer.init, missing='start'), "
    "where a new average starts as a copy of the params"
)


def check_same(
    manifest: Manifest,
    found: Averages,
    tree_on_disk: Callable[[str], str],
    accept_new: bool,
) -> None:
    """Refuses to go on with other averages, or unasked with another decay.

    Args:
        manifest: Of the checkpoint.
        found: The averages of this run.
        tree_on_disk: From the name of an average to the tree that it goes on from.
        accept_new: Whether another decay is accepted.

    Raises:
        ValueError: If it would.
    """
    saved = manifest.averages
    _check_computed(saved.get(SHADOW), found, accept_new)
    ours = {tree_on_disk(average.name) for average in found}
    if set(saved) != ours:
        there = ", ".join(sorted(saved)) or "no shadow"
        here = ", ".join(sorted({tree_of(a.name) for a in found})) or "no shadow"
        raise ValueError(
            f"Cannot resume: the checkpoint has {there}, the optimizer state has "
            f"{here}. Chain ema_params with the decays of the saved run "
            f"({_decays_text(saved)}). {START}; and rename={{'shadow/slow': 'shadow'}} "
            "has one go on under another name."
        )
    for average in found:
        check_decay(average, tree_on_disk(average.name), saved, accept_new)


def check_decay(
    average: Average, tree: str, saved: Mapping[str, AverageEntry], accept_new: bool
) -> None:
    """Refuses to go on unasked with another decay or `every`.

    Args:
        average: Of this run.
        tree: Name of the stored shadow that it goes on from.
        saved: The stored averages, by their trees.
        accept_new: Whether another decay is accepted.

    Raises:
        ValueError: If it would.
    """
    if accept_new or average.is_computed or average.made_by is None:
        return
    before, decay = saved[tree], average.decay
    changed = decay and before.decay and before.decay != decay
    if changed or average.every != (before.every or average.every):
        raise ValueError(
            f"Cannot resume unasked: '{tree}' was averaged with "
            f"{_decays_text({tree: before})}, and would go on with "
            f"{decay} at every={average.every}. Pass accept_new_decay=True to "
            "keep the shadow and go on so; or restore the params and start "
            "with optimizer.init(params), whose shadow is a copy of them."
        )


def check_computed_goes_on(
    saved: AverageEntry, found: Averages, takes_shadow: bool, accept_new: bool
) -> None:
    """Refuses to go on unasked from a computed shadow with anything else.

    Args:
        saved: The stored average of no name.
        found: The averages of this run.
        takes_shadow: Whether one of `ema_params` goes on from it.
        accept_new: Whether that is accepted.

    Raises:
        ValueError: If it would.
    """
    before, now = saved.computed, computed_of(found)
    others = [average for average in found if not average.is_computed]
    goes_on = _calls(now) if now else ""
    if not now and takes_shadow and others:
        goes_on = f"ema_params with {others[0].decay or 'a callable'}"
    if before and goes_on and before != now and not accept_new:
        raise ValueError(
            f"Cannot resume unasked: 'shadow' is of {_calls(before)}, and would go on "
            f"with {goes_on}. Pass accept_new_decay=True to keep it and go on so."
        )


def _check_computed(
    saved: AverageEntry | None, found: Averages, accept_new: bool
) -> None:
    """Refuses another `bema_params` or `ring`, or one where there was none."""
    before = saved.computed if saved else ()
    now = computed_of(found)
    # A ring of other length has other slots.
    alike = [_lasting(each) for each in before] == [_lasting(each) for each in now]
    if before == now or (accept_new and alike):
        return
    there, here = (
        _calls(given) if given else f"no {(before or now)[0].maker}"
        for given in (before, now)
    )
    accept = (
        "Pass accept_new_decay=True to keep the average and go on so; or chain"
        if alike
        else "Chain"
    )
    raise ValueError(
        f"Cannot resume: the checkpoint's shadow is of {there}, and the optimizer "
        f"state has {here}. {accept} the averages of the saved run. {START}."
    )


def _lasting(given: Computed) -> tuple[str, float | None]:
    """Returns what has to stay the same where an average goes on."""
    return given.maker, given.arguments.get("k")


def _calls(given: tuple[Computed, ...]) -> str:
    return ", ".join(map(str, given))


def _decays_text(saved: Mapping[str, AverageEntry]) -> str:
    return "; ".join(
        f"{tree}: {_calls(entry.computed)}"
        if entry.computed
        else f"{tree}: {entry.decay or 'a callable'} at every="
        f"{entry.every or 'unknown'}"
        for tree, entry in saved.items()
    )
