"""Checkpoints in a bucket: the bits of a disk, in few requests, and told truly."""

import collections
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from orbax.checkpoint import v1

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint, reconstruction
from ema_optax._checkpoint import opening, storage
from tests import bucket as buckets

if importlib.util.find_spec("gcsfs") is None or buckets.binary() is None:
    pytest.skip(
        "needs ema-optax[gcs] and a server; a stage of .ci/run has them",
        allow_module_level=True,
    )
# gcsfs and aiohttp leave sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PARAMS = {"enc": {"w": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(3), "n": 3}
OPTIMIZER = optax.chain(
    optax.adam(0.1),
    ema_optax.ema_params({"a": ema_optax.power(0.05), "b": ema_optax.power(0.1)}),
)


def states(steps):
    """Returns params and state after each of some updates."""
    params, state = PARAMS, OPTIMIZER.init(PARAMS)
    found = []
    for _ in range(steps):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = OPTIMIZER.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append((params, state))
    return found


RUN = states(4)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A bucket, which this process knows of too."""
    patch = pytest.MonkeyPatch()
    with buckets.running(tmp_path_factory.mktemp("server")) as found:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        storage.bucket.cache_clear()
        yield found
    storage.bucket.cache_clear()
    patch.undo()


@pytest.fixture
def bucket(server):
    """The bucket, answering at once."""
    server.delay, server.refuse = 0.0, None
    server.requests.clear()
    yield server
    server.delay, server.refuse = 0.0, None


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """The same run in the bucket and on a disk."""
    local = tmp_path_factory.mktemp("local")
    for folder in (f"{server.url}/run", local):
        for step, (params, state) in enumerate(RUN, start=1):
            checkpoint.save(folder, params, state, step=step, extra={"of": step})
    return f"{server.url}/run", local


def same(ours, theirs):
    """Compares two trees, bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def asked(bucket, call):
    """Returns how many requests a call makes, and what it gives."""
    bucket.requests.clear()
    found = call()
    return len(bucket.requests), found


def test_every_function_gives_what_a_disk_gives(runs, bucket):
    """Restore, resume, describe, verify, stored, snapshots, reconstruct, export."""
    remote, _ = runs
    for tree in ("params", "shadow/a", "shadow/b"):
        for like in (PARAMS, None):
            same(*(checkpoint.restore(at, tree, like) for at in runs))
    params, state = RUN[-1]
    same(checkpoint.resume(remote, *RUN[0]), (params, state))
    same(checkpoint.resume(remote, *RUN[0], step=2), RUN[1])
    ours, theirs = map(checkpoint.describe, runs)
    assert (ours.steps, ours.extra, ours.trees, ours.items) == (
        (1, 2, 3, 4),
        {"of": 4},
        theirs.trees,
        theirs.items,
    )
    assert ours.path == f"{remote}/4/default"
    for directory in (remote, f"{remote}/2", f"{remote}/", epath.Path(remote)):
        checkpoint.verify(directory)
    merged = [
        reconstruction.merge(
            [checkpoint.stored(at, "params", step=step) for step in (1, 4)], [0.5, 0.5]
        )
        for at in runs
    ]
    same(*merged)
    found = [checkpoint.snapshots(at) for at in runs]
    assert [s.step for s in found[0]] == [s.step for s in found[1]]
    same(*(reconstruction.reconstruct(each, width=0.07).tree for each in found))


def test_export_reads_a_bucket(runs, bucket, tmp_path):
    """The file lies on this machine; a URL as its place is refused in words."""
    numpy = pytest.importorskip("safetensors.numpy")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for at, out in zip(runs, files, strict=True):
        ema_optax.safetensors.export(at, out, tree="shadow/a")
    same(*map(numpy.load_file, files))
    with pytest.raises(ValueError, match=r"local file.*gs://bucket/m\.safetens"):
        ema_optax.safetensors.export(runs[0], f"{bucket.url}/m.safetensors")
    assert not pathlib.Path("gs:").exists()


