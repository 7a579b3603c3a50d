"""Import of files that PyTorch's libraries write here, compared bit for bit.

They are large: `.ci/run` runs this file in an environment of its own. Elsewhere
`pip install torch timm diffusers transformers lightning ema-pytorch` makes it run.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

import ema_optax
from ema_optax import checkpoint
from ema_optax.interop import Rule

torch = pytest.importorskip(
    "torch", reason="needs ema-optax[torch]; a stage of .ci/run has it"
)
STEPS = 5


class Net(torch.nn.Module):
    """A small model with a convolution, statistics, a counter and tied weights."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Linear(4, 5)
        self.tied = torch.nn.Linear(4, 5, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, images):
        return self.head(self.norm(self.conv(images)).mean((2, 3)))


def trained(update, model=None):
    """Trains a model for some steps, calling `update(model, t)` after each."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        update(model, t)
    return model, optimizer


def numpy_of(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().view(jax.numpy.bfloat16)
    return tensor.detach().numpy()


def bits(array):
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


def expected(state):
    return {n.replace(".", "/"): bits(numpy_of(x)) for n, x in state.items()}


def stored(folder, tree):
    pairs = jax.tree_util.tree_flatten_with_path(checkpoint.restore(folder, tree))[0]
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): bits(x) for k, x in pairs
    }


def check(folder, raw, average):
    """Each bit of both; that they differ is what the test rests on."""
    assert stored(folder, "params") == expected(raw)
    assert stored(folder, "shadow") == expected(average)
    assert expected(raw) != expected(average)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("warm", [False, True])
def test_timm(tmp_path, warm):
    """Its saver's file, with the run's arguments, which say the decay."""
    utils = pytest.importorskip("timm.utils")
    averages = []

    def update(model, t):
        if not averages:
            averages.append(utils.ModelEmaV3(model, decay=0.9, use_warmup=warm))
        averages[0].update(model, step=t)

    model, optimizer = trained(update)
    args = argparse.Namespace(
        model="net", model_ema_decay=0.9, model_ema_warmup=warm, lr=0.1
    )
    saver = utils.CheckpointSaver(
        model,
        optimizer,
        args=args,
        model_ema=averages[0],
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "last.pth.tar", tmp_path / "out", count=STEPS
    )
    check(tmp_path / "out", model.state_dict(), averages[0].module.state_dict())
    assert done.layout == "timm"
    assert "optimizer" in done.left_out
    for t in range(1, 50):
        assert done.decay(t) == pytest.approx(averages[0].get_decay(t), abs=1e-12)


def test_averaged_model(tmp_path):
    """`module.…` and `n_averaged`, alone and beside the raw weights."""
    from torch.optim import swa_utils

    averages = []

    def update(model, t):
        if not averages:
            rule = swa_utils.get_ema_multi_avg_fn(0.9)
            averages.append(swa_utils.AveragedModel(model, multi_avg_fn=rule))
        averages[0].update_parameters(model)

    model, _ = trained(update)
    average = averages[0]
    torch.save(average.state_dict(), tmp_path / "swa.pt")
    done = ema_optax.torch.import_checkpoint(tmp_path / "swa.pt", tmp_path / "alone")
    assert stored(tmp_path / "alone", "shadow") == expected(average.module.state_dict())
    assert (done.layout, done.count) == ("averaged-model", STEPS)
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    ema_optax.torch.import_checkpoint(
        tmp_path / "raw.pt", tmp_path / "out", shadow_from=tmp_path / "swa.pt"
    )
    check(tmp_path / "out", model.state_dict(), average.module.state_dict())
    assert checkpoint.describe(tmp_path / "out").trees["shadow"].count == STEPS
    both = {"model": model.state_dict(), "model_ema": average.state_dict()}
    torch.save({**both, "epoch": 3}, tmp_path / "both.pth")
    done = ema_optax.torch.import_checkpoint(tmp_path / "both.pth", tmp_path / "both")
    check(tmp_path / "both", model.state_dict(), average.module.state_dict())
    assert (done.layout, done.count) == ("torchvision", STEPS)
    named = {"model": model.state_dict(), "ema": average.state_dict()}
    torch.save(named, tmp_path / "named.pth")
    done = ema_optax.torch.import_checkpoint(tmp_path / "named.pth", tmp_path / "named")
    check(tmp_path / "named", model.state_dict(), average.module.state_dict())
    assert (done.layout, done.count) == ("model-averaged", STEPS)


def test_a_wrapper_that_is_named(tmp_path):
    """The average in the state of an AveragedModel under any key, with its count."""
    model = torch.nn.Linear(2, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.bias += 1
    both = {"net": model.state_dict(), "polyak": average.state_dict()}
    torch.save(both, tmp_path / "both.pt")
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "both.pt", tmp_path / "out", params="net", shadow="polyak", step=9
    )
    check(tmp_path / "out", model.state_dict(), average.module.state_dict())
    assert (done.shadow, done.count) == ("polyak.module.** of both.pt", 1)


@pytest.mark.parametrize("online", [True, False])
def test_ema_pytorch(tmp_path, online):
    """Its module's state, with and without the online model; its step is the count."""
    library = pytest.importorskip("ema_pytorch")
    averages = []

    def update(model, t):
        if not averages:
            kinds = {"update_every": 1, "update_after_step": 0}
            averages.append(
                library.EMA(model, beta=0.9, include_online_model=online, **kinds)
            )
        averages[0].update()

    model, _ = trained(update)
    ema = averages[0]
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    done = ema_optax.torch.import_checkpoint(tmp_path / "ema.pt", tmp_path / "out")
    assert done.layout == ("ema-pytorch" if online else "ema-pytorch-alone")
    assert done.count == STEPS
    average = ema.ema_model.state_dict()
    if online:
        check(tmp_path / "out", model.state_dict(), average)
    else:
        assert stored(tmp_path / "out", "shadow") == expected(average)
    both = {"step": STEPS, "model": model.state_dict(), "ema": ema.state_dict()}
    torch.save(both, tmp_path / "model-1.pt")
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "model-1.pt", tmp_path / "trainer"
    )
    check(tmp_path / "trainer", model.state_dict(), average)
    assert done.layout == "ema-pytorch-trainer"


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    """Its checkpoint's `state_dict` is the average, and the raw weights lie beside."""
    library = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return self.net(batch).square().sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.1)

    class Kept(library.Callback):
        """Keeps the raw weights before the end of training swaps them away."""

        def on_train_batch_end(self, trainer, module, *args):
            self.raw = copied(module.state_dict())

    torch.manual_seed(0)
    average = callbacks.EMAWeightAveraging(decay=0.9)
    kept, saved = Kept(), tmp_path / "saved"
    saver = callbacks.ModelCheckpoint(saved, every_n_train_steps=STEPS, save_last=True)
    trainer = library.Trainer(
        max_steps=STEPS,
        callbacks=[average, kept, saver],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    images = torch.randn(2 * STEPS, 3, 6, 6)
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=2))
    done = ema_optax.torch.import_checkpoint(saved / "last.ckpt", tmp_path / "out")
    # After training the module holds the average.
    check(tmp_path / "out", kept.raw, module.state_dict())
    assert (done.layout, done.step, done.count) == ("lightning", STEPS, STEPS)
    assert done.told_by["step"] == "global_step"
    assert done.decay is None


