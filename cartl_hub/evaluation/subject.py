"""The subject of an evaluation: a model on a pool of images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import Attack
from ..randomness import image_keys
from .pool import Pool
from .verdict import Verdict, classify, judge


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the images that it is measured on, and how.

    Args:
        model: Module in eval mode, on ``device``.
        pool: Images to measure on.
        num_classes: Number of logits.
        seed: Seed of the random numbers.
        batch_size: Number of images per batch.
        device: Device to run on.
    """

    model: nn.Module
    pool: Pool
    num_classes: int
    seed: int
    batch_size: int
    device: torch.device

    def load(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images and labels on the device, and indices: [B] -> [B, C, H, W], [B], [B]."""
        images = self.pool.get(positions, self.device)
        return images, self.pool.labels[positions].to(self.device), self.pool.indices[positions]

    def keys(self, indices: Tensor) -> Tensor:
        """Keys of the images' random numbers, [B]."""
        return image_keys(self.seed, 0, indices.to(self.device))

    def classify(self, images: Tensor, indices: Tensor, what: str) -> Tensor:
        """Most probable classes, as :func:`cartl_hub.evaluation.verdict.classify` gives them."""
        return classify(self.model, images, indices, self.num_classes, what)

    def judge(self, images: Tensor, adversarial: Tensor, attack: Attack, indices: Tensor, what: str) -> Verdict:
        """Verdict on adversarial images, as :func:`cartl_hub.evaluation.verdict.judge` gives it."""
        return judge(self.model, images, adversarial, attack, indices, self.num_classes, what)
