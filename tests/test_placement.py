"""Where a shadow lives: the rules, what may be given, one device; and eight."""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import ema_optax
from ema_optax import shadow_params
from ema_optax._placement import transfers
from ema_optax._placement.leaf_placement import LeafSharding
from ema_optax._placement.rules import in_host_memory, over_axis
from ema_optax._placement.transfers import host_groups
from tests import launch, older

P = PartitionSpec
MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
EVERYWHERE, ROWS = NamedSharding(MESH, P()), NamedSharding(MESH, P("data"))
EIGHT = pathlib.Path(__file__).parent / "programs" / "eight_devices.py"


@pytest.mark.long
def test_eight_devices():
    """All of eight_devices.py, in a process that has them."""
    # Without it XLA folds bfloat16 params before they are rounded, where it can.
    launch.run_on_eight_devices(EIGHT, "--xla_allow_excess_precision=false")


@pytest.mark.parametrize(
    ("shape", "given", "expected"),
    [
        ((16, 8), P(), P("data", None)),  # the longest
        ((8, 16), P(), P(None, "data")),
        ((16, 16), P(), P("data", None)),  # the first of equals
        ((16, 8), P(None, "model"), P("data", "model")),
        ((16, 8), P("model"), P("model", "data")),
        ((18, 8), P(), P(None, "data")),  # 18 does not divide
        ((8, 12, 4), P("model"), P("model", "data", None)),
        ((18, 3), P(), P()),  # none divides
        ((8,), P("model"), P("model")),
        ((16, 8), P("data"), P("data")),  # sharded over it already
        ((16, 8), P(("model", "data")), P(("model", "data"))),
        ((0, 3), P(), P()),
        ((), P(), P()),
    ],
    ids=[
        "the longest",
        "the longest is second",
        "the first of equals",
        "second axis taken",
        "first axis taken",
        "18 does not divide",
        "three axes",
        "none divides",
        "the only one taken",
        "sharded already",
        "sharded with another",
        "empty array",
        "scalar",
    ],
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_over_axis_splits_the_longest_free_dimension(kind, shape, given, expected):
    """That the axis divides; in the spelling that a step hands back."""
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    param = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, given))
    place = over_axis("data")("kernel", param)
    spec = tuple(expected)
    while kind is AxisType.Auto and spec and spec[-1] is None:
        spec = spec[:-1]
    assert place == NamedSharding(mesh, P(*spec))


def test_over_axis_keeps_the_memory_of_the_param():
    """And in_host_memory changes nothing else."""
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    pinned = NamedSharding(mesh, P(), memory_kind="pinned_host")
    param = jax.ShapeDtypeStruct((8,), "float32", sharding=pinned)
    assert over_axis("data")("w", param).memory_kind == "pinned_host"
    host = in_host_memory(over_axis("data"))("w", param)
    assert host == NamedSharding(mesh, P("data"), memory_kind="pinned_host")
    assert in_host_memory(lambda path, param: None)("w", param) == pinned
    rows = NamedSharding(mesh, P("data"))
    assert in_host_memory(rows)("w", param) == host


PARAMS = {"head": {"w": jnp.ones((4, 2))}, "body": [jnp.ones(3), jnp.int32(2)]}
HOST = EVERYWHERE.with_memory_kind("pinned_host")


def by_path(path, param):
    """Places one leaf, having seen what it is."""
    assert param.sharding == EVERYWHERE
    assert param.dtype == jnp.float32
    return HOST if path == "head/w" and param.shape == (4, 2) else None


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "head", "body"),
    [
        (None, EVERYWHERE, EVERYWHERE),
        (ROWS, ROWS, ROWS),
        (over_axis("data"), ROWS, ROWS),
        (by_path, HOST, EVERYWHERE),
        ({"head": {"w": ROWS}, "body": [None, None]}, ROWS, EVERYWHERE),
        ({"head": {"w": by_path}, "body": [ROWS, None]}, HOST, ROWS),
        ({"head": None, "body": ROWS}, EVERYWHERE, ROWS),  # a prefix
        ({"head": in_host_memory(), "body": None}, HOST, EVERYWHERE),
    ],
    ids=[
        "none",
        "sharding",
        "over_axis",
        "function",
        "tree",
        "tree with a function",
        "prefix",
        "host prefix",
    ],
)
def test_what_may_be_given(given, head, body):
    """A sharding, a function, a tree of them, a prefix; None follows the param."""
    if HOST in (head, body):
        older.skip_without_host_memory()
    params = jax.device_put(PARAMS, EVERYWHERE)
    transform = ema_optax.ema_params({"a": 0.9, "b": 0.5}, shadow_sharding=given)
    state = transform.init(params)
    for _ in range(2):
        for shadow in state.shadow.values():
            assert shadow["head"]["w"].sharding.is_equivalent_to(head, 2)
            assert shadow["body"][0].sharding.is_equivalent_to(body, 1)
            assert shadow["body"][1] == optax.MaskedNode()
        _, state = jax.jit(transform.update)(params, state, params)


