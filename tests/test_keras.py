"""Keras models on JAX: variables in and out by name, and the average of `use_ema`.

`.ci/run` runs this file in an environment of its own. Elsewhere
`pip install 'ema-optax[keras]'` makes it run.
"""

import os
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import checkpoint

with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as home:
    if "keras" not in sys.modules:  # its settings are read, and written, once
        patched.setenv("KERAS_BACKEND", "jax")
        patched.setenv("KERAS_HOME", home)
    keras = pytest.importorskip(
        "keras", reason="needs ema-optax[keras]; a stage of .ci/run has it"
    )
if keras.config.backend() != "jax":
    pytest.skip("keras was imported with another backend", allow_module_level=True)

X = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((8, 2)).astype(np.float32)
MOMENTUM = 0.75


def _model(width=3, fresh=True):
    """BatchNorm and dropout's seed stand between what is trained."""
    if fresh:
        keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(width),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(2),
        ]
    )


def _optimizer(**options):
    return keras.optimizers.Adam(
        0.1, **{"use_ema": True, "ema_momentum": MOMENTUM, **options}
    )


class Path(keras.callbacks.Callback):
    """Keeps the params after each update, and the average at the end of the epoch."""

    def __init__(self):
        super().__init__()
        self.raw, self.average = [], None

    def on_train_batch_end(self, batch, logs=None):
        self.raw.append(ema_optax.keras.split(self.model)[0])

    def on_epoch_end(self, epoch, logs=None):
        self.average = ema_optax.keras.average(self.model)


def _fitted(steps=6, **options):
    model = _model()
    model.compile(_optimizer(**options), loss="mse")
    path = Path()
    many = np.tile(X, (steps, 1)), np.tile(Y, (steps, 1))
    model.fit(*many, batch_size=len(X), verbose=0, shuffle=False, callbacks=[path])
    return model, path


def _assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_the_trees_have_the_variables_paths():
    """What is trained in one, statistics and the seed's state in the other."""
    params, rest = ema_optax.keras.split(_model())
    shapes = jax.tree.map(jnp.shape, params["sequential"])
    assert shapes == {
        "dense": {"kernel": (4, 3), "bias": (3,)},
        "batch_normalization": {"gamma": (3,), "beta": (3,)},
        "dense_1": {"kernel": (3, 2), "bias": (2,)},
    }
    assert jax.tree.map(jnp.shape, rest) == {
        "sequential": {
            "batch_normalization": {"moving_mean": (3,), "moving_variance": (3,)}
        },
        "seed_generator": {"seed_generator_state": (2,)},
    }


def test_a_round_trip_is_exact_and_shares_nothing():
    """Fit donates the model's arrays: neither tree, in or out, goes with them."""
    model, _ = _fitted()
    params, rest = ema_optax.keras.split(model)
    other = _model()
    ema_optax.keras.update(other, params, rest)
    for ours, theirs in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(ours.value, theirs.value)
    kept = jax.device_get((params, rest))
    for each in (model, other):
        each.compile(_optimizer(), loss="mse")
        each.fit(X, Y, verbose=0)
    _assert_same(kept, (params, rest))  # and not "Array has been deleted"


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_the_average_is_that_of_the_decay_that_it_names(steps):
    """Against float64, from the params after each update; ours folds them the same."""
    _, path = _fitted(steps)
    average = path.average
    assert average.count == steps == len(path.raw)
    assert average.decay == ema_optax.start_after(ema_optax.constant(MOMENTUM), 1)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), path.raw[0])
    for number, new in enumerate(path.raw, start=1):
        weight = 1 - float(average.decay(number))
        expected = jax.tree.map(
            lambda s, p, w=weight: s + w * (np.asarray(p, np.float64) - s),
            expected,
            new,
        )
    # One update later or earlier differs by 1e-2; Keras rounds twice in a fold.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-7, rtol=2e-6),
        average.tree,
        expected,
    )


def test_fit_ends_with_the_average_in_the_model():
    """So a callback has both, and afterwards the raw params are gone."""
    model, path = _fitted()
    _assert_same(ema_optax.keras.split(model)[0], path.average.tree)
    assert not np.array_equal(
        path.raw[-1]["sequential"]["dense"]["kernel"],
        path.average.tree["sequential"]["dense"]["kernel"],
    )


def test_a_keras_run_is_kept_and_goes_on_with_ours(tmp_path):
    """Raw and average side by side on disk; the average serves, or trains on."""
    model, path = _fitted()
    average, raw = path.average, path.raw[-1]
    checkpoint.save_average(
        tmp_path, average.tree, params=raw, step=average.count, decay=average.decay
    )
    found = checkpoint.describe(tmp_path)
    assert found.trees["shadow"].decay == average.decay
    assert "sequential/dense/kernel" in found.trees["params"].leaves
    served = _model()
    like, _ = ema_optax.keras.split(served)
    ema_optax.keras.update(served, checkpoint.restore(tmp_path, "shadow", like=like))
    ema_optax.keras.update(served, rest=ema_optax.keras.split(model)[1])
    np.testing.assert_array_equal(served(X), model(X))  # fit left the average in it
    _assert_same(checkpoint.restore(tmp_path, "params", like=like), raw)


