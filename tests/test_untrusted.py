"""Checkpoints and name files from a stranger: no code, no file elsewhere, no flood.

Whoever writes a checkpoint can seal its manifest, so a stranger's lies are well sealed
here. Each must be an error of one sentence, from each reader, in bounded memory.
"""

import ast
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax._checkpoint import manifest, sealed, untrusted
from tests import launch
from tests.programs.untrusted_reader import PARAMS, TRANSFORM, readers

PACKAGE = pathlib.Path(ema_optax.__file__).parent

pytestmark = pytest.mark.filterwarnings(
    # After a read that failed, callbacks of TensorStore find their event loop closed.
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one step, after one fold; not to be touched."""
    root = tmp_path_factory.mktemp("whole") / "run"
    state = TRANSFORM.init(PARAMS)
    updates = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = TRANSFORM.update(updates, state, PARAMS)
    checkpoint.save(root, PARAMS, state, step=1)
    return root


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, for a stranger to change."""
    return shutil.copytree(whole, tmp_path / "run")


def item_of(run):
    return epath.Path(run / "1" / "default")


def reseal(run, change):
    """Has `change` edit the manifest, or return another one, and seals it again."""
    path = manifest.manifest_path(item_of(run))
    content = sealed.read_sealed(path)
    changed = change(content)
    sealed.write_sealed(path, content if changed is None else changed)


def everything_refuses(run, *, but=()):
    """Each reader raises a ValueError (a CorruptCheckpointError is one) with a text."""
    for name, call in readers(run):
        if name in but:
            call()
            continue
        with pytest.raises(ValueError, match=r"[a-z]{3}") as caught:
            call()
        assert len(str(caught.value)) < 1500, name


def _leaf(**fields):
    def change(content):
        for tree in content["trees"].values():
            for leaf in tree["leaves"].values():
                leaf.update(fields)

    return change


def _average(**fields):
    return lambda content: content["averages"]["shadow"].update(fields)


def _manifest(**fields):
    return lambda content: content.update(fields)


def _tree(**fields):
    return lambda content: content["trees"]["params"].update(fields)


def _path(path):
    """A leaf of each tree under another path."""

    def change(content):
        for tree in content["trees"].values():
            if "w" in tree["leaves"]:
                tree["leaves"][path] = tree["leaves"].pop("w")
                tree["structure"] = {**tree["structure"], "w": path}

    return change


def _key(key):
    """A leaf of each tree under another key; its path says nothing of it."""

    def change(content):
        for tree in content["trees"].values():
            if "w" in tree["leaves"]:
                tree["structure"][key] = tree["structure"].pop("w")

    return change


def _named(name):
    """The shadow under another name."""

    def change(content):
        for part in ("trees", "averages"):
            content[part][name] = content[part].pop("shadow")

    return change


def _nested(depth, innermost):
    node = innermost
    for _ in range(depth):
        node = {"a": node}
    return node


def _leaves(number):
    leaf = {"shape": [1], "dtype": "float32", "kind": "jax"}
    paths = [str(n) for n in range(number)]
    return {"structure": paths, "leaves": dict.fromkeys(paths, leaf)}


WRONG = {
    # Shapes.
    "more elements than any disk": _leaf(shape=[10**18]),
    "many times many": _leaf(shape=[2**31] * 64),
    "an integer of 300 digits": _leaf(shape=[10**300]),
    "a negative length": _leaf(shape=[-1]),
    "lengths that cancel": _leaf(shape=[-4, -4]),
    "a fraction": _leaf(shape=[1.5]),
    "NaN": _leaf(shape=[float("nan")]),
    "infinity": _leaf(shape=[float("inf")]),
    "a bool": _leaf(shape=[True]),
    "a text as a shape": _leaf(shape="44"),
    "no list": _leaf(shape=4),
    "a nested shape": _leaf(shape=[[4], [4]]),
    "a thousand dimensions": _leaf(shape=[1] * 1000),
    # Dtypes and kinds.
    "objects, which are pickled": _leaf(dtype="object"),
    "objects, in short": _leaf(dtype="O"),
    "a void of any size": _leaf(dtype="V1000000000"),
    "texts": _leaf(dtype="<U1000000000"),
    "a struct": _leaf(dtype="f4,(1000000,)f4"),
    "a date": _leaf(dtype="datetime64[ns]"),
    "a dtype that is none": _leaf(dtype="float31"),
    "an expression": _leaf(dtype="__import__('os').system('true')"),
    "a number as a dtype": _leaf(dtype=4),
    "a kind that is none": _leaf(kind="pickle"),
    "a list as a kind": _leaf(kind=["jax"]),
    # Paths, keys and names.
    "a path upwards": _path("../../../evil"),
    "a path upwards in the middle": _path("a/../../evil"),
    "an absolute path": _path("/tmp/evil"),
    "a NUL": _path("a\0b"),
    "a path of a million characters": _path("a" * 10**6),
    "a path of ten thousand keys": _path("a/" * 2000 + "b"),
    "a key upwards": _key(".."),
    "a key of an absolute path": _key("/etc"),
    "a tree named upwards": _named("shadow/../../evil"),
    "a tree named absolutely": _named("/evil"),
    # Structures.
    "a structure without end": _tree(structure=_nested(900, "w")),
    "a structure of numbers": _tree(structure={"w": 7}),
    "a structure that lacks a leaf": _tree(structure={"w": "w"}),
    "a structure with one leaf twice": _tree(structure={"w": "w", "b": "b", "c": "w"}),
    "a structure of leaves that are not there": _tree(structure={"w": "x", "b": "b"}),
    "leaves in a list": _tree(leaves=[1, 2]),
    "leaves that are texts": _tree(leaves={"w": "w", "b": "b"}),
    "no leaves at all": _tree(leaves=None),
    # The rest.
    "trees in a list": _manifest(trees=[]),
    "a tree of text": _manifest(trees={"params": "all"}),
    "averages in a list": _manifest(averages=[]),
    "an average of no tree": _manifest(averages={"shadow/x": {}}),
    "no process": _manifest(processes=0),
    "minus one process": _manifest(processes=-1),
    "half a process": _manifest(processes=0.5),
    "true processes": _manifest(processes=True),
    "a format of text": _manifest(format="1"),
    "a format that is true": _manifest(format=True),
    "a newer format": _manifest(format=10**300),
    "a version for the shell": _manifest(version="1'; touch evil; '", format=99),
    "extra without end": _manifest(extra=_nested(900, 1)),
    "a list": lambda content: [content],
    "null": lambda content: "null",
    "a decay of text": _average(decay="__import__('os')"),
    "a decay of no kind": _average(decay={"kind": ["power"]}),
    "a decay that is a callable": _average(decay={"kind": "schedule", "function": "f"}),
    "a decay with an argument more": _average(
        decay={"kind": "power", "exponent": 1, "a": 2}
    ),
    "a decay of NaN": _average(decay={"kind": "power", "exponent": float("nan")}),
    "a decay of 300 digits": _average(decay={"kind": "power", "exponent": 10**309}),
    "a decay without end": _average(
        decay=functools.reduce(
            lambda inner, _: {"kind": "start_after", "decay": inner, "step": 1},
            range(300),
            {"kind": "power", "exponent": 1},
        )
    ),
    "a decay around a number": _average(
        decay={"kind": "start_after", "decay": 0.9, "step": 1}
    ),
    "a fold every 0": _average(every=0),
    "a fold every text": _average(every="1"),
    "a count of text": _average(count="1"),
    "a count below 0": _average(count=-1),
    "a count of 300 digits": _average(count=10**300),
    "bema that is none": _average(bema=[1]),
}

# What only a decay says, and readers that do not look at it may pass over.
_DECAYS = {
    name: ("restore", "like", "unverified", "verify", "stored")
    for name in WRONG
    if name.startswith("a decay") and name != "a decay of text"
}
_DECAYS["a decay without end"] = ()


@pytest.mark.parametrize("name", WRONG)
def test_a_well_sealed_lie_is_refused_by_every_reader(run, name):
    """By name of what is wrong; no KeyError, RecursionError or MemoryError."""
    reseal(run, WRONG[name])
    started = time.monotonic()
    everything_refuses(run, but=_DECAYS.get(name, ()))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", list(WRONG)[::4])
def test_commands_say_it_in_one_line(run, name, tmp_path, capsys):
    reseal(run, WRONG[name])
    out = str(tmp_path / "out")
    for command in (
        ["inspect", str(run)],
        ["inspect", str(run), "--json", "--verify"],
        ["export", str(run), "--out", out],
        ["reconstruct", str(run), "--width", "0.1", "--out", out],
    ):
        if name in _DECAYS and command[0] == "export":
            continue
        assert cli.main(command) == 1
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"ema-optax {command[0]}: error: ")
        assert told.err.count("\n") == 1
    assert not os.path.exists(out)


