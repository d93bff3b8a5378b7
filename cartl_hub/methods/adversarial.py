"""Adversarial training and adversarial fine-tuning."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import PGD, Attack, Transfer
from ..models import Classifier
from ..randomness import CHOSEN, uniform
from ..ranges import check_number, check_whole
from .method import Batch, Method, check_attack


@dataclass(frozen=True, kw_only=True)
class EpsSchedule:
    """Radius of a training attack over the run: 0, then rising linearly to the full radius ("epsilon-scheduling", Ngnawe et al.,
    2025, https://arxiv.org/abs/2509.23325); it lets a source that is not robust learn the task first.

    Args:
        start: Share of the run until which the radius is 0.
        end: Share of the run from which it is the full radius.

    Raises:
        ValueError: Unless 0 <= start <= end <= 1.
    """

    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"expected 0 <= start <= end <= 1, shares of the run; got start={self.start}, end={self.end}.")

    def factor(self, progress: float) -> float:
        """Share of the full radius, in [0, 1]."""
        if progress < self.start:
            return 0.0
        return 1.0 if progress >= self.end else (progress - self.start) / (self.end - self.start)


def scaled(attack: Attack, factor: float) -> Attack:
    """The attack with its radius, and its step if it has one, times ``factor``."""
    if factor == 1:
        return attack
    if isinstance(attack, Transfer):
        return replace(attack, attack=scaled(attack.attack, factor))
    sizes = {name: getattr(attack, name) * factor for name in ("eps", "step_size") if hasattr(attack, name)}
    return replace(attack, **sizes)


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Method):
    """Cross-entropy on adversarial images (Madry et al., 2018, https://arxiv.org/abs/1706.06083), alone or added to the clean
    ones (Jaiswal and Fan, 2021).

    Args:
        attack: Attack of the inner maximisation; CARTL's by default.
        adversarial_share: Share, in (0, 1], of the images whose adversarial versions are added to the clean images, redrawn in
            each epoch. Clean and added images form one batch, and each weighs the same: the sum of their losses is divided by
            the expected number of images, (1 + share) times that of the clean ones. None: adversarial images alone.
        num_blocks: Number of blocks to train, counted from the classifier; None is the whole network.
        eps_schedule: Schedule of the attack's radius over the run.

    Raises:
        ValueError: On values of another kind or out of range.
    """

    attack: Attack = field(default=PGD(eps=8 / 255, step_size=2 / 255, steps=7))
    adversarial_share: float | None = None
    num_blocks: int | None = None
    eps_schedule: EpsSchedule = field(default_factory=EpsSchedule)

    def __post_init__(self) -> None:
        check_attack(self.attack)
        if self.adversarial_share is not None:
            check_number("adversarial_share", self.adversarial_share, (">", 0), ("<=", 1))
        if self.num_blocks is not None:
            check_whole("num_blocks", self.num_blocks, (">=", 1))
        if not isinstance(self.eps_schedule, EpsSchedule):
            raise ValueError(f"eps_schedule must be an EpsSchedule, got {self.eps_schedule!r}.")

    @property
    def trained_blocks(self) -> int | None:
        return self.num_blocks

    def losses(self, model: Classifier, batch: Batch) -> dict[str, Tensor]:
        if self.adversarial_share is None:
            logits = model(self._perturbed(model, batch.images, batch.labels, batch.keys, batch.progress))
            return {"loss": F.cross_entropy(logits, batch.labels), "logits": logits}
        images, labels, num_clean = batch.images, batch.labels, len(batch.images)
        chosen = torch.nonzero(uniform(batch.keys, stream=CHOSEN) < self.adversarial_share).flatten()
        if len(chosen):
            added = self._perturbed(model, images[chosen], labels[chosen], batch.keys[chosen], batch.progress)
            images, labels = torch.cat([images, added]), torch.cat([labels, labels[chosen]])
        logits = model(images)
        total = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": total / ((1 + self.adversarial_share) * num_clean), "logits": logits[:num_clean]}

    def _perturbed(self, model, images, labels, keys, progress):
        factor = self.eps_schedule.factor(progress)
        return scaled(self.attack, factor)(model, images, labels, keys) if factor else images
