"""Export to safetensors: what is in the file, bit for bit, and what is refused."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax._interop.flat_names import flat_names
from tests.older import enable_x64

RNG = np.random.default_rng(0)
PARAMS: dict[str, Any] = {
    "enc": {
        "kernel": jnp.asarray(RNG.normal(size=(64, 33)), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=33), jnp.bfloat16),
    },
    "layers": [jnp.asarray(RNG.normal(size=(2, 3, 4)), jnp.float16)],
    "scale": 2.5,
    "seen": np.int64(2**40 + 1),  # more than JAX holds without x64
    "mask": jnp.array([True, False]),
    "masked": jnp.asarray(RNG.normal(size=3), jnp.float32),
    "rotation": jnp.asarray([1 + 2j, 3j], jnp.complex64),
}
NAMES = {
    "enc.kernel",
    "enc.bias",
    "layers.0",
    "scale",
    "seen",
    "mask",
    "masked",
    "rotation",
}
RAW = {"seen", "mask", "masked"}  # not averaged


def folded() -> Any:
    """A state whose shadow is not the params: after one fold of other ones."""
    transform = ema_optax.ema_params(
        0.9, mask=lambda params: {k: k != "masked" for k in params}
    )
    state = transform.init(PARAMS)
    zeros = {"scale": 0.0, "seen": np.int64(0), "mask": jnp.zeros(2, bool)}
    updates = jax.tree.map(
        jnp.ones_like,
        {k: v for k, v in PARAMS.items() if k not in zeros},
    )
    return transform.update({**updates, **zeros}, state, PARAMS)[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 3 with keys and complex128, and step 7 with what safetensors can hold."""
    folder = tmp_path_factory.mktemp("run")
    odd = {"w": jnp.ones(2), "key": jax.random.key(0), "c": np.ones(2, np.complex128)}
    state = ema_optax.ema_params({"a": 0.9, "b": 0.99}).init({"w": odd["w"]})
    checkpoint.save(folder, odd, state, step=3)
    checkpoint.save(folder, PARAMS, folded(), step=7)
    return folder


def bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


def flat(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="."): x for k, x in pairs}


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata()


@pytest.mark.parametrize("tree", ["params", "shadow"])
def test_what_is_in_the_file(saved: Path, tmp_path: Path, tree: str):
    """Names, shapes, dtypes and bits are those that restore gives."""
    out = tmp_path / "model.safetensors"
    done = ema_optax.safetensors.export(saved, out, tree=tree)
    like = jax.tree.map(np.asarray, PARAMS)
    expected = flat(checkpoint.restore(saved, tree, like=like))
    found = safetensors.numpy.load_file(out)
    assert set(found) == set(expected) == NAMES
    for name, array in found.items():
        if name in RAW or tree == "params":
            assert bits(array) == bits(expected[name]), name
        else:  # a shadow of narrow params is float32, as stored
            stored = checkpoint.stored(saved, tree)
            path = name.replace(".", "/")
            whole = (slice(None),) * array.ndim
            assert bits(array) == bits(stored.read(path, whole)), name
    raw = flat(like)
    same = {name for name in NAMES if bits(found[name]) == bits(raw[name])}
    assert same == (NAMES if tree == "params" else RAW)
    assert done.names["layers/0"] == "layers.0"
    assert done.bytes == sum(array.nbytes for array in found.values())


def test_flax_loads_bfloat16(saved: Path, tmp_path: Path):
    """`dtype` rounds to nearest even what is floating, and nothing else."""
    out = tmp_path / "model.safetensors"
    ema_optax.safetensors.export(saved, out, tree="params", dtype=jnp.bfloat16)
    with enable_x64(True):
        found = safetensors.flax.load_file(out)
    for name, raw in flat(jax.tree.map(np.asarray, PARAMS)).items():
        floating = jnp.issubdtype(raw.dtype, jnp.floating)
        expected = raw.astype(ml_dtypes.bfloat16) if floating else raw
        assert bits(found[name]) == bits(expected), name


