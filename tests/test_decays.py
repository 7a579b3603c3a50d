"""Every decay against its formula in float64, its products, its JSON and its errors."""

import copy
import dataclasses
import functools
import json
import math
import pathlib
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax._cli import decay_text
from ema_optax._decays.decay import MAKERS, Decay
from ema_optax._decays.decays import as_decay
from tests import reference

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "decays.md"

EXPONENT = 6.93720393760180921  # of width 0.1, from mpmath's root of the cubic

# name in the reference, its arguments, our decay
CASES = {
    "constant": ((0.9999,), ema_optax.constant(0.9999)),
    "warmup": ((0.9999,), ema_optax.warmup(0.9999)),
    "debiased": ((0.999,), ema_optax.debiased(0.999)),
    "uniform": ((), ema_optax.uniform()),
    "power": ((EXPONENT,), ema_optax.power(0.1)),
    "inverse_power": (
        (0.999, 2.0, 0.75, 0.1),
        ema_optax.inverse_power(0.999, 2.0, 0.75, 0.1),
    ),
    "ramp": ((0.9999, 2000.0), ema_optax.ramp(0.9999)),
    "cosine": ((0.996, 3000), ema_optax.cosine(0.996, 3000)),
    "half_life": ((700.0,), ema_optax.half_life(700)),
    "fraction": ((0.05,), ema_optax.fraction(0.05)),
    "window": ((12,), ema_optax.window(12)),
    "start_after": (
        (functools.partial(reference.BETAS["ramp"], b=0.99, tau=2000.0), 100),
        ema_optax.start_after(ema_optax.ramp(0.99), 100),
    ),
    "scale_to_batch": (
        (functools.partial(reference.BETAS["cosine"], b=0.9, n=50), 4),
        ema_optax.scale_to_batch(ema_optax.cosine(0.9, 50), 4),
    ),
}
EVERY_KIND = [decay for _, decay in CASES.values()]


