"""Measurements as data: counts with their intervals, checks, and verdicts per image."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .words import eps_text, percent, text, threat_text


def wilson_interval(correct: int, num_images: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927), in [0, 1]; (0, 1) for no images."""
    if not num_images:
        return 0.0, 1.0
    z = 1.959963984540054
    share, weight = correct / num_images, z * z / num_images
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / num_images + weight / (4 * num_images)) / (1 + weight)
    # at the ends rounding would exclude what was measured
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == num_images else middle + half)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, num_samples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images, with its 95% bootstrap interval over images.

    The interval holds 0 unless an exact sign test over the images on which they differ rejects equality too: of few such images
    the bootstrap makes too narrow an interval.

    Args:
        a: Verdicts, bool [N].
        b: Verdicts on the same images in the same order.
        num_samples: Number of bootstrap samples.
        seed: Seed of the samples.

    Returns:
        Accuracy of ``a`` minus that of ``b``, and the ends of the interval, in [-1, 1].

    Raises:
        ValueError: If the verdicts can't be paired.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"expected verdicts on the same images, [N] each with N >= 1; got {list(a.shape)} and {list(b.shape)}.")
    won, lost = int((a & ~b).sum()), int((b & ~a).sum())
    # resampling images is drawing from three kinds of them
    counts = np.random.default_rng(seed).multinomial(len(a), np.array([won, lost, len(a) - won - lost]) / len(a), num_samples)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / len(a), [0.025, 0.975])
    if _sign_test(won, lost) > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return (won - lost) / len(a), float(low), float(high)


def _sign_test(won: int, lost: int) -> float:
    """Probability, if both are equally likely, of a result at least as uneven."""
    number = won + lost
    tail = sum(math.comb(number, fewer) for fewer in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**number)