def test_the_untouched_run_is_read(whole, tmp_path):
    """What the attacks change is all that is wrong with it."""
    run = shutil.copytree(whole, tmp_path / "run")
    reseal(run, lambda content: None)
    for _, call in readers(run):
        call()


def test_a_version_is_not_told_unless_it_is_one(run):
    """The advice to install it would be a command of the stranger's."""
    reseal(run, WRONG["a version for the shell"])
    with pytest.raises(ValueError, match="'version' is no version") as caught:
        checkpoint.describe(run)
    assert "pip install" not in str(caught.value)


# --- Checksums ---

SUMS = {
    "a list": lambda sums: [1],
    "another tree": lambda sums: {**sums, "../x": {}},
    "a leaf of text": lambda sums: {**sums, "shadow": {"w": "abc"}},
    "leaves in a list": lambda sums: {**sums, "shadow": [1]},
    "a piece of three": lambda sums: {**sums, "shadow": {"w": [[[], "0", 1]]}},
    "bounds below 0": lambda sums: {
        **sums,
        "shadow": {"w": [[[[-4, 0], [0, 4]], "0"]]},
    },
    "bounds reversed": lambda sums: {
        **sums,
        "shadow": {"w": [[[[4, 0], [4, 0]], "0"]]},
    },
    "bounds beyond the end": lambda sums: {
        **sums,
        "shadow": {"w": [[[[0, 16], [0, 1]], "0"]]},
    },
    "bounds of 300 digits": lambda sums: {
        **sums,
        "shadow": {"w": [[[[0, 10**300], [0, 4]], "0"]]},
    },
    "bounds of fractions": lambda sums: {
        **sums,
        "shadow": {"w": [[[[0.0, 4.0], [0.0, 4.0]], "0"]]},
    },
    "bounds of more dimensions": lambda sums: {
        **sums,
        "shadow": {"w": [[[[0, 4], [0, 4], [0, 1]], "0"]]},
    },
    "bounds of fewer": lambda sums: {**sums, "shadow": {"w": [[[[0, 16]], "0"]]}},
    "a checksum of a number": lambda sums: {
        **sums,
        "shadow": {"w": [[[[0, 4], [0, 4]], 7]]},
    },
    "no checksum at all": lambda sums: {**sums, "shadow": {}},
    "nested without end": lambda sums: {**sums, "shadow": {"w": _nested(900, 1)}},
    "two halves and one more": lambda sums: {
        **sums,
        "shadow": {"w": [[[[0, 2], [0, 4]], "0"]] * 10**5},
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", SUMS)
def test_checksums_that_are_none(run, name):
    path = manifest.checksums_path(item_of(run), 0)
    sealed.write_sealed(path, SUMS[name](sealed.read_sealed(path)))
    unread = ("describe", "unverified")
    everything_refuses(run, but=unread)


def test_checksums_of_a_billion_processes(run):
    """The first that is missing ends it."""
    reseal(run, _manifest(processes=10**9))
    started = time.monotonic()
    everything_refuses(run, but=("describe", "unverified"))
    assert time.monotonic() - started < 30


# --- Sizes: memory and time ---


def _claims(run, shape):
    reseal(run, _leaf(shape=shape))


def _array(run, tree, leaf, **metadata):
    """Rewrites the zarr metadata of an array in place, as whoever wrote it could."""
    kv = _store(run, tree, leaf)
    found = json.loads(kv.read(".zarray").result().value)
    kv.write(".zarray", json.dumps(found | metadata)).result()


def _store(run, tree, leaf):
    folder = item_of(run) if tree == "params" else item_of(run) / manifest.FOLDER
    name = leaf if tree == "params" else f"{tree}.{leaf}"
    store = {"driver": "file", "path": f"{folder}/"}
    spec = {"driver": "ocdbt", "base": store, "path": f"{name}/"}
    return ts.KvStore.open(spec).result()


def _arrays(run, **metadata):
    for tree in ("params", "shadow"):
        _array(run, tree, "w", **metadata)


def _bomb(run, **metadata):
    """512 MiB of zeros in half a MiB, as the one chunk of each array."""
    data = zlib.compress(bytes(2**29), 1)
    for tree in ("params", "shadow"):
        _array(run, tree, "w", compressor={"id": "zlib", "level": 1}, **metadata)
        _store(run, tree, "w").write("0.0", data).result()


FLOODS = {
    "a bomb": lambda run: _bomb(run, chunks=[2**14, 2**13]),
    "a bomb in a chunk of the right size": _bomb,
    # A tenth of what a manifest may claim, and more memory than there is.
    "claimed": lambda run: _claims(run, [10**16]),
    "claimed, just above the files": lambda run: _claims(run, [2**25]),
    # The manifest is honest; the store has no chunks but the first, and 0 elsewhere.
    "stored": lambda run: _arrays(run, shape=[2**20, 2**20], fill_value=0),
    "chunks": lambda run: _arrays(run, chunks=[2**20, 2**20]),
    # Both say so.
    "both": lambda run: (
        _claims(run, [2**20, 2**20]),
        _arrays(run, shape=[2**20, 2**20], fill_value=0),
    ),
    "a file of JSON without end": lambda run: _sparse(
        manifest.manifest_path(item_of(run)), 2**40
    ),
    "checksums without end": lambda run: _sparse(
        manifest.checksums_path(item_of(run), 0), 2**40
    ),
    "a million leaves": lambda run: reseal_unbounded(
        run, lambda content: content["trees"].update(params=_leaves(10**6))
    ),
}
_HARMLESS = {  # where the manifest is honest, or only claims
    "claimed": {"describe"},
    "claimed, just above the files": {"describe"},
    "stored": {"describe"},
    "chunks": {"describe"},
    "both": {"describe"},
    "a bomb": {"describe"},
    "a bomb in a chunk of the right size": {"describe"},
    "checksums without end": {"describe", "unverified"},
}


def _sparse(path, size):
    os.truncate(path, size)


def reseal_unbounded(run, change):
    """Like `reseal`, of more than this library would write."""
    path = manifest.manifest_path(item_of(run))
    content = sealed.read_sealed(path)
    change(content)
    path.write_text(json.dumps({"xxh3": sealed.seal(content), "content": content}))


@pytest.mark.once
def test_floods_in_bounded_memory(whole, tmp_path):
    """No reader takes 1 GiB of addresses, nor 300 MiB of memory, for any of them.

    In a process of its own: it has RLIMIT_AS, and where that were not kept a flood of
    terabytes would end the tests.
    """
    for number, flood in enumerate(FLOODS.values()):
        flood(shutil.copytree(whole, tmp_path / str(number)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.programs.untrusted_reader"),
            *("1024", str(whole)),
            *(str(tmp_path / str(number)) for number in range(len(FLOODS))),
        ],
        env=launch.on_cpu(),  # a GPU's driver takes addresses by the terabyte
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, total = map(json.loads, done.stdout.splitlines())
    names = list(FLOODS)
    for folder, reader, kinds, text, seconds in lines:
        name = names[int(pathlib.Path(folder).name)]
        what = f"{reader} of {name}: {kinds and kinds[0]} {text}"
        if reader in _HARMLESS.get(name, ()):
            assert kinds is None, what
        else:
            assert kinds, what
            assert "ValueError" in kinds, what
        assert seconds < 30, what
    assert len(lines) == 9 * len(FLOODS)
    assert total["grown_mebibytes"] < 300


@pytest.mark.parametrize(
    ("metadata", "wrong"),
    [
        ({"shape": [4, 5]}, r"it is \(4, 5\), its manifest says \[4, 4\]"),
        ({"chunks": [4, 2**40]}, "in chunks of"),
        ({"compressor": {"id": "zlib", "level": 1}}, "it is compressed"),
        ({"filters": [{"id": "delta"}]}, "it is compressed"),
        ({"dtype": "<f8"}, "its manifest says float32"),
        ({"dtype": [["f", "<f4"]]}, "its manifest says float32"),
        ({"dtype": "<no such"}, "it is of <no such, its manifest says float32"),
        ({"shape": "44"}, "an array of no shape"),
        ({"shape": [4, -4]}, "an array of no shape"),
    ],
)
def test_arrays_are_held_against_the_manifest(run, metadata, wrong):
    """Before TensorStore makes room for them."""
    _arrays(run, **metadata)
    for read in (
        lambda: checkpoint.verify(run),
        lambda: checkpoint.restore(run, "shadow", PARAMS, verify=False),
    ):
        with pytest.raises(checkpoint.CorruptCheckpointError, match=wrong):
            read()


def test_the_memory_is_really_bounded():
    """The reader's limit has teeth: an array beyond it cannot be made there."""
    code = (
        "import resource, numpy as np; resource.setrlimit(resource.RLIMIT_AS, "
        "(2**30, 2**30)); np.ones(2**28)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MemoryError" in done.stderr


@pytest.mark.long
def test_as_many_leaves_as_are_written_are_read(tmp_path):
    """Where the bounds are is no matter of taste: what we write is within them."""
    content = {"trees": {"params": _leaves(50_000)}}
    path = epath.Path(tmp_path / "m.json")
    sealed.write_sealed(path, content)
    assert sealed.read_sealed(path) == content
    with pytest.raises(ValueError, match=f"at most {untrusted.LIMIT:,} are read"):
        sealed.write_sealed(path, {"extra": "x" * untrusted.LIMIT})


# --- Files that are none ---


def _replace(path, kind, tmp_path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "not there")


@pytest.mark.parametrize(
    "kind",
    ["pipe", "folder", "link to a device", "link to itself", "link to nothing"],
)
@pytest.mark.parametrize(
    "where",
    [
        "ema_optax/manifest.json",
        "ema_optax/checksums/0.json",
        "_METADATA",
        "manifest.ocdbt",
        "ema_optax/_METADATA",
        "ema_optax/manifest.ocdbt",
    ],
)
def test_what_is_no_file_is_not_waited_for(run, where, kind, tmp_path):
    """A pipe would never begin, and /dev/zero never end."""
    _replace(run / "1" / "default" / where, kind, tmp_path)
    errors = {}
    for name, call in readers(run):
        with alarm(20):
            try:
                call()
            except (ValueError, OSError) as error:
                errors[name] = str(error)
    # Checksums are not read by all; what Orbax keeps beside the shadow, or of the
    # params, not by all either.
    expected = {"verify"}
    if "manifest.json" in where:
        expected = {name for name, _ in readers(run)}
    assert expected <= set(errors), errors


class Hangs(BaseException):
    """No TimeoutError: that is an OSError, which readers handle."""


@contextlib.contextmanager
def alarm(seconds):
    """Interrupts what waits for ever, where Python can."""

    def ring(number, frame):
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_link_to_a_folder_above(run):
    """It would be walked in for ever."""
    (run / "1" / "default" / "d" / "up").symlink_to(run)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="link to a folder"):
        checkpoint.verify(run)


def test_a_run_behind_links_is_read(whole, tmp_path):
    """Links to what is there are common, and harmless: of folders above, and files."""
    run = shutil.copytree(whole, tmp_path / "elsewhere")
    for path in [p for p in (run / "1" / "default").rglob("*") if p.is_file()]:
        blob = tmp_path / f"blob-{len(list(tmp_path.iterdir()))}"
        shutil.move(path, blob)
        path.symlink_to(blob)
    (tmp_path / "run").symlink_to(run)
    checkpoint.verify(tmp_path / "run")
    checkpoint.restore(tmp_path / "run", "shadow", PARAMS)


# --- Where results go ---


def _files_in(folder):
    return {str(path) for path in folder.rglob("*") if not path.is_dir()}


def test_export_writes_its_file_alone(run, tmp_path):
    """Whatever a stranger's file of names calls a tensor, it stays inside the file."""
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"w": "../../evil", "b": "/tmp/evil"}))
    before = _files_in(tmp_path)
    out = tmp_path / "model.safetensors"
    arguments = ["export", str(run), "--out", str(out), "--rename", str(names)]
    assert cli.main(arguments) == 0
    assert _files_in(tmp_path) - before == {str(out)}
    import safetensors.numpy

    assert set(safetensors.numpy.load_file(out)) == {"../../evil", "/tmp/evil"}