def places_without(name):
    """Returns the places beside its definition that a decay is missing from."""
    rows = PAGE.read_text() if PAGE.exists() else f"| `{name}("
    return [
        place
        for place, there in {
            f"ema_optax/__init__.py does not import {name!r}": hasattr(ema_optax, name),
            f"docs/decays.md lacks {name!r}": f"\n| `{name}(" in f"\n{rows}",
            f"tests/reference.py has no {name!r}": name in reference.BETAS,
            f"CASES of tests/test_decays.py have no {name!r}": name in CASES,
        }.items()
        if not there
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_a_decay_is_where_it_belongs(name):
    """All else follows from its definition; these places need a line each."""
    assert places_without(name) == []
    assert MAKERS[name] is getattr(ema_optax, name)


def test_a_new_decay_is_one_class(monkeypatch):
    """Its repr, JSON and spelling in a shell follow; the places it lacks are named."""
    monkeypatch.setattr(Decay, "_kinds", dict(Decay._kinds))
    before = dict(MAKERS)
    try:

        @dataclasses.dataclass(frozen=True, repr=False)
        class halving(Decay):  # noqa: N801 as the others
            factor: float
            offset: float = 1

            def _log(self, t, xp):
                return xp.log(self.factor) + 0 * t

        decay = halving(0.5)
        assert repr(decay) == "halving(factor=0.5, offset=1)"
        assert Decay.from_json(decay.to_json()) == decay
        assert decay.newest_weight(9, every=3) == pytest.approx(1 - 0.5**3)
        assert decay_text.form("halving") == "halving:FACTOR[,OFFSET]"
        assert decay_text.parse("start_after:halving:0.5,7")[1](8) == 0.5
        assert MAKERS["halving"] is halving
        assert places_without("halving") == [
            "ema_optax/__init__.py does not import 'halving'",
            *["docs/decays.md lacks 'halving'"] * PAGE.exists(),
            "tests/reference.py has no 'halving'",
            "CASES of tests/test_decays.py have no 'halving'",
        ]
    finally:
        MAKERS.clear()
        MAKERS.update(before)


@pytest.mark.parametrize("kind", CASES)
def test_beta_is_the_formula(kind):
    """Concrete steps give the formula in float64; one step off is 1e-9 away or more."""
    args, decay = CASES[kind]
    expected = reference.betas(kind, 5000, *args)
    steps = np.arange(1, 5001)
    np.testing.assert_allclose(decay(steps), expected, rtol=1e-12, atol=1e-14)
    assert decay(7) == pytest.approx(expected[6], rel=1e-12, abs=1e-14)
    assert type(decay(7)) is type(decay.newest_weight(7)) is float
    for dtype in (np.float32, np.uint8):  # whatever the steps come as
        some = decay(steps[:255].astype(dtype))
        np.testing.assert_array_equal(some, decay(steps[:255]))
    bytes_ = jnp.asarray(steps[:255], jnp.uint8)  # 10 + 250 is 4 in their own dtype
    np.testing.assert_allclose(decay(bytes_), expected[:255], rtol=3e-6, atol=1e-12)
    for call in (decay, jax.jit(decay)):
        on_device = call(jnp.asarray(steps))
        assert on_device.dtype == jnp.float32
        np.testing.assert_allclose(on_device, expected, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("every", [1, 7, 10, 250])
@pytest.mark.parametrize("kind", CASES)
def test_newest_weight_is_one_less_the_product(kind, every):
    """In float64 and, traced, in float32: 1 − Πβ over the updates since the last fold.

    3e-6 of the weight is below what one step more or less changes for every kind but
    constant ones, where that changes nothing.
    """
    args, decay = CASES[kind]
    decays = reference.betas(kind, 5000, *args)
    steps = np.arange(every, 5001, every)
    expected = np.array([1 - np.prod(decays[t - every : t]) for t in steps])
    np.testing.assert_allclose(
        decay.newest_weight(steps, every), expected, rtol=1e-10, atol=1e-13
    )
    traced = jax.jit(lambda t: decay.newest_weight(t, every))
    actual = np.asarray(traced(jnp.asarray(steps)), np.float64)
    assert traced(jnp.int32(every)).dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("kind", CASES)
def test_a_window_longer_than_the_run_counts_the_updates_that_exist(kind):
    """newest_weight(5, every=10) is the weight of five updates."""
    args, decay = CASES[kind]
    expected = 1 - np.prod(reference.betas(kind, 5, *args))
    assert decay.newest_weight(5, every=10) == pytest.approx(expected, rel=1e-12)


def test_float32_weights_stay_exact_late_in_a_long_run():
    """At β so near 1 that float32 cannot hold it, the weight still has six digits."""
    for decay, step, expected in [
        (ema_optax.constant(0.99999), 10**6, 1e-5),
        (ema_optax.constant(1 - 1e-9), 10**6, 1e-9),
        (ema_optax.uniform(), 10**7, 1e-7),
        (ema_optax.cosine(0.996, 10**6), 10**6 - 1, 0.004 * (math.pi / 2e6) ** 2),
        (ema_optax.ramp(0.99999), 10**6, 1e-5),
        (ema_optax.debiased(0.99999), 10, 0.1000045),
    ]:
        weight = jax.jit(decay.newest_weight)(jnp.int32(step))
        assert float(weight) == pytest.approx(expected, rel=2e-6)


def test_defaults():
    """What the documentation and other systems say that they are."""
    assert ema_optax.inverse_power() == ema_optax.inverse_power(0.9999, 1, 2 / 3, 0)
    assert ema_optax.ramp(0.9) == ema_optax.ramp(0.9, 2000)
    assert ema_optax.warmup(0.9) == ema_optax.warmup(0.9, 10)


def test_power_takes_width_or_exponent():
    """Both spellings agree with the root that mpmath finds."""
    assert ema_optax.power(0.1).exponent == pytest.approx(EXPONENT, rel=1e-12)
    assert ema_optax.power(exponent=2.0).exponent == 2.0
    for width, exponent in [(0.05, 16.97), (0.1, 6.94), (0.15, 3.56), (0.2, 1.83)]:
        assert ema_optax.exponent_from_width(width) == pytest.approx(exponent, abs=5e-3)
        back = ema_optax.width_from_exponent(ema_optax.exponent_from_width(width))
        assert back == pytest.approx(width, rel=1e-12)
    assert ema_optax.exponent_from_width(1 / math.sqrt(12)) == pytest.approx(
        0, abs=1e-9
    )
    for exponent, variance in [(0, 1 / 12), (1, 1 / 18), (-0.5, 4 / 45)]:
        width = ema_optax.width_from_exponent(exponent)
        assert width == pytest.approx(math.sqrt(variance), rel=1e-14)


def test_start_after_copies_and_then_counts_from_there():
    """β is 0 up to the step; the inner decay's first step follows."""
    decay = ema_optax.start_after(ema_optax.constant(0.9), 10)
    assert [decay(t) for t in (1, 10, 11, 50)] == pytest.approx([0, 0, 0.9, 0.9])
    assert decay.newest_weight(12, every=2) == pytest.approx(1 - 0.81)
    assert decay.newest_weight(12, every=3) == 1.0  # a copied update is in the window
    swa = ema_optax.start_after(ema_optax.uniform(), 1000)
    np.testing.assert_allclose(swa(np.arange(1001, 1005)), [0, 1 / 2, 2 / 3, 3 / 4])
    unmoved = ema_optax.start_after(0.9, 0)
    np.testing.assert_allclose(
        unmoved.newest_weight(np.arange(1, 9), 4),
        ema_optax.warmup(0.9).newest_weight(np.arange(1, 9), 4),
    )


def test_scale_to_batch_raises_beta_to_the_factor():
    """β^κ; a warm-up's ramp is a share of the run and stays; power is refused."""
    scale = ema_optax.scale_to_batch
    assert scale(ema_optax.constant(0.999), 8)(3) == pytest.approx(0.999**8)
    assert scale(ema_optax.cosine(0.9, 100), 0.5)(30) == pytest.approx(
        ema_optax.cosine(0.9, 100)(30) ** 0.5
    )
    assert scale(0.999, 8) == ema_optax.warmup(0.999**8)
    assert scale(ema_optax.warmup(0.9, 5), 2) == ema_optax.warmup(0.9**2, 5)
    for relative in (
        ema_optax.power(0.1),
        ema_optax.uniform(),
        ema_optax.fraction(0.1),
    ):
        wrong = rf"^{re.escape(repr(relative))} is relative to the length of the run"
        with pytest.raises(ValueError, match=wrong):
            scale(relative, 8)


@pytest.mark.parametrize("decay", EVERY_KIND, ids=repr)
def test_decays_are_frozen_comparable_and_json(decay):
    """JSON round-trips to an equal, equally hashed decay; fields cannot be set."""
    text = decay.to_json()
    again = ema_optax.Decay.from_json(text)
    assert again == decay
    assert hash(again) == hash(decay)
    assert ema_optax.Decay.from_json(json.loads(text)) == decay
    for copied in (pickle.loads(pickle.dumps(decay)), copy.deepcopy(decay)):
        assert copied == decay
        assert copied.to_json() == text
    with pytest.raises(dataclasses.FrozenInstanceError):
        decay.anything = 1
    assert decay != ema_optax.constant(0.123)


def test_repr_is_the_call_that_makes_it():
    """The repr of a decay evaluates to it."""
    for decay in EVERY_KIND:
        assert eval(repr(decay), vars(ema_optax) | {}) == decay


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"kind": "warm_up"}', "'kind' is one of"),
        ("[1]", r"Not a decay: \[1\]\..*'kind' is one of"),
        ('{"kind": "constant"}', r'arguments of constant: \{"kind": "constant"\} \('),
        ('{"kind": "constant", "decay": 0.9, "x": 1}', "arguments of constant"),
        ('{"kind": "power", "width": 0.1}', "arguments of power.*no 'width'"),
        ('{"kind": "uniform"}', "'kind' is one of"),
        ('{"kind": "constant", "decay": "0.9"}', r"decay is no number\)"),
        ('{"kind": "constant", "decay": false}', r"decay is no number\)"),
        ('{"kind": "start_after", "decay": 0.9, "step": 1}', r"decay is no decay\)"),
        ('{"kind": "half_life", "steps": Infinity}', r"steps is not finite\)"),
        ('{"kind": "half_life", "steps": NaN}', r"steps is not finite\)"),
        ('{"kind": "constant", "decay": 1.5}', r"in \[0, 1\), got 1.5"),
        ('{"kind": "schedule", "function": "print"}', "'kind' is one of"),
    ],
)
def test_from_json_names_what_is_wrong(text, wrong):
    """Nothing but a decay's own JSON is accepted, and a callable never."""
    with pytest.raises(ValueError, match=wrong):
        ema_optax.Decay.from_json(text)


