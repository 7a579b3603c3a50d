"""Flax NNX: averages through nnx.Optimizer, in live modules, in copies, on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ema_optax
from ema_optax import checkpoint, shadow_params
from tests import older

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((8, 2)).astype(np.float32)

pytestmark = older.needs_nnx


class Model(nnx.Module):
    """Two layers with all that is no param between them, and tied weights."""

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.encoder = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.decoder = nnx.Linear(4, 2, rngs=rngs)
        self.tied = self.encoder.kernel

    def __call__(self, x):
        hidden = self.dropout(self.norm(self.encoder(x)))
        return self.decoder(hidden) + hidden @ self.tied.T[:, :2]


def _chain(decay=0.5, **options):
    if isinstance(decay, float):
        decay = ema_optax.constant(decay)
    return optax.chain(optax.adam(0.05), ema_optax.ema_params(decay, **options))


def _new(transform=None, seed=0, wrt=nnx.Param):
    model = Model(seed)
    return model, nnx.Optimizer(model, transform or _chain(), wrt=wrt)


@nnx.jit
def _step(model, optimizer):
    loss = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))
    optimizer.update(model, loss(model))


def _trained(transform=None, steps=3, **options):
    model, optimizer = _new(transform, **options)
    path = [_arrays(model, nnx.Param)]
    for _ in range(steps):
        _step(model, optimizer)
        path.append(_arrays(model, nnx.Param))
    return model, optimizer, path


def _arrays(model, *filters):
    """Copies, in float64 where they are floats."""
    leaves = nnx.to_flat_state(nnx.as_pure(nnx.state(model, *filters)))
    found = {}
    for path, leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        wide = np.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        found["/".join(map(str, path))] = np.array(leaf, wide)
    return found


def _average(path, decay=0.5):
    """The shadow of a path of params with a constant decay, in float64."""
    shadow = path[0]
    for new in path[1:]:
        shadow = {k: s + (1 - decay) * (new[k] - s) for k, s in shadow.items()}
    return shadow


def _assert_close(found, expected):
    """Within float32's rounding: 1e-6 where one step late is off by 1e-2."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


def _assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


WAYS = {
    "plain": lambda: _chain(),
    "packed": lambda: _chain(pack_small=True),
    "under MultiSteps": lambda: optax.MultiSteps(_chain(), 1),
    "on a part": lambda: optax.multi_transform(
        {"all": _chain()}, lambda params: jax.tree.map(lambda _: "all", params)
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_swapped_holds_the_average_of_what_the_module_held(way):
    """Against a float64 average of the path; the raw params come back bit for bit."""
    model, optimizer, path = _trained(WAYS[way]())
    before = _arrays(model)
    with ema_optax.nnx.swapped(model, optimizer) as inside:
        assert inside is model
        _assert_close(_arrays(model, nnx.Param), _average(path))
        assert model.tied is model.encoder.kernel
        _assert_same(_arrays(model, nnx.BatchStat), _arrays_of(before, "norm"))
    _assert_same(_arrays(model), before)
    copy = ema_optax.nnx.shadow_copy(model, optimizer)
    _assert_close(_arrays(copy, nnx.Param), _average(path))
    assert copy.tied is copy.encoder.kernel


def _arrays_of(arrays, part):
    return {k: arrays[k] for k in (f"{part}/mean", f"{part}/var")}


@pytest.mark.long
def test_shadow_params_takes_an_optimizers_state_as_it_is():
    """Its variables are of types of their own; the result is a State of Params."""
    model, optimizer, path = _trained()
    params = nnx.state(model, nnx.Param)
    read = shadow_params(optimizer.opt_state, params)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert isinstance(read["encoder"]["kernel"], nnx.Param)
    fresh = Model(1)
    nnx.update(fresh, read)
    _assert_close(_arrays(fresh, nnx.Param), _average(path))


@pytest.mark.long
def test_masked_leaves_are_those_of_the_module():
    """What a mask leaves out is read from the live params."""
    mask = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    model, optimizer, path = _trained(_chain(mask=mask))
    expected = {k: _average(path)[k] if v.ndim > 1 else v for k, v in path[-1].items()}
    with ema_optax.nnx.swapped(model, optimizer):
        _assert_close(_arrays(model, nnx.Param), expected)


@pytest.mark.long
def test_lora_params_are_swapped_into_the_whole_model():
    """Only what the optimizer trains is averaged: wrt=nnx.LoRAParam."""

    class Adapted(nnx.Module):
        def __init__(self):
            self.layer = nnx.LoRALinear(3, 2, lora_rank=1, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)

    model = Adapted()
    optimizer = nnx.Optimizer(model, _chain(), wrt=nnx.LoRAParam)
    first = _arrays(model)

    @nnx.jit
    def step(model, optimizer):
        trained = nnx.DiffState(0, nnx.LoRAParam)
        loss = nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2), argnums=trained)
        optimizer.update(model, loss(model))

    step(model, optimizer)
    last = _arrays(model)
    changed = {k for k, v in last.items() if np.any(v != first[k])}
    assert changed == {"layer/lora/lora_b"}  # a's gradient is 0 while b is
    copy = ema_optax.nnx.shadow_copy(model, optimizer)
    _assert_close(_arrays(copy), _average([first, last]))


