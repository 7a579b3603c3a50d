"""What holds for every tree, every decay and every way to store a shadow.

Hypothesis draws the cases, always the same ones: 2,000 and more in all, which the last
test counts. A tree is drawn with its kinds of leaves from a few, since each new shape
compiles anew; the values come from a drawn seed.
"""

import collections
import contextlib
import dataclasses
import json
import math
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import ema_optax
from ema_optax import checkpoint
from ema_optax._averages import fold, packing
from tests import older
from tests.older import enable_x64

RAN: collections.Counter[str] = collections.Counter()  # examples, by what was tested


def examples(number):
    """The same cases on each run, with no clock, and nothing kept on disk."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


# Leaves: what makes one of standard normal numbers.
def _array(shape, dtype):
    def make(rng, scale):
        values = rng.standard_normal(shape) * scale
        if jnp.issubdtype(dtype, jnp.complexfloating):
            values = values + 1j * rng.standard_normal(shape) * scale
        return np.asarray(values).astype(dtype)

    return make


LEAVES = {
    "float32[3]": _array((3,), np.float32),
    "float32[2,2]": _array((2, 2), np.float32),
    "float32[]": _array((), np.float32),
    "float32[0]": _array((0,), np.float32),
    "bfloat16[3]": _array((3,), jnp.bfloat16),
    "float16[3]": _array((3,), np.float16),
    "float16[2,0]": _array((2, 0), np.float16),
    "complex64[3]": _array((3,), np.complex64),
    "float": lambda rng, scale: float(np.float32(rng.standard_normal() * scale)),
    "int32[3]": lambda rng, scale: rng.integers(-9, 9, 3, np.int32),
    "bool[]": lambda rng, scale: np.asarray(rng.integers(2), bool),
}
kinds = st.sampled_from(sorted(LEAVES)) | st.just("float32[3]") | st.none()


def _nodes(children):
    keys = st.sampled_from(["a", "b", "kernel", "0"])
    return (
        st.dictionaries(keys, children, max_size=3)
        | st.lists(children, max_size=3)
        | st.lists(children, max_size=2).map(tuple)
        | st.builds(Pair, children, children)
        | st.builds(Layer, children, children)
    )


# No params at all is None to a transform: that is refused, and tested elsewhere.
trees = st.recursive(kinds, _nodes, max_leaves=5).filter(lambda tree: tree is not None)

# β of all sizes, 0 and the float64 next to 1 among them.
betas = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.9, 0.999, 0.99999])
positive = st.floats(1e-3, 1e4)
updates_ = st.integers(1, 50)
FAMILIES = {
    "constant": st.builds(ema_optax.constant, betas),
    "warmup": st.builds(ema_optax.warmup, betas, st.floats(1, 100)),
    "debiased": st.builds(ema_optax.debiased, betas),
    "half_life": st.builds(ema_optax.half_life, positive),
    "ramp": st.builds(ema_optax.ramp, betas, positive),
    "cosine": st.builds(ema_optax.cosine, betas, updates_),
    "inverse_power": st.builds(
        lambda beta, gamma, power, share: ema_optax.inverse_power(
            beta, gamma, power, share * beta
        ),
        betas,
        st.floats(0.1, 100),
        st.floats(0.1, 3),
        st.floats(0, 1),
    ),
    "power": st.one_of(
        st.just(ema_optax.uniform()),
        st.builds(ema_optax.power, st.floats(0.01, 0.2886)),
        st.builds(lambda g: ema_optax.power(exponent=g), st.floats(-0.9, 100)),
    ),
    "fraction": st.builds(ema_optax.fraction, st.floats(0.001, 1)),
    "window": st.builds(ema_optax.window, st.integers(1, 12)),
}
# Of the run's length, whatever the batch; or of whole updates, which a batch may break.
_relative = ("power", "fraction", "window")
# Not the powers below 1 of a β near 0, whose logarithm float32 knows less well.
exact = st.one_of(*FAMILIES.values())
FAMILIES["scale_to_batch"] = st.builds(
    ema_optax.scale_to_batch,
    st.one_of(*(f for name, f in FAMILIES.items() if name not in _relative)),
    st.floats(0.1, 64),
)
FAMILIES["start_after"] = st.builds(
    ema_optax.start_after, st.one_of(*FAMILIES.values()), st.integers(0, 5)
)
decays = st.one_of(*FAMILIES.values())
AND_CALLABLES = {
    **FAMILIES,
    "schedule": st.builds(lambda beta: lambda step: beta * step / (step + 1), betas),
}


class Storage(NamedTuple):
    """How a shadow is kept: arguments of `ema_params`."""

    shadow_dtype: str | None
    rounding: str | None

    def name(self):
        return "-".join(filter(None, self)) or "default"

    def x64(self):
        return enable_x64(self.shadow_dtype == "float64")


STORAGES = [
    Storage(None, None),
    Storage("float32", "stochastic"),
    Storage("bfloat16", None),
    Storage("float64", None),
]


class Case(NamedTuple):
    decay: Any
    every: int
    storage: Storage
    pack_small: bool

    def transform(self):
        return ema_optax.ema_params(
            self.decay,
            every=self.every,
            shadow_dtype=self.storage.shadow_dtype,
            rounding=self.storage.rounding,
            pack_small=self.pack_small,
        )


def cases(decays=decays, storages=STORAGES):
    return st.builds(
        Case,
        decays,
        st.sampled_from([1, 1, 2, 3]),
        st.sampled_from(storages),
        st.sampled_from([False, False, False, True]),
    )


seeds = st.integers(0, 2**32 - 1)


def filled(tree, rng, scale):
    """Returns a drawn tree with values in it."""
    return jax.tree.map(
        lambda kind: LEAVES[kind](rng, scale),
        tree,
        is_leaf=lambda x: isinstance(x, str),
    )


def averaged(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def stepped(params, updates):
    """Returns what a model holds after an update; leaves that are no floats stay."""
    return jax.tree.map(
        lambda p, u: optax.apply_updates(p, u) if averaged(p) else p, params, updates
    )


def parts(leaf):
    """Returns real numbers in float64: real and imaginary parts are averaged alike."""
    wide = np.asarray(leaf)
    if np.iscomplexobj(wide):
        return np.stack([wide.real, wide.imag]).astype(np.float64)
    return wide.astype(np.float64)


def outwards(low, high):
    """Returns a range whose ends bfloat16 holds, the next ones outside."""
    ends = []
    for end, away in ((low, -np.inf), (high, np.inf)):
        with np.errstate(over="ignore"):
            near = end.astype(np.float32).astype(jnp.bfloat16)
        beyond = near.astype(np.float64)
        wrong = beyond > end if away < 0 else beyond < end
        further = np.nextafter(near, np.asarray(away, jnp.bfloat16))
        ends.append(np.where(wrong, further.astype(np.float64), beyond))
    return ends


def kinds_of(state):
    """What must not change: structure, shapes, dtypes, weak types."""
    leaves, structure = jax.tree.flatten(state)
    return structure, [(x.shape, x.dtype, jax.typeof(x).weak_type) for x in leaves]


@contextlib.contextmanager
def op_by_op(every):
    """Without compiling: a `lax.cond` outside jit would be compiled at each update."""
    with jax.disable_jit() if every > 1 else contextlib.nullcontext():
        yield


@pytest.mark.long
@pytest.mark.parametrize("how", STORAGES, ids=lambda s: s.name())
@pytest.mark.parametrize("family", AND_CALLABLES)
@examples(12)
@given(data=st.data(), tree=trees, seed=seeds)
def test_a_shadow_stays_in_the_range_of_what_the_params_were(
    family, how, data, tree, seed
):
    """In no element is it outside what its param has been; not by one ulp.

    With one exception: bfloat16, rounded by chance, may be at the next value of
    bfloat16 outside the range, where bfloat16 does not hold the end of the range
    itself. That is less than one of its ulps.

    Elements that are not finite do not count. Updates come back as the very arrays
    that went in, and the state keeps its structure, shapes, dtypes and weak types.
    """
    RAN["range"] += 1
    case = data.draw(cases(AND_CALLABLES[family], [how]))
    scale = data.draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e3]))
    rng = np.random.default_rng(seed)
    with case.storage.x64(), op_by_op(case.every):
        params = filled(tree, rng, scale)
        transform = case.transform()
        state = transform.init(params)
        kept = kinds_of(state)
        visited = [[parts(x)] for x in jax.tree.leaves(params) if averaged(x)]
        for step in range(1, 4):
            updates = filled(tree, rng, scale)
            if step == 2:
                updates = jax.tree.map(_spoiled, updates)
            out, state = transform.update(updates, state, params)
            assert kinds_of(state) == kept
            same = zip(jax.tree.leaves(out), jax.tree.leaves(updates), strict=True)
            assert all(a is b for a, b in same)
            assert int(state.count) == step
            held = stepped(params, updates)
            found = [x for x in jax.tree.leaves(held) if averaged(x)]
            for seen, leaf in zip(visited, found, strict=True):
                seen.append(parts(leaf))
            # The model goes on from finite params, as after a skipped step.
            params = held if step != 2 else params
        shadow = [parts(x) for x in jax.tree.leaves(packing.unpacked(state.shadow))]
    for seen, leaf in zip(visited, shadow, strict=True):
        steps = np.stack(seen)
        finite = np.isfinite(steps)
        low = np.min(np.where(finite, steps, np.inf), axis=0)
        high = np.max(np.where(finite, steps, -np.inf), axis=0)
        if case.storage.shadow_dtype == "bfloat16":
            low, high = outwards(low, high)
        assert ((low <= leaf) & (leaf <= high)).all()


def _spoiled(update):
    """Returns an update with a NaN or an infinity in it, where there is room."""
    if np.ndim(update) != 1 or np.size(update) != 3 or not averaged(update):
        return update
    spoiled = np.array(update)
    spoiled[:2] = [np.nan, np.inf]
    return spoiled


@pytest.mark.long
@examples(200)
@given(trees, cases(), seeds)
def test_params_that_do_not_move_are_a_fixed_point(tree, case, seed):
    """Bit for bit, at every fold: their shadow is what it started as.

    Of bfloat16 too, where the params are; of wider params within one ulp, as it is
    the values around them that it is rounded to by chance.
    """
    RAN["fixed point"] += 1
    rng = np.random.default_rng(seed)
    with case.storage.x64(), op_by_op(case.every):
        params = filled(tree, rng, 1.0)
        transform = case.transform()
        state = transform.init(params)
        start = jax.tree.leaves(packing.unpacked(state.shadow))
        zeros = jax.tree.map(
            lambda p: np.zeros(np.shape(p), jnp.result_type(p)), params
        )
        for _ in range(3):
            _, state = transform.update(zeros, state, params)
        ends = jax.tree.leaves(packing.unpacked(state.shadow))
        live = [x for x in jax.tree.leaves(params) if averaged(x)]
        for param, before, after in zip(live, start, ends, strict=True):
            if after.dtype == jnp.bfloat16 and jnp.result_type(param) != jnp.bfloat16:
                low, high = outwards(parts(param), parts(param))
                assert ((low <= parts(after)) & (parts(after) <= high)).all()
            else:
                assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


@pytest.mark.long
@examples(30)
@given(trees, cases(), seeds)
def test_jit_equals_no_jit(tree, case, seed):
    """Within 2 ulp of the largest value averaged, in the shadow's dtype, after 3 folds.

    Not to the last bit: XLA may fuse a multiplication with an addition.
    """
    RAN["jit"] += 1
    rng = np.random.default_rng(seed)
    with case.storage.x64():
        params = filled(tree, rng, 1.0)
        transform = case.transform()
        alone = state = jax.jit(transform.init)(params)
        eager = transform.init(params)
        assert kinds_of(state) == kinds_of(eager)
        compiled = jax.jit(transform.update)
        largest = [np.abs(parts(x)) for x in jax.tree.leaves(params) if averaged(x)]
        for _ in range(3):
            updates = filled(tree, rng, 1.0)
            out, state = compiled(updates, state, params)
            with op_by_op(case.every):
                _, alone = transform.update(updates, alone, params)
            for a, b in zip(
                jax.tree.leaves(out), jax.tree.leaves(updates), strict=True
            ):
                assert np.asarray(a).tobytes() == np.asarray(b, a.dtype).tobytes()
            params = stepped(params, updates)
            live = [np.abs(parts(x)) for x in jax.tree.leaves(params) if averaged(x)]
            largest = [np.maximum(a, b) for a, b in zip(largest, live, strict=True)]
        assert kinds_of(state) == kinds_of(alone)
        pairs = zip(
            jax.tree.leaves(packing.unpacked(state.shadow)),
            jax.tree.leaves(packing.unpacked(alone.shadow)),
            largest,
            strict=True,
        )
        for a, b, size in pairs:
            ulp = float(jnp.finfo(a.dtype).eps) * size
            assert (np.abs(parts(a) - parts(b)) <= 2 * ulp).all()


@pytest.mark.long
@examples(500)
@given(decays, st.integers(1, 60), st.integers(1, 12))
def test_a_fold_over_k_updates_takes_the_product_of_their_decays(decay, step, every):
    """1 − w is Π β of the last k updates that there were, within 1e-12 of float64."""
    RAN["product"] += 1
    first = max(step - every, 0) + 1
    product = math.prod(decay(t) for t in range(first, step + 1))
    weight = decay.newest_weight(step, every=every)
    assert 0 <= weight <= 1
    assert weight == np.float64(weight)
    np.testing.assert_allclose(1 - weight, product, rtol=0, atol=1e-12)


@pytest.mark.long
@examples(150)
@given(exact, st.sampled_from([2, 3, 5]), seeds)
def test_folding_every_k_is_one_fold_with_that_product(decay, every, seed):
    """A shadow after 2k updates is two folds of float64, within 3 ulp of float32."""
    RAN["every"] += 1
    rng = np.random.default_rng(seed)
    held = rng.standard_normal((2 * every + 1, 3)).astype(np.float32)
    transform = ema_optax.ema_params(decay, every=every)
    params = {"w": held[0]}
    state = transform.init(params)
    with jax.disable_jit():
        for target in held[1:]:
            update = {"w": target - params["w"]}
            _, state = transform.update(update, state, params)
            params = optax.apply_updates(params, update)
            if int(state.count) == every:
                middle = np.asarray(params["w"], np.float64)
    shadow = held[0].astype(np.float64)
    for step, new in ((every, middle), (2 * every, np.asarray(params["w"], float))):
        kept = math.prod(decay(t) for t in range(step - every + 1, step + 1))
        shadow = kept * shadow + (1 - kept) * new
    bound = 3 * 2**-23 * np.abs(held).max() * 2
    assert np.abs(np.asarray(state.shadow["w"], float) - shadow).max() <= bound


@pytest.mark.long
@examples(500)
@given(decays)
def test_every_decay_goes_to_json_and_back(decay):
    """The same decay, of the same β, through text that any reader of JSON takes."""
    RAN["json"] += 1
    text = json.dumps(json.loads(decay.to_json()))
    again = ema_optax.Decay.from_json(text)
    assert again == decay
    assert type(again) is type(decay)
    assert [again(t) for t in (1, 7, 1000)] == [decay(t) for t in (1, 7, 1000)]


@pytest.mark.long
@examples(300)
@given(
    st.lists(st.floats(width=32), min_size=8, max_size=8),
    st.lists(st.floats(width=32), min_size=8, max_size=8),
    st.floats(0, 1, width=32),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["nearest", "stochastic", "bfloat16"]),
)
def test_one_fold_of_any_bits(old, new, weight, seed, how):
    """Between s and p where both are finite; s or p, or not finite, where one is not.

    Numbers below the smallest normal one may count as 0, as XLA has them on CPU.
    """
    RAN["bits"] += 1
    s = np.asarray(old, np.float32)
    if how == "bfloat16":
        with np.errstate(over="ignore"):
            s = s.astype(jnp.bfloat16)
    p = np.asarray(new, np.float32)
    folded = fold.fold(
        s,
        p,
        fold.split_weight(weight),
        np.uint32(seed),
        stochastic=how == "stochastic",
    )
    assert folded.dtype == s.dtype
    s, p, got = parts(s), parts(p), parts(folded)
    low, high = np.fmin(s, p), np.fmax(s, p)
    if how == "bfloat16":
        low, high = outwards(low, high)
    tiny = float(np.finfo(np.float32).tiny)
    inside = (low - tiny <= got) & (got <= high + tiny)
    both = np.isfinite(s) & np.isfinite(p)
    assert inside[both].all()
    assert np.isfinite(got[both]).all()
    assert (inside | (got == s))[np.isfinite(s) & ~both].all()  # it holds
    back = np.isfinite(p) & ~both  # a shadow that is not finite takes the param
    assert inside[back & np.isfinite(got)].all()


@pytest.mark.long
@examples(40)
@given(trees, cases(), seeds)
def test_a_checkpoint_gives_back_every_bit(tree, case, seed):
    """Params, shadow, count and decay, of whatever tree, after two updates."""
    rng = np.random.default_rng(seed)
    with case.storage.x64(), tempfile.TemporaryDirectory() as folder:
        params = jax.tree.map(jnp.asarray, filled(tree, rng, 1.0))
        assume(any(map(np.size, jax.tree.leaves(params))))  # something to save
        assume(not isinstance(params, jax.Array) or older.takes_one_array())
        RAN["checkpoint"] += 1
        transform = case.transform()
        state = transform.init(params)
        with op_by_op(case.every):
            for _ in range(2):
                _, state = transform.update(filled(tree, rng, 1.0), state, params)
        checkpoint.save(folder, params, state, step=2)
        fresh = jax.tree.map(jnp.zeros_like, (params, transform.init(params)))
        same_bits(checkpoint.resume(folder, *fresh), (params, state))
        found = checkpoint.describe(folder).trees["shadow"]
        assert (found.decay, found.every, found.count) == (case.decay, case.every, 2)
        shadow = ema_optax.shadow_params(state, params)
        same_bits(checkpoint.restore(folder, "shadow", like=fresh[0]), shadow)


def same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_family_is_among_them():
    assert set(FAMILIES) == set(ema_optax.Decay._kinds)


@pytest.mark.long
def test_enough_was_tried():
    """So many cases in all, where the whole file runs."""
    if len(RAN) == 8:
        assert sum(RAN.values()) >= 2000, RAN