def test_callables_are_decays():
    """Any step → β works, concrete or traced, with Python floats kept exact."""
    schedule = as_decay(lambda t: 1 - 1 / (t + 1))
    np.testing.assert_allclose(schedule(np.arange(1, 5)), [1 / 2, 2 / 3, 3 / 4, 4 / 5])
    traced = jax.jit(lambda t: schedule.newest_weight(t, 3))(jnp.int32(6))
    assert float(traced) == pytest.approx(1 - 4 / 5 * 5 / 6 * 6 / 7, rel=1e-6)
    exact = jax.jit(as_decay(lambda t: 0.99999).newest_weight)(jnp.int32(6))
    assert float(exact) == pytest.approx(1e-5, rel=1e-6)  # float32(β) is 1.3e-3 off
    ends = as_decay(lambda t: 1 - (t % 2) * 1.0)  # 0, a copy, and 1, which holds
    for weight in (ends.newest_weight, jax.jit(ends.newest_weight)):
        np.testing.assert_array_equal(weight(jnp.asarray([1, 2, 3])), [1, 0, 1])
    whole = as_decay(lambda t: 0.5 * jnp.issubdtype(t.dtype, jnp.integer))
    assert float(jax.jit(whole)(jnp.float32(3))) == 0.5
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        schedule.to_json()
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        ema_optax.start_after(schedule, 5).to_json()


