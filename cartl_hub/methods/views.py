"""Random views of images, for contrastive learning."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import AREA, BLUR, COLOUR, FLIP, uniform
from ..ranges import check_number

_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True, kw_only=True)
class Views:
    """Random crop resized to the full image, mirror image, colour distortion and blur (Chen et al., 2020,
    https://arxiv.org/abs/2002.05709), for a whole batch at once on its device.

    Two departures: the changes of colour have one order (brightness, contrast, saturation, hue) instead of a random one, and
    hue turns in the colour plane of YIQ instead of HSV. Images without three channels change only in brightness and contrast.

    Args:
        min_area: Smallest share of the image that a crop shows, in (0, 1].
        flip: Whether half of the views are mirrored. Wrong for digits and text.
        colour: Strength of the colour distortion, in [0, 1]; 0 for none. 80 % of the views are distorted: factors of 1 +- 0.8
            times it for brightness, contrast and saturation, and up to 0.2 times it of a turn for hue; then 20 % become grey.
        blur: Share of the views that are blurred, in [0, 1]: Gaussian, sigma 0.1 to 2 pixels, cut off at a twentieth of the
            height (at least a pixel).

    Raises:
        ValueError: On values out of range.
    """

    min_area: float = 0.08
    flip: bool = True
    colour: float = 0.5
    blur: float = 0.5

    def __post_init__(self) -> None:
        check_number("min_area", self.min_area, (">", 0), ("<=", 1))
        check_number("colour", self.colour, (">=", 0), ("<=", 1))
        check_number("blur", self.blur, (">=", 0), ("<=", 1))

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Random view of each image: [B, C, H, W] in [0, 1], [B] -> [B, C, H, W] in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):  # pixels stay in fp32, whatever the network's precision
            images = self._cropped(images, keys)
            if self.colour:
                images = self._coloured(images, keys)
            return (self._blurred(images, keys) if self.blur else images).clamp(0, 1)  # weights that sum to 1, but for rounding

    def _cropped(self, images: Tensor, keys: Tensor) -> Tensor:
        """Area and logarithm of the ratio of the sides, 3/4 to 4/3, are uniform; a side ends at that of the image."""
        area, ratio, left, top = uniform(keys, (4,), stream=AREA).unbind(1)
        area, ratio = self.min_area + (1 - self.min_area) * area, ((2 * ratio - 1) * math.log(4 / 3)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        mirror = 1 - 2 * (uniform(keys, stream=FLIP) < 0.5).float() if self.flip else torch.ones_like(width)
        none = torch.zeros_like(width)
        across = torch.stack([mirror * width, none, (2 * left - 1) * (1 - width)], 1)
        down = torch.stack([none, height, (2 * top - 1) * (1 - height)], 1)
        grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _coloured(self, images: Tensor, keys: Tensor) -> Tensor:
        brightness, contrast, saturation, hue, distorted, grey = uniform(keys, (6,), stream=COLOUR).unbind(1)
        strength = self.colour * (distorted < 0.8)
        brightness, contrast, saturation = (
            (1 + 0.8 * strength * (2 * draw - 1))[:, None, None, None] for draw in (brightness, contrast, saturation)
        )
        to_yiq = torch.tensor(_YIQ, device=images.device)
        images = (brightness * images).clamp(0, 1)
        luma = torch.einsum("c,bchw->bhw", to_yiq[0], images) if images.shape[1] == 3 else images.mean(1)
        images = torch.lerp(luma.mean((1, 2))[:, None, None, None], images, contrast).clamp(0, 1)
        if images.shape[1] != 3:
            return images
        angle = 2 * math.pi * 0.2 * strength * (2 * hue - 1)
        saturation = saturation.flatten() * (grey >= 0.2)
        turned = torch.zeros(len(images), 3, 3, device=images.device)
        turned[:, 0, 0] = 1
        turned[:, 1, 1] = turned[:, 2, 2] = saturation * angle.cos()
        turned[:, 2, 1] = saturation * angle.sin()
        turned[:, 1, 2] = -turned[:, 2, 1]
        to_rgb = torch.tensor(_YIQ, dtype=torch.float64).inverse().float().to(images.device)
        return torch.einsum("bij,bjhw->bihw", to_rgb @ turned @ to_yiq, images).clamp(0, 1)

    def _blurred(self, images: Tensor, keys: Tensor) -> Tensor:
        chosen, sigma = uniform(keys, (2,), stream=BLUR).unbind(1)
        half = max(1, images.shape[2] // 20)
        distance = torch.arange(-half, half + 1, device=images.device)
        weights = (-0.5 * (distance / (0.1 + 1.9 * sigma)[:, None]).square()).exp()
        weights = weights / weights.sum(1, keepdim=True)
        weights = torch.where((chosen < self.blur)[:, None], weights, (distance == 0).float())[:, :, None, None, None]
        for dim in (2, 3):
            padded = F.pad(images, (0, 0, half, half) if dim == 2 else (half, half, 0, 0), mode="replicate")
            parts = [padded.narrow(dim, offset, images.shape[dim]) for offset in range(2 * half + 1)]
            images = torch.stack([weight * part for weight, part in zip(weights.unbind(1), parts, strict=True)]).sum(0)
        return images