def test_metadata(saved: Path, tmp_path: Path):
    """All of it text; the decay goes back into Python."""
    out = tmp_path / "model.safetensors"
    done = ema_optax.safetensors.export(saved, out)
    found = metadata(out)
    assert found == done.metadata
    assert ema_optax.Decay.from_json(found.pop("decay")) == ema_optax.warmup(0.9)
    assert found == {
        "format": "flax",
        "ema_optax": ema_optax.__version__,
        "tree": "shadow",
        "step": "7",
        "every": "1",
        "count": "1",
    }
    ema_optax.safetensors.export(saved, out, tree="params", overwrite=True)
    assert set(metadata(out)) == {"format", "ema_optax", "tree", "step"}


def test_an_unknown_decay_and_the_only_named_shadow(tmp_path: Path):
    """The decay is null; `shadow` means the one there is, by its full name."""
    params = {"w": jnp.ones(2)}
    state = ema_optax.ema_params({"own": lambda step: 0.5}).init(params)
    checkpoint.save(tmp_path / "run", params, state, step=2)
    done = ema_optax.safetensors.export(tmp_path / "run", tmp_path / "m.safetensors")
    assert done.tree == done.metadata["tree"] == "shadow/own"
    assert json.loads(done.metadata["decay"]) is None


def test_shadows_of_bema_and_of_a_single_average(tmp_path: Path):
    """Trees that are stored otherwise are exported as they are restored."""
    params = {"w": jnp.asarray(RNG.normal(size=5), jnp.float32)}
    optimizer = optax.chain(optax.sgd(0.1), ema_optax.bema_params(every=1))
    state = optimizer.init(params)
    updates, state = optimizer.update({"w": jnp.ones(5)}, state, params)
    checkpoint.save(tmp_path / "bema", optax.apply_updates(params, updates), state)
    checkpoint.save_average(tmp_path / "average", params, step=9)
    for folder in ("bema", "average"):
        out = tmp_path / f"{folder}.safetensors"
        ema_optax.safetensors.export(tmp_path / folder, out)
        restored = checkpoint.restore(tmp_path / folder, "shadow")
        assert bits(safetensors.numpy.load_file(out)["w"]) == bits(restored["w"])


def test_renaming():
    """The longest beginning counts, in whole keys; None leaves out, "" is all."""
    paths = ["enc/kernel", "enc/bias", "encoder/w", "n"]
    rename = {"": "model", "enc": "e", "enc/bias": "b.w", "n": None}
    assert flat_names(paths, rename)[0] == {
        "enc/kernel": "e.kernel",
        "enc/bias": "b.w",
        "encoder/w": "model.encoder.w",
    }
    assert flat_names(["params/w"], {"params": ""})[0] == {"params/w": "w"}


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (
            {"encc": "x"},
            "'encc', which is, or begins, no stored path.* nearest are 'enc', 'enc/b",
        ),
        ({"en": "x"}, "'en', which is, or begins, no stored path"),
        ({"enc/kernel": "x", "enc/bias": "x"}, "'enc/kernel' and 'enc/bias' would"),
        ({"w": "enc.kernel"}, "would both be called 'enc.kernel'"),
        ({"w": "__metadata__"}, "'__metadata__', which the format keeps"),
        ({"w": ""}, "'w' would get an empty name"),
        ({"w": "\ud800"}, "cannot be printed"),
        ({"w": "a\nb"}, "cannot be printed"),
        ({"": None}, "No leaf is left"),
    ],
)
def test_renaming_that_does_not_fit(rename: Any, says: str):
    """Each says what was wrong, and what is there or to be written instead."""
    with pytest.raises(ValueError, match=says):
        flat_names(["enc/kernel", "enc/bias", "w"], rename)


@pytest.mark.parametrize(
    "rename",
    [["enc"], {"enc": 3}, {3: "enc"}, "enc"],
    ids=["list", "number for a name", "number for a path", "text"],
)
def test_renaming_that_is_no_mapping_of_texts(rename: Any):
    """Lists, numbers, and a bare text."""
    with pytest.raises(TypeError, match="rename maps stored paths to names"):
        flat_names(["enc/kernel"], rename)