def test_a_callable_out_of_range_is_loud():
    """Concretely an error with the step; traced it becomes NaN, never a wrong value."""
    with pytest.raises(ValueError, match=r"at step 3, .* got 1.5"):
        as_decay(lambda t: t / 2)(3)
    traced = jax.jit(as_decay(lambda t: t / 2).newest_weight)
    assert math.isnan(traced(jnp.int32(3)))
    assert float(traced(jnp.int32(1))) == 0.5
    with pytest.raises(TypeError, match="bfloat16"):
        as_decay(lambda t: jnp.bfloat16(0.999))(3)


@pytest.mark.parametrize(
    "function",
    [
        optax.linear_schedule(90.0, 99.9, 1000),
        lambda t: -0.5 + 0.0 * t,
        lambda t: t * jnp.nan,
    ],
    ids=["in percent", "negative", "nan"],
)
def test_a_first_decay_out_of_range_is_refused_at_once(function):
    """Schedules give arrays, which no update under jit can look at."""
    with pytest.raises(ValueError, match="at step 1, needs a decay in"):
        ema_optax.ema_params(function)


def test_a_later_decay_out_of_range_makes_the_shadow_nan():
    """From the update that it begins at; before it, the average is one."""
    transform = ema_optax.ema_params(lambda t: jnp.where(t < 3, 0.5, 1.5))
    params = {"w": jnp.ones(2)}
    state, update = transform.init(params), jax.jit(transform.update)
    for step in (1, 2, 3, 4):
        _, state = update(params, state, params)
        assert bool(jnp.isnan(state.shadow["w"]).all()) == (step >= 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: min(0.9999, (1 + t) / (10 + t)), "takes the step for a Python num"),
        (lambda t: 0.9 if t < 5 else 0.99, "takes the step for a Python number"),
        (lambda t: jnp.where(t < 5, 0, 1), "came as a int32 array, which has no β"),
        (lambda t: None, "returned None"),
        (lambda t: "0.9", "returned '0.9'"),
    ],
    ids=["min", "if", "int", "None", "text"],
)
def test_a_callable_that_does_not_trace_says_why(function, message):
    """Such as one that works as long as nothing is jitted."""
    transform = ema_optax.ema_params(function)
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match=message):
        jax.jit(transform.update)(params, transform.init(params), params)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: ema_optax.constant(1.0), r"\[0, 1\), got 1.0.*never moves"),
        (lambda: ema_optax.constant(-0.1), r"\[0, 1\), got -0.1"),
        (lambda: ema_optax.constant(float("nan")), r"\[0, 1\), got nan"),
        (lambda: ema_optax.warmup(10), r"got 10.*half_life\(steps\)"),
        (lambda: ema_optax.warmup(0.9, offset=0.5), "offset ≥ 1, got 0.5"),
        (lambda: ema_optax.debiased(1), r"\[0, 1\), got 1"),
        (lambda: ema_optax.ramp(0.9, 0), "time_constant must be positive.*got 0"),
        (lambda: ema_optax.cosine(1.0, 10), r"\[0, 1\), got 1.0"),
        (lambda: ema_optax.cosine(0.9, 0), "steps must be positive.*got 0"),
        (lambda: ema_optax.half_life(0), r"got 0.*constant\(0.999\)"),
        (lambda: ema_optax.half_life(float("nan")), "got nan"),
        (lambda: ema_optax.fraction(1.5), r"\(0, 1\], got 1.5"),
        (lambda: ema_optax.inverse_power(min_decay=1.0), "min_decay ≤ decay, got 1.0"),
        (lambda: ema_optax.inverse_power(inv_gamma=0), "inv_gamma must be positive"),
        pytest.param(
            lambda: ema_optax.power(),
            "either a width or an exponent",
            id="power, nothing given",
        ),
        pytest.param(
            lambda: ema_optax.power(0.1, exponent=2),
            "either a width or an exponent",
            id="power, both given",
        ),
        (lambda: ema_optax.power(0.3), r"\(0, 0.2887\], got 0.3.*uniform\(\)"),
        (lambda: ema_optax.power(exponent=-1), "above -1, got -1"),
        (lambda: ema_optax.width_from_exponent(-1), "above -1.*got -1"),
        (lambda: ema_optax.width_from_exponent(math.inf), "finite, got inf"),
        (lambda: ema_optax.start_after(0.9, -1), "updates ≥ 0, got -1"),
        (lambda: ema_optax.scale_to_batch(ema_optax.ramp(0.9), 0), "positive.*got 0"),
        (lambda: ema_optax.warmup(0.9)(0), "1-based.*got 0.*static_args"),
        (lambda: ema_optax.warmup(0.9).newest_weight(0), "1-based"),
        (lambda: ema_optax.warmup(0.9)(jnp.int32(0)), "1-based"),
    ],
)
def test_values_outside_their_interval_are_refused(make, wrong):
    """The message has the value, and the call that works."""
    with pytest.raises(ValueError, match=wrong):
        make()


