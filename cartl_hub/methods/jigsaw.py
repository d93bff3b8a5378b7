"""Jigsaw puzzles."""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Augmentation
from ..randomness import TILES, uniform
from ..ranges import check_whole
from .pretext import Pretext, num_features


@dataclass(frozen=True, kw_only=True)
class Jigsaw(Pretext):
    """Recognise the order of the image's tiles (Noroozi and Favaro, 2016, https://arxiv.org/abs/1603.09246).

    The network sees the tiles put together as one image (as in Carlucci et al., 2019, https://arxiv.org/abs/1903.06864), not
    each by itself, so that any backbone can be used. If the sides aren't divisible, the rest of the image becomes black.

    Args:
        grid: Number of tiles along a side, 2 or 3.
        num_permutations: Number of possible orders, :func:`permutations`.
        augmentation: Augmentation before the image is cut; None for none. Black borders from padding would reveal where a tile
            belongs.

    Raises:
        ValueError: On values out of range, and in use on images with fewer pixels than tiles along a side.
    """

    grid: int = 3
    num_permutations: int = 24
    augmentation: Augmentation | None = Augmentation(padding=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("grid", self.grid, (">=", 2), ("<=", 3))
        check_whole("num_permutations", self.num_permutations, (">=", 2), ("<=", math.factorial(self.grid**2)))

    def head(self, model):
        if min(model.image_policy.size) < self.grid:
            raise ValueError(f"expected {self.grid} pixels or more along each side, got images of {model.image_policy.size}.")
        return nn.Linear(num_features(model), self.num_permutations)

    def pose(self, images, keys):
        if self.augmentation is not None:
            images = self.augmentation(images, keys)
        answers = (self.num_permutations * uniform(keys, stream=TILES)).long()
        orders = permutations(self.grid**2, self.num_permutations).to(images.device)
        return shuffled(images, orders[answers], self.grid), answers


@cache
def permutations(num_tiles: int, num: int) -> Tensor:
    """A fixed set of orders that differ widely: [num, num_tiles], int64.

    The first is the order of the image. Each next one is farthest, in the number of differing places (Hamming distance), from
    the nearest one before it, then from all before it together; ties go to the first in lexicographic order.
    """
    every = np.array(list(itertools.permutations(range(num_tiles))), dtype=np.int8)
    chosen = [0]
    nearest = together = (every != every[0]).sum(1)
    while len(chosen) < num:
        chosen.append(int((nearest * num_tiles * num + together).argmax()))
        distance = (every != every[chosen[-1]]).sum(1)
        nearest, together = np.minimum(nearest, distance), together + distance
    return torch.from_numpy(every[chosen].astype(np.int64))


def shuffled(images: Tensor, orders: Tensor, grid: int) -> Tensor:
    """Images whose place q, counted along the rows, shows the tile ``orders[:, q]``.

    Shape:
        [B, C, H, W], [B, grid * grid] -> [B, C, H, W].
    """
    height, width = (side // grid for side in images.shape[2:])
    whole = images[:, :, : grid * height, : grid * width].unflatten(3, (grid, width)).unflatten(2, (grid, height))
    tiles = whole.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    tiles = tiles[torch.arange(len(images), device=images.device)[:, None], orders]
    together = tiles.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return F.pad(together, (0, images.shape[3] - grid * width, 0, images.shape[2] - grid * height))
