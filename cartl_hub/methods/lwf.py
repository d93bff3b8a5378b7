"""Learning without forgetting (LwF), on features."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import recorded_input
from ..models import Classifier
from ..ranges import check_number
from .method import Batch, Images, Method


@dataclass(frozen=True, kw_only=True)
class LwF(Method):
    """Fine-tuning of all layers that keeps the penultimate features near the source's (Shafahi et al., ICLR 2020,
    https://arxiv.org/abs/1905.08232), ``CE + weight * ||z(x) - z_source(x)||``, mean over the batch.

    Without augmentation the source's features are computed once, before the first step; with it, at each step. CARTL's baseline
    is trained without, at a learning rate of 0.001: ``TrainingArguments(lr=0.001, augmentation=None)``.

    Args:
        weight: Weight of the distance, >= 0; the authors' code uses 0.005 with the 1-norm.
        norm: Norm of the distance: 1 as in the authors' code and CARTL's baseline, 2 as in the paper.
        warm_start: Share of the run, in [0, 1], in which the classifier alone is trained, on the source's features.

    Raises:
        ValueError: On values out of range.
    """

    weight: float = 0.005
    norm: Literal[1, 2] = 1
    warm_start: float = 0.5

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, got {self.norm!r}.")
        check_number("weight", self.weight, (">=", 0))
        check_number("warm_start", self.warm_start, (">=", 0), ("<=", 1))

    @contextmanager
    def setup(self, model: Classifier, images: Images | None = None) -> Iterator[Mapping[str, nn.Module]]:
        source = SourceFeatures(model, images)
        with super().setup(model, images):
            yield {"source": source}

    def losses(self, model: Classifier, batch: Batch, source: "SourceFeatures") -> dict[str, Tensor]:
        target = source(batch.images, batch.indices)
        if batch.progress < self.warm_start:
            logits = model.head(target).flatten(1)
            cross_entropy = F.cross_entropy(logits, batch.labels)
            return {"loss": cross_entropy, "cross_entropy": cross_entropy, "logits": logits}
        with recorded_input(model, [model.head]) as features:
            logits = model(batch.images)
        distance = (features[0].flatten(1).float() - target.flatten(1).float()).norm(p=self.norm, dim=1).mean()
        cross_entropy = F.cross_entropy(logits, batch.labels)
        return {
            "loss": cross_entropy + self.weight * distance,
            "cross_entropy": cross_entropy,
            "feature_distance": distance,
            "logits": logits,
        }


class SourceFeatures(nn.Module):
    """Penultimate features of a frozen copy of the source, from a table if the images are known beforehand."""

    def __init__(self, model, images: Images | None):
        super().__init__()
        self._source = [copy.deepcopy(model).eval().requires_grad_(False)]  # in a list: not part of what is trained or saved
        self.register_buffer("table", None, persistent=False)
        if images is not None:
            rows = [self._compute(images.get(part)) for part in torch.arange(images.num_images).split(256)]
            self.table = torch.cat(rows)
            self._source.clear()

    @torch.no_grad()
    def _compute(self, images: Tensor) -> Tensor:
        with recorded_input(self._source[0], [self._source[0].head]) as features:
            self._source[0](images)
        return features[0]

    def forward(self, images: Tensor, indices: Tensor) -> Tensor:
        return self._compute(images) if self.table is None else self.table[indices]
