"""Placed shadows on eight devices; test_placement has a pytest that has them run it."""

import collections
import copy
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import checkpoint, shadow_params, with_shadow
from ema_optax._averages import packing
from ema_optax._placement import memories
from ema_optax._placement.rules import in_host_memory, over_axis
from tests import older, same

MESHES = {
    f"{kind.name}-{'x'.join(map(str, shape))}": jax.make_mesh(
        shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape)
    )
    for kind in (AxisType.Auto, AxisType.Explicit)
    for shape in ((8,), (4, 2))
}
PLACES = {
    "plain": None,
    "split": over_axis("data"),
    "host": in_host_memory(),
    "split host": in_host_memory(over_axis("data")),
}
PLACED = [name for name in PLACES if name != "plain"]
DECAYS = {"fast": ema_optax.constant(0.5), "slow": 0.99}
ADAPTED = ("bias", "kernel")  # by Adam
AVERAGED = ("bias", "half", "kernel", "odd", "scale")
SENT = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\S*\("

on_every_mesh = pytest.mark.parametrize("mesh", MESHES)
in_every_run = pytest.mark.parametrize(
    ("mesh", "place", "every"),
    [(mesh, "split", 1) for mesh in MESHES]
    + [("Auto-4x2", "host", 1), ("Explicit-4x2", "split host", 1)]
    + [("Auto-4x2", "split", 4), ("Auto-4x2", "host", 4)],
)


def make_params(mesh):
    """What models have: sharded, odd, scalar, narrow, integer, frozen leaves."""
    model = "model" if "model" in mesh.axis_names else None
    sharded = {
        "kernel": (jnp.arange(128.0).reshape(16, 8) / 100, (None, model)),
        "bias": (jnp.arange(8.0), (model,)),
        "odd": (jnp.arange(3.0), ()),
        "scale": (jnp.float32(1.5), ()),
        "half": (jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4), ()),
        "frozen": (jnp.ones(8), ()),
        "steps": (jnp.int32(7), ()),
    }
    return {
        name: jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))
        for name, (value, spec) in sharded.items()
    }


def mask(params):
    return {name: name != "frozen" for name in params}


def make_step(optimizer):
    """A train step on a batch that is sharded over the data axis."""

    def loss(numbers, batch):
        out = jnp.tanh(batch @ numbers["kernel"] + numbers["bias"]) * numbers["scale"]
        others = (numbers[name] for name in ("odd", "half", "frozen"))
        return jnp.mean(out**2) + sum(
            jnp.sum(x.astype(jnp.float32) ** 2) for x in others
        )

    def step(params, state, batch):
        numbers = {name: x for name, x in params.items() if name != "steps"}
        grads = jax.grad(loss)(numbers, batch) | {"steps": jnp.int32(0)}
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


pytestmark = older.in_host_memory_or_not


def kind_of(place):
    """Returns in which memory a shadow is."""
    return "pinned_host" if "host" in place and older.has_host_memory() else "device"


def make_optimizer(place, **options):
    adam = optax.masked(
        optax.scale_by_adam(), lambda p: {name: name in ADAPTED for name in p}
    )
    if place == "none":
        return optax.chain(adam, optax.scale(-0.01))
    average = ema_optax.ema_params(
        options.pop("decay", DECAYS),
        mask=mask,
        shadow_sharding=PLACES.get(place, place) if isinstance(place, str) else place,
        **options,
    )
    return optax.chain(adam, optax.scale(-0.01), average)


def make_batch(mesh):
    batch = np.random.default_rng(0).standard_normal((16, 16), np.float32)
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


@functools.cache
def train(mesh_name, place, **options):
    """Nine updates without out_shardings, with donation: what was, is, and ran.

    What is compiled for the first update refuses any other shardings in the next.
    """
    mesh = MESHES[mesh_name]
    optimizer = make_optimizer(place, **options)
    params = make_params(mesh)
    state = optimizer.init(params)
    start = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (params, state),
    )
    batch = make_batch(mesh)
    step = make_step(optimizer).lower(params, state, batch).compile()
    for _ in range(9):
        params, state = step(params, state, batch)
    return types.SimpleNamespace(
        optimizer=optimizer,
        params=params,
        state=state,
        start=start,
        text=step.as_text(),
    )


