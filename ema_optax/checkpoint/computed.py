"""Shadows that lie in no state, but are computed for a save: those of `bema_params`.

What they are computed from, the average and the first params, is saved with the
optimizer state and resumed from there. The shadow beside it is for whoever restores.
"""

from collections.abc import Mapping
from typing import Any

import jax

from ema_optax import bema, shadows, trees
from ema_optax.states import BemaRecord, bema_record_of


def computed_shadows(opt_state: Any, params: Any) -> dict[str, Any]:
    """Returns the shadow of each state of `bema_params`, by its place.

    In float32 or wider: restored in the params' dtypes it is what `shadow_params`
    returns. The params are matched by path, and may have leaves that the optimizer was
    not given.

    Raises:
        ValueError: If the params do not fit.
    """
    states = shadows.bema_states(opt_state)
    if not states:
        return {}
    pairs = jax.tree_util.tree_flatten_with_path(params)[0]
    live = {trees.path_name(path): leaf for path, leaf in pairs}

    def param(key_path: Any, _: Any) -> Any:
        path = trees.path_name(key_path)
        if path not in live:
            raise ValueError(
                f"'{path}' is averaged by bema_params, and not in the params. Its "
                "shadow is computed from them: save EmaSave(params, opt_state) with "
                "the params that the optimizer state belongs to."
            )
        return live[path]

    return {
        at: bema.corrected(
            state, jax.tree_util.tree_map_with_path(param, state.average)
        )
        for at, state in states.items()
    }


def computed_paths(opt_state: Any) -> set[str]:
    """Returns the paths of the params whose shadow is computed."""
    averages = [state.average for state in shadows.bema_states(opt_state).values()]
    return {
        trees.path_name(path)
        for average in averages
        for path, _ in jax.tree_util.tree_flatten_with_path(average)[0]
    }


def arguments(opt_state: Any) -> list[dict[str, Any]]:
    """Returns what each `bema_params` in a state was given, for a manifest."""
    states = shadows.bema_states(opt_state).values()
    return [bema_record_of(state)._asdict() for state in states]


def check_same_arguments(
    saved: Mapping[str, Any], opt_state: Any, *, accept_new: bool
) -> None:
    """Refuses to resume with another `bema_params`, or with one where there was none.

    Args:
        saved: What the manifest says of the shadow that has no name.
        opt_state: The state to go on with.
        accept_new: Whether other arguments are accepted.

    Raises:
        ValueError: If it would.
    """
    before, now = saved.get("bema", []), arguments(opt_state)
    if before == now or (accept_new and len(before) == len(now)):
        return
    there, here = (
        text(given) if given else "no bema_params" for given in (before, now)
    )
    accept = (
        "Pass accept_new_decay=True to keep the average and go on so; or chain"
        if len(before) == len(now)
        else "Chain"
    )
    raise ValueError(
        f"Cannot resume: the checkpoint's shadow is of {there}, and the optimizer "
        f"state has {here}. {accept} the averages of the saved run; or take the "
        "weights alone, checkpoint.restore(directory, 'params', like=params), and "
        "start with optimizer.init(params), which averages from there."
    )


def text(given: list[dict[str, Any]]) -> str:
    """Returns the arguments in a manifest as the calls that they were given to."""
    return ", ".join(str(BemaRecord(**arguments)) for arguments in given)
