"""Prediction of rotations."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..data import Augmentation
from ..randomness import TURN, uniform
from .pretext import Pretext, num_features


@dataclass(frozen=True, kw_only=True)
class Rotation(Pretext):
    """Predict by how many quarter turns the image was rotated, anticlockwise (Gidaris et al., 2018,
    https://arxiv.org/abs/1803.07728).

    Each image is turned once in an epoch; the authors show all four turns of it in one batch, at four times the cost.

    Args:
        augmentation: Augmentation before the rotation; None for none.
    """

    augmentation: Augmentation | None = field(default_factory=Augmentation)

    def head(self, model):
        height, width = model.image_policy.size
        if height != width:
            raise ValueError(f"expected square images for Rotation, got {height}x{width} of this {model.architecture}.")
        return nn.Linear(num_features(model), 4)

    def pose(self, images, keys):
        if self.augmentation is not None:
            images = self.augmentation(images, keys)
        turns = (4 * uniform(keys, stream=TURN)).long()
        turned = torch.stack([images.rot90(number, (2, 3)) for number in range(4)])
        return turned[turns, torch.arange(len(images), device=images.device)], turns
