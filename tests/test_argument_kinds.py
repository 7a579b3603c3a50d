"""Every public function, each argument of another kind: a short error, or none.

What a user passes by a slip is a tree, a state, a model, a path, an array. Whatever
comes of it names no element, no PyTreeDef and no address, and is read at one glance.
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx
from flax.training.train_state import TrainState

import ema_optax
from ema_optax import checkpoint, interop, placement, reconstruction

PARAMS = {"dense": {"kernel": jnp.arange(4.0), "bias": jnp.ones(2)}}
OPTIMIZER = optax.chain(optax.adam(0.1), ema_optax.ema_params(ema_optax.power(0.05)))
STATE = OPTIMIZER.update(PARAMS, OPTIMIZER.init(PARAMS), PARAMS)[1]
TRANSFORM = ema_optax.ema_params(0.9)
MODEL = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
NNX_OPTIMIZER = nnx.Optimizer(MODEL, OPTIMIZER, wrt=nnx.Param)
SNAPSHOTS = [
    reconstruction.Snapshot(step, exponent, {"w": np.ones(2, np.float32)})
    for step, exponent in itertools.product((1, 2, 3), (16.97, 6.94))
]
OTHERS = {
    "params": PARAMS,
    "state": STATE,
    "TrainState": TrainState(0, None, PARAMS, OPTIMIZER, STATE),
    "optimizer": OPTIMIZER,
    "large tree": {f"layer_{i}": jnp.zeros((30, 30)) for i in range(200)},
    "nnx model": MODEL,
    "nnx state": nnx.state(MODEL),
    "array": jnp.arange(3.0),
    "snapshots": SNAPSHOTS,
    "shapes": jax.eval_shape(lambda: PARAMS),
    "decay": ema_optax.power(0.05),
    "class": ema_optax.power,
    "text": "no-such-name",
    "number": -1.5,
    "nothing": None,
    "list": [1.0, None],
}
# A model may be called, so that it is taken for a function; what comes is its own.
CALLED = {
    "mask",
    "decay",
    "shadow_sharding",
    "place",
    "progress",
    "call",
    "apply_fn",
    "evaluate",
}
FOLDER, OUT, THEIRS = "FOLDER", "OUT", "THEIRS"
RULES, WEIGHTS = "RULES", "WEIGHTS"

CALLS = {
    ema_optax.shadow_params: {"opt_state": STATE, "params": PARAMS, "name": None},
    ema_optax.metrics: {"opt_state": STATE, "params": PARAMS, "name": None},
    ema_optax.diagnose: {
        "opt_state": STATE,
        "params": PARAMS,
        "evaluate": None,
        "name": None,
        "maximize": False,
        "batch_sizes": (8, 16),
    },
    ema_optax.with_shadow: {"train_state": OTHERS["TrainState"], "name": None},
    ema_optax.started_from: {
        "opt_state": STATE,
        "shadow": PARAMS,
        "count": 10,
        "name": None,
    },
    ema_optax.ema_params: {
        "decay": 0.9,
        "mask": None,
        "every": 1,
        "overwrite_every": None,
        "shadow_dtype": None,
        "rounding": None,
        "pack_small": False,
        "shadow_sharding": None,
    },
    ema_optax.bema_params: {"every": 4, "ema_power": 0.5, "lag": 10, "mask": None},
    ema_optax.ring: {"k": 3, "every": 2, "mask": None},
    TRANSFORM.update: {
        "updates": PARAMS,
        "state": TRANSFORM.init(PARAMS),
        "params": PARAMS,
    },
    ema_optax.constant: {"decay": 0.9},
    ema_optax.warmup: {"decay": 0.9, "offset": 10},
    ema_optax.debiased: {"decay": 0.9},
    ema_optax.half_life: {"steps": 10},
    ema_optax.window: {"n": 3},
    ema_optax.fraction: {"f": 0.1},
    ema_optax.power: {"width": 0.05},
    ema_optax.ramp: {"decay": 0.9, "time_constant": 10},
    ema_optax.inverse_power: {"decay": 0.9, "inv_gamma": 1, "power": 0.7},
    ema_optax.start_after: {"decay": 0.9, "step": 3},
    ema_optax.scale_to_batch: {"decay": 0.9, "factor": 2.0},
    ema_optax.profile: {"decay": 0.9, "steps": 10, "every": 1},
    ema_optax.width_from_exponent: {"exponent": 3.0},
    ema_optax.exponent_from_width: {"width": 0.1},
    ema_optax.update_shadow: {"shadow": PARAMS, "params": PARAMS, "decay": 0.9},
    checkpoint.save: {
        "directory": FOLDER,
        "params": PARAMS,
        "opt_state": STATE,
        "step": 7,
        "averaged": None,
    },
    checkpoint.save_average: {
        "directory": FOLDER,
        "tree": PARAMS,
        "step": 8,
        "count": None,
        "decay": None,
        "every": None,
    },
    checkpoint.adopt: {
        "source": THEIRS,
        "out": FOLDER,
        "params": None,
        "shadow": "auto",
        "like": None,
        "step": 9,
        "count": None,
        "decay": None,
        "zero_started": None,
        "partial": False,
        "dry_run": True,
    },
    checkpoint.restore: {
        "directory": FOLDER,
        "tree": "shadow",
        "like": PARAMS,
        "step": 1,
        "item": None,
        "rename": None,
        "verify": True,
    },
    checkpoint.resume: {
        "directory": FOLDER,
        "params": PARAMS,
        "opt_state": STATE,
        "step": 1,
        "accept_new_decay": False,
        "rename": None,
        "missing": "start",
    },
    checkpoint.describe: {"directory": FOLDER, "step": 1, "item": None},
    checkpoint.verify: {"directory": FOLDER, "step": 1, "item": None},
    checkpoint.stored: {"directory": FOLDER, "tree": "shadow", "step": 1},
    checkpoint.stored_by_others: {"directory": THEIRS, "tree": "params", "step": 9},
    checkpoint.snapshots: {"directory": FOLDER, "names": None, "item": None},
    checkpoint.EmaSave: {"params": PARAMS, "opt_state": STATE},
    checkpoint.EmaRestore: {"tree": "shadow", "rename": None, "verify": True},
    checkpoint.SnapshotSave: {"opt_state": STATE, "dtype": None},
    checkpoint.KeepSnapshots: {"at_most": 8},
    ema_optax.safetensors.export: {
        "directory": FOLDER,
        "out": OUT,
        "tree": "shadow",
        "step": 1,
        "dtype": None,
        "rename": None,
        "rules": None,
        "max_shard_size": None,
        "overwrite": True,
        "dry_run": True,
    },
    ema_optax.torch.import_checkpoint: {
        "source": WEIGHTS,
        "out": FOLDER,
        "params": "w",
        "shadow": "ema",
        "shadow_from": None,
        "layout": None,
        "rules": None,
        "step": 19,
        "decay": None,
        "count": 9,
        "dry_run": True,
        "progress": None,
    },
    ema_optax.safetensors.stored: {"source": WEIGHTS, "tree": "w"},
    interop.Rule: {
        "name": ("q.weight", "k.weight"),
        "path": "qk/kernel",
        "rearrange": "(h d) i -> i h d",
        "sizes": {"h": 2},
        "axis": 1,
        "lengths": (2, 2),
    },
    interop.Rules.of: {"given": None},
    interop.Rules.from_json: {"text": '[{"name": "w", "path": "kernel"}]'},
    interop.read_rules: {"file": RULES},
    ema_optax.nnx.split: {"model": MODEL, "optimizer": NNX_OPTIMIZER},
    ema_optax.nnx.shadow_copy: {
        "model": MODEL,
        "optimizer": NNX_OPTIMIZER,
        "name": None,
    },
    placement.over_axis: {"axis": "data"},
    reconstruction.choose: {
        "source": SNAPSHOTS,
        "evaluate": lambda params: float(params["w"][0]),
        "over": "width",
        "budget": 3,
        "maximize": False,
        "between": None,
        "among": None,
        "params": None,
        "at_once": 3,
        "log": None,
        "out": None,
    },
    reconstruction.Score: {"value": 0.5, "error": 0.1},
    reconstruction.coefficients: {
        "steps": [1, 2, 3],
        "exponents": 3.0,
        "exponent": 4.0,
        "step": 3.0,
        "ridge": 0.0,
    },
    reconstruction.decay_coefficients: {"decay": 0.9, "steps": [1, 2]},
    reconstruction.extrapolated: {
        "coefficients": [0.5, 0.5],
        "origin": [1.0, 0.0],
        "alpha": 0.3,
    },
    reconstruction.noise_gain: {"coefficients": [0.5, 0.5]},
    reconstruction.lr_decay: {"coefficients": [0.5, 0.5]},
    reconstruction.lr_decay_coefficients: {"multipliers": [1.0, 0.5]},
    reconstruction.uniform_coefficients: {"count": 3, "last": None},
    reconstruction.rounding_variance: {"dtype": "float16"},
    reconstruction.merge: {
        "trees": [PARAMS, PARAMS],
        "coefficients": "linear",
        "steps": [1, 2],
        "params": None,
        "dtype": None,
    },
    reconstruction.soup: {
        "models": [PARAMS, PARAMS],
        "method": "uniform",
        "params": None,
        "start": None,
        "maximize": False,
    },
    reconstruction.plan: {"steps": 100, "snapshots": 4, "dtype": None},
    reconstruction.reachable: {"steps": [1, 2, 3], "exponents": [3.0] * 3, "step": 3.0},
    reconstruction.reconstruct: {"snapshots": SNAPSHOTS, "width": 0.07, "step": None},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, PARAMS, STATE, step=1)
    rules = folder / "rules.json"
    rules.write_text('[{"name": "w", "path": "kernel"}]')
    weights = folder / "weights.safetensors"
    both = {"w.a": np.ones(2, np.float32), "ema.a": np.ones(2, np.float32)}
    safetensors.numpy.save_file(both, weights)
    theirs = tmp_path_factory.mktemp("theirs")
    with ocp.StandardCheckpointer() as writer:
        writer.save(theirs / "9", {"params": PARAMS, "ema_params": PARAMS})
    out = folder / "model.safetensors"
    return {FOLDER: folder, OUT: out, RULES: rules, WEIGHTS: weights, THEIRS: theirs}


def told(function, arguments):
    """Returns the error of a call, and None if there is none."""
    try:
        function(**arguments)
    except Exception as error:  # whatever a user would read
        return error
    return None


@pytest.mark.filterwarnings("ignore::ema_optax.OrderWarning")
@pytest.mark.filterwarnings("ignore::ema_optax.reconstruction.EvaluationWarning")
@pytest.mark.parametrize(
    "function", CALLS, ids=lambda f: f"{f.__module__}.{f.__name__}"
)
def test_arguments_of_another_kind(function, places, tmp_path, monkeypatch):
    """Short errors without elements, and of a kind that a caller may expect."""
    monkeypatch.chdir(tmp_path)  # a text is a good path
    good = {
        name: places.get(value, value) if isinstance(value, str) else value
        for name, value in CALLS[function].items()
    }
    error = told(function, good)
    assert error is None or isinstance(error, ImportError), error
    wrong = [
        (f"{name}={kind}", good | {name: other})
        for name in good
        for kind, other in OTHERS.items()
        if not (name in CALLED and kind.startswith("nnx"))
    ] + [
        (f"{a} <-> {b}", good | {a: good[b], b: good[a]})
        for a, b in itertools.combinations(good, 2)
    ]
    refused = 0
    for label, arguments in wrong:
        error = told(function, arguments)
        if error is None:
            continue
        refused += 1
        text = str(error)
        said = f"{label}: {type(error).__name__}: {text[:500]}"
        kinds = (ValueError, TypeError, OSError, ImportError)
        assert isinstance(error, kinds), said
        assert 10 < len(text) < 1000, said
        assert text.count("\n") < 10, said
        for word in ("Array(", "array(", "PyTreeDef", " at 0x", "0., 0."):
            assert word not in text, said
    assert refused >= len(good)
    assert os.listdir(tmp_path) in ([], ["no-such-name"])
