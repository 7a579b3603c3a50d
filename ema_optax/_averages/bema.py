"""BEMA: an average whose lag is corrected by how far the params have moved."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ema_optax._averages import fold
from ema_optax._averages.average import Average
from ema_optax._averages.states import BemaMadeBy, BemaParamsState
from ema_optax._averages.update import (
    check_period,
    check_state,
    fold_update,
    matching_leaves,
    require_params,
)
from ema_optax._trees import selection, trees

_NUMBERS = (int, float, np.integer, np.floating)


def bema_params(
    *,
    every: int = 400,
    ema_power: float = 0.5,
    bias_power: float = 0.2,
    lag: float = 10,
    multiplier: float = 1.0,
    min_newest_weight: float = 0.0,
    mask: selection.Mask | None = None,
    shadow_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps a bias-corrected exponential moving average of the params.

    Chain it last, after the optimizer. Updates pass through untouched. At every
    `every`-th update t the average takes in p, what the model holds after it:

        s ← (1 − b)·s + b·p,    b = max((ρ + γt)^−κ, min)

    and reading it with `ema_optax.shadow_params(opt_state, params)` adds a correction
    for the lag of s, from the live params p and the params p₀ at init:

        s + a·(p − p₀),    a = (ρ + γt)^−η.

    What is read thus follows the live params between folds, too. The state holds two
    trees, s and p₀.

    s starts as p₀. t counts updates, inside `optax.MultiSteps` the real ones.
    Elements of p that are not finite are left out: in a fold s holds there, and where
    p or p₀ is not finite, or the sum is not in the params' dtype, s alone is read.
    Integer, bool and PRNG-key leaves, and those the mask leaves out, are not averaged.

    Two averages of one run: give the other one a name, `ema_params({"ema": 0.9999})`.
    It is read with `name="ema"`, and BEMA from its own part of the state.

    Args:
        every: Updates between folds, ≥ 1. Unlike in `ema_params`, b does not
            depend on it: rarer folds make a longer average.
        ema_power: κ ≥ 0. With 0, s is the params at the last fold.
        bias_power: η ≥ 0. With 0, a = 1 at every t, the whole correction; a large one,
            such as 8, leaves next to none.
        lag: ρ > 0, in updates: the age at which averaging starts.
        multiplier: γ ≥ 0: how much older it gets with each update.
        min_newest_weight: Lower bound of b, in [0, 1].
        mask: Which leaves are averaged, as in `ema_params`.
        shadow_dtype: How s is stored, as in `ema_params`. p₀ keeps the params' dtype.

    Returns:
        A transform with state `BemaParamsState`.

    Raises:
        ValueError, TypeError: If an argument is outside its interval, or the first b
            would be above 1.

    Source: Block and Zhang 2025, arXiv:2508.00180, in the form of `BEMACallback` in
    Hugging Face TRL (trl/trainer/callbacks.py), whose update_freq is `every` and whose
    min_ema_multiplier is `min_newest_weight`. After each fold both give the same
    weights. TRL's stay so until the next fold; it keeps s in the params' dtype, folds
    what is not finite, and has update_after, in place of which averaging starts here
    where the state is initialised.

    >>> optimizer = optax.chain(optax.sgd(0.5), bema_params(every=1, lag=3))
    >>> params = {"w": jnp.array([1.0])}
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": jnp.array([1.0])}, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> state[1].average["w"]  # 1 + (3 + 1)^−.5·(0.5 − 1)
    Array([0.75], dtype=float32)
    >>> from ema_optax import shadow_params
    >>> shadow_params(state, params)["w"]  # 0.75 + (3 + 1)^−.2·(0.5 − 1)
    Array([0.37107...], dtype=float32)
    """
    made_by = _checked(every, ema_power, bias_power, lag, multiplier, min_newest_weight)
    dtype = fold.check_shadow_dtype(shadow_dtype)

    def init(params: Any) -> Any:
        chosen = selection.averaged_only(params, mask)
        # Each in buffers of its own: a step may donate params and state together.
        average = jax.tree.map(lambda p: fold.start(p, dtype), chosen)
        anchor = jax.tree.map(lambda p: fold.copied(p, jnp.result_type(p)), chosen)
        return BemaParamsState(jnp.zeros([], jnp.int32), average, anchor, made_by)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        require_params(params, "bema_params")
        check_state(state, BemaParamsState, "bema_params")
        count = jnp.asarray(optax.safe_increment(state.count))
        (average,) = fold_update(
            [state.average],
            [functools.partial(_newest_weight, made_by)],
            updates,
            params,
            count=count,
            every=made_by.every,
        )
        return updates, BemaParamsState(count, average, state.anchor, made_by)

    return optax.GradientTransformationExtraArgs(init, update)


CALLED = " (bema_params)"  # after the path of a state, in errors


def average_of(path: str, state: BemaParamsState) -> "BemaAverage":
    """Returns the average of a state at a path."""
    return BemaAverage(
        path, "", state.count, state.made_by, state.average, anchor=state.anchor
    )


