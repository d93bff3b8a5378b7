"""Random noise: what an attack without a search breaks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..randomness import START, uniform
from .attack import Attack, random_search, random_start


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Random points of the ball, of which the one of highest margin is kept; no gradients.

    In Linf every second point is a corner of the ball, where each pixel is off by eps.

    Args:
        samples: Points for each image.

    Raises:
        ValueError: If there are none, beside what :class:`Attack` raises.
    """

    samples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}.")

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return random_search(model, images, labels, keys, self._propose, self.samples, until_broken=False)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return random_search(model, images, labels, keys, self._propose, self.samples, until_broken=True)

    def _propose(self, images: Tensor, best: Tensor, keys: Tensor, sample: int) -> Tensor:
        if self.norm == "Linf" and sample % 2:
            signs = torch.where(uniform(keys, images.shape[1:], stream=START) < 0.5, -1, 1)
            return (images + self.eps * signs).clamp(0, 1)
        return random_start(images, keys, self.eps, self.norm)
