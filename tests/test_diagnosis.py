"""`diagnose`: each cause fires where it is, and healthy averages give no finding."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import (
    constant,
    cosine,
    debiased,
    diagnose,
    ema_params,
    fraction,
    half_life,
    power,
    start_after,
    uniform,
    warmup,
)
from ema_optax._diagnosis import leaf_pairs, lengths, line, records
from ema_optax.reconstruction import Score
from tests import reference

SIZE = 64
NOISY = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)


def keys(found):
    return [each.what for each in found.findings]


def only(found, what):
    """Returns the one finding of a kind, and checks that it reads as a sentence."""
    (finding,) = [each for each in found.findings if each.what == what]
    assert finding.sentence[0].isupper() or finding.sentence[0].isdigit()
    assert finding.sentence.endswith(".")
    assert finding.remedy.endswith(".")
    return finding


def seen(decay, count, **settings):
    """Returns a state that has seen so many updates, and params beside its shadow."""
    shadow = {"w": jnp.ones(SIZE)}
    state = ema_params(decay, **settings).init(shadow)
    return state._replace(count=jnp.int32(count)), {"w": 1 + 0.1 * NOISY}


def trained(average, steps=1500, rate=0.1, wrap=lambda optimizer: optimizer):
    """Returns state and params of SGD on ‖w‖² with noise, which an average is for."""
    optimizer = wrap(optax.chain(optax.sgd(rate), average))

    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, (SIZE,))
        updates, state = optimizer.update({"w": params["w"] + noise}, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"w": jnp.full(SIZE, 3.0)}
    carry = params, optimizer.init(params)
    ks = jax.random.split(jax.random.key(0), steps)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, ks))(carry)
    return state, params


def loss(params):
    return float(jnp.mean(params["w"] ** 2))


@pytest.mark.parametrize(
    "average",
    [
        ema_params(
            {
                "warm": 0.99,
                "constant": constant(0.98),
                "power": power(0.1),
                "fraction": fraction(0.05),
                "half": half_life(20),
                "late": start_after(uniform(), 1000),
            },
            pack_small=True,
        ),
        ema_params(debiased(0.99), every=7, rounding="stochastic"),
        ema_params(0.99, shadow_dtype="bfloat16"),
        ema_optax.bema_params(every=1, bias_power=8.0, multiplier=0.1),
    ],
    ids=["decays", "every", "bfloat16", "bema"],
)
def test_a_healthy_run_gives_no_finding(average):
    """With the evaluation too: seven calls for each shadow, told with its figures."""
    calls = []

    def evaluate(params):
        calls.append(params)
        return loss(params)

    state, params = trained(average)
    found = diagnose(state, params, evaluate)
    assert not found.findings, found
    assert not found.unchecked
    assert len(calls) == 7 * len(found.figures)
    assert "nothing found" in str(found)
    assert "mean age" in str(found)


@pytest.mark.parametrize(
    "wrap", [lambda o: optax.MultiSteps(o, 5), optax.apply_if_finite]
)
def test_wrapped_runs_are_healthy(wrap):
    """An average inside `MultiSteps` sees as many updates as the optimizer."""
    if wrap is optax.apply_if_finite:
        state, params = trained(
            ema_params(0.95), wrap=lambda o: optax.apply_if_finite(o, 3)
        )
    else:
        state, params = trained(ema_params(0.95), wrap=wrap)
    assert not diagnose(state, params, loss).findings


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("decay", [0.9999, power(0.05), uniform(), debiased(0.999)])
def test_the_first_updates_are_no_fault(decay, count):
    """But for none at all; a first fold that copies is meant."""
    state, params = seen(decay, count)
    if count == 1 and decay != 0.9999:
        params = {"w": state.shadow["w"]}
    expected = ["never_folded"] if count == 0 else []
    assert keys(diagnose(state, params)) == expected


# What each decay leaves of the initial params, its mean age and effective size.


def profile_of(betas, every=1):
    """Returns initial weight, mean age and effective size, fold by fold in float64."""
    steps = len(betas)
    weights, initial = np.zeros(steps), 1.0
    for t in range(every, steps + 1, every):
        kept = np.prod(betas[t - every : t])
        weights *= kept
        initial *= kept
        weights[t - 1] = 1 - kept
    age = weights @ np.arange(steps - 1, -1, -1.0) + initial * steps
    return initial, age, 1 / (weights @ weights + initial**2)


@pytest.mark.parametrize(
    ("decay", "kind", "args"),
    [
        (constant(0.999), "constant", (0.999,)),
        (warmup(0.99), "warmup", (0.99,)),
        (fraction(0.3), "fraction", (0.3,)),
        (cosine(0.99, 3000), "cosine", (0.99, 3000)),
        (uniform(), "uniform", ()),
    ],
)
@pytest.mark.parametrize("every", [1, 7])
def test_lengths_match_a_reference(decay, kind, args, every, monkeypatch):
    """Summed as `profile` does, and on the grid: one update more is 1e-4 or more."""
    steps = 2000
    betas = reference.betas(kind, steps, *args)
    expected = profile_of(betas, every)
    exact = lengths.length(decay, steps, every)
    for name in ("_EXACT", "_YOUNG", "_FIRST"):  # blocks already of 2,000 updates
        monkeypatch.setattr(lengths, name, 64)
    rough = lengths.length(decay, steps, every)
    for found, bound in ((exact, 1e-9), (rough, 1e-6)):
        values = found.initial_weight, found.mean_age, found.effective_size
        np.testing.assert_allclose(values, expected, rtol=bound, atol=1e-12)


def test_long_runs_have_figures():
    """Two thousand million updates: the closed forms of a constant and of a mean."""
    n = 2**31 - 1
    long = lengths.length(constant(0.999), n, 1)
    np.testing.assert_allclose(long.mean_age, 999, rtol=1e-9)
    np.testing.assert_allclose(long.effective_size, 1.999 / 0.001, rtol=1e-9)
    mean = lengths.length(uniform(), n, 1000)
    np.testing.assert_allclose(mean.mean_age, (n - 647) / 2, rtol=1e-5)
    assert mean.initial_weight < 1e-12
    assert lengths.length(power(0.1), 2**62, 2**40).mean_age < 2**60  # a stranger's


def test_weight_of_the_initial_params():
    """0.9999^1000 are 90.5 %; less than 1 % after log .01 / log .9999 updates."""
    state, params = seen(constant(0.9999), 1000)
    finding = only(diagnose(state, params), "initial_weight")
    np.testing.assert_allclose(finding.figures["initial_weight"], 0.9999**1000)
    until = math.ceil(math.log(0.01) / math.log(0.9999))
    assert finding.figures["below_one_percent_at"] == until
    assert "90.5 %" in finding.sentence
    assert f"{until:,}" in finding.sentence
    assert "warmup(0.9999)" in finding.remedy
    assert finding.severity == "problem"
    state, params = seen(constant(0.9999), until)
    assert "initial_weight" not in keys(diagnose(state, params))
    state, params = seen(constant(0.9999), until - 1)
    assert "initial_weight" in keys(diagnose(state, params))


def test_initial_params_that_never_leave():
    """A target network's decay reaches 1 before they are forgotten."""
    state, params = seen(cosine(0.999, 100), 50)
    finding = only(diagnose(state, params), "initial_weight")
    assert finding.figures["below_one_percent_at"] is None
    assert "they stay" in finding.sentence


