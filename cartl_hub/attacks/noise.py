"""Random noise, an attack without a search."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..randomness import START, uniform
from ..ranges import check_whole
from .attack import RandomSearch, random_start


@dataclass(frozen=True, kw_only=True)
class Noise(RandomSearch):
    """Random points of the ball, of which the one of highest margin is kept; no gradients.

    In Linf every second point is a corner of the ball, where each pixel is off by eps.

    Args:
        samples: Number of points for each image.

    Raises:
        ValueError: If ``samples`` is below 1, beside what :class:`Attack` raises.
    """

    samples: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("samples", self.samples, (">=", 1))

    @property
    def num_proposals(self) -> int:
        return self.samples

    def propose(self, images: Tensor, best: Tensor, keys: Tensor, sample: int) -> Tensor:
        if self.norm == "Linf" and sample % 2:
            signs = torch.where(uniform(keys, images.shape[1:], stream=START) < 0.5, -1, 1)
            return (images + self.eps * signs).clamp(0, 1)
        return random_start(images, keys, self.eps, self.norm)