def _loop(model, chain, params, opt_state, steps):
    """A loop of Keras' documentation, with Optax: lists in the variables' order."""
    rest = [v.value for v in model.non_trainable_variables]

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            out, _ = model.stateless_call(params, rest, X, training=False)
            return jnp.mean((out - Y) ** 2)

        updates, opt_state = chain.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    path = []
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
        path.append(params)
    return params, opt_state, path


def _chain():
    return optax.chain(
        optax.adam(0.1), ema_optax.ema_params(ema_optax.constant(MOMENTUM))
    )


def test_lists_of_a_stateless_loop_are_averaged_saved_and_resumed(tmp_path):
    """By position on disk, bit for bit, and by name in a tree."""
    model = _model()
    params = [v.value for v in model.trainable_variables]
    start, chain = params, _chain()
    params, opt_state, path = _loop(model, chain, params, chain.init(params), 4)
    shadow = ema_optax.shadow_params(opt_state, params)
    assert isinstance(shadow, list)
    expected = [np.asarray(x, np.float64) for x in start]
    for new in path:
        expected = [
            s + (1 - MOMENTUM) * (np.asarray(p, np.float64) - s)
            for s, p in zip(expected, new, strict=True)
        ]
    for mine, theirs in zip(shadow, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)  # a step later: 1e-2

    checkpoint.save(tmp_path, params, opt_state, step=4)
    other = _model(fresh=False)  # other names, and the same positions
    like = [v.value for v in other.trainable_variables]
    found = checkpoint.resume(tmp_path, like, chain.init(like))
    _assert_same(found, (params, opt_state))
    straight = _loop(model, chain, params, opt_state, 2)[:2]
    _assert_same(_loop(model, chain, *found, 2)[:2], straight)

    ema_optax.keras.update(other, checkpoint.restore(tmp_path, "shadow", like=like))
    named, _ = ema_optax.keras.split(model, shadow)
    ema_optax.keras.update(model, named)
    np.testing.assert_array_equal(model(X), other(X))
    _assert_same([v.value for v in model.trainable_variables], shadow)


def test_swapped_always_puts_back():
    """Also after an exception; an evaluation inside is that of the average."""
    model, path = _fitted()
    ema_optax.keras.update(model, path.raw[-1])
    raw = model.evaluate(X, Y, verbose=0)
    with ema_optax.keras.swapped(model, path.average.tree):
        averaged = model.evaluate(X, Y, verbose=0)
    assert raw != averaged
    assert model.evaluate(X, Y, verbose=0) == raw
    with (
        pytest.raises(ZeroDivisionError),
        ema_optax.keras.swapped(model, path.average.tree),
    ):
        1 / 0  # noqa: B018
    _assert_same(ema_optax.keras.split(model)[0], path.raw[-1])


def test_other_names_of_the_same_code_are_said():
    """The second model of a process has other numbers; the error names the way out."""
    first = ema_optax.keras.split(_model())[0]
    second = _model(fresh=False)
    with pytest.raises(ValueError, match=r"Only numbers differ.*clear_session\(\)"):
        ema_optax.keras.update(second, first)
    ema_optax.keras.update(_model(), first)


def _without(tree, *keys):
    *parents, last = keys
    copy = jax.tree.map(lambda x: x, tree)
    node = copy
    for key in parents:
        node = node[key]
    del node[last]
    return copy


def test_what_does_not_fit_changes_nothing():
    """A leaf missing, one too many, another shape, kind or number of values."""
    model = _model()
    params, rest = ema_optax.keras.split(model)
    wide, _ = ema_optax.keras.split(_model(width=5))
    values = jax.tree.leaves(params)
    more = {**params, "head": {"kernel": jnp.ones(2)}}
    whole = jax.tree.map(lambda x: jnp.ones(x.shape, int), params)
    changed = jax.tree.map(lambda x: x + 1, params)
    for wrong, words in [
        ((_without(params, "sequential", "dense", "bias"),), "no value for 'seq"),
        ((more,), "a value for 'head/kernel', which the model does not"),
        ((wide,), r"has the shape \(4, 5\), and its variable \(4, 3\)"),
        ((whole,), "is int32, and its variable float32"),
        ((values[:-1],), "has 6 trainable variables, and the list 5 values"),
        (({},), "The tree is empty"),
        ((rest,), "no value for"),
        ((changed, params), "no value for"),  # the first fits, the second does not
    ]:
        with pytest.raises(ValueError, match=words):
            ema_optax.keras.update(model, *wrong)
        _assert_same(ema_optax.keras.split(model), (params, rest))


def test_floats_are_cast_to_the_variables_floats():
    """A bfloat16 or float64 value becomes float32, as a restore does."""
    model = _model()
    params, _ = ema_optax.keras.split(model)
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    ema_optax.keras.update(model, half)
    expected = jax.tree.map(lambda x: x.astype(np.float32), half)
    _assert_same(ema_optax.keras.split(model)[0], expected)


