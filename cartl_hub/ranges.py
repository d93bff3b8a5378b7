"""Checks of the numbers that a user chooses."""

import math
import operator

_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


def check_number(name: str, value: float, *bounds: tuple[str, float]) -> None:
    """Refuse what is not a finite number within ``bounds``, e.g. ``(">=", 0), ("<", 1)``.

    Raises:
        ValueError: If it is refused; the message gives the name, the expected and the actual value.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}{_remedy(value, 'float')}.")
    if not all(_COMPARE[sign](value, bound) for sign, bound in bounds):
        raise ValueError(f"{name} must be {' and '.join(f'{sign} {bound}' for sign, bound in bounds)}, got {value}.")


def check_whole(name: str, value: int, *bounds: tuple[str, int]) -> None:
    """Refuse what is not a whole number within ``bounds``, as :func:`check_number` does."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}{_remedy(value, 'int')}.")
    check_number(name, value, *bounds)


def check_bool(name: str, value: bool) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: If it is refused; the message gives the name and the actual value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def _remedy(value: object, kind: str) -> str:
    """Remedy for scalars of NumPy and torch, which JSON does not hold."""
    return f"; convert it with {kind}(...)" if hasattr(value, "item") else ""