def test_export_replaces_a_link_and_not_what_it_leads_to(run, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "model.safetensors"
    victim.write_text("untouched")
    out.symlink_to(victim)
    with pytest.raises(FileExistsError):
        ema_optax.safetensors.export(run, out)
    ema_optax.safetensors.export(run, out, overwrite=True)
    assert victim.read_text() == "untouched"
    assert not out.is_symlink()


def test_reconstruct_writes_into_out_alone(run, tmp_path):
    """Steps and widths name its folders; nothing that the checkpoint says does."""
    before = _files_in(tmp_path)
    out = tmp_path / "averages"
    arguments = ["reconstruct", str(run), "--width", "0.1", "--out", str(out)]
    assert cli.main(arguments) == 0
    written = _files_in(tmp_path) - before
    assert written
    assert all(path.startswith(f"{out}/width-0.1/1/") for path in written)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[" * 100_000, "cannot read"),
        ('{"a": ' * 100_000, "cannot read"),
        ('{"w": 1}', "both text"),
        ('{"w": ["x"]}', "both text"),
        ('{"w": "a", "w": "b"}', "twice"),
        ("[]", "rename maps stored paths to names, got a list"),
        ('{"w": "a\\u0000b"}', "cannot be printed"),
        ('{"w": "__metadata__"}', "keeps for itself"),
        ('{"nowhere": "x"}', "no stored path"),
        (json.dumps({"x" * 10**6: "y"}), "no stored path"),
        (json.dumps({"w": "x" * 10**6}), "1,000,000 characters"),
        (json.dumps({str(n): "x" for n in range(300_000)}), "no stored path"),
        ('{"w": 1' + "0" * 5000 + "}", "cannot read"),
        ("x" * (2**24 + 1), "more than"),
    ],
)
def test_names_from_a_stranger(run, tmp_path, capsys, text, wrong):
    """One line, soon, and no file: whatever is in the file of names."""
    names, out = tmp_path / "names.json", tmp_path / "model.safetensors"
    names.write_text(text)
    started = time.monotonic()
    try:
        code = cli.main(["export", str(run), "--out", str(out), "--rename", str(names)])
    except SystemExit as error:  # of arguments that are wrong
        code = error.code
    assert code in (1, 2)
    told = capsys.readouterr().err
    assert wrong in told
    assert told.count("\n") == 1
    assert len(told) < 2000
    assert not out.exists()
    assert time.monotonic() - started < 20


