"""Natural training, of the whole network or of its last blocks."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..models import Classifier
from ..ranges import check_whole
from .method import Batch, Method


@dataclass(frozen=True, kw_only=True)
class FineTuning(Method):
    """Cross-entropy on natural images: vanilla transfer ("TL" in CARTL), linear probing, or natural source training.

    Args:
        num_blocks: Number of blocks to train, counted from the classifier: 1 is linear probing (with the norm or hidden layer
            that some architectures count as part of the classifier), None the whole network.
    """

    num_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.num_blocks is not None:
            check_whole("num_blocks", self.num_blocks, (">=", 1))

    @property
    def trained_blocks(self) -> int | None:
        return self.num_blocks

    @property
    def natural(self) -> bool:
        return type(self).losses is FineTuning.losses  # a subclass may do more with the images

    def losses(self, model: Classifier, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        return {"loss": F.cross_entropy(logits, batch.labels), "logits": logits}