def test_exceptions_put_the_raw_params_back():
    """And are raised as they are."""
    model, optimizer, _ = _trained()
    before = _arrays(model, nnx.Param)

    class Interrupted(BaseException):
        pass

    def evaluate():
        assert np.any(_arrays(model)["decoder/kernel"] != before["decoder/kernel"])
        _step(model, optimizer)  # does not hide what went wrong
        raise Interrupted

    with pytest.raises(Interrupted), ema_optax.nnx.swapped(model, optimizer):
        evaluate()
    _assert_same(_arrays(model, nnx.Param), before)


@pytest.mark.long
def test_what_is_written_inside_is_gone():
    """Params and statistics come back; PRNG counts go on."""
    model, optimizer, _ = _trained()
    before = _arrays(model)
    with ema_optax.nnx.swapped(model, optimizer):
        model.decoder.bias[...] = jnp.ones(2)
        model(X)  # in training mode
        assert np.any(_arrays(model)["norm/mean"] != before["norm/mean"])
    after = _arrays(model)
    counts = [k for k in before if k.endswith("/count")]
    assert [after.pop(k) - before.pop(k) for k in counts] == [1]
    _assert_same(after, before)


def test_a_step_inside_is_an_error():
    """After the raw params are back."""
    model, optimizer, _ = _trained()
    before = _arrays(model, nnx.Param)
    with (
        pytest.raises(RuntimeError, match=r"optimizer.update was called inside"),
        ema_optax.nnx.swapped(model, optimizer),
    ):
        _step(model, optimizer)
    _assert_same(_arrays(model, nnx.Param), before)


@pytest.mark.long
def test_nested():
    """The inner shadow comes from the raw params, and the outer one comes back."""
    decays = {"fast": ema_optax.constant(0.1), "slow": ema_optax.constant(0.9)}
    model, optimizer, path = _trained(_chain(decays))
    before = _arrays(model)
    with ema_optax.nnx.swapped(model, optimizer, name="fast"):
        with ema_optax.nnx.swapped(model, optimizer, name="slow"):
            _assert_close(_arrays(model, nnx.Param), _average(path, 0.9))
        _assert_close(_arrays(model, nnx.Param), _average(path, 0.1))
        copy = ema_optax.nnx.shadow_copy(model, optimizer, name="slow")
        _assert_close(_arrays(copy, nnx.Param), _average(path, 0.9))
    _assert_same(_arrays(model), before)


@pytest.mark.long
def test_bema_inside_its_own_shadow_is_still_of_the_raw_params():
    """Its correction needs the live params, which the module does not hold then."""
    bema = ema_optax.bema_params(every=1)
    model, optimizer, _ = _trained(optax.chain(optax.adam(0.05), bema))
    expected = _arrays(ema_optax.nnx.shadow_copy(model, optimizer), nnx.Param)
    raw = _arrays(model, nnx.Param)
    assert any(np.any(expected[k] != raw[k]) for k in raw)
    with ema_optax.nnx.swapped(model, optimizer):
        _assert_same(_arrays(model, nnx.Param), expected)
        copy = ema_optax.nnx.shadow_copy(model, optimizer)
        _assert_same(_arrays(copy, nnx.Param), expected)
        with ema_optax.nnx.swapped(model, optimizer):
            _assert_same(_arrays(model, nnx.Param), expected)
    _assert_same(_arrays(model, nnx.Param), raw)


