"""`ema-optax merge` of what others wrote: plain Orbax, and safetensors."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint, reconstruction
from tests import foreign

STEPS = (100, 200, 300, 400)
ROOT = [0.5, 2**0.5 / 2 - 0.5, 3**0.5 / 2 - 2**0.5 / 2, 1 - 3**0.5 / 2]  # 1-sqrt
VALUES = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)


def at(i):
    """Params of a step, with a list, bfloat16 and an integer."""
    return {
        "w": jnp.asarray(VALUES[i]),
        "layers": [{"b": jnp.asarray(VALUES[i, 0], jnp.bfloat16)}],
        "n": jnp.int32(i),
    }


def state(i):
    moments = jax.tree.map(lambda x: x + 100, at(i))
    return {"params": at(i), "opt_state": [{"mu": moments}], "step": 100 * (i + 1)}


def tensors(i, **more):
    w, b = VALUES[i], VALUES[i, 0].astype(jnp.bfloat16)
    return {"w": w, "layers.0.b": b, "n": np.array(i, np.int32), **more}


def merge(*arguments):
    return cli.main(["merge", *map(str, arguments)])


def check(folder, step, weights=ROOT, **told):
    """Compares a merge with float64 sums to 1e-7, and what it says of itself."""
    got = checkpoint.restore(folder, "params", at(3), step=step)
    expected = np.tensordot(weights, VALUES.astype(np.float64), axes=1)
    np.testing.assert_allclose(got["w"], expected, rtol=0, atol=1e-7)
    halves = VALUES[:, 0].astype(jnp.bfloat16).astype(np.float64)
    b = got["layers"][0]["b"]
    assert b.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(b, np.float64), np.tensordot(weights, halves, axes=1), atol=8e-3
    )
    assert int(got["n"]) == 3
    origin = checkpoint.describe(folder, step=step).extra["merged"]
    assert origin["verified"] is False
    assert {name: origin[name] for name in told} == told


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of plain Orbax, with the optimizer's state."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    for i, step in enumerate(STEPS):
        foreign.save(folder, state(i), step)
    return folder


@pytest.fixture
def files(tmp_path):
    """Four files of safetensors in a folder."""
    folder = tmp_path / "files"
    folder.mkdir()
    for i, step in enumerate(STEPS):
        safetensors.numpy.save_file(tensors(i), folder / f"step-{step}.safetensors")
    return folder


def trainer(folder, shards=1, steps=STEPS):
    """A folder as Hugging Face's trainer writes it."""
    for i, step in enumerate(steps):
        inner = folder / f"checkpoint-{step}"
        inner.mkdir(parents=True)
        (inner / "optimizer.pt").write_bytes(b"not read")
        (inner / "trainer_state.json").write_text("{}")
        held = tensors(i)
        if shards == 1:
            safetensors.numpy.save_file(held, inner / "model.safetensors")
            continue
        table = {}
        for number, name in enumerate(held, 1):
            file = f"model-{number:05}-of-{len(held):05}.safetensors"
            safetensors.numpy.save_file({name: held[name]}, inner / file)
            table[name] = file
        index = inner / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


@pytest.mark.parametrize("tree", [None, "params"])
def test_a_run_of_orbax(plain, tmp_path, capsys, tree):
    """The params are found, or told; the result says that nothing was verified."""
    options = ("--schedule", "1-sqrt", "--out", tmp_path / "out")
    assert merge(plain, *options, *(["--tree", tree] if tree else [])) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Not verified: saved by another program" in printed.out
    check(tmp_path / "out", 400, run="run", tree="params", steps=list(STEPS))
    assert merge(plain, "--last", 2, "--dry-run", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["verified"], figures["tree"]) == (False, "params")
    assert figures["steps"] == [300, 400]


