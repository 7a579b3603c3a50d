"""Rules between tensors of a file and leaves of a tree, read in both directions."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ema_optax._interop import rule_fits
from ema_optax._interop.moves import Move, Shape
from ema_optax._interop.rule import Rule
from ema_optax._messages import arguments
from ema_optax._messages.text import brief, nearest

__all__ = ["Move", "Rule", "Rules", "Shape", "read_rules"]

_LONGEST = 2**24  # bytes of a file of rules


@dataclasses.dataclass(frozen=True)
class Rules:
    """Holds rules in order: the first that fits a name, or a path, counts.

    Attributes:
        rules: The rules.
        given: Whether any were passed; if not, names become paths, and arrays stay.

    >>> rules = Rules.of([Rule("h.#.q.weight", "h/query/kernel", "l o i -> l i o")])
    >>> moves = rules.to_tree({"h.0.q.weight": (8, 4), "h.1.q.weight": (8, 4)})
    >>> moves["h/query/kernel"].shape, moves["h/query/kernel"].sources
    ((2, 4, 8), ('h.0.q.weight', 'h.1.q.weight'))
    """

    rules: tuple[Rule, ...]
    given: bool = True

    @classmethod
    def of(cls, given: "Sequence[Rule | Mapping[str, Any]] | Rules | None") -> "Rules":
        """Makes rules from rules, or from mappings with their fields.

        Args:
            given: Rules or mappings; None for names that become paths, `/` for `.`, and
                arrays as they lie.

        Raises:
            TypeError, ValueError: If `given` holds no rules.

        >>> Rules.of([{"name": "fc.weight", "path": "fc/kernel"}]).rules[0].path
        'fc/kernel'
        """
        if isinstance(given, Rules):
            return given
        if given is None:
            return cls((Rule("**", "**"),), given=False)
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise TypeError(
                f"rules is a list of rules, got {brief(given)}. Pass "
                '[interop.Rule("**.weight", "**/kernel", "o i -> i o"), …], or '
                'interop.read_rules("rules.json").'
            )
        return cls(tuple(_rule(value, at) for at, value in enumerate(given)))

    @classmethod
    def from_json(cls, text: str) -> "Rules":
        """Reads rules from the text that `to_json` returns.

        Raises:
            ValueError: If the text holds no rules.
        """
        try:
            content = json.loads(text, object_pairs_hook=_without_repeats)
        except RecursionError:
            raise ValueError("It is nested too deeply.") from None
        if not isinstance(content, list):
            raise ValueError(
                f"It holds {brief(content)}, and not a list of rules such as "
                '[{"name": "w", "path": "kernel", "rearrange": "o i -> i o"}].'
            )
        return cls.of(content)

    def to_json(self) -> str:
        """Returns the rules as a list of objects with the fields of each.

        >>> Rules.of([Rule("w", "kernel", "o i -> i o")]).to_json()
        '[{"name": "w", "path": "kernel", "rearrange": "o i -> i o"}]'
        """
        return json.dumps([rule.fields() for rule in self.rules])

    def to_tree(self, names: Mapping[str, Shape]) -> dict[str, Move]:
        """Plans how each leaf of a tree is made of the tensors of a file.

        Args:
            names: Shapes of all tensors, by name.

        Raises:
            ModuleNotFoundError: If a rule rearranges, and einops is not installed.
            ValueError: If a rule fits nothing, no rule takes a tensor, shapes do not
                fit a rule, numbers of a stack are missing, or two become one leaf.
        """
        return rule_fits.to_tree(self.rules, names, must_fit=self.given)

    def to_names(self, paths: Mapping[str, Shape]) -> dict[str, Move]:
        """Plans how each tensor of a file is made of the leaves of a tree.

        Args:
            paths: Shapes of all leaves, by path.

        Raises:
            ModuleNotFoundError, ValueError: As `to_tree` does.
        """
        return rule_fits.to_names(self.rules, paths, must_fit=self.given)


def read_rules(file: str | os.PathLike[str]) -> Rules:
    """Reads rules from a JSON file: a list of objects with the fields of `Rule`.

    Args:
        file: A file on this machine.

    Raises:
        OSError: If the file cannot be read.
        TypeError, ValueError: If the file holds no rules.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open(f"{folder}/rules.json", "w") as out:
    ...         _ = out.write('[{"name": "w", "path": "kernel"}]')
    ...     read_rules(f"{folder}/rules.json").rules[0].path
    'kernel'
    """
    path = arguments.local_file(file, "file", "rules.json")
    with path.open("rb") as stream:
        content = stream.read(_LONGEST + 1)
    try:
        if len(content) > _LONGEST:
            raise ValueError(f"It has more than {_LONGEST:,} bytes.")
        return Rules.from_json(content.decode())
    except ValueError as error:
        raise ValueError(f"Cannot read rules from {path}: {error}") from None


def _rule(value: object, at: int) -> Rule:
    if isinstance(value, Rule):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(
            f"rules[{at}] is a Rule or a mapping with its fields, got {brief(value)}. "
            'Pass {"name": "fc.weight", "path": "fc/kernel"}.'
        )
    fields = cast("Mapping[str, Any]", value)
    known = [field.name for field in dataclasses.fields(Rule)]
    for key in fields:
        if key not in known:
            raise ValueError(
                f"rules[{at}] has the field {brief(key)}, which rules do not have. "
                f"{nearest(str(key), known)}"
            )
    if not {"name", "path"} <= set(fields):
        raise ValueError(
            f"rules[{at}] needs both name and path, and has {brief(list(fields))}. "
            'None, null in JSON, leaves out: {"name": "mask", "path": null}.'
        )
    try:
        return Rule(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"rules[{at}]: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"A rule has a field twice: {brief([k for k, _ in pairs])}.")
    return fields
