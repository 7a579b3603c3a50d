"""Which trees of a foreign checkpoint are params and average: as told, or as found.

Never a guess: what fits several ways, or none, is an error that lists what is there.
"""

import dataclasses
from collections.abc import Mapping

from ema_optax._checkpoint import layouts
from ema_optax._checkpoint.foreign import Foreign, Leaf
from ema_optax._checkpoint.layouts import Leaves, Pair
from ema_optax._messages import text
from ema_optax._messages.layout_names import LAYOUTS
from ema_optax._trees import locating

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is adopted of a checkpoint.

    Attributes:
        layout: Name of the layout, or None where the paths were told.
        params: Path of the params.
        leaves: Those of the params, by what is below that path.
        shadow: Path of the average; None for none.
        average: Its leaves, by the paths of the params that they are of.
        raw: Floating params without an average.
        count: Path of its count, or None.
        zero_started: As the layout says; None where it has to be told.
    """

    layout: str | None
    params: str
    leaves: Leaves
    shadow: str | None
    average: Leaves
    raw: tuple[str, ...] = ()
    count: str | None = None
    zero_started: bool | None = False


def choose(
    source: Foreign,
    params: str | None,
    shadow: str | None,
    like: str | None,
    *,
    partial: bool,
) -> Choice:
    """Returns what params and average are.

    Args:
        source: The checkpoint.
        params: Path of the params; None finds them.
        shadow: Path of the average; "auto" finds it, None is none.
        like: Name of a layout, which the paths are looked for in.
        partial: Whether floating params may have no average.

    Raises:
        ValueError: If a path is not there, if nothing or several fit, or if structure
            or shapes of the two differ.
    """
    if like is not None and like not in LAYOUTS:
        raise ValueError(
            f"There is no layout {text.brief(like)}. "
            f"{text.nearest(str(like), LAYOUTS)} All are {', '.join(LAYOUTS)}."
        )
    leaves = source.leaves
    if not leaves:
        raise ValueError(f"{source.place} holds no arrays.")
    params = None if params is None else _existing(source, params, "params")
    if shadow is None:
        return params_alone(source, params, like)
    told = None if shadow == AUTO else _existing(source, shadow, "shadow")
    if told is not None:
        _refuse_mistaken(source, told, like)
    found = [
        pair
        for pair in layouts.pairs(leaves, like)
        if params in (None, pair.params) and told in (None, pair.shadow)
    ]
    if params is not None and told is not None:
        return _told(source, params, told, found, like, partial=partial)
    if len(found) == 1:
        return _of(source, found[0], partial=partial)
    if not found and told is not None:
        candidates = _params_of(leaves, told)
        if len(candidates) == 1:
            return _told(source, candidates[0], told, [], like, partial=partial)
    raise ValueError(_not_one(source, found, params, told, like))


def params_alone(
    source: Foreign,
    params: str | None,
    like: str | None = None,
    *,
    argument: str = "params",
) -> Choice:
    """Returns params without an average: those told, those of a pair, or the only ones.

    Args:
        source: The checkpoint.
        params: Path of the params; None finds them.
        like: Name of a layout, which they are looked for in.
        argument: What the path is called by the caller, for errors.

    Raises:
        ValueError: If there are none at the path, or several without one.
    """
    if params is not None:
        params = _existing(source, params, argument)
    else:
        found = {pair.params for pair in layouts.pairs(source.leaves, like)}
        found = found or {
            path
            for path in layouts.nodes(source.leaves)
            if path.rpartition("/")[2] in ("params", "model")
            and not layouts.is_of_optimizer(path)
        }
        outer = [
            path
            for path in found
            if not any(path != top and path.startswith(f"{top}/") for top in found)
        ]
        if len(outer) != 1:
            raise ValueError(
                f"Nothing says which tree of {source.place} is the params. Pass "
                f"{argument}=… with one of {_listed(source.leaves)}."
            )
        params = outer[0]
    leaves = layouts.below(source.leaves, params)
    average = {path: leaf for path, leaf in leaves.items() if leaf.is_averaged}
    if not average:
        raise ValueError(
            f"'{params}' of {source.place} has no floating leaves to average. Pass "
            f"{argument}=… with one of {_listed(source.leaves)}."
        )
    return Choice(None, params, leaves, None, average)


def _existing(source: Foreign, path: str, name: str) -> str:
    """Returns a path of a tree as the checkpoint has it."""
    wanted = path.strip("/")
    if layouts.below(source.leaves, wanted):
        return wanted
    near = text.nearest(wanted, layouts.nodes(source.leaves))
    raise ValueError(f"{source.place} has no arrays at {name}={path!r}. {near}")


def _refuse_mistaken(source: Foreign, path: str, like: str | None) -> None:
    problem = layouts.mistaken(source.leaves, path)
    claimed = path.endswith("/ema") and like == "axlearn"
    if problem and not claimed:
        own = (
            " If it is the state of a transform of your own that averages params and "
            "calls them count and ema too, say so by like='axlearn'."
            if path.endswith("/ema")
            else ""
        )
        raise ValueError(
            f"{problem}; it is no average of params. Without one, begin from a copy of "
            f"the params by shadow=None.{own}"
        )


def _told(
    source: Foreign,
    params: str,
    shadow: str,
    found: list[Pair],
    like: str | None,
    *,
    partial: bool,
) -> Choice:
    """Returns the params and average of two paths, with what a layout knows of them."""
    inside = f"{params}/".lstrip("/"), f"{shadow}/".lstrip("/")
    if inside[0] == inside[1]:
        raise ValueError(
            f"params and shadow are the same tree, {params!r}. Without an average, "
            "begin from a copy of the params by shadow=None."
        )
    if inside[0].startswith(inside[1]) or inside[1].startswith(inside[0]):
        raise ValueError(
            f"params={params!r} and shadow={shadow!r} lie inside each other. Pass two "
            f"of {_listed(source.leaves)}."
        )
    if found:
        return _of(source, found[0], partial=partial)
    layout = next((each for each in layouts.LAYOUTS if each.name == like), None)
    count = None
    if layout is not None and layout.count is not None:
        beside = f"{shadow.rpartition('/')[0]}/{layout.count}".lstrip("/")
        count = beside if beside in source.leaves else None
    leaves = layouts.below(source.leaves, params)
    average = _placed(layouts.below(source.leaves, shadow), leaves)
    average, raw = _checked(source, params, leaves, shadow, average, partial=partial)
    zero_started = layout.zero_started if layout else False
    return Choice(like, params, leaves, shadow, average, raw, count, zero_started)


def _of(source: Foreign, pair: Pair, *, partial: bool) -> Choice:
    leaves = layouts.below(source.leaves, pair.params)
    average, raw = _checked(
        source, pair.params, leaves, pair.shadow, pair.average, partial=partial
    )
    return Choice(
        pair.layout.name,
        pair.params,
        leaves,
        pair.shadow,
        average,
        raw,
        pair.count,
        pair.layout.zero_started,
    )


def _placed(average: Leaves, params: Leaves) -> Leaves:
    """Returns the leaves of an average by their params, of which it may be a part."""
    if set(average) <= set(params):
        return average
    outline = locating.Outline({path: leaf.shape for path, leaf in average.items()})
    shapes = {path: leaf.shape for path, leaf in params.items()}
    places = locating.places_of(outline, shapes)
    if len(places) != 1:
        return average  # and the difference is said
    return {locating.under(places[0], path): x for path, x in average.items()}


def _checked(
    source: Foreign,
    params: str,
    leaves: Leaves,
    shadow: str,
    average: Leaves,
    *,
    partial: bool,
) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """Returns the averages of floating params, and the floating params without one."""
    where = f"'{shadow}' is no average of '{params}' in {source.place}"
    kept: dict[str, Leaf] = {}
    for path, leaf in average.items():
        param = leaves.get(path)
        if param is None:
            raise ValueError(
                f"{where}: '{path}' is only in the average, where it is {leaf}. "
                f"{text.nearest(path, leaves)} Pass params=… and shadow=… of trees "
                f"that fit, such as {_listed(source.leaves)}."
            )
        if param.shape != leaf.shape:
            raise ValueError(
                f"{where}: '{path}' is {param} in the params and {leaf} in the average."
            )
        if not param.is_averaged:
            continue  # a copy, or the mean, of what is no float
        if not leaf.is_averaged or _is_complex(param) != _is_complex(leaf):
            raise ValueError(
                f"{where}: '{path}' is {param} in the params and {leaf} in the "
                "average, which cannot hold it."
            )
        kept[path] = leaf
    raw = tuple(p for p, leaf in leaves.items() if leaf.is_averaged and p not in kept)
    if not kept:
        raise ValueError(f"{where}: it has no floating leaves.")
    if raw and not partial:
        raise ValueError(
            f"{where}: of {len(raw):,} floating params there is no average: "
            f"{text.some(map(repr, raw))}. If they were not averaged, as statistics "
            "and frozen params are not, pass partial=True: they are raw in both trees."
        )
    return kept, raw


def _is_complex(leaf: Leaf) -> bool:
    return leaf.dtype.startswith("complex")


def _params_of(leaves: Leaves, shadow: str) -> list[str]:
    """Returns where params of an average may be: in no optimizer state or average."""
    average = layouts.below(leaves, shadow)
    averages = {pair.shadow for pair in layouts.pairs(leaves, None)}
    return [
        path
        for path in layouts.nodes(leaves)
        if not f"{path}/".startswith(f"{shadow}/")
        and not f"{shadow}/".startswith(f"{path}/")
        and path not in averages
        and not layouts.is_of_optimizer(path)
        and set(average) == set(inside := layouts.below(leaves, path))
        and layouts.fits(average, inside)
    ]


def _not_one(
    source: Foreign,
    found: list[Pair],
    params: str | None,
    shadow: str | None,
    like: str | None,
) -> str:
    """Returns what to say where nothing fits, or several."""
    if found:
        each = "; ".join(
            f"params={pair.params!r} shadow={pair.shadow!r} ({pair.layout.name})"
            for pair in found
        )
        return (
            f"{source.place} has {len(found)} pairs of params and average: {each}. "
            "Pass params=… and shadow=… of one."
        )
    of_layout = f" as {like} keeps it" if like else ""
    beside = f" of params={params!r}" if params is not None else ""
    beside = f" to shadow={shadow!r}" if shadow is not None else beside
    what = "no params" if shadow is not None else "no average"
    known = "" if like else f" Known layouts are {', '.join(LAYOUTS)}."
    taken = _mistaken_in(source.leaves)
    return (
        f"{source.place} has {what}{beside}{of_layout}.{taken} Pass params=… and "
        f"shadow=…, or shadow=None to begin from a copy of the params. It holds "
        f"{_listed(source.leaves)}.{known}"
    )


def _mistaken_in(leaves: Leaves) -> str:
    """Returns a sentence on a state of optax.ema that may be meant."""
    for path in layouts.nodes(leaves):
        if path.endswith("/ema") and (problem := layouts.mistaken(leaves, path)):
            return f" {problem}."
    return ""


def _listed(leaves: Mapping[str, Leaf]) -> str:
    return text.some(layouts.alike(leaves), 8)
