"""Radii, shares and settings in words."""

from collections.abc import Mapping, Sequence
from typing import Any


def eps_text(norm: str, eps: float) -> str:
    """A radius as people write it: "8/255" for Linf, where it is a whole number of grey levels."""
    levels = round(eps * 255)
    whole = norm == "Linf" and levels > 0 and abs(eps * 255 - levels) < 1e-4
    return f"{levels}/255" if whole else f"{eps:.4g}"


def threat_text(norm: str, eps: float) -> str:
    """A threat model in words, e.g. "Linf 8/255"."""
    return f"{norm} {eps_text(norm, eps)}"


def percent(share: float) -> str:
    """A share in percent with one digit, and more if that would read 0 or 100 without being it."""
    digits = next((digits for digits in (1, 2, 3) if round(100 * share, digits) not in (0, 100)), 1)
    return f"{100 * share:.{digits}f}"


FEW_CHECKS = 8  # of some eighteen, which say little
NO_CHECK = "no check was made of whether the attacks were as strong as they can be."


def few_made(num_images: Sequence[int]) -> str:
    """Caveat on the number of checks that passed: a few say little, and so do few images.

    Args:
        num_images: Number of images of each check that was made.
    """
    if len(num_images) <= FEW_CHECKS:
        return "; most were not made"
    return f"; on {min(num_images)} images they show large differences only" if min(num_images) < 100 else ""


def printable(words: str, keep: str = "") -> str:
    """Somebody's words without control characters except those to ``keep``, and without those that change the text direction."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in words)


def text(value: Any) -> str:
    """Any JSON in readable form."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(text, value)) or "none"
        case Mapping():
            parts = ", ".join(f"{str(key).replace('_', ' ')} {text(item)}" for key, item in value.items() if key != "name")
            if "name" not in value:
                return parts or "none"
            return f"{text(value['name'])} ({parts})" if parts else text(value["name"])
    return str(value)
