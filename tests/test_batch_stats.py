"""BatchNorm's statistics recomputed for averaged params, in Linen and in NNX."""

import functools
import subprocess
import sys
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import ema_optax
from tests import older

BATCHES = [
    (3 + 2 * np.random.default_rng(i).standard_normal((16, 5))).astype(np.float32)
    for i in range(7)
]
REFRESHED = 3e-6  # of float32; the running average is off by 1e-1 even after an epoch


class Linen(nn.Module):
    """Two BatchNorms, the second of what the first makes of a batch."""

    momentum: float = 0.99
    first_frozen: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        frozen = not train or self.first_frozen
        x = nn.BatchNorm(use_running_average=frozen, momentum=self.momentum)(x)
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        return nn.Dropout(0.5, deterministic=not train)(x)


class Module(nnx.Module):
    """The same in NNX, with dropout where statistics would see it."""

    def __init__(self, momentum=0.99):
        rngs = nnx.Rngs(0)
        self.first = nnx.BatchNorm(5, momentum=momentum, rngs=rngs)
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.second = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(self.dense(self.first(x))))


def _reference(kernel, bias, scale=1.0, shift=0.0):
    """Mean and variance of each layer in float64: the mean over batches of each."""
    kernel, bias, scale, shift = map(np.float64, (kernel, bias, scale, shift))
    first, second = [], []
    for batch in np.asarray(BATCHES, np.float64):
        first.append([batch.mean(0), batch.var(0)])
        normal = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-5)
        hidden = (normal * scale + shift) @ kernel + bias
        second.append([hidden.mean(0), hidden.var(0)])
    return np.mean(first, 0), np.mean(second, 0)


def _run(model, **options):
    """`apply_fn` in training mode, with dropout: its place is after the last layer."""
    rngs = {"dropout": jax.random.key(0)}
    return functools.partial(model.apply, train=True, rngs=rngs, **options)


def _assert_close(found, expected, within=REFRESHED):
    for layer, (mean, var) in expected.items():
        for name, value in (("mean", mean), ("var", var)):
            difference = np.abs(np.asarray(found[layer][name], np.float64) - value)
            assert difference.max() < within * np.abs(value).max(initial=1), name


@pytest.mark.long
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 0.99, 0.999, 1 - 1 / 300])
def test_the_mean_of_each_batchs_statistics(momentum):
    """Against NumPy in float64, whatever the momentum and the statistics of before."""
    model = Linen(momentum)
    variables = model.init(jax.random.key(0), BATCHES[0])
    stats = jax.tree.map(lambda x: 1000 * x + 77, variables["batch_stats"])
    variables = {**variables, "batch_stats": stats}
    found = ema_optax.linen.refresh_batch_stats(_run(model), variables, iter(BATCHES))
    dense = variables["params"]["Dense_0"]
    first, second = _reference(dense["kernel"], dense["bias"])
    # A momentum of few digits is known exactly, another one to float32: 1−m to 1e-5.
    within = REFRESHED if len(str(momentum)) < 8 else 2e-5
    expected = {"BatchNorm_0": first, "BatchNorm_1": second}
    _assert_close(found["batch_stats"], expected, within)
    assert found["params"] is variables["params"]


@pytest.mark.long
@older.needs_nnx
def test_nnx_modules():
    """The same in the module itself; its modes, params and PRNG counts stay."""
    model = Module()
    model.second.use_running_average = True  # evaluation mode
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngKey)))
    ema_optax.nnx.refresh_batch_stats(model, iter(BATCHES))
    first, second = _reference(model.dense.kernel[...], model.dense.bias[...])
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    _assert_close(stats, {"first": first, "second": second})
    assert model.second.use_running_average
    assert not model.first.use_running_average
    assert not model.dropout.deterministic
    kept = nnx.Not(nnx.Any(nnx.RngKey, nnx.BatchStat))
    after = nnx.state(model, kept)
    expected = nnx.filter_state(before, kept)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


