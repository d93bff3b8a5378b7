"""Checks of a network's settings in a file that came from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .classifier import NOT_BUILT

PLAIN = (str, int, float, bool, type(None), list, tuple)
DEEPEST = 512
LARGEST = 65_536  # of any count or size: more is a mistake or an attack on the memory
_REFUSED = {*NOT_BUILT, "scriptable", "exportable", "no_jit"} - {"num_classes"}  # which timm repeats there


def check_model_args(args: Any) -> None:
    """Refuse arguments of ``timm.create_model`` that say where weights come from, or that would exhaust memory.

    Raises:
        ValueError: On these, or on anything but a mapping of plain values.
    """
    if not isinstance(args, Mapping) or not all(isinstance(value, PLAIN) for value in args.values()):
        raise ValueError(f"model_args must be a mapping of plain values, got {args!r:.200}.")
    if foreign := sorted(set(args) & _REFUSED):
        raise ValueError(f"model_args must describe an architecture, got {', '.join(foreign)}.")
    check_sizes(args)
    for name, value in args.items():  # a loop per layer would be endless before any memory is taken
        if any(word in name for word in ("depth", "layers", "block")) and max(_numbers(value), default=0) > DEEPEST:
            raise ValueError(f"expected at most {DEEPEST} for {name}, got {value}.")


def check_normalisation(mean: Any, std: Any) -> None:
    """Refuse an invalid normalisation of pixels in [0, 1].

    Raises:
        ValueError: Unless both are one or three finite numbers, and those of ``std`` > 0.
    """
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence) or len(values) not in (1, 3) or not all(map(_is_finite, values)):
            raise ValueError(f"expected one or three numbers as {name}, one for each channel, got {values!r:.200}.")
    if min(std) <= 0:
        raise ValueError(f"expected numbers > 0 as std, got {std}.")


def check_sizes(value: Any) -> None:
    """Refuse too large counts and sizes before memory is allocated for them.

    Raises:
        ValueError: If a number in it is too large.
    """
    for number in _numbers(value):
        if not -LARGEST <= number <= LARGEST:
            raise ValueError(f"expected sizes and counts up to {LARGEST}, got {number}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6 and math.isfinite(value)


def _numbers(value: Any) -> list[float]:
    """Every number in a part of a config."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) else []
