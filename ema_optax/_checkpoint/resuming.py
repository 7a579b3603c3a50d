"""The function on a directory that resumes a run."""

from collections.abc import Mapping
from typing import Any, Literal, overload

import optax
from etils import epath

from ema_optax._checkpoint.changes import Resumed
from ema_optax._checkpoint.handlers import EmaResume
from ema_optax._checkpoint.steps import find_same_step


@overload
def resume(
    directory: epath.PathLike,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    step: int | None = None,
    item: str | None = None,
    accept_new_decay: bool = False,
    rename: Mapping[str, str] | None = None,
    missing: Literal["refuse"] = "refuse",
    verify: bool = True,
) -> tuple[Any, Any]: ...
@overload
def resume(
    directory: epath.PathLike,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    step: int | None = None,
    item: str | None = None,
    accept_new_decay: bool = False,
    rename: Mapping[str, str] | None = None,
    missing: Literal["start"],
    verify: bool = True,
) -> Resumed: ...
def resume(
    directory: epath.PathLike,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    step: int | None = None,
    item: str | None = None,
    accept_new_decay: bool = False,
    rename: Mapping[str, str] | None = None,
    missing: str = "refuse",
    verify: bool = True,
) -> tuple[Any, Any]:
    """Restore params and optimizer state, to go on with a run.

    All of it exactly, or, where model or optimizer have changed, what fits:

        found = resume(run, params, optimizer.init, missing="start")
        print(found.changes)
        params, opt_state = found

    Params and shadows are then taken where path and shape fit. What has no stored leaf
    starts: a param as it was passed, its shadow as a copy of the param; the count of an
    average goes on where one of its shadows does. The optimizer's own state is found by
    the names of its fields, so that clipping in front moves nothing: `mu` and `nu`
    of Adam are taken param by param, and its count with them, at which the first
    updates of a new param are up to (1−b1)/√(1−b2) times as long, 3.2 by default. Of
    several states with the same fields those are the same that have the same params
    or, where as many are saved, come in the same order; the others start. Where two
    transforms call their fields alike, as Adam and AdaMax do, the state is taken.

    Args:
        directory: The folder of a run, or of one step of it.
        params: Params of the model, abstract or concrete; concrete where they start.
        opt_state: `optimizer.init(params)`, or its `eval_shape`. With `missing="start"`
            also `optimizer.init` itself, or another function from params to an
            optimizer state: what starts is then made from the params that go on.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several of ours.
        accept_new_decay: Keep the shadow although the chain has another decay or
            `every` than the one it was averaged with.
        rename: Slots of `params` to stored paths, beginnings and patterns included, as
            in `restore`; shadows and the optimizer's moments follow. And averages of
            this run to stored ones: `{"shadow/slow": "shadow"}`.
        missing: `"refuse"`, or `"start"` for what the checkpoint does not have; leaves
            that only the checkpoint has are then left, and floats are cast.
        verify: Whether to compare what is read with its checksums.

    Returns:
        A pair of params and optimizer state, count and shadows included, bit for bit
        where they are taken. With `missing="start"` it is a `Resumed`, whose `changes`
        say what was taken, started and left.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If model or optimizer differ from the saved run's, and how; with
            `missing="start"` if no param fits, if what starts would be made from the
            fresh params, or is abstract.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ema_optax.checkpoint.save(folder, params, opt_state, step=300)
    ...     params, opt_state = resume(folder, params, opt_state)
    >>> opt_state.shadow
    {'w': Array([1., 1.], dtype=float32)}
    """
    found = find_same_step(directory, step, item)
    args = EmaResume(
        params,
        opt_state,
        accept_new_decay=accept_new_decay,
        rename=rename,
        missing=missing,
        verify=verify,
    )
    return args.read(found.item)
