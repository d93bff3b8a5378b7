"""Projected gradient descent."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ranges import check_number, check_whole
from .attack import Attack, ascend, input_gradient, random_start, restart_keys
from .losses import LOSSES, LossName, check_loss


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent (Madry et al., 2018, https://arxiv.org/abs/1706.06083).

    Args:
        step_size: Length of one step, in pixel units of [0, 1].
        steps: Number of gradient steps.
        random_start: Start from a uniform point of the ball instead of the image.
        restarts: Number of runs from other starts, of which the end of highest loss counts; in an evaluation each is on the
            images that are not broken yet.
        loss: Loss to maximise: cross-entropy as in the paper, the margin between logits, or their difference ratio (DLR).

    Raises:
        ValueError: On values out of range, or restarts from the same start, beside what :class:`Attack` raises.
    """

    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1
    loss: LossName = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("step_size", self.step_size, (">=", 0))
        check_whole("steps", self.steps, (">=", 1))
        check_whole("restarts", self.restarts, (">=", 1))
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.restarts} restarts without a random start are all the same; use random_start=True.")
        check_loss(self.loss)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        adversarial = self._run(model, images, labels, keys)
        if self.restarts == 1:
            return adversarial
        highest = self._height(model, adversarial, labels)
        for restart in range(1, self.restarts):
            other = self._run(model, images, labels, restart_keys(keys, restart))
            height = self._height(model, other, labels)
            better = height > highest
            adversarial[better], highest[better] = other[better], height[better]
        return adversarial

    def _run(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        iterate = self._start(images, keys)
        for _ in range(self.steps):
            gradient, _, _ = input_gradient(model, iterate, labels, LOSSES[self.loss])
            iterate = self._step(images, iterate, gradient)
        return iterate

    @torch.no_grad()
    def _height(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[self.loss](model(images).float(), labels)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        adversarial = images.clone()
        highest = torch.full((len(images),), -torch.inf, device=images.device)
        active = torch.arange(len(images), device=images.device)
        for restart in range(self.restarts):
            iterate = self._start(images[active], restart_keys(keys[active], restart))
            for step in range(self.steps + 1):
                if step < self.steps:
                    gradient, losses, logits = input_gradient(model, iterate, labels[active], LOSSES[self.loss])
                else:
                    with torch.no_grad():
                        logits = model(iterate).float()
                    losses = LOSSES[self.loss](logits, labels[active])
                left = logits.argmax(1) == labels[active]
                better = ~left | (losses > highest[active])
                adversarial[active[better]] = iterate[better]
                highest[active[better]] = losses[better]
                active, iterate = active[left], iterate[left]
                if not len(active):
                    return adversarial
                if step < self.steps:
                    iterate = self._step(images[active], iterate, gradient[left])
        return adversarial

    def _start(self, images: Tensor, keys: Tensor) -> Tensor:
        return random_start(images, keys, self.eps, self.norm) if self.random_start else images

    def _step(self, images: Tensor, iterate: Tensor, gradient: Tensor) -> Tensor:
        return ascend(images, iterate, gradient, self.step_size, self.eps, self.norm)