def test_initial_params_in_bema():
    """At every=400 BEMA has folded twice after 900 updates, and says what to change."""
    params = {"w": jnp.ones(SIZE)}
    state = ema_optax.bema_params().init(params)._replace(count=jnp.int32(900))
    finding = only(diagnose(state, {"w": 1 + 0.1 * NOISY}), "initial_weight")
    expected = np.prod(1 - reference.bema_weights(900, 400))
    np.testing.assert_allclose(finding.figures["initial_weight"], expected, rtol=1e-9)
    assert "every" in finding.remedy


@pytest.mark.parametrize(
    ("decay", "count", "fires"),
    [
        (constant(0.999), 10_000, False),
        (constant(0.9999), 50_000, False),
        (constant(0.9999), 47_000, False),
        (warmup(0.9999), 20_000, False),
        (debiased(0.9999), 15_000, True),
        (debiased(0.9999), 50_000, False),
        (uniform(), 1000, True),
        (power(0.1), 1000, False),
        (power(0.25), 1000, True),
        (power(exponent=1.1), 1000, False),  # a mean age of 1/(γ+2) of the run
        (power(exponent=0.95), 1000, True),
    ],
)
def test_lag_beside_the_length_of_the_run(decay, count, fires):
    """A mean age beyond a third of all updates; with a shorter average to take."""
    state, params = seen(decay, count)
    found = diagnose(state, params)
    age = ema_optax.profile(decay, count).mean_age
    assert (age > count / 3) == fires
    assert ("lag" in keys(found)) == fires
    if fires:
        finding = only(found, "lag")
        np.testing.assert_allclose(finding.figures["mean_age"], age, rtol=1e-9)
        np.testing.assert_allclose(finding.figures["share"], age / count, rtol=1e-9)
        advised = finding.remedy.rpartition("or ")[2].rstrip(".")
        shorter = eval(advised, {"warmup": warmup})  # the call that is printed
        after = ema_optax.profile(shorter, count).mean_age
        assert 0.02 * count < after < 0.1 * count