def assert_same(actual, expected, ulps=0):
    """Dtypes and bits are equal, wherever they lie."""
    same.assert_same(jax.tree.leaves(actual), jax.tree.leaves(expected), ulps)


assert_near = functools.partial(assert_same, ulps=8)  # of two programs: see `same`


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def assert_alike(actual, expected):
    """Leaves lie on the same devices, in the same memory, however that is written."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


@in_every_run
def test_a_run_with_placed_shadows_is_the_plain_run(mesh, place, every):
    """To the bit; params and moments stay, and nothing more is sent around."""
    plain, run = train(mesh, "plain", every=every), train(mesh, place, every=every)
    assert_near((run.params, run.state), (plain.params, plain.state))
    assert_alike(run.params, run.start[0])
    assert_alike(run.state[-1].shadow, run.start[1][-1].shadow)
    adam = run.state[0].inner_state
    for name in ADAPTED:
        assert_alike((adam.mu[name], adam.nu[name]), (run.params[name],) * 2)
    found, usual = (collections.Counter(re.findall(SENT, r.text)) for r in (run, plain))
    assert usual["all-reduce"] > 0  # of the gradients: the pattern finds something
    assert found == usual


@pytest.mark.parametrize("place", PLACES)
def test_between_folds_nothing_is_moved(place):
    """With every=4 arrays are copied and cut in the loop of a fold alone.

    Outside of it the step does with as many as without an average.
    """
    older.skip_where_no_loop_cuts()
    text = train("Auto-4x2", place, every=4).text
    inside, outside = by_loop(text)
    assert min(len(inside), len(outside)) > 1000
    assert " conditional(" not in text
    _, alone = by_loop(train("Auto-4x2", "none").text)
    for moving in (r" = \w+\[\d\S* copy\(", r" = \w+\[\d\S* dynamic-slice\("):
        assert re.findall(moving, outside) == re.findall(moving, alone)


def by_loop(text):
    """Returns the text of a program that loops run, and that of the rest."""
    bodies = dict(re.findall(r"^(?:ENTRY )?(%\S+) \(.*\{\n((?: .*\n)*)\}", text, re.M))
    waiting = re.findall(r" while\(.*body=(%[^\s,]+)", text)
    in_loops = {}
    while waiting:
        name = waiting.pop()
        in_loops[name] = bodies[name]
        called = set(re.findall(r"%[^\s,(){}]+", bodies[name])) & bodies.keys()
        waiting += called - in_loops.keys()
    rest = [body for name, body in bodies.items() if name not in in_loops]
    return "".join(in_loops.values()), "".join(rest)


@on_every_mesh
@pytest.mark.parametrize(("place", "every"), [("plain", 1), ("plain", 4), ("split", 1)])
def test_packed_shadows_share_what_is_whole_on_every_device(mesh, place, every):
    """The plain run to the bit; sharded leaves lie apart; nothing is sent for it."""
    plain = train(mesh, "plain", every=every)
    run = train(mesh, place, every=every, pack_small=True)
    shadow = packing.unpacked(run.state[-1].shadow)
    assert_near((run.params, shadow), (plain.params, plain.state[-1][1]))
    assert_alike(run.params, run.start[0])
    packed = run.state[-1].shadow["slow"]
    sizes = {"plain": 3 + 1 + (128 + 8 if "model" not in MESHES[mesh].shape else 0)}
    sizes["split"] = 0  # all of them are placed
    assert sum(flat.size for flat in packed.flat) == sizes[place]
    assert all(flat.sharding.is_fully_replicated for flat in packed.flat)
    found, usual = (collections.Counter(re.findall(SENT, r.text)) for r in (run, plain))
    assert found == usual


@pytest.mark.parametrize(
    "spec", [PartitionSpec(), PartitionSpec("data")], ids=["whole", "sharded"]
)
def test_packing_inside_shard_map(spec):
    """Leaves that are whole on every device, and leaves of which each holds a part."""
    mesh = MESHES["Auto-8"]
    leaves = {f"w{i}": jnp.arange(16.0) + i for i in range(6)}

    def run(**options):
        optimizer = optax.chain(optax.sgd(0.1), ema_optax.ema_params(0.9, **options))
        params = jax.device_put(leaves, NamedSharding(mesh, spec))
        state = optimizer.init(params)

        def step(params, state):
            grads = jax.tree.map(jnp.ones_like, params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        specs = jax.tree.map(
            lambda x: spec if np.ndim(x) else PartitionSpec(), (params, state)
        )
        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs))
        for _ in range(3):
            params, state = step(params, state)
        return shadow_params(state, params)

    assert_same(run(pack_small=True), run(), ulps=4)


def test_packing_under_jit_needs_the_params_sharding():
    """Told of it, init leaves apart what is sharded; where axes show it, untold."""
    for name, known in (("Auto-4x2", shardings), ("Explicit-4x2", lambda p: None)):
        params = make_params(MESHES[name])
        transform = ema_optax.ema_params(
            0.9, mask=mask, pack_small=True, params_sharding=known(params)
        )
        outside, inside = transform.init(params), jax.jit(transform.init)(params)
        assert jax.tree.structure(inside) == jax.tree.structure(outside)
        assert_alike(inside.shadow, outside.shadow)


def parts_of(kind, mesh):
    """Expected shape of a device's part of the shadow of each averaged leaf."""
    whole = {"kernel": (16, 8), "bias": (8,), "odd": (3,), "scale": (), "half": (8, 4)}
    if mesh == "8":
        split = {"kernel": (2, 8), "bias": (1,), "half": (1, 4)}
        return whole | (split if "split" in kind else {})
    whole |= {"kernel": (16, 4), "bias": (4,)}
    return whole | ({"kernel": (4, 4), "half": (2, 4)} if "split" in kind else {})