def unet():
    library = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return library.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("warm", [False, True])
def test_diffusers(tmp_path, warm):
    """A training run's `unet` beside its `unet_ema`, whose settings are the decay."""
    training = pytest.importorskip("diffusers.training_utils")
    model = unet()
    ema = training.EMAModel(
        model.parameters(),
        decay=0.99,
        use_ema_warmup=warm,
        update_after_step=1,
        model_cls=type(model),
        model_config=model.config,
    )
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        ema.step(model.parameters())
    ema.save_pretrained(tmp_path / "checkpoint-5" / "unet_ema")
    model.save_pretrained(tmp_path / "checkpoint-5" / "unet", max_shard_size="20KB")
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "checkpoint-5", tmp_path / "out"
    )
    raw = copied(model.state_dict())
    ema.copy_to(model.parameters())
    check(tmp_path / "out", raw, model.state_dict())
    assert done.count == STEPS
    assert done.source.endswith(".index.json")
    for t in range(1, 200):
        assert done.decay(t) == pytest.approx(ema.get_decay(t), abs=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_transformers(tmp_path, size):
    """A folder of a model, sharded or not, and tied weights."""
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = library.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=3, n_head=2
    )
    model = library.GPT2LMHeadModel(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "gpt2", max_shard_size=size)
    rules = [
        Rule("transformer.h.#.**", "transformer/h/**"),
        Rule("**", "**"),
    ]
    ema_optax.torch.import_checkpoint(tmp_path / "gpt2", tmp_path / "out", rules=rules)
    found = stored(tmp_path / "out", "params")
    state = model.state_dict()
    layers = [state[f"transformer.h.{i}.attn.c_attn.weight"] for i in range(3)]
    stacked = bits(np.stack([numpy_of(layer) for layer in layers]))
    assert found["transformer/h/attn/c_attn/weight"] == stacked
    wte = bits(numpy_of(state["transformer.wte.weight"]))
    assert found["transformer/wte/weight"] == wte
    torch.save(state, tmp_path / "pytorch_model.bin")  # tied: two names, one storage
    ema_optax.torch.import_checkpoint(tmp_path / "pytorch_model.bin", tmp_path / "bin")
    found = stored(tmp_path / "bin", "params")
    assert found == expected(state)
    assert found["lm_head/weight"] == found["transformer/wte/weight"]


