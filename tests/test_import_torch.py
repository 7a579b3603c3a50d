"""Import of safetensors files, which need no PyTorch, and what of them is refused."""

import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax.interop import Rule

RNG = np.random.default_rng(0)


def weights(scale=1.0):
    """Weights of a small model: three layers, an embedding, statistics, a counter."""
    made = {
        f"h.{i}.{name}.weight": (scale * RNG.normal(size=shape)).astype(np.float32)
        for i in range(3)
        for name, shape in (("q", (6, 4)), ("o", (4, 6)))
    }
    narrow = (scale * RNG.normal(size=(5, 4))).astype(ml_dtypes.bfloat16)
    half = (scale * RNG.normal(size=3)).astype(np.float16)
    return made | {
        "emb.weight": narrow,
        "bn.running_mean": half,
        "bn.num_batches_tracked": np.array(2**40 + 1),
        "flags": np.array([True, False]),
    }


RAW, AVERAGE = weights(), weights(0.5)
RULES = [
    Rule("h.#.*.weight", "h/*/kernel", "l o i -> l i o"),
    Rule("**", "**"),
]


def by_path(tree):
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in pairs}


def bits(array):
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


def stored(folder, tree):
    return {k: bits(x) for k, x in by_path(checkpoint.restore(folder, tree)).items()}


def expected(tensors):
    return {name.replace(".", "/"): bits(x) for name, x in tensors.items()}