@pytest.mark.long
def test_under_jit():
    """Swapped outside of it, nothing compiles again; inside, the module stays."""
    model, optimizer, _ = _trained()
    model.eval()
    before = _arrays(model)
    traces = []

    @nnx.jit
    def answer(model):
        traces.append(1)
        return model(X)

    @nnx.jit
    def answer_with_shadow(model, optimizer):
        with ema_optax.nnx.swapped(model, optimizer):
            return model(X)

    raw = answer(model)
    with ema_optax.nnx.swapped(model, optimizer):
        outside = answer(model)
    assert len(traces) == 1
    inside = answer_with_shadow(model, optimizer)
    np.testing.assert_allclose(inside, outside, rtol=1e-6)
    assert np.max(np.abs(raw - outside)) > 1e-3
    _assert_same(_arrays(model), before)


@pytest.mark.long
def test_a_copy_outlives_a_step_that_donates():
    """It shares no array with the module."""
    model, optimizer, path = _trained()
    model.eval()
    copy = ema_optax.nnx.shadow_copy(model, optimizer)
    expected = _arrays(copy)
    donating = nnx.jit(_step.__wrapped__, donate_argnums=(0, 1))
    donating(model, optimizer)
    _assert_same(_arrays(copy), expected)
    assert copy.norm.use_running_average
    _assert_close(_arrays(copy, nnx.Param), _average(path))


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_a_checkpoint(way, tmp_path):
    """Bit for bit as without: params, statistics, PRNG counts, moments, shadow."""
    model, optimizer, _ = _trained(WAYS[way](), steps=2)
    checkpoint.save(tmp_path, *ema_optax.nnx.split(model, optimizer), step=2)
    other, other_optimizer = _new(WAYS[way](), seed=7)
    found = checkpoint.resume(tmp_path, *ema_optax.nnx.split(other, other_optimizer))
    ema_optax.nnx.update(other, other_optimizer, *found)
    for each in ((model, optimizer), (other, other_optimizer)):
        _step(*each)
    _assert_same(_arrays(other), _arrays(model))
    _assert_same(_arrays(other_optimizer), _arrays(optimizer))
    assert other_optimizer.step[...] == 3


def test_inference_from_a_checkpoint_needs_no_optimizer(tmp_path):
    """The whole module: averaged params, and the statistics that were beside them."""
    model, optimizer, path = _trained()
    checkpoint.save(tmp_path, *ema_optax.nnx.split(model, optimizer))
    fresh = Model(3)
    like = nnx.as_pure(nnx.state(fresh))
    nnx.update(fresh, checkpoint.restore(tmp_path, "shadow", like=like))
    _assert_close(_arrays(fresh, nnx.Param), _average(path))
    _assert_same(_arrays(fresh, nnx.BatchStat), _arrays(model, nnx.BatchStat))
    fresh.eval()
    with ema_optax.nnx.swapped(model, optimizer):
        model.eval()
        np.testing.assert_array_equal(fresh(X), model(X))


def test_an_optimizers_own_state_is_saved_and_resumed_too(tmp_path):
    """Without nnx.split: params and optimizer.opt_state in Flax's variables."""
    model, optimizer, path = _trained()
    checkpoint.save(tmp_path, nnx.state(model, nnx.Param), optimizer.opt_state)
    other, other_optimizer = _new(seed=5)
    like = nnx.state(other, nnx.Param)
    read = checkpoint.restore(tmp_path, "shadow", like=like)
    nnx.update(other, read)
    _assert_close(_arrays(other, nnx.Param), _average(path))
    _, state = checkpoint.resume(tmp_path, like, other_optimizer.opt_state)
    other_optimizer.opt_state = nnx.data(state)
    _assert_same(
        _arrays(other_optimizer, nnx.Not(nnx.PathContains("step"))),
        _arrays(optimizer, nnx.Not(nnx.PathContains("step"))),
    )