def test_what_safetensors_cannot_hold(saved: Path, tmp_path: Path):
    """PRNG keys and complex128 are named, all in one call that works."""
    out = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="cannot hold") as caught:
        ema_optax.safetensors.export(saved, out, tree="shadow/a", step=3)
    text = str(caught.value)
    assert "'c' is complex128 (and 1 more such leaves)" in text
    assert 'rename={"c": None, "key": None}' in text
    assert not any(tmp_path.iterdir())
    ema_optax.safetensors.export(
        saved, out, tree="shadow/a", step=3, rename={"c": None, "key": None}
    )
    assert set(safetensors.numpy.load_file(out)) == {"w"}


def test_a_value_beyond_float16(tmp_path: Path):
    """It is an error with its name, and never an infinity; infinities stay."""
    params = {"a": jnp.array([np.inf, np.nan, 65504.0]), "w": jnp.array([65520.0])}
    state = ema_optax.ema_params(0.9).init(params)
    checkpoint.save(tmp_path / "run", params, state)
    out = tmp_path / "model.safetensors"
    with pytest.raises(OverflowError, match="'w' does not fit float16"):
        ema_optax.safetensors.export(tmp_path / "run", out, dtype="float16")
    assert not out.exists()
    ema_optax.safetensors.export(
        tmp_path / "run", out, dtype="float16", rename={"w": None}
    )
    expected = np.array([np.inf, np.nan, 65504], np.float16)
    assert bits(safetensors.numpy.load_file(out)["a"]) == bits(expected)
    with pytest.raises(ValueError, match="float32, bfloat16, float16, or None"):
        ema_optax.safetensors.export(tmp_path / "run", tmp_path / "m", dtype="int8")


def test_a_damaged_leaf(saved: Path, tmp_path: Path):
    """Averaged or not: named with the newest step that is whole; no file is left."""
    for leaf, part in (("enc/kernel", "default/ema_optax"), ("masked", "default")):
        run = shutil.copytree(saved, tmp_path / leaf.replace("/", "_"))
        files = [p for p in (run / "7" / part).glob("d/*") if p.is_file()]
        files += (run / "7" / part).glob("ocdbt.process_0/d/*")
        for file in files:
            data = bytearray(file.read_bytes())
            middle = len(data) // 2
            data[middle] ^= 1
            file.write_bytes(data)
        out = tmp_path / "model.safetensors"
        with pytest.raises(checkpoint.CorruptCheckpointError, match="Step 7 of") as e:
            ema_optax.safetensors.export(run, out)
        assert "pass step=3" in str(e.value)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))


def test_a_file_that_is_there(saved: Path, tmp_path: Path):
    """It stays unless asked; a folder, and a folder that is missing, are refused."""
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ema_optax.safetensors.export(saved, out)
    assert out.read_text() == "mine"
    ema_optax.safetensors.export(saved, out, overwrite=True)
    assert set(safetensors.numpy.load_file(out)) == NAMES
    with pytest.raises(IsADirectoryError, match=r"is a folder.*model\.safetensors"):
        ema_optax.safetensors.export(saved, tmp_path)
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        ema_optax.safetensors.export(saved, tmp_path / "none" / "m.safetensors")
    with pytest.raises(FileNotFoundError, match="is a file"):
        ema_optax.safetensors.export(saved, out / "m.safetensors")