@dataclass(frozen=True)
class Accuracy:
    """Share of images that are classified correctly."""

    correct: int
    num_images: int

    @property
    def accuracy(self) -> float:
        """Accuracy in [0, 1]."""
        return self.correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval, in [0, 1]."""
        return wilson_interval(self.correct, self.num_images)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.interval_text})"

    @property
    def interval_text(self) -> str:
        """Interval in words, e.g. "52.2 to 54.2%"."""
        low, high = map(percent, self.interval)
        return f"{low} to {high}%"


@dataclass(frozen=True)
class AttackResult(Accuracy):
    """Share of images that survive an attack: classified correctly before it, and broken neither by it nor by an attack
    that ran before it on the same images.

    Args:
        attack: Settings of the attack, with its class under "name".
        attacked: Number of images that it ran on.
        rejected: Number of images that it moved out of [0, 1] or the ball; they count as not broken.
        alone: Whether the figure is the attack's own, covering every correctly classified image; a longer run of the same attack
            includes the shorter one's result and needs only the images that survived it. Otherwise it ran on what other attacks
            had left, and the figure is cumulative.
        seconds: Wall time in seconds.
        passes: Number of images that went through the model, with or without a gradient.
    """

    attack: dict[str, Any]
    attacked: int
    rejected: int = 0
    alone: bool = True
    seconds: float | None = field(default=None, compare=False)
    passes: int | None = None

    @property
    def threat(self) -> str:
        """Threat model, e.g. "Linf 8/255"."""
        return threat_text(self.attack["norm"], self.attack["eps"])

    @property
    def settings(self) -> str:
        """Settings except the threat model, in readable form."""
        shown = {key: value for key, value in self.attack.items() if key not in ("name", "norm", "eps")}
        if "step_size" in shown:
            shown["step_size"] = eps_text(self.attack["norm"], shown["step_size"])
        return ", ".join(f"{key.replace('_', ' ')} {text(value)}" for key, value in shown.items()) or "one step"


@dataclass(frozen=True)
class WorstCase(Accuracy):
    """Share of images that no attack of a threat model broke.

    Args:
        norm: Norm of the ball.
        eps: Radius of the ball, in pixel units of [0, 1].
        attacks: Names of the attacks in it; those of smaller radius are included.
    """

    norm: str
    eps: float
    attacks: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy against the radius of an attack.

    Args:
        norm: Norm of the ball.
        eps: Radii, from 0 upwards.
        correct: Number of images that survived every radius up to each one.
        num_images: Number of images that it was measured on, evenly spaced over those of the report.
        attack: Settings of the attack.
        mean_eps: Radius up to which the mean is taken.
    """

    norm: str
    eps: tuple[float, ...]
    correct: tuple[int, ...]
    num_images: int
    attack: dict[str, Any]
    mean_eps: float

    @property
    def accuracy(self) -> tuple[float, ...]:
        return tuple(correct / self.num_images for correct in self.correct)

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95% Wilson interval at each radius."""
        return [wilson_interval(correct, self.num_images) for correct in self.correct]

    @property
    def mean_eps_text(self) -> str:
        """Radius ``mean_eps`` in words, e.g. "8/255"."""
        return eps_text(self.norm, self.mean_eps)

    @property
    def mean(self) -> float:
        """Mean over [0, ``mean_eps``] by the trapezoid rule: "expected robustness" (Ngnawe et al., ICLR 2026)."""
        inner = [eps for eps in self.eps if eps < self.mean_eps]
        radii = np.array([*inner, self.mean_eps])
        heights = np.interp(radii, self.eps, self.accuracy)
        if self.mean_eps == 0:
            return float(heights[0])
        return float((np.diff(radii) * (heights[1:] + heights[:-1]) / 2).sum() / self.mean_eps)


@dataclass(frozen=True)
class ClassAccuracy:
    """Counts of one class: its images, those correct when clean, those that no attack of the first threat model broke."""

    name: str
    num_images: int
    clean_correct: int
    robust_correct: int

    @property
    def clean(self) -> Accuracy:
        return Accuracy(self.clean_correct, self.num_images)

    @property
    def robust(self) -> Accuracy:
        return Accuracy(self.robust_correct, self.num_images)


@dataclass(frozen=True)
class Check:
    """One check of whether the numbers can be trusted.

    Args:
        name: Name of the check.
        status: Outcome; "skipped" if it could not be made, or a budget left it out.
        figures: Numbers that it rests on; JSON.
        meaning: Sentence on what the outcome means.
        remedy: Action to take; empty if there is nothing to do.
        num_images: Number of images that it was made on.
    """

    name: str
    status: Literal["pass", "warn", "fail", "skipped"]
    figures: dict[str, Any]
    meaning: str
    remedy: str = ""
    num_images: int = 0


@dataclass(frozen=True)
class SourceResult:
    """Figures from the report of the source that the model was fine-tuned from.

    Args:
        id: Id of the source.
        data: Id of the data that the source was measured on.
        threat: Threat model of its robust accuracy, e.g. "Linf 8/255".
        clean: Accuracy on images that aren't attacked.
        robust: Accuracy in the worst case of the threat model.
        attacks: Attacks behind its robust accuracy.
    """

    id: str
    data: str
    threat: str
    clean: Accuracy
    robust: Accuracy
    attacks: tuple[str, ...]

    @property
    def num_images(self) -> int:
        return self.clean.num_images


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Verdicts per image, in the order in which they were read.

    Args:
        indices: Positions in the data, int64 [N].
        labels: True classes, int64 [N].
        correct: Mapping from "clean" and each attack to bool [N]: classified correctly, for attacks also after it and those
            before it on the same images.
    """

    indices: np.ndarray
    labels: np.ndarray
    correct: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Sample:
    """An image that an attack broke.

    Args:
        index: Position in the data.
        label: True class, which the model predicts for the clean image.
        predicted: Class that the model predicts for the adversarial image.
        attack: Name of the attack.
        image: Clean image, [C, H, W] in [0, 1].
        adversarial: Adversarial image, [C, H, W] in [0, 1].
    """

    index: int
    label: int
    predicted: int
    attack: str
    image: np.ndarray
    adversarial: np.ndarray

    @property
    def perturbation(self) -> np.ndarray:
        """Perturbation stretched to [0, 1]; 0.5 is no change."""
        delta = self.adversarial - self.image
        return 0.5 + delta / max(2 * float(np.abs(delta).max()), 1e-12)