@pytest.mark.parametrize("age", [0, 0.3, 1, 49, 999, 123_456])
def test_advised_decays_are_as_long_as_said(age):
    """To the two digits that they are written with."""
    decay = eval(records.shorter(age), {"warmup": warmup}).decay
    assert 0 <= decay < 1
    assert decay / (1 - decay) == pytest.approx(age, rel=0.1, abs=0.1)


def test_an_average_of_one_params():
    """β = 0.1 averages over 1.1 / 0.9 params; every=400 replaces a β of 0.98."""
    state, params = seen(constant(0.1), 5000)
    finding = only(diagnose(state, params), "too_short")
    np.testing.assert_allclose(finding.figures["effective_size"], 1.1 / 0.9, rtol=1e-9)
    assert "larger β" in finding.remedy
    state, params = seen(constant(0.98), 50_000, every=400)
    finding = only(diagnose(state, params), "too_short")
    assert "every=400" in finding.sentence
    assert "every=9," in finding.remedy  # a fifth of a mean age of 49
    state, params = seen(constant(0.98), 50_000, every=9)
    assert not diagnose(state, params).findings
    state, params = seen(constant(0.0), 50_000)
    assert keys(diagnose(state, params)) == ["too_short"]


def test_an_average_that_has_not_begun():
    """`start_after` still copies; `every` is larger than the count."""
    state, params = seen(start_after(0.999, 5000), 4000)
    assert keys(diagnose(state, params)) == ["not_started"]
    state, params = seen(start_after(0.999, 5000), 50_000)
    assert not diagnose(state, params).findings
    state, params = seen(0.999, 60, every=100)
    finding = only(diagnose(state, params), "never_folded")
    assert "update 100" in finding.remedy


def test_a_decay_that_has_ended():
    """A cosine is 1 from its last update on, and the shadow stands still after it."""
    for count, expected in ((1000, []), (1001, ["standing_still"])):
        state, params = seen(cosine(0.9, 1000), count)
        assert keys(diagnose(state, params)) == expected


# Where a shadow is too narrow for its folds.


def folded_by_hand(shadow, params, weight, dtype):
    """Returns how many elements a fold in float64, rounded once, leaves as they are."""
    s, p = np.asarray(shadow, np.float64), np.asarray(params, np.float64)
    return np.mean((s + weight * (p - s)).astype(dtype) == np.asarray(shadow))


@pytest.mark.parametrize(("gap", "fires"), [(1e-4, True), (3e-3, False)])
def test_a_float32_shadow_that_cannot_move(gap, fires):
    """At β = .9999 the dead zone is 6e-4 of a value; the real fold says the same."""
    rng = np.random.default_rng(1)
    shadow = rng.uniform(1, 2, 4096).astype(np.float32)
    params = {"w": (shadow * (1 + gap * rng.standard_normal(4096))).astype(np.float32)}
    state = ema_params(constant(0.9999)).init({"w": jnp.asarray(shadow)})
    state = state._replace(count=jnp.int32(90_000))
    found = diagnose(state, params)
    share = folded_by_hand(shadow, params["w"], 1e-4, np.float32)
    moved = ema_optax.update_shadow(state.shadow, params, constant(0.9999), count=9)
    assert abs(np.mean(np.asarray(moved["w"]) == shadow) - share) < 2e-3
    # Elements nearer than two units in the last place are not told.
    assert abs(found.figures[""]["stuck_share"] - share) < 5e-3
    assert ("dead_zone" in keys(found)) == fires
    if fires:
        assert "stochastic" in only(found, "dead_zone").remedy
        chance = ema_params(constant(0.9999), rounding="stochastic")
        state = chance.init(state.shadow)._replace(count=state.count)
        assert "dead_zone" not in keys(diagnose(state, params))


def test_a_float16_shadow_that_cannot_move():
    """Of a state made by hand: ours are float32 where params are narrower."""
    state, params = seen(constant(0.999), 10_000)
    assert not diagnose(state, params).findings
    state = state._replace(shadow={"w": state.shadow["w"].astype(jnp.float16)})
    finding = only(diagnose(state, params), "dead_zone")
    share = folded_by_hand(state.shadow["w"], params["w"], 1e-3, np.float16)
    assert share - 2 / SIZE < finding.figures["share"] <= share
    assert 'shadow_dtype="float32"' in finding.remedy


def test_every_kth_fold_leaves_the_dead_zone():
    """Its weight is that of k updates."""
    found = []
    for every in (1, 1000):
        state, params = seen(constant(0.99999), 10**6, every=every)
        params = {"w": 1 + 1e-4 * NOISY}
        found.append(diagnose(state, params))
    assert [("dead_zone" in keys(each)) for each in found] == [True, False]


