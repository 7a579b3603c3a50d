"""Adopting: bits, paths, counts and numbers, and what is refused."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ema_optax
from ema_optax import checkpoint
from tests import foreign, launch

STATE = foreign.state(ema_params=foreign.average())
PARAMS, AVERAGE = foreign.params(), foreign.average()
SHADOW = AVERAGE | {"table": PARAMS["table"]}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "ours"


@pytest.mark.parametrize("layout", foreign.LAYOUTS)
def test_every_layout_of_orbax_comes_in(layout, tmp_path, out):
    """Bit for bit: a manager's folder, a step, an item, and each way of storing."""
    source = foreign.written(tmp_path, layout, STATE)
    done = checkpoint.adopt(source, out)
    assert (done.layout, done.step, done.count) == ("flax", 300, 300)
    assert done.shadow.endswith("ema_params")
    foreign.same(checkpoint.restore(out, "params", like=PARAMS), PARAMS)
    foreign.same(checkpoint.restore(out, "shadow", like=PARAMS), SHADOW)
    checkpoint.verify(out)
    found = checkpoint.describe(out)
    assert found.step == 300
    assert found.trees["shadow"].count == 300
    assert found.trees["shadow"].decay is None
    assert set(found.trees["shadow"].leaves) == set(done.averaged)
    assert found.extra["from"]["params"] == done.params


def test_lists_and_empty_dicts_stay_what_they_were(tmp_path, out):
    """Whoever loads the params without this library has them nested as they were."""
    checkpoint.adopt(foreign.save(tmp_path / "theirs", STATE), out)
    structure = checkpoint.describe(out).trees["params"].structure
    assert structure["blocks"] == [{"w": "blocks/0/w"}, {"w": "blocks/1/w"}]
    assert structure["none"] == {}


def test_several_items_are_told_apart_by_name(tmp_path, out):
    """Paths begin with the item; one of them may hold the params, one the average."""
    source = foreign.composite(tmp_path / "theirs", model=PARAMS, mean={"a": AVERAGE})
    with pytest.raises(ValueError, match="has no average"):
        checkpoint.adopt(source, out)
    done = checkpoint.adopt(source, out, params="model", shadow="mean/a")
    assert done.layout is None
    foreign.same(checkpoint.restore(out, "shadow", like=PARAMS), SHADOW)


def test_an_average_alone_finds_its_params(tmp_path, out):
    source = foreign.save(tmp_path / "theirs", {"net": PARAMS, "mean": AVERAGE})
    done = checkpoint.adopt(source, out, shadow="mean")
    assert (done.params, done.shadow) == ("net", "mean")


def test_without_an_average_it_is_a_copy_with_count_0(tmp_path, out):
    """In float32 where params are narrower, and that is said on disk."""
    tree = {"params": foreign.params(dtype=jnp.bfloat16)}
    source = foreign.save(tmp_path / "theirs", tree)
    done = checkpoint.adopt(source, out, shadow=None)
    assert (done.shadow, done.count, done.params) == (None, 0, "params")
    shadow = checkpoint.restore(out, "shadow")
    expected = tree["params"]["dense"]["kernel"].astype(jnp.float32)
    foreign.same(shadow["dense"]["kernel"], np.asarray(expected))
    found = checkpoint.describe(out)
    assert found.trees["shadow"].count == 0
    assert found.extra["from"]["shadow"] == "none: a copy of the params"
    assert "table" not in found.trees["shadow"].leaves


def test_a_whole_checkpoint_may_be_the_params(tmp_path, out):
    source = foreign.save(tmp_path / "theirs", PARAMS)
    checkpoint.adopt(source, out, params="", shadow=None)
    foreign.same(checkpoint.restore(out, "params", like=PARAMS), PARAMS)


