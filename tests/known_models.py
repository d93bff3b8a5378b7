"""Models whose robust accuracy is known or quickly measured, and data for them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cartl_hub.data import Drawn, ImageData
from cartl_hub.images import ImagePolicy

EPS = 8 / 255


class Linear(nn.Module):
    """Two classes; an Linf ball of radius eps lowers the margin by eps times the 1-norm of the weight, no attack by more."""

    def __init__(self, channels: int = 3, size: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels * size * size, generator=torch.Generator().manual_seed(3)))

    def forward(self, images: Tensor) -> Tensor:
        margin = (images.flatten(1) - 0.5) @ self.weight
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Curved(nn.Module):
    """A small network on which more steps break more images."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, num_classes))
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.layers(4 * images - 2)


@dataclass
class FloatData:
    """A data set of somebody else."""

    images: Tensor
    labels: Tensor
    label_names: tuple[str, ...] = ("no", "yes")

    @property
    def description(self):
        return {"id": "foreign"}

    def batches(self, batch_size):
        for indices in torch.arange(len(self.labels)).split(batch_size):
            yield Drawn(self.images[indices], self.labels[indices], indices, 0)


def pixels(num: int, channels: int = 3, size: int = 4) -> Tensor:
    """Far from 0 and 255, so that no perturbation is clipped."""
    return torch.randint(77, 179, (num, channels, size, size), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def linear_case(num: int = 60, channels: int = 3) -> tuple[Linear, ImageData, np.ndarray]:
    """A model, data on which about a fifth of the labels are wrong, and each image's signed margin."""
    model, images = Linear(channels).eval(), pixels(num, channels)
    with torch.no_grad():
        margin = model(images / 255)[:, 1]
    labels = (margin > 0).long()
    labels[::5] = 1 - labels[::5]
    signed = torch.where(labels == 1, margin, -margin).numpy()
    return model, ImageData(labels, ("no", "yes"), images, ImagePolicy(size=(4, 4)), {"id": "toy", "split": "test"}), signed


def curved_case(num: int = 80) -> tuple[Curved, ImageData]:
    model, images = Curved().eval(), pixels(num)
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    model.seen = 0
    return model, ImageData(labels, tuple("abcd"), images, ImagePolicy(size=(4, 4)), {"id": "toy", "split": "test"})
