"""A few images on which an evaluation is checked."""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import APGD, FGSM, PGD, Attack, Noise, Square, Transfer
from ..attacks.attack import Norm
from ..attacks.losses import LossName
from ..sampling import evenly_spaced
from .subject import Subject
from .verdict import FEW, has_gradient

FEWEST = 8  # images classified correctly of which a share says something


class Comparison(NamedTuple):
    """A figure that is suspicious if large, its standard error, and the figures that it comes from."""

    excess: float
    error: float
    figures: dict[str, float]


class Skipped(Exception):
    """A check that can't be made; the message says why."""


class Trial:
    """State shared by checks: a model, a few images, and the verdicts of attacks on them; no attack is run twice.

    Args:
        subject: Model and pool; the images are evenly spaced over it, as data may be sorted by class.
        num_images: Largest number of images.
        eps: Radius of the threat model.
        norm: Norm of the threat model.
        source: Model whose adversarial images are tried on this one.
    """

    def __init__(self, subject: Subject, num_images: int, *, eps: float, norm: Norm, source: nn.Module | None = None):
        self.subject, self.model = subject, subject.model
        self.positions = evenly_spaced(num_images, len(subject.pool))
        self.images, self.labels, indices = subject.load(self.positions)
        self.keys = subject.keys(indices)
        self.eps, self.norm, self.source = eps, norm, source
        self.reported: np.ndarray | None = None  # images of the pool that stand all of a report's attacks in this ball, bool [N]
        self._standing: dict[tuple[Attack, float], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def few(self) -> Tensor:
        """Images for a look at the logits."""
        return self.images[: min(self.subject.batch_size, FEW)]

    @property
    def grey(self) -> float:
        """Radius within which every image can become grey."""
        return 128 / 255 * (1 if self.norm == "Linf" else math.sqrt(self.images[0].numel()))

    def batches(self, chosen: np.ndarray) -> Sequence[Tensor]:
        """Positions of some images, bool [N], in batches."""
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(self.labels.device)
        return rows.split(self.subject.batch_size) if len(rows) else ()

    def correct_images(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images that are classified correctly, with their labels and keys, in batches."""
        for rows in self.batches(self.correct):
            yield self.images[rows], self.labels[rows], self.keys[rows]

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(part).float() for part in self.images.split(self.subject.batch_size)])

    @cached_property
    def correct(self) -> np.ndarray:
        return (self.logits.argmax(1) == self.labels).cpu().numpy()

    @cached_property
    def has_gradient(self) -> bool:
        return has_gradient(self.model, self.images[:1])

    def need_gradient(self) -> None:
        if not self.has_gradient:
            raise Skipped("the logits have no gradient in the pixels")

    def need_images(self) -> None:
        if self.correct.sum() < FEWEST:
            raise Skipped(f"only {self.correct.sum()} of {len(self)} images are classified correctly, and {FEWEST} are needed")

    def need_radius(self) -> None:
        if not self.eps:
            raise Skipped("the radius is 0")

    def need_ascent(self) -> None:
        """Skip the check unless a step along the gradient is possible."""
        self.need_images()
        self.need_radius()
        self.need_gradient()

    # Attacks

    def noise(self) -> Noise:
        self.need_radius()
        return Noise(eps=self.eps, norm=self.norm, samples=20)

    def fgsm(self) -> FGSM:
        return FGSM(eps=self.eps, norm=self.norm)

    def pgd(self, steps: int = 20, eps: float | None = None) -> PGD:
        eps = self.eps if eps is None else eps
        if not eps:
            self.need_radius()
        return PGD(eps=eps, norm=self.norm, step_size=eps / 4 if self.norm == "Linf" else eps / 8, steps=steps)

    def apgd(self, loss: LossName = "ce") -> APGD:
        self.need_radius()
        return APGD(eps=self.eps, norm=self.norm, steps=50, loss=loss)

    def square(self) -> Square:
        self.need_radius()
        return Square(eps=self.eps, norm=self.norm, queries=300)

    def both_losses(self) -> dict[str, np.ndarray]:
        """Images surviving APGD both on cross-entropy and on DLR, which differ as losses for an honest model."""
        return {"APGD-CE and APGD-DLR": self.standing(self.apgd()) & self.standing(self.apgd("dlr"))}

    def standing(self, attack: Attack, *, scale: float = 1.0, among: np.ndarray | None = None) -> np.ndarray:
        """Images that are classified correctly before and after an attack, bool [N].

        Args:
            scale: Factor applied to the logits that the attack sees.
            among: Images that it is run on; by default those that are classified correctly.
        """
        self.need_images()
        if (attack, scale) not in self._standing:
            if not isinstance(attack, (Noise, Square, Transfer)):
                self.need_gradient()
            attacked = _Scaled(self.model, scale) if scale != 1 else self.model
            standing = (self.correct if among is None else among).copy()
            for rows in self.batches(standing):
                images, labels = self.images[rows], self.labels[rows]
                found = attack(attacked, images, labels, self.keys[rows], until_broken=True)
                verdict = self.subject.judge(images, found, attack, rows, "adversarial images of a check")
                standing[rows.cpu().numpy()] = ~verdict.breaks(labels).cpu().numpy()
            self._standing[attack, scale] = standing
        return self._standing[attack, scale]


class _Scaled(nn.Module):
    """A model with its logits times a factor."""

    def __init__(self, model: nn.Module, factor: float):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * self.factor


def lower(suspect: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> Comparison:
    """Amount by which accuracy is lower under one attack than under another on the same images.

    Args:
        suspect: Name of the attack that should not be the stronger one, and the images that survive it, bool [N].
        reference: Name of the other attack, and the images that survive it, bool [N].
    """
    (low,), (high,) = suspect.values(), reference.values()
    won, lost = int((high & ~low).sum()), int((low & ~high).sum())
    # McNemar's error, of two attacks that are equally strong: it isn't zero where all differences go one way
    error = math.sqrt(won + lost) / len(low)
    figures = {f"accuracy, {name}": float(standing.mean()) for name, standing in (reference | suspect).items()}
    return Comparison((won - lost) / len(low), error, figures)


def share(name: str, count: int, num: int) -> Comparison:
    """Share of images that should be zero."""
    return Comparison(count / num, math.sqrt(count) / num, {name: count / num})