@in_every_run
def test_each_device_holds_its_part(mesh, place, every):
    """1/N of what the axis divides; as the param what it does not; where it belongs."""
    shadow = train(mesh, place, every=every).state[-1].shadow
    parts = parts_of(place, mesh.partition("-")[2])
    kind = kind_of(place)
    for name in AVERAGED:
        for leaf in (shadow["fast"][name], shadow["slow"][name]):
            pieces = leaf.addressable_shards
            assert len(pieces) == 8
            assert {piece.data.shape for piece in pieces} == {parts[name]}, name
            assert {piece.data.sharding.memory_kind for piece in pieces} == {kind}
            assert leaf.dtype == jnp.float32
    for name in ("frozen", "steps"):
        assert shadow["fast"][name] == optax.MaskedNode()


@in_every_run
def test_reading_gives_the_params_slots(mesh, place, every):
    """On the devices, sharded like the params; as it is stored without params."""
    run, plain = train(mesh, place, every=every), train(mesh, "plain", every=every)
    read = functools.partial(shadow_params, name="slow")
    expected = read(plain.state, plain.params)
    for found in (
        read(run.state, run.params),
        jax.jit(read)(run.state, run.params),
        with_shadow({"params": run.params, "opt_state": run.state}, name="slow")[
            "params"
        ],
    ):
        assert_near(found, expected)
        assert_alike(found, run.params)
    as_stored = read(run.state)
    assert_near(as_stored, read(plain.state))
    assert_alike(as_stored, run.state[-1].shadow["slow"])


@in_every_run
def test_init_under_jit(mesh, place, every):
    """Params on Explicit axes show their sharding; others need params_sharding."""
    params = make_params(MESHES[mesh])
    known = jax.tree.map(lambda x: x.sharding, params)
    inits = [make_optimizer(place, every=every, params_sharding=known).init]
    unaided = make_optimizer(place, every=every).init
    if mesh.startswith("Explicit"):
        inits.append(unaided)
    else:
        wrong = r"The sharding of the param 'bias' is not known.*params_sharding="
        with pytest.raises(ValueError, match=wrong):
            jax.jit(unaided)(params)
    for init in inits:
        state = jax.jit(init)(params)
        assert_alike(
            state[-1].shadow, train(mesh, place, every=every).start[1][-1].shadow
        )
        assert_same(state[-1].shadow["fast"]["kernel"], params["kernel"])


