"""Where PyTorch's libraries keep raw weights, average, count and decay in a file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

from ema_optax._decays.decay import Decay
from ema_optax._interop import litema_names, torch_decays
from ema_optax._interop.torch_files import Tensors

TORCHTITAN = "ema.state.**.ema_params"  # where its average is
WEIGHTS = "weights"  # the layout of files that have nothing else

Names: TypeAlias = dict[str, str]  # of the model → in the file


@dataclasses.dataclass(frozen=True)
class Layout:
    """Describes one way to write raw weights and average into a file.

    Attributes:
        name: Name of the layout.
        what: Whose layout it is, and what is kept where.
        params: Names of the raw weights in the file, `**` for the model's own names;
            None where the file has no raw weights.
        shadow: The same of the average.
        dicts: Keys at the top that must be dicts.
        needs: Entries that must be there.
        without: Beginnings that no entry may have: they mark another layout.
        count: Entry that records the updates that the average has seen.
        step: Entry that records the number of the step.
        decay: Reads the decay of the average, where it is recorded.
        split: Separates what `params` fits into raw weights and average, where patterns
            cannot.
        is_partial: Whether the average may lack tensors, which are then raw in both.
    """

    name: str
    what: str
    params: str | None
    shadow: str | None
    dicts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    count: str | None = None
    step: str | None = None
    decay: Callable[[Tensors], tuple[Decay | None, str] | None] | None = None
    split: Callable[[Tensors, Mapping[str, str]], tuple[Names, Names]] | None = None
    is_partial: bool = False

    def fits(self, tensors: Tensors) -> bool:
        """Tells whether a file is of this layout."""
        names = tensors.entries.keys() | tensors.values.keys()
        return (
            tensors.nested.issuperset(self.dicts)
            and names >= set(self.needs)
            and not any(name.startswith(self.without) for name in names)
            and (self.params is None or bool(names_of(tensors, self.params)))
            and (self.shadow is None or bool(names_of(tensors, self.shadow)))
        )


def names_of(tensors: Tensors, pattern: str) -> dict[str, str]:
    """Finds the tensors that a pattern fits: text of `**` → name in the file.

    A name inside a dict at the top is fitted only by a pattern that names the dict. A
    pattern without `**` is a key, or the beginning of names.

    >>> from ema_optax._interop.torch_files import Entry
    >>> entries = {f"ema.{x}": Entry((2,), "float32") for x in ("fc.bias", "w")}
    >>> tensors = Tensors("a.pt", entries, {}, frozenset(["ema"]), lambda name: None)
    >>> names_of(tensors, "ema"), names_of(tensors, "**.bias"), names_of(tensors, "**")
    ({'fc.bias': 'ema.fc.bias', 'w': 'ema.w'}, {}, {})
    """
    start, wildcard, end = pattern.partition("**")
    if not wildcard:
        start = start.rstrip(".") + "."
    return {
        name[len(start) : len(name) - len(end)]: name
        for name in tensors.entries
        if name.startswith(start)
        and name.endswith(end)
        and len(name) > len(start) + len(end)
        and (start or name.partition(".")[0] not in tensors.nested)
    }


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "timm",
            "timm's state_dict and state_dict_ema",
            "state_dict",
            "state_dict_ema",
            ("state_dict", "state_dict_ema"),
            decay=torch_decays.timm,
        ),
        Layout(
            "lightning",
            "Lightning's WeightAveraging: the average is state_dict, and the raw "
            "weights are current_model_state",
            "current_model_state",
            "state_dict",
            ("current_model_state", "state_dict", "averaging_state"),
            count="averaging_state.n_averaged",
            step="global_step",
        ),
        Layout(
            "averaged-model",
            "PyTorch's AveragedModel, module.… and n_averaged, an average alone",
            None,
            "module.**",
            needs=("n_averaged",),
            count="n_averaged",
        ),
        Layout(
            "torchvision",
            "model, and model_ema of an AveragedModel",
            "model",
            "model_ema.module.**",
            ("model", "model_ema"),
            needs=("model_ema.n_averaged",),
            count="model_ema.n_averaged",
        ),
        Layout(
            "model-averaged",
            "model, and ema of an AveragedModel",
            "model",
            "ema.module.**",
            ("model", "ema"),
            needs=("ema.n_averaged",),
            count="ema.n_averaged",
        ),
        Layout(
            "model-ema",
            "model and ema, as DiT and many others write",
            "model",
            "ema",
            ("model", "ema"),
            without=("ema.initted", "ema.n_averaged", "ema.state."),
        ),
        Layout(
            "ema-pytorch-trainer",
            "model, and ema of ema-pytorch, as denoising-diffusion-pytorch writes",
            "model",
            "ema.ema_model.**",
            ("model", "ema"),
            needs=("ema.initted", "ema.step"),
            count="ema.step",
        ),
        Layout(
            "ema-pytorch",
            "ema-pytorch's online_model.… and ema_model.…",
            "online_model.**",
            "ema_model.**",
            needs=("initted", "step"),
            count="step",
        ),
        Layout(
            "ema-pytorch-alone",
            "ema-pytorch's ema_model.… without the online model",
            None,
            "ema_model.**",
            needs=("initted", "step"),
            without=("online_model.",),
            count="step",
        ),
        Layout(
            "torchtitan",
            "torchtitan's model at the top, and ema.state.….ema_params, converted by "
            "torch.distributed.checkpoint.format_utils",
            "**",
            TORCHTITAN,
            ("ema",),
            step="train_state.step",
            is_partial=True,
        ),
        Layout(
            "litema",
            "latent-diffusion's LitEma: model_ema.… without dots, in state_dict",
            "state_dict",
            "state_dict.model_ema.**",
            ("state_dict",),
            needs=("state_dict.model_ema.decay", "state_dict.model_ema.num_updates"),
            count="state_dict.model_ema.num_updates",
            step="global_step",
            decay=torch_decays.litema("state_dict."),
            split=litema_names.split,
            is_partial=True,
        ),
        Layout(
            "litema-flat",
            "the same, without state_dict",
            "**",
            "model_ema.**",
            needs=("model_ema.decay", "model_ema.num_updates"),
            count="model_ema.num_updates",
            decay=torch_decays.litema(""),
            split=litema_names.split,
            is_partial=True,
        ),
        Layout(
            "diffusers",
            "diffusers' EMAModel: a folder whose config.json has its settings",
            None,
            "**",
            needs=(
                "config.optimization_step",
                "config.use_ema_warmup",
                "config.inv_gamma",
            ),
            count="config.optimization_step",
            decay=torch_decays.diffusers,
        ),
        Layout(
            WEIGHTS,
            "raw weights alone, at the top: safetensors, transformers, state_dict()",
            "**",
            None,
        ),
    )
}
