"""Whether a model is right about images: in fp32, and apart from the attack that made them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import Attack
from ..models import Classifier
from ..modules import check_dtype

RANDOM_PASSES = 4
RANDOM_CHANGE = 1e-3  # of logits between two passes, as a share of their spread: rounding stays far below
FEW, FEWER = 64, 8  # images for a look at the logits
NEIGHBOUR_CHANGE = 1e-2  # of logits with the batch that an image is in; kernels for other sizes round otherwise


class Verdict(NamedTuple):
    """Predictions of a model for adversarial images.

    Args:
        images: Judged images, [B, C, H, W]: clean ones where the attack left its threat model.
        predicted: Predicted classes, [B].
        rejected: Whether the attack left its threat model, bool [B].
    """

    images: Tensor
    predicted: Tensor
    rejected: Tensor

    def breaks(self, labels: Tensor) -> Tensor:
        """Whether each image is misclassified, bool [B]."""
        return (self.predicted != labels) & ~self.rejected


def judge(
    model: nn.Module, images: Tensor, adversarial: Tensor, attack: Attack, indices: Tensor, num_classes: int, what: str
) -> Verdict:
    """Classify an attack's result for ``images``; an image that left [0, 1] or the ball is judged by its clean version."""
    adversarial = adversarial.detach().float()
    rejected = ~allowed(adversarial, images, attack)
    judged = torch.where(rejected.view(-1, *[1] * (images.ndim - 1)), images, adversarial)
    return Verdict(judged, classify(model, judged, indices, num_classes, what), rejected)


def allowed(adversarial: Tensor, images: Tensor, attack: Attack) -> Tensor:
    """Whether each image is in [0, 1] and in the ball, up to rounding: [B, C, H, W] -> [B]."""
    pixels, delta = adversarial.flatten(1), (adversarial - images).flatten(1)
    size = delta.norm(dim=1, p=math.inf if attack.norm == "Linf" else 2)
    return (size <= attack.eps + 1e-5 * max(attack.eps, 0.1)) & (pixels.amin(1) >= 0) & (pixels.amax(1) <= 1)


@torch.no_grad()
def classify(model: nn.Module, images: Tensor, indices: Tensor, num_classes: int, what: str) -> Tensor:
    """Most probable classes, [B, C, H, W] -> [B].

    Args:
        indices: Positions of the images in the data, for messages.
        what: Description of the images, for messages.

    Raises:
        ValueError: If the logits have another shape than [B, ``num_classes``] or aren't finite.
    """
    logits = model(images)
    expected = (len(images), num_classes)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"expected logits {list(expected)} for {expected[0]} images of {expected[1]} classes, got {got}; wrap the model "
            "in a module that returns one logit per class of the data."
        )
    infinite = indices[~logits.isfinite().all(1).cpu()].tolist()
    if infinite:
        shown = ", ".join(map(str, infinite[:5])) + (f" and {len(infinite) - 5} more" if len(infinite) > 5 else "")
        raise ValueError(
            f"expected finite logits, got NaN or infinite ones on {what} with index {shown}; check the weights and the "
            "normalisation inside the model."
        )
    return logits.argmax(1)


# What is refused


