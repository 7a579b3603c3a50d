"""Small leaves in a few buffers: the same numbers, and nobody sees it."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import checkpoint, shadow_params
from ema_optax._averages import packing
from ema_optax._placement import leaf_placement
from tests.older import enable_x64
from tests.same import assert_same

DECAYS = {"fast": 0.5, "slow": ema_optax.constant(0.99)}
ULPS = 4  # seven folds of two programs; one fold more moves it by 1e4


def make_params():
    """Leaves of all kinds: small, large, scalar, empty, narrow, integer, complex."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, "float32"))

    return {
        "layers": [
            {"w": draw(4, 3), "b": draw(3), "n": jnp.int32(i)} for i in range(5)
        ],
        "half": {name: draw(2, 5).astype(jnp.bfloat16) for name in "abc"},
        "large": draw(130, 130),
        "scalar": draw(),
        "empty": jnp.zeros((0, 3)),
        "complex": draw(2) + 1j * draw(2),
        "frozen": draw(2),
        "none": None,
    }


def mask(params):
    return {key: key != "frozen" for key in params if key != "none"} | {"none": True}


def train(optimizer, params, state, steps):
    """Updates that differ by element and step; one of them is not finite."""

    @jax.jit  # by itself: fused into a step, XLA would round it as it likes
    def updates_of(params, at):
        def delta(p):
            if not jnp.issubdtype(p.dtype, jnp.inexact):
                return jnp.zeros_like(p)
            grown = (0.01 * (at + 1) * (p + 0.1)).astype(p.dtype)
            return jnp.where(at == 3, jnp.inf * grown, grown)

        return jax.tree.map(delta, params)

    @jax.jit
    def step(params, state, updates):
        fine = jnp.isfinite(updates["scalar"])
        updates, state = optimizer.update(updates, state, params)
        new = optax.apply_updates(params, updates)
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, params), state

    for at in range(steps):
        params, state = step(params, state, updates_of(params, at))
    return params, state


def pair(decay=0.9, **options):
    """The same transform without and with packing."""
    return (
        ema_optax.ema_params(decay, mask=mask, **options),
        ema_optax.ema_params(decay, mask=mask, pack_small=True, **options),
    )


@pytest.mark.long
@pytest.mark.parametrize("decay", [0.9, ema_optax.power(0.05), DECAYS])
@pytest.mark.parametrize("every", [1, 3])
def test_the_same_as_leaf_by_leaf(decay, every):
    """A swapped, shifted or missing leaf, or a cast too many, would differ."""
    params = make_params()
    plain, packed = pair(decay, every=every)
    _, expected = train(plain, params, plain.init(params), 7)
    new, found = train(packed, params, packed.init(params), 7)
    assert isinstance(found, ema_optax.EmaParamsState)
    assert len(jax.tree.leaves(found)) < len(jax.tree.leaves(expected)) / 2
    assert_same(packing.unpacked(found.shadow), packing.unpacked(expected.shadow), ULPS)
    assert int(found.count) == 7
    name = "slow" if isinstance(decay, dict) else None
    assert_same(
        shadow_params(found, new, name=name),
        shadow_params(expected, new, name=name),
        ULPS,
    )
    first = packing.unpacked(packed.init(params).shadow)
    with pytest.raises(AssertionError):  # the run moves what is compared
        assert_same(packing.unpacked(found.shadow), first, ULPS)


@pytest.mark.long
def test_bfloat16_shadows_follow_too():
    """The rounding noise is another, its size the same."""
    params = make_params()
    plain, packed = pair(ema_optax.constant(0.9), shadow_dtype="bfloat16")
    _, expected = train(plain, params, plain.init(params), 30)
    _, found = train(packed, params, packed.init(params), 30)
    for a, b in zip(
        jax.tree.leaves(packing.unpacked(found.shadow)),
        jax.tree.leaves(packing.unpacked(expected.shadow)),
        strict=True,
    ):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, complex) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.01)


