"""Checks of the numbers that a user chooses."""

import math
import operator

_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_number(name: str, value: float, *bounds: tuple[str, float]) -> None:
    """Refuse what is not a finite number within ``bounds``, e.g. ``(">=", 0), ("<", 1)``.

    Raises:
        ValueError: With the name, what was expected and what was got.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    if not all(_COMPARE[sign](value, bound) for sign, bound in bounds):
        raise ValueError(f"{name} must be {' and '.join(f'{sign} {bound}' for sign, bound in bounds)}, got {value}.")


def check_whole(name: str, value: int, *bounds: tuple[str, int]) -> None:
    """As :func:`check_number`, for whole numbers."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    check_number(name, value, *bounds)