@older.needs_nnx
def test_nnx_modules_that_are_called_otherwise():
    """`call` runs them; the mode may be an argument."""

    class Called(Module):
        def __call__(self, x, train):
            return self.second(
                self.dense(self.first(x, use_running_average=not train)),
                use_running_average=not train,
            )

    model = Called()
    ema_optax.nnx.refresh_batch_stats(
        model,
        [{"image": batch} for batch in BATCHES],
        call=lambda model, batch: model(batch["image"], train=True),
    )
    first, second = _reference(model.dense.kernel[...], model.dense.bias[...])
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    _assert_close(stats, {"first": first, "second": second})


@pytest.mark.long
@older.needs_nnx
def test_inside_swapped_they_are_of_the_shadow_and_go_with_it():
    """The raw params get their own statistics back."""
    model = Module()
    chain = optax.chain(optax.sgd(0.5), ema_optax.ema_params(ema_optax.constant(0.5)))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    loss = nnx.grad(lambda model: jnp.mean((model(BATCHES[0]) - 1) ** 2))
    optimizer.update(model, loss(model))
    before = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.BatchStat)))
    copy = ema_optax.nnx.shadow_copy(model, optimizer)
    ema_optax.nnx.refresh_batch_stats(copy, BATCHES)
    with ema_optax.nnx.swapped(model, optimizer):
        ema_optax.nnx.refresh_batch_stats(model, BATCHES)
        layers = (model.dense.kernel, model.dense.bias, model.first.scale)
        first, second = _reference(*(x[...] for x in (*layers, model.first.bias)))
        inside = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.BatchStat)))
    _assert_close(inside, {"first": first, "second": second})
    copied = nnx.to_pure_dict(nnx.as_pure(nnx.state(copy, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, copied, inside)
    after = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert np.any(after["first"]["mean"] != inside["first"]["mean"])


def test_frozen_layers_keep_their_statistics_and_use_them():
    """The second layer sees what the first, frozen, makes of a batch."""
    model = Linen(first_frozen=True)
    variables = model.init(jax.random.key(0), BATCHES[0])
    old = {"mean": jnp.full(5, 3.0), "var": jnp.full(5, 4.0)}
    stats = {**variables["batch_stats"], "BatchNorm_0": old}
    variables = {**variables, "batch_stats": stats}
    found = ema_optax.linen.refresh_batch_stats(_run(model), variables, BATCHES)[
        "batch_stats"
    ]
    jax.tree.map(np.testing.assert_array_equal, found["BatchNorm_0"], old)
    dense = jax.tree.map(np.float64, variables["params"]["Dense_0"])
    hidden = (np.asarray(BATCHES, np.float64) - 3) / np.sqrt(4 + 1e-5)
    hidden = hidden @ dense["kernel"] + dense["bias"]
    expected = hidden.mean(1).mean(0), hidden.var(1).mean(0)
    _assert_close(found, {"BatchNorm_1": expected})


def test_large_and_narrow_statistics():
    """Means of 1e6 beside variances of 1, and statistics that are kept in bfloat16."""
    model = nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    batches = [1e6 + np.arange(8, dtype=np.float32)[:, None] + i for i in range(3)]
    variables = model.init(jax.random.key(0), batches[0])
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["batch_stats"])
    for stats, error in ((variables["batch_stats"], 1e-6), (narrow, 4e-3)):
        found = ema_optax.linen.refresh_batch_stats(
            model.apply, {**variables, "batch_stats": stats}, batches
        )["batch_stats"]
        assert found["mean"].dtype == stats["mean"].dtype
        np.testing.assert_allclose(np.float64(found["mean"]), 1e6 + 4.5, rtol=error)
        np.testing.assert_allclose(np.float64(found["var"]), 5.25, rtol=error)


def test_the_result_is_like_the_variables():
    """Frozen dicts stay frozen; statistics of NaN are replaced as any others."""
    model = Linen()
    variables = model.init(jax.random.key(0), BATCHES[0])
    expected = ema_optax.linen.refresh_batch_stats(_run(model), variables, BATCHES)
    lost = jax.tree.map(lambda x: x * jnp.nan, variables["batch_stats"])
    frozen = freeze({**variables, "batch_stats": lost})
    found = ema_optax.linen.refresh_batch_stats(_run(model), frozen, BATCHES)
    assert isinstance(found, FrozenDict)
    assert jax.tree.structure(found) == jax.tree.structure(frozen)
    jax.tree.map(np.testing.assert_array_equal, found.unfreeze(), expected)


def _variables(model=None):
    return (model or Linen()).init(jax.random.key(0), BATCHES[0])


BAD = np.where(np.arange(5) == 2, np.nan, BATCHES[0])


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(4))(x, update_stats=True)