def test_commands(runs, bucket, tmp_path, capsys):
    """Inspect and verify, reconstruct into the bucket, and export from it."""
    remote, _ = runs
    assert cli.main(["inspect", remote, "--verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == [1, 2, 3, 4]
    explained = []
    for at in runs:
        assert cli.main(["inspect", str(at), "--explain", "--json"]) == 0
        explained.append(json.loads(capsys.readouterr().out)["explained"])
    assert explained[0] == explained[1]
    out = f"{bucket.url}/averages"
    assert cli.main(["reconstruct", remote, "--width", "0.07", "--out", out]) == 0
    capsys.readouterr()
    found = reconstruction.reconstruct(checkpoint.snapshots(remote), width=0.07)
    tree = checkpoint.restore(f"{out}/width-0.07", "shadow")
    tree.pop("n")  # not averaged, and of the whole model
    same(tree, found.tree)
    assert cli.main(["inspect", f"{bucket.url}/nothing"]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_managers_of_both_interfaces(bucket):
    """A CheckpointManager that saves in the background, and Orbax v1."""
    folder = f"{bucket.url}/managed"
    params, state = RUN[-1]
    with ocp.CheckpointManager(folder) as manager:
        for step in (1, 2):
            manager.save(step, args=checkpoint.EmaSave(params, state))
        manager.wait_until_finished()
        like = checkpoint.EmaRestore("shadow/a", PARAMS)
        same(
            manager.restore(2, args=like),
            checkpoint.restore(folder, "shadow/a", PARAMS),
        )
        same(manager.restore(2, args=checkpoint.EmaResume(*RUN[0])), (params, state))
    at = f"{bucket.url}/v1/7"
    v1.save_checkpointables(at, {"default": checkpoint.EmaSave(params, state)})
    asked = {"default": checkpoint.EmaRestore("shadow/a", PARAMS)}
    same(
        v1.load_checkpointables(at, asked)["default"],
        checkpoint.restore(folder, "shadow/a", PARAMS),
    )
    same(checkpoint.resume(at, *RUN[0]), (params, state))


def test_requests_do_not_grow_with_the_run(bucket):
    """Of 40 steps the newest takes what it takes alone; snapshots one list each."""
    params, state = RUN[0]
    checkpoint.save(f"{bucket.url}/one", params, state, step=40)
    source = bucket.files("one/40")
    for step in range(1, 41):  # copies, as 40 saves would take minutes
        for name, path in source.items():
            to = bucket.root / bucket.name / name.replace("one/40", f"forty/{step}", 1)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, to)  # what the server notes of it too
    one, forty = f"{bucket.url}/one", f"{bucket.url}/forty"
    calls = {
        "describe": checkpoint.describe,
        "restore": lambda at: checkpoint.restore(at, "shadow/a", PARAMS),
        "resume": lambda at: checkpoint.resume(at, params, state),
        "verify": checkpoint.verify,
    }
    for name, call in calls.items():
        alone = asked(bucket, lambda call=call: call(one))[0]
        newest = asked(bucket, lambda call=call: call(forty))[0]
        assert newest <= 1.5 * alone, (name, newest, alone)
    count, found = asked(bucket, lambda: checkpoint.snapshots(forty))
    assert len({snapshot.step for snapshot in found}) == 1  # copies say the same count
    assert count <= 3 * 40 + 1
    assert asked(bucket, lambda: checkpoint.describe(forty))[0] <= 4
    assert checkpoint.describe(forty).steps == tuple(range(1, 41))


def test_a_reader_sees_new_steps(bucket):
    """Another process has saved since this one looked."""
    folder = f"{bucket.url}/growing"
    checkpoint.save(folder, *RUN[0], step=1)
    assert checkpoint.describe(folder).step == 1
    assert checkpoint.describe(folder).steps == (1,)
    code = (
        "import sys; from tests.test_buckets import *\n"
        "checkpoint.save(sys.argv[1], *RUN[1], step=2)"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=120)
    assert checkpoint.describe(folder).step == 2
    same(checkpoint.resume(folder, *RUN[0]), RUN[1])


def test_what_is_not_committed_is_never_taken(bucket):
    """A step that a killed save left is passed over, and can be saved again."""
    folder = f"{bucket.url}/cut"
    for step in (1, 2):
        checkpoint.save(folder, *RUN[step - 1], step=step)
    bucket.files("cut/2")["cut/2/commit_success.txt"].unlink()
    assert checkpoint.describe(folder).step == 1
    assert checkpoint.describe(folder).steps == (1,)
    same(checkpoint.resume(folder, *RUN[0]), RUN[0])
    with pytest.raises(FileNotFoundError, match="no step 2; it has 1"):
        checkpoint.describe(folder, step=2)
    checkpoint.save(folder, *RUN[2], step=2)
    same(checkpoint.resume(folder, *RUN[0]), RUN[2])
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        checkpoint.save(folder, *RUN[2], step=2)


def test_a_flipped_bit_is_damage(bucket):
    """Found in whatever object it is."""
    folder = f"{bucket.url}/flipped"
    params = {"w": jnp.arange(5000.0)}
    transform = ema_optax.ema_params(0.9)
    checkpoint.save(folder, params, transform.init(params), step=1)
    found = bucket.files("flipped")
    for name, path in found.items():
        if "/d/" not in name or path.stat().st_size < 10_000:
            continue
        good = path.read_bytes()
        path.write_bytes(good[:5000] + bytes([good[5000] ^ 4]) + good[5001:])
        with pytest.raises(checkpoint.CorruptCheckpointError):
            checkpoint.verify(folder)
        path.write_bytes(good)
    checkpoint.verify(folder)


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [(403, PermissionError, "access"), (401, PermissionError, "access")],
)
def test_no_permission_is_told_as_that(runs, bucket, status, kind, says):
    """Never as an empty run, on which programs start anew, nor as damage."""
    for refused in ("/o", "manifest.json"):
        bucket.refuse = lambda m, path, refused=refused: (
            status if refused in path else None
        )
        for call in (checkpoint.describe, checkpoint.verify, checkpoint.snapshots):
            with pytest.raises(kind, match=says):
                call(runs[0])
    bucket.refuse = lambda m, path: status if "ocdbt" in path else None
    with pytest.raises(kind, match=says):
        checkpoint.restore(runs[0], "shadow/a")


def test_a_store_that_does_not_answer_is_told_as_that(runs, bucket):
    """503: an OSError that is neither of permission, of damage, nor of absence."""
    bucket.refuse = lambda m, path: 503 if "/o" in path else None
    with pytest.raises(OSError, match="try again") as caught:
        checkpoint.describe(runs[0])
    assert type(caught.value) is OSError
    bucket.refuse = lambda m, path: 503 if m in ("POST", "PUT") else None
    with pytest.raises(OSError, match=r"(?s)Could not write step 9.*earlier steps"):
        checkpoint.save(runs[0], *RUN[0], step=9)
    bucket.refuse = None
    assert checkpoint.describe(runs[0]).steps == (1, 2, 3, 4)


def test_arrays_that_do_not_answer_are_told_as_that(runs, bucket, monkeypatch):
    """Within a bound: TensorStore alone would ask for a quarter of an hour."""
    quick = {"max_retries": 3, "initial_delay": "50ms", "max_delay": "50ms"}
    monkeypatch.setattr(opening, "_RETRIES", quick)
    # The index of the store is there, and its data are not.
    bucket.refuse = lambda m, path: 503 if "/d/" in path or "%2Fd%2F" in path else None
    for call in (
        lambda: checkpoint.restore(runs[0], "shadow/a"),
        lambda: checkpoint.verify(runs[0]),
        lambda: checkpoint.resume(runs[0], *RUN[0]),
        lambda: checkpoint.stored(runs[0], "params").read(
            "enc/w", (slice(0, 2), slice(0, 3))
        ),
    ):
        bucket.requests.clear()
        with pytest.raises(OSError, match="try again") as caught:
            call()
        assert type(caught.value) is OSError
        asked = collections.Counter(r for r in bucket.requests if "/d/" in r[1])
        assert asked
        assert max(asked.values()) <= 3


KILLED = """
import sys, time
from tests.test_buckets import *
print("ready", flush=True)
for step, (params, state) in enumerate(RUN, start=2):
    checkpoint.save(sys.argv[1], params, state, step=step)
    print(step, flush=True)
"""


@pytest.mark.parametrize("share", [0.15, 0.35, 0.6, 0.85])
def test_killed_while_it_saves(bucket, share):
    """Whatever is there afterwards is whole; the run goes on from it."""
    folder = f"{bucket.url}/killed-{share}"
    checkpoint.save(folder, *RUN[0], step=1)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    before = len(bucket.requests)
    while len(bucket.requests) - before < 300 * share:  # a save is some 150
        time.sleep(0.005)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = [int(line) for line in process.stdout.read().split()]
    process.stdout.close()
    newest = checkpoint.describe(folder).step
    assert newest >= max(said, default=1)
    checkpoint.verify(folder)
    same(checkpoint.resume(folder, *RUN[0]), ([RUN[0], *RUN])[newest - 1])
    checkpoint.save(folder, *RUN[-1], step=newest + 1)
    assert checkpoint.describe(folder).step == newest + 1


def test_a_run_of_another_program_is_adopted_from_a_bucket_into_one(bucket, tmp_path):
    """As from a disk: the newest committed step, bit for bit; no other is written."""
    theirs, ours = f"{bucket.url}/theirs", f"{bucket.url}/adopted"
    mean = jax.tree.map(lambda x: x * 2, PARAMS)
    tree = {"params": PARAMS, "ema_params": mean, "opt_state": [PARAMS]}
    for step in (1, 2):
        with ocp.CheckpointManager(theirs) as manager:
            manager.save(step, args=ocp.args.StandardSave(tree | {"step": step}))
    done = checkpoint.adopt(theirs, ours)
    assert (done.step, done.layout, done.source) == (2, "flax", f"{theirs}/2")
    same(checkpoint.restore(ours, "params", PARAMS), PARAMS)
    same(checkpoint.restore(ours, "shadow", PARAMS), mean | {"n": 3})
    checkpoint.verify(ours)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        checkpoint.adopt(theirs, ours)
    epath.Path(f"{theirs}/2/commit_success.txt").unlink()
    with pytest.raises(ValueError, match="not written to its end"):
        checkpoint.adopt(f"{theirs}/2", tmp_path)
    assert checkpoint.adopt(theirs, tmp_path).step == 1
    assert cli.main(["adopt", theirs, "--out", ours, "--dry-run"]) == 0
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        checkpoint.adopt(f"{bucket.url}/nowhere", tmp_path)


def test_files_of_pytorch_go_into_a_bucket(bucket, tmp_path, capsys):
    """By the command; a second time the step is there, and a plan writes nothing."""
    numpy = pytest.importorskip("safetensors.numpy")
    raw = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    average = {"fc.weight": raw["fc.weight"] + 0.5}
    for name, tensors in (("model", raw), ("ema", average)):
        numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
    out = f"{bucket.url}/from_torch"
    command = ["import-torch", str(tmp_path / "model.safetensors"), "--step", "300"]
    command += ["--shadow-from", str(tmp_path / "ema.safetensors"), "--out", out]
    assert cli.main([*command, "--dry-run"]) == 0
    assert storage.listed(epath.Path(out)) is None
    assert cli.main(command) == 0
    for tree, expected in (("params", raw), ("shadow", average)):
        found = checkpoint.restore(out, tree)
        np.testing.assert_array_equal(found["fc"]["weight"], expected["fc.weight"])
    assert checkpoint.describe(out).step == 300
    capsys.readouterr()
    assert cli.main(command) == 1
    assert "exists" in capsys.readouterr().err


def test_merges_and_choices_of_runs_in_a_bucket(bucket, tmp_path, monkeypatch):
    """Ours and those of plain Orbax, into the bucket too: the bits of a disk."""
    ours, theirs = f"{bucket.url}/ours", f"{bucket.url}/plain"
    for i, (params, state) in enumerate(RUN, start=1):
        checkpoint.save(ours, params, state, step=i)
        with ocp.CheckpointManager(theirs) as manager:
            manager.save(i, args=ocp.args.StandardSave({"params": params}))
    expected = reconstruction.merge([params for params, _ in RUN], "1-sqrt")
    for run in (ours, theirs):
        command = ["merge", run, "--schedule", "1-sqrt", "--out", f"{run}_merged"]
        assert cli.main(command) == 0
        merged = checkpoint.restore(f"{run}_merged", "params", RUN[-1][0])
        same(merged, expected | {"n": RUN[-1][0]["n"]})
        origin = checkpoint.describe(f"{run}_merged").extra["merged"]
        assert origin["verified"] == (run == ours)
    (tmp_path / "scoring.py").write_text("def loss(p): return float(p['b'].sum())")
    monkeypatch.chdir(tmp_path)
    command = ["choose", ours, "--evaluate", "scoring:loss", "--over", "last"]
    assert cli.main([*command, "--out", f"{bucket.url}/chosen"]) == 0
    found = checkpoint.describe(f"{bucket.url}/chosen").extra["chosen"]
    assert found["value"] in range(1, len(RUN) + 1)