@pytest.mark.parametrize(
    "layout", ["composite", "pytree", "root", "zarr", "one by one"]
)
def test_layouts_of_orbax(tmp_path, layout):
    """Items of a step, PyTreeSave, params at the top, and steps given one by one."""
    run, tree, step, given = tmp_path / "run", "params", 400, []
    for i, number in enumerate(STEPS):
        if layout == "composite":
            tree = "train/params"
            foreign.composite(run, number, train=state(i), ema={"w": at(i)["w"]})
        elif layout == "zarr":
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
            with ocp.Checkpointer(handler) as writer:
                place = run / f"step_{number}"
                writer.save(place, args=ocp.args.PyTreeSave(state(i)))
        elif layout == "root":
            tree = "/"
            foreign.save(run, at(i), number)
        else:
            with ocp.CheckpointManager(run) as manager:
                manager.save(number, args=ocp.args.PyTreeSave(state(i)))
            given.append(run / str(number))
    runs = given if layout == "one by one" else [run]
    step = 4 if layout == "one by one" else 400
    options = ("--schedule", "1-sqrt", "--tree", tree, "--out", tmp_path / "out")
    assert merge(*runs, *options) == 0
    check(tmp_path / "out", step, tree=tree)


def test_a_few_leaves_are_read_at_a_time(tmp_path, monkeypatch):
    """Each once, in the order in which sums ask for them."""
    names = [f"layer_{i}" for i in range(12)]
    run = tmp_path / "run"
    for step in (1, 2):
        tree = {name: {"w": jnp.full((4, 4), float(step))} for name in names}
        foreign.save(run, {"params": tree}, step)
    monkeypatch.setattr("ema_optax._checkpoint.foreign_sources._LEAST", 0)
    sources = [checkpoint.stored_by_others(run, "params", step=i) for i in (1, 2)]
    asked = []
    for source in sources:
        inner = source._read
        monkeypatch.setattr(
            source,
            "_read",
            lambda paths, i=inner: asked.append(list(paths)) or i(paths),
        )
    merged = reconstruction.merge(sources, "uniform")
    assert all(float(merged[name]["w"][0, 0]) == 1.5 for name in names)
    assert sorted(path for paths in asked for path in paths) == sorted(
        2 * [f"{name}/w" for name in names]
    )
    assert max(map(len, asked)) == 1  # a sixteenth of the tree is less than two


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("parms", "no arrays at --tree parms'?. The nearest are 'params'"),
        ("step", "'step' of .* has no floating leaves"),
        ("shadow", "no arrays at"),
    ],
)
def test_a_tree_that_is_not_there(plain, tmp_path, capsys, tree, message):
    """Names the nearest, and writes nothing."""
    assert merge(plain, "--tree", tree, "--out", tmp_path / "out") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_params_that_nothing_names(tmp_path, capsys):
    """What is there is listed, with the option that chooses."""
    foreign.save(tmp_path / "run", {"a": at(0), "b": at(1)}, 7)
    assert merge(tmp_path / "run", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "Nothing says which tree" in error
    assert "--tree" in error
    assert "'a' (3 leaves" in error
    assert merge(tmp_path / "run", "--item", "a", "--out", tmp_path / "out") == 1
    assert "instead of --item" in capsys.readouterr().err


def test_steps_of_two_programs(plain, tmp_path, capsys):
    """Ours and theirs are two runs, unless those of one are chosen."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    opt_state = ema_optax.ema_params(0.9).init(at(3))
    checkpoint.save(run, at(3), opt_state, step=500)
    assert merge(run, "--out", tmp_path / "out") == 1
    assert "they are of two runs" in capsys.readouterr().err
    options = ("--steps", "100:400", "--schedule", "1-sqrt", "--out", tmp_path / "out")
    assert merge(run, *options) == 0
    check(tmp_path / "out", 400)


def test_steps_that_were_not_finished(plain, tmp_path, capsys):
    """Are passed over in a run; a damaged one is named, and nothing is written."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "400").rename(run / "400.orbax-checkpoint-tmp-1")
    assert merge(run, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [100, 200, 300]
    for file in (run / "200").rglob("d/*"):
        file.unlink()
    assert merge(run, "--out", tmp_path / "out") == 1
    assert "200" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["files", "trainer", "shards", "one by one"])
def test_folders_of_safetensors(files, tmp_path, capsys, kind):
    """Files, a trainer's folders, shards with an index, or files in an order."""
    runs, step = [files], 400
    if kind == "one by one":
        runs, step = sorted(files.iterdir()), 4
    elif kind != "files":
        runs = [trainer(tmp_path / "hf", 1 if kind == "trainer" else 3)]
    options = ("--schedule", "1-sqrt", "--out", tmp_path / "out")
    assert merge(*runs, *options) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Not verified: saved by a program as safetensors" in printed.out
    names = [run.name for run in runs]
    check(tmp_path / "out", step, run=names if len(names) > 1 else names[0], tree="/")
    ema_optax.safetensors.export(
        tmp_path / "out", tmp_path / "m.safetensors", tree="params"
    )
    written = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert {name: x.shape for name, x in written.items()} == {
        name: x.shape for name, x in tensors(3).items()
    }


def test_a_tree_in_safetensors(tmp_path):
    """The beginning of the names chooses."""
    for i in range(4):
        model = {f"model.{name}": x for name, x in tensors(i).items()}
        safetensors.numpy.save_file(
            {**model, "head.w": np.ones(2)}, tmp_path / f"{i}.safetensors"
        )
    source = ema_optax.safetensors.stored(tmp_path / "2.safetensors", "model")
    assert sorted([*source.leaves, *source.others]) == ["layers/0/b", "n", "w"]
    options = ("--schedule", "1-sqrt", "--tree", "model", "--out", tmp_path / "out")
    assert merge(*(tmp_path / f"{i}.safetensors" for i in range(4)), *options) == 0
    check(tmp_path / "out", 4, tree="model")
    with pytest.raises(
        ValueError, match=r"no tensors at tree='modl'\. The nearest are"
    ):
        ema_optax.safetensors.stored(tmp_path / "2.safetensors", "modl")


def test_what_lies_beside_is_told(tmp_path, capsys):
    """The final model, and checkpoints without weights, or begun."""
    run = trainer(tmp_path / "hf")
    safetensors.numpy.save_file(tensors(0), run / "model.safetensors")
    (run / "checkpoint-500").mkdir()
    shutil.copytree(run / "checkpoint-100", run / "tmp-checkpoint-500")
    (run / "runs-2026").mkdir()
    assert merge(run, "--dry-run", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] == list(STEPS)
    for name in ("model.safetensors", "checkpoint-500", "tmp-checkpoint-500"):
        assert name in printed.err
    assert "runs-2026" not in printed.err


def save(file, **more):
    safetensors.numpy.save_file({**tensors(1), **more}, file)


def _two_names(folder):
    save(folder / "ema-100.safetensors")


def _twice(folder):
    save(folder / "step-0200.safetensors")


def _shape(folder):
    save(folder / "step-200.safetensors", w=np.ones((5, 4), np.float32))


def _dtype(folder):
    save(folder / "step-200.safetensors", w=np.ones((5, 3), np.float16))


def _missing(folder):
    safetensors.numpy.save_file(
        {"w": VALUES[1], "n": np.array(1, np.int32)}, folder / "step-200.safetensors"
    )


def _more(folder):
    save(folder / "step-200.safetensors", v=np.ones(3, np.float32))


def _nan(folder):
    w = VALUES[1].copy()
    w[2, 1] = np.nan
    save(folder / "step-200.safetensors", w=w)


def _infinite(folder):
    w = VALUES[1].copy()
    w[2] = [np.inf, -np.inf, np.inf]
    save(folder / "step-200.safetensors", w=w)


def _cut(folder):
    file = folder / "step-200.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _name(name):
    def made(folder):
        save(folder / "step-200.safetensors", **{name: np.ones(2, np.float32)})

    return made


def _quantized(folder):
    header = {"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "step-200.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(4)
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_two_names, "checkpoints of 2 names, such as ema-100.*, step-100.*two runs"),
        (_twice, "two checkpoints 200: step-0200.safetensors and step-200"),
        (_shape, r"'w' is float32\[5,3\] in .*step-100.* and float32\[5,4\] in .*-200"),
        (_dtype, r"'w' is float32\[5,3\] .* and float16\[5,3\] .*Say by --dtype"),
        (_missing, r"'layers/0/b' is only in .*step-100.*, not in .*step-200"),
        (_more, r"'v' is only in .*step-200.*, not in .*step-100"),
        (_nan, r"'w' of .*step-200.* has 1 of 15 elements that are not finite"),
        (_infinite, r"'w' of .*step-200.* has 3 of 15 elements that are not finite"),
        (_cut, "step-200.safetensors is no whole safetensors file"),
        (_name("a..b"), "'a..b' in .* is no path of a leaf"),
        (_name("x/../../y"), "is no path of a leaf"),
        (_name("layers/0.b"), "are both the path 'layers/0/b'"),
        (_name("w.x"), "'w' is a leaf and the beginning of other paths|only in"),
        (_quantized, "'w' in .*step-200.* is F8_E4M3, which cannot be averaged"),
    ],
)
def test_bad_input(files, tmp_path, capsys, harm, message):
    """One line that names the file, and nothing is written."""
    harm(files)
    assert merge(files, "--out", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_with_one_told(files, tmp_path):
    """Are summed in float64 as any others."""
    _dtype(files)
    options = ("--dtype", "float32", "--schedule", "uniform", "--out", tmp_path / "out")
    assert merge(files, *options) == 0
    merged = checkpoint.restore(tmp_path / "out", "params")
    values = VALUES.astype(np.float64)
    values[1] = 1
    np.testing.assert_allclose(merged["w"], values.mean(axis=0), rtol=0, atol=1e-7)
    assert merged["layers"]["0"]["b"].dtype == jnp.float32


def test_constants_and_what_does_not_fit(tmp_path, capsys):
    """Infinities that are alike stay; those that a dtype makes are refused."""
    runs = []
    for i in range(2):
        runs.append(tmp_path / f"{i}.safetensors")
        mask = np.float32([0, -np.inf])
        save(runs[-1], mask=mask, large=np.float32([1e5]))
    assert merge(*runs, "--out", tmp_path / "out", "--dtype", "float16") == 1
    assert "'large' of the merge has 1 of 1 elements that do not fit float16" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert merge(*runs, "--out", tmp_path / "out") == 0
    merged = checkpoint.restore(tmp_path / "out", "params")
    np.testing.assert_array_equal(merged["mask"], mask)


def test_shards_without_their_index(tmp_path, capsys):
    """Are no steps of their numbers."""
    for number in (1, 2):
        save(tmp_path / f"model-0000{number}-of-00002.safetensors")
    assert merge(tmp_path, "--out", tmp_path / "out") == 1
    assert "no safetensors.index.json that says" in capsys.readouterr().err


def test_sources_refuse(plain, tmp_path):
    """Ours to read by others, a folder of nothing, and a pickle."""
    opt_state = ema_optax.ema_params(0.9).init(at(0))
    checkpoint.save(tmp_path / "ours", at(0), opt_state, step=1)
    with pytest.raises(ValueError, match="saved by ema_optax"):
        checkpoint.stored_by_others(tmp_path / "ours")
    with pytest.raises(FileNotFoundError):
        checkpoint.stored_by_others(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no committed step 5"):
        checkpoint.stored_by_others(plain, step=5)
    (tmp_path / "pickles").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights"):
        ema_optax.safetensors.stored(tmp_path / "pickles")
