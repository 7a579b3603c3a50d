"""Flax NNX: the shadow in a live module, in a copy, and in checkpoints."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ema_optax._averages import shadows
from ema_optax._interop.batch_stats import averaged_stats
from ema_optax._messages.progress import Progress
from ema_optax._messages.text import brief
from ema_optax._trees import trees


class _Live(NamedTuple):
    """Holds a module's raw params and statistics while its shadow is in it."""

    params: Any
    stats: Any


# Raw values of the modules that hold their shadow now: inside the `with`, saving one,
# copying it or swapping it again reads them here.
_SWAPPED: dict[int, _Live] = {}


@contextlib.contextmanager
def swapped(
    model: Any, optimizer: Any, *, name: str | None = None, copy: bool = True
) -> Iterator[Any]:
    """Puts the shadow into an NNX module, and always puts the raw params back.

        with ema_optax.nnx.swapped(model, optimizer):
            evaluate(model)

    After the `with`, exceptions included, params and batch statistics are those of
    before; whatever was written into them inside is gone. Other variables (PRNG
    counts, caches, metrics) are left alone throughout. Inside another `with` of the
    same module it swaps from the raw params, and goes back to what the outer one put
    in. It works under `nnx.jit` too.

    Args:
        model: The module that the optimizer trains.
        optimizer: Its `nnx.Optimizer`, with `ema_params` or `bema_params` in its chain.
        name: Which shadow, as in `shadow_params`.
        copy: Whether the module gets copies, as of `shadow_params`. Without, it holds
            the optimizer's own arrays: donate neither of the two inside.

    Yields:
        The module.

    Raises:
        TypeError: If `model` is no module, or `optimizer` no `nnx.Optimizer`.
        ValueError: As in `shadow_params`.
        RuntimeError: If the optimizer was stepped inside: the step was taken from the
            shadow, and is lost for the params.

    >>> import optax, ema_optax
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> chain = optax.chain(optax.sgd(1.0), ema_optax.ema_params(0.99))
    >>> optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    >>> gradients = jax.tree.map(jnp.ones_like, nnx.state(model))
    >>> _ = optimizer.update(model, gradients)
    >>> with ema_optax.nnx.swapped(model, optimizer):
    ...     print(model.bias[...])
    [-0.8181818]
    >>> print(model.bias[...])
    [-1.]
    """
    from flax import nnx

    live = _live(model, optimizer)
    shadow = _shadow(optimizer, live.params, name, "swapped", copy)
    previous = _current(model, optimizer)
    step = optimizer.step[...]
    outermost = id(model) not in _SWAPPED
    try:
        if outermost:
            _SWAPPED[id(model)] = live
        nnx.update(model, shadow)
        yield model
    finally:
        nnx.update(model, previous.params)
        nnx.update(model, previous.stats)
        if outermost:
            del _SWAPPED[id(model)]
    if _differ(step, optimizer.step[...]):
        raise RuntimeError(
            "optimizer.update was called inside ema_optax.nnx.swapped: it stepped from "
            "the shadow. The raw params of before are back and that step is lost for "
            "them, but the optimizer state has seen it. Train outside the with; to "
            "evaluate beside training, use ema_optax.nnx.shadow_copy(model, optimizer)."
        )


def shadow_copy(
    model: object, optimizer: object, *, name: str | None = None, copy: bool = True
) -> Any:
    """Copies an NNX module to one whose params are the shadow, for evaluation.

    The copy shares nothing with the module, which may go on and donate its arrays.
    Other variables and the mode (`averaged.eval()`) are copied as they are.

    Args:
        model: The module that the optimizer trains.
        optimizer: Its `nnx.Optimizer`, with `ema_params` or `bema_params` in its chain.
        name: Which shadow, as in `shadow_params`.
        copy: Whether its arrays are copies. Without, the new module holds arrays of
            the old one and the optimizer: donate none of the three while it is used.

    Raises:
        TypeError: If `model` is no module, or `optimizer` no `nnx.Optimizer`.
        ValueError: As in `shadow_params`.

    >>> import optax, ema_optax
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> chain = optax.chain(optax.sgd(1.0), ema_optax.ema_params(0.99))
    >>> optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    >>> _ = optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    >>> averaged = ema_optax.nnx.shadow_copy(model, optimizer)
    >>> print(averaged.bias[...], model.bias[...])
    [-0.8181818] [-1.]
    """
    from flax import nnx

    live = _live(model, optimizer)
    shadow = _shadow(optimizer, live.params, name, "shadow_copy", copy)
    averaged = _copied(model, copy)
    nnx.update(averaged, shadows.owned(live.stats, copy=copy))
    nnx.update(averaged, shadow)
    return averaged


