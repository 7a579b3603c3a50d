"""Schedules of a merge in one word of a command line, or in a file."""

import argparse
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ema_optax import reconstruction
from ema_optax._cli import decay_text, parsing
from ema_optax._reconstruction.schedules import SCHEDULES, UNIFORM, checkpoint_ema

# Gives each of the steps that are merged a coefficient.
Schedule: TypeAlias = Callable[[Sequence[int]], np.ndarray]

HELP = (
    "  uniform        the plain mean\n"
    "  linear         the learning rate falls like 1 - x; 1-sqrt like 1 - sqrt(x);\n"
    "                 cosine like (1 + cos(pi x))/2; x is the share of the window\n"
    "                 that is over\n"
    "  ema:B          an average that keeps the share B at each step\n"
    "  power:W, ...   a decay, as if it had folded these steps alone; 'ema-optax\n"
    "                 profile --help' lists all\n"
    "  FILE.json      coefficients, oldest first, with sum 1; or\n"
    '                 {"multipliers": [...]} of the learning rate between the steps\n'
)


def parse(text: str) -> tuple[str, Schedule]:
    """Reads a schedule, and the name to show for it; for argparse.

    Raises:
        argparse.ArgumentTypeError: If `text` is no schedule, or its file cannot be
            read.

    >>> name, schedule = parse("linear")
    >>> schedule([100, 200])
    array([0.5, 0.5])
    """
    if text in (*SCHEDULES, UNIFORM):
        return text, lambda steps: reconstruction.schedule_coefficients(text, steps)
    if text.endswith(".json"):
        return text, _from_file(text)
    try:
        average = checkpoint_ema(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if average is not None:
        return text, lambda steps: average(len(steps))
    try:
        name, decay = decay_text.parse(text)
    except argparse.ArgumentTypeError as error:
        names = [UNIFORM, *SCHEDULES, "ema:B", "FILE.json"]
        raise argparse.ArgumentTypeError(
            f"{text!r} is no schedule. Known: {', '.join(names)} and decays; {error}"
        ) from None
    return name, lambda steps: reconstruction.decay_coefficients(decay, steps)


def _from_file(text: str) -> Schedule:
    content = parsing.json_file(text)
    multipliers = content.get("multipliers") if isinstance(content, dict) else None
    numbers = content if multipliers is None else multipliers
    if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
        raise argparse.ArgumentTypeError(
            f'{text} holds no list of numbers, nor {{"multipliers": [...]}} with one'
        )

    def coefficients(steps: Sequence[int]) -> np.ndarray:
        weights = np.array(numbers, np.float64)
        if multipliers is not None:
            weights = reconstruction.lr_decay_coefficients(numbers)
        if len(weights) != len(steps):
            raise ValueError(
                f"{text} has coefficients for {len(weights)} checkpoints, and "
                f"{len(steps)} are merged: {min(steps)} to {max(steps)}."
            )
        return weights

    return coefficients


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