def small_params(mesh="Auto-8"):
    """Two leaves that eight devices divide, on each of them."""
    everywhere = NamedSharding(MESHES[mesh], PartitionSpec())
    params = {"w": jnp.arange(32.0).reshape(8, 4) / 10, "b": jnp.arange(8.0)}
    return jax.device_put(params, everywhere)


def small_step(transform):
    @jax.jit
    def step(params, state):
        # A power of two: exact, whatever XLA fuses it with.
        updates = jax.tree.map(lambda p: -0.125 * jnp.sin(p + 1), params)
        updates, state = transform.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    return step


def small_run(transform, mesh="Auto-8", times=4):
    params = small_params(mesh)
    state = transform.init(params)
    step = small_step(transform).lower(params, state).compile()
    for _ in range(times):
        params, state = step(params, state)
    return params, state


def assert_placed(shadow, place):
    """A shadow like the small params lies where each of PLACES puts it."""
    kind = kind_of(place)
    shapes = {"w": (1, 4), "b": (1,)} if "split" in place else {"w": (8, 4), "b": (8,)}
    for name, leaf in shadow.items():
        if not isinstance(leaf, optax.MaskedNode):
            assert leaf.sharding.memory_kind == kind
            assert leaf.addressable_shards[0].data.shape == shapes[name]


def test_a_memory_is_asked_for_under_a_mesh_that_is_set():
    """What is compiled to ask is of one device, and the mesh is of eight."""
    memories.is_kept.cache_clear()
    with jax.set_mesh(MESHES["Auto-8"]):
        inside = memories.is_kept("pinned_host", "cpu")
    memories.is_kept.cache_clear()
    assert inside == memories.is_kept("pinned_host", "cpu")


@pytest.mark.parametrize("mesh", ["Auto-8", "Explicit-8"])
def test_options_do_the_same_where_the_shadow_is_placed(mesh):
    """bfloat16 is rounded alike; overwritten params keep their sharding."""
    make = functools.partial(
        ema_optax.ema_params, 0.9, shadow_dtype="bfloat16", overwrite_every=3
    )
    plain = small_run(make(), mesh)
    place = "split host" if mesh == "Auto-8" else "split"
    params, state = small_run(make(shadow_sharding=PLACES[place]), mesh)
    assert_near((params, state), plain)
    assert_alike(params, small_params(mesh))
    assert_placed(state.shadow, place)


@pytest.mark.parametrize("mesh", ["Auto-8", "Explicit-8"])
def test_nothing_is_compiled_again(mesh):
    """A jitted step is compiled as often as without placement, over many updates."""
    ends, compiled = [], []
    for place in ("plain", "split host"):
        transform = ema_optax.ema_params(0.9, every=2, shadow_sharding=PLACES[place])
        params = small_params(mesh)
        state, step = transform.init(params), small_step(transform)
        for _ in range(6):
            params, state = step(params, state)
        ends.append((params, state))
        compiled.append(step._cache_size())
    assert compiled[1] <= compiled[0] <= 2
    assert_near(*ends)
    assert_placed(state.shadow, "split host")


