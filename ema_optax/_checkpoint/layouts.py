"""Where other programs keep params and their average, by the names of their trees."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

from ema_optax._checkpoint.foreign import Leaf

Leaves = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one program names params and average.

    Attributes:
        name: What it is called in `like`, as `layout_names` has it.
        average: Pattern of the average's path. Its group `at`, where it has one, is
            what the params lie beside.
        params: Paths of the params: below `at` where the pattern has it, else names of
            the last key, outside of optimizer states.
        inside: Names of what the average may be wrapped in.
        count: Name of the updates that it has seen, beside the average.
        zero_started: Whether it began at zero, undivided; None where the program has
            both, and nothing on disk tells.
    """

    name: str
    average: str
    params: tuple[str, ...]
    inside: tuple[str, ...] = ("",)
    count: str | None = None
    zero_started: bool | None = False


_AT = "(?P<at>(?:.*/)?)"
_WRAPPED = ("", "params", "ema_params", "ema", "average")

# Sources: optax.EmaState (`count`, `ema`, from zero); flax.training.train_state with a
# field of the user's; flax.nnx.EMA (`params`); openpi's training/checkpoints.py (the
# item `params` is the average where the item `train_state` holds params, else it is
# they); kauldron.optim.ema_params; axlearn's Learner with optimizers.param_ema;
# Levanter's TrainerState and model_averaging; Haiku's EMAParamsTree, by `haiku_name`.
LAYOUTS = (
    Layout(
        "optax",
        rf"{_AT}(?:ema_params|params_ema|ema|ema_state)/ema",
        ("params", "model"),
        count="count",
        zero_started=None,
    ),
    Layout(
        "flax",
        rf"{_AT}(?:ema_params|params_ema|ema|ema_state)",
        ("params",),
        _WRAPPED,
    ),
    Layout(
        "nnx",
        rf"{_AT}ema",
        ("model", "params", "state"),
        ("", "params"),
    ),
    Layout(
        "openpi",
        r"params/params",
        ("train_state/params",),
    ),
    Layout(
        "kauldron",
        r"(?:.*/)?ema_params",
        ("params",),
        count="count",
    ),
    Layout(
        "haiku",
        r"(?:.*/)?average",
        ("params",),
        count="counter",
        zero_started=None,
    ),
    Layout(
        "axlearn",
        rf"{_AT}learner/ema/ema",
        ("model",),
        count="count",
        zero_started=None,
    ),
    Layout(
        "levanter",
        rf"{_AT}model_averaging/model",
        ("model",),
    ),
    Layout(
        "ema_optax",
        r"(?:.*/)?shadow(?:/[^/]+)?",
        ("params", "model"),
        count="count",
    ),
)

_OPTIMIZER = re.compile(r"(?:.*_)?(?:opt|optim|optimizer|tx)s?(?:_?states?)?")
# What optimizers keep in the shape of the params, which is no average of them.
_MOMENTS = {
    **dict.fromkeys(("mu", "m", "exp_avg"), "the mean of the gradients"),
    **dict.fromkeys(
        ("nu", "v", "nu_max", "exp_avg_sq", "sum_of_squares"),
        "the mean of the squared gradients",
    ),
    **dict.fromkeys(("trace", "momentum"), "the momentum of the updates"),
    **dict.fromkeys(("acc_grads",), "the sum of the gradients of micro-batches"),
}

_DEEPEST = 3  # slashes in the paths that errors list


@dataclasses.dataclass(frozen=True)
class Pair:
    """Params and an average that fits them.

    Attributes:
        layout: Of which layout.
        params: Path of the params.
        shadow: Path of the average.
        average: Its leaves, by the paths of the params that they are of.
        count: Path of its count, or None.
    """

    layout: Layout
    params: str
    shadow: str
    average: Leaves
    count: str | None


def below(leaves: Leaves, path: str) -> dict[str, Leaf]:
    """Returns the leaves at or below a path, by what is left of theirs.

    The last key `value`, in which Flax's variables keep their arrays, is left out where
    all leaves have it.
    """
    if path == "":
        found = dict(leaves)
    else:
        found = {
            at[len(path) + 1 :]: leaf
            for at, leaf in leaves.items()
            if at == path or at.startswith(f"{path}/")
        }
    if found and all(at == "value" or at.endswith("/value") for at in found):
        return {at[:-5].rstrip("/"): leaf for at, leaf in found.items()}
    return found


def nodes(leaves: Leaves) -> list[str]:
    """Returns the paths of all trees and leaves, each after those above it."""
    found = dict.fromkeys(
        at[:end]
        for at in leaves
        for end in [i for i, c in enumerate(at) if c == "/"] + [len(at)]
    )
    return list(found)


def is_of_optimizer(path: str) -> bool:
    """Returns whether a path leads into the state of an optimizer."""
    return any(_OPTIMIZER.fullmatch(key) for key in path.split("/"))


