"""One fold of an average by every library that has one, behind one interface.

Each is set to a constant β and starts as a copy of p₀. Who measures errors gives p₀ to
be folded once more: torch, diffusers and ema-pytorch copy what they are given first.
"""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ema_optax
from ema_optax._averages import packing

OURS = "ema_optax.update_shadow"
TRANSFORM = "ema_optax.ema_params"
PACKED = f"{TRANSFORM}, pack_small"
COPY, TRIAD, TORCH_COPY = "copy, JAX", "triad, JAX", "copy, torch"
LIMITS = COPY, TRIAD, TORCH_COPY


class JaxFold(NamedTuple):
    """A pure fold, to be jitted with its state donated.

    Attributes:
        state: Whatever is kept between folds, the shadow among it.
        fold: From state and new params to the new state.
        read: From a state to the list of the shadow's arrays.
    """

    state: Any
    fold: Callable[[Any, Any], Any]
    read: Callable[[Any], list[Any]]


class TorchFold(NamedTuple):
    """A fold in place.

    Attributes:
        fold: Folds what the model holds now.
        read: Returns the list of the shadow's tensors.
    """

    fold: Callable[[], Any]
    read: Callable[[], list[Any]]


def ours(params, beta):
    wide = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    return JaxFold(
        wide, lambda s, p: ema_optax.update_shadow(s, p, beta), jax.tree.leaves
    )


def _transform(made, params, shadow_of):
    """A transform alone, with updates of zero, which XLA leaves out."""

    def fold(state, params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return made.update(zeros, state, params)[1]

    return JaxFold(made.init(params), fold, lambda s: jax.tree.leaves(shadow_of(s)))


def ours_transform(params, beta, **options):
    made = ema_optax.ema_params(ema_optax.constant(beta), **options)
    return _transform(made, params, lambda state: packing.unpacked(state.shadow))


def ours_packed(params, beta):
    return ours_transform(params, beta, pack_small=True)


def ours_bfloat16(params, beta):
    return ours_transform(params, beta, shadow_dtype="bfloat16")


def optax_incremental(params, beta):
    def fold(s, p):
        return optax.incremental_update(p, s, 1 - beta)

    return JaxFold(params, fold, jax.tree.leaves)


class _Model(nnx.Module):
    def __init__(self, params):
        for module, arrays in params.items():
            for name, value in arrays.items():
                setattr(self, f"{module}_{name}", nnx.Param(value))


def flax_ema(params, beta):
    definition, state = nnx.split(nnx.EMA(_Model(params), beta))

    def fold(state, params):
        ema = nnx.merge(definition, state)
        ema.update(_Model(params))
        return nnx.split(ema)[1]

    return JaxFold(state, fold, jax.tree.leaves)


def haiku_ema(params, beta):
    import haiku

    @haiku.transform_with_state
    def average(tree):
        return haiku.EMAParamsTree(beta, zero_debias=False)(tree)

    state = jax.eval_shape(average.init, None, params)[1]
    arrays = {f"{m}__{k}": x for m, tree in params.items() for k, x in tree.items()}
    started = {  # as copies of the params: its own start, of zeros, is its debiasing
        path: {"counter": jnp.zeros([], jnp.int32), "hidden": x, "average": x}
        for path in state
        for x in [arrays[path.split("/")[-1]]]
    }

    def fold(state, params):
        return average.apply(None, state, None, params)[1]

    return JaxFold(started, fold, lambda s: [v["average"] for v in s.values()])


def kauldron_ema(params, beta):
    from kauldron.optim.ema_params import ema_params

    made = ema_params(decay=beta, debias=False)
    return _transform(made, params, lambda state: state.ema_params)


def jax_copy(params, beta):
    """Reads one tree and writes another: negated, for XLA to use all its threads."""
    return JaxFold(params, lambda s, p: jax.tree.map(jnp.negative, p), jax.tree.leaves)


def jax_triad(params, beta):
    """The traffic of a fold with the least arithmetic: s ← p + ½·s."""
    return JaxFold(
        params,
        lambda s, p: jax.tree.map(lambda s, p: p + 0.5 * s, s, p),
        jax.tree.leaves,
    )


def torch_copy(model, beta):
    import torch

    source = [p.detach() for p in model.parameters()]
    target = [p.clone() for p in source]
    return TorchFold(lambda: torch._foreach_copy_(target, source), lambda: target)


def torch_averaged(model, beta):
    from torch.optim import swa_utils

    average = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(beta)
    )
    return TorchFold(
        lambda: average.update_parameters(model), lambda: list(average.parameters())
    )