def test_a_bfloat16_shadow_nearer_than_its_rounding():
    """Half a unit in the last place of 1 is 2⁻⁸ above and 2⁻⁹ below."""
    for gap, fires in ((1e-3, True), (1e-1, False)):
        state, _ = seen(constant(0.99), 1000, shadow_dtype="bfloat16")
        found = diagnose(state, {"w": 1 + gap * NOISY})
        assert ("rounding_noise" in keys(found)) == fires
    state, _ = seen(constant(0.99), 1000)
    assert not diagnose(state, {"w": 1 + 1e-3 * NOISY}).findings


def test_params_that_have_settled_are_no_dead_zone():
    """They are as near as float32 tells: nothing is lost where nothing moves."""
    state, _ = seen(constant(0.9999), 90_000)
    params = {"w": jnp.nextafter(state.shadow["w"], 2.0)}
    assert not diagnose(state, params).findings


def test_leaves_are_added_up_in_blocks(monkeypatch):
    """Shapes, zero elements, complex parts and dtypes: as in one piece."""
    rng = np.random.default_rng(2)
    state = ema_params(constant(0.9)).init(
        {
            "a": jnp.asarray(rng.standard_normal((7, 5)), jnp.float32),
            "b": jnp.zeros((0, 3)),
            "c": jnp.asarray(rng.standard_normal(6) + 1j, jnp.complex64),
            "d": jnp.float32(2),
            "n": jnp.int32(3),
        }
    )
    state = state._replace(count=jnp.int32(1000))
    params = {
        k: v * 1.5 if k != "n" else v for k, v in state.shadow.items() if k != "n"
    }
    params["n"] = jnp.int32(3)
    whole = diagnose(state, params).figures[""]
    monkeypatch.setattr(leaf_pairs, "_BLOCK", 4)
    assert diagnose(state, params).figures[""] == whole
    assert whole["averaged_elements"] == 7 * 5 + 2 * 6 + 1
    np.testing.assert_allclose(whole["distance"], 0.5, rtol=1e-6)


# What is in the arrays.


def test_elements_that_are_not_finite():
    """Counted on both sides, with the leaf; the others are still looked at."""
    state, params = seen(constant(0.99), 1000)
    params["w"][3:5] = jnp.nan, jnp.inf
    found = diagnose(state, params)
    assert keys(found) == ["nonfinite_params"]
    assert only(found, "nonfinite_params").figures["elements"] == 2
    assert "'w'" in only(found, "nonfinite_params").sentence
    state = state._replace(shadow={"w": state.shadow["w"].at[3].set(jnp.nan)})
    assert keys(diagnose(state, params)) == ["nonfinite_shadow", "nonfinite_params"]
    assert np.isfinite(found.figures[""]["distance"])


def test_a_shadow_that_is_the_params():
    """To the bit: not folded, or what was read from the shadow passed as the params."""
    state, params = seen(0.99, 500)
    shadow = ema_optax.shadow_params(state, params)
    assert keys(diagnose(state, shadow)) == ["equal"]
    shadow["w"] = shadow["w"].at[0].add(1e-7)
    assert keys(diagnose(state, shadow)) == []


def test_nothing_averaged():
    state = ema_params(0.99, mask=lambda params: False).init({"w": jnp.ones(2)})
    state = state._replace(count=jnp.int32(50))
    assert keys(diagnose(state, {"w": jnp.zeros(2)})) == ["nothing_averaged"]


def norm_state(mask=None, evaluate=None, value=0.0):
    """Returns the diagnosis of a model with a batch norm, of a shadow of ones."""
    shadow = {
        "BatchNorm_0": {"scale": jnp.ones(3)},
        "stats": {"mean": jnp.ones(3), "var": jnp.ones(3)},
    }
    if mask is None:
        del shadow["stats"]
    state = ema_params(constant(0.9), mask=mask).init(shadow)
    state = state._replace(count=jnp.int32(500))
    params = jax.tree.map(lambda x: x + 0.5, shadow)
    return diagnose(state, params, evaluate)


def test_statistics_of_the_raw_params():
    """Where they lie among the params and are not averaged, reading takes the raw."""
    mask = {"BatchNorm_0": True, "stats": False}
    finding = only(norm_state(mask), "batch_stats")
    assert finding.figures["leaves"] == 2
    assert "'stats/mean'" in finding.sentence
    assert "refresh_batch_stats" in finding.remedy
    assert not norm_state({"BatchNorm_0": True, "stats": True}).findings