@pytest.fixture
def raw(tmp_path):
    save_file(RAW, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def average(tmp_path):
    save_file(AVERAGE, tmp_path / "ema.safetensors")
    return tmp_path / "ema.safetensors"


def sharded(folder, tensors, edit=None):
    """Writes two shards and their index, which `edit` may change; returns the index."""
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    table = {}
    for at, part in enumerate((names[:4], names[4:]), start=1):
        file = f"model-{at:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    content = {"metadata": {"total_size": 0}, "weight_map": table}
    if edit is not None:
        edit(table)
    index.write_text(json.dumps(content))
    return index


def test_raw_and_average(raw, average, tmp_path):
    """Each bit and dtype of both, and where step, count and decay come from."""
    done = ema_optax.torch.import_checkpoint(
        raw,
        tmp_path / "out",
        shadow_from=average,
        count=700,
        decay=ema_optax.warmup(0.9999),
    )
    assert stored(tmp_path / "out", "params") == expected(RAW)
    assert stored(tmp_path / "out", "shadow") == expected(AVERAGE)
    found = checkpoint.describe(tmp_path / "out")
    shadow = found.trees["shadow"]
    assert (found.step, shadow.count) == (done.step, done.count) == (700, 700)
    assert shadow.decay == done.decay == ema_optax.warmup(0.9999)
    told = {"step": "the count", "count": "the argument", "decay": "the argument"}
    assert done.told_by == told
    assert found.extra["from"]["shadow"] == "ema.safetensors"
    assert found.extra["from"]["decay_from"] == "the argument"
    # What is not averaged and the same lies in the params alone.
    assert "flags" not in shadow.leaves
    assert done.leaves["flags"].shadow_dtype == "bool"


def test_raw_alone(raw, tmp_path):
    """The average starts as a copy with count 0, and both are said."""
    done = ema_optax.torch.import_checkpoint(raw, tmp_path / "out", step=7)
    assert stored(tmp_path / "out", "params") == expected(RAW)
    assert stored(tmp_path / "out", "shadow") == expected(RAW)
    assert checkpoint.describe(tmp_path / "out").trees["shadow"].count == 0
    assert (done.step, done.count, done.shadow) == (7, 0, None)
    assert done.told_by["count"] == "the average starts here"
    with pytest.raises(ValueError, match="count=3 is of an average, and model"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "other", count=3)


def test_average_alone(average, tmp_path):
    """It is the params too, with its own count."""
    done = ema_optax.torch.import_checkpoint(
        average, tmp_path / "out", shadow="**", count=9
    )
    assert stored(tmp_path / "out", "shadow") == expected(AVERAGE)
    assert stored(tmp_path / "out", "params") == expected(AVERAGE)
    assert checkpoint.describe(tmp_path / "out").trees["shadow"].count == 9
    assert (done.params, done.shadow) == (None, "ema.safetensors")


def test_count_is_never_guessed(average, raw, tmp_path):
    """An average with neither count nor step is refused; decay may be unknown."""
    with pytest.raises(ValueError, match=r"Pass count=300000, or the step"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "out", shadow_from=average)
    done = ema_optax.torch.import_checkpoint(
        raw, tmp_path / "out", shadow_from=average, step=5
    )
    assert (done.count, done.told_by["count"]) == (5, "the step")
    assert (done.decay, done.told_by["decay"]) == (None, "not recorded")
    for name in ("step", "count"):
        numbers = {"step": 1, "count": 1} | {name: 2**31}
        with pytest.raises(ValueError, match=f"{name} is less than 2,147,483,648"):
            ema_optax.torch.import_checkpoint(
                raw, tmp_path / "far", shadow_from=average, **numbers
            )
    assert not (tmp_path / "far").exists()


def test_rules(raw, average, tmp_path):
    """Layers are stacked and turned, in both trees alike."""
    done = ema_optax.torch.import_checkpoint(
        raw, tmp_path / "out", shadow_from=average, step=5, rules=RULES
    )
    for tree, tensors in (("params", RAW), ("shadow", AVERAGE)):
        found = by_path(checkpoint.restore(tmp_path / "out", tree))
        for name in "qo":
            layers = [tensors[f"h.{i}.{name}.weight"].T for i in range(3)]
            assert bits(found[f"h/{name}/kernel"]) == bits(np.stack(layers))
        assert bits(found["emb/weight"]) == bits(tensors["emb.weight"])
    leaf = done.leaves["h/q/kernel"]
    assert leaf.names == tuple(f"h.{i}.q.weight" for i in range(3))
    assert "l o i -> l i o" in leaf.change


def test_a_rule_leaves_out(raw, tmp_path):
    """What a rule leaves out is listed, and not read."""
    rules = [Rule("flags", None), Rule("**", "**")]
    done = ema_optax.torch.import_checkpoint(raw, tmp_path / "out", rules=rules)
    assert done.left_out == {"flags": "left out by a rule"}
    assert "flags" not in stored(tmp_path / "out", "params")
    with pytest.raises(ValueError, match="emb"):  # no rule takes it
        ema_optax.torch.import_checkpoint(
            raw, tmp_path / "b", rules=[Rule("h.**", "h/**")]
        )
    rules = [Rule("hh.**", "h/**"), Rule("**", "**")]
    with pytest.raises(ValueError, match=r"'hh\.\*\*', which fits no name"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "b", rules=rules)
    assert not (tmp_path / "b").exists()


def test_shards(tmp_path):
    """An index, or the folder that has it, is one model."""
    index = sharded(tmp_path / "model", RAW)
    for at, source in enumerate((index, index.parent)):
        ema_optax.torch.import_checkpoint(source, tmp_path / "out", step=at)
        assert stored(tmp_path / "out" / str(at), "params") == expected(RAW)


def _elsewhere(name):
    return lambda table: table.update({"flags": name})


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (_elsewhere("model-3.safetensors"), "model-3.safetensors is not beside it"),
        (_elsewhere("../model.safetensors"), "is no file beside it"),
        (_elsewhere("/etc/model.safetensors"), "is no file beside it"),
        (_elsewhere(3), "is no file beside it"),
        (_elsewhere(".."), "is no file beside it"),
        (_elsewhere("model.safetensors.index.json"), "lists an index"),
        (
            _elsewhere("model-00001-of-00002.safetensors"),
            "it is in model-00002-of-00002.safetensors",
        ),
        (
            lambda table: table.update({"more": "model-00001-of-00002.safetensors"}),
            "no shard has it",
        ),
        (lambda table: table.pop("flags"), "which .* does not list"),
        (lambda table: table.clear(), "is no index of shards"),
    ],
    ids=[
        "missing shard",
        "folder above",
        "absolute path",
        "number",
        "two dots",
        "index in the index",
        "another shard",
        "tensor of no shard",
        "tensor not listed",
        "empty index",
    ],
)
def test_wrong_indices(tmp_path, edit, told):
    """Missing shards, other folders, and tensors that are elsewhere."""
    index = sharded(tmp_path / "model", RAW, edit)
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        ema_optax.torch.import_checkpoint(index, tmp_path / "out")
    assert len(str(caught.value)) < 700
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_shards(tmp_path):
    """Which one is right is not known."""
    index = sharded(tmp_path / "model", RAW)
    shard = tmp_path / "model" / "model-00002-of-00002.safetensors"
    save_file(load_file(shard) | {"h.0.q.weight": RAW["h.0.q.weight"]}, shard)
    with pytest.raises(ValueError, match=r"'h.0.q.weight' is in both"):
        ema_optax.torch.import_checkpoint(index, tmp_path / "out")
    text = index.read_text().replace('"flags":', '"flags": "x", "flags":')
    index.write_text(text)
    with pytest.raises(ValueError, match="it has 'flags' twice"):
        ema_optax.torch.import_checkpoint(index, tmp_path / "out")


