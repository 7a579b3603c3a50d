"""Finding, naming and placing shadows."""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema_optax
from ema_optax import shadow_params, with_shadow
from tests.older import enable_x64

PARAMS = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16), "n": jnp.int32(3)}
GRADS = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(0)}


def _state(decay=0.5, wrap=lambda t: t):
    """The state of a wrapped transform after one update, folded with β = .5."""
    decay = ema_optax.constant(decay) if isinstance(decay, float) else decay
    transform = wrap(ema_optax.ema_params(decay))
    return transform.update(GRADS, transform.init(PARAMS), PARAMS)[1]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: optax.chain(optax.identity(), optax.chain(optax.identity(), t)),
        lambda t: optax.named_chain(("opt", optax.identity()), ("ema", t)),
        lambda t: optax.masked(t, {"w": True, "n": False}),
        lambda t: optax.MultiSteps(t, 1),
        lambda t: optax.with_extra_args_support(t),
    ],
    ids=["alone", "nested chain", "named_chain", "masked", "MultiSteps", "extra args"],
)
def test_found_anywhere(wrap):
    """In every kind of state that holds it, in the params' structure and dtypes."""
    without = wrap(optax.identity())
    try:
        without.update(GRADS, without.init(PARAMS), PARAMS)
    except TypeError:
        pytest.skip("this Optax's MultiSteps takes no integer leaves")
    read = shadow_params(_state(wrap=wrap), PARAMS)
    assert jax.tree.structure(read) == jax.tree.structure(PARAMS)
    assert read["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(read["w"].astype(jnp.float32), [1.5, 2.5])
    assert read["n"] == 3


def test_without_params_it_is_as_stored():
    """float32, with placeholders for what is not averaged."""
    read = shadow_params(_state())
    assert read["w"].dtype == jnp.float32
    assert read["n"] == optax.MaskedNode()


def test_params_may_be_abstract():
    """Under eval_shape the model slot costs no memory."""
    shape = jax.eval_shape(shadow_params, _state(), PARAMS)
    assert shape["w"] == jax.ShapeDtypeStruct((2,), jnp.bfloat16)


def test_names():
    """A name picks; none is needed where there is one; a wrong one lists them."""
    decays = {"fast": ema_optax.constant(0.0), "slow": ema_optax.constant(0.5)}
    state = (_state(decays),)
    fast = shadow_params(state, PARAMS, name="fast")["w"].astype(jnp.float32)
    slow = shadow_params(state, PARAMS, name="slow")["w"].astype(jnp.float32)
    np.testing.assert_array_equal(fast, [2, 3])
    np.testing.assert_array_equal(slow, [1.5, 2.5])
    with pytest.raises(ValueError, match="shadows 'fast', 'slow', and none was"):
        shadow_params(state, PARAMS)
    with pytest.raises(ValueError, match=r"no tree 'slwo'.*name='slow'"):
        shadow_params(state, PARAMS, name="slwo")
    with pytest.raises(ValueError, match="no tree 'fast'; there are 'params', 'sh"):
        shadow_params(_state(), PARAMS, name="fast")
    only = _state({"one": ema_optax.constant(0.5)})
    np.testing.assert_array_equal(shadow_params(only)["w"], [1.5, 2.5])


def test_params_that_look_like_named_shadows_are_params():
    """A model whose parts are alike is not mistaken for shadows by name."""
    params = {"fast": {"w": jnp.ones(2)}, "slow": {"w": jnp.zeros(2)}}
    state = ema_optax.ema_params(0.9).init(params)
    assert set(shadow_params(state, params)) == {"fast", "slow"}


@pytest.mark.parametrize(
    ("state", "params", "wrong"),
    [
        (
            optax.adam(0.1).init(PARAMS),
            None,
            r"no shadow .*optax.chain\(optimizer, ema",
        ),
        (None, None, "no shadow in this NoneType"),
        (
            _state(),
            {"w": jnp.ones(3), "n": 1},
            r"'w' is float32\[2\] in.*float32\[3\] in",
        ),
        (_state(), {"v": jnp.ones(2), "n": 1}, "'w' is only in the shadow"),
        (_state(), [jnp.ones(2), 1], "'n' and 1 more is only in the shadow"),
    ],
    ids=[
        "optimizer without a shadow",
        "no state",
        "another shape",
        "another name",
        "another structure",
    ],
)
def test_what_does_not_fit_is_named(state, params, wrong):
    """No shadow, other shapes, other leaves: path, both sides, the call that works."""
    with pytest.raises(ValueError, match=wrong):
        shadow_params(state, params)


class Pair(NamedTuple):
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Record:
    params: Any
    opt_state: Any


class Replaceable(Record):
    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@pytest.mark.parametrize("kind", [Pair, Record, Replaceable])
def test_with_shadow_swaps_the_params_of_a_train_state(kind):
    """A copy with the shadow as params; the original is as it was."""
    original = kind(PARAMS, _state())
    swapped = with_shadow(original)
    assert type(swapped) is kind
    np.testing.assert_array_equal(swapped.params["w"].astype(jnp.float32), [1.5, 2.5])
    assert original.params is PARAMS
    assert swapped.opt_state is original.opt_state


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_with_shadow_takes_dicts(kind):
    """Other keys stay."""
    original = kind(params=PARAMS, opt_state=_state(), epoch=3)
    swapped = with_shadow(original)
    assert type(swapped) is kind
    assert swapped["epoch"] == 3
    np.testing.assert_array_equal(
        swapped["params"]["w"].astype(jnp.float32), [1.5, 2.5]
    )


def test_with_shadow_names_what_it_needs():
    """Objects without params and opt_state, or that cannot be replaced."""

    class Fixed:
        params, opt_state = PARAMS, _state()

    for wrong in (3, {"params": PARAMS}, Fixed()):
        with pytest.raises(TypeError, match=r"shadow_params\(opt_state, params\)"):
            with_shadow(wrong)


def _pointers(tree):
    """Returns where each buffer of a tree lies."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


COPIED = {"w": jnp.ones((4, 4)), "frozen": jnp.arange(3)}


def _read_alone(state, **options):
    return shadow_params(state, COPIED, **options)


def _read_as_stored(state, **options):
    return shadow_params(state, **options)


def _read_with_state(state, **options):
    return with_shadow({"params": COPIED, "opt_state": state}, **options)["params"]


@pytest.mark.parametrize("read", [_read_alone, _read_as_stored, _read_with_state])
def test_without_a_copy_the_result_is_the_states_own_buffers(read):
    """A copy costs the memory of a tree: by default all buffers are new."""
    state = ema_optax.ema_params(0.5).init(COPIED)
    own = {*_pointers(state.shadow), *_pointers(COPIED)}
    copied, shared = read(state), read(state, copy=False)
    assert not own & set(_pointers(copied))
    assert set(_pointers(shared)) <= own
    jax.tree.map(np.testing.assert_array_equal, copied, shared)
    with pytest.raises(TypeError, match="copy must be True or False"):
        read(state, copy=None)


def test_without_a_copy_what_needs_a_cast_is_new():
    """A shadow in float32 of params in bfloat16."""
    params = {"w": jnp.ones(8, jnp.bfloat16), "v": jnp.ones(8)}
    state = ema_optax.ema_params(0.5).init(params)
    read = shadow_params(state, params, copy=False)
    assert read["w"].dtype == jnp.bfloat16
    assert read["w"].unsafe_buffer_pointer() not in _pointers(state.shadow)
    assert _pointers(read["v"]) == _pointers(state.shadow["v"])


def test_raw_params_by_name_are_copied_or_not():
    state = ema_optax.ema_params(0.5).init(COPIED)
    copied = shadow_params(state, COPIED, name="params")
    assert not set(_pointers(copied)) & set(_pointers(COPIED))
    shared = shadow_params(state, COPIED, name="params", copy=False)
    assert _pointers(shared) == _pointers(COPIED)


@pytest.mark.parametrize("copy", [True, False])
def test_under_jit_a_readout_inside_takes_no_memory(copy):
    """XLA elides the copy where the shadow is used, and not returned."""

    def loss(state, x):
        return jnp.sum(x @ shadow_params(state, COPIED, copy=copy)["w"])

    state = ema_optax.ema_params(0.5).init(COPIED)
    compiled = jax.jit(loss).lower(state, jnp.ones((1, 4))).compile()
    alone = jax.jit(lambda w, x: jnp.sum(x @ w)).lower(COPIED["w"], jnp.ones((1, 4)))
    expected = alone.compile().memory_analysis().temp_size_in_bytes
    assert compiled.memory_analysis().temp_size_in_bytes == expected
    np.testing.assert_array_equal(compiled(state, jnp.ones((1, 4))), 16.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
    """A model that can be called, as an Equinox module is."""

    w: Any
    b: Any

    def __call__(self, x):
        return self.w


@pytest.mark.parametrize(
    "make", [ema_optax.ema_params, ema_optax.bema_params, ema_optax.ring]
)
def test_a_mask_is_a_tree_where_it_can_be_called_too(make):
    """It holds bools: it is read, not called with the params."""
    arguments = (0.9,) if make is ema_optax.ema_params else ()
    arguments = (2,) if make is ema_optax.ring else arguments
    params = Callable(jnp.ones(2), jnp.ones(3))
    state = make(*arguments, mask=Callable(True, False)).init(params)
    trees = [state.slots if make is ema_optax.ring else state[1]]
    assert [isinstance(tree.b, optax.MaskedNode) for tree in trees] == [True]
    assert shadow_params(state, params).b is not None


@dataclasses.dataclass(frozen=True)
class OwnConstructor:
    params: Any
    opt_state: Any

    def __init__(self, params):
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "opt_state", ema_optax.ema_params(0.9).init(params))


def test_with_shadow_takes_states_with_constructors_of_their_own():
    """A copy, whatever arguments the constructor has; the original stays."""
    params = {"w": jnp.ones(2)}
    state = OwnConstructor(params)
    moved = {"w": jnp.zeros(2)}
    for given in (
        _moved(state, moved),
        collections.defaultdict(list, params=moved, opt_state=state.opt_state),
    ):
        swapped = with_shadow(given)
        assert type(swapped) is type(given)
        part = swapped["params"] if isinstance(given, dict) else swapped.params
        np.testing.assert_array_equal(part["w"], params["w"])
        kept = given["params"] if isinstance(given, dict) else given.params
        assert kept is moved


def _moved(state, params):
    copy = OwnConstructor(params)
    object.__setattr__(copy, "opt_state", state.opt_state)
    return copy


def test_an_average_inside_flatten_says_where_it_belongs():
    """It is of one flat array, which is no tree like the params."""
    params = {"w": jnp.ones(2), "c": jnp.ones(3)}
    inner = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.9))
    state = optax.flatten(inner).init(params)
    for read in (shadow_params, ema_optax.metrics, ema_optax.diagnose):
        with pytest.raises(ValueError, match=r"one array of 5 elements.*after it"):
            read(state, params)


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize(
    "average",
    [
        ema_optax.ema_params(0.9),
        ema_optax.bema_params(),
        ema_optax.ring(3, every=2),
        ema_optax.ema_params(ema_optax.window(3)),
    ],
    ids=["ema", "bema", "ring", "window"],
)
def test_nothing_is_promoted_without_being_said(average, wide):
    """Reading, metrics and diagnosis under JAX's strict rules of ranks and dtypes."""
    params = {"w": jnp.ones((2, 3)), "c": jnp.ones(2, jnp.complex64)}
    with (
        enable_x64(wide),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        state = average.init(params)
        for _ in range(4):
            _, state = average.update(params, state, params)
        shadow = shadow_params(state, params)
        assert jax.tree.map(jnp.shape, shadow) == jax.tree.map(jnp.shape, params)
        ema_optax.metrics(state, params)
        ema_optax.diagnose(state, params)