def test_a_worse_average_of_a_model_with_batch_norms():
    """Where statistics are elsewhere, it is told only if the average does worse."""
    assert not norm_state().findings

    def value(params):
        return float(jnp.sum(params["BatchNorm_0"]["scale"]))

    found = norm_state(evaluate=lambda params: -value(params))
    assert "batch_stats" in keys(found)
    assert "'BatchNorm_0/scale'" in only(found, "batch_stats").sentence
    assert "batch_stats" not in keys(norm_state(evaluate=value))


# Other counts.


def adam_state(average_count, adam_count, decay=0.999):
    params = {"w": jnp.ones(SIZE)}
    adam, average = optax.chain(optax.adam(0.1), ema_params(decay)).init(params)
    adam = jax.tree.map(lambda x: jnp.int32(adam_count) if x.shape == () else x, adam)
    return (adam, average._replace(count=jnp.int32(average_count))), {
        "w": 1 + 0.1 * NOISY
    }


@pytest.mark.parametrize(
    ("count", "fires"),
    [(20_000, False), (100, True), (19_000, False), (9500, False), (8000, True)],
)
def test_an_average_that_was_started_anew(count, fires):
    """Told while it still matters: after ten times its length it does not."""
    found = diagnose(*adam_state(count, 20_000))
    assert keys(found) == (["restarted"] if fires else [])
    if fires:
        finding = only(found, "restarted")
        assert "'0/0/count'" in finding.sentence
        assert "count=20000" in finding.remedy


def test_an_average_that_went_on_from_elsewhere():
    """`started_from` gives a larger count than a fresh optimizer has: no fault."""
    for adam_count in (0, 10, 40_000):
        assert not diagnose(*adam_state(120_000, adam_count)).findings


@pytest.mark.parametrize("steps", [400, 403])
def test_an_average_of_micro_batches(steps):
    """Outside `MultiSteps` each of k gradients is an update of the average."""
    optimizer = optax.chain(optax.MultiSteps(optax.sgd(0.1), 4), ema_params(0.9))
    # MultiSteps is no transform, but has init and update.
    params = {"w": jnp.ones(SIZE)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update({"w": jnp.asarray(NOISY)}, state, params)
        params = optax.apply_updates(params, updates)
    finding = only(diagnose(state, params), "micro_batches")
    assert finding.figures["micro_batches"] == 4
    assert finding.figures["optimizer_count"] == 100
    assert "MultiSteps(optax.chain" in finding.remedy


def test_a_decay_for_another_batch():
    """16 times the batch is β¹⁶; a decay that is a share of the run needs nothing."""
    state, params = seen(constant(0.999), 50_000)
    finding = only(diagnose(state, params, batch_sizes=(256, 4096)), "batch_size")
    assert finding.figures["factor"] == 16
    np.testing.assert_allclose(finding.figures["mean_age_in_examples"], 999 * 4096)
    assert "scale_to_batch(…, 16)" in finding.remedy
    assert not diagnose(state, params, batch_sizes=(256, 256)).findings
    state, params = seen(power(0.05), 50_000)
    assert not diagnose(state, params, batch_sizes=(256, 4096)).findings


# The loss along s + λ(p − s).


def along(function, *, decay=0.99, count=1000, **settings):
    """Diagnoses where the loss is a function of λ; the shadow is 1, the params 2."""
    state = ema_params(decay).init({"w": jnp.ones(4)})
    state = state._replace(count=jnp.int32(count))
    params = {"w": jnp.full(4, 2.0)}
    return diagnose(
        state, params, lambda tree: function(float(tree["w"][0]) - 1), **settings
    )


def test_points_of_the_line_are_as_said():
    """0 and 1 to the bit, in the dtypes of the params; seven, sorted when told."""
    rng = np.random.default_rng(3)
    shadow = {"w": rng.standard_normal(9).astype(np.float32), "n": np.int32(5)}
    params = {"w": jnp.asarray(rng.standard_normal(9), jnp.bfloat16), "n": jnp.int32(7)}
    state = ema_params(constant(0.9)).init(shadow)._replace(count=jnp.int32(200))
    trees = []
    found = diagnose(state, params, lambda tree: (trees.append(tree), len(trees))[1])
    assert [p["at"] for p in found.evaluated[""]] == sorted(line.POINTS)
    assert [p["value"] for p in found.evaluated[""]] == [6, 1, 4, 3, 5, 2, 7]
    read = ema_optax.shadow_params(state, params)
    for at, tree in zip(line.POINTS, trees, strict=True):
        assert tree["n"] == 7
        assert tree["w"].dtype == jnp.bfloat16
        s, p = np.float64(shadow["w"]), np.float64(params["w"])
        np.testing.assert_allclose(np.float64(tree["w"]), s + at * (p - s), rtol=1e-2)
    np.testing.assert_array_equal(trees[0]["w"], read["w"])
    np.testing.assert_array_equal(trees[1]["w"], params["w"])
    params["w"].block_until_ready()  # it was a copy: what evaluate does is its own


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: 1 + x**2, []),
        (lambda x: 1 + (x + 0.05) ** 2, []),
        (lambda x: 1 + (x - 0.04) ** 2, []),
        (lambda x: 1 + (x - 0.4) ** 2, ["too_long"]),
        (lambda x: 1 + (x - 0.8) ** 2, ["too_long"]),
        (lambda x: 1 + (x - 1.1) ** 2, ["params_best"]),
        (lambda x: 3 - x, ["still_falling"]),
        (lambda x: 1 + (x + 0.3) ** 2, ["longer"]),
        (lambda x: 1 + x + 8 * x * (1 - x) * (0 < x < 1), ["barrier"]),
        (lambda x: 2 - x + 8 * x * (1 - x) * (0 < x < 1), ["barrier"]),
        (lambda x: 7.0, ["flat"]),
    ],
    ids=[
        "at the average",
        "just beyond the average",
        "just before the params",
        "two fifths to the params",
        "near the params",
        "beyond the params",
        "falling",
        "far beyond the average",
        "barrier to better average",
        "barrier to better params",
        "flat",
    ],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_where_the_loss_is_lowest(function, expected, maximize):
    """Between, beyond either end, over a barrier: and the same of −loss as a score."""
    sign = -1 if maximize else 1
    found = along(lambda x: sign * function(x), maximize=maximize)
    assert keys(found) == expected
    if expected:
        figures = only(found, expected[0]).figures
        assert figures["shadow"] == pytest.approx(sign * function(0.0))
        assert figures["params"] == pytest.approx(sign * function(1.0))


