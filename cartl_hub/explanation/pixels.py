"""Saliency maps: the pixels that a model's loss depends on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attacks.attack import check_images, input_gradient
from ..modules import check_dtype, eval_mode
from ..randomness import START, fold_in, image_keys, normal
from ..ranges import check_number, check_whole

PERCENTILE = 0.99  # of the absolute values of a map, which becomes the end of its scale


def saliency(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the cross-entropy with respect to the pixels (Simonyan et al., 2014; as in Utrera et al., 2020).

    It is signed: where it is positive, a brighter value raises the loss. Meanwhile the model is in eval mode and no parameter
    gets a gradient.

    Args:
        model: Model from images in [0, 1] to logits [B, K].
        images: Images with pixels in [0, 1].
        labels: Classes for which the loss is computed.

    Shape:
        images [B, C, H, W], labels [B] -> [B, C, H, W], of any range.

    Raises:
        ValueError: If images or labels have another shape, type or range.
    """
    _check(model, images, labels)
    with eval_mode(model):
        return input_gradient(model, images, labels, _losses)[0]


def _check(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    check_images(images, labels)
    check_dtype(model, images.dtype)


def smooth_grad(
    model: nn.Module, images: Tensor, labels: Tensor, *, noise: float = 0.1, num_samples: int = 25, seed: int = 0
) -> Tensor:
    """SmoothGrad (Smilkov et al., 2017): mean of the gradients at noisy copies of each image, which are not clipped.

    Args:
        model: Model, as for :func:`saliency`.
        images: Images with pixels in [0, 1].
        labels: Classes for which the loss is computed.
        noise: Standard deviation of the Gaussian noise, in pixel units of [0, 1].
        num_samples: Number of noisy copies of each image.
        seed: Seed of the noise, which depends on an image's place in the batch.

    Shape:
        As :func:`saliency`.

    Raises:
        ValueError: As :func:`saliency`.
    """
    _check(model, images, labels)
    check_number("noise", noise, (">", 0))
    check_whole("num_samples", num_samples, (">=", 1))
    keys = image_keys(seed, 0, torch.arange(len(images), device=images.device))
    total = torch.zeros_like(images)
    with eval_mode(model):
        for number in range(num_samples):
            noisy = images + noise * normal(fold_in(keys, number), tuple(images.shape[1:]), stream=START)
            total += input_gradient(model, noisy, labels, _losses)[0]
    return total / num_samples


def integrated_gradients(model: nn.Module, images: Tensor, labels: Tensor, *, baseline: float = 0.0, steps: int = 32) -> Tensor:
    """Integrated gradients (Sundararajan et al., ICML 2017) of the cross-entropy, by the midpoint rule.

    The values of an image add up to its loss minus that of the baseline, as far as ``steps`` resolve the path between them.

    Args:
        model: Model, as for :func:`saliency`.
        images: Images with pixels in [0, 1].
        labels: Classes for which the loss is computed.
        baseline: Value of every pixel where the path begins, in [0, 1]: black by default. Pixels of this value get 0.
        steps: Number of points on the path.

    Shape:
        As :func:`saliency`.

    Raises:
        ValueError: As :func:`saliency`.
    """
    _check(model, images, labels)
    check_number("baseline", baseline, (">=", 0), ("<=", 1))
    check_whole("steps", steps, (">=", 1))
    way, total = images - baseline, torch.zeros_like(images)
    with eval_mode(model):
        for step in range(steps):
            total += input_gradient(model, baseline + (step + 0.5) / steps * way, labels, _losses)[0]
    return way * total / steps


def map_pictures(maps: Tensor) -> Tensor:
    """Maps as pictures: 0 is grey, and each image's scale ends at the 99th percentile of its absolute values, so that a few
    extreme pixels don't hide the others. Brightness can't be compared between images or models.

    Shape:
        [B, C, H, W], of any range -> [B, C, H, W] in [0, 1].
    """
    sizes = maps.flatten(1).abs().quantile(PERCENTILE, dim=1).view(-1, 1, 1, 1)
    largest = maps.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    scale = torch.where(sizes > 0, sizes, largest)  # of a map that is zero nearly everywhere
    return 0.5 + 0.5 * (maps / torch.where(scale > 0, scale, 1)).clamp(-1, 1)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")
