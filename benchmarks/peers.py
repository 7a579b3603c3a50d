"""The fold beside every peer's: speed, error, and its share of a training step.

    pip install torch timm diffusers dm-haiku ema-pytorch kauldron tensorflow
    python benchmarks/peers.py [--quick] [--rounds R] [--out FILE] [--picture FILE]

`pip` installs the peers; one that does not import is left out, and named in the table.
`--quick` takes small trees and shows only that it runs.

Everything runs in one process, interleaved, on the same arrays, with torch on as many
threads as there are cores and JAX states donated. Bytes come first, from XLA's own
analysis. Times are medians of ratios of neighbouring runs, with their quartiles.
"""

import argparse
import datetime
import functools
import gc
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import time

import folds
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optimizer_step
from matplotlib.figure import Figure

import ema_optax
from ema_optax.plots import style

BETAS = 0.999, 0.9999, 0.99999
PACKAGES = (
    "ema-optax jax optax flax numpy torch timm diffusers dm-haiku ema-pytorch kauldron"
).split()
STEP_ROWS = {
    "hand-written": optimizer_step.ROWS["naive"],
    "every=1": optimizer_step.ROWS["ema_params"],
    "every=10": optimizer_step.ROWS["every=10"],
    "every=100": optimizer_step.ROWS["every=100"],
    "bfloat16 shadow": optimizer_step.ROWS["bfloat16"],
    "two shadows": optimizer_step.ROWS["two shadows"],
    "four shadows": lambda: ema_optax.ema_params(
        {"a": 0.99, "b": 0.999, "c": 0.9999, "d": 0.99999}
    ),
}
NOTES = """\
**How to read it.** GB/s counts what a fold cannot do without: the shadow read and
written, the params read (of a copy: one tree read, one written). A copy also makes the
processor fetch the lines that it overwrites, which nothing counts, and a fold in place
does not: so a fold may exceed 100 % of it. The triad has a fold's own traffic and is
the nearer limit of it.

**Where ours does more.** An element that is not finite is left out of our fold, of no
peer's; that is two comparisons and selections per element, none of them memory traffic.
Folds of trees of thousands of small leaves cost a dispatch and a kernel for each leaf in
XLA, whoever wrote them, where torch goes through a list in one call.

**Error.** Peers that compute β·s + (1−β)·p round both constants to float32, whose sum
then is not 1: the shadow shrinks. Those that compute s + w·(p − s) err by rounding alone,
and at the same rate as ours, which is the same formula. At β = .99999 what is left
is the float32 of the shadow itself, in every one of them.
"""


def gpt2(width, vocabulary, context, blocks=12):
    """Returns the shapes of GPT-2's 4 + 12·blocks − 3 leaves; width 768 is the small."""
    d = width
    block = {
        "ln1_scale": (d,), "ln1_bias": (d,), "ln2_scale": (d,), "ln2_bias": (d,),
        "qkv": (d, 3 * d), "qkv_bias": (3 * d,), "proj": (d, d), "proj_bias": (d,),
        "up": (d, 4 * d), "up_bias": (4 * d,), "down": (4 * d, d),
    }  # fmt: skip
    shapes = {f"block{i:02d}": block | {"down_bias": (d,)} for i in range(blocks)}
    # With lnf's bias and scale this is 148; the head shares wte. One leaf is left out
    # of nothing: 12·12 + 4 leaves, of which GPT-2 has all.
    rest = {"wte": (vocabulary, d), "wpe": (context, d), "lnf": (d,), "lnf_bias": (d,)}
    return shapes | {"rest": rest}


def small_leaves(count):
    return {f"m{i:04d}": {"w": (64, 64)} for i in range(count)}