def mistaken(leaves: Leaves, path: str) -> str | None:
    """Says what a tree of an optimizer's state is, where it is no average of params.

    `optax.ema` is the one that is taken for it: its state has `count` and `ema`, lies
    in the optimizer's state, and averages the updates.
    """
    if not is_of_optimizer(path):
        return None
    above, _, last = path.rpartition("/")
    kept = {at.partition("/")[0] for at in below(leaves, above)}
    if last in _MOMENTS:
        return f"'{path}' is what an optimizer keeps: {_MOMENTS[last]}"
    if last == "ema" and kept == {"count", "ema"}:
        return (
            f"'{path}' is the state of optax.ema, which averages the updates, not the "
            "params"
        )
    return None


def pairs(leaves: Leaves, like: str | None) -> list[Pair]:
    """Returns the params and averages that fit each other, by the layouts' names."""
    found: dict[tuple[str, str], Pair] = {}
    paths = nodes(leaves)
    for layout in LAYOUTS:
        if like in (None, layout.name):
            search = _haiku if layout.name == "haiku" else _named
            for pair in search(layout, leaves, paths):
                found.setdefault((pair.params, pair.shadow), pair)
    return [
        pair
        for pair in found.values()
        if not any(_is_part(pair, other) for other in found.values())
    ]


def _is_part(pair: Pair, other: Pair) -> bool:
    """Returns whether both trees of a pair are parts of those of another."""
    return (
        pair is not other
        and f"{pair.params}/".startswith(f"{other.params}/")
        and f"{pair.shadow}/".startswith(f"{other.shadow}/")
    )


def _named(layout: Layout, leaves: Leaves, paths: list[str]) -> Iterator[Pair]:
    for path in paths:
        match = re.fullmatch(layout.average, path)
        if not match or mistaken(leaves, path):
            continue
        above = path.rpartition("/")[0]
        count = f"{above}/{layout.count}".lstrip("/") if layout.count else None
        if count and count not in leaves:
            count = f"{above.rpartition('/')[0]}/{layout.count}".lstrip("/")
            if count not in leaves or layout.name != "ema_optax":
                continue
        at = match.groupdict().get("at")
        if at is None:
            places = [
                p
                for p in paths
                if (p in layout.params or p.rpartition("/")[2] in layout.params)
                and not is_of_optimizer(p)
                and not f"{p}/".startswith(f"{path}/")
            ]
        else:
            places = [f"{at}{name}" for name in layout.params if f"{at}{name}" != path]
        for place in places:
            params = below(leaves, place)
            for wrap in layout.inside:
                shadow = f"{path}/{wrap}".rstrip("/")
                average = below(leaves, shadow)
                if fits(average, params):
                    yield Pair(layout, place, shadow, average, count)


def _haiku(layout: Layout, leaves: Leaves, paths: list[str]) -> Iterator[Pair]:
    """Finds the states of Haiku's averages, of which each leaf has one of its own."""
    kept = ("average", "hidden", "counter")
    states = {
        at.rpartition("/")[0]
        for at in leaves
        if at.endswith("/average")
        and all(f"{at.rpartition('/')[0]}/{name}" in leaves for name in kept)
    }
    for root in sorted({at.rpartition("/")[0] for at in states}):
        names = {at.rpartition("/")[2]: at for at in states if at.startswith(root)}
        for place in paths:
            if place.rpartition("/")[2] not in layout.params or is_of_optimizer(place):
                continue
            average = {
                at: leaves[f"{names[haiku_name(at)]}/average"]
                for at in below(leaves, place)
                if haiku_name(at) in names
            }
            if len(average) == len(names) and fits(average, below(leaves, place)):
                count = f"{names[haiku_name(next(iter(average)))]}/counter"
                yield Pair(layout, place, root, average, count)


def haiku_name(path: str) -> str:
    """Returns what Haiku's EMAParamsTree calls the average of a param.

    >>> haiku_name("mlp/~/linear_0/w")
    'mlp___tilde___linear_0__w'
    """
    return path.replace("/", "__").replace("~", "_tilde_")


def fits(average: Leaves, params: Leaves) -> bool:
    """Returns whether each leaf of an average is of a param of its shape."""
    return any(leaf.is_averaged for leaf in average.values()) and all(
        at in params and params[at].shape == leaf.shape for at, leaf in average.items()
    )


def alike(leaves: Leaves) -> list[str]:
    """Describes the trees that could be params: those of one structure, or the largest.

    Returns:
        Lines of path, number of leaves and bytes, the largest first.
    """
    shapes: dict[frozenset[tuple[str, tuple[int, ...]]], list[str]] = {}
    for path in nodes(leaves):
        if path.count("/") > _DEEPEST:
            continue
        inside = below(leaves, path)
        if any(leaf.is_averaged for leaf in inside.values()):
            key = frozenset((at, leaf.shape) for at, leaf in inside.items())
            shapes.setdefault(key, []).append(path)
    groups = [paths for paths in shapes.values() if len(paths) > 1]
    groups.sort(key=lambda paths: -size(below(leaves, paths[0])))
    chosen = groups[0] if groups else [at for at in nodes(leaves) if "/" not in at]
    return [line(leaves, path) for path in chosen]


def line(leaves: Leaves, path: str) -> str:
    """Describes a tree: its path, number of leaves and bytes."""
    inside = below(leaves, path)
    return f"'{path}' ({len(inside):,} leaves, {size(inside):,} bytes)"


def size(leaves: Leaves) -> int:
    """Returns the bytes of some leaves."""
    return sum(leaf.bytes for leaf in leaves.values())
