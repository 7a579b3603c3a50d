"""Names leaves without nesting, by their paths, as PyTorch's libraries need."""

from collections.abc import Collection, Mapping

from ema_optax._messages.text import brief
from ema_optax._trees.renaming import Renames

_LONGEST = 4096  # characters of a name
SEPARATOR = "."  # of PyTorch's state dicts, and of Flax models among safetensors


def flat_names(
    paths: Collection[str], rename: Mapping[str, str | None] | None = None
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Names each path that is not left out, and lists what each key fitted.

    Args:
        paths: Stored paths, their keys joined by slashes.
        rename: A mapping of stored paths, beginnings or patterns of them, to names, as
            `Renames` reads it. `""` fits every path, and None leaves out.

    Raises:
        TypeError: If `rename` is no such mapping.
        ValueError: If a key fits no path, or two leaves get one name.

    >>> flat_names(["dense/kernel", "dense/bias"], {"dense": "model.fc"})[0]
    {'dense/kernel': 'model.fc.kernel', 'dense/bias': 'model.fc.bias'}
    """
    renames = Renames(rename, separator=SEPARATOR, may_leave_out=True)
    renamed = {path: renames(path) for path in paths}
    renames.check_used(paths, "stored path")
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path, name in renamed.items():
        if name is None:
            continue
        check_name(name, path)
        if name in owners:
            raise ValueError(
                f"'{owners[name]}' and '{path}' would both be called '{name}'. Rename "
                f'one of them: rename={{"{path}": …}}.'
            )
        names[path], owners[name] = name, path
    if not names:
        raise ValueError("No leaf is left to write: rename leaves all of them out.")
    return names, renames.used


def check_name(name: str, path: str) -> None:
    """Refuses a name that would make a file that cannot be read.

    Raises:
        ValueError: If `name` is empty, too long, not printable, or the format's own.
    """
    problem = None
    if not name:
        problem = "an empty name"
    elif name == "__metadata__":
        problem = "the name '__metadata__', which the format keeps for itself"
    elif not name.isprintable():
        problem = f"the name {brief(name)}, with characters that cannot be printed"
    elif len(name) > _LONGEST:
        problem = f"the name {brief(name)}, of {len(name):,} characters"
    if problem:
        raise ValueError(
            f"'{path}' would get {problem}. Give it another: "
            f'rename={{"{path}": "weights"}}.'
        )
