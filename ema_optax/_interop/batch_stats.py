"""BatchNorm's statistics for averaged params, recomputed from batches."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema_optax._messages.progress import Progress, tracked
from ema_optax._trees import trees

Batch: TypeAlias = optax.Params  # an array or a tree of them
Run: TypeAlias = Callable[[Any, Any, Any], Any]
_Recompute: TypeAlias = Callable[[list[Any], Batch], list[Any]]

_COLLECTION = "batch_stats"
_UNBOUND = re.compile(r"unbound axis name:? '?(\w+)")
_FAR = 2.0**30  # beside a probe so large, float32 does not see a batch's statistics


def refresh_batch_stats(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    progress: Progress = None,
) -> Any:
    """Recomputes the BatchNorm statistics of a Linen model for the params it has.

    Averaged params need statistics of their own: those in a train state follow the raw
    params. For every BatchNorm layer the result holds

        mean = Σ mean(batch) / n,    var = Σ var(batch) / n,

    over all n batches alike, whatever the layers' momentum, as `torch.optim.swa_utils.
    update_bn` does. Each layer normalises with the statistics of the batch, as in
    training; for a layer with an `axis_name` a batch is all that there is on that axis.
    Layers that do not update their statistics keep them.

    Args:
        apply_fn: Called as `apply_fn(variables, batch, mutable=["batch_stats"])`, it
            runs the model in training mode, as `functools.partial(model.apply,
            train=True)` does. Called under `jax.jit`.
        variables: All collections of the model, the averaged params among them:
            `{"params": shadow_params(opt_state, params), "batch_stats": …}`.
        batches: Inputs as arrays or trees of them, of one size: each batch counts the
            same. A few dozen are enough. Cut endless ones, with `itertools.islice`.
        progress: Whether to draw a bar on stderr; None does on a terminal. Or a
            function that is called with the batches done and all of them.

    Returns:
        The variables with new `batch_stats`, of the same structure and dtypes.

    Raises:
        TypeError: If `apply_fn` does not return outputs and updated statistics.
        ValueError: If there are no batches or no statistics, if none is updated, if one
            is no running average, or if one is not finite.

    Source: Izmailov et al. 2018, arXiv:1803.05407, algorithm 1.

    >>> import ema_optax
    >>> import flax.linen as nn
    >>> model = nn.BatchNorm(use_running_average=False, momentum=0.99)
    >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
    >>> variables = model.init(jax.random.key(0), batches[0])
    >>> new = ema_optax.linen.refresh_batch_stats(model.apply, variables, batches)
    >>> new["batch_stats"]
    {'mean': Array([4.], dtype=float32), 'var': Array([1.], dtype=float32)}
    """
    if not isinstance(variables, Mapping) or not variables.get(_COLLECTION):
        collections = (
            sorted(variables) if isinstance(variables, Mapping) else type(variables)
        )
        raise ValueError(
            f"The variables have no 'batch_stats', only {collections}: there is "
            "nothing to refresh. Pass all collections of a model with BatchNorm, "
            "{'params': …, 'batch_stats': …}; without BatchNorm, params are all that "
            "it needs."
        )
    rest = {name: part for name, part in variables.items() if name != _COLLECTION}
    run = _Linen(apply_fn)
    stats = averaged_stats(run, rest, variables[_COLLECTION], batches, progress)
    make: Any = type(variables)
    return make({**variables, _COLLECTION: stats})


@dataclasses.dataclass(frozen=True)
class _Linen:
    """Runs a Linen model: other variables, statistics, a batch → new statistics."""

    apply_fn: Callable[..., Any]

    def __call__(
        self, rest: Mapping[str, Any], stats: optax.Params, batch: Batch
    ) -> optax.Params:
        out = self.apply_fn({**rest, _COLLECTION: stats}, batch, mutable=[_COLLECTION])
        if (
            not isinstance(out, tuple)
            or len(out) != 2
            or not isinstance(out[1], Mapping)
            or _COLLECTION not in out[1]
        ):
            raise TypeError(
                f"apply_fn must return outputs and updated batch_stats, got "
                f"{type(out).__name__}. It is called with mutable=['batch_stats'], "
                "which it has to pass on: lambda variables, batch, **kw: "
                "model.apply(variables, batch['image'], train=True, **kw)."
            )
        return out[1][_COLLECTION]


def averaged_stats(
    run: Run,
    rest: Mapping[str, Any],
    stats: optax.Params,
    batches: Iterable[Batch],
    progress: Progress,
) -> optax.Params:
    """Averages the statistics of all batches alike, in the dtypes of `stats`.

    A layer returns m·old + (1−m)·batch. With old = 0 that is (1−m)·batch; and m is
    the factor on an old value so large that the batch does not count beside it.

    Args:
        run: A hashable function: rest, statistics, a batch → new statistics.
        rest: The model's other variables.
        stats: A tree of the model's statistics.
        batches: At least one.
        progress: As in `tracked`.

    Raises:
        ValueError: As in `refresh_batch_stats`.
    """
    if isinstance(batches, (jax.Array, np.ndarray)):
        raise TypeError(
            f"batches is an array of shape {batches.shape}: its rows would be batches, "
            "of one example each, with a variance of 0. Pass [x] for one batch, or "
            "list(x) where each x[i] is a batch."
        )
    paths, old, structure = trees.flatten(stats)

    def recompute(leaves: list[Any], batch: Batch) -> list[Any]:
        new = _run(run, rest, jax.tree.unflatten(structure, leaves), batch)
        new_paths, leaves, _ = trees.flatten(new)
        if new_paths != paths:
            raise ValueError(
                f"The model has statistics at {paths}, and returned some at "
                f"{new_paths}."
            )
        return leaves

    start = [jnp.asarray(s, trees.wide(s.dtype)) for s in old]
    updated: list[int] = []
    momenta: list[float] = []
    average: list[Any] = []
    faulty = jnp.int32(0)  # number of the first batch that gave NaN or ∞
    count = 0
    # Closed in any case: a traceback would keep the bar on the terminal.
    with contextlib.closing(tracked(batches, "batch statistics", progress)) as items:
        for batch in items:
            count += 1
            if count == 1:
                updated = _updated(recompute, start, batch)
                momenta = _momenta(recompute, start, updated, batch, paths)
                average = [jnp.zeros_like(start[i]) for i in updated]
            new = recompute(_with(start, updated, jnp.zeros_like), batch)
            average, faulty = _mean(average, [new[i] for i in updated], count, faulty)
    if not count:
        raise ValueError(
            "There were no batches: statistics need at least one. An iterator that was "
            "used before is empty; pass a list, or make a new one."
        )
    values = [x / (1 - m) for x, m in zip(average, momenta, strict=True)]
    for i, value in zip(updated, values, strict=True):
        if not np.all(np.isfinite(np.asarray(value))):
            raise _not_finite(paths[i], int(faulty))
    refreshed = list(old)
    for i, value in zip(updated, values, strict=True):
        refreshed[i] = value.astype(old[i].dtype)
    return jax.tree.unflatten(structure, refreshed)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    run: Run, rest: Mapping[str, Any], stats: optax.Params, batch: Batch
) -> optax.Params:
    names: list[str] = []
    while True:
        try:
            return _over_axes(run, names)(rest, stats, batch)
        except NameError as error:  # JAX's, of the axis_name of a BatchNorm
            match = _UNBOUND.search(str(error))
            if not match or match[1] in names:
                raise
            names.append(match[1])


def _over_axes(run: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Gives `run` named axes of one member each, as on a single device."""
    if not names:
        return run
    inner = jax.vmap(
        _over_axes(run, names[1:]), in_axes=(None, None, 0), axis_name=names[0]
    )

    def on_one_member(rest: object, stats: object, batch: Batch) -> Any:
        new = inner(rest, stats, jax.tree.map(lambda x: jnp.asarray(x)[None], batch))
        return jax.tree.map(lambda x: x[0], new)

    return on_one_member


@jax.jit
def _mean(
    average: list[jax.Array], new: list[jax.Array], count: int, faulty: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    finite = jnp.array([jnp.all(jnp.isfinite(x)) for x in new]).all()
    faulty = jnp.where((faulty == 0) & ~finite, count, faulty)
    return [a + (x - a) / count for a, x in zip(average, new, strict=True)], faulty


def _with(
    leaves: list[Any], chosen: list[int], make: Callable[[Any], Any]
) -> list[Any]:
    return [make(x) if i in chosen else x for i, x in enumerate(leaves)]


def _updated(recompute: _Recompute, start: list[Any], batch: Batch) -> list[int]:
    """Finds which statistics a batch changes, by number.

    Frozen layers use theirs as they are.
    """
    # Two old values: one alone may be equal to what the batch gives.
    probes = [start, [2 * x + 1 for x in start]]
    answers = [recompute(probe, batch) for probe in probes]
    updated = [
        i
        for i in range(len(start))
        if any(
            np.any(np.asarray(probe[i]) != np.asarray(answer[i]))
            for probe, answer in zip(probes, answers, strict=True)
        )
    ]
    if not updated:
        raise ValueError(
            "The model updated no statistics. Run it in training mode: "
            "functools.partial(model.apply, train=True), or whatever sets "
            "use_running_average=False in its BatchNorm layers."
        )
    return updated


def _momenta(
    recompute: _Recompute,
    start: list[Any],
    updated: list[int],
    batch: Batch,
    paths: list[str],
) -> list[float]:
    """Measures the momentum of each statistic that a batch updates."""
    near = recompute(_with(start, updated, jnp.zeros_like), batch)
    for i in updated:
        if not np.all(np.isfinite(np.asarray(near[i]))):
            raise _not_finite(paths[i], 1)
    scale = {i: float(np.max(np.abs(np.asarray(near[i])), initial=1)) for i in updated}
    probe = {i: _FAR * 2.0 ** np.ceil(np.log2(scale[i])) for i in updated}
    far = recompute(
        [jnp.full_like(x, probe[i]) if i in probe else x for i, x in enumerate(start)],
        batch,
    )
    momenta = []
    for i in updated:
        answer = np.asarray(far[i])
        factors = answer / answer.dtype.type(probe[i])
        momentum = float(str(factors.max(initial=0)))  # 0.99, not 0.9900000095
        if momentum < 2 / _FAR:  # the old value is forgotten, or is not averaged at all
            momentum = 0.0
            fits = np.allclose(far[i], near[i], rtol=1e-4, atol=1e-6)
        else:
            fits = momentum < 1 and np.ptp(factors) <= 1e-6
        if not fits:
            raise ValueError(
                f"'{paths[i]}' is no running average of what a batch gives, so it has "
                "no mean over batches. Spectral norm keeps such vectors among the "
                "batch statistics: in Linen give it a collection of its own, with "
                "collection_name='spectral_stats'; in NNX call it with "
                "update_stats=False, from call=lambda model, batch: …"
            )
        momenta.append(momentum)
    return momenta


def _not_finite(path: str, batch: int) -> ValueError:
    return ValueError(
        f"Batch {batch} gave statistics that are not finite, at '{path}'. Look for NaN "
        "in the batch or in the params, or for a layer that overflows in float16."
    )
