"""Feature distance minimisation (FDM), for source training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import PGD, Attack
from ..blocks import last_blocks, recorded_input
from ..models import Classifier
from ..ranges import check_number, check_whole
from .method import Batch, Images, Method, check_attack


def feature_distance(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Mean over the batch of the 2-norm between features, divided by the root of their number.

    Shape:
        [B, ...], [B, ...] -> [].
    """
    difference = (clean - adversarial).float().flatten(1)
    return difference.norm(dim=1).mean() / difference.shape[1] ** 0.5


@dataclass(frozen=True, kw_only=True)
class FDM(Method):
    """Adversarial training plus the distance of clean and adversarial features (Chen et al., CARTL, ICML 2021).

    The distance is between the inputs of the last ``num_blocks`` blocks. Both terms are differentiated; the clean and the
    adversarial pass run in train mode.

    Args:
        num_blocks: Number of blocks after the feature extractor, counted from the classifier; all blocks are trained.
        weight: Weight of the distance, >= 0, a mean over the batch. The authors sum it over batches of 128: their lambda of
            0.005 is 0.64 here, their 0.01 is 1.28.
        attack: Attack of the inner maximisation.

    Raises:
        ValueError: On values out of range.
    """

    num_blocks: int
    weight: float = 0.64
    attack: Attack = field(default=PGD(eps=8 / 255, step_size=2 / 255, steps=7))

    def __post_init__(self) -> None:
        check_whole("num_blocks", self.num_blocks, (">=", 1))
        check_number("weight", self.weight, (">=", 0))
        check_attack(self.attack)

    @contextmanager
    def setup(self, model: Classifier, images: Images | None = None) -> Iterator[Mapping[str, nn.Module]]:
        split = _Split(model, self.num_blocks)  # one that doesn't exist is an error before the first step
        with super().setup(model, images):
            yield {"split": split}

    def losses(self, model: Classifier, batch: Batch, split: "_Split") -> dict[str, Tensor]:
        adversarial = self.attack(model, batch.images, batch.labels, batch.keys)
        with recorded_input(model, split.first) as features:
            logits = model(adversarial)
            model(batch.images)
        distance = feature_distance(features[1], features[0])
        cross_entropy = F.cross_entropy(logits, batch.labels)
        return {
            "loss": cross_entropy + self.weight * distance,
            "cross_entropy": cross_entropy,
            "feature_distance": distance,
            "logits": logits,
        }


class _Split(nn.Module):
    """Marker of where the last blocks begin; it has no weights."""

    def __init__(self, model: Classifier, num_blocks: int):
        super().__init__()
        self.first = tuple(last_blocks(model, num_blocks)[0].modules.values())  # in a tuple: they stay the model's
