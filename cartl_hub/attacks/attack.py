"""Base class of attacks, and the geometry that they share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..modules import eval_mode
from ..randomness import RESTART, START, fold_in, normal, random_keys, uniform
from ..ranges import check_number
from .losses import margin, without_label

Norm = Literal["Linf", "L2"]
DEFAULT_EPS: dict[Norm, float] = {"Linf": 8 / 255, "L2": 0.5}  # the field's, for images of 32 pixels


def check_norm(norm: Any) -> None:
    """Check that there are attacks in a norm.

    Raises:
        ValueError: If there are none.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}.")


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A threat model and a search for an adversarial image in it.

    Args:
        eps: Radius of the ball around the image, in pixel units of [0, 1].
        norm: Norm of the ball.

    Raises:
        ValueError: On a negative radius or an unknown norm.
    """

    eps: float
    norm: Norm = "Linf"

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_number("eps, a radius in pixel units of [0, 1] such as 8/255,", self.eps, (">=", 0))
        if self.eps > 1 and self.norm == "Linf":
            raise ValueError(f"eps must be in [0, 1] for Linf, as pixels are; got {self.eps}. Did you mean {self.eps:g}/255?")

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor | None = None, *, until_broken: bool = False
    ) -> Tensor:
        """Perturb ``images`` against ``labels``.

        Meanwhile the model is in eval mode and no parameter gets a gradient.

        Args:
            model: Model from images in [0, 1] to logits.
            images: Images with pixels in [0, 1].
            labels: True classes.
            keys: Key of each image for its random numbers (:func:`cartl_hub.randomness.image_keys`); by default drawn from
                torch's global generator.
            until_broken: Whether this is an evaluation: an image that is misclassified leaves the batch with that perturbation,
                at once if it needs none; the others end with the perturbation of highest loss. For training (False) none
                leaves.

        Shape:
            images [B, C, H, W], labels [B], keys [B] -> [B, C, H, W] in [0, 1], detached.

        Raises:
            ValueError: On images that aren't floats in [0, 1]; not checked with ``keys``, whose owner has checked the images.
        """
        images = images.detach()
        if keys is None:
            check_images(images, labels)
            keys = random_keys(len(images), images.device)
        with eval_mode(model):
            if not until_broken:
                return self._checked(self.perturb(model, images, labels, keys), images)
            with torch.no_grad():
                correct = model(images).argmax(1) == labels
            adversarial = images.clone()
            if correct.any():
                found = self.search(model, images[correct], labels[correct], keys[correct])
                adversarial[correct] = self._checked(found, images[correct])
            return adversarial

    def _checked(self, found: Any, images: Tensor) -> Tensor:
        """What the attack found, if it is an image for each of ``images``."""
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (images.shape, images.dtype):
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"expected {images.dtype} {list(images.shape)} from {type(self).__name__}, an image for each one, got {got}."
            )
        return found

    @abstractmethod
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """The images after all steps; the model is in eval mode."""

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """The worst images found, for images that the model classifies correctly."""
        return self.perturb(model, images, labels, keys)


def check_images(images: Tensor, labels: Tensor) -> None:
    """Check that images are floats in [0, 1], and that each has a class.

    Raises:
        ValueError: If they aren't, or a class is missing.
    """
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ValueError(
            f"expected images [B, C, H, W] of floats in [0, 1], got {images.dtype} {list(images.shape)}; divide uint8 by 255."
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"expected a class for each of {len(images)} images, got {labels.dtype} {list(labels.shape)}.")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"expected images in [0, 1], got values in [{low:.4g}, {high:.4g}]; normalisation is the model's.")


def input_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient with respect to the pixels, with the losses and logits it came from.

    Args:
        labels: Second argument of the loss, one entry per image.
        loss: Function of logits [B, K] and labels [B] to losses [B]. They are summed, so that an image's gradient doesn't depend
            on its batch.

    Shape:
        [B, C, H, W] -> gradient [B, C, H, W], losses [B], logits [B, K].
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images).float()
        losses = loss(logits, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return gradient, losses.detach(), logits.detach()


@torch.no_grad()
def likely_targets(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, number: int) -> Tensor:
    """Wrong classes of largest logit, in this order; all of them if there are fewer.

    Shape:
        [B, C, H, W], [B] -> [B, T].
    """
    logits = model(images).float()
    return without_label(logits, labels).topk(min(number, logits.shape[1] - 1), 1).indices


class RandomSearch(Attack):
    """Search for the proposal of highest margin for each image, without a gradient."""

    @property
    @abstractmethod
    def num_proposals(self) -> int:
        """Number of proposals for each image."""

    @abstractmethod
    def propose(self, images: Tensor, best: Tensor, keys: Tensor, number: int) -> Tensor:
        """Next proposals, from images, their best proposals so far, and the query's keys and number: [B, C, H, W]."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._best(model, images, labels, keys, until_broken=False)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._best(model, images, labels, keys, until_broken=True)

    @torch.no_grad()
    def _best(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, *, until_broken: bool) -> Tensor:
        best = images.clone()
        highest = torch.full((len(images),), -torch.inf, device=images.device)
        active = torch.arange(len(images), device=images.device)
        for number in range(self.num_proposals):
            proposals = self.propose(images[active], best[active], restart_keys(keys[active], number), number)
            logits = model(proposals).float()
            heights = margin(logits, labels[active])
            broken = (logits.argmax(1) != labels[active]) & until_broken
            better = broken | (heights > highest[active])
            best[active[better]] = proposals[better]
            highest[active[better]] = heights[better]
            active = active[~broken]
            if not len(active):
                break
        return best