@pytest.mark.filterwarnings("ignore")
def test_distributed(tmp_path):
    """DCP's folder is refused; what its own tool makes of it comes in."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import format_utils

    model, _ = trained(lambda *_: None)
    raw = model.state_dict()
    # Names as torchtitan gives them: of parameters alone, below the optimizer's.
    average = {
        f"state.{name}.ema_params": 0.5 * tensor.detach()
        for name, tensor in model.named_parameters()
    }
    dcp.save({**raw, "ema": average}, checkpoint_id=tmp_path / "step-5", no_dist=True)
    with pytest.raises(ValueError, match=r"format_utils dcp_to_torch .*step-5"):
        ema_optax.torch.import_checkpoint(tmp_path / "step-5", tmp_path / "out")
    format_utils.dcp_to_torch_save(tmp_path / "step-5", tmp_path / "step-5.pt")
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "step-5.pt", tmp_path / "out", step=5
    )
    shadow = raw | {n: 0.5 * x for n, x in model.named_parameters()}
    shadow["tied.weight"] = raw["tied.weight"]  # its parameter has one name
    check(tmp_path / "out", raw, shadow)
    assert done.layout == "torchtitan"
    assert set(done.raw) == {"norm/running_mean", "norm/running_var", "tied/weight"}


def test_keys_of_averages(tmp_path):
    """torchtitan's, where each has a key: one is found, of several one is said."""
    raw = {"w": torch.ones(2), "buffer": torch.ones(3)}
    ema = {"state.w.ema_params.decay_0p999": torch.zeros(2)}
    torch.save({**raw, "ema": ema}, tmp_path / "m.pt")
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "m.pt", tmp_path / "out", step=5
    )
    check(tmp_path / "out", raw, raw | {"w": torch.zeros(2)})
    assert (done.layout, done.raw) == ("torchtitan", ("buffer",))
    ema["state.w.ema_params.half_life_0p05"] = torch.full((2,), 3.0)
    torch.save({**raw, "ema": ema}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"several averages.*half_life_0p05"):
        ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "other", step=5)
    ema_optax.torch.import_checkpoint(
        tmp_path / "m.pt",
        tmp_path / "other",
        params="**",
        shadow="ema.state.**.ema_params.half_life_0p05",
        step=5,
    )
    check(tmp_path / "other", raw, raw | {"w": torch.full((2,), 3.0)})


def test_kinds_of_files(tmp_path):
    """Old files, wrappers' names, other dtypes and layouts in memory."""
    state = {
        "a.turned": torch.arange(6.0).reshape(2, 3).T,
        "a.part": torch.arange(10.0)[3:7],
        "a.conj": torch.tensor([1 + 2j]).conj(),
        "a.half": torch.ones(2, dtype=torch.float16),
        "a.narrow": torch.ones(2, dtype=torch.bfloat16),
        "a.wide": torch.ones(2, dtype=torch.float64),
        "a.bool": torch.tensor([True, False]),
        "a.parameter": torch.nn.Parameter(torch.ones(3)),
    }
    wrapped = {f"module._orig_mod.{name}": x for name, x in state.items()}
    for at, zipped in enumerate((True, False)):
        torch.save(
            {"state_dict": wrapped, "epoch": 3, "global_step": 12},
            tmp_path / "m.pth",
            _use_new_zipfile_serialization=zipped,
        )
        done = ema_optax.torch.import_checkpoint(
            tmp_path / "m.pth", tmp_path / f"out{at}"
        )
        resolved = {n: x.detach().resolve_conj() for n, x in state.items()}
        assert stored(tmp_path / f"out{at}", "params") == expected(resolved)
        assert (done.step, done.layout) == (12, "state_dict")
        assert list(done.unwrapped.values()) == ["module._orig_mod."]


