"""Reads the pictures of a split into uint8 tensors."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..data import DataError, ImageData, as_stored
from ..images import ImagePolicy, to_pil
from ..processes import bar_interval
from .arguments import Notes
from .columns import undecoded

IN_MEMORY_BYTES = 4 << 30  # larger splits are decoded when they are drawn
_LARGE = 3  # times the side of the input, from which on a picture loses most of its detail


def read_pictures(
    split: Dataset,
    column: str,
    labels: Tensor,
    names: tuple[str, ...],
    policy: ImagePolicy,
    role: str,
    description: dict[str, Any],
    confinement: Callable[[Any], Any] = as_stored,
) -> ImageData:
    """The images of a split: in memory or, if there are many, decoded when they are drawn.

    Args:
        labels: Classes of the images, [N].
        names: Names of the classes.
        role: Role of the split, for messages.
        description: Description of the split.
        confinement: Confinement of the pictures that rows name by a path.

    Raises:
        DataError: If a picture can't be decoded; the message names its row.
    """
    decode = Decoder.of(split, column, policy, role, confinement)
    shape = (len(labels), policy.num_channels, *policy.size)
    if math.prod(shape) > IN_MEMORY_BYTES:
        return ImageData(labels, names, decode, policy, description, workers=min(8, os.cpu_count() or 1))
    images = torch.empty(shape, dtype=torch.uint8)
    with tqdm(
        total=len(labels), desc=f"reading {role} images", disable=len(labels) < 20_000, leave=False, mininterval=bar_interval()
    ) as bar:
        for rows in torch.arange(len(labels)).split(64):
            images[rows[0] : rows[-1] + 1] = decode(range(int(rows[0]), int(rows[-1]) + 1))
            bar.update(len(rows))
    return ImageData(labels, names, images, policy, description)


@dataclass
class Decoder:
    """Pictures of a split, by row, as uint8 tensors."""

    source: Dataset
    column: str
    policy: ImagePolicy
    role: str
    confinement: Callable[[Any], Any]

    @classmethod
    def of(cls, split: Dataset, column: str, policy: ImagePolicy, role: str, confinement: Callable[[Any], Any]) -> "Decoder":
        source, feature = undecoded(split, column), split.features[column]
        if isinstance(feature, (Array2D, Array3D)):
            source = source.with_format("numpy", dtype=feature.dtype)
        return cls(source, column, policy, role, confinement)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """Decode rows, [B] -> [B, C, H, W].

        Raises:
            DataError: If a picture can't be decoded; the message names its row.
        """
        batch = self.source[rows.start : rows.stop] if isinstance(rows, range) else self.source[rows]
        images = []
        for row, picture in zip(rows, batch[self.column], strict=True):
            try:
                images.append(self.policy(self.confinement(picture)))
            except ValueError as error:
                raise DataError(f"row {row} of the {self.role} split: {error} Remove or repair it.") from error
        return torch.stack(images)


def note_large_pictures(split: Any, column: str, policy: ImagePolicy, notes: Notes, confinement: Callable[[Any], Any]) -> None:
    """Note when most pixels are thrown away."""
    source = split.select(range(0, len(split), max(1, len(split) // 32))) if isinstance(split, Dataset) else split
    sides = []
    for row in islice(undecoded(source, column), 8 if source is split else None):
        try:
            sides.append(min(to_pil(confinement(row[column])).size))
        except ValueError:  # reading reports it, with its row
            continue
    height, side = policy.size[0], int(np.median(sides or [0]))
    if side > _LARGE * height:
        larger = "resnet50 (224 pixels)" if height < 224 else "convnext_base.fb_in22k_ft_in1k_384 (384 pixels)"
        notes.add(
            f"pictures are about {side} pixels wide and the source takes {height}: most detail is lost, and an attack acts "
            "after resizing" + (f". A source for larger inputs keeps more, e.g. timm's {larger}" if height < 384 else "")
        )