@pytest.mark.parametrize(
    ("model", "run", "change", "batches", "error", "wrong"),
    [
        (Linen(), _run, {}, [], ValueError, r"no batches.*used before is empty"),
        (
            Linen(),
            _run,
            {},
            [*BATCHES[:2], BAD],
            ValueError,
            r"Batch 3 gave .*not finite, at 'BatchNorm_0/mean'",
        ),
        (Linen(), _run, {}, [BAD], ValueError, r"Batch 1 gave .* not finite"),
        (
            Linen(),
            _run,
            {"batch_stats": {}},
            BATCHES,
            ValueError,
            r"no 'batch_stats', only \['batch_stats', 'params'\]",
        ),
        (
            Linen(),
            lambda model: model.apply,
            {},
            BATCHES,
            ValueError,
            r"updated no statistics.*train=True",
        ),
        (
            Linen(momentum=1.0),
            _run,
            {},
            BATCHES,
            ValueError,
            r"updated no statistics.*train=True",
        ),
        (
            Linen(),
            lambda model: (
                lambda variables, x, mutable: (x, {"batch_stats": {"mean": x[0]}})
            ),
            {},
            BATCHES,
            ValueError,
            r"has statistics at .*/mean.*, and returned some at .*mean",
        ),
        (
            Linen(),
            lambda model: lambda variables, x, mutable: model.apply(variables, x),
            {},
            BATCHES,
            TypeError,
            r"must return outputs and updated batch_stats.*\*\*kw",
        ),
        (
            Spectral(),
            lambda model: model.apply,
            {},
            BATCHES,
            ValueError,
            r"is no running average.*collection_name='spectral_stats'",
        ),
    ],
    ids=[
        "no batches",
        "third batch not finite",
        "first batch not finite",
        "no batch_stats",
        "no train=True",
        "momentum 1",
        "statistics elsewhere",
        "no updated statistics",
        "no running average",
    ],
)
def test_what_cannot_be_refreshed_is_said(model, run, change, batches, error, wrong):
    """What is wrong, where, and the call that works."""
    variables = {**_variables(model), **change}
    with pytest.raises(error, match=wrong):
        ema_optax.linen.refresh_batch_stats(run(model), variables, batches)


@older.needs_nnx
def test_modules_that_cannot_be_refreshed():
    """Not of NNX, or without statistics."""
    with pytest.raises(TypeError, match=r"got Linen\. For Linen.*linen\.refresh"):
        ema_optax.nnx.refresh_batch_stats(Linen(), BATCHES)
    with pytest.raises(ValueError, match="This Linear has no batch statistics"):
        ema_optax.nnx.refresh_batch_stats(nnx.Linear(5, 2, rngs=nnx.Rngs(0)), BATCHES)