def timm_ema(model, beta):
    try:
        from timm.utils.model_ema import ModelEmaV3
    except ImportError:  # timm wants torchvision, which its average does not use
        ModelEmaV3 = _alone("timm", "utils/model_ema.py").ModelEmaV3  # noqa: N806
    average = ModelEmaV3(model, beta)
    return TorchFold(
        lambda: average.update(model), lambda: list(average.module.parameters())
    )


def _alone(package, path):
    """Imports one file of an installed package that cannot be imported whole."""
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    file = pathlib.Path(found.origin).parent / path
    spec = importlib.util.spec_from_file_location(f"{package}_alone", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def diffusers_ema(model, beta):
    from diffusers.training_utils import EMAModel

    # The floor switches off the warm-up that this class always applies.
    average = EMAModel(model.parameters(), decay=beta, min_decay=beta, foreach=True)
    return TorchFold(
        lambda: average.step(model.parameters()), lambda: average.shadow_params
    )


def ema_pytorch_ema(model, beta):
    from ema_pytorch import EMA

    average = EMA(
        model,
        beta=beta,
        min_value=beta,  # which switches off its warm-up
        update_after_step=0,
        update_every=1,
        use_foreach=True,
        include_online_model=False,
    )
    return TorchFold(average.update, lambda: list(average.ema_model.parameters()))


IN_JAX = {
    COPY: jax_copy,
    TRIAD: jax_triad,
    OURS: ours,
    TRANSFORM: ours_transform,
    PACKED: ours_packed,
    "optax.incremental_update": optax_incremental,
    "flax.nnx.EMA": flax_ema,
    "haiku.EMAParamsTree": haiku_ema,
    "kauldron ema_params": kauldron_ema,
}
IN_TORCH = {
    TORCH_COPY: torch_copy,
    "torch AveragedModel": torch_averaged,
    "timm ModelEmaV3": timm_ema,
    "diffusers EMAModel": diffusers_ema,
    "ema-pytorch EMA": ema_pytorch_ema,
}
DEFAULTS = {  # the warm-up of each, where none is asked for
    OURS: "none",
    TRANSFORM: "min(β, (1+t)/(10+t)) where β is a number",
    "optax.incremental_update": "none",
    "flax.nnx.EMA": "none",
    "haiku.EMAParamsTree": "from zero, divided by 1−β^t",
    "kauldron ema_params": "min(β, (1+t)/(10+t))",
    "torch AveragedModel": "copies first",
    "timm ModelEmaV3": "none",
    "diffusers EMAModel": "copies first, min(β, (1+t)/(10+t))",
    "ema-pytorch EMA": "copies first, 1−(1+t)^(−2/3)",
}


def installed():
    """Returns the usable makers, of JAX and of torch, and why others are left out."""
    missing, usable = {}, ({}, {})
    tiny = {"a": {"w": jnp.ones(2)}}
    for name, make in IN_JAX.items():
        try:
            make(tiny, 0.9)
            usable[0][name] = make
        except ImportError as error:
            missing[name] = str(error)
    for name, make in IN_TORCH.items():
        try:
            make(torch_model(tiny), 0.9)
            usable[1][name] = make
        except ImportError as error:
            missing[name] = str(error)
    return *usable, missing


def torch_model(params, dtype=None):
    """Returns a module with a copy of these params, on a GPU where JAX's are.

    Raises:
        ImportError: If torch cannot follow JAX to the GPU.
    """
    import numpy as np
    import torch

    arrays = [np.array(leaf, np.float32) for leaf in jax.tree.leaves(params)]
    model = torch.nn.ParameterList([torch.from_numpy(a) for a in arrays])
    if jax.default_backend() != "gpu":
        return model.to(dtype)
    if not torch.cuda.is_available():
        raise ImportError("this torch has no CUDA")
    return model.to("cuda", dtype)


def torch_wait():
    """Waits until a GPU has done what torch gave it; on the CPU all is done."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