def test_an_average_of_a_part_goes_where_it_fits(tmp_path, out):
    """Statistics beside the averaged params are raw, where that is allowed."""
    variables = {"params": PARAMS, "batch_stats": {"mean": jnp.ones(3)}}
    tree = {"variables": variables, "mean": AVERAGE}
    source = foreign.save(tmp_path / "theirs", tree)
    call = {"params": "variables", "shadow": "mean"}
    with pytest.raises(ValueError, match=r"'batch_stats/mean'.*partial=True"):
        checkpoint.adopt(source, out, **call)
    done = checkpoint.adopt(source, out, **call, partial=True)
    assert done.raw == ("batch_stats/mean",)
    found = checkpoint.restore(out, "shadow", like=variables)
    foreign.same(found["params"], SHADOW)
    foreign.same(found["batch_stats"], variables["batch_stats"])


def test_the_newest_committed_step_or_the_one_named(tmp_path, out):
    theirs = tmp_path / "theirs"
    for step in (100, 200):
        foreign.save(theirs, {**STATE, "params": foreign.params(step)}, step)
    shutil.copytree(theirs / "200", theirs / f"300{ocp.step.TMP_DIR_SUFFIX}1")
    assert checkpoint.adopt(theirs, out).step == 200
    assert checkpoint.adopt(theirs, out, step=100).step == 100
    found = checkpoint.restore(out, "params", like=PARAMS, step=100)
    foreign.same(found, foreign.params(100))
    with pytest.raises(FileNotFoundError, match="no committed step 300; it has 100, 2"):
        checkpoint.adopt(theirs, out, step=300)
    with pytest.raises(ValueError, match="not written to its end"):
        checkpoint.adopt(theirs / f"300{ocp.step.TMP_DIR_SUFFIX}1", out, step=300)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        checkpoint.adopt(theirs, out)


def test_a_folder_without_a_number_asks_for_one(tmp_path, out):
    """And names the number that the source has in it."""
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "theirs", STATE)
    with pytest.raises(ValueError, match="step=300, which its leaf 'step' has"):
        checkpoint.adopt(tmp_path / "theirs", out)
    assert checkpoint.adopt(tmp_path / "theirs", out, step=7).step == 7
    assert not (out / "300").exists()


@pytest.mark.parametrize(
    ("count", "seen"), [(None, 300), (12, 12), ("step", 300), ("ema/n/value", 40)]
)
def test_counts(count, seen, tmp_path, out):
    """Told, by a path, or that of the step."""
    tree = {**STATE, "ema": {"n": {"value": jnp.int32(40)}}}
    done = checkpoint.adopt(foreign.save(tmp_path / "theirs", tree), out, count=count)
    assert done.count == seen
    assert checkpoint.describe(out).trees["shadow"].count == seen


@pytest.mark.parametrize(
    ("count", "said"),
    [
        ("stepp", r"no number at count='stepp'\. The nearest are 'step'"),
        ("params/dense/bias", r"float32\[4\], not one whole number"),
        ("counts", r"int32\[8\], not one whole number"),
        ("minus", "the average has not begun"),
    ],
)
def test_counts_that_are_none(count, said, tmp_path, out):
    tree = {**STATE, "counts": jnp.arange(8), "minus": jnp.int32(-3)}
    source = foreign.save(tmp_path / "theirs", tree)
    with pytest.raises(ValueError, match=said):
        checkpoint.adopt(source, out, count=count)
    assert not out.exists()


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.9999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_average_that_began_at_zero_is_divided(beta, dtype, tmp_path, out):
    """In float64, by 1−β^t, and goes on as the debiased one.

    At β = 0.9999 and 3 updates 1−β^t is 3e-4: in float32 it would be off by 1e-4.
    """
    values = [np.float64(foreign.params(i)["dense"]["kernel"]) for i in range(3)]
    mean = np.zeros((3, 4))
    for value in values:
        mean = beta * mean + (1 - beta) * value
    stored = jnp.asarray(mean, dtype)
    tree = {
        "params": {"w": jnp.asarray(values[-1], dtype)},
        "ema_params": {"w": stored},
    }
    source = foreign.save(tmp_path / "theirs", tree)
    decay = ema_optax.constant(beta)
    done = checkpoint.adopt(source, out, zero_started=True, decay=decay, count=3)
    assert done.zero_started
    assert done.decay == ema_optax.debiased(beta)
    assert checkpoint.describe(out).trees["shadow"].decay == ema_optax.debiased(beta)
    weight = 1 - beta**3
    expected = (np.float64(stored) / weight).astype(np.float32)
    found = checkpoint.restore(out, "shadow")["w"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"count": 3}, r"needs its decay=constant\(0.9999\)"),
        ({"count": 3, "decay": ema_optax.warmup(0.9)}, r"needs its decay=constant"),
        ({"decay": ema_optax.constant(0.9)}, "Pass count=300 if"),
        ({"decay": ema_optax.constant(0.9), "count": 0}, "has seen 0 updates"),
        ({"shadow": None}, "says that there is none"),
    ],
)
def test_dividing_needs_decay_and_count(call, said, tmp_path, out):
    source = foreign.save(tmp_path / "theirs", STATE)
    with pytest.raises(ValueError, match=said):
        checkpoint.adopt(source, out, zero_started=True, **call)
    assert not out.exists()


