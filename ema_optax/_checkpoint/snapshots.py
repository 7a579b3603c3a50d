"""Finds snapshots: the shadows with power profiles in the steps of a run."""

from collections.abc import Sequence

import jax.numpy as jnp
from etils import epath

from ema_optax._checkpoint import storage
from ema_optax._checkpoint.errors import CorruptCheckpointError
from ema_optax._checkpoint.leaves import Place
from ema_optax._checkpoint.manifest import Manifest, read_manifest
from ema_optax._checkpoint.paths import absolute
from ema_optax._checkpoint.rescue import explained
from ema_optax._checkpoint.sources import StoredTree
from ema_optax._checkpoint.steps import all_steps
from ema_optax._decays.decays import power
from ema_optax._messages import arguments, text
from ema_optax._trees.naming import name_of
from ema_optax.reconstruction import Snapshot


def snapshots(
    directory: epath.PathLike,
    *,
    names: Sequence[str] | None = None,
    item: str | None = None,
    verify: bool = True,
) -> list[Snapshot]:
    """Returns every shadow with a power profile in the steps of a directory.

    Any step saved by this library is one, of `SnapshotSave` as of `EmaSave`. Nothing
    but the manifests is read yet. A snapshot's step is the number of updates that its
    shadow had seen at its last fold, whatever the step's number on disk.

    Args:
        directory: The folder of a run, or of one step of it.
        names: Of the shadows to take, where they have names; None takes all.
        item: Name of the item, where steps hold several.
        verify: Whether to compare what is read with its checksums.

    Returns:
        For `reconstruction.reconstruct`, in the order of their steps; one where several
        steps have the same shadow, saved between two folds.

    Raises:
        CorruptCheckpointError: Here or on reading, if data is not what was saved.
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If no step has a shadow of a power profile.

    >>> import tempfile, ema_optax
    >>> from ema_optax import checkpoint, reconstruction
    >>> transform = ema_optax.ema_params(ema_optax.power(0.1))
    >>> params = {"w": jnp.zeros(2)}
    >>> state = transform.init(params)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in range(1, 9):
    ...         _, state = transform.update({"w": jnp.ones(2)}, state, params)
    ...         checkpoint.save(folder, params, state, step=step)
    ...     found = snapshots(folder)
    ...     narrower = reconstruction.reconstruct(found, width=0.09)
    >>> found[0]
    Snapshot(step=1, exponent=6.93..., dtype=dtype('float32'))
    >>> narrower.tree
    {'w': Array([1., 1.], dtype=float32)}
    """
    if isinstance(names, str):
        names = [names]
    if names is not None:
        names = [arguments.a_name(name, "A name", "slow") for name in list(names)]
    verify = arguments.flag(verify, "verify")
    found, others = [], set()
    items = all_steps(absolute(directory), item)
    manifests = storage.side_by_side(_manifest_of, items)
    for path, manifest in zip(items, manifests, strict=True):
        manifest.check_decays()
        for tree, average in manifest.averages.items():
            decay, taken = average.decay, []
            # A tree that is joined of groups is one average if all of them are.
            asked = not average.computed and (
                names is None or tree in names or name_of(tree) in names
            )
            if asked and isinstance(decay, power):
                taken = _snapshot(path, manifest, tree, float(decay.exponent), verify)
            found += taken
            if not taken:
                others.add(
                    f"{tree}: {decay or 'another average'}, {average.count} updates"
                )
    if not found:
        named = "" if names is None else f" of the names {text.some(names)}"
        raise ValueError(
            f"{directory} has no shadows{named} with a power profile, folded at least "
            f"once, to reconstruct averages from; it has "
            f"{text.some(sorted(others), 8)}. Train with "
            "ema_params({'a': ema_optax.power(0.05), 'b': ema_optax.power(0.1)})."
        )
    return _one_of_each(found)


def _manifest_of(item: epath.Path) -> Manifest:
    try:
        return read_manifest(item)
    except CorruptCheckpointError as error:
        rescue = "To use the others, move its folder elsewhere."
        raise explained(item, error, rescue) from error


def _one_of_each(found: Sequence[Snapshot]) -> list[Snapshot]:
    """Returns snapshots in order, the least rounded of those that saw the same folds.

    With `every=10` the shadow saved at update 28 is that of update 25.
    """

    def key(snapshot: Snapshot) -> tuple[float, float]:
        return snapshot.step, snapshot.exponent

    finest: dict[tuple[float, float], Snapshot] = {}
    for snapshot in sorted(found, key=lambda s: float(jnp.finfo(s.dtype).eps)):
        finest.setdefault(key(snapshot), snapshot)
    return sorted(finest.values(), key=key)


def _snapshot(
    item: epath.Path, manifest: Manifest, tree: str, exponent: float, verify: bool
) -> list[Snapshot]:
    """Returns the snapshot that a tree is; none where it was never folded."""
    entry = manifest.trees[tree]
    if not isinstance(entry.count, int):
        raise ValueError(
            f"The {tree} of {item} was averaged under vmap, with counts {entry.count}: "
            "reconstruct each of its members from checkpoints of its own."
        )
    step = entry.count - entry.count % (entry.every or 1)
    if step == 0 or not entry.leaves:
        return []
    places = {path: Place(tree, path) for path in entry.leaves}
    kinds = {jnp.dtype(leaf.dtype) for leaf in entry.leaves.values()}
    coarsest = max(kinds, key=lambda kind: float(jnp.finfo(kind).eps))
    source = StoredTree(item, manifest, places, verify=verify)
    return [Snapshot(step, exponent, source, coarsest)]
