"""Decays in one word of a command line: `0.9999`, `power:0.05`, `half_life:2000`."""

import argparse
from collections.abc import Callable

from ema_optax import decays
from ema_optax.families import Decay
from ema_optax.text import nearest_names

FORMS = {
    "constant": "constant:DECAY",
    "warmup": "warmup:DECAY[,OFFSET]",
    "debiased": "debiased:DECAY",
    "uniform": "uniform",
    "power": "power:WIDTH or power:exponent=EXPONENT",
    "inverse_power": "inverse_power[:DECAY[,INV_GAMMA[,POWER[,MIN_DECAY]]]]",
    "ramp": "ramp:DECAY[,TIME_CONSTANT]",
    "cosine": "cosine:START,STEPS",
    "half_life": "half_life:STEPS",
    "fraction": "fraction:F",
    "start_after": "start_after:INNER,STEP",
    "scale_to_batch": "scale_to_batch:INNER,FACTOR",
}
_MAKERS: dict[str, Callable[..., Decay]] = {
    name: getattr(decays, name) for name in FORMS
}
_AROUND_ANOTHER = ("start_after", "scale_to_batch")


def parse(text: str) -> tuple[str, Decay]:
    """Returns the name to show for a decay, and the decay; for argparse.

    Args:
        text: A number β, which means `warmup:β` as in `ema_params`; or a maker of
            `ema_optax` with its arguments, `NAME:VALUE,VALUE,KEY=VALUE`. In the makers
            that take a decay it comes first: `start_after:power:0.05,1000`.

    Raises:
        argparse.ArgumentTypeError: If it is neither, or the values are refused.

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
    if not colon and _number(name) is not None:  # inside another
        name, rest = "warmup", name
    if name not in _MAKERS:
        raise argparse.ArgumentTypeError(_unknown(text, name))
    values: list[Decay | float] = []
    if name in _AROUND_ANOTHER:  # the other ends at the last comma
        inner, _, rest = rest.rpartition(",")
        if not inner:
            raise argparse.ArgumentTypeError(f"got {text!r}; write {FORMS[name]}")
        values.append(_decay(inner))
    named: dict[str, float] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.rpartition("=")
        number = _number(value)
        if number is None or key in named or (named and not equals):
            raise argparse.ArgumentTypeError(
                f"{part!r} is out of place in {text!r}; write {FORMS[name]}"
            )
        if equals:
            named[key] = number
        else:
            values.append(number)
    try:
        return _MAKERS[name](*values, **named)
    except TypeError:  # too few, too many, or of another name: all values are numbers
        message = f"{text!r} has not the arguments of {name}; write {FORMS[name]}"
    except (ValueError, OverflowError) as error:
        message = f"{text!r}: {str(error).rstrip('.')}"
    raise argparse.ArgumentTypeError(message)


def _number(text: str) -> float | None:
    """Returns the number, whole ones as int, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    if not text.isascii():  # digits of other scripts, which not all terminals have
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _unknown(text: str, name: str) -> str:
    called = name.partition("(")[0]  # as one would write it in Python
    exact = [called] if called in _MAKERS else []
    near = exact or nearest_names(called, _MAKERS, count=2, cutoff=0.6)
    if near:
        rather = f"the nearest: {', '.join(FORMS[n] for n in near)}"
    else:
        rather = f"write a number below 1, or one of {', '.join(FORMS)}"
    return f"{text!r} is no decay; {rather}"