def hostile(header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
TWICE = b'{"t": %s, "t": %s}' % ((json.dumps(ONE).encode(),) * 2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no whole safetensors file"),
        (b"junk", "no whole safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "no whole safetensors file"),
        (struct.pack("<Q", 2 * 10**8) + b"{}", "no whole safetensors file"),
        (hostile({"t": ONE}, b"12"), "no whole safetensors file"),
        (hostile({"t": ONE | {"shape": [2**40]}}, b"1234"), "no whole safetensors"),
        (hostile(b"[" * 100_000), "no whole safetensors file"),
        (hostile(TWICE, b"1234"), "it has 't' twice"),
        (
            hostile({"t": ONE | {"dtype": "F8_E4M3", "shape": [4]}}, b"1234"),
            "'t' in .*bad.safetensors is F8_E4M3, which cannot be held",
        ),
        (hostile({"../t": ONE}, b"1234"), "'../t': it would get the path '///t'"),
        (hostile({"a..b": ONE}, b"1234"), "it would get the path 'a//b'"),
        (hostile({}), "no tensors"),
    ],
)
def test_hostile_files(tmp_path, content, told):
    """Damaged, cut and forged files: a short error, and nothing is written."""
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=told) as caught:
        ema_optax.torch.import_checkpoint(file, tmp_path / "out")
    assert len(str(caught.value)) < 700
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["h.1.q.weight", "emb.weight"])
def test_not_finite(raw, average, tmp_path, bad, name):
    """An element is enough; the error names the tensor, and nothing is written."""
    array = AVERAGE[name].copy()
    array[1, 1] = bad
    save_file(AVERAGE | {name: array}, average)
    with pytest.raises(ValueError, match=rf"'{name}' in .*ema.*1 of \d+ elements"):
        ema_optax.torch.import_checkpoint(
            raw, tmp_path / "out", shadow_from=average, step=1
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"flags": None}, "'flags' is only in the raw weights"),
        ({"more": np.ones(2)}, "'more' is only in the average"),
        ({"flags": np.ones(3, bool)}, r"'flags' is bool\[3\] in the average"),
    ],
)
def test_other_names_and_shapes(raw, average, tmp_path, change, told):
    """Raw weights and average are of one model, or refused with where they differ."""
    both = {k: v for k, v in (AVERAGE | change).items() if v is not None}
    save_file(both, average)
    with pytest.raises(ValueError, match=told):
        ema_optax.torch.import_checkpoint(
            raw, tmp_path / "out", shadow_from=average, step=1
        )


def test_integers_that_differ(raw, average, tmp_path):
    """A counter of the average is its own, where it is another than the params'."""
    count = {"bn.num_batches_tracked": np.array(3)}
    save_file(AVERAGE | count, average)
    ema_optax.torch.import_checkpoint(
        raw, tmp_path / "out", shadow_from=average, step=1
    )
    assert stored(tmp_path / "out", "shadow") == expected(AVERAGE | count)
    assert stored(tmp_path / "out", "params") == expected(RAW)


def test_names_that_wrappers_give(raw, average, tmp_path):
    """`module.` and `_orig_mod.` go where all names have them, and that is said."""
    wrapped = {f"module._orig_mod.{name}": x for name, x in RAW.items()}
    save_file(wrapped, raw)
    done = ema_optax.torch.import_checkpoint(
        raw, tmp_path / "out", shadow_from=average, step=1
    )
    assert stored(tmp_path / "out", "params") == expected(RAW)
    assert done.unwrapped == {"model.safetensors": "module._orig_mod."}
    save_file(wrapped | {"top": np.ones(1)}, raw)
    done = ema_optax.torch.import_checkpoint(raw, tmp_path / "some")
    assert not done.unwrapped
    assert "module/_orig_mod/flags" in done.leaves


