"""Exports by rules, loaded by PyTorch's libraries: the same forward pass, to rounding.

Each model is tiny, with random weights that the library makes. They go through its own
file and the rules into JAX, where the forward pass is written by hand, are exported by
the same rules, and load again with not a bit changed.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ema_optax
from ema_optax import _cli as cli
from ema_optax import checkpoint
from ema_optax._trees import trees
from ema_optax.interop import Rule, Rules

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("einops")

# The forward passes differ by the order of sums alone; a wrong axis is off by 1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


def random_weights(model):
    """Draws every floating weight and buffer, those too that start as 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                draw = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(draw.abs() + 0.5 if "var" in name else 0.2 * draw)
    return model.eval()


def saved(model, folder):
    """Saves a model as its library does, and returns the arrays in its file."""
    model.save_pretrained(folder)
    return arrays(folder)


def arrays(folder):
    """All tensors in a folder."""
    found = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        found |= {k: v.numpy() for k, v in safetensors_torch.load_file(file).items()}
    return found


def into_jax(rules, names):
    """A nested tree by the rules."""
    moves = Rules.of(rules).to_tree({k: v.shape for k, v in names.items()})
    flat = {p: jnp.asarray(m([names[s] for s in m.sources])) for p, m in moves.items()}
    return trees.nested(flat)


def run_of(params, folder):
    """A run whose raw params are those, and whose average is another."""
    transform = ema_optax.ema_params(0.5)
    state = transform.init(params)
    updates = jax.tree.map(lambda x: jnp.full_like(x, 0.01), params)
    _, state = transform.update(updates, state, params)
    checkpoint.save(folder, params, state, step=5)


def exported(rules, params, tmp_path, **options):
    """The folders of raw params and average, by the command."""
    file = tmp_path / "rules.json"
    file.write_text(Rules.of(rules).to_json())
    run_of(params, tmp_path / "run")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), "--out", str(out), "--rules", str(file)]
    command += ["--tree", "params", "--tree", "shadow"]
    for option, value in options.items():
        command += [f"--{option.replace('_', '-')}", value]
    assert cli.main(command) == 0
    return out / "params", out / "shadow"


def check_bits(before, folder):
    """JAX → file gives the tensors that the library wrote."""
    after = arrays(folder)
    assert set(after) == set(before)
    for name, array in before.items():
        assert after[name].dtype == array.dtype, name
        np.testing.assert_array_equal(after[name], array, err_msg=name)


def layer_norm(x, p, eps):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + eps) * p["scale"] + p["bias"]


def rms_norm(x, scale, eps):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def attention(q, k, v, *, causal):
    """Of [batch, time, heads, width]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(mask, scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


GPT2 = [
    Rule("transformer.wte.weight", "wte"),
    Rule("transformer.wpe.weight", "wpe"),
    Rule("transformer.**.ln_*.weight", "**/ln_*/scale"),
    Rule("transformer.**.ln_*.bias", "**/ln_*/bias"),
    Rule(
        "transformer.h.*.attn.c_attn.weight",
        ("h/*/q/kernel", "h/*/k/kernel", "h/*/v/kernel"),
        "i (h d) -> i h d",
        sizes={"h": 2},
        axis=1,
    ),
    Rule(
        "transformer.h.*.attn.c_attn.bias",
        ("h/*/q/bias", "h/*/k/bias", "h/*/v/bias"),
        "(h d) -> h d",
        sizes={"h": 2},
    ),
    # Conv1D lies as JAX's kernels do.
    Rule(
        "transformer.h.*.attn.c_proj.weight",
        "h/*/out/kernel",
        "(h d) o -> h d o",
        sizes={"h": 2},
    ),
    Rule("transformer.h.*.attn.c_proj.bias", "h/*/out/bias"),
    Rule("transformer.h.*.mlp.*.weight", "h/*/*/kernel"),
    Rule("transformer.h.*.mlp.*.bias", "h/*/*/bias"),
]


def gpt2(params, tokens):
    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]
    for at in sorted(params["h"], key=int):
        p = params["h"][at]
        y = layer_norm(x, p["ln_1"], 1e-5)
        q, k, v = (
            jnp.einsum("bti,ihd->bthd", y, p[n]["kernel"]) + p[n]["bias"] for n in "qkv"
        )
        y = attention(q, k, v, causal=True)
        x += jnp.einsum("bthd,hdo->bto", y, p["out"]["kernel"]) + p["out"]["bias"]
        y = layer_norm(x, p["ln_2"], 1e-5) @ p["c_fc"]["kernel"] + p["c_fc"]["bias"]
        y = jax.nn.gelu(y, approximate=True)
        x += y @ p["c_proj"]["kernel"] + p["c_proj"]["bias"]
    return layer_norm(x, params["ln_f"], 1e-5) @ params["wte"].T


def test_gpt2(tmp_path):
    """Conv1D, which is not transposed, and one tensor of query, key and value."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=3, n_head=2
    )
    model = random_weights(transformers.GPT2LMHeadModel(config))
    before = saved(model, tmp_path / "before")
    params = into_jax(GPT2, before)
    tokens = np.random.default_rng(0).integers(0, 17, (2, 6))
    raw, average = exported(GPT2, params, tmp_path, max_shard_size="2KB")
    check_bits(before, raw)
    assert len(list(raw.glob("model-0000?-of-0000?.safetensors"))) > 3
    shadow = checkpoint.restore(tmp_path / "run", "shadow")
    results = []
    for folder, tree in ((raw, params), (average, shadow)):
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        loaded, info = transformers.GPT2LMHeadModel.from_pretrained(
            folder, output_loading_info=True
        )
        assert not info["unexpected_keys"]
        assert not set(info["missing_keys"]) - {"lm_head.weight"}  # tied
        with torch.no_grad():
            results.append(loaded.eval()(torch.as_tensor(tokens)).logits.numpy())
        np.testing.assert_allclose(results[-1], gpt2(tree, tokens), **CLOSE)
    assert not np.allclose(results[0], results[1], **CLOSE)