def test_narrow_averages_are_told(tmp_path, out):
    """They stay as they are: their bits are what was averaged."""
    narrow = {"ema_params": foreign.params(1, jnp.bfloat16)}
    done = checkpoint.adopt(foreign.save(tmp_path / "a", {**STATE, **narrow}), out)
    assert set(done.narrow) == set(done.averaged)
    found = checkpoint.restore(out, "shadow")["dense"]["bias"]
    foreign.same(found, np.asarray(narrow["ema_params"]["dense"]["bias"]))


def test_what_lies_beside_is_told(tmp_path, out):
    """A decay as a number, which may have had a warm-up: told, and not recorded."""
    tree = {**STATE, "ema_decay": jnp.float32(0.5), "learning_rate": jnp.float32(1)}
    done = checkpoint.adopt(foreign.save(tmp_path / "theirs", tree), out)
    assert done.beside == {"ema_decay": 0.5}
    assert done.decay is None
    assert set(done.left_out) == {"step", "opt_state", "ema_decay", "learning_rate"}


def test_the_distance_tells_what_is_no_average_of_params(tmp_path, out):
    """Norm of the difference over that of the params, in float64."""
    done = checkpoint.adopt(foreign.save(tmp_path / "theirs", STATE), out)
    pairs = [
        (np.float64(a), np.float64(b))
        for a, b in zip(jax.tree.leaves(AVERAGE), jax.tree.leaves(PARAMS), strict=True)
        if jnp.issubdtype(b.dtype, jnp.floating)
    ]
    apart = sum(((a - b) ** 2).sum() for a, b in pairs)
    assert done.distance == pytest.approx(
        np.sqrt(apart / sum((b**2).sum() for _, b in pairs)), rel=1e-12
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tree", ["params", "ema_params"])
def test_values_that_are_not_finite(value, tree, tmp_path, out):
    """In either tree; the leaf is named, and nothing is written."""
    broken = jax.tree.map(lambda x: x, STATE)
    broken[tree]["blocks"][1]["w"] = broken[tree]["blocks"][1]["w"].at[1, 0].set(value)
    source = foreign.save(tmp_path / "theirs", broken)
    with pytest.raises(ValueError, match=r"blocks/1/w' of .* has 1 of 4 elements"):
        checkpoint.adopt(source, out)
    assert not out.exists()


def test_infinities_that_are_alike_are_masks(tmp_path, out):
    mask = jnp.asarray([0.0, -np.inf])
    tree = {"params": {"mask": mask, "w": jnp.ones(2)}}
    tree["ema_params"] = {"mask": mask, "w": jnp.zeros(2)}
    done = checkpoint.adopt(foreign.save(tmp_path / "theirs", tree), out)
    assert done.distance == 1.0
    foreign.same(checkpoint.restore(out, "shadow", like=tree["params"])["mask"], mask)


def changed(**leaves):
    """Returns an average with other leaves in its dense layer; None takes one out."""
    found = jax.tree.map(lambda x: x, AVERAGE)
    found["dense"] |= leaves
    found["dense"] = {k: v for k, v in found["dense"].items() if v is not None}
    return found


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (
            changed(bias=jnp.ones(5)),
            r"'dense/bias' is float32\[4\] in the params and f",
        ),
        (changed(scale=jnp.ones(4)), r"'dense/scale' is only in the average"),
        (changed(bias=None), r"of 1 floating params .*'dense/bias'.*partial=True"),
        (changed(bias=jnp.arange(4)), r"int32\[4\] in the average, which cannot hold"),
        (changed(bias=jnp.ones(4, jnp.complex64)), r"complex64\[4\] in the average"),
        ({"table": AVERAGE["table"]}, "it has no floating leaves"),
    ],
)
def test_trees_that_differ(mean, said, tmp_path, out):
    """The first difference is named with both sides, and nothing is written."""
    source = foreign.save(tmp_path / "theirs", {"params": PARAMS, "mean": mean})
    with pytest.raises(ValueError, match=said):
        checkpoint.adopt(source, out, params="params", shadow="mean")
    assert not out.exists()