def test_a_leaf_that_is_a_folder_of_leaves(tmp_path):
    """Keys with slashes, as Haiku's, can make one path the beginning of another."""
    params = {"a": jnp.ones(2), "a/b": jnp.ones(2)}
    state = ema_optax.ema_params(0.9).init(params)
    checkpoint.save(tmp_path, params, state)
    with pytest.raises(ValueError, match="the beginning of other paths"):
        checkpoint.restore(tmp_path)
    got = checkpoint.restore(tmp_path, like=params)
    np.testing.assert_array_equal(got["a/b"], np.ones(2))


# --- What is refused at reading is refused at saving ---


@pytest.mark.parametrize(
    "key", ["..", "a/../b", "/a", "a\0b", "a" * 5000, "a/" * 200 + "b"]
)
def test_what_would_not_be_read_is_not_saved(tmp_path, key):
    params = {key: jnp.ones(2)}
    state = ema_optax.ema_params(0.9).init(params)
    with pytest.raises(ValueError, match="Rename its keys"):
        checkpoint.save(tmp_path / "run", params, state)
    assert not (tmp_path / "run" / "0").exists()


def test_extra_as_deep_as_is_read(tmp_path):
    params = {"w": jnp.ones(2)}
    state = ema_optax.ema_params(0.9).init(params)
    deep = _nested(untrusted.DEPTH, 1)
    checkpoint.save(tmp_path, params, state, extra=deep)
    assert checkpoint.describe(tmp_path).extra == deep
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    with pytest.raises(TypeError, match="nested more than"):
        checkpoint.save(tmp_path, params, state, step=1, extra=_nested(101, 1))