def test_the_sharding_of_the_params_may_be_given():
    """What is given goes before what the params show."""
    seen = []

    def place(path, param):
        seen.append(param.sharding)

    params = {"w": jax.device_put(jnp.ones((4, 2)), EVERYWHERE)}
    for known in (ROWS, {"w": ROWS}):
        ema_optax.ema_params(0.9, shadow_sharding=place, params_sharding=known).init(
            params
        )
    assert seen == [ROWS, ROWS]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (
            {"shadow_sharding": {"head": ROWS}},
            "shadow_sharding does not fit the params",
        ),
        (
            {"shadow_sharding": ROWS, "params_sharding": [ROWS]},
            "params_sharding does not fit the params",
        ),
        (
            {"shadow_sharding": over_axis("model")},
            r"has the axes \('data',\), and over_axis got 'model'",
        ),
        (
            {"shadow_sharding": P("data")},
            r"shadow_sharding holds P.*NamedSharding\(mesh, ",
        ),
        ({"shadow_sharding": {"head": "data", "body": None}}, "holds 'data'"),
        (
            {"shadow_sharding": lambda path, param: P("data")},
            r"shadow_sharding gave P.* for 'body/0'",
        ),
        (
            {"shadow_sharding": ROWS, "params_sharding": over_axis("data")},
            "params_sharding holds the function rule",
        ),
        (
            {"shadow_sharding": in_host_memory(lambda path, param: P("data"))},
            r"in_host_memory\(place\) gave P.*NamedSharding\(mesh, ",
        ),
    ],
)
def test_what_cannot_be_given_is_named(options, wrong):
    """Trees that do not fit, axes that are not there, what is no sharding."""
    params = jax.device_put(PARAMS, EVERYWHERE)
    with pytest.raises((ValueError, TypeError), match=wrong):
        ema_optax.ema_params(0.9, **options).init(params)


@pytest.mark.parametrize(
    "place",
    ["data", P("data"), 3],
    ids=["text", "PartitionSpec", "number"],
)
def test_a_place_in_the_host_that_is_none(place):
    """It is refused where it is given, not at the first leaf."""
    with pytest.raises(TypeError, match=r"such as over_axis\('data'\); got "):
        in_host_memory(place)


def test_params_that_are_on_no_mesh():
    """over_axis names the param and what to call."""
    transform = ema_optax.ema_params(0.9, shadow_sharding=over_axis("data"))
    with pytest.raises(
        ValueError, match=r"'w' is on Single.*jax.device_put\(params, N"
    ):
        transform.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="sharding of the param 'w' is not known"):
        transform.init({"w": np.ones(2, np.float32)})


def make_step(transform):
    """Donates params and state, and returns them in the same order."""

    def step(params, state):
        updates = {"w": -0.125 * params["w"], "n": jnp.int32(0)}
        updates, state = transform.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("mesh", [None, "mesh"])
def test_one_device_and_its_host(mesh, every):
    """The shadow is no longer on the device, and its numbers are the same."""
    older.skip_without_host_memory()
    params = {"w": jnp.linspace(0.0, 1.0, 8), "n": jnp.int32(1)}
    place = in_host_memory()
    if mesh:
        params = jax.device_put(params, EVERYWHERE)
        place = in_host_memory(over_axis("data"))
    ends = []
    for to in (None, place):
        transform = ema_optax.ema_params(0.9, every=every, shadow_sharding=to)
        state = transform.init(params)
        held, step = jax.tree.map(jnp.copy, params), make_step(transform)
        for _ in range(5):
            held, state = step(held, state)
        ends.append((held, state))
    (expected, plain), (held, state) = ends
    np.testing.assert_array_equal(held["w"], expected["w"])
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state.shadow)} == {
        "pinned_host"
    }
    np.testing.assert_array_equal(state.shadow["w"], plain.shadow["w"])
    for read in (shadow_params, jax.jit(shadow_params)):
        found = read(state, held)["w"]
        assert found.sharding == held["w"].sharding == params["w"].sharding
        np.testing.assert_array_equal(found, plain.shadow["w"])
    moves = re.findall('"pinned_host"', step.lower(held, state).as_text())
    assert moves  # put back; on CPU compiled away


