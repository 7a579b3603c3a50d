"""Saves, restores, describes and verifies the steps of a directory."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._checkpoint.background import ELSEWHERE
from ema_optax._checkpoint.entries import AverageEntry, TreeEntry
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.handlers import EmaRestore, EmaSave, save_args
from ema_optax._checkpoint.manifest import PARAMS, SHADOW, STATE, read_manifest
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.processes import together
from ema_optax._checkpoint.rescue import explained, verify_item
from ema_optax._checkpoint.shadows import at_its_place
from ema_optax._checkpoint.step import of_trees
from ema_optax._checkpoint.steps import (
    find,
    find_same_items,
    find_same_step,
    is_taken,
    named,
)
from ema_optax._decays.decay import Decay
from ema_optax._messages import arguments, text
from ema_optax._trees import mistaken


@dataclasses.dataclass(frozen=True)
class Description:
    """Describes a step on disk.

    Attributes:
        step: Its number, or None where the path does not say.
        path: Its folder.
        version: Version of the library that wrote it.
        format: Its format on disk, a number.
        trees: Its trees, by name: `params`, and `shadow` or `shadow/NAME`.
        state: The optimizer state without its shadows.
        extra: The `extra` that `EmaSave` was given.
        items: Names of the items of ours in the step.
    """

    step: int | None
    path: str
    version: str
    format: int
    trees: Mapping[str, TreeEntry]
    state: TreeEntry
    extra: Any
    items: tuple[str, ...] = ()
    _numbers: Callable[[], list[int]] = dataclasses.field(
        default=list, repr=False, compare=False
    )

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """Numbers of all committed steps of the run; in a bucket a request for each."""
        return tuple(self._numbers())


def save(
    directory: epath.PathLike,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    step: int = 0,
    extra: object = None,
    averaged: str | Mapping[str, str] | None = None,
) -> None:
    """Saves params, shadows and optimizer state as one step of a directory.

    Blocks until the step is committed. In a training loop use a `CheckpointManager`
    with `EmaSave`, which saves in the background and keeps only the steps you want.

    Args:
        directory: Folder of the run, made if missing.
        params: The live params, alone or with other state of the model beside them.
        opt_state: The optimizer state, with a shadow anywhere in it.
        step: Number of the step, ≥ 0.
        extra: Anything that is JSON, for `describe`.
        averaged: Where in `params` the tree sits that the optimizer was given, if it
            fits at several places; see `EmaSave`.

    Raises:
        FileExistsError: If the step is there already; nothing is overwritten.
        OSError: If it cannot be written; earlier steps stay as they are.
        ValueError, TypeError: If there is no shadow, if it cannot be told of which part
            of the params it is, or if a leaf cannot be stored.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, opt_state, step=300)
    ...     restore(folder, "shadow", like=params)
    {'w': Array([1., 1.], dtype=float32)}
    """
    _write(directory, lambda: EmaSave(params, opt_state, extra, averaged), step)


def save_average(
    directory: epath.PathLike,
    tree: Any,
    *,
    params: Any = None,
    step: int = 0,
    count: int | None = None,
    decay: Decay | None = None,
    every: int | None = None,
    extra: Any = None,
) -> None:
    """Saves one average as a checkpoint of its own, for inference.

    It is stored once, as the params, which programs load without this library;
    `restore` gives it as the shadow and as the params. With `params` the two lie side
    by side, as after `save`.

    Args:
        directory: Folder of the checkpoint, made if missing; not that of the run, whose
            params it would stand beside.
        tree: The whole model, such as a `Reconstruction`'s tree; with `params` only
            the leaves that are averaged.
        params: The live params, for an average that no optimizer state holds.
        step: Number of the step, ≥ 0.
        count: Updates that the average has seen, ≥ 0; None for the step.
        decay: Decay of the average, for `describe`.
        every: Updates between its folds, ≥ 1; None where that is not known.
        extra: Anything that is JSON, for `describe`.

    Raises:
        FileExistsError: If the step is there already; nothing is overwritten.
        OSError: If it cannot be written; earlier steps stay as they are.
        ValueError, TypeError: If a leaf cannot be stored, if `tree` has no leaf or is
            an optimizer state, or if it does not fit `params`.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_average(folder, {"w": jnp.ones(2)}, decay=ema_optax.power(0.03))
    ...     restore(folder, "shadow", like={"w": jnp.zeros(2)})
    {'w': Array([1., 1.], dtype=float32)}
    """
    if decay is not None and not isinstance(decay, Decay):
        raise TypeError(
            f"decay is that of the average, such as ema_optax.warmup(0.9999), or None "
            f"where it is not known; got {text.brief(decay)}."
        )
    for given, name in ((tree, "an average"), (params, "params")):
        mistaken.check_no_nnx(given, name, "save_average(directory, tree, params=…)")
    tree = at_its_place(tree, params)
    both = {PARAMS: tree} if params is None else {PARAMS: params, SHADOW: tree}
    if count is not None:
        count = arguments.whole(count, "count", 0, "count=300 is after 300 updates.")
    if every is not None:
        every = arguments.whole(every, "every", 1, "every=1 is at each update.")
    averages = {SHADOW: AverageEntry(decay, every, step if count is None else count)}
    _write(
        directory,
        lambda: save_args(of_trees(both, averages, extra), at_once=True),
        step,
    )


def _write(directory: epath.PathLike, build: Callable[[], EmaSave], step: int) -> None:
    root = absolute(directory)
    step = arguments.whole(step, "step", 0, "step=300 is the 300th update.")
    args = None
    with together(RuntimeError(f"Step {step} was not saved: {ELSEWHERE}")):
        storage.forget_listings()
        if is_taken(root / str(step)):
            raise FileExistsError(
                f"{root / str(step)} exists, and nothing is overwritten. Pass another "
                "step, or remove it first."
            )
        args = build()  # refuses trees that cannot be stored before anything is written
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager(root, options=options) as manager:
            manager.save(step, args=args, force=True)
    except (OSError, ValueError, *storage.errors()) as error:
        _remove_temporary(root, step)
        raise OSError(
            f"Could not write step {step} to {root}; earlier steps are as they were. "
            f"{text.one_line(error)}"
        ) from error


def restore(
    directory: epath.PathLike,
    tree: str = "shadow",
    like: object = None,
    *,
    step: int | None = None,
    item: str | None = None,
    rename: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Any:
    """Restores one tree into the slots of a model; needs no optimizer.

    A shadow comes as the whole model: leaves that are not averaged are those of the
    params. Only the leaves that it needs are read.

    Args:
        directory: The folder of a run, or of one step of it.
        tree: `"params"`, `"shadow"`, or the name of a shadow: `"fast"`, in full
            `"shadow/fast"`.
        like: The model's params, abstract (`jax.eval_shape`) or concrete, of any tree
            type: the result has its structure, shapes, dtypes and shardings. Floats are
            cast to its floats, nothing else is cast. Leaves without a sharding go to
            the default device. None gives nested dicts, in the dtypes stored.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several of ours.
        rename: Slots of `like` to stored paths, or beginnings or patterns of both:
            `{"encoder/kernel": "my_scope/weights", "**/kernel": "**/weight"}`, where
            `**` stands for any number of keys and `*` for characters of one. A slot's
            own path decides alone; else the longest beginning is replaced, and then
            the first pattern that fits. Two slots may take one leaf.
        verify: Whether to compare what is read with its checksums.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If tree, slots, shapes or dtypes do not fit, with the nearest names.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, opt_state)
    ...     restore(folder, "params", {"v": jnp.zeros(2)}, rename={"v": "w"})
    {'v': Array([1., 1.], dtype=float32)}
    """
    folder = find_same_step(directory, step, item).item
    return EmaRestore(tree, like, rename, verify).read(folder)


def describe(
    directory: epath.PathLike, *, step: int | None = None, item: str | None = None
) -> Description:
    """Describes what a step holds, without reading its arrays.

    Args:
        directory: The folder of a run, or of one step of it.
        step: Number of the step; None for the newest that was committed.
        item: Name of the item, where the step holds several of ours.

    Raises:
        CorruptCheckpointError: If the manifest is missing or damaged.
        FileNotFoundError: If there is no such checkpoint.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, opt_state, step=300)
    ...     description = describe(folder)
    >>> description.step, description.trees["shadow"].decay
    (300, warmup(decay=0.99, offset=10))
    """
    found = find(directory, step)
    path = named(found.items, item)
    try:
        manifest = read_manifest(path)
        manifest.check_decays()
    except CorruptCheckpointError as error:
        raise explained(path, error, _alone()) from error
    trees = dict(manifest.trees)
    return Description(
        step=found.number,
        path=str(path),
        version=manifest.version,
        format=manifest.format,
        state=trees.pop(STATE, TreeEntry({}, {})),
        trees=trees,
        extra=manifest.extra,
        items=tuple(item.name for item in found.items),
        _numbers=found.numbers,
    )


def verify(
    directory: epath.PathLike, *, step: int | None = None, item: str | None = None
) -> None:
    """Verifies a whole step: reads it and compares all of it with its checksums.

    Args:
        directory: The folder of a run, or of one step of it.
        step: Number of the step; None for the newest that was committed.
        item: Name of one item to verify; None for all of ours that the step holds.

    Raises:
        CorruptCheckpointError: If data on disk is not what was saved.
        FileNotFoundError: If there is no such checkpoint.

    >>> import tempfile, jax.numpy as jnp, ema_optax
    >>> params = {"w": jnp.ones(2)}
    >>> opt_state = ema_optax.ema_params(0.99).init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params, opt_state, step=300)
    ...     verify(folder)  # and says nothing: all of it is what was saved
    """
    for folder in find_same_items(directory, step, item):
        try:
            verify_item(folder)
        except CorruptCheckpointError as error:
            raise explained(folder, error) from error


def _alone() -> str | None:
    """Returns the advice where other processes may not have met the damage."""
    if jax.process_count() == 1:
        return None
    return "Whether an older one is whole, checkpoint.verify tells, on all processes."


def _remove_temporary(root: epath.Path, step: int) -> None:
    """Removes the files of a failed save, which would keep the disk full."""
    if jax.process_index() != 0 or storage.is_remote(root):
        return  # in a bucket it is taken for no step, and the next save removes it
    for name in storage.listed(root) or {}:
        path = root / name
        if name.startswith(f"{step}{ocp.step.TMP_DIR_SUFFIX}"):
            for _ in range(10):  # TensorStore's last writes may make it again
                with contextlib.suppress(OSError):
                    path.rmtree(missing_ok=True)
                time.sleep(0.05)
                if not path.exists():
                    break