def test_a_write_that_fails(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file that was there stays, and nothing is left beside it."""
    out = tmp_path / "model.safetensors"
    out.write_text("mine")

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        ema_optax.safetensors.export(saved, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "mine"


def test_others_may_read_the_file(saved: Path, tmp_path: Path):
    """Its mode is that of any file; safetensors would keep it from all others."""
    other, out = tmp_path / "other", tmp_path / "model.safetensors"
    other.touch()
    ema_optax.safetensors.export(saved, out)
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It writes what the function does, and tells of it in words and in JSON."""
    out, rename = tmp_path / "model.safetensors", tmp_path / "names.json"
    rename.write_text('{"": "model", "enc": "model.e", "masked": null}')
    command = ["export", str(saved), "--tree", "shadow", "--out", str(out)]
    more = ["--dtype", "bfloat16", "--rename", str(rename)]
    assert cli.main([*command, *more]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Tree:    shadow\nStep:    7\nTensors: 7\n" in printed.out
    assert "Decay:   warmup(decay=0.9, offset=10)\n" in printed.out
    assert str(out) in printed.out
    found = safetensors.numpy.load_file(out)
    assert found["model.e.kernel"].dtype == ml_dtypes.bfloat16
    assert set(found) == {
        f"model.{name}".replace("enc", "e") for name in NAMES - {"masked"}
    }
    assert cli.main([*command, "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["tree"], told["path"]) == (7, "shadow", str(out))
    assert set(told["names"].values()) == NAMES
    assert told["metadata"] == metadata(out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "4"], "no step 4; it has 3, 7"),
        (["--step", "3"], "Pass --tree b"),
        (["--tree", "ema"], "Pass --tree shadow"),
        (["--step", "3", "--tree", "params"], '--rename with {"c": null, "key": null}'),
        (["--out", "there"], "there exists"),
        (["--out", "none/model"], "does not exist. Make it first"),
        (["--rename", "list.json"], "rename maps stored paths to names, got a list"),
        (["--rename", "typo.json"], "The nearest are 'enc'"),
    ],
)
def test_what_the_command_refuses(
    options: list[str],
    says: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Code 1, one line with options instead of arguments, and no file."""
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    Path("list.json").write_text("[1]")
    Path("typo.json").write_text('{"ecn": "x"}')
    before = sorted(tmp_path.iterdir())
    assert cli.main(["export", str(saved), "--out", "new", *options]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("ema-optax export: error: ")
    assert says in line
    assert printed.out == ""
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"enc": "a", "enc": "b"}', "the path 'enc' twice"),
        ('{"enc": ', "cannot read"),
        ("[" * 100_000, "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (None, "No such file"),
    ],
)
def test_a_rename_file_that_is_no_json(
    content: str | bytes | None,
    says: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Code 2, and one line that names the file."""
    file = tmp_path / "names.json"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    command = ["export", str(saved), "--out", str(tmp_path / "m"), "--rename"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, str(file)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert says in line


def test_a_rename_file_writes_nowhere_else(saved: Path, tmp_path: Path):
    """Names are text inside the file, whatever they look like."""
    (tmp_path / "deep").mkdir()
    out = tmp_path / "deep" / "model.safetensors"
    ema_optax.safetensors.export(saved, out, rename={"scale": "../../stolen"})
    assert "../../stolen" in safetensors.numpy.load_file(out)
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "model.safetensors"]


def test_without_safetensors(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The extra that brings it is named, by the function and by the command."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    out = tmp_path / "model.safetensors"
    with pytest.raises(ModuleNotFoundError, match=r"'ema-optax\[safetensors\]'"):
        ema_optax.safetensors.export(saved, out)
    assert cli.main(["export", str(saved), "--out", str(out)]) == 1
    assert capsys.readouterr().err == (
        "'ema-optax export' needs safetensors, which is not installed. "
        "Run: pip install 'ema-optax[safetensors]'\n"
    )


@pytest.mark.long
def test_interrupted(saved: Path, tmp_path: Path):
    """Ctrl-C in the middle of the write: code 130, and nothing is left."""
    code = (
        "import os, signal, sys, safetensors.numpy as n\n"
        "def half(tensors, path, metadata):\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGINT)\n"
        "n.save_file = half\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ema_optax import _cli as cli; sys.exit(cli.main())"
    )
    out = tmp_path / "model.safetensors"
    command = [sys.executable, "-c", code, "export", str(saved), "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert (done.returncode, done.stderr) == (130, "ema-optax: interrupted\n")
    assert not any(tmp_path.iterdir())