STATIC = ("every", "overwrite_every", "shadow_sharding", "params_sharding")
WRAPPERS = {
    "MultiSteps": lambda make: optax.MultiSteps(
        optax.chain(optax.sgd(0.5), make(0.9)), 2
    ).gradient_transformation(),
    "masked": lambda make: optax.masked(make(0.9), {"w": True, "b": False}),
    "multi_transform": lambda make: optax.multi_transform(
        {"one": make(0.9), "other": make(0.5)}, {"w": "one", "b": "other"}
    ),
    "injected": lambda make: optax.inject_hyperparams(make.func, static_args=STATIC)(
        decay=0.9, **make.keywords
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_inside_what_wraps_it(wrapper):
    """The same bits, read in the params' places; the shadow stays where it is put."""

    def run(place):
        make = functools.partial(ema_optax.ema_params, shadow_sharding=place)
        return small_run(WRAPPERS[wrapper](make))

    plain, (params, state) = run(None), run(PLACES["split host"])
    assert_near((params, state), plain)
    found = shadow_params(state, params)
    assert_near(found, shadow_params(plain[1], plain[0]))
    assert_alike((found, params), (small_params(), small_params()))
    assert_placed(shadow_params(state), "split host")


def test_a_run_goes_on_where_it_was_placed(tmp_path):
    """Resumed to the bit, each part where it was; or in any other place."""
    start = small_params()
    known = jax.tree.map(lambda x: x.sharding, start)
    transforms = {
        place: ema_optax.ema_params(0.9, shadow_sharding=to, params_sharding=known)
        for place, to in PLACES.items()
    }
    ends = {place: small_run(transforms[place], times=4) for place in PLACES}
    for place in ("plain", "split host"):
        checkpoint.save(tmp_path / place, *ends[place], step=4)
        assert checkpoint.describe(tmp_path / place).trees["shadow"].count == 4
        for other in PLACES if place != "plain" else ["split host"]:
            fresh = jax.jit(transforms[other].init)(start)
            resumed = checkpoint.resume(tmp_path / place, start, fresh)
            assert_near(resumed, ends["plain"])
            assert_alike(resumed, (start, fresh))
            assert_placed(resumed[1].shadow, other)
    params, state = small_step(transforms["split host"])(*resumed)
    assert_near((params, state), small_run(transforms["plain"], times=5))
    assert_placed(state.shadow, "split host")


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_changes_stays_where_it_is_placed(tmp_path, place):
    """A leaf more and clipping in front: each part lies where init puts it."""
    average = ema_optax.ema_params(0.9, shadow_sharding=PLACES[place])
    params, state = small_run(optax.chain(optax.trace(0.9), average))
    checkpoint.save(tmp_path, params, state)
    changed = optax.chain(optax.clip(1.0), optax.trace(0.9), average)
    more = jax.device_put(jnp.ones((8, 2)), jax.tree.leaves(params)[0].sharding)
    new = jax.tree.map(jnp.zeros_like, params) | {"more": more}
    expected = changed.init(new)
    for given in (changed.init, expected):
        found = checkpoint.resume(tmp_path, new, given, missing="start")
        assert_same(found.params, params | {"more": more})
        assert_alike(found, (new, expected))
        shadow = found.opt_state[2].shadow
        assert_same(shadow, state[1].shadow | {"more": more})
        assert_placed({name: shadow[name] for name in params}, place)
        assert_same(found.opt_state[2].count, state[1].count)
        trace = {name: found.opt_state[1].trace[name] for name in params}
        assert_same(trace, state[0].trace)


def test_what_was_placed_is_restored_anywhere(tmp_path):
    """Replicated, split another way, on one device, in host memory."""
    transform = ema_optax.ema_params(0.9, shadow_sharding=PLACES["split host"])
    params, state = small_run(transform)
    expected = shadow_params(state, params)
    checkpoint.save(tmp_path, params, state)
    mesh = MESHES["Auto-4x2"]
    for sharding in (
        NamedSharding(MESHES["Auto-8"], PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("model")),
        NamedSharding(mesh, PartitionSpec("data"), memory_kind="pinned_host"),
        jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    ):
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),  # noqa: B023
            params,
        )
        restored = checkpoint.restore(tmp_path, like=like)
        assert_same(restored, expected)
        assert_alike(restored, like)


def test_snapshots_of_placed_shadows(tmp_path):
    """Narrowed where they lie, and read back as numbers."""
    transform = ema_optax.ema_params(
        ema_optax.power(0.1), shadow_sharding=PLACES["split host"]
    )
    params, state = small_run(transform)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=checkpoint.SnapshotSave(state, dtype="bfloat16"))
    restored = checkpoint.restore(tmp_path, like=params)
    expected = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype), shadow_params(state, params)
    )
    assert_same(restored, expected)
    (snapshot,) = checkpoint.snapshots(tmp_path)
    assert snapshot.step == 4


def test_the_record_of_places_goes_with_copies():
    """As decays and every do. Devices cannot be pickled, nor can what names them."""
    state = ema_optax.ema_params(0.9, shadow_sharding=over_axis("data")).init(
        small_params()
    )
    other = copy.deepcopy(state)
    assert other.made_by == state.made_by
    assert jax.tree.structure(other) == jax.tree.structure(state)
    assert_alike(other.shadow, state.shadow)
