"""Decays in one word of a command line: `0.9999`, `power:0.05`, `half_life:2000`."""

import argparse
import inspect

from ema_optax._decays.decay import MAKERS, Decay
from ema_optax._decays.decays import DecayLike
from ema_optax._messages.text import nearest_names


def form(name: str) -> str:
    """Writes the form of a decay in one word, from the arguments of its maker.

    An argument whose default is None is one of several to choose from.

    >>> form("warmup")
    'warmup:DECAY[,OFFSET]'
    """
    values, optional, others = "", "", ""
    for argument in inspect.signature(MAKERS[name]).parameters.values():
        inner = argument.annotation == DecayLike
        word = "INNER" if inner else argument.name.upper()
        if argument.kind is argument.KEYWORD_ONLY:
            others += f" or {name}:{argument.name}={word}"
        elif argument.default in (None, argument.empty):
            values += f"{',' if values else ':'}{word}"
        else:
            optional += f"[{',' if values or optional else ':'}{word}"
    return f"{name}{values}{optional}{']' * optional.count('[')}{others}"


FORMS = {name: form(name) for name in MAKERS}


def parse(text: str) -> tuple[str, Decay]:
    """Reads a decay, and the name to show for it; for argparse.

    Args:
        text: A number β, which means `warmup:β` as in `ema_params`; or a maker of
            `ema_optax` with its arguments, `NAME:VALUE,VALUE,KEY=VALUE`. A maker that
            takes a decay takes it first: `start_after:power:0.05,1000`.

    Raises:
        argparse.ArgumentTypeError: If `text` is neither, or the maker refuses it.

    >>> parse("0.9999")
    ('warmup:0.9999', warmup(decay=0.9999, offset=10))
    >>> parse("start_after:half_life:2000,1000")[1]
    start_after(decay=half_life(steps=2000), step=1000)
    """
    name = "".join(text.split()).rstrip(":")
    if _number(name) is not None:
        name = f"warmup:{name}"
    return name, _decay(name)


def _decay(text: str) -> Decay:
    name, colon, rest = text.partition(":")
    if not colon and _number(name) is not None:  # inside another decay
        name, rest = "warmup", name
    if name not in MAKERS:
        raise argparse.ArgumentTypeError(_unknown(text, name))
    values: list[Decay | float] = []
    if ":INNER" in form(name):  # the inner decay ends at the last comma
        inner, _, rest = rest.rpartition(",")
        if not inner:
            raise argparse.ArgumentTypeError(f"got {text!r}; write {form(name)}")
        values.append(_decay(inner))
    named: dict[str, float] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.rpartition("=")
        number = _number(value)
        if number is None or key in named or (named and not equals):
            raise argparse.ArgumentTypeError(
                f"{part!r} is out of place in {text!r}; write {form(name)}"
            )
        if equals:
            named[key] = number
        else:
            values.append(number)
    try:
        return MAKERS[name](*values, **named)
    except TypeError:  # too few, too many, or of another name: all values are numbers
        message = f"{text!r} does not fit the arguments of {name}; write {form(name)}"
    except (ValueError, OverflowError) as error:
        message = f"{text!r}: {str(error).rstrip('.')}"
    raise argparse.ArgumentTypeError(message)


def _number(text: str) -> float | None:
    """Reads a number, a whole one as int; None if `text` is no number."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not text.isascii():  # digits of other scripts, which not all terminals have
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _unknown(text: str, name: str) -> str:
    called = name.partition("(")[0]  # as one would write it in Python
    exact = [called] if called in MAKERS else []
    near = exact or nearest_names(called, MAKERS, count=2, cutoff=0.6)
    if near:
        advice = f"the nearest: {', '.join(form(n) for n in near)}"
    else:
        advice = f"write a number below 1, or one of {', '.join(MAKERS)}"
    return f"{text!r} is no decay; {advice}"