def test_leaves_without_an_average_are_raw_where_told(tmp_path, out):
    mean = changed(bias=None)
    source = foreign.save(tmp_path / "theirs", {"params": PARAMS, "ema_params": mean})
    done = checkpoint.adopt(source, out, partial=True)
    assert done.raw == ("dense/bias",)
    found = checkpoint.restore(out, "shadow", like=PARAMS)
    foreign.same(found["dense"]["bias"], PARAMS["dense"]["bias"])
    foreign.same(found["dense"]["kernel"], AVERAGE["dense"]["kernel"])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            {"params": "parms"},
            r"no arrays at params='parms'\. The nearest are 'params'",
        ),
        ({"shadow": "ema_parms"}, r"at shadow='ema_parms'\. The nearest are 'ema_par"),
        ({"params": "params", "shadow": "params"}, "are the same tree, 'params'"),
        ({"params": "params", "shadow": "params/dense"}, "lie inside each other"),
        ({"shadow": "opt_state/0/mu"}, "the mean of the gradients; it is no average"),
        ({"shadow": "opt_state/0/nu"}, "the mean of the squared gradients"),
        ({"like": "flaks"}, r"no layout 'flaks'\. The nearest are 'flax'"),
        ({"like": "haiku"}, "has no average as haiku keeps it"),
        ({"shadow": None, "count": 3}, "Leave count out"),
        ({"shadow": None, "params": "step"}, "no floating leaves to average"),
    ],
)
def test_paths_that_are_wrong(call, said, tmp_path, out):
    source = foreign.save(tmp_path / "theirs", STATE)
    with pytest.raises(ValueError, match=said):
        checkpoint.adopt(source, out, **call)
    assert not out.exists()


def test_nothing_is_guessed(tmp_path, out):
    """Two averages are listed, and so are the trees where none is known."""
    tree = {"params": PARAMS, "ema_params": AVERAGE, "params_ema": AVERAGE}
    source = foreign.save(tmp_path / "two", tree)
    with pytest.raises(ValueError, match=r"2 pairs .*shadow='ema_params' \(flax\); p"):
        checkpoint.adopt(source, out)
    assert checkpoint.adopt(source, out, shadow="params_ema").shadow == "params_ema"
    source = foreign.save(tmp_path / "none", {"a": {"x": PARAMS}, "b": AVERAGE})
    with pytest.raises(ValueError, match=r"It holds 'a/x' \(5 leaves, 108 bytes\), 'b"):
        checkpoint.adopt(source, out)
    with pytest.raises(ValueError, match="Nothing says which tree"):
        checkpoint.adopt(source, out, shadow=None)


def test_a_dry_run_writes_nothing(tmp_path, out):
    source = foreign.save(tmp_path / "theirs", STATE)
    plan = checkpoint.adopt(source, out, dry_run=True)
    assert not out.exists()
    assert plan.distance is None
    done = checkpoint.adopt(source, out)
    assert plan.left_out == done.left_out
    assert plan.bytes == done.bytes == {"params": 108, "shadow": 96}


def test_progress_counts_leaves(tmp_path, out):
    seen = []
    source = foreign.save(tmp_path / "theirs", STATE)
    checkpoint.adopt(
        source, out, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 9) for i in range(1, 10)]


