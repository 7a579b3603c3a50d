"""Finds the layout of a file of PyTorch by its names, or makes one from patterns."""

import dataclasses

from ema_optax._interop.torch_files import Tensors
from ema_optax._interop.torch_layouts import (
    LAYOUTS,
    TORCHTITAN,
    WEIGHTS,
    Layout,
    names_of,
)
from ema_optax._messages.text import brief, nearest, nearest_names, some

# Keys of what training programs save beside weights.
_NO_WEIGHTS = frozenset(
    (
        *("optimizer", "optimizers", "optimizer_state", "optimizer_states", "optim"),
        *("optimizer_state_dict", "opt", "scaler", "amp_scaler", "grad_scaler"),
        *("lr_scheduler", "lr_schedulers", "scheduler", "callbacks", "loops"),
        *("train_state", "dataloader", "args", "config", "hparams", "saver"),
        "hyper_parameters",
    )
)
_ALONE = ("state_dict", "model", "model_state_dict")  # keys of raw weights alone
# Names of averages, so that none is taken for raw weights unasked.
_AVERAGES = frozenset(
    (
        *("ema", "model_ema", "ema_model", "ema_net", "ema_params", "params_ema"),
        *("ema_state_dict", "state_dict_ema", "swa_model", "averaged_model"),
        *("shadow", "teacher"),
    )
)
# In the state of PyTorch's AveragedModel, and of ema-pytorch: name of the count → names
# of the average.
_WRAPPERS = {"n_averaged": "module.**", "step": "ema_model.**"}


def find_layout(tensors: Tensors, name: str | None = None) -> Layout:
    """Finds the layout of a file.

    Args:
        tensors: Tensors of the file.
        name: Name of the layout; None for the one that fits.

    Raises:
        ValueError: If no layout fits, or several, or not the named one.
    """
    if name is not None:
        if name not in LAYOUTS:
            raise ValueError(
                f"There is no layout {brief(name)}. {nearest(name, LAYOUTS)} All: "
                f"{', '.join(LAYOUTS)}."
            )
        if not LAYOUTS[name].fits(tensors):
            raise ValueError(
                f"{tensors.origin} is not of the layout {name}, {LAYOUTS[name].what}. "
                f"{_description(tensors)}"
            )
        return LAYOUTS[name]
    fitting = [layout for layout in LAYOUTS.values() if layout.fits(tensors)]
    if len(fitting) > 1 or any(name in tensors.nested for name in _groups(tensors)):
        fitting = [layout for layout in fitting if layout.name != WEIGHTS]
    if len(fitting) > 1:
        names = ", ".join(layout.name for layout in fitting)
        raise ValueError(
            f"{tensors.origin} may be of several layouts: {names}. Pass one of them: "
            f'layout="{fitting[0].name}".'
        )
    layout = fitting[0] if fitting else _torchtitan(tensors) or _alone(tensors)
    if layout is not None:
        _check_no_average(tensors, layout)
        return layout
    raise ValueError(
        f"Which tensors of {tensors.origin} are the raw weights, and which the average,"
        f" is not known. {_description(tensors)}"
    )


def make_layout(tensors: Tensors, params: str | None, shadow: str | None) -> Layout:
    """Makes a layout from the caller's patterns.

    Raises:
        ValueError: If a pattern fits nothing.
    """
    for pattern, argument in ((params, "params"), (shadow, "shadow")):
        if pattern is None:
            continue
        if pattern.count("**") > 1 or "*" in pattern.replace("**", ""):
            raise ValueError(
                f"{argument} is a key, or names with one **, such as "
                f'"ema.state.**.ema_params"; got {brief(pattern)}.'
            )
        if not names_of(tensors, pattern):
            near = nearest_names(pattern, {*tensors.nested, *_groups(tensors)})
            more = f" The nearest are {', '.join(map(repr, near))}." if near else ""
            raise ValueError(
                f"{argument}={brief(pattern)} fits no tensor of {tensors.origin}.{more}"
                f" {_description(tensors)}"
            )
    start = TORCHTITAN.partition("**")[0]
    is_partial = shadow is not None and shadow.startswith(start)
    what, count = "as the arguments say", None
    if shadow is not None:
        shadow, count = _inside(tensors, shadow)
    return Layout("given", what, params, shadow, count=count, is_partial=is_partial)