def test_how_much_shorter():
    """A loss that is lowest at λ asks for (1 − λ) of the mean age: of 99, 59."""
    finding = only(along(lambda x: (x - 0.4) ** 2, decay=constant(0.99)), "too_long")
    assert finding.figures["refined"] == pytest.approx(0.4, abs=1e-6)
    assert "of 59 updates instead of 99: warmup(0.983)" in finding.remedy
    assert "40 % of the way" in finding.sentence


def test_a_lag_is_found_from_the_loss():
    """Params that drift to the optimum with an average too long: where it is best."""
    path = np.arange(1, 1050)[:, None] / 1000  # the best is 1, the shadow is at .95
    betas = reference.betas("constant", 1049, 0.99)
    shadow = reference.average(path, betas, start=np.zeros(1))
    state = ema_params(constant(0.99)).init({"w": jnp.asarray(shadow, jnp.float32)})
    state = state._replace(count=jnp.int32(1049))
    params = {"w": jnp.float32(path[-1])}
    found = diagnose(state, params, lambda tree: float((tree["w"][0] - 1) ** 2))
    finding = only(found, "too_long")
    assert finding.figures["refined"] == pytest.approx(0.505, abs=0.01)


def test_differences_within_the_noise():
    """With standard errors a difference below two of it is said to be noise."""
    found = along(lambda x: Score(1 - 0.05 * x, 0.1))
    finding = only(found, "within_noise")
    assert keys(found) == ["within_noise"]
    assert finding.figures["noise"] == pytest.approx(2 * math.hypot(0.1, 0.1))
    assert found.evaluated[""][0]["standard_error"] == 0.1
    assert keys(along(lambda x: Score(1 - 0.5 * x, 0.01))) == ["still_falling"]
    assert keys(along(lambda x: Score(1 + x**2, 0.01))) == []
    # A bump within its noise is no barrier.
    bump = {0.5: 1.2}
    assert "barrier" not in keys(along(lambda x: Score(bump.get(x, 1.0 + x / 10), 0.3)))
    assert keys(along(lambda x: Score(bump.get(x, 1.0 + x / 10), 0.01))) == ["barrier"]


def test_what_makes_a_batch_hard_is_no_noise():
    """Of a number for each batch the noise is that of their differences."""
    hard, own = np.array([1.0, 5.0, 9.0]), np.array([0.01, -0.02, 0.01])
    found = along(lambda x: hard + (1 - x) * own + 0.1 * x)
    finding = only(found, "longer")
    assert finding.figures["shadow"] == pytest.approx(5.0)
    blurred = along(lambda x: hard + 9 * (1 - x) * own + 0.01 * x)
    noise = only(blurred, "within_noise").figures["noise"]
    assert noise == pytest.approx(2 * np.std(9 * own, ddof=1) / math.sqrt(3))