BELOW_ONE, TINY, WIDEST = math.nextafter(1, 0), 1e-300, 1 / math.sqrt(12)
BETA, ABOVE_0 = ([0, BELOW_ONE], [-TINY, 1]), ([TINY, 1e300], [0, math.inf])
ENDS = {  # start of the error: what takes the value, (last values in, first out)
    "constant needs a decay": (ema_optax.constant, BETA),
    "warmup needs a decay": (ema_optax.warmup, BETA),
    "debiased needs a decay": (ema_optax.debiased, BETA),
    "ramp needs a decay": (ema_optax.ramp, BETA),
    "cosine needs a decay": (lambda x: ema_optax.cosine(x, 9), BETA),
    "inverse_power needs a decay": (ema_optax.inverse_power, BETA),
    "half_life needs a positive": (ema_optax.half_life, ABOVE_0),
    "ramp's time_constant": (lambda x: ema_optax.ramp(0.9, x), ABOVE_0),
    "cosine's steps": (lambda x: ema_optax.cosine(0.9, x), ABOVE_0),
    "inverse_power's inv_gamma": (lambda x: ema_optax.inverse_power(0.9, x), ABOVE_0),
    "inverse_power's power": (lambda x: ema_optax.inverse_power(0.9, 1, x), ABOVE_0),
    "scale_to_batch's factor": (
        lambda x: ema_optax.scale_to_batch(ema_optax.ramp(0.9), x),
        ABOVE_0,
    ),
    "warmup needs an offset": (
        lambda x: ema_optax.warmup(0.9, x),
        ([1, sys.float_info.max], [BELOW_ONE, math.inf]),
    ),
    "inverse_power needs 0 ≤ min_decay ≤ decay": (
        lambda x: ema_optax.inverse_power(0.9, min_decay=x),
        ([0, 0.9], [-TINY, math.nextafter(0.9, 1)]),
    ),
    "fraction needs a share": (
        ema_optax.fraction,
        ([TINY, 1], [0, math.nextafter(1, 2)]),
    ),
    "window's n must be": (ema_optax.window, ([1, 2**31 - 1], [0, 2**31, 10**300])),
    "power needs an exponent": (
        lambda x: ema_optax.power(exponent=x),
        ([-BELOW_ONE, 1e300], [-1, math.inf]),
    ),
    "A width is in": (
        ema_optax.power,
        ([1e-9, WIDEST], [0, math.nextafter(WIDEST, 1)]),
    ),
    "start_after needs a number of updates": (
        lambda x: ema_optax.start_after(0.9, x),
        ([0, 10**300], [-1, math.inf]),
    ),
}


