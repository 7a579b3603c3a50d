"""Figures for loggers: against float64, under jit, for every kind of state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ema_optax
from ema_optax import bema_params, metrics
from ema_optax._placement.rules import in_host_memory
from tests import older, reference
from tests.runs import drifting, follow


@pytest.mark.parametrize(
    ("decay", "kind", "args"),
    [
        (0.999, "warmup", (0.999,)),
        (ema_optax.constant(0.9997), "constant", (0.9997,)),
        (ema_optax.fraction(0.5), "fraction", (0.5,)),
        (ema_optax.ramp(0.9999, 4000), "ramp", (0.9999, 4000)),
    ],
)
@pytest.mark.parametrize("every", [1, 7])
def test_decay_and_initial_weight(decay, kind, args, every):
    """Of 10,000 updates, in blocks; one update more is 3e-4 for a constant .9997."""
    steps = 10_000
    transform = ema_optax.ema_params(decay, every=every)
    params = {"w": jnp.ones(1)}
    state = transform.init(params)._replace(count=jnp.int32(steps))
    found = jax.jit(metrics)(state, params)
    betas = reference.betas(kind, steps, *args)
    # What is folded before is folded: the last 4 updates of 10,000 are not yet.
    left = np.prod(betas[: steps - steps % every])
    np.testing.assert_allclose(found["decay"], betas[-1], rtol=2e-7)
    # Half an ulp of its logarithm is lost where that is rounded, and as much in the exp
    # of a GPU, which first multiplies by log2 e, and of a CPU with jax 0.7: at a weight
    # of 1e-30 up to 1e-5 in all.
    ulp = np.spacing(np.float32(-np.log(left or 1)))
    np.testing.assert_allclose(found["initial_weight"], left, rtol=max(3e-6, 2 * ulp))
    weight = 1 - np.prod(betas[-every:])
    np.testing.assert_allclose(found["dead_zone"], 2.0**-24 / weight, rtol=1e-5)


@pytest.mark.long
def test_a_million_updates_leave_nothing():
    """The loop ends early, and the figure is 0, not NaN."""
    params = {"w": jnp.ones(1)}
    for decay in (0.99, ema_optax.uniform(), ema_optax.start_after(0.9, 5)):
        state = ema_optax.ema_params(decay).init(params)
        found = metrics(state._replace(count=jnp.int32(2_000_000_000)), params)
        assert found["initial_weight"] == 0
        assert 0 < found["decay"] < 1 or decay != 0.99


def test_before_the_first_fold_all_is_initial():
    transform = ema_optax.ema_params(0.9, every=4)
    params = {"w": jnp.ones(2)}
    for count in (0, 3):
        state = transform.init(params)._replace(count=jnp.int32(count))
        assert metrics(state, params)["initial_weight"] == 1


@pytest.mark.long
def test_distance_against_float64():
    """Over all averaged leaves, of any dtype, whatever the others hold."""
    path = drifting(200, 300)
    state, held = follow(ema_optax.ema_params(0.99), path)
    p, s = held[-1].astype(np.float64), np.asarray(state.shadow["w"], np.float64)
    found = metrics(state, {"w": jnp.asarray(held[-1])})
    expected = np.linalg.norm(p - s) / np.linalg.norm(s)
    np.testing.assert_allclose(found["distance"], expected, rtol=1e-6)
    assert found["nonfinite_params"] == found["nonfinite_shadow"] == 0


def test_what_is_not_finite_is_counted_and_left_out():
    params = {"w": jnp.array([1.0, jnp.nan, 3.0]), "n": jnp.int32(3)}
    state = ema_optax.ema_params(0.9).init(params)
    state = state._replace(shadow=state.shadow | {"w": jnp.array([2.0, 2.0, -jnp.inf])})
    found = metrics(state, params)
    assert found["distance"] == 0.5
    assert found["nonfinite_params"] == found["nonfinite_shadow"] == 1
    assert found["nonfinite_params"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("options", "zone"),
    [
        ({}, 2.0**-24 / 1e-4),
        ({"rounding": "stochastic"}, 0),
        ({"shadow_dtype": "bfloat16"}, 0),
        ({"pack_small": True}, 2.0**-24 / 1e-4),
        ({"shadow_sharding": in_host_memory()}, 2.0**-24 / 1e-4),
    ],
)
@older.in_host_memory_or_not
def test_dead_zone_by_how_the_shadow_is_kept(options, zone):
    """float32 at .9999 stops 6e-4 away; stochastic rounding never does."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    transform = ema_optax.ema_params(ema_optax.constant(0.9999), **options)
    found = jax.jit(metrics)(transform.init(params), params)
    np.testing.assert_allclose(found["dead_zone"], zone, rtol=1e-6)
    assert found["distance"] == 0


def test_the_dead_zone_is_where_a_shadow_stops():
    """An element a little farther away moves, a little nearer stays."""
    transform = ema_optax.ema_params(ema_optax.constant(0.9999))
    params = {"w": jnp.full(2, 1.5)}
    state = transform.init(params)
    zone = float(metrics(state, params)["dead_zone"])
    # Half an ulp of 1.5 is that of 1: the zone, relative to 1, is 1.5 times as wide.
    step = {"w": jnp.array([zone * 0.99, zone * 1.01])}
    _, state = transform.update(step, state, params)
    moved = np.asarray(state.shadow["w"]) != 1.5
    assert moved.tolist() == [False, True]


