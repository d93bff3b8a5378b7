"""Square attack: random search, without gradients."""

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import START, uniform
from ..ranges import check_number, check_whole
from .attack import RandomSearch, sample_norm

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000 after which the squares' share is halved
TILES = 5  # of the first L2 perturbation, along the shorter side


@dataclass(frozen=True, kw_only=True)
class Square(RandomSearch):
    """Square attack on the margin between logits (Andriushchenko et al., 2020, https://arxiv.org/abs/1912.00049).

    The schedule of the squares' size is stretched to the number of queries, as in AutoAttack. Squares reach every pixel, as
    in the paper; in the authors' code they never touch the last row and column.

    Args:
        queries: Number of perturbations to try, the first one included.
        p_init: Share of the pixels in the first squares, in (0, 1].

    Raises:
        ValueError: On values out of range, beside what :class:`Attack` raises.
    """

    queries: int = 5000
    p_init: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("queries", self.queries, (">=", 1))
        check_number("p_init", self.p_init, (">", 0), ("<=", 1))

    @property
    def num_proposals(self) -> int:
        return self.queries

    def propose(self, images: Tensor, best: Tensor, keys: Tensor, query: int) -> Tensor:
        if query == 0:
            return (stripes if self.norm == "Linf" else tiles)(images, keys, self.eps)
        share = pixel_share(query - 1, self.queries, self.p_init)
        return (square if self.norm == "Linf" else two_squares)(images, best, keys, self.eps, share)


def pixel_share(query: int, queries: int, p_init: float) -> float:
    """Share of the pixels in the squares of a query, counted from 0 after the first perturbation."""
    return p_init / 2 ** bisect_left(HALVINGS, query * 10_000 // queries)


def stripes(images: Tensor, keys: Tensor, eps: float) -> Tensor:
    """Each column of each channel brighter or darker by eps."""
    _, channels, _, width = images.shape
    return (images + eps * _signs(uniform(keys, (channels, 1, width), stream=START))).clamp(0, 1)


def square(images: Tensor, best: Tensor, keys: Tensor, eps: float, share: float) -> Tensor:
    """A square in which each channel is brighter or darker than the image by eps."""
    _, channels, height, width = images.shape
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    draws = uniform(keys, (2 + channels,), stream=START)
    rows, columns = _offsets(draws[:, 0], side, height), _offsets(draws[:, 1], side, width)
    return torch.where(_inside(rows, columns, side), images + eps * _signs(draws[:, 2:, None, None]), best).clamp(0, 1)


def tiles(images: Tensor, keys: Tensor, eps: float) -> Tensor:
    """A grid of bumps, scaled to the length eps."""
    _, channels, height, width = images.shape
    side = max(min(height, width) // TILES, 1)
    grid = height // side, width // side
    draws = uniform(keys, (1 + channels, *grid), stream=START)
    lying = (draws[:, :1] < 0.5)[..., None, None]
    upright = bumps(side, images.device)
    blocks = _signs(draws[:, 1:])[..., None, None] * torch.where(lying, upright.T, upright)
    delta = blocks.transpose(3, 4).reshape(len(images), channels, grid[0] * side, grid[1] * side)
    spare = height - grid[0] * side, width - grid[1] * side
    delta = F.pad(delta, (spare[1] // 2, spare[1] - spare[1] // 2, spare[0] // 2, spare[0] - spare[0] // 2))
    return (images + eps * delta / sample_norm(delta)).clamp(0, 1)


def two_squares(images: Tensor, best: Tensor, keys: Tensor, eps: float, share: float) -> Tensor:
    """Add a bump in one square, with the length that another gives up and that is left up to eps."""
    _, channels, height, width = images.shape
    side = max(round(math.sqrt(share * height * width)), 3)
    side = min(side + (side % 2 == 0), height, width)
    draws = uniform(keys, (5 + channels,), stream=START)
    rows, columns = _offsets(draws[:, 0], side, height), _offsets(draws[:, 1], side, width)
    grown = _inside(rows, columns, side)
    emptied = _inside(_offsets(draws[:, 2], side, height), _offsets(draws[:, 3], side, width), side)

    upright = bumps(side, images.device)
    kinds = torch.stack([upright, upright.T])
    chosen = (draws[:, 4] < 0.5).long()[:, None, None]
    bump = kinds[chosen, rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]][:, None]

    delta = best - images
    kept = delta * grown
    new = bump * grown * _signs(draws[:, 5:, None, None]) + kept / _channel_norm(kept).clamp(min=1e-12)
    spare = (eps**2 - sample_norm(delta) ** 2).clamp(min=0) / channels
    length = (spare + _channel_norm(delta * (grown | emptied)) ** 2).sqrt()
    delta = torch.where(grown, new * length / _channel_norm(new).clamp(min=1e-12), delta * ~emptied)
    return (images + eps * delta / sample_norm(delta).clamp(min=1e-12)).clamp(0, 1)


def bumps(side: int, device: torch.device) -> Tensor:
    """A hill above a valley, of length 1: the paper's eta, [side, side]."""
    top = side // 2
    eta = torch.cat([_hill(top, side, device), -_hill(side - top, side, device)])
    return eta / eta.norm()


def _hill(height: int, width: int, device: torch.device) -> Tensor:
    """Nested rectangles around the middle, the k-th smallest raised by 1 / k**2, scaled to the length 1."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    rings = torch.maximum((rows - height // 2).abs()[:, None], (columns - width // 2).abs())
    raised = torch.arange(1, max(height, width) // 2 + 2, device=device).float() ** -2
    heights = raised.flip(0).cumsum(0).flip(0)[rings]
    return heights / heights.norm()


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0)


def _offsets(draws: Tensor, side: int, extent: int) -> Tensor:
    """Positions of pixels relative to the first one of a square, which is drawn, [B] -> [B, extent]; 0 to side - 1 inside."""
    first = (draws * (extent - side + 1)).long()
    return torch.arange(extent, device=draws.device) - first[:, None]


def _inside(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Mask of the pixels inside a square, [B, H], [B, W] -> [B, 1, H, W]."""
    rows, columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _channel_norm(x: Tensor) -> Tensor:
    return x.norm(dim=(2, 3), keepdim=True)