def test_a_failing_assign_puts_all_back(monkeypatch):
    """Halfway through the variables, whatever it is that fails."""
    model = _model()
    params, _ = ema_optax.keras.split(model)
    last = model.trainable_variables[-1]
    kind, assign = type(last), type(last).assign
    seen = []

    def failing(variable, value):
        if variable is last and not seen:
            seen.append(1)
            raise MemoryError
        return assign(variable, value)

    monkeypatch.setattr(kind, "assign", failing)
    with pytest.raises(MemoryError):
        ema_optax.keras.update(model, jax.tree.map(jnp.zeros_like, params))
    _assert_same(ema_optax.keras.split(model)[0], params)


def test_models_that_have_no_tree_are_refused():
    """Not built, two variables of one path, and what is no model."""
    with pytest.raises(ValueError, match="is not built"):
        ema_optax.keras.split(keras.Sequential([keras.layers.Dense(2)]))
    inputs = keras.Input((4,))
    inner = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="a")], name="b")
        for _ in range(2)
    ]
    twins = keras.Sequential([keras.Input((4,)), *_renamed(inner)])
    with pytest.raises(ValueError, match="Two variables of the model have the path"):
        ema_optax.keras.split(twins)
    for wrong in (inputs, {"w": 1}, keras.layers.Dense(2)):
        with pytest.raises(TypeError, match=r"takes a keras\.Model"):
            ema_optax.keras.update(wrong, {})


def _renamed(models):
    """Names of layers are compared in a model, and paths keep the first names."""
    for number, model in enumerate(models):
        model.name = f"c{number}"
    return models


def test_optimizers_without_such_an_average_are_refused():
    """Not compiled, without use_ema, of Optax, not stepped, of another model."""
    model = _model()
    with pytest.raises(ValueError, match="was not compiled"):
        ema_optax.keras.average(model)
    with pytest.raises(TypeError, match="shadow_params"):
        ema_optax.keras.average(model, _chain())
    with pytest.raises(ValueError, match="without use_ema=True"):
        ema_optax.keras.average(model, _optimizer(use_ema=False))
    unstepped = _optimizer()
    unstepped.build(model.trainable_variables)
    with pytest.raises(ValueError, match="has made no update yet"):
        ema_optax.keras.average(model, unstepped)
    with pytest.raises(ValueError, match="has no average of"):
        ema_optax.keras.average(_model(fresh=False), unstepped)
    fitted, _ = _fitted()
    fitted.layers[0].trainable = False
    with pytest.raises(ValueError, match="averages 2 variables that the model does"):
        ema_optax.keras.average(fitted)


def test_a_momentum_without_a_decay_says_none():
    """Gradient accumulation, where Keras folds at each batch; a momentum of 1."""
    for options in ({"gradient_accumulation_steps": 2}, {"ema_momentum": 1.0}):
        _, path = _fitted(4, **options)
        assert path.average.decay is None
        assert path.average.count == (2 if "ema_momentum" not in options else 4)


def test_a_scaled_loss_has_the_average_of_the_optimizer_inside():
    """As mixed_float16 wraps the optimizer."""
    model = _model()
    scaled = keras.optimizers.LossScaleOptimizer(_optimizer())
    model.compile(scaled, loss="mse")
    path = Path()
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[path])
    assert path.average.count == 2


def test_another_backend_is_refused(tmp_path):
    """In words, before any variable is touched."""
    code = (
        "import keras, ema_optax\n"
        "model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])\n"
        "try:\n"
        "    ema_optax.keras.split(model)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    settings = {"KERAS_BACKEND": "numpy", "KERAS_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "Keras runs on numpy" in done.stdout, done.stderr
    assert "KERAS_BACKEND=jax" in done.stdout


def _pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_without_a_copy_no_tree_of_memory_is_taken():
    """By default all buffers are new; without, the model's own are back afterwards."""
    model, path = _fitted()
    average = path.average.tree
    own = _pointers([v.value for v in model.trainable_variables])
    assert not _pointers(ema_optax.keras.split(model)[0]) & own
    assert _pointers(ema_optax.keras.split(model, copy=False)[0]) == own
    for copy in (False, True):
        raw = ema_optax.keras.split(model)[0]
        with ema_optax.keras.swapped(model, average, copy=copy):
            inside = _pointers([v.value for v in model.trainable_variables])
            _assert_same(ema_optax.keras.split(model)[0], average)
            assert bool(inside & _pointers(average)) != copy
            assert not inside & own
        _assert_same(ema_optax.keras.split(model)[0], raw)
        after = _pointers([v.value for v in model.trainable_variables])
        assert copy or after == own
    with pytest.raises(TypeError, match="copy must be True or False"):
        ema_optax.keras.split(model, copy=None)


def test_fit_inside_swapped_leaves_the_models_own_params():
    """It donates what the model holds then: copies of the average."""
    model, path = _fitted()
    raw = jax.device_get(ema_optax.keras.split(model)[0])
    with ema_optax.keras.swapped(model, path.average.tree):
        model.fit(X, Y, epochs=1, verbose=0)
    _assert_same(ema_optax.keras.split(model)[0], raw)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(path.average.tree))