def test_small_flickers_are_no_barrier():
    """Without standard errors a bump below a twentieth of the loss is let pass."""
    assert keys(along(lambda x: 1.0 + 0.02 * (x == 0.5) + 0.1 * (x > 0.9))) == []


def test_steps_of_an_accuracy_are_noise():
    """One example of 539 more at λ = ½ is no reason for another average."""
    right = {-0.25: 524, 0: 526, 0.25: 526, 0.5: 527, 0.75: 526, 1: 526, 1.25: 522}
    assert keys(along(lambda x: right[x] / 539, maximize=True)) == []
    right[1] = 527  # and none to call the params better
    found = along(lambda x: right[x] / 539, maximize=True)
    assert keys(found) == ["within_noise"]
    # A smooth curve has none: a difference of 1e-4 counts.
    assert keys(along(lambda x: 1 + 1e-4 * (x - 0.4) ** 2)) == ["too_long"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, ValueError("no\ndata")])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.25])
def test_an_evaluation_that_fails(bad, at):
    """Is told with its λ, and the others go on."""

    def function(x):
        if x == at and isinstance(bad, Exception):
            raise bad
        return bad if x == at else 1 + x**2

    found = along(function)
    finding = only(found, "evaluation")
    assert keys(found) == ["evaluation"]
    assert finding.figures["failed"] == [at]
    assert finding.severity == ("problem" if at == 0 else "note")
    assert f"λ = {at:g}" in finding.sentence
    assert len(found.evaluated[""]) == 7
    content = json.loads(found.to_json())
    (point,) = [p for p in content["evaluated"][""] if p["at"] == at]
    assert point["value"] is None
    assert point["problem"]


def test_an_evaluation_that_always_fails():
    def fail(params):
        raise RuntimeError("out of data")

    state, params = seen(0.99, 500)
    found = diagnose(state, params, fail)
    assert only(found, "evaluation").figures["failed"] == list(line.POINTS)
    assert "out of data" in str(found)


@pytest.mark.parametrize(
    "result", ["0.5", None, {"loss": 1.0}, [1], np.ones((2, 2)), True, 1j, {}]
)
def test_an_evaluation_of_another_kind(result):
    """Is an error at the first call: there is nothing to go on with."""
    with pytest.raises(
        TypeError, match=r"evaluate\(params\) returns a number; .* It returned"
    ):
        along(lambda x: result)


@pytest.mark.parametrize(
    "result",
    [1, np.float32(1), jnp.float32(1)],
    ids=["Python", "NumPy", "JAX"],
)
def test_numbers_of_all_kinds(result):
    found = along(lambda x: result)
    assert keys(found) == ["flat"]


def test_bfloat16_values_are_numbers():
    assert keys(along(lambda x: jnp.bfloat16(1 + x**2))) == []


# States and names.


def test_each_shadow_or_one():
    """Findings say whose they are."""
    decays = {"fast": 0.99, "slow": constant(0.9999), "own": lambda step: 0.5}
    state, params = seen(decays, 1000)
    found = diagnose(state, params)
    assert {each.shadow for each in found.findings} == {"slow"}
    assert set(found.figures) == set(decays)
    (unknown,) = found.unchecked
    assert "'own'" in unknown
    assert "problem of shadow 'slow'" in str(found)
    assert not diagnose(state, params, name="fast").findings
    assert keys(diagnose(state, params, name="slow")) == ["initial_weight"]
    with pytest.raises(ValueError, match="no tree 'none'"):
        diagnose(state, params, name="none")


def test_shadows_of_disjoint_groups():
    """Under `multi_transform` each group has a record, and the model one evaluation."""
    groups = {
        "a": optax.chain(optax.sgd(0.1), ema_params(0.99)),
        "b": optax.chain(optax.sgd(0.1), ema_params(constant(0.9999))),
    }
    optimizer = optax.multi_transform(groups, {"x": "a", "y": "b"})
    params = {"x": jnp.ones(2), "y": jnp.ones(3)}
    state = optimizer.init(params)
    state = jax.tree.map(lambda x: jnp.int32(700) if x.dtype == jnp.int32 else x, state)
    params = {"x": jnp.zeros(2), "y": jnp.zeros(3)}
    calls = []
    found = diagnose(state, params, lambda tree: len(calls.append(tree) or calls))
    assert len(calls) == 7
    np.testing.assert_array_equal(calls[0]["y"], 1)
    np.testing.assert_array_equal(calls[1]["x"], 0)
    assert "initial_weight" in keys(found)
    assert len(found.figures) == 2
    assert sorted(f["averaged_elements"] for f in found.figures.values()) == [2, 3]