def test_averaged_model(tmp_path):
    """The state of AveragedModel, as safetensors: an average and its count."""
    file = tmp_path / "swa.safetensors"
    state = {f"module.{name}": x for name, x in AVERAGE.items()}
    save_file(state | {"n_averaged": np.array(12)}, file)
    done = ema_optax.torch.import_checkpoint(file, tmp_path / "out")
    assert stored(tmp_path / "out", "shadow") == expected(AVERAGE)
    assert (done.layout, done.count, done.step) == ("averaged-model", 12, 12)
    assert done.told_by["count"] == "n_averaged"
    assert done.left_out == {"n_averaged": "1 tensor"}


def test_averages_without_dots(tmp_path):
    """latent-diffusion's: names lost their dots, and decay and count are recorded."""
    model = {f"model.{n}.weight": RAW["flags"] * 1.0 for n in ("a.b.0", "a.b.1")}
    model["first_stage.w"] = RAW["h.0.q.weight"]
    ema = {"model_ema.ab0weight": np.array([3.0, 4]), "model_ema.ab1weight": np.ones(2)}
    state = {
        "model_ema.decay": np.array(0.9999, np.float32),
        "model_ema.num_updates": np.array(41, np.int32),
    }
    file = tmp_path / "sd.safetensors"
    save_file(model | ema | state, file)
    done = ema_optax.torch.import_checkpoint(file, tmp_path / "out")
    shadow = by_path(checkpoint.restore(tmp_path / "out", "shadow"))
    assert shadow["model/a/b/0/weight"].tolist() == [3.0, 4.0]
    assert bits(shadow["first_stage/w"]) == bits(model["first_stage.w"])
    assert (done.layout, done.count) == ("litema-flat", 41)
    assert done.decay == ema_optax.warmup(0.9999)
    assert done.raw == ("first_stage/w",)
    save_file(model | ema | state | {"model_ema.other": np.ones(2)}, file)
    with pytest.raises(ValueError, match=r"'model_ema.other' .* no tensor that is"):
        ema_optax.torch.import_checkpoint(file, tmp_path / "other")


def test_folders(tmp_path):
    """One model in a folder; several, none, and DCP's are refused with what to do."""
    save_file(RAW, tmp_path / "model.safetensors")
    (tmp_path / "optimizer.bin").write_bytes(b"")  # no weights
    assert (
        ema_optax.torch.import_checkpoint(tmp_path, tmp_path / "out").layout
        == "weights"
    )
    save_file(RAW, tmp_path / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"has several files of weights: model.fp16"):
        ema_optax.torch.import_checkpoint(tmp_path, tmp_path / "b")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="There are no weights in"):
        ema_optax.torch.import_checkpoint(empty, tmp_path / "b")
    (empty / ".metadata").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="format_utils dcp_to_torch"):
        ema_optax.torch.import_checkpoint(empty, tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"The nearest are 'model.safet"):
        ema_optax.torch.import_checkpoint(
            tmp_path / "modle.safetensors", tmp_path / "b"
        )
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"those end in .safetensors"):
        ema_optax.torch.import_checkpoint(tmp_path / "weights.h5", tmp_path / "b")
    with pytest.raises(ValueError, match=r"of this machine, got gs://bucket/m.pt"):
        ema_optax.torch.import_checkpoint("gs://bucket/m.pt", tmp_path / "b")


SETTINGS = {
    "decay": 0.999,
    "min_decay": 0.0,
    "optimization_step": 300,
    "update_after_step": 0,
    "use_ema_warmup": False,
    "inv_gamma": 1.0,
    "power": 2 / 3,
}


def diffusers_run(folder, settings=SETTINGS, name="unet"):
    """A run's folder, as diffusers' training programs write it."""
    for part, tensors, config in (
        (name, RAW, {"in_channels": 4}),
        (f"{name}_ema", AVERAGE, {"in_channels": 4, **settings}),
    ):
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