@pytest.mark.long
def test_overwriting_reads_what_is_packed():
    params = make_params()
    plain, packed = pair(overwrite_every=2)
    expected, _ = train(plain, params, plain.init(params), 5)
    found, _ = train(packed, params, packed.init(params), 5)
    assert_same(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("decay", [0.9, DECAYS])
def test_states_go_through_everything(decay):
    """Copies, pickles, jit, eval_shape, _replace, repr: one structure, the record."""
    params = make_params()
    transform = pair(decay)[1]
    state = transform.init(params)
    for other in (
        jax.jit(transform.init)(params),
        jax.tree.map(jnp.copy, state),
        jax.eval_shape(transform.init, params),
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        state._replace(count=state.count),
        transform.update(jax.tree.map(jnp.zeros_like, params), state, params)[1],
    ):
        assert other.made_by == state.made_by
        assert jax.tree.structure(other) == jax.tree.structure(state)
        shapes = jax.tree.map(
            lambda x: (x.shape, x.dtype), packing.unpacked(other.shadow)
        )
        assert shapes == jax.tree.map(
            lambda x: (x.shape, x.dtype), packing.unpacked(state.shadow)
        )
    assert "Packed(flat=" in repr(state)


def test_a_donated_state_is_folded_in_place():
    """No buffer is shared with the params, and nothing is recompiled."""
    params = make_params()
    optimizer = optax.chain(optax.sgd(0.1), pair()[1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = optimizer.update(zeros, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    carry = params, optimizer.init(params)
    buffers = carry[1][1].shadow.flat
    for _ in range(3):
        carry = step(*carry)
    assert all(buffer.is_deleted() for buffer in buffers)
    assert step._cache_size() == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("saved", "resumed"), [(0, 1), (1, 0), (1, 1)], ids=["to", "from", "packed"]
)
@pytest.mark.parametrize("decay", [0.9, DECAYS])
def test_checkpoints_do_not_see_it(tmp_path, saved, resumed, decay):
    """A packed run resumes an unpacked one and the other way round."""
    params = make_params()
    transforms = pair(decay)
    ran, state = train(transforms[saved], params, transforms[saved].init(params), 4)
    checkpoint.save(tmp_path, ran, state, step=4)
    target = transforms[resumed].init(params)
    if resumed:
        target = jax.eval_shape(transforms[resumed].init, params)
    new, state = checkpoint.resume(tmp_path, params, target)
    assert jax.tree.structure(state) == jax.tree.structure(target)
    found = train(transforms[resumed], new, state, 2)
    expected = train(transforms[0], params, transforms[0].init(params), 4)
    expected = train(transforms[0], *expected, 2)
    assert_same(found[0], expected[0])
    assert_same(
        packing.unpacked(found[1].shadow), packing.unpacked(expected[1].shadow), ULPS
    )
    assert int(found[1].count) == 6
    like = {"layers": ran["layers"]}
    tree = "shadow/slow" if decay is DECAYS else "shadow"
    read = checkpoint.restore(tmp_path, tree, like=like)
    held = (
        packing.unpacked(state.shadow)["slow"]
        if decay is DECAYS
        else packing.unpacked(state.shadow)
    )
    np.testing.assert_array_equal(read["layers"][2]["w"], held["layers"][2]["w"])


def test_a_strangers_checkpoint_holds_the_state_as_it_is(tmp_path):
    """Plain Orbax saves and restores the few arrays."""
    params = {f"w{i}": jnp.arange(4.0) + i for i in range(6)}
    state = ema_optax.ema_params(0.9, pack_small=True).init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "state", state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert_same(packing.unpacked(found.shadow), params)


def test_what_is_packed():
    """Leaves of up to 64 KiB; alone, large, masked and placed ones lie apart."""
    params = {
        "a": jnp.zeros((128, 128)),  # 64 KiB
        "b": jnp.zeros(3),
        "large": jnp.zeros(128 * 128 + 1),
        "alone": jnp.zeros(2, jnp.bfloat16),  # of its dtype
        "frozen": jnp.zeros(3),
    }
    transform = ema_optax.ema_params(
        0.9, mask={key: key != "frozen" for key in params}, pack_small=True
    )
    packed = transform.init(params).shadow
    assert [flat.shape for flat in packed.flat] == [(128 * 128 + 3,)]
    assert [getattr(leaf, "shape", None) for leaf in packed.apart] == [
        (2,),
        None,
        (128 * 128 + 1,),
    ]


MESH_KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


@MESH_KINDS
def test_on_a_mesh_only_whole_leaves_are_packed(kind):
    """Sharded or placed ones stay apart; params and shadow keep their shardings."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), ("data",)))
    # On one device every sharding is whole: what counts is shown by the key.
    params = {f"w{i}": jax.device_put(jnp.full((4,), i), whole) for i in range(4)}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    transform = ema_optax.ema_params(0.9, pack_small=True)
    state = transform.init(params)
    (flat,) = state.shadow.flat
    assert flat.sharding.is_equivalent_to(whole, 1)
    placed = ema_optax.ema_params(
        0.9, pack_small=True, shadow_sharding={"w0": rows, "w1": rows} | {
            "w2": None, "w3": None
        },
    )  # fmt: skip
    packed = placed.init(params).shadow
    assert [flat.shape for flat in packed.flat] == [(8,)]
    assert [leaf.sharding for leaf in packed.apart] == [rows, rows]


def test_errors_name_the_leaf_as_without_packing():
    """The params of another model are refused with path and both sides."""
    params = {f"w{i}": jnp.zeros(3) for i in range(3)}
    transform = ema_optax.ema_params(0.9, pack_small=True)
    state = transform.init(params)
    other = params | {"w1": jnp.zeros(4)}
    with pytest.raises(ValueError, match=r"'w1' is float32\[3\] in the shadow"):
        transform.update(other, state, other)
    more = params | {"w3": jnp.zeros(3)}
    with pytest.raises(ValueError, match="'w3' is only in the params"):
        transform.update(more, state, more)


def test_replicated_on_tells_devices():
    """Placeholders and abstract leaves without a sharding count as replicated."""
    assert leaf_placement.replicated_on({"a": jnp.zeros(1)}, None)[0]
    abstract = {"a": jax.ShapeDtypeStruct((1,), "f4")}
    assert leaf_placement.replicated_on(abstract, None) == [()]


def test_plans_hash_and_compare():
    """They are part of a state's structure, which JAX compares at every call."""
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    a, b = (packing.plan(tree, ["x", "x"]) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != packing.plan(tree, ["x", None])


# What a packed state does where a plain one has its say leaf by leaf.


@pytest.mark.long
@pytest.mark.parametrize("copies", ["vmap", "replicated"])
def test_stacked_and_replicated_states(tmp_path, copies):
    """Read, measured, saved and resumed as without packing."""
    params = make_params()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), params)
    found = []
    for transform in pair():
        state = jax.vmap(transform.init)(stacked)
        if copies == "replicated":
            state = jax.tree.map(lambda x: jnp.stack([x] * 3), transform.init(params))
        else:
            _, state = jax.vmap(transform.update)(stacked, state, stacked)
        found.append(shadow_params(state, stacked))
        checkpoint.save(tmp_path / str(len(found)), stacked, state)
        resumed = checkpoint.resume(tmp_path / str(len(found)), stacked, state)
        assert_same(resumed, (stacked, state))
        found.append(jax.vmap(ema_optax.metrics)(state, stacked)["distance"])
    assert_same(found[2], found[0], ULPS)
    np.testing.assert_allclose(found[3], found[1], rtol=1e-6)


def test_a_leaf_of_another_shape_is_refused():
    """It would take the values of its neighbours."""
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
    transform = ema_optax.ema_params(0.9, pack_small=True)
    state = transform.init(params)
    other = {"a": jnp.arange(3.0), "b": jnp.ones((2, 3))}
    for shadow in (other, transform.init(other).shadow):
        with pytest.raises(ValueError, match=r"'a' is float32\[3\] in the shadow"):
            transform.update(params, state._replace(shadow=shadow), params)
    for wrong in (other, {"a": jnp.ones((2, 4)), "b": jnp.ones((1, 2, 3))}):
        with pytest.raises(ValueError, match="its neighbours would get its values"):
            packing.packed_like(wrong, state.shadow)


def test_what_needs_each_leaf_is_refused_by_name():
    """Optax's map over params, and partition specs of Flax's variables."""
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
    optimizer = optax.chain(optax.adam(0.1), ema_optax.ema_params(0.9, pack_small=True))
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"pack_small.*map_params.*Leave pack_small"):
        optax.tree.map_params(optimizer, lambda _: 1, state)
    init = nnx.with_partitioning(nnx.initializers.ones, (None, "x"))
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        model = nnx.Linear(2, 2, kernel_init=init, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="pack_small keeps no partition specs"):
            nnx.Optimizer(model, optimizer, wrt=nnx.Param)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_mixed_float64(dtype):
    """Leaves of two widths in one tree."""
    with enable_x64(True):
        params = {
            "a": jnp.arange(4.0),
            "b": jnp.ones(3, jnp.float32),
            "c": jnp.ones((2, 2)),
            "d": jnp.ones(2, jnp.float32),
        }
        ends = []
        for transform in pair_of(shadow_dtype=dtype):
            state = transform.init(params)
            _, state = jax.jit(transform.update)(params, state, params)
            ends.append(shadow_params(state, params))
        assert_same(*ends)


def pair_of(**options):
    """As `pair`, of params that the mask does not fit."""
    return [ema_optax.ema_params(0.9, pack_small=p, **options) for p in (False, True)]


@pytest.mark.parametrize("jitted", [False, True])
def test_on_tpus_nothing_is_packed(monkeypatch, jitted):
    """XLA does not fuse the gather there: 6,001 kernels for 2,000 leaves, not 2,000."""
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 3))}
    monkeypatch.setattr(leaf_placement, "_platform", lambda _: "tpu")
    init = ema_optax.ema_params(0.9, pack_small=True).init
    state = (jax.jit(init) if jitted else init)(params)
    assert not state.shadow.flat
    assert_same(shadow_params(state, params), params)