def test_a_save_while_the_shadow_is_in_keeps_the_raw_params(tmp_path):
    """To go on from averaged weights, unawares, is the classic mistake."""
    model, optimizer, _ = _trained()
    with ema_optax.nnx.swapped(model, optimizer):
        checkpoint.save(tmp_path, *ema_optax.nnx.split(model, optimizer))
        with pytest.raises(RuntimeError, match="update after the with"):
            ema_optax.nnx.update(
                model, optimizer, *ema_optax.nnx.split(model, optimizer)
            )
    other, other_optimizer = _new(seed=7)
    found = checkpoint.resume(tmp_path, *ema_optax.nnx.split(other, other_optimizer))
    ema_optax.nnx.update(other, other_optimizer, *found)
    _assert_same(_arrays(other), _arrays(model))
    _step(model, optimizer)  # and after the with, what the module holds is raw again
    state, _ = ema_optax.nnx.split(model, optimizer)
    np.testing.assert_array_equal(state["decoder"]["bias"], model.decoder.bias[...])


def test_what_does_not_fit_is_said():
    """Other objects, an optimizer of another model, and one without an average."""
    model, optimizer, _ = _trained()
    with (
        pytest.raises(TypeError, match="got Model and tuple"),
        ema_optax.nnx.swapped(model, optimizer.opt_state),
    ):
        pass
    other = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"The shadow does not fit these params: '"):
        ema_optax.nnx.shadow_copy(other, optimizer)
    plain = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = _arrays(model)
    with (
        pytest.raises(ValueError, match="There is no shadow"),
        ema_optax.nnx.swapped(model, plain),
    ):
        pass
    _assert_same(_arrays(model), before)
    with ema_optax.nnx.swapped(model, optimizer):  # the failed ones left nothing behind
        pass


def _all_of(model, optimizer):
    return jax.tree.map(np.array, ema_optax.nnx.split(model, optimizer))


@pytest.mark.parametrize("got", ["jax", "device_get"])
def test_update_puts_back_all_or_nothing(got):
    """Also where the step is a NumPy scalar; trees of another model change nothing."""

    def make(width=3):
        model = nnx.Linear(2, width, rngs=nnx.Rngs(0))
        chain = optax.chain(optax.adam(0.1), ema_optax.ema_params(0.9))
        return model, nnx.Optimizer(model, chain, wrt=nnx.Param)

    model, optimizer = make()
    saved = jax.tree.map(jnp.copy, ema_optax.nnx.split(model, optimizer))
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    if got == "device_get":
        nnx.update((model, optimizer), jax.device_get(nnx.state((model, optimizer))))
    stepped = _all_of(model, optimizer)
    other = ema_optax.nnx.split(*make(width=4))
    for wrong in (other, (saved[0], other[1]), (other[0], saved[1])):
        with pytest.raises(ValueError, match=r"takes what ema_optax\.nnx\.split gave"):
            ema_optax.nnx.update(model, optimizer, *wrong)
        jax.tree.map(np.testing.assert_array_equal, _all_of(model, optimizer), stepped)
    ema_optax.nnx.update(model, optimizer, *saved)
    jax.tree.map(np.testing.assert_array_equal, _all_of(model, optimizer), saved)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    assert int(optimizer.step[...]) == 1


def _pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


def test_without_a_copy_no_tree_of_memory_is_taken():
    """The module holds the optimizer's own arrays; by default all buffers are new."""
    model, optimizer, _ = _trained()
    for copy in (True, False):
        raw = _pointers(nnx.state(model))
        state = _pointers(nnx.state(optimizer.opt_state))
        averaged = ema_optax.nnx.shadow_copy(model, optimizer, copy=copy)
        assert bool(_pointers(nnx.state(averaged, nnx.Param)) & state) != copy
        assert bool(_pointers(nnx.state(averaged, nnx.BatchStat)) & raw) != copy
        with ema_optax.nnx.swapped(model, optimizer, copy=copy):
            inside = nnx.state(model, nnx.Param)
            assert bool(_pointers(inside) & state) != copy
            jax.tree.map(
                np.testing.assert_array_equal,
                nnx.as_pure(inside),
                nnx.as_pure(nnx.state(averaged, nnx.Param)),
            )
