"""Import of checkpoints that TensorFlow writes here, compared bit for bit.

TensorFlow is large: `.ci/run` runs this file in an environment of its own. Elsewhere
`pip install 'ema-optax[tensorflow]'` makes it run.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from tests import bucket as buckets

tf = pytest.importorskip(
    "tensorflow", reason="needs ema-optax[tensorflow]; a stage of .ci/run has it"
)
v1 = tf.compat.v1
STEPS = 7
AVERAGE = "ExponentialMovingAverage"


class Run:
    """A run in TensorFlow 1's style: its folder, and the values that it held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with tf.Graph().as_default():
            loss = self._model()
            step = v1.train.get_or_create_global_step()
            adam = v1.train.AdamOptimizer(0.1, beta2=0.9)  # 0.999 is 1 in bfloat16
            train = adam.minimize(loss, global_step=step)
            self.ema = v1.train.ExponentialMovingAverage(0.9, num_updates=step)
            other = v1.train.ExponentialMovingAverage(0.5, name="Fast")
            with tf.control_dependencies([train]):
                averages = self.ema.apply(v1.trainable_variables())
                averages = tf.group(averages, other.apply([self.kernel]))
            restored = self.ema.variables_to_restore()
            self.restored = {k: v.op.name for k, v in restored.items()}
            saver = v1.train.Saver(max_to_keep=None)
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                for i in range(STEPS):
                    if i in (3, STEPS - 1):
                        saver.save(session, str(folder / "model.ckpt"), step)
                    session.run(averages)
                self.prefix = saver.save(session, str(folder / "model.ckpt"), step)
                held = v1.global_variables()
                values = session.run(held)
        self.values = dict(zip((x.op.name for x in held), values, strict=True))

    def _model(self) -> Any:
        rng = np.random.default_rng(0)
        v1.set_random_seed(0)
        with v1.variable_scope("enc"):
            start = rng.normal(size=(3, 4)).astype(np.float32)
            self.kernel = v1.get_variable("kernel", initializer=start)
            narrow = tf.constant(rng.normal(size=4), tf.bfloat16)
            bias = v1.get_variable("bias", initializer=narrow)
        with v1.variable_scope("dec/layer_0"):
            parts = v1.get_variable(
                "table",
                shape=(5, 3),
                initializer=v1.random_normal_initializer(),
                partitioner=v1.fixed_size_partitioner(3),
            )
            wide = v1.get_variable("wide", initializer=rng.normal(size=2))
            v1.get_variable("mean", initializer=np.float32(7), trainable=False)
        v1.get_variable("seen", initializer=np.int64(2**40 + 1), trainable=False)
        v1.get_variable("flags", initializer=[True, False], trainable=False)
        v1.get_variable("text", initializer=tf.constant("é"), trainable=False)
        return (
            tf.reduce_sum(self.kernel**2)
            + tf.cast(tf.reduce_sum(bias**2), tf.float32)
            + tf.reduce_sum(tf.concat(list(parts), 0) ** 2)
            + tf.cast(tf.reduce_sum(wide**2), tf.float32)
        )

    def value(self, path: str, suffix: str = "") -> np.ndarray:
        """Returns what the run held, a partitioned variable as a whole."""
        if f"{path}{suffix}" in self.values:
            return np.asarray(self.values[f"{path}{suffix}"])
        parts = (self.values[f"{path}/part_{i}{suffix}"] for i in range(3))
        return np.concatenate(list(parts))


AVERAGED = ("dec/layer_0/table", "dec/layer_0/wide", "enc/bias", "enc/kernel")
RAW = ("dec/layer_0/mean", "flags", "seen")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("old_run"))


def bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


def by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in pairs}


def test_params_and_shadow(run: Run, tmp_path: Path):
    """Each bit and each dtype, of raw and averaged variables, partitioned or not."""
    done = ema_optax.tensorflow.import_checkpoint(run.prefix, tmp_path)
    params = by_path(checkpoint.restore(tmp_path, "params"))
    shadow = by_path(checkpoint.restore(tmp_path, "shadow"))
    assert set(params) == set(shadow) == {*AVERAGED, *RAW}
    for path in AVERAGED:
        assert bits(params[path]) == bits(run.value(path))
        assert bits(shadow[path]) == bits(run.value(path, f"/{AVERAGE}"))
        assert bits(shadow[path]) != bits(params[path])
    for path in RAW:
        assert bits(shadow[path]) == bits(params[path]) == bits(run.value(path))
    assert shadow["enc/bias"].dtype == ml_dtypes.bfloat16
    assert shadow["dec/layer_0/wide"].dtype == np.float64
    assert params["seen"] == 2**40 + 1
    assert (done.averaged, done.raw, done.step) == (AVERAGED, RAW, STEPS)
    assert set(done.left_out) == {
        *(f"{path}/{slot}" for path in AVERAGED for slot in ("Adam", "Adam_1")),
        *("enc/kernel/Fast", "beta1_power", "beta2_power", "text"),
    }
    checkpoint.verify(tmp_path)


