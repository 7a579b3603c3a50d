"""Exports by rules and in folders: shards, their index, several trees, and refusals."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax.interop import Rule, Rules

RNG = np.random.default_rng(0)
PARAMS = {
    "h": {
        "kernel": jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32),
        "bias": jnp.asarray(RNG.normal(size=(3, 5)), jnp.bfloat16),
    },
    "table": jnp.asarray(RNG.normal(size=(50, 4)), jnp.float32),
    "ids": np.arange(7, dtype=np.int64),
    "seen": jnp.asarray(3, jnp.int32),
}
RULES = [
    Rule("h.#.weight", "h/kernel", "l o i -> l i o"),
    Rule("h.#.bias", "h/bias"),
    Rule("wte.weight", "table"),
    Rule("ids", "ids"),
    Rule(None, "seen"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose average is not the params."""
    folder = tmp_path_factory.mktemp("run")
    transform = ema_optax.ema_params(0.5)
    state = transform.init(PARAMS)
    moved = {**PARAMS, "table": PARAMS["table"] + 1}
    updates = dict(moved.items())
    updates["table"] = jnp.ones((50, 4))
    _, state = transform.update(updates, state, PARAMS)
    checkpoint.save(folder, PARAMS, state, step=7)
    return folder


def loaded(folder):
    """What the files of a folder hold, each name once."""
    found = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        tensors = safetensors.numpy.load_file(file)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def metadata(path):
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata()


@pytest.mark.parametrize("most", [1, 100, 250, "0.5KB", "1KB", "5GB", None])
def test_the_rules_backwards_and_forth(run, tmp_path, most):
    """Whatever the shards, the file has each tensor once, and gives the tree again."""
    rules = Rules.of(RULES)
    out = tmp_path / "out"
    done = ema_optax.safetensors.export(
        run, out, tree="params", rules=RULES, max_shard_size=most
    )
    names = safetensors.numpy.load_file(out) if most is None else loaded(out)
    assert {t.name: (t.shape, t.dtype) for t in done.tensors} == {
        name: (array.shape, array.dtype.name) for name, array in names.items()
    }
    moves = rules.to_tree({name: array.shape for name, array in names.items()})
    tree = {path: m([names[s] for s in m.sources]) for path, m in moves.items()}
    expected = {"h/kernel": PARAMS["h"]["kernel"], "h/bias": PARAMS["h"]["bias"]}
    expected |= {"table": PARAMS["table"], "ids": PARAMS["ids"]}
    assert set(tree) == set(expected)
    for path, leaf in expected.items():
        assert tree[path].dtype == leaf.dtype, path
        assert tree[path].tobytes() == np.asarray(leaf).tobytes(), path