def split(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Splits an NNX run into two trees of arrays, to save and to resume.

        checkpoint.save("run", *ema_optax.nnx.split(model, optimizer), step=10)

        resumed = checkpoint.resume("run", *ema_optax.nnx.split(model, optimizer))
        ema_optax.nnx.update(model, optimizer, *resumed)

    The first tree is the model's whole state, batch statistics and PRNG keys included
    and intermediates left out; the second is the optimizer's. For inference, without an
    optimizer:

        like = nnx.as_pure(nnx.state(model))
        nnx.update(model, checkpoint.restore("run", "shadow", like=like))

    Inside `swapped` the model's state is the raw one.

    Args:
        model: The module that the optimizer trains.
        optimizer: Its `nnx.Optimizer`.

    Raises:
        TypeError: If `model` is no module, or `optimizer` no `nnx.Optimizer`.

    >>> import optax, ema_optax
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> chain = optax.chain(optax.sgd(1.0), ema_optax.ema_params(0.99))
    >>> optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    >>> params, opt_state = ema_optax.nnx.split(model, optimizer)
    >>> params["bias"], sorted(opt_state)
    (Array([0.], dtype=float32), ['opt_state', 'step'])
    """
    from flax import nnx

    live = _live(model, optimizer)
    state = nnx.as_pure(
        nnx.state(model, nnx.Not(nnx.Intermediate), graph=optimizer.graph)
    )
    state = nnx.merge_state(state, live.params, live.stats)
    opt_state = {
        "opt_state": nnx.as_pure(optimizer.opt_state),
        "step": optimizer.step[...],
    }
    return state, opt_state


def update(model: Any, optimizer: Any, state: Any, opt_state: Any) -> None:
    """Puts the two trees of `split` back into a module and its optimizer.

    All of it or nothing: where the trees do not fit, nothing is changed.

    Args:
        model: A module like the one that was split.
        optimizer: An `nnx.Optimizer` like the one that was split.
        state: The first tree.
        opt_state: The second.

    Raises:
        TypeError: If `model` is no module, or `optimizer` no `nnx.Optimizer`.
        ValueError: If the trees are not of such a module and optimizer.
        RuntimeError: If the module is inside `swapped`, which would undo it.

    >>> import optax, ema_optax
    >>> from flax import nnx
    >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    >>> chain = optax.chain(optax.sgd(1.0), ema_optax.ema_params(0.99))
    >>> optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    >>> saved = ema_optax.nnx.split(model, optimizer)
    >>> _ = optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    >>> ema_optax.nnx.update(model, optimizer, *saved)
    >>> print(model.bias[...], int(optimizer.step[...]))
    [0.] 0
    """
    _check(model, optimizer)
    if id(model) in _SWAPPED:
        raise RuntimeError(
            "The model is inside ema_optax.nnx.swapped, which will put its old params "
            "back. Call ema_optax.nnx.update after the with."
        )
    previous = split(model, optimizer)
    for tree, current, names in (
        (state, previous[0], ("first tree", "model")),
        (opt_state, previous[1], ("second tree", "optimizer")),
    ):
        paths = trees.arranged(tree, current)
        difference = trees.difference(paths, current, names)
        if difference:
            raise ValueError(
                "ema_optax.nnx.update takes what ema_optax.nnx.split gave of such a "
                f"model and optimizer: {difference}."
            )
    try:
        _put(model, optimizer, state, opt_state)
    except BaseException:
        _put(model, optimizer, *previous)
        raise


def _put(model: Any, optimizer: Any, state: Any, opt_state: Any) -> None:
    from flax import nnx

    nnx.update(model, state)
    nnx.update(optimizer.opt_state, nnx.state(opt_state["opt_state"]))
    # Not in place: device_get leaves a NumPy scalar, which cannot be written to.
    optimizer.step.set_value(jnp.asarray(opt_state["step"]))


def refresh_batch_stats(
    model: object,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    progress: Progress = None,
) -> None:
    """Recomputes the BatchNorm statistics of an NNX module for the params it has.

    Works as `ema_optax.linen.refresh_batch_stats`, in the module itself:

        copy = ema_optax.nnx.shadow_copy(model, optimizer)
        ema_optax.nnx.refresh_batch_stats(copy, batches)

    Inside `swapped` it serves the shadow, and the statistics of before come back with
    the raw params. BatchNorm runs in training mode and dropout does not, so that
    the statistics are those that evaluation meets; the module's own modes stay.

    Args:
        model: The module, with averaged params.
        batches: Inputs as arrays or trees of them, of one size: each batch counts the
            same. Cut endless ones, with `itertools.islice`.
        call: How to run the module on a batch. None is `model(batch)`; for other
            batches, or modes that are arguments,
            `lambda model, batch: model(batch["image"], train=True)`.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function that is called with the batches done and all of them.

    Raises:
        TypeError: If `model` is no module.
        ValueError: As in `ema_optax.linen.refresh_batch_stats`.

    >>> import ema_optax
    >>> from flax import nnx
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.ones((2, 1))]
    >>> ema_optax.nnx.refresh_batch_stats(model, batches)
    >>> print(model.mean[...], model.var[...])  # of batches with means 2 and 1
    [1.5] [0.5]
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            "ema_optax.nnx.refresh_batch_stats needs an nnx.Module, got "
            f"{type(model).__name__}. For Linen, call "
            "ema_optax.linen.refresh_batch_stats(apply_fn, variables, batches)."
        )
    _check_flax()
    running = _copied(model)
    running.set_attributes(
        use_running_average=False, deterministic=True, raise_if_not_found=False
    )
    graph, stats, rest = nnx.split(running, nnx.BatchStat, ...)
    stats = nnx.as_pure(stats)
    if not jax.tree.leaves(stats):
        raise ValueError(
            f"This {type(model).__name__} has no batch statistics: there is nothing to "
            "refresh. Without BatchNorm, params are all that it needs."
        )
    if call is not None and not callable(call):
        raise TypeError(
            f"call is a function of the model and a batch, or None; got {brief(call)}."
        )
    run = _Module(graph, call or _call)
    nnx.update(model, averaged_stats(run, rest, stats, batches, progress))


