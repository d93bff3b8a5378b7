"""Projected gradient descent."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..randomness import RESTART, fold_in
from .attack import Attack, cross_entropy, input_gradient, project, random_point, steepest_direction


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy (Madry et al., 2018, https://arxiv.org/abs/1706.06083).

    Args:
        step_size: Length of one step, in pixel units of [0, 1].
        steps: Number of gradient steps.
        random_start: Start from a uniform point of the ball instead of the image.
        restarts: Runs from other starts, each next one only on the images that are not broken yet; one in training.

    Raises:
        ValueError: On values out of range, or restarts from the same start, beside what :class:`Attack` raises.
    """

    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1 or not self.step_size >= 0:
            raise ValueError(f"steps and restarts must be >= 1 and step_size >= 0, got {self}.")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"{self.restarts} restarts without a random start are all the same; use random_start=True.")

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        iterate = self._start(images, keys)
        for _ in range(self.steps):
            gradient, _, _ = input_gradient(model, iterate, labels, cross_entropy)
            iterate = self._step(images, iterate, gradient)
        return iterate

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        adversarial = images.clone()
        highest = torch.full((len(images),), -torch.inf, device=images.device)
        active = torch.arange(len(images), device=images.device)
        for restart in range(self.restarts):
            run_keys = fold_in(fold_in(keys, RESTART), restart) if restart else keys
            iterate = self._start(images[active], run_keys[active])
            for step in range(self.steps + 1):
                if step < self.steps:
                    gradient, losses, logits = input_gradient(model, iterate, labels[active], cross_entropy)
                else:
                    with torch.no_grad():
                        logits = model(iterate).float()
                    losses = cross_entropy(logits, labels[active])
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
        if not self.random_start:
            return images
        return (images + random_point(keys, images.shape[1:], self.eps, self.norm)).clamp(0, 1)

    def _step(self, images: Tensor, iterate: Tensor, gradient: Tensor) -> Tensor:
        moved = iterate + self.step_size * steepest_direction(gradient, self.norm)
        return (images + project(moved - images, self.eps, self.norm)).clamp(0, 1)