LAYER = "model.layers.#."
LLAMA = [
    Rule("model.embed_tokens.weight", "embed"),
    Rule("lm_head.weight", "head/kernel", "o i -> i o"),
    Rule("model.norm.weight", "norm/scale"),
    Rule(f"{LAYER}*_layernorm.weight", "layers/*_norm/scale"),
    Rule(
        tuple(f"{LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
        "layers/qkv/kernel",
        "l (h d) i -> l i h d",
        sizes={"d": 4},
        axis=2,
        lengths=(4, 2, 2),
    ),
    Rule(
        f"{LAYER}self_attn.o_proj.weight",
        "layers/out/kernel",
        "l o (h d) -> l h d o",
        sizes={"d": 4},
    ),
    Rule(f"{LAYER}mlp.*_proj.weight", "layers/*/kernel", "l o i -> l i o"),
]


def rotated(x, theta):
    """Turns each pair of a half and the other half, as Llama does."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def llama(params, tokens):
    def layer(x, p):
        y = rms_norm(x, p["input_norm"]["scale"], 1e-6)
        heads = jnp.einsum("bti,ihd->bthd", y, p["qkv"]["kernel"])
        q, k, v = heads[:, :, :4], heads[:, :, 4:6], heads[:, :, 6:]
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        y = attention(rotated(q, 1e4), rotated(k, 1e4), v, causal=True)
        x += jnp.einsum("bthd,hdo->bto", y, p["out"]["kernel"])
        y = rms_norm(x, p["post_attention_norm"]["scale"], 1e-6)
        y = jax.nn.silu(y @ p["gate"]["kernel"]) * (y @ p["up"]["kernel"])
        return x + y @ p["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return rms_norm(x, params["norm"]["scale"], 1e-6) @ params["head"]["kernel"]


@pytest.mark.parametrize("size", ["1GB", "3KB"])
def test_llama(tmp_path, size):
    """Scanned layers, grouped queries fused of unequal parts; one file, or shards."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = random_weights(transformers.LlamaForCausalLM(config))
    before = saved(model, tmp_path / "before")
    params = into_jax(LLAMA, before)
    assert params["layers"]["qkv"]["kernel"].shape == (3, 16, 8, 4)
    raw, _ = exported(LLAMA, params, tmp_path, max_shard_size=size)
    check_bits(before, raw)
    assert (raw / "model.safetensors").exists() == (size == "1GB")
    assert (raw / "model.safetensors.index.json").exists() == (size == "3KB")
    (raw / "config.json").write_text(json.dumps(config.to_dict()))
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(
        raw, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    tokens = np.random.default_rng(0).integers(0, 17, (2, 6))
    with torch.no_grad():
        expected = loaded.eval()(torch.as_tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(llama(params, tokens), expected, **CLOSE)


VAE = [
    Rule("**.to_*.weight", "**/to_*/kernel", "o i -> i o"),
    Rule("**.to_out.0.weight", "**/to_out/0/kernel", "o i -> i o"),
    Rule("**.*norm*.weight", "**/*norm*/scale"),
    Rule("**.weight", "**/kernel", "o i h w -> h w i o"),
    Rule("**", "**"),
]


def conv(x, p, *, stride=1, padding=1):
    kernel = p["kernel"]
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2 if isinstance(padding, int) else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return y + p["bias"] if "bias" in p else y


def group_norm(x, p, groups, eps=1e-6):
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, groups, c // groups)
    mean = y.mean((1, 3), keepdims=True)
    var = ((y - mean) ** 2).mean((1, 3), keepdims=True)
    y = ((y - mean) / jnp.sqrt(var + eps)).reshape(x.shape)
    return y * p["scale"] + p["bias"]


def resnet_block(x, p):
    y = conv(jax.nn.silu(group_norm(x, p["norm1"], 2)), p["conv1"])
    y = conv(jax.nn.silu(group_norm(y, p["norm2"], 2)), p["conv2"])
    return (conv(x, p["conv_shortcut"], padding=0) if "conv_shortcut" in p else x) + y


def middle(x, p):
    x = resnet_block(x, p["resnets"]["0"])
    a = p["attentions"]["0"]
    b, h, w, c = x.shape
    y = group_norm(x, a["group_norm"], 2).reshape(b, h * w, 1, c)
    q, k, v = (y @ a[f"to_{n}"]["kernel"] + a[f"to_{n}"]["bias"] for n in "qkv")
    y = attention(q, k, v, causal=False).reshape(b, h, w, c)
    x = x + y @ a["to_out"]["0"]["kernel"] + a["to_out"]["0"]["bias"]
    return resnet_block(x, p["resnets"]["1"])


def encoded(params, x):
    p = params["encoder"]
    x = conv(x, p["conv_in"])
    for at in sorted(p["down_blocks"], key=int):
        block = p["down_blocks"][at]
        for each in sorted(block["resnets"], key=int):
            x = resnet_block(x, block["resnets"][each])
        for down in block.get("downsamplers", {}).values():
            x = conv(x, down["conv"], stride=2, padding=[(0, 1), (0, 1)])
    x = middle(x, p["mid_block"])
    x = conv(jax.nn.silu(group_norm(x, p["conv_norm_out"], 2)), p["conv_out"])
    x = conv(x, params["quant_conv"], padding=0)
    return x[..., : x.shape[-1] // 2]


def test_a_diffusers_autoencoder(tmp_path):
    """Convolutions, group norms and attention, by diffusers' names of files."""
    diffusers = pytest.importorskip("diffusers")
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "latent_channels": 2,
        "norm_num_groups": 2,
    }
    model = random_weights(diffusers.AutoencoderKL(**config))
    before = saved(model, tmp_path / "before")
    params = into_jax(VAE, before)
    name = "diffusion_pytorch_model"
    raw, average = exported(VAE, params, tmp_path, max_shard_size="9KB", name=name)
    check_bits(before, raw)
    assert (raw / f"{name}.safetensors.index.json").exists()
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    shadow = checkpoint.restore(tmp_path / "run", "shadow")
    for folder, tree in ((raw, params), (average, shadow)):
        (folder / "config.json").write_text(
            (tmp_path / "before" / "config.json").read_text()
        )
        loaded = diffusers.AutoencoderKL.from_pretrained(
            folder, low_cpu_mem_usage=False
        )
        with torch.no_grad():
            image = torch.as_tensor(x.transpose(0, 3, 1, 2))
            expected = loaded.eval().encode(image).latent_dist.mean.numpy()
        found = encoded(tree, x).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


VIT = [
    Rule("patch_embed.proj.weight", "patches/kernel", "o i h w -> h w i o"),
    Rule("patch_embed.proj.bias", "patches/bias"),
    Rule("cls_token", "cls"),
    Rule("pos_embed", "positions"),
    Rule("blocks.#.norm*.weight", "blocks/norm*/scale"),
    Rule("norm.weight", "norm/scale"),
    Rule(
        "blocks.#.attn.qkv.weight",
        ("blocks/q/kernel", "blocks/k/kernel", "blocks/v/kernel"),
        "l (h d) i -> l i h d",
        sizes={"h": 2},
    ),
    Rule(
        "blocks.#.attn.qkv.bias",
        ("blocks/q/bias", "blocks/k/bias", "blocks/v/bias"),
        "l (h d) -> l h d",
        sizes={"h": 2},
    ),
    Rule("blocks.#.**.weight", "blocks/**/kernel", "l o i -> l i o"),
    Rule("blocks.#.**", "blocks/**"),
    Rule("head.weight", "head/kernel", "o i -> i o"),
    Rule("**", "**"),
]


def vit(params, images):
    p = params["patches"]
    x = conv(images, p, stride=4, padding=0)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    cls = jnp.broadcast_to(params["cls"], (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([cls, x], 1) + params["positions"]

    def block(x, p):
        y = layer_norm(x, p["norm1"], 1e-6)
        q, k, v = (
            jnp.einsum("bti,ihd->bthd", y, p[n]["kernel"]) + p[n]["bias"] for n in "qkv"
        )
        y = attention(q, k, v, causal=False).reshape(x.shape)
        x += y @ p["attn"]["proj"]["kernel"] + p["attn"]["proj"]["bias"]
        y = layer_norm(x, p["norm2"], 1e-6)
        y = y @ p["mlp"]["fc1"]["kernel"] + p["mlp"]["fc1"]["bias"]
        y = jax.nn.gelu(y, approximate=False)
        return x + y @ p["mlp"]["fc2"]["kernel"] + p["mlp"]["fc2"]["bias"], None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    x = layer_norm(x, params["norm"], 1e-6)[:, 0]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def test_a_timm_vit(tmp_path):
    """A fused tensor of attention split and stacked; one file, `checkpoint_path`."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3}
    options |= {"num_heads": 2, "num_classes": 5}
    name = "vit_tiny_patch16_224"
    model = random_weights(timm.create_model(name, **options))
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    params = into_jax(VIT, before)
    raw, average = exported(VIT, params, tmp_path)
    check_bits(before, raw)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    shadow = checkpoint.restore(tmp_path / "run", "shadow")
    for folder, tree in ((raw, params), (average, shadow)):
        path = str(folder / "model.safetensors")
        loaded = timm.create_model(name, checkpoint_path=path, **options).eval()
        with torch.no_grad():
            expected = loaded(torch.as_tensor(x.transpose(0, 3, 1, 2))).numpy()
        np.testing.assert_allclose(vit(tree, x), expected, **CLOSE)


RESNET = [
    Rule("**.num_batches_tracked", None),
    Rule("**.running_*", "stats/**/*"),
    Rule("fc.weight", "fc/kernel", "o i -> i o"),
    Rule("**.bn*.weight", "**/bn*/scale"),
    Rule("conv1.1.weight", "conv1/1/scale"),
    Rule("conv1.4.weight", "conv1/4/scale"),
    Rule("**.downsample.2.weight", "**/downsample/2/scale"),
    Rule("**.weight", "**/kernel", "o i h w -> h w i o"),
    Rule("**", "**"),
]


def test_a_timm_resnet(tmp_path):
    """Convolutions and running statistics go out and load, but for a counter."""
    timm = pytest.importorskip("timm")
    model = random_weights(timm.create_model("test_resnet", num_classes=5))
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    params = into_jax(RESNET, before)
    run_of(params, tmp_path / "run")
    out = tmp_path / "model.safetensors"
    ema_optax.safetensors.export(tmp_path / "run", out, tree="params", rules=RESNET)
    floating = {k: v for k, v in before.items() if "num_batches" not in k}
    check_bits(floating, tmp_path)
    loaded = timm.create_model("test_resnet", num_classes=5)
    result = loaded.load_state_dict(safetensors_torch.load_file(out), strict=False)
    assert not result.unexpected_keys
    assert all("num_batches" in key for key in result.missing_keys)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), model(x))
    stem = params["conv1"]["0"] if "0" in params["conv1"] else params["conv1"]
    theirs = model.conv1[0] if "0" in params["conv1"] else model.conv1
    image = x.permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        expected = theirs(x).permute(0, 2, 3, 1).numpy()
    found = conv(image, stem, stride=theirs.stride[0], padding=theirs.padding[0])
    np.testing.assert_allclose(found, expected, **CLOSE)