@dataclasses.dataclass(frozen=True)
class _Module:
    """Runs an NNX module: other state, statistics, a batch → new statistics."""

    graph: Any
    call: Callable[[Any, Any], Any]

    def __call__(self, rest: object, stats: object, batch: object) -> Any:
        from flax import nnx

        model = nnx.merge(self.graph, stats, rest)
        self.call(model, batch)
        return nnx.as_pure(nnx.state(model, nnx.BatchStat))


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def _shadow(
    optimizer: Any, params: Any, name: str | None, call: str, copy: bool
) -> Any:
    from flax import nnx

    opt_state = nnx.as_pure(optimizer.opt_state)
    call = f"ema_optax.nnx.{call}(model, optimizer)"
    return shadows.read(opt_state, params, name, call, copy)


def _live(model: object, optimizer: object) -> _Live:
    """Returns raw params and statistics, also while the module holds its shadow."""
    _check(model, optimizer)
    return _SWAPPED.get(id(model)) or _current(model, optimizer)


def _current(model: Any, optimizer: Any) -> _Live:
    from flax import nnx

    filters = (optimizer.wrt, nnx.BatchStat)
    parts = (nnx.state(model, chosen, graph=optimizer.graph) for chosen in filters)
    return _Live(*map(nnx.as_pure, parts))


def _copied(model: object, copy: bool = True) -> Any:
    from flax import nnx

    graph, state = nnx.split(model)
    return nnx.merge(graph, shadows.owned(state, copy=copy))


def _differ(before: object, after: object) -> bool:
    if isinstance(before, Tracer) or isinstance(after, Tracer):
        return False  # under jit there are no numbers to compare
    return bool(np.any(np.asarray(before) != np.asarray(after)))


def _check_flax() -> None:
    """Refuses a Flax without `nnx.as_pure`, before anything of a module is touched."""
    from flax import nnx

    if not hasattr(nnx, "as_pure"):
        raise ImportError(
            "The functions for NNX modules need flax.nnx.as_pure, which Flax has from "
            "0.12.7 on: pip install 'flax>=0.12.7', which needs jax 0.10. With an "
            "older one keep params and optimizer state yourself, from "
            "nnx.split(model, nnx.Param), and call shadow_params(opt_state, params)."
        )


def _check(model: object, optimizer: object) -> None:
    from flax import nnx

    _check_flax()
    if not isinstance(model, nnx.Module) or not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "This takes an nnx.Module and its nnx.Optimizer, got "
            f"{type(model).__name__} and {type(optimizer).__name__}. With params and "
            "optimizer state of your own, call shadow_params(opt_state, params)."
        )
