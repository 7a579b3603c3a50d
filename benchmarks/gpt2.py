"""GPT-2: the shapes of its params, and its loss."""

import jax
import jax.numpy as jnp
import optax


def shapes(width=768, vocabulary=50257, context=1024, blocks=12):
    """Returns the shapes of GPT-2 small: 12 leaves a block and 4 more, 148 in all."""
    d = width
    block = {
        "ln1_scale": (d,), "ln1_bias": (d,), "ln2_scale": (d,), "ln2_bias": (d,),
        "qkv": (d, 3 * d), "qkv_bias": (3 * d,), "proj": (d, d), "proj_bias": (d,),
        "up": (d, 4 * d), "up_bias": (4 * d,), "down": (4 * d, d), "down_bias": (d,),
    }  # fmt: skip
    rest = {"wte": (vocabulary, d), "wpe": (context, d), "lnf": (d,), "lnf_bias": (d,)}
    return {f"block{i:02d}": block for i in range(blocks)} | {"rest": rest}


def loss(params, tokens, heads=4):
    """Returns the next-token loss of a decoder with such params."""

    def norm(x, scale, bias):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    rest, length = params["rest"], tokens.shape[1] - 1
    x = rest["wte"][tokens[:, :-1]] + rest["wpe"][:length]
    for name in sorted(set(params) - {"rest"}):
        p = params[name]
        y = norm(x, 1 + p["ln1_scale"], p["ln1_bias"]) @ p["qkv"] + p["qkv_bias"]
        q, k, v = jnp.split(y.reshape(*y.shape[:2], 3 * heads, -1), 3, axis=2)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + y @ p["proj"] + p["proj_bias"]
        y = norm(x, 1 + p["ln2_scale"], p["ln2_bias"]) @ p["up"] + p["up_bias"]
        x = x + jax.nn.gelu(y) @ p["down"] + p["down_bias"]
    logits = norm(x, 1 + rest["lnf"], rest["lnf_bias"]) @ rest["wte"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