def test_it_is_what_tensorflow_would_restore(run: Run, tmp_path: Path):
    """`variables_to_restore` puts the same values in the model's variables."""
    ema_optax.tensorflow.import_checkpoint(run.prefix, tmp_path)
    shadow = by_path(checkpoint.restore(tmp_path, "shadow"))
    reader = tf.train.load_checkpoint(run.prefix)
    names = {target: stored for stored, target in run.restored.items()}
    assert names["enc/kernel"] == f"enc/kernel/{AVERAGE}"
    for path in (*AVERAGED[1:], *RAW):  # it names a partitioned one by its parts
        assert bits(shadow[path]) == bits(reader.get_tensor(names[path])), path


def test_it_is_a_checkpoint_of_ours(run: Run, tmp_path: Path):
    """Described, restored into a slot, exported, and not resumed without optimizer."""
    decay = ema_optax.warmup(0.9)
    ema_optax.tensorflow.import_checkpoint(run.prefix, tmp_path, decay=decay)
    found = checkpoint.describe(tmp_path)
    assert found.step == STEPS
    assert found.extra == {"imported_from": f"TensorFlow checkpoint model.ckpt-{STEPS}"}
    shadow = found.trees["shadow"]
    assert (shadow.decay, shadow.every, shadow.count) == (decay, None, STEPS)
    assert set(shadow.leaves) == set(AVERAGED)
    like = {"kernel": jax.ShapeDtypeStruct((3, 4), "bfloat16")}
    kernel = checkpoint.restore(tmp_path, like=like, rename={"kernel": "enc/kernel"})
    average = run.value("enc/kernel", f"/{AVERAGE}")
    assert bits(kernel["kernel"]) == bits(average.astype(ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match="no optimizer state"):
        checkpoint.resume(tmp_path, like, ema_optax.ema_params(0.9).init(kernel))
    ema_optax.tensorflow.import_checkpoint(run.prefix, tmp_path / "unknown")
    assert checkpoint.describe(tmp_path / "unknown").trees["shadow"].decay is None


def test_ways_to_name_a_checkpoint(run: Run, tmp_path: Path):
    """The folder means the latest; a prefix any; a file its checkpoint."""
    for number, source in enumerate((run.folder, f"{run.prefix}.index")):
        out = tmp_path / str(number)
        done = ema_optax.tensorflow.import_checkpoint(source, out)
        assert (done.source, done.step) == (run.prefix, STEPS)
    done = ema_optax.tensorflow.import_checkpoint(
        run.folder / "model.ckpt-3", tmp_path / "0"
    )
    assert done.step == 3
    assert checkpoint.describe(tmp_path / "0").step == STEPS  # beside it
    done = ema_optax.tensorflow.import_checkpoint(run.prefix, tmp_path / "0", step=8)
    assert checkpoint.describe(tmp_path / "0").step == done.step == 8
    with pytest.raises(FileExistsError, match="8 exists, and nothing is overwritten"):
        ema_optax.tensorflow.import_checkpoint(run.prefix, tmp_path / "0", step=8)


def test_a_folder_that_was_moved(run: Run, tmp_path: Path):
    """Its list names files where they were; those that lie in it are meant."""
    moved = tmp_path / "moved"
    shutil.copytree(run.folder, moved)
    listed = moved / "checkpoint"
    gone = tmp_path / "gone" / f"model.ckpt-{STEPS}"
    for step, old in enumerate((gone, run.prefix)):
        listed.write_text(f'model_checkpoint_path: "{old}"\n')
        done = ema_optax.tensorflow.import_checkpoint(
            moved, tmp_path / "out", step=step
        )
        assert done.source == str(moved / f"model.ckpt-{STEPS}")


def test_a_folder_without_its_list(run: Run, tmp_path: Path):
    """One checkpoint in it is meant; of several, one must be named."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in run.folder.glob(f"model.ckpt-{STEPS}.*"):
        shutil.copy(file, moved)
    assert ema_optax.tensorflow.import_checkpoint(moved, tmp_path / "out").step == STEPS
    for file in run.folder.glob("model.ckpt-3.*"):
        shutil.copy(file, moved)
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt-3, .*: pass one of them"):
        ema_optax.tensorflow.import_checkpoint(moved, tmp_path / "out")
    for missing, says in (
        (tmp_path / "nowhere", "nowhere.index does not exist. Pass a prefix"),
        (moved / "model.ckpt-4", "There are .*model.ckpt-3"),
        (tmp_path, "no file in it ends in .index"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            ema_optax.tensorflow.import_checkpoint(missing, tmp_path / "out")


def test_a_damaged_checkpoint(run: Run, tmp_path: Path):
    """One flipped bit, or a missing file: an error in one line, and nothing written."""
    copied = tmp_path / "copied"
    shutil.copytree(run.folder, copied)
    (data,) = copied.glob(f"model.ckpt-{STEPS}.data-*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    prefix = copied / f"model.ckpt-{STEPS}"
    with pytest.raises(ValueError, match=r"TensorFlow cannot read .* damaged"):
        ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out")
    data.unlink()
    with pytest.raises(ValueError, match="TensorFlow cannot read"):
        ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_step(tmp_path: Path):
    """It must be given; the number in the name is offered."""
    with tf.Graph().as_default():
        w = v1.get_variable("w", initializer=np.float32(1))
        apply = v1.train.ExponentialMovingAverage(0.9).apply([w])
        saver = v1.train.Saver()
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            session.run(apply)
            prefix = saver.save(session, str(tmp_path / "model.ckpt"), global_step=40)
    with pytest.raises(ValueError, match=r"no global_step. Pass step=40"):
        ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out")
    assert (
        ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out", step=40).step
        == 40
    )


def test_averages_made_in_a_scope_and_a_name_that_is_a_scope(tmp_path: Path):
    """Both come in as TensorFlow's graph names them, with the values of each."""
    with tf.Graph().as_default():
        a = v1.get_variable("a", initializer=np.float32([1, 2]))
        b = v1.get_variable("a/b", initializer=np.float32([3, 4]))
        with v1.variable_scope("train"):
            ema = v1.train.ExponentialMovingAverage(0.5)
            apply = ema.apply([a, b])
        grow = v1.group(a.assign_add([8.0, 8.0]), b.assign_add([16.0, 16.0]))
        saver = v1.train.Saver()
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            session.run(apply)
            session.run(grow)
            session.run(apply)
            prefix = saver.save(session, str(tmp_path / "model.ckpt"))
    done = ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out", step=2)
    assert done.scopes == ("train",)
    assert done.moved == {"a": "a/value"}
    assert set(done.averaged) == {"a/value", "a/b"}
    params = checkpoint.restore(tmp_path / "out", "params")
    shadow = checkpoint.restore(tmp_path / "out", "shadow")
    assert params["a"]["value"].tolist() == [9, 10]
    assert params["a"]["b"].tolist() == [19, 20]
    assert shadow["a"]["value"].tolist() == [5, 6]
    assert shadow["a"]["b"].tolist() == [11, 12]


class Model(tf.Module):
    """Variables that have names of their own, and others that are nested."""

    def __init__(self, first: str = "kernel", second: str = "bias") -> None:
        super().__init__()
        self.kernel = tf.Variable([1.0, 2.0], name=first)
        self.layers = [tf.Variable([3.0], name=second), tf.Variable([4.0], name="c")]
        self.global_step = tf.Variable(30, dtype=tf.int64, name="global_step")


def save_objects(folder: Path, model: Model, count: int = 2) -> tuple[str, list[Any]]:
    """Returns a checkpoint of objects in TensorFlow 2's style, and the averages."""
    averaged = [model.kernel, *model.layers][:count]
    ema = tf.train.ExponentialMovingAverage(0.5)
    ema.apply(averaged)
    for variable in averaged:
        variable.assign_add(tf.ones_like(variable))
    ema.apply(averaged)
    averages = [ema.average(variable) for variable in averaged]
    objects = tf.train.Checkpoint(model=model, averages=averages[::-1])
    return objects.save(folder / "ckpt"), [x.numpy() for x in averages]


def test_a_checkpoint_of_objects(tmp_path: Path):
    """Averages find their variables by the names in the graph of objects."""
    model = Model()
    prefix, averages = save_objects(tmp_path, model)
    done = ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out")
    assert (done.step, done.averaged, done.raw) == (30, ("bias", "kernel"), ("c",))
    assert done.left_out == {"save_counter": "TensorFlow's count of saves"}
    shadow = checkpoint.restore(tmp_path / "out", "shadow")
    assert bits(shadow["kernel"]) == bits(averages[0])
    assert bits(shadow["bias"]) == bits(averages[1])
    params = checkpoint.restore(tmp_path / "out", "params")
    assert bits(params["kernel"]) == bits(model.kernel.numpy())
    assert bits(params["c"]) == bits(shadow["c"]) == bits(model.layers[1].numpy())


def test_objects_of_one_name(tmp_path: Path):
    """Two variables of one name are an error that says where both are."""
    prefix, _ = save_objects(tmp_path, Model("w", "w"), count=1)
    with pytest.raises(ValueError, match="two variables called 'w'") as caught:
        ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out")
    assert "model/kernel" in str(caught.value)
    assert "model/layers/0" in str(caught.value)


def test_a_keras_optimizer_is_left_out(tmp_path: Path):
    """Its own variables, and what it keeps of the model's."""
    keras = pytest.importorskip("keras")
    layer = keras.layers.Dense(2, name="dense")
    layer.build((None, 3))
    optimizer = keras.optimizers.Adam()
    optimizer.build(layer.trainable_variables)
    names = [variable.path for variable in layer.trainable_variables]
    averages = [
        tf.Variable(np.full(x.shape, 5, np.float32), name=f"{x.path}/{AVERAGE}")
        for x in layer.trainable_variables
    ]
    objects = tf.train.Checkpoint(layer=layer, optimizer=optimizer, averages=averages)
    prefix = objects.save(tmp_path / "ckpt")
    done = ema_optax.tensorflow.import_checkpoint(prefix, tmp_path / "out", step=1)
    assert sorted(done.averaged) == sorted(names)
    assert done.raw == ()
    assert set(done.left_out.values()) == {
        "of an optimizer",
        "TensorFlow's count of saves",
    }
    assert len(done.left_out) == 1 + 2 + 2 * len(names)


def test_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Tables for people, JSON for programs, and what is not averaged in both."""
    out = str(tmp_path / "out")
    command = ["import-tf", str(run.folder), "--out", out]
    assert cli.main([*command, "--decay", "constant:0.9"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"To:       {out}, step {STEPS}\n" in printed.out
    assert "Averaged: 4 params with a shadow\n" in printed.out
    rows = [re.split(r" {2,}", line.strip()) for line in printed.out.splitlines()]
    assert ["seen", "no shadow", "raw in both trees"] in rows
    assert ["text", "text", "left out"] in rows
    adam = [row for row in rows if row[1:2] == ["slot 'Adam'"]]
    assert len(adam) == 1
    assert adam[0][0].endswith(" and 1 more")
    decay = checkpoint.describe(out).trees["shadow"].decay
    assert decay == ema_optax.constant(0.9)
    assert cli.main(["inspect", out, "--verify"]) == 0
    capsys.readouterr()
    assert cli.main([*command, "--step", "8", "--json", "--average", "Fast"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["averaged"]) == (8, ["enc/kernel"])
    assert f"enc/kernel/{AVERAGE}" in told["left_out"]
    assert cli.main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ema-optax import-tf: error: ")
    assert "nothing is overwritten. Pass another step" in line
    assert cli.main(["import-tf", out, "--out", out]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no file in it ends in .index" in line


def test_a_dry_run(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It tells the same as the import, and writes nothing."""
    out = tmp_path / "out"
    command = ["import-tf", run.prefix, "--out", str(out), "--json"]
    assert cli.main([*command, "--dry-run"]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out) == dry
    assert cli.main([*command[:-1], "--dry-run"]) == 0
    assert f"step {STEPS}, not written\n" in capsys.readouterr().out


def test_the_variables_read_are_reported(run: Run, tmp_path: Path):
    """Params and shadows are counted as they are read."""
    seen: list[tuple[int, int]] = []
    done = ema_optax.tensorflow.import_checkpoint(
        run.prefix, tmp_path, progress=lambda *of: seen.append(of)
    )
    total = 2 * len(done.averaged) + len(done.raw)
    assert seen == [(n, total) for n in range(1, total + 1)]


@pytest.mark.skipif(buckets.binary() is None, reason="needs a server of buckets")
def test_into_a_bucket(run: Run, tmp_path: Path):
    """The command writes the same bits as on a disk, and nothing else anywhere."""
    local, work = tmp_path / "local", tmp_path / "work"
    work.mkdir()
    assert cli.main(["import-tf", run.prefix, "--out", str(local), "--json"]) == 0
    with buckets.running(tmp_path / "server") as bucket:
        environment = os.environ | bucket.environment | {"JAX_PLATFORMS": "cpu"}
        for command in (
            ["import-tf", run.prefix, "--out", f"{bucket.url}/old", "--json"],
            ["inspect", f"{bucket.url}/old", "--verify", "--json"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "ema_optax", *command],
                cwd=work,
                env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
        copy = tmp_path / "copy"
        shutil.copytree(bucket.root / bucket.name / "old", copy)
    assert list(work.iterdir()) == []
    for tree in ("params", "shadow"):
        ours, theirs = (checkpoint.restore(at, tree) for at in (copy, local))
        assert jax.tree.map(bits, ours) == jax.tree.map(bits, theirs)