@pytest.mark.parametrize("progress", [True, False, None])
def test_the_bar_is_drawn_where_it_is_asked_for(progress, capsys):
    """On stderr; by itself never into a pipe."""
    model = Linen()
    ema_optax.linen.refresh_batch_stats(
        _run(model), _variables(model), BATCHES, progress=progress
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert ("7/7" in err) == (progress is True)
    assert bool(err) == (progress is True)


def test_the_bar_ends_with_an_error(capsys):
    """Although the traceback still holds its frame."""
    with pytest.raises(ValueError, match="Batch 1 gave") as caught:
        ema_optax.linen.refresh_batch_stats(
            _run(Linen()), _variables(), [BAD], progress=True
        )
    assert caught.tb is not None
    for thread in threading.enumerate():
        if "_RefreshThread" in str(thread):
            thread.join(10)
            assert not thread.is_alive()
    assert "0/1" in capsys.readouterr().err


@pytest.mark.long
def test_without_rich_a_bar_that_was_asked_for_is_an_error():
    """And one that was not asked for is not drawn."""
    code = (
        "import sys; sys.modules['rich'] = None; sys.stderr.isatty = lambda: True\n"
        "from ema_optax._messages.progress import tracked\n"
        "print(*tracked([1, 2], 'counting', None))\n"
        "try: list(tracked([1, 2], 'counting', True))\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("1 2\n")
    assert "pip install 'ema-optax[cli]'" in done.stdout
    assert done.stderr == ""


# Statistics over devices.


@pytest.mark.parametrize("names", ["batch", ("x", "y")])
def test_batch_norm_over_an_axis(names):
    """Alone a batch is all that there is on its axis: the same as without the axis."""
    axes = (names,) if isinstance(names, str) else names

    class Model(nn.Module):
        over: bool

        @nn.compact
        def __call__(self, x, train=True):
            for axis in axes:
                options = {"axis_name": axis if self.over else None, "momentum": 0.9}
                x = nn.BatchNorm(use_running_average=not train, **options)(x)
            return x

    batches = [jnp.arange(12.0).reshape(6, 2) * k for k in (1, 2, 5)]
    variables = Model(over=False).init(jax.random.key(0), batches[0])
    expected = ema_optax.linen.refresh_batch_stats(
        Model(over=False).apply, variables, batches
    )
    found = ema_optax.linen.refresh_batch_stats(
        Model(over=True).apply, variables, batches
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6), found, expected
    )

    def wrong(*_, **__):
        raise NameError("of_the_user is not defined")

    with pytest.raises(NameError, match="of_the_user"):
        ema_optax.linen.refresh_batch_stats(wrong, variables, batches)


@older.needs_nnx
def test_nnx_batch_norm_over_an_axis():
    """As in Linen."""
    batches = [jnp.arange(12.0).reshape(6, 2) * k for k in (1, 2, 5)]
    models = [
        nnx.BatchNorm(2, momentum=0.9, axis_name=axis, rngs=nnx.Rngs(0))
        for axis in (None, "batch")
    ]
    for model in models:
        ema_optax.nnx.refresh_batch_stats(model, batches)
    for name in ("mean", "var"):
        plain, over = (np.asarray(getattr(m, name)[...]) for m in models)
        np.testing.assert_allclose(over, plain, rtol=1e-6)
        assert plain.any()


@pytest.mark.long
@older.needs_nnx
def test_nnx_spectral_norm_is_told_what_nnx_has():
    """And with what is told it works."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 2, rngs=rngs)
            self.spectral = nnx.SpectralNorm(self.dense, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x, update_stats=True):
            return self.norm(self.spectral(x, update_stats=update_stats))

    model = Model(nnx.Rngs(0))
    batches = [jnp.arange(4.0).reshape(2, 2), jnp.ones((2, 2))]
    with pytest.raises(ValueError, match=r"in NNX call it with update_stats=False"):
        ema_optax.nnx.refresh_batch_stats(model, batches)
    before = np.asarray(model.norm.mean[...])
    ema_optax.nnx.refresh_batch_stats(
        model, batches, call=lambda m, x: m(x, update_stats=False)
    )
    assert (np.asarray(model.norm.mean[...]) != before).any()


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_an_array_is_no_iterable_of_batches(array):
    """Its rows would be batches of one example, of variance 0."""
    model = Linen()
    variables = model.init(jax.random.key(0), BATCHES[0])
    with pytest.raises(TypeError, match=r"shape \(16, 5\).*Pass \[x\]"):
        ema_optax.linen.refresh_batch_stats(_run(model), variables, array(BATCHES[0]))