def test_a_checkpoint_of_ours_is_refused(tmp_path, out):
    """With what reads it; so is a folder without any, and one that is not there."""
    params = {"w": jnp.ones(2)}
    checkpoint.save(tmp_path / "run", params, ema_optax.ema_params(0.9).init(params))
    for place in ("run", "run/0", "run/0/default"):
        with pytest.raises(ValueError, match=r"saved by ema_optax.*checkpoint\.resume"):
            checkpoint.adopt(tmp_path / place, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="It holds nothing"):
        checkpoint.adopt(tmp_path / "empty", out)
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        checkpoint.adopt(tmp_path / "nowhere", out)


def largest(folder):
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("layout", ["zarr", "ocdbt", "zarr3 files"])
@pytest.mark.parametrize("cut", [True, False])
def test_arrays_that_are_damaged(layout, cut, tmp_path, out):
    """Cut files, and missing ones: never zeros in their place."""
    big = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    tree = {"params": {"w": big}, "ema_params": {"w": big}}
    source = foreign.written(tmp_path, layout, tree)
    file = largest(source)
    data = file.read_bytes()
    file.unlink()
    if cut:
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(checkpoint.CorruptCheckpointError, match="cannot be read"):
        checkpoint.adopt(source, out)
    assert not out.exists()


def test_metadata_that_are_damaged_or_hostile(tmp_path, out):
    """Cut, of another kind, nested without end, leading out, or a pipe."""
    source = foreign.written(tmp_path, "zarr", STATE)
    metadata = source / "_METADATA"
    good = metadata.read_text()
    told = json.loads(good)
    entry = dict(next(iter(told["tree_metadata"].values())))
    deep = entry | {"key_metadata": [{"key": "a", "key_type": 2}] * 5000}
    away = entry | {
        "key_metadata": [{"key": key, "key_type": 2} for key in ("..", "..", "x")]
    }
    for bad in (
        good[: len(good) // 2],
        "[]",
        "{}",
        '{"tree_metadata": {"a": 3}}',
        json.dumps({**told, "tree_metadata": {"a": deep}}),
        json.dumps({**told, "tree_metadata": {"('..', '..', 'x')": away}}),
        "[" * 100_000,
    ):
        metadata.write_text(bad)
        with pytest.raises(checkpoint.CorruptCheckpointError):
            checkpoint.adopt(source, out)
    metadata.unlink()
    os.mkfifo(metadata)
    with pytest.raises((ValueError, OSError)):
        checkpoint.adopt(source, out)
    assert not out.exists()


def test_arrays_larger_than_the_machine(tmp_path, out):
    """Refused before memory is asked for: a chunk that is not there takes no room."""
    source = foreign.written(tmp_path, "zarr", {"params": {"w": jnp.ones((2, 2))}})
    array = source / "params.w" / ".zarray"
    told = json.loads(array.read_text())
    array.write_text(json.dumps({**told, "shape": [2**25, 2**25]}))
    with pytest.raises(MemoryError, match="Adopt it on a larger one"):
        checkpoint.adopt(source, out, shadow=None)


@pytest.mark.long
def test_eight_devices_become_one(tmp_path, out):
    """What was sharded over devices that are not here is read without them."""
    code = f"""
import jax, jax.numpy as jnp, orbax.checkpoint as ocp
mesh = jax.make_mesh((8,), ("d",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
w = jax.device_put(jnp.arange(16.0).reshape(8, 2), sharding)
with ocp.CheckpointManager({str(tmp_path / "theirs")!r}) as manager:
    tree = {{"params": {{"w": w}}, "ema_params": {{"w": w / 2}}}}
    manager.save(4, args=ocp.args.StandardSave(tree))
"""
    import subprocess
    import sys

    environment = {**os.environ, **launch.on_cpu(8)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    checkpoint.adopt(tmp_path / "theirs", out)
    found = checkpoint.restore(out, "shadow")["w"]
    foreign.same(found, np.arange(16, dtype=np.float32).reshape(8, 2) / 2)