def test_several_shadows_by_name():
    params = {"w": jnp.ones(2)}
    optimizer = optax.chain(
        optax.sgd(0.1), ema_optax.ema_params({"fast": 0.9, "slow": 0.99})
    )
    state = optimizer.init(params)
    _, state = optimizer.update({"w": jnp.ones(2)}, state, params)
    found = metrics(state, params)
    one = metrics(state, params, name="slow")
    assert {key.split("/")[0] for key in found} == {"fast", "slow"}
    assert {f"slow/{key}": value for key, value in one.items()}.items() <= found.items()
    with pytest.raises(ValueError, match="no tree 'medium'"):
        metrics(state, params, name="medium")


def test_groups_with_decays_of_their_own():
    """One distance over all; no decay where there are two."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for other, keys in ((0.9, {"decay", "initial_weight", "dead_zone"}), (0.8, set())):
        optimizer = optax.multi_transform(
            {"x": ema_optax.ema_params(0.9), "y": ema_optax.ema_params(other)},
            {"a": "x", "b": "y"},
        )
        found = metrics(
            optimizer.init(params), {"a": jnp.ones(2), "b": 3 * jnp.ones(2)}
        )
        assert found.keys() == keys | {
            "distance",
            "nonfinite_params",
            "nonfinite_shadow",
        }
        np.testing.assert_allclose(found["distance"], np.sqrt(8 / 4))


def test_a_decay_that_is_not_written_down_is_left_out():
    params = {"w": jnp.ones(2)}
    found = metrics(ema_optax.ema_params(lambda t: 0.9).init(params), params)
    assert "decay" not in found
    assert "distance" in found


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 7}, 10_000),
        ({"every": 400, "ema_power": 0.8, "multiplier": 0.1}, 10_399),
        ({"every": 50, "min_newest_weight": 0.02}, 5_000),
        ({"every": 1, "ema_power": 1.0, "lag": 1}, 500),
    ],
)
def test_bema_against_float64(options, steps):
    """β is 1 − b at the newest fold; a fold more or less in Πβ is .2 % or more."""
    params = {"w": jnp.ones(1)}
    state = bema_params(**options).init(params)._replace(count=jnp.int32(steps))
    found = jax.jit(metrics)(state, params)
    b = reference.bema_weights(steps, **options)
    assert b.size == steps // options["every"]
    left = np.prod(1 - b)
    np.testing.assert_allclose(found["decay"], 1 - b[-1], rtol=3e-7)
    np.testing.assert_allclose(found["initial_weight"], left, rtol=1e-5)
    np.testing.assert_allclose(found["dead_zone"], 2.0**-24 / b[-1], rtol=1e-6)


def test_the_figures_of_bema_are_of_its_average():
    """Not of what is read, which follows the params at every update."""
    params = {"w": jnp.asarray([3.0, 4.0])}
    transform = bema_params(every=2)
    state = transform.init(params)
    _, state = transform.update({"w": jnp.asarray([0.0, 5.0])}, state, params)
    live = {"w": jnp.asarray([3.0, 9.0])}
    found = metrics(state, live)
    np.testing.assert_allclose(found["distance"], 1.0, rtol=1e-6)  # 5 of ‖(3, 4)‖
    assert found["initial_weight"] == 1
    np.testing.assert_allclose(found["decay"], 1 - 12**-0.5, rtol=1e-6)  # to come
    found = metrics(state, {"w": jnp.asarray([jnp.inf, 9.0])})
    assert (found["nonfinite_params"], found["nonfinite_shadow"]) == (1, 0)


def test_bema_beside_named_averages_and_parts():
    """It has no name; parts with an average of another kind have no decay together."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    both = optax.chain(ema_optax.ema_params({"ema": 0.9}), bema_params())
    found = metrics(both.init(params), params)
    alone = metrics(bema_params().init(params), params)
    assert {"ema/decay", "decay"} <= found.keys()
    assert len(found) == 12
    assert alone.items() <= found.items()
    parts = optax.multi_transform(
        {"x": ema_optax.ema_params(0.9), "y": bema_params()}, {"a": "x", "b": "y"}
    )
    found = metrics(parts.init(params), {"a": params["a"], "b": 3 * params["b"]})
    assert found.keys() == {"distance", "nonfinite_params", "nonfinite_shadow"}
    np.testing.assert_allclose(found["distance"], np.sqrt(8 / 4))


@pytest.mark.long
@pytest.mark.parametrize(
    "transform",
    [ema_optax.ema_params(0.5), bema_params(every=1)],
    ids=["ema_params", "bema_params"],
)
@older.needs_nnx
def test_variables_of_nnx(transform):
    """Params as variables, as a State of arrays, and as a dict: the same figures."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    state = transform.init(nnx.as_pure(params))
    forms = params, nnx.as_pure(params), nnx.to_pure_dict(params)
    expected = metrics(state, forms[1])
    assert expected["distance"] == 0
    for form in forms:
        assert metrics(state, form) == expected
        assert metrics(transform.init(form), forms[1]) == expected


def test_errors():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="no shadow in this"):
        metrics(optax.sgd(0.1).init(params), params)
    state = ema_optax.ema_params(0.9).init(params)
    with pytest.raises(ValueError, match=r"'w' is float32\[2\] in the shadow"):
        metrics(state, {"w": jnp.ones(3)})


def test_a_loggers_scalar_call_takes_them():
    """Each is one number, by a name that a path can hold."""
    params = {"w": jnp.ones(2)}
    logged = {}
    for tag, value in metrics(ema_optax.ema_params(0.9).init(params), params).items():
        logged[tag] = float(value)
    assert len(logged) == 6