def test_an_index_of_shards(run, tmp_path):
    """As transformers and diffusers read it; a file is as large as it may be."""
    out = tmp_path / "out"
    name = "diffusion_pytorch_model"
    done = ema_optax.safetensors.export(
        run, out, rules=RULES, max_shard_size=250, name=name
    )
    index = json.loads((out / f"{name}.safetensors.index.json").read_text())
    sizes = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors = safetensors.numpy.load_file(out / shard)
        assert {n for n, f in index["weight_map"].items() if f == shard} == set(tensors)
        sizes[shard] = sum(array.nbytes for array in tensors.values())
        assert metadata(out / shard) == done.metadata
    # 3 × 80 of kernels; of biases in float32, as shadows are, 3 × 20; 800 of the table,
    # which is more than the bound by itself; and 56 of integers.
    assert list(sizes.values()) == [240, 60, 800, 56]
    assert list(sizes) == [f"{name}-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    assert index["metadata"]["total_size"] == sum(sizes.values()) == done.bytes
    assert index["metadata"]["tree"] == "shadow"
    assert done.metadata["format"] == "pt"
    assert files(out) == [*sizes, f"{name}.safetensors.index.json"]
    assert done.names == {"table": "wte.weight", "ids": "ids"}


def test_what_fits_one_file_is_one(run, tmp_path):
    """Without an index, by the name that libraries look for."""
    out = tmp_path / "out"
    done = ema_optax.safetensors.export(run, out, max_shard_size="1MB")
    assert files(out) == ["model.safetensors"]
    assert {t.file for t in done.tensors} == {"model.safetensors"}
    assert metadata(out / "model.safetensors")["format"] == "flax"


def test_raw_and_average_side_by_side(run, tmp_path):
    """A folder each; metadata say which is which, and so do the numbers."""
    out = tmp_path / "out"
    raw, average = ema_optax.safetensors.export(
        run, out, tree=("params", "shadow"), rules=RULES
    )
    assert files(out) == ["params/model.safetensors", "shadow/model.safetensors"]
    assert (raw.path, average.path) == (out / "params", out / "shadow")
    for tree in ("params", "shadow"):
        assert metadata(out / tree / "model.safetensors")["tree"] == tree
        expected = np.asarray(checkpoint.restore(run, tree)["table"])
        np.testing.assert_array_equal(loaded(out / tree)["wte.weight"], expected)
    assert "decay" in average.metadata
    assert "decay" not in raw.metadata


def test_a_dtype_and_rules(run, tmp_path):
    """Rounded before it is taken apart; integers stay."""
    out = tmp_path / "out.safetensors"
    ema_optax.safetensors.export(
        run, out, tree="params", rules=RULES, dtype=jnp.bfloat16
    )
    names = safetensors.numpy.load_file(out)
    expected = np.asarray(PARAMS["h"]["kernel"]).astype(ml_dtypes.bfloat16)
    for at in range(3):
        assert names[f"h.{at}.weight"].tobytes() == expected[at].T.tobytes()
    assert names["ids"].dtype == np.int64


def test_a_dry_run(run, tmp_path, capsys):
    """Tells what would be, and neither reads values nor writes."""
    rules = tmp_path / "rules.json"
    rules.write_text(Rules.of(RULES).to_json())
    out = tmp_path / "out"
    dry = ema_optax.safetensors.export(
        run, out, rules=RULES, max_shard_size=250, dry_run=True
    )
    assert files(tmp_path) == ["rules.json"]
    assert dry == ema_optax.safetensors.export(
        run, out, rules=RULES, max_shard_size=250
    )
    command = ["export", str(run), "--out", str(tmp_path / "b"), "--dry-run"]
    command += ["--rules", str(rules), "--max-shard-size", "250", "--tree", "params"]
    assert cli.main([*command, "--tree", "shadow"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "b").exists()
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    row = "h.1.weight h/kernel l i o -> l o i; [1] float32 5×4 model-00001-of-00004"
    assert sum(line.startswith(row) for line in rows) == 2
    assert any("Would be:" in line for line in rows)
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"][0]["paths"] == ["h/kernel"]


def test_each_leaf_is_read_once(run, tmp_path, monkeypatch):
    """Though a stack of layers is many tensors; and how far it is, is told."""
    read, told = [], []
    original = checkpoint.StoredTree.read

    def counted(self, path, index):
        read.append(path)
        return original(self, path, index)

    monkeypatch.setattr(checkpoint.StoredTree, "read", counted)
    ema_optax.safetensors.export(
        run, tmp_path / "out", rules=RULES, progress=lambda *at: told.append(at)
    )
    assert sorted(read) == ["h/bias", "h/kernel", "table"]
    assert told == [(k, 8) for k in range(1, 9)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rules": RULES[:-1]}, r"1 of 5 paths: 'seen'.*Rule\(None, \"seen\"\)"),
        (
            {"rules": [*RULES, Rule("x", "tabel")]},
            "fits no path. The nearest are 'tabl",
        ),
        ({"rules": RULES, "rename": {}}, "rename and rules both say"),
        ({"rules": [Rule(None, "**")]}, "rules leave out all"),
        (
            {"rules": [Rule("__metadata__", "ids"), Rule(None, "**")]},
            "keeps for itself",
        ),
        ({"rules": [Rule("a\nb", "ids"), Rule(None, "**")]}, "cannot be printed"),
        ({"rules": [Rule("w", ("h/kernel", "h/bias"))]}, "1 of 5|3 of 5"),
        (
            {"rules": [Rule("w", ("ids", "h/bias")), Rule(None, "**")]},
            "'ids' ↔|differs|axis",
        ),
        ({"rules": "rules.json"}, "rules is a list of rules"),
        ({"max_shard_size": "5 gigs"}, "is a size such as '5GB'"),
        ({"max_shard_size": "1.5"}, "is a size such as '5GB'"),
        ({"max_shard_size": 0}, "≥ 1"),
        ({"max_shard_size": True}, "≥ 1"),
        ({"max_shard_size": 1, "name": "a/b"}, "begins the names of files"),
        ({"max_shard_size": 1, "name": ""}, "begins the names of files"),
        ({"name": "model"}, "out is a file here"),
        ({"tree": ()}, "or several of them"),
        ({"tree": ("shadow", "shadow")}, "twice"),
        ({"tree": ("shadow", "ema")}, "no tree 'ema'|ema"),
        ({"tree": ("shadow", 3)}, "tree is a text"),
    ],
)
def test_what_is_refused(run, tmp_path, options, words):
    """Before anything is written."""
    with pytest.raises((TypeError, ValueError), match=words):
        ema_optax.safetensors.export(run, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_arrays_of_several_dtypes_are_not_joined(tmp_path):
    """Unless all are rounded to one."""
    params = {"q": jnp.ones(2), "k": jnp.ones(3, jnp.bfloat16)}
    state = ema_optax.ema_params(0.5).init(params)
    checkpoint.save(tmp_path / "run", params, state)
    rules = [Rule("qk", ("q", "k"), lengths=(2, 3))]
    options = {"tree": "params", "rules": rules}
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="'q' is float32, 'k' is bfloat16"):
        ema_optax.safetensors.export(tmp_path / "run", out, **options)
    ema_optax.safetensors.export(tmp_path / "run", out, dtype="float32", **options)
    np.testing.assert_array_equal(safetensors.numpy.load_file(out)["qk"], np.ones(5))


def test_a_key_is_left_out_by_a_rule(tmp_path):
    """The error has the rule that does it."""
    import jax

    params = {"w": jnp.ones(2), "key": jax.random.key(0)}
    state = ema_optax.ema_params(0.5).init({"w": params["w"]})
    checkpoint.save(tmp_path / "run", params, state)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r'Rule\(None, "key"\)'):
        ema_optax.safetensors.export(tmp_path / "run", out, rules=[Rule("**", "**")])
    rules = [Rule(None, "key"), Rule("**", "**")]
    ema_optax.safetensors.export(tmp_path / "run", out, rules=rules)
    assert set(safetensors.numpy.load_file(out)) == {"w"}


