"""Projected gradient descent."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..randomness import RESTART, START, fold_in, normal, random_keys, uniform
from .attack import Attack, Norm, cross_entropy, eval_mode, input_gradient, project, sample_norm, steepest_direction


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy (Madry et al., 2018, https://arxiv.org/abs/1706.06083).

    Args:
        step_size: Length of one step, in pixel units of [0, 1].
        steps: Number of gradient steps.
        random_start: Start from a uniform point of the ball instead of the image.
        restarts: Runs from other starts; each next one only on the images that are not broken yet.
    """

    step_size: float
    steps: int
    random_start: bool = True
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1 or not self.step_size >= 0:
            raise ValueError(f"steps and restarts must be >= 1 and step_size >= 0, got {self}.")

    def __call__(self, model, images, labels, keys=None, *, until_broken=False):
        keys = random_keys(len(images), images.device) if keys is None else keys
        with eval_mode(model):
            if not until_broken:
                return self._last_iterate(model, images, labels, keys)
            adversarial = images.clone()
            highest = torch.full_like(labels, -torch.inf, dtype=torch.float32)
            active = torch.arange(len(images), device=images.device)
            for restart in range(self.restarts):
                start_keys = fold_in(fold_in(keys, RESTART), restart) if restart else keys
                active = self._search(model, images, labels, start_keys, active, adversarial, highest)
                if not len(active) or not self.random_start:
                    break
            return adversarial

    def _start(self, images: Tensor, keys: Tensor) -> Tensor:
        if not self.random_start:
            return images.clone()
        return (images + random_point(keys, images.shape[1:], self.eps, self.norm)).clamp(0, 1)

    def _step(self, images: Tensor, iterate: Tensor, gradient: Tensor) -> Tensor:
        moved = iterate + self.step_size * steepest_direction(gradient, self.norm)
        return (images + project(moved - images, self.eps, self.norm)).clamp(0, 1)

    def _last_iterate(self, model, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        iterate = self._start(images, keys)
        for _ in range(self.steps):
            gradient, _, _ = input_gradient(model, iterate, labels, cross_entropy)
            iterate = self._step(images, iterate, gradient)
        return iterate

    def _search(self, model, images, labels, keys, active, adversarial, highest) -> Tensor:
        """One run on the images ``active``; writes the best iterates and losses, returns the images not broken."""
        images, labels = images[active], labels[active]
        iterate = self._start(images, keys[active])
        for step in range(self.steps + 1):
            if step < self.steps:
                gradient, losses, logits = input_gradient(model, iterate, labels, cross_entropy)
            else:
                with torch.no_grad():
                    logits = model(iterate).float()
                gradient, losses = None, cross_entropy(logits, labels)
            broken = logits.argmax(1) != labels
            better = broken | (losses > highest[active])
            adversarial[active[better]] = iterate[better]
            highest[active] = torch.where(better, losses, highest[active])
            left = ~broken
            active = active[left]
            if gradient is None or not len(active):
                break
            images, labels = images[left], labels[left]
            iterate = self._step(images, iterate[left], gradient[left])
        return active


def random_point(keys: Tensor, shape: tuple[int, ...], eps: float, norm: Norm) -> Tensor:
    """Uniform point of the ``norm`` ball of radius ``eps`` for each key.

    Shape:
        [B] -> [B, *shape].
    """
    if norm == "Linf":
        return eps * (2 * uniform(keys, shape, stream=START) - 1)
    direction = normal(keys, shape, stream=START)
    radius = uniform(fold_in(keys, START), stream=START) ** (1 / math.prod(shape))
    return eps * radius.view(-1, *[1] * len(shape)) * direction / sample_norm(direction)