def restart_keys(keys: Tensor, restart: int) -> Tensor:
    """Keys for an image's next run or query; the first one has the image's own."""
    return fold_in(fold_in(keys, RESTART), restart) if restart else keys


def random_start(images: Tensor, keys: Tensor, eps: float, norm: Norm) -> Tensor:
    """Uniform point of the ball around each image, clipped to [0, 1]."""
    return (images + random_point(keys, images.shape[1:], eps, norm)).clamp(0, 1)


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


def project(delta: Tensor, eps: float, norm: Norm) -> Tensor:
    """Nearest point of the ``norm`` ball of radius ``eps``, per sample.

    Shape:
        [B, ...] -> [B, ...].
    """
    if norm == "Linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / sample_norm(delta).clamp(min=1e-12)).clamp(max=1)


def confine(images: Tensor, moved: Tensor, eps: float, norm: Norm) -> Tensor:
    """Bring points that moved away from ``images`` back into the ball around them and into [0, 1]."""
    return (images + project(moved - images, eps, norm)).clamp(0, 1)


def ascend(images: Tensor, iterate: Tensor, gradient: Tensor, step_size: float | Tensor, eps: float, norm: Norm) -> Tensor:
    """A step of steepest ascent from ``iterate``, back in the ball around ``images`` and in [0, 1]."""
    return confine(images, iterate + step_size * steepest_direction(gradient, norm), eps, norm)


def steepest_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of steepest ascent of unit ``norm``, per sample; zero where the gradient is zero or NaN."""
    gradient = gradient.nan_to_num()  # a NaN would become a pixel, and a NaN image counts as misclassified
    if norm == "Linf":
        return gradient.sign()
    largest = gradient.flatten(1).abs().amax(1).view(-1, *[1] * (gradient.ndim - 1))
    scaled = gradient / torch.where(largest > 0, largest, 1)  # squares of tiny gradients would be zero in fp32
    return scaled / sample_norm(scaled).clamp(min=1e-12)


def sample_norm(x: Tensor) -> Tensor:
    """2-norm of each sample, [B, ...] -> [B, 1, ...]."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
