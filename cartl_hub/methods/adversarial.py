"""Adversarial training and adversarial fine-tuning."""

from dataclasses import dataclass, field, replace

import torch.nn.functional as F

from ..attacks import PGD, Attack
from ..ranges import check_whole
from .method import Method, check_attack


@dataclass(frozen=True, kw_only=True)
class EpsSchedule:
    """Radius of a training attack over the run: 0, then linear to the full radius ("epsilon-scheduling", Ngnawe et al., 2025,
    https://arxiv.org/abs/2509.23325); it lets a source that is not robust learn the task first.

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
    """The attack with its radius, and its step where it has one, times ``factor``."""
    if factor == 1:
        return attack
    sizes = {name: getattr(attack, name) * factor for name in ("eps", "step_size") if hasattr(attack, name)}
    return replace(attack, **sizes)


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(Method):
    """Cross-entropy on adversarial images (Madry et al., 2018, https://arxiv.org/abs/1706.06083).

    Args:
        attack: The inner maximisation; CARTL's by default.
        num_blocks: Blocks to train, counted from the classifier; None is the whole network.
        eps_schedule: Radius of the attack over the run.

    Raises:
        ValueError: On values of another kind or out of range.
    """

    attack: Attack = field(default=PGD(eps=8 / 255, step_size=2 / 255, steps=7))
    num_blocks: int | None = None
    eps_schedule: EpsSchedule = field(default_factory=EpsSchedule)

    def __post_init__(self) -> None:
        check_attack(self.attack)
        if self.num_blocks is not None:
            check_whole("num_blocks", self.num_blocks, (">=", 1))
        if not isinstance(self.eps_schedule, EpsSchedule):
            raise ValueError(f"eps_schedule must be an EpsSchedule, got {self.eps_schedule!r}.")

    @property
    def trained_blocks(self):
        return self.num_blocks

    def losses(self, model, batch):
        factor = self.eps_schedule.factor(batch.progress)
        images = batch.images
        if factor:
            images = scaled(self.attack, factor)(model, images, batch.labels, batch.keys)
        logits = model(images)
        return {"loss": F.cross_entropy(logits, batch.labels), "logits": logits}