@pytest.mark.parametrize("message", ENDS)
def test_intervals_end_where_they_say(message):
    """The ends give a β and a weight in [0, 1]; beyond, the error names the call."""
    make, (within, beyond) = ENDS[message]
    for value in within:
        decay = make(value)
        assert 0 <= decay(5) < 1
        assert 0 <= decay.newest_weight(5, every=2) <= 1
        assert ema_optax.Decay.from_json(decay.to_json()) == decay
    for value in [*beyond, math.nan]:
        with pytest.raises(
            (ValueError, TypeError), match=rf"^{re.escape(message)}.* got "
        ):
            make(value)


@pytest.mark.parametrize("decay", ["0.999", None, True, [0.9]])
def test_what_is_no_decay_is_refused(decay):
    """Texts, None, bools and lists are type errors that name a usual call."""
    with pytest.raises(TypeError, match=r"ema_params\(0.9999\)"):
        as_decay(decay)


def test_numbers_mean_a_warmup():
    """Floats, NumPy and JAX scalars of float32 and wider; narrower ones are refused."""
    assert as_decay(0.999) == ema_optax.warmup(0.999)
    assert as_decay(np.float64(0.999)) == ema_optax.warmup(0.999)
    assert as_decay(jnp.float32(0.5)) == ema_optax.warmup(0.5)
    for narrow in (jnp.bfloat16(0.999), np.float16(0.999), jnp.int32(0)):
        with pytest.raises(TypeError, match="would never move"):
            as_decay(narrow)
        with pytest.raises(TypeError, match="would never move"):
            jax.jit(lambda decay: as_decay(decay).newest_weight(5))(narrow)


def test_a_traced_beta_is_as_exact_as_float32_allows():
    """As optax.inject_hyperparams passes it: late in a run, the weight is 1 − β."""
    for beta in (np.float32(0.999), np.float32(0.25)):
        weight = jax.jit(lambda b, t: as_decay(b).newest_weight(t))(beta, 10**6)
        assert float(weight) == pytest.approx(1 - float(beta), rel=2e-7)


def test_json_from_anywhere_is_refused_in_bounded_text():
    """Too deep for a parser, or with what Python does not print: a line it is."""
    deep, long = "[" * 200_000, {"kind": 10**5000}
    wrong = {"kind": "constant", "decay": "x" * 9999}
    for given, told in [
        (deep, deep[:200]),
        (long, "a dict"),
        (wrong, str(wrong)[:200]),
    ]:
        with pytest.raises(ValueError, match=r"^Not ") as caught:
            ema_optax.Decay.from_json(given)
        assert re.search(f": {re.escape(told)}[. ]", str(caught.value))
        assert len(str(caught.value)) < 1000


def test_a_callable_may_answer_with_an_array():
    """As Optax's schedules do; what it says is what is folded with, narrow ones not."""
    decay = as_decay(lambda step: jnp.float32(0.5) + 0 * jnp.asarray(step))
    assert decay(3) == 0.5
    assert decay.newest_weight(3, every=2) == 0.75
    with pytest.raises(TypeError, match="would never move"):
        as_decay(lambda step: jnp.bfloat16(0.5))(3)


SWEPT = {  # name: from β in (0, 1) to a decay; what it is in plain numbers
    "constant": ema_optax.constant,
    "warmup": ema_optax.warmup,
    "warmup's offset": lambda b: ema_optax.warmup(0.9, 1 + 20 * b),
    "debiased": ema_optax.debiased,
    "power": lambda b: ema_optax.power(exponent=10 * b),
    "inverse_power": lambda b: ema_optax.inverse_power(b, 1 + b, b, b / 2),
    "ramp": lambda b: ema_optax.ramp(b, 30 * b),
    "cosine": lambda b: ema_optax.cosine(b, 40 * b),
    "half_life": lambda b: ema_optax.half_life(10 * b),
    "fraction": ema_optax.fraction,
    "start_after": lambda b: ema_optax.start_after(b, 2),
    "start_after's step": lambda b: ema_optax.start_after(0.9, 10 * b),
    "scale_to_batch": lambda b: ema_optax.scale_to_batch(ema_optax.ramp(0.9), 4 * b),
    "of a warmup": lambda b: ema_optax.scale_to_batch(b, 4),
    "both": lambda b: ema_optax.scale_to_batch(ema_optax.constant(b), b),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SWEPT)