def reference(t, decay, min_decay, after, warm, gamma, power):
    """EMAModel's β at update t, in float64."""
    s = t - after - 1
    if s <= 0:
        return 0.0
    ramp = 1 - (1 + s / gamma) ** -power if warm else (1 + s) / (10 + s)
    return max(min(ramp, decay), min_decay)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"update_after_step": 20},
        {"use_ema_warmup": True},
        {"use_ema_warmup": True, "update_after_step": 7, "min_decay": 0.6},
        {"use_ema_warmup": True, "inv_gamma": 3.0, "power": 0.75, "decay": 0.9},
        {"min_decay": 0.1},
    ],
)
def test_diffusers_settings(tmp_path, changed):
    """Their decay is ours at every update, and their step the count."""
    settings = SETTINGS | changed
    done = ema_optax.torch.import_checkpoint(
        diffusers_run(tmp_path / "checkpoint-300", settings), tmp_path / "out"
    )
    assert stored(tmp_path / "out", "params") == expected(RAW)
    assert stored(tmp_path / "out", "shadow") == expected(AVERAGE)
    assert (done.count, done.told_by["count"]) == (300, "config.optimization_step")
    theirs = [settings[k] for k in ("decay", "min_decay", "update_after_step")]
    theirs += [settings[k] for k in ("use_ema_warmup", "inv_gamma", "power")]
    for t in (1, 2, 3, 8, 9, 21, 22, 23, 100, 10**6):
        # A ramp one update late is off by 1e-3 and more, but at the end.
        assert done.decay(t) == pytest.approx(reference(t, *theirs), abs=1e-12)
    assert checkpoint.describe(tmp_path / "out").trees["shadow"].decay == done.decay


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"min_decay": 0.5}, "min_decay=0.5 in config.json has no equal"),
        ({"decay": 1.0}, "config.json: "),
        ({"decay": "high"}, "not all numbers"),
        ({"use_ema_warmup": True, "power": -1.0}, "config.json: "),
    ],
)
def test_decays_without_an_equal(tmp_path, changed, told):
    """They are not recorded, with the reason, and nothing is guessed."""
    run = diffusers_run(tmp_path / "run", SETTINGS | changed)
    done = ema_optax.torch.import_checkpoint(run, tmp_path / "out")
    assert done.decay is None
    assert told in done.told_by["decay"]


def test_several_models_in_a_folder(tmp_path):
    """Which one is for the caller to say."""
    run = diffusers_run(diffusers_run(tmp_path / "run"), name="text_encoder")
    with pytest.raises(ValueError, match=r"several models .*shadow_from="):
        ema_optax.torch.import_checkpoint(run, tmp_path / "out")
    done = ema_optax.torch.import_checkpoint(
        run / "unet", tmp_path / "out", shadow_from=run / "unet_ema"
    )
    assert (done.layout, done.count) == ("weights and diffusers", 300)
    alone = ema_optax.torch.import_checkpoint(run / "unet_ema", tmp_path / "alone")
    assert (alone.layout, alone.params, alone.count) == ("diffusers", None, 300)


def test_layouts_by_name(raw, tmp_path):
    """A layout that does not fit, or does not exist, is refused with what is there."""
    with pytest.raises(ValueError, match=r"no layout 'tim'. The nearest are 'timm'"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "out", layout="tim")
    with pytest.raises(ValueError, match=r"not of the layout timm.*10 tensors at the"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "out", layout="timm")
    with pytest.raises(ValueError, match="Pass one or the other"):
        ema_optax.torch.import_checkpoint(
            raw, tmp_path / "out", layout="weights", params="**"
        )
    with pytest.raises(ValueError, match="a key, or names with one"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "out", params="h.*.q")
    with pytest.raises(ValueError, match="params='g' fits no tensor"):
        ema_optax.torch.import_checkpoint(raw, tmp_path / "out", params="g")
    done = ema_optax.torch.import_checkpoint(raw, tmp_path / "out", params="h")
    assert "0/q/weight" in done.leaves
    assert done.left_out["flags"] == "1 tensor"


def test_a_leaf_inside_another(tmp_path):
    """`a` and `a.b` cannot both be leaves; a rule gives one another path."""
    file = tmp_path / "m.safetensors"
    save_file({"a": np.ones(2), "a.b": np.ones(2)}, file)
    with pytest.raises(ValueError, match=r"'a' would be the leaf 'a', and 'a.b' lies"):
        ema_optax.torch.import_checkpoint(file, tmp_path / "out")
    rules = [Rule("a", "a/value"), Rule("**", "**")]
    done = ema_optax.torch.import_checkpoint(file, tmp_path / "out", rules=rules)
    assert set(done.leaves) == {"a/value", "a/b"}