def test_shadows_leave_the_host_in_bounded_groups():
    """Each leaf of more than 32 MiB alone, as it lies on one device; none twice."""
    here, there = (LeafSharding(x, EVERYWHERE) for x in (EVERYWHERE, HOST))
    sizes = [3, 9, 20, 4, 4, 40, 1, 31]  # MiB
    arrays = {
        n: jax.ShapeDtypeStruct((size, 2**18), "f4") for n, size in enumerate(sizes)
    }
    shardings = dict.fromkeys(arrays, there) | {3: here, 4: None}
    groups = host_groups(arrays, shardings)
    assert groups == [[0, 1, 2], [5], [6, 7]]
    assert host_groups(arrays, dict.fromkeys(arrays, here)) == []
    mesh = AbstractMesh((8,), ("data",))
    rows = NamedSharding(mesh, P(None, "data"), memory_kind="pinned_host")
    split = dict.fromkeys(arrays, LeafSharding(rows, rows))
    assert host_groups(arrays, split) == [[*arrays]]  # 14 MiB on each of eight
    many = {n: jax.ShapeDtypeStruct((2**20,), "f4") for n in range(4 * 16 * 10)}
    groups = host_groups(many, dict.fromkeys(many, there))
    assert [len(group) for group in groups] == [40] * 16  # 160 MiB each


@pytest.mark.long
@pytest.mark.parametrize("every", [1, 3])
def test_groups_change_no_number(every, monkeypatch):
    """One loop a group, in one program; to the bit what one loop for all makes."""
    older.skip_without_host_memory()
    params = {str(i): jnp.linspace(0, 1, 4 + i).astype("f4") for i in range(5)}
    ends = []
    for room, groups in ((2**25, 16), (4, 2**9)):  # all at once, and each alone
        monkeypatch.setattr(transfers, "_TOGETHER", room)
        monkeypatch.setattr(transfers, "_GROUPS", groups)
        transform = ema_optax.ema_params(
            {"a": 0.9, "b": 0.99},
            every=every,
            shadow_dtype="bfloat16",  # whose seeds differ from leaf to leaf
            shadow_sharding=in_host_memory(),
        )
        state = transform.init(params)
        step = jax.jit(lambda state, p, t=transform: t.update(p, state, p)[1])
        for _ in range(4):
            state = step(state, params)
        loops = step.lower(state, params).as_text().count("stablehlo.while")
        ends.append((loops, state.shadow))
    (few, together), (many, apart) = ends
    assert (few, many) == (2, 2 * 10)
    jax.tree.map(np.testing.assert_array_equal, apart, together)


def test_what_is_read_is_a_copy():
    """It outlives a step that donates the state, from the host as from the device."""
    older.skip_without_host_memory()
    params = {"w": jnp.ones(4), "n": jnp.int32(1)}
    transform = ema_optax.ema_params(0.9, shadow_sharding=in_host_memory())
    state = transform.init(params)
    read = [shadow_params(state, params)["w"], shadow_params(state)["w"]]
    make_step(transform)(params, state)
    assert state.shadow["w"].is_deleted()
    for found in read:
        np.testing.assert_array_equal(found, np.ones(4))


def test_a_state_made_by_hand_is_folded_where_it_should_be():
    """Nothing recorded says where: what the transform was given does."""
    older.skip_without_host_memory()
    params = {"w": jnp.ones(4)}
    transform = ema_optax.ema_params(0.9, shadow_sharding=in_host_memory())
    made = transform.init(params)
    state = ema_optax.EmaParamsState(made.count, made.shadow)
    _, state = transform.update(params, state, params)
    assert state.shadow["w"].sharding.memory_kind == "pinned_host"


def test_what_is_not_kept_in_host_memory_is_said():
    """The shadow is where compiled updates leave it; a CPU has no unpinned_host."""
    params = {"w": jax.device_put(jnp.ones(4), jax.devices("cpu")[0])}
    for kind in ("pinned_host", "unpinned_host"):
        place = params["w"].sharding.with_memory_kind(kind)
        transform = ema_optax.ema_params(0.9, shadow_sharding=place)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state = transform.init(params)
        updates = jax.tree.map(jnp.zeros_like, params)
        _, after = jax.jit(transform.update)(updates, state, params)
        kept = {x.shadow["w"].sharding.memory_kind for x in (state, after)}
        if told:
            assert (
                f"stays in device memory: on CPUs, what this JAX {jax.__version__} "
                in (str(told[0].message))
            )
            assert told[0].filename == __file__
        assert kept == {"device" if told else kind}
        assert told or kind == "pinned_host"