def test_a_tree_as_deep_as_is_read(tmp_path):
    """99 dicts: Orbax and we go as deep, in and out."""
    params = _nested(99, jnp.arange(3.0))
    state = ema_optax.ema_params(0.9).init(params)
    checkpoint.save(tmp_path, params, state)
    got = checkpoint.restore(tmp_path, "shadow", like=params)
    np.testing.assert_array_equal(*map(jax.tree.leaves, (got, params)))


@pytest.mark.long
def test_small_leaves_that_compress_are_not_too_many(tmp_path):
    """OCDBT keeps zeros of less than 1 kB in next to nothing: no bomb of ours."""
    params = {str(n): jnp.zeros(250) for n in range(300)}
    state = ema_optax.ema_params(0.9).init(params)
    checkpoint.save(tmp_path, params, state)
    item = epath.Path(tmp_path / "0" / "default")
    for folder in (item, item / manifest.FOLDER):
        size = sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*"))
        assert 8 * size > 300 * 1000  # an eighth of what is allowed
    checkpoint.verify(tmp_path)


# --- No code ---

FORBIDDEN = {
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "runpy",
    "ctypes",
    "subprocess",
}


def _sources():
    return [(path, ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")]


@pytest.mark.long
def test_nothing_that_runs_code_is_imported_or_called():
    """No pickle and its kin, no eval, exec, compile, __import__ or os.system."""
    for path, tree in _sources():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {n.partition(".")[0] for n in names} & FORBIDDEN, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                wrong = ("eval", "exec", "compile", "__import__", "os.system")
                assert called not in wrong, path
                assert called not in ("np.load", "numpy.load", "np.fromfile"), path
                for keyword in node.keywords:
                    if keyword.arg == "allow_pickle":
                        assert ast.unparse(keyword.value) == "False", path


@pytest.mark.long
def test_modules_are_imported_by_names_that_are_ours():
    """`importlib.import_module` takes names of ours, but for a user's own evaluation.

    That one is named on a command line, and by nothing that is read.
    """
    calls = sorted(
        (path.name, ast.unparse(node))
        for path, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func)
    )
    assert calls == [
        ("__init__.py", "importlib.import_module(f'{__name__}.{name}')"),
        ("evaluations.py", "importlib.import_module(name)"),
        ("ingredients.py", "importlib.import_module('ema_optax.checkpoint')"),
    ]


def test_reading_runs_no_code_of_a_pickle(run):
    """A store that claims objects, with a pickle as its data, is refused unread."""
    _arrays(run, dtype="|O", filters=[{"id": "pickle"}])
    reseal(run, _leaf(dtype="object"))
    everything_refuses(run)