def test_bema_beside_a_named_shadow():
    """Both are looked at; BEMA's as it is folded."""
    optimizer = optax.chain(
        optax.sgd(0.1), ema_params({"ema": 0.99}), ema_optax.bema_params(every=1)
    )
    params = {"w": jnp.ones(SIZE)}
    state = optimizer.init(params)
    state = jax.tree.map(lambda x: jnp.int32(900) if x.dtype == jnp.int32 else x, state)
    found = diagnose(state, {"w": 1 + 0.1 * NOISY}, loss)
    assert set(found.figures) == {"", "ema"}
    assert "bema_params(" in found.figures[""]["decay"]


def test_a_state_made_by_hand():
    """Its decay is not known, which is said; the leaves are looked at all the same."""
    shadow = {"w": jnp.ones(SIZE)}
    state = ema_optax.EmaParamsState(jnp.int32(100), shadow)
    found = diagnose(state, {"w": 1 + 0.1 * NOISY})
    assert not found.findings
    assert len(found.unchecked) == 1
    assert found.figures[""]["decay"] is None
    assert "mean_age" not in found.figures[""]
    assert keys(diagnose(state, shadow)) == ["equal"]


def test_text_and_json_say_the_same():
    state, params = seen(constant(0.9999), 1000)
    found = diagnose(state, params, loss)
    content = json.loads(found.to_json())
    assert [each["what"] for each in content["findings"]] == keys(found)
    for each in content["findings"]:
        assert each["sentence"] in str(found)
        assert each["remedy"] in str(found)
    assert set(content) == {"findings", "figures", "evaluated", "unchecked"}
    order = [each.severity for each in found.findings]
    assert order == sorted(order, key=["problem", "warning", "note"].index)


def test_it_changes_nothing():
    """State and params are the same objects afterwards, whatever evaluate deletes."""
    state, params = seen(0.99, 500)
    before = jax.tree.map(np.array, (state, params))

    def evaluate(tree):
        tree["w"].delete()
        return 1.0

    diagnose(state, params, evaluate)
    jax.tree.map(np.testing.assert_array_equal, before, (state, params))


def test_wrong_arguments():
    state, params = seen(0.99, 500)
    with pytest.raises(ValueError, match=r"no shadow in this .*Chain the average last"):
        diagnose(optax.adam(0.1).init(params), params)
    with pytest.raises(ValueError, match=r"does not fit these params.*'v'|'w'"):
        diagnose(state, {"v": params["w"]})
    with pytest.raises(ValueError, match="swapped"):
        diagnose(params, state)
    with pytest.raises(TypeError, match="an optimizer"):
        diagnose(ema_params(0.9), params)
    with pytest.raises(TypeError, match="evaluate is a function"):
        diagnose(state, params, 0.5)
    with pytest.raises(TypeError, match="batch_sizes is a pair"):
        diagnose(state, params, batch_sizes=256)
    with pytest.raises(ValueError, match="batch size must be a whole number"):
        diagnose(state, params, batch_sizes=(0, 256))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda s, p: len(diagnose(s, p).findings))(state, params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (state, params))
    with pytest.raises(ValueError, match="is stacked"):
        diagnose(*stacked)


def ring_run(k, every, count, still=False):
    """State and params of a ring, whose params go one step up at each update."""
    optimizer = optax.chain(optax.sgd(1.0), ema_optax.ring(k, every=every))
    params = {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    for _ in range(count):
        grads = {"w": jnp.full(3, 0.0 if still else -1.0)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return state, params


@pytest.mark.parametrize(("k", "every", "count"), [(1, 1, 4), (3, 2, 5), (4, 3, 20)])
def test_a_ring_has_the_length_of_its_copies(k, every, count):
    """Mean age and size are those of the params in it, counted by hand."""
    state, params = ring_run(k, every, count)
    found = ema_optax.diagnose(state, params, loss)
    copied = [n for n in range(1, count + 1) if n % every == 0][-k:]
    (figures,) = found.figures.values()
    assert figures["decay"] == f"ring(k={k}, every={every})"
    assert figures["mean_age"] == np.mean([count - n for n in copied])
    assert figures["effective_size"] == len(copied)
    assert figures["initial_weight"] == 0
    assert figures["averaged_elements"] == 3
    assert "equal" not in keys(found)
    assert not any("decay is not recorded" in text for text in found.unchecked)


def test_a_ring_before_its_first_copy_and_of_params_that_stand_still():
    """It is of the initial params; later it is the raw params."""
    only(ema_optax.diagnose(*ring_run(3, 4, 3)), "never_folded")
    only(ema_optax.diagnose(*ring_run(3, 1, 5, still=True)), "equal")