def test_files_of_programs_of_ones_own(tmp_path):
    """`params` and `shadow` say where they are; without them the keys are listed."""
    model, optimizer = trained(lambda *_: None)
    raw = model.state_dict()
    average = {n: x / 2 if x.is_floating_point() else x for n, x in raw.items()}
    content = {"net": raw, "avg": average, "optim": optimizer.state_dict(), "step": 9}
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"'net' \(\d+ tensors\), 'avg'.*params=\"net"):
        ema_optax.torch.import_checkpoint(tmp_path / "mine.pt", tmp_path / "out")
    done = ema_optax.torch.import_checkpoint(
        tmp_path / "mine.pt", tmp_path / "out", params="net", shadow="avg"
    )
    check(tmp_path / "out", raw, average)
    assert (done.step, done.told_by["step"]) == (9, "step")
    assert list(done.left_out) == ["optim"]
    torch.save({"model": raw, "ema": average, "opt": {}}, tmp_path / "dit.pt")
    ema_optax.torch.import_checkpoint(tmp_path / "dit.pt", tmp_path / "dit", step=1)
    check(tmp_path / "dit", raw, average)


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (lambda: torch.ones(2).to_sparse(), "float32, sparse_coo"),
        (lambda: torch.ones(2, device="meta"), "without values, on the device meta"),
        (lambda: torch.ones(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.tensor([1.0, float("nan")]), "1 of 2 elements"),
        (
            lambda: torch.tensor([1.0, float("-inf")], dtype=torch.bfloat16),
            "1 of 2 elements",
        ),
    ],
)
def test_tensors_that_cannot_be_held(tmp_path, tensor, told):
    """The error names the leaf, and nothing is written; a rule leaves it out."""
    torch.save({"good": torch.ones(2), "a.bad": tensor()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"'a.bad' in .*{told}"):
        ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rules = [Rule("a.bad", None), Rule("**", "**")]
    ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "out", rules=rules)


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, line):
        self.line = line

    def __reduce__(self):
        return os.system, (self.line,)


class Unknown:
    """A class that the reader has not."""


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(tmp_path, zipped):
    """A file that would run a command is refused, and does not run it."""
    sentinel = tmp_path / "sentinel"
    content = {"model": {"w": torch.ones(2)}, "x": Command(f"touch {sentinel}")}
    for name in ("m.pt", "m.ckpt", "m.bin", "m.pth.tar"):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="holds more than tensors") as caught:
            ema_optax.torch.import_checkpoint(tmp_path / name, tmp_path / "out")
        assert "weights_only=False" in str(caught.value)
        assert len(str(caught.value)) < 1000
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Command(f"touch {sentinel}")))
    with pytest.raises(ValueError, match=r"plain.pt"):
        ema_optax.torch.import_checkpoint(tmp_path / "plain.pt", tmp_path / "out")
    assert not sentinel.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert sentinel.exists()  # what was refused would have run


def test_objects_are_named(tmp_path):
    """The error names the class that the file needs."""
    torch.save({"model": torch.ones(2), "x": Unknown()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"numbers and texts: .*\.Unknown"):
        ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "out")


def _cyclic():
    made = []
    made.append(made)
    return made


def _wide():
    made = [1]
    for _ in range(40):
        made = [made, made]
    return made


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (_cyclic, "nests more than 64 deep"),
        (_wide, "nests more than 64 deep, or more than"),
        (lambda: {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "called 'a.b'"),
        pytest.param(lambda: {"a": 1}, "There are no tensors in it", id="no tensors"),
        (
            lambda: {"decay": 0.9, "shadow_params": [torch.ones(2)]},
            "'shadow_params' is a list, without names",
        ),
    ],
)
def test_strange_files(tmp_path, content, told, monkeypatch):
    """Endless ones too end with a short error."""
    monkeypatch.setattr("ema_optax._interop.torch_files._MOST", 10_000)
    torch.save(content(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=told):
        ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "out")


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.99])
def test_cut_files(tmp_path, part):
    """What was not wholly downloaded is said to be that."""
    torch.save({"w": torch.ones(1000)}, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    size = part if isinstance(part, int) else int(part * len(data))
    (tmp_path / "m.pt").write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"no whole file of torch.save"):
        ema_optax.torch.import_checkpoint(tmp_path / "m.pt", tmp_path / "out")


def test_command(tmp_path):
    """The command of a shell reads what the function reads, and prints no warning."""
    model, _ = trained(lambda *_: None)
    torch.save({"model": model.state_dict(), "step": 4}, tmp_path / "m.pt")
    line = ["import-torch", str(tmp_path / "m.pt"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "ema_optax", *line, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["step"] == 4
    assert not done.stderr
    assert stored(tmp_path / "out", "params") == expected(model.state_dict())
