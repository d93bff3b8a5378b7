"""Models that hide their gradients are flagged or refused; honest ones, robust or not, are not."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import toy_data
from torch import Tensor, nn

from cartl_hub import load_model
from cartl_hub.attacks import FGSM
from cartl_hub.data import ImageData
from cartl_hub.evaluation import evaluate
from cartl_hub.evaluation.checks import run_checks
from cartl_hub.images import ImagePolicy

EPS = 16 / 255
CIFAR100 = Path(__file__).parent.parent.parent / "shared" / "data" / "cifar100" / "test.parquet"


def small_network(channels: int, num_classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 16, num_classes),
    )


def trained(data: ImageData, *, steps: int = 60, temperature: float = 1.0, eps: float = 0.0) -> nn.Module:
    """A small network trained with Adam, with FGSM images where there is a radius."""
    model = small_network(data.images.shape[1], len(data.label_names))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(data), (64,), generator=generator)
        images, labels = data.images[rows] / 255, data.labels[rows]
        if eps:
            images = FGSM(eps=eps)(model, images, labels)
        optimizer.zero_grad()
        F.cross_entropy(model(images) / temperature, labels).backward()
        optimizer.step()
    return model.eval()


@cache
def toy() -> tuple[nn.Module, ImageData]:
    return trained(toy_data(384, num_classes=4, size=16)), toy_data(96, num_classes=4, size=16, seed=2)


class Wrapped(nn.Module):
    """A model and what is done to its input or output."""

    def __init__(self, model: nn.Module, before=lambda images: images, after=lambda logits: logits):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


def fewer_bits(images: Tensor) -> Tensor:
    return (images * 7).round() / 7


def jpeg_like(images: Tensor) -> Tensor:
    """Rounded cosine coefficients of blocks of 8 by 8 pixels."""
    k = torch.arange(8)
    basis = torch.cos(math.pi * (2 * k[None] + 1) * k[:, None] / 16) * torch.where(k == 0, 0.5**0.5, 1.0)[:, None] / 2
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    quantised = (basis @ blocks @ basis.T / 0.08).round() * 0.08
    return (basis.T @ quantised @ basis).transpose(3, 4).reshape(images.shape)


def shattered(images: Tensor) -> Tensor:
    """A ripple too small to be seen, and far too steep to be followed."""
    return images + 0.002 * torch.sin(3e4 * images)


def one_hot(logits: Tensor) -> Tensor:
    return F.one_hot(logits.argmax(1), logits.shape[1]).float()


MASKED = {
    "only what is positive of the gradient": {"before": lambda images: OtherGradient.apply(images, lambda g: g.clamp(min=0))},
    "gradient of other pixels": {"before": lambda images: OtherGradient.apply(images, lambda g: g.flip(2))},
    "noise at inference": {"before": lambda images: images + 0.03 * torch.randn_like(images)},
    "quantised input": {"before": fewer_bits},
    "JPEG-like preprocessing": {"before": jpeg_like},
    "shattered gradient": {"before": shattered},
    "logits times 1e4": {"after": lambda logits: 1e4 * logits},
    "logits times 1e-4": {"after": lambda logits: 1e-4 * logits},
    "probabilities instead of logits": {"after": lambda logits: logits.softmax(1)},
    "classes instead of logits": {"after": one_hot},
}


class OtherGradient(torch.autograd.Function):
    """The identity, with another gradient than its own."""

    @staticmethod
    def forward(ctx, images, change):
        ctx.change = change
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient), None


def flagged(model: nn.Module, data: ImageData, **settings) -> dict[str, str]:
    found = run_checks(model.eval(), data, progress=False, **settings)
    return {check.name: check.status for check in found if check.status in ("warn", "fail")}


@pytest.mark.parametrize("name", MASKED)
def test_masked_model_is_flagged(name):
    model, data = toy()
    assert flagged(Wrapped(model, **MASKED[name]), data, eps=EPS, num_images=32)


@pytest.mark.parametrize(
    ("masked", "found"),
    [
        ({"before": lambda images: images.clamp(0.2, 0.8)}, {"dead-pixels": "warn"}),
        ({"after": lambda logits: 10 * torch.tanh(logits)}, {"small-gradient": "fail"}),
    ],
)
def test_what_is_cut_off_inside_is_flagged(masked, found):
    model, data = toy()
    names = ["small-gradient", "dead-pixels"]
    assert flagged(Wrapped(model, **masked), data, eps=EPS, num_images=32, names=names) == found
    assert flagged(model, data, eps=EPS, num_images=32, names=names) == {}


class Window(nn.Module):
    """The largest pixel of each window of 2 by 2, of every second window: most pixels have no gradient, and need none."""

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(F.max_pool2d(images, 2)[:, :, ::2], size=images.shape[2:], mode="nearest")


def test_a_maximum_over_pixels_is_honest():
    _, data = toy()
    model = Wrapped(toy()[0], before=Window()).eval()
    with torch.no_grad():
        named = ImageData(model(data.images / 255).argmax(1), data.label_names, data.images)
    assert flagged(model, named, eps=EPS, num_images=64, names=["small-gradient", "dead-pixels"]) == {}


def test_saturated_logits_are_flagged():
    """Trained at a high temperature and used without one (defensive distillation)."""
    _, data = toy()
    model = trained(toy_data(384, num_classes=4, size=16), steps=150, temperature=100.0)
    found = flagged(model, data, eps=EPS, num_images=32)
    assert found.items() >= {"zero-gradient": "fail", "logit-scale": "fail", "ce-against-dlr": "warn"}.items()


def in_train_mode(model: nn.Module) -> nn.Module:
    model[1].train()
    return model


def batch_statistics(model: nn.Module) -> nn.Module:
    model[1].track_running_stats = False
    model[1].running_mean = model[1].running_var = None
    return model


def without_gradient(model: nn.Module) -> nn.Module:
    return Wrapped(model, after=one_hot).eval()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (in_train_mode, "expected a model in eval mode"),
        (batch_statistics, "expected logits that depend on one image each"),
        (without_gradient, "expected logits with a gradient in the pixels"),
    ],
)
def test_model_is_refused(spoil, message):
    data = toy()[1]
    model = spoil(trained(toy_data(64, num_classes=4, size=16), steps=2))
    with pytest.raises(ValueError, match=message):
        evaluate(model, data, progress=False)


# Honest models


@pytest.mark.parametrize("eps", [16 / 255, 32 / 255])
def test_toy_model_passes(eps):
    model, data = toy()
    assert flagged(model, data, eps=eps, num_images=64) == {}


@pytest.mark.parametrize("eps", [0.0, 0.15], ids=["natural", "robust"])
def test_digits_model_passes(eps):
    from sklearn.datasets import load_digits

    content = load_digits()
    pixels = torch.from_numpy(np.round(content.images * 255 / 16).astype(np.uint8))[:, None]
    names, labels = tuple("0123456789"), torch.from_numpy(content.target)
    parts = [ImageData(labels[rows], names, pixels[rows]) for rows in (slice(1400), slice(1400, None))]
    model = trained(parts[0], steps=250, eps=eps)
    found = run_checks(model, parts[1], eps=0.1, num_images=64, progress=False)
    assert not [check for check in found if check.status in ("warn", "fail")]
    accuracies = {check.name: check.figures for check in found}["attack-order"]
    assert accuracies["accuracy, noise"] > 0.75


@pytest.mark.skipif(not CIFAR100.exists(), reason=f"the test images of CIFAR-100 are not in {CIFAR100}")
@pytest.mark.parametrize("source", ["wrn16_2.fdm4_cifar100", "wrn16_2.natural_cifar100"])
def test_sources_pass(source):
    import datasets

    first = datasets.load_dataset("parquet", data_files=str(CIFAR100), split="train", streaming=True).take(24)
    model, rows = load_model(source), list(first)
    images = torch.stack([ImagePolicy()(row["image"]) for row in rows])
    data = ImageData(torch.tensor([row["label"] for row in rows]), model.label_names, images)
    assert flagged(model, data, num_images=24) == {}
