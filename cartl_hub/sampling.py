"""Choice of images from a data set: parts and samples in which each class has its share."""

import hashlib

import torch
from torch import Tensor

from .randomness import image_keys, uniform

_HELD_OUT, _SAMPLED = 100, 102  # streams of random numbers that divide a split, and that order it for a sample


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (kept, held out), each class in proportion.

    Args:
        labels: Class of each image, [N].
        share: Share to hold out, in (0, 1); at least one image of each class that has two.
        seed: Seed of the choice.
    """
    draws = uniform(image_keys(seed, 0, torch.arange(len(labels))), stream=_HELD_OUT)
    held = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held.append(members[draws[members].argsort()[:count]])
    chosen = torch.cat(held).sort().values
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[chosen] = False
    return torch.nonzero(mask).flatten(), chosen


def stratified_sample(labels: Tensor, num_images: int, seed: int) -> Tensor:
    """Indices of some images, each class in proportion and with at least one image; a smaller sample is part of a larger one.

    Each class is in a random order, and an image's place in it, divided by the size of the class, decides when it is taken.
    (That is Adams's apportionment: classes of one size differ by at most one image.)

    Args:
        labels: Class of each image, [N].
        num_images: Number of images; with fewer images than classes, some classes have none.
        seed: Seed of the choice.
    """
    draws = uniform(image_keys(seed, 0, torch.arange(len(labels))), stream=_SAMPLED).double()
    places = torch.empty_like(draws)
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        places[members[draws[members].argsort(stable=True)]] = torch.arange(len(members)).double() / len(members)
    by_draw = draws.argsort(stable=True)  # which of two classes comes first at the same place
    return by_draw[places[by_draw].argsort(stable=True)][:num_images].sort().values


def evenly_spaced(num: int, total: int) -> Tensor:
    """Positions of at most ``num`` of ``total`` images, in ascending order."""
    num = min(num, total)
    return torch.arange(num) * total // max(num, 1)


def index_hash(indices: Tensor) -> str:
    """Short hash of which images a split holds."""
    return hashlib.sha256(indices.sort().values.numpy().astype("<i8").tobytes()).hexdigest()[:16]