def _inside(tensors: Tensors, key: str) -> tuple[str, str | None]:
    """Finds the names of an average and of its count below a key.

    The key may hold the whole state of a wrapper, which keeps both.
    """
    names = tensors.entries.keys() | tensors.values.keys()
    for count, average in _WRAPPERS.items():
        if f"{key}.{count}" in names and names_of(tensors, f"{key}.{average}"):
            return f"{key}.{average}", f"{key}.{count}"
    return key, None


def left_out(tensors: Tensors, taken: set[str]) -> dict[str, str]:
    """Counts the tensors that were not taken, by the keys at the top."""
    groups: dict[str, int] = {}
    for name in tensors.entries:
        if name not in taken:
            first = name.partition(".")[0]
            group = first if first in tensors.nested else name
            groups[group] = groups.get(group, 0) + 1
    return {
        group: f"{count:,} tensor{'s' if count > 1 else ''}"
        for group, count in groups.items()
    }


def _alone(tensors: Tensors) -> Layout | None:
    """Finds raw weights alone, in a dict of a usual name."""
    keys = {name.partition(".")[0] for name, x in tensors.entries.items() if x.shape}
    keys -= _NO_WEIGHTS
    if len(keys) == 1 and keys <= tensors.nested and keys <= set(_ALONE):
        key = keys.pop()
        return Layout(key, f"raw weights in {key}", key, None)
    return None


def _torchtitan(tensors: Tensors) -> Layout | None:
    """Finds torchtitan's layout, where each average has a key such as `decay_0p999`.

    Raises:
        ValueError: If there are averages of several keys.
    """
    start, _, end = TORCHTITAN.partition("**")
    keys = {
        name.rpartition(f"{end}.")[2]: None
        for name in tensors.entries
        if name.startswith(start) and f"{end}." in name
    }
    if len(keys) > 1:
        calls = ", ".join(f'shadow="{TORCHTITAN}.{key}"' for key in keys)
        raise ValueError(
            f'{tensors.origin} has several averages. Pass params="**" and one of them: '
            f"{calls}."
        )
    shadow = f"{TORCHTITAN}.{''.join(keys)}"
    return dataclasses.replace(LAYOUTS["torchtitan"], shadow=shadow) if keys else None


def _check_no_average(tensors: Tensors, layout: Layout) -> None:
    """Refuses a file as raw weights alone, if a name in it may be an average's."""
    if layout.shadow is not None or layout.params is None:
        return
    names = names_of(tensors, layout.params)
    averages = {name.partition(".")[0] for name in names} & _AVERAGES
    if averages:
        first = min(averages)
        example = next(full for n, full in names.items() if n.startswith(f"{first}."))
        start = example[: example.index(f"{first}.")]
        raise ValueError(
            f"{tensors.origin} has '{example}', which may be of an average. Say where "
            f'raw weights and average are: params="{start}model", '
            f'shadow="{start}{first}"; or, if all are raw, params="{layout.params}".'
        )


def _groups(tensors: Tensors) -> dict[str, int]:
    groups: dict[str, int] = {}
    for name in tensors.entries:
        first = name.partition(".")[0]
        key = first if first in tensors.nested else ""
        groups[key] = groups.get(key, 0) + 1
    return groups


def _description(tensors: Tensors) -> str:
    """Describes the dicts of tensors in a file, and the call to make."""
    groups = _groups(tensors)
    if not groups:
        return "There are no tensors in it."
    kinds = [
        f"'{key}' ({count:,} tensors)" if key else f"{count:,} tensors at the top"
        for key, count in groups.items()
    ]
    lists = [name for name in tensors.entries if name.endswith("shadow_params.0")]
    if lists:
        return (
            f"It has {some(kinds, 8)}. '{lists[0][:-2]}' is a list, without names: "
            "copy it into the model in PyTorch, and save the model's state_dict()."
        )
    keys = [key for key in groups if key and key not in _NO_WEIGHTS]
    first = keys[0] if keys else "**"
    second = keys[1] if len(keys) > 1 else "ema"
    return (
        f'It has {some(kinds, 8)}. Say which is which: params="{first}", '
        f'shadow="{second}"; one of them alone if there is one. ** is all at the top.'
    )