def test_arguments_may_be_traced(name):
    """A sweep under vmap or jit folds as each of its decays alone, to float32.

    5e-6 is far below what a step more, or the next argument of the sweep, changes.
    """
    make, betas = SWEPT[name], np.asarray([0.25, 0.5, 0.75], np.float32)

    def average(beta):
        transform = ema_optax.ema_params(make(beta), every=2)
        params = {"w": jnp.zeros(2)}
        state = transform.init(params)
        for t in range(1, 7):
            _, state = transform.update({"w": jnp.ones(2) * t}, state, params)
        return state.shadow["w"][0]

    alone = [average(float(beta)) for beta in betas]
    np.testing.assert_allclose(jax.vmap(average)(betas), alone, rtol=5e-6)
    np.testing.assert_allclose(jax.jit(average)(betas[0]), alone[0], rtol=5e-6)
    for step in (5, jnp.int32(5)):  # of a step that is known, too
        weight = jax.vmap(lambda b, t=step: make(b).newest_weight(t, 3))(betas)
        expected = [make(float(b)).newest_weight(5, 3) for b in betas]
        np.testing.assert_allclose(weight, expected, rtol=5e-6, atol=1e-7)


def test_a_traced_width_is_refused():
    """Its exponent is a root that only the host finds; the error says what works."""
    with pytest.raises(TypeError, match=r"call exponent_from_width\(width\) outside"):
        jax.vmap(lambda w: ema_optax.power(w)(5))(jnp.asarray([0.05, 0.1]))


def test_an_array_of_jax_is_not_written():
    """As under jit, where its value is not known: the state stays of one type."""
    decay = ema_optax.start_after(ema_optax.constant(jnp.float32(0.5)), 2)
    assert not decay.is_json
    with pytest.raises(TypeError, match=r"with Array\(0.5.* cannot be written as JSON"):
        decay.to_json()
    step = jnp.int32(4)
    assert jax.jit(decay.newest_weight)(step) == decay.newest_weight(4, 1) == 0.5


def test_a_traced_argument_still_has_to_be_wide():
    """A bfloat16 β is refused wherever it comes in."""
    for make in (ema_optax.constant, ema_optax.debiased, ema_optax.ramp):
        with pytest.raises(TypeError, match="would never move"):
            jax.jit(lambda b, m=make: m(b).newest_weight(3))(jnp.bfloat16(0.5))


def test_numbers_of_numpy_are_written():
    """They compare and hash as Python's, and go to JSON as those."""
    for decay in (
        ema_optax.constant(np.float32(0.75)),
        ema_optax.cosine(np.float64(0.9), np.int64(50)),
    ):
        again = Decay.from_json(decay.to_json())
        assert again == decay
        assert hash(again) == hash(decay)
    assert ema_optax.cosine(0.9, np.int64(50)).to_json().endswith('"steps": 50}')


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: ema_optax.ema_params(99.9), "ema_params needs a decay in [0, 1)"),
        (lambda: ema_optax.ema_params({"a": 99.9}), "ema_params needs a decay"),
        (lambda: ema_optax.start_after(99.9, 3), "start_after needs a decay"),
        (lambda: ema_optax.scale_to_batch(99.9, 8), "scale_to_batch needs a decay"),
        (lambda: ema_optax.scale_to_batch(0.9, 0), "scale_to_batch's factor must be"),
        (lambda: ema_optax.profile(99.9, 3), "profile needs a decay"),
        (
            lambda: ema_optax.ema_params(optax.adam(1e-3)),
            "ema_params takes as a decay .* got an optimizer. Chain .* optax.chain(",
        ),
        (
            lambda: ema_optax.start_after(optax.sgd(0.1), 3),
            "start_after takes as a decay .* got an optimizer",
        ),
        (
            lambda: ema_optax.ema_params(ema_optax.warmup),
            "got warmup itself. Call it with its arguments",
        ),
        (
            lambda: ema_optax.profile(np.ones((2, 3)), 3),
            "got an array float64[2,3]. ema_params(0.9999)",
        ),
        (
            lambda: ema_optax.profile({"a": 0.9}, 3),
            "got a dict of 1. ema_params(0.9999)",
        ),
    ],
)
def test_errors_name_the_call_that_was_written(call, wrong):
    """And what it got, in one line."""
    pattern = ".*".join(map(re.escape, wrong.split(" .* ")))
    with pytest.raises((TypeError, ValueError), match=pattern) as caught:
        call()
    assert len(str(caught.value)) < 300