@dataclasses.dataclass(frozen=True)
class BemaAverage(Average):
    """The average of a `BemaParamsState`, whose shadow is computed when it is read."""

    made_by: BemaMadeBy | None
    is_computed = True
    fields = ("average", "anchor")
    source = "the params of its first update too"
    anchor: optax.Params = ()

    @property
    def where(self) -> str:
        """Its place in errors."""
        return self.path + CALLED

    def read(self, params: optax.Params | None) -> optax.Params:
        """Computes s + a·(p − p₀), in float32 or wider, in arrays of its own.

        Args:
            params: The live params p; stacked where the state is, by `jax.vmap`.

        Raises:
            ValueError: If they are missing or do not fit, or the state was made by
                hand.
        """
        if params is None:
            raise ValueError(
                f"The shadow at '{self.where}' is computed from the live params, and "
                "there are none. Call shadow_params(opt_state, params). The average "
                "without its correction is the state's `average`."
            )
        if self.made_by is None:
            raise ValueError(
                "This BemaParamsState was made by hand and does not say its "
                "bias_power, lag and multiplier, which reading it needs. Start from "
                "bema_params(...).init(params), and put other values in with "
                "state._replace(count=…, average=…, anchor=…)."
            )
        average = trees.arranged(self.tree, params)
        leaves = matching_leaves(average, params)
        live, structure = jax.tree.flatten(params, is_leaf=trees.is_placeholder)
        anchors = trees.flatten(trees.arranged(self.anchor, params))[1]
        for i, leaf in enumerate(leaves):
            if not trees.is_placeholder(leaf):
                leaves[i] = _corrected(
                    leaf, live[i], anchors[i], self.count, self.made_by
                )
        return jax.tree.unflatten(structure, leaves)

    def kept(self, params: optax.Params) -> optax.Params:
        """Returns s, without the correction."""
        return self.tree

    def decay_at(self, count: jax.Array) -> jax.Array | None:
        """Returns 1 − b of the newest fold; None where the state was made by hand."""
        weight = self.weight_of_fold(count)
        return None if weight is None else 1 - weight

    def weight_of_fold(self, count: jax.Array) -> jax.Array | None:
        """Returns b of the newest fold; None where the state was made by hand."""
        if self.made_by is None:
            return None
        every = self.made_by.every
        return _newest_weight(self.made_by, jnp.maximum(count - count % every, every))

    def log_kept(self, steps: jax.Array) -> jax.Array:
        """Returns log(1 − b) at the steps that fold, and 0 at the others."""
        assert self.made_by is not None
        logs = jnp.log1p(-_newest_weight(self.made_by, steps))
        return jnp.where(steps % self.made_by.every == 0, logs, 0.0)


@functools.partial(jax.jit, static_argnums=4)
def _corrected(
    average: jax.Array,
    param: ArrayLike,
    anchor: ArrayLike,
    count: ArrayLike,
    record: BemaMadeBy,
) -> jax.Array:
    slot = jnp.result_type(param)
    dtype = np.promote_types(trees.wide(average.dtype), slot)
    s, p, p0 = (jnp.asarray(x).astype(dtype) for x in (average, param, anchor))
    a = _bias_weight(record, count).astype(dtype)
    a = a.reshape(a.shape + (1,) * (s.ndim - a.ndim))  # where states are stacked
    moved = s + a * (p - p0)
    # In the dtype of the model: float16 ends at 65504, and the sum goes beyond p.
    return jnp.where(jnp.isfinite(moved.astype(slot)), moved, s)


def _newest_weight(record: BemaMadeBy, count: ArrayLike) -> jax.Array:
    """Computes the weight of new params in the fold at t: b = max((ρ + γt)^−κ, min)."""
    return jnp.maximum(
        _age(record, count) ** -record.ema_power, record.min_newest_weight
    )


def _bias_weight(record: BemaMadeBy, count: ArrayLike) -> jax.Array:
    """Computes the share of the way from p₀ to add at t: a = (ρ + γt)^−η."""
    return _age(record, count) ** -record.bias_power


def _age(record: BemaMadeBy, count: ArrayLike) -> jax.Array:
    t = jnp.asarray(count, float)  # float32, or float64 where x64 is enabled
    return record.lag + record.multiplier * t


def _checked(every: object, *numbers: Any) -> BemaMadeBy:
    every = check_period(every, "every", BemaMadeBy._fields)
    record = BemaMadeBy(every, *numbers)
    for name, value in record._asdict().items():
        if isinstance(value, bool) or not isinstance(value, _NUMBERS):
            raise TypeError(
                f"{name} must be a Python number, got {type(value).__name__}: it is "
                "kept in the type of the state. optax.inject_hyperparams turns every "
                f"number into an array: pass it static_args={BemaMadeBy._fields}."
            )
    intervals = {
        "ema_power": (0 <= record.ema_power < math.inf, "κ ≥ 0, such as 0.5"),
        "bias_power": (0 <= record.bias_power < math.inf, "η ≥ 0, such as 0.2"),
        "lag": (0 < record.lag < math.inf, "ρ > 0 updates, such as 10"),
        "multiplier": (0 <= record.multiplier < math.inf, "γ ≥ 0, such as 1.0"),
        "min_newest_weight": (0 <= record.min_newest_weight <= 1, "in [0, 1]"),
    }
    for name, (inside, interval) in intervals.items():
        if not inside:  # so is NaN
            raise ValueError(
                f"bema_params takes {name} {interval}, got {getattr(record, name)!r}."
            )
    record = BemaMadeBy(every, *map(float, numbers))
    first = (record.lag + record.multiplier * every) ** -record.ema_power
    if first > 1:
        raise ValueError(
            f"The first fold of bema_params would give new params the weight "
            f"(lag + multiplier·every)^−ema_power = {first:.4g}, more than all. Take "
            f"lag ≥ 1, such as lag=10; got lag={record.lag}, "
            f"multiplier={record.multiplier}, every={every}."
        )
    return record