def test_a_folder_that_is_there(run, tmp_path):
    """It stays unless asked, and for sure where it holds what is not an export's."""
    out = tmp_path / "out"
    ema_optax.safetensors.export(run, out, max_shard_size=250)
    before = files(out)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ema_optax.safetensors.export(run, out, max_shard_size="1MB")
    assert files(out) == before
    ema_optax.safetensors.export(run, out, max_shard_size="1MB", overwrite=True)
    assert files(out) == ["model.safetensors"]
    (out / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"also holds config\.json"):
        ema_optax.safetensors.export(run, out, max_shard_size=250, overwrite=True)
    assert files(out) == ["config.json", "model.safetensors"]
    with pytest.raises(NotADirectoryError, match="is a file"):
        ema_optax.safetensors.export(run, out / "config.json", max_shard_size=1)
    with pytest.raises(IsADirectoryError, match="max_shard_size"):
        ema_optax.safetensors.export(run, out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full(run, tmp_path, monkeypatch):
    """Said before, where it is known; else nothing is left of the shards before."""
    import shutil

    out = tmp_path / "out"
    tiny = type("Usage", (), {"free": 1000, "total": 2000})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: tiny)
        with pytest.raises(OSError, match=r"has 0\.001 MB left"):
            ema_optax.safetensors.export(run, out, max_shard_size=250)
    original = safetensors.numpy.save_file
    written = []

    def full(tensors, path, metadata):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        ema_optax.safetensors.export(run, out, max_shard_size=250)
    assert written
    assert not list(tmp_path.iterdir())


def test_a_value_that_is_too_large(tmp_path):
    """In the last shard: none of the others is left."""
    params = {"a": jnp.ones(200), "z": jnp.array([1e6])}
    state = ema_optax.ema_params(0.5).init(params)
    checkpoint.save(tmp_path / "run", params, state)
    with pytest.raises(OverflowError, match="'z' does not fit float16"):
        ema_optax.safetensors.export(
            tmp_path / "run", tmp_path / "out", dtype="float16", max_shard_size=100
        )
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.long
def test_a_killed_export(run, tmp_path):
    """Leaves no folder that loads, and the next one works."""
    code = (
        "import os, sys, safetensors.numpy as n\n"
        "original, seen = n.save_file, []\n"
        "def save_file(tensors, path, metadata):\n"
        "    original(tensors, path, metadata=metadata)\n"
        "    seen.append(path)\n"
        "    if len(seen) == 3: os.kill(os.getpid(), 9)\n"
        "n.save_file = save_file\n"
        "from ema_optax import _cli as cli; sys.exit(cli.main())"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, "export", str(run), "--out", str(out)]
    command += ["--max-shard-size", "250"]
    done = subprocess.run(command, capture_output=True, timeout=120, env=os.environ)
    assert done.returncode == -9
    assert not out.exists()
    assert not list(tmp_path.rglob("*.index.json"))
    ema_optax.safetensors.export(run, out, max_shard_size=250)
    assert len(loaded(out)) == 5


def test_what_the_command_refuses(run, tmp_path, capsys):
    """One line, with options for arguments."""
    rules = tmp_path / "rules.json"
    command = ["export", str(run), "--out", str(tmp_path / "out")]
    rules.write_text('[{"name": "w", "path": "tabel"}, {"name": null, "path": "**"}]')
    assert cli.main([*command, "--rules", str(rules)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "rules[0] has the path 'tabel', which fits no path. The nearest" in line
    assert cli.main([*command, "--name", "x"]) == 1
    assert "pass --max-shard-size 5GB" in capsys.readouterr().err
    rules.write_text('[{"name": "w"}]')
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--rules", str(rules)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs both name and path" in line
    assert not (tmp_path / "out").exists()