def test_nothing_is_overwritten(raw, tmp_path):
    """The step is refused before anything is read."""
    ema_optax.torch.import_checkpoint(raw, tmp_path / "out", step=3)
    before = stored(tmp_path / "out", "params")
    seen = []
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        ema_optax.torch.import_checkpoint(
            raw, tmp_path / "out", step=3, progress=lambda *x: seen.append(x)
        )
    assert not seen
    assert stored(tmp_path / "out", "params") == before


def test_progress(raw, average, tmp_path):
    """Leaves of both trees are counted."""
    seen = []
    ema_optax.torch.import_checkpoint(
        raw,
        tmp_path / "out",
        shadow_from=average,
        step=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = 2 * len(RAW)
    assert seen == [(done, total) for done in range(1, total + 1)]


def command(*args):
    return cli.main(["import-torch", *map(str, args)])


def test_command(raw, average, tmp_path, capsys):
    """It lists the mapping, writes what it says, and prints JSON for programs."""
    rules = tmp_path / "rules.json"
    rules.write_text(
        '[{"name": "h.#.*.weight", "path": "h/*/kernel", "rearrange": '
        '"l o i -> l i o"}, {"name": "**", "path": "**"}]'
    )
    args = (raw, "--shadow-from", average, "--rules", rules, "--step", 5)
    args += ("--out", tmp_path / "out")
    assert command(*args, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "not written" in out
    assert "h.0.q.weight, h.1.q.weight, h.2.q.weight  h/q/kernel" in out
    assert not (tmp_path / "out").exists()
    assert command(*args, "--decay", "0.999", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["decay"] == json.loads(ema_optax.warmup(0.999).to_json())
    assert done["count"] == 5
    assert checkpoint.describe(tmp_path / "out").step == 5
    assert command(*args) == 1
    assert "exists, and nothing is overwritten" in capsys.readouterr().err


def test_command_tells_options(raw, average, tmp_path, capsys):
    """Errors name options, on one line, and no traceback."""
    out = ("--out", tmp_path / "out")
    assert command(raw, "--shadow-from", average, *out) == 1
    assert "Pass --count 300000, or the step" in capsys.readouterr().err
    assert command(raw, "--params", "g", *out) == 1
    assert "--params 'g' fits no tensor" in capsys.readouterr().err
    assert command(Path("/nowhere/x.pt"), *out) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_without_torch(tmp_path, monkeypatch):
    """Files of torch.save name the extra that reads them."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "m.pt").write_bytes(b"PK")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ema-optax\[torch\]'"):
        ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "out")


def test_averages_are_not_taken_for_raw_weights(tmp_path):
    """Names that an average may have are refused, until the caller says which."""
    file = tmp_path / "m.safetensors"
    save_file({"model.w": np.ones(2), "ema.w": np.zeros(2)}, file)
    with pytest.raises(
        ValueError, match=r'has \'ema.w\'.*params="model", shadow="ema"'
    ):
        ema_optax.torch.import_checkpoint(file, tmp_path / "out")
    ema_optax.torch.import_checkpoint(
        file, tmp_path / "out", params="model", shadow="ema", count=1, step=1
    )
    assert stored(tmp_path / "out", "shadow") == {"w": bits(np.zeros(2))}
    done = ema_optax.torch.import_checkpoint(file, tmp_path / "all", params="**")
    assert set(done.leaves) == {"model/w", "ema/w"}


def test_command_writes_rules_as_json(tmp_path, capsys):
    """What leaves a tensor out is said as a file of rules has it."""
    save_file({"w": np.array([np.nan])}, tmp_path / "m.safetensors")
    assert command(tmp_path / "m.safetensors", "--out", tmp_path / "out") == 1
    told = '--rules with [{"name": "w", "path": null}, {"name": "**", "path": "**"}]'
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("padding", range(4))
def test_files_that_are_not_aligned(tmp_path, padding):
    """Headers of any length: the library pads them, the format need not."""
    header = json.dumps({"t": ONE | {"shape": [2], "data_offsets": [0, 8]}})
    values = np.array([1.5, -2.25], np.float32)
    data = hostile((header + " " * padding).encode(), values.tobytes())
    (tmp_path / "m.safetensors").write_bytes(data)
    ema_optax.torch.import_checkpoint(tmp_path / "m.safetensors", tmp_path / "out")
    assert stored(tmp_path / "out", "params") == {"t": bits(values)}
