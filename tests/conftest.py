"""Small real models and data, on the CPU, without a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

import cartl_hub.models
from cartl_hub.data import ImageData
from cartl_hub.images import ImagePolicy

FAMILIES = {
    "wrn10_1": {},
    "resnet18_cifar": {},
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": 32},
}


def make_model(name: str, num_classes: int = 3, **kwargs):
    torch.manual_seed(0)
    model = cartl_hub.models.create_model(name, num_classes=num_classes, **FAMILIES.get(name, {}), **kwargs)
    if model.image_policy.size != (32, 32):
        model.image_policy = ImagePolicy(size=(32, 32))
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=list(FAMILIES))
def model(request):
    """One tiny model of each family."""
    return make_model(request.param)


@pytest.fixture
def wrn():
    return make_model("wrn10_1")


@pytest.fixture
def data():
    """24 learnable 32x32 images of 3 classes."""
    return toy_data(24)


def toy_data(num_images: int, *, num_classes: int = 3, size: int = 32, seed: int = 1) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    prototypes = torch.rand(num_classes, 3, size, size, generator=torch.Generator().manual_seed(99))
    noise = torch.rand(num_images, 3, size, size, generator=generator)
    images = ((0.5 * prototypes[labels] + 0.5 * noise) * 255).to(torch.uint8)
    names = tuple("abcdefghij"[:num_classes])
    return ImageData(labels, names, images, ImagePolicy(size=(size, size)), {"id": "toy", "fingerprint": f"{num_images}-{seed}"})
