"""One leaf of a shadow: its dtype, its rounding, and s + w·(p − s)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ema_optax._messages import arguments
from ema_optax._messages.text import brief
from ema_optax._trees import trees

_ALLOWED = ("bfloat16", "float32", "float64")
_ROUNDED = 1e-4  # how far a sum of logs, rounded, may lead outside of [0, 1]
_STREAMS = 16  # different sequences of rounding noise; more would compile longer


def check_shadow_dtype(shadow_dtype: DTypeLike | None) -> np.dtype | None:
    """Checks `shadow_dtype`, and returns it as a dtype or None.

    Raises:
        ValueError: If a shadow cannot be kept in that dtype.
    """
    if shadow_dtype is None:
        return None
    dtype = arguments.dtype(shadow_dtype, "shadow_dtype")
    if dtype.name not in _ALLOWED:
        raise ValueError(
            f"shadow_dtype must be one of {', '.join(_ALLOWED)}, got {dtype.name}. For "
            "shadows of two bytes use bfloat16, which is rounded stochastically."
        )
    if dtype.name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "shadow_dtype='float64' needs jax.config.update('jax_enable_x64', True); "
            "without it JAX would store float32."
        )
    return dtype


def check_rounding(rounding: str | None, shadow_dtype: np.dtype | None) -> bool:
    """Checks `rounding`; whether float32 shadows are rounded stochastically.

    Raises:
        ValueError: If there is no such rounding, or it would freeze the shadow.
    """
    if rounding not in (None, "nearest", "stochastic"):
        raise ValueError(
            f"rounding must be 'nearest' or 'stochastic', got {brief(rounding)}. None "
            "rounds bfloat16 shadows stochastically and wider ones to nearest."
        )
    if rounding == "nearest" and shadow_dtype == jnp.bfloat16:
        raise ValueError(
            "A bfloat16 shadow rounded to nearest does not move: at β = 0.999 not "
            "before it is 390 % away. Leave rounding out, or use float32."
        )
    return rounding == "stochastic"


def stored_dtype(dtype: DTypeLike, shadow_dtype: np.dtype | None = None) -> np.dtype:
    """Returns the dtype in which the shadow of a param is stored.

    Args:
        dtype: Floating or complex dtype of the param.
        shadow_dtype: As in `ema_params`; None means float32 where params
            are narrower and their own dtype otherwise. Complex params are stored as
            complex64 or, where either dtype has 64-bit parts, complex128.

    >>> stored_dtype(jnp.bfloat16), stored_dtype(jnp.float32, jnp.dtype("bfloat16"))
    (dtype('float32'), dtype(bfloat16))
    """
    if shadow_dtype is None:
        return trees.wide(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype("complex128" if shadow_dtype.itemsize == 8 else "complex64")
    return shadow_dtype


def start(param: ArrayLike, shadow_dtype: np.dtype | None) -> Any:
    """Copies a param as a shadow, into a buffer of its own, sharded alike."""
    return copied(param, stored_dtype(jnp.result_type(param), shadow_dtype))


def copied(param: ArrayLike, dtype: DTypeLike) -> Any:
    """Copies a param in a dtype, into a buffer of its own, sharded alike.

    The copy of an abstract param is abstract: zeros in its place would be an average of
    params that no model held.
    """
    if isinstance(param, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(param.shape, dtype, sharding=param.sharding)
    return jnp.array(param, dtype=dtype)


class Weight(NamedTuple):
    """The weight w of new params, counted from the nearer end of [0, 1].

    Attributes:
        near_new: Whether w > ½: the fold is then p + (w − 1)·(p − s), which is p to the
            last bit for w = 1, and s + w·(p − s) otherwise.
        factor: What multiplies p − s; NaN if w is no weight, and then no element holds.
    """

    near_new: jax.Array
    factor: jax.Array


def split_weight(newest_weight: ArrayLike) -> Weight:
    """Splits a scalar weight w in [0, 1] for `fold`; outside of it, it is none."""
    w = jnp.asarray(newest_weight, float)  # float32, or float64 where x64 is enabled
    factor = jnp.where(w > 0.5, w - 1, w)
    is_weight = (w >= -_ROUNDED) & (w <= 1 + _ROUNDED)
    return Weight(w > 0.5, jnp.where(is_weight, factor, jnp.nan))


# With jit, traced and lowered once for each shape, not for each leaf. It uses `lax`
# alone: `jnp.where` and `jnp.isfinite` are calls that XLA copies and inlines for each
# leaf.
@functools.partial(jax.jit, static_argnames="stochastic")
def fold(
    shadow: jax.Array,
    param: ArrayLike,
    weight: Weight,
    seed: ArrayLike,
    *,
    stochastic: bool = False,
) -> jax.Array:
    """Returns s + w·(p − s), rounded to the shadow's dtype.

    An element that would become non-finite holds; one that is non-finite itself takes
    the param's value. A weight of 1 copies exactly. With a weight outside of [0, 1] all
    elements become NaN, so that a decay that is none does not go unseen.

    Args:
        shadow: Floating or complex array s.
        param: Array p of the same shape, any floating or complex dtype.
        weight: w, from `split_weight`.
        seed: uint32 scalar that differs between folds and between leaves, for
            stochastic rounding.
        stochastic: Whether float32 is rounded stochastically; bfloat16 always is, wider
            and complex shadows never.
    """
    dtype = trees.wide(shadow.dtype)
    old = shadow.astype(dtype)
    new = _as_held(jnp.asarray(param), dtype)
    near_new, factor = weight
    base = jax.lax.select_n(near_new, old, new)
    change = factor.astype(dtype) * (new - old)
    if stochastic and shadow.dtype == jnp.float32:
        change = _dithered(change, base, seed)
    folded = base + change
    if shadow.dtype == jnp.bfloat16:
        folded = _round_stochastically(folded, seed)
    kept = jax.lax.select(_is_finite(old), old, new)
    holds = ~_is_finite(folded) & _is_finite(factor)
    return jax.lax.select(holds, kept, folded).astype(shadow.dtype)


def _is_finite(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jax.lax.is_finite(x.real) & jax.lax.is_finite(x.imag)
    return jax.lax.is_finite(x)


def _as_held(param: jax.Array, dtype: np.dtype) -> jax.Array:
    """Widens a param, rounded as the model holds it.

    XLA leaves out the rounding of a sum to 16 bits where it is widened again. The
    shadow would then fold values that no model held.
    """
    wide = param.astype(dtype)
    kind = jnp.finfo(param.dtype) if jnp.issubdtype(param.dtype, jnp.floating) else None
    if kind is None or kind.bits >= 32:
        return wide
    return jax.lax.reduce_precision(wide, kind.nexp, kind.nmant)


def fold_seeds(count: ArrayLike, leaves: int) -> list[jax.Array]:
    """Returns a seed for each leaf, in the fold at update `count`.

    Leaves of one shape whose seeds are equal share a compiled kernel, so only 16 seeds
    differ: with one for each leaf, 300 like leaves took nine times as long to compile.
    """
    seed = _mix(jnp.asarray(count).astype(jnp.uint32))
    # From numbers that no count reaches: the seed of one leaf is never that of another.
    salts = _mix(np.arange(_STREAMS, dtype=np.uint32) + np.uint32(0x9E37_79B9))
    salted = [seed ^ salt for salt in salts]
    return [salted[leaf % _STREAMS] for leaf in range(leaves)]


@jax.custom_jvp
def _round_stochastically(x: jax.Array, seed: ArrayLike) -> jax.Array:
    """Rounds float32 to a value that bfloat16 holds, up or down by chance.

    The chance of rounding up is the share of the way there, so that the mean over many
    folds is right where rounding to nearest would never move the shadow. The 16 random
    bits are a hash of the element's index and the seed: no key, and the same after a
    resume or on another mesh.
    """
    noise = _random_bits(x.shape, seed) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = bits & jnp.uint32(0x8000_0000)
    magnitude = (bits & jnp.uint32(0x7FFF_FFFF)) + noise
    kept = magnitude & jnp.uint32(0xFFFF_0000)  # the 16 bits that bfloat16 has
    rounded = jax.lax.bitcast_convert_type(sign | kept, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x)


@_round_stochastically.defjvp
def _unrounded(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """Derives the fold as if it were not rounded: straight through the steps.

    Source: Bengio et al. 2013, arXiv:1308.3432.
    """
    return _round_stochastically(*primals), tangents[0]


@jax.custom_jvp
def _dithered(change: jax.Array, base: jax.Array, seed: ArrayLike) -> jax.Array:
    """Adds noise to a change, as wide as the gap to the next float32 on its way.

    The sum, rounded to nearest, then moves by chance where it would stand still, and by
    the change on average. It never moves the other way, and a change of 0 gets no
    noise: constant params are a fixed point, and a weight of 1 copies exactly.
    """
    bits = jax.lax.bitcast_convert_type(base, jnp.int32)
    outwards = (change > 0) == (base > 0)
    after = bits + jnp.where(outwards, 1, -1)
    gap = jnp.abs(jax.lax.bitcast_convert_type(after, jnp.float32) - base)
    # 24 bits: float32 holds whole numbers of no more to the last bit.
    uniform = (_random_bits(base.shape, seed) >> 8).astype(jnp.float32) * 2**-24
    noisy = change + (uniform - 0.5) * jnp.where(base == 0, 0, gap)
    back = (noisy > 0) != (change > 0)
    return jnp.where(back | (change == 0), 0, noisy)


@_dithered.defjvp
def _undithered(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    return _dithered(*primals), tangents[0]


def _random_bits(shape: tuple[int, ...], seed: ArrayLike) -> jax.Array:
    """Hashes the index of each element and the seed to uint32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += iota * jnp.uint32(stride)
    return _mix(index ^ seed)


def _mix(x: jax.Array | np.ndarray) -> Any:
    """Hashes 32-bit integers with low bias.

    Source: Chris Wellons, "Prospecting for hash functions" (lowbias32).
    """
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB_352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846C_A68B)
    return x ^ (x >> 16)