def check_model(model: nn.Module) -> None:
    """Raise unless it is a module in eval mode, with weights in fp32."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; wrap a function in a module.")
    if isinstance(model, torch.jit.ScriptModule) and not isinstance(model, torch.jit.TopLevelTracedModule):
        raise TypeError(
            "expected a module that is no TorchScript, got a scripted one; wrap it in a torch.nn.Module, or trace it."
        )
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"expected a model in eval mode, got {len(training)} modules in train mode ({', '.join(training[:3])}); call "
            "model.eval() first."
        )
    check_dtype(model)


@torch.no_grad()
def random_change(model: nn.Module, images: Tensor) -> float:
    """Largest change of a logit between passes over the same batch, as a share of the logits' spread.

    A part of the images is passed more often, as a model with few random states may be twice in the same one.
    """
    part = images[:FEWER]
    again = [model(part) for _ in range(RANDOM_PASSES)]
    return max(_change(model(images), model(images)), *(_change(again[0], other) for other in again[1:]))


@torch.no_grad()
def neighbour_change(model: nn.Module, images: Tensor) -> float:
    """Largest change of a logit when an image is in a batch of at most three, as a share of the logits' spread."""
    size = max(1, min(3, len(images) // 2))
    return _change(model(images), torch.cat([model(part) for part in images.flip(0).split(size)]).flip(0))


def refuse_neighbours(model: nn.Module, images: Tensor) -> None:
    """Raise ValueError if the model's logits for an image depend on the other images of the batch.

    A model that draws random numbers is let through: a check covers those.
    """
    if random_change(model, images) <= RANDOM_CHANGE and (change := neighbour_change(model, images)) > NEIGHBOUR_CHANGE:
        raise ValueError(
            f"expected logits that depend on one image each, got some that change by {change:.1%} of their spread with the other "
            "images of the batch; use stored statistics instead of those of the batch (BatchNorm with track_running_stats=True)."
        )


def first_look(model: nn.Module, num_classes: int, device: torch.device, images: Tensor, indices: Tensor) -> None:
    """Refuse a model by its logits for a few images, before any long work."""
    if num_classes < 2:
        raise ValueError(f"expected data of at least 2 classes, got {num_classes}: nothing could be classified wrongly.")
    images = images[:FEW].to(device)
    try:
        classify(model, images, indices[:FEW], num_classes, "clean images")
    except RuntimeError as error:  # torch's, of a layer that takes something else
        shape = list(images.shape[1:])
        raise ValueError(f"expected a model for images {shape}, as the data have, got one that fails: {error}") from error
    refuse_neighbours(model, images)


@torch.no_grad()
def first_logits(model: nn.Module, images: Tensor) -> list[list[float]] | None:
    """Logits of a few images, by which a model is recognised; None for one that draws random numbers."""
    logits = model(images)
    return None if _change(logits, model(images)) > RANDOM_CHANGE else logits.tolist()


def has_gradient(model: nn.Module, images: Tensor) -> bool:
    """Whether logits are a differentiable function of the pixels, as far as autograd knows."""
    with torch.enable_grad():
        return bool(model(images.detach().clone().requires_grad_(True)).requires_grad)


def _change(logits: Tensor, again: Tensor) -> float:
    spread = (logits.amax(1) - logits.amin(1)).mean().clamp(min=1e-12)
    return float((logits - again).abs().max() / spread)


# How it is measured


class PassCounter:
    """Images that went through a model, with or without a gradient."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.passes += len(inputs[0])


@contextmanager
def measuring(model: nn.Module, device: torch.device | str | None) -> Iterator[tuple[torch.device, PassCounter]]:
    """The model on ``device``, by default where it is, with its passes counted; fp32 is fp32 and no parameter gets a gradient.

    Afterwards everything is as before.
    """
    home = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    device = home if device is None else torch.device(device)
    if device.type == "meta":
        raise ValueError("expected a device that computes, got meta; leave device out to run where the model is.")
    counter = PassCounter()
    with (
        _at(device, home, model),
        _channels_last(model, device),
        _frozen(model),
        _without_tf32(),
        torch.autocast(device.type, enabled=False),
    ):
        hook = model.register_forward_pre_hook(counter)
        try:
            yield device, counter
        finally:
            hook.remove()


@contextmanager
def _at(device: torch.device, home: torch.device, model: nn.Module) -> Iterator[None]:
    if device == home:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def _channels_last(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Kernels of a timm network in the layout that CPUs compute faster; others may not work in it, as with ``x.view``."""
    kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    if device.type != "cpu" or not isinstance(model, Classifier):
        kernels = []
    before = [kernel.data for kernel in kernels]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for kernel, data in zip(kernels, before, strict=True):
            kernel.data = data


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze parameters: none can get a gradient, whatever an attack does, and the graph keeps nothing for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Run products and convolutions of fp32 numbers in fp32."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the caller uses the switches of torch 2.9, and torch refuses a mix of both kinds
        switches: Any = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        precisions = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, precision in zip(switches, precisions, strict=True):
                switch.fp32_precision = precision
        return
    if before[0] != "highest":
        torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if before[0] != "highest":
            torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]
