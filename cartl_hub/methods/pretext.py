"""Pretext tasks: questions that a network can learn to answer without labels."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import Attack
from ..blocks import trained_only
from ..models import Classifier
from ..modules import eval_mode
from ..randomness import VIEW, fold_in
from .method import Batch, Images, Method, check_attack


@dataclass(frozen=True, kw_only=True)
class Pretext(Method):
    """A question about an image whose answer is known without labels, asked through a head on the pooled features.

    The whole network except its classifier is trained together with the head; the head is part of a checkpoint but not of a
    saved model.

    Args:
        attack: Attack that perturbs the network's input so that the loss of this task rises; None for none.
    """

    attack: Attack | None = None

    def __post_init__(self) -> None:
        if self.attack is not None:
            check_attack(self.attack)

    @property
    def uses_labels(self) -> bool:
        return False

    @abstractmethod
    def head(self, model: Classifier) -> nn.Module:
        """A new head, drawn from torch's global generator: features [M, D] to outputs [M, ...].

        Raises:
            ValueError: If the task can't be asked of this model.
        """

    @abstractmethod
    def pose(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the network, and the right answers: [B, C, H, W], [B] -> [M, C, H, W], [M]; M is a multiple of B."""

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits of the possible answers: [M, ...] -> [M, K]."""
        return outputs

    @contextmanager
    def setup(self, model: Classifier, images: Images | None = None) -> Iterator[Mapping[str, nn.Module]]:
        with all_but_classifier(model):
            yield {"head": self.head(model)}

    def losses(self, model: Classifier, batch: Batch, head: nn.Module) -> dict[str, Tensor]:
        inputs, answers = self.pose(batch.images, batch.keys)
        asked = _Asked(self, model, head)
        if self.attack is not None:
            keys = torch.cat([view_keys(batch.keys, number) for number in range(len(inputs) // len(batch.keys))])
            inputs = self.attack(asked, inputs, answers, keys)
        return {"loss": F.cross_entropy(asked(inputs), answers)}


class _Asked(nn.Module):
    """A model with the head of a task, in the form that attacks take: images to the logits of the answers."""

    def __init__(self, task: Pretext, model: Classifier, head: nn.Module):
        super().__init__()
        self.task, self.model, self.head = task, model, head

    def forward(self, images: Tensor) -> Tensor:
        return self.task.logits(self.head(self.model.features(images).flatten(1)))


@contextmanager
def all_but_classifier(model: Classifier) -> Iterator[None]:
    """Train the whole network except the classifier, which has no part in the features."""
    classifier = set(model.head.parameters())
    with trained_only(model, [parameter for parameter in model.parameters() if parameter not in classifier]):
        yield


def num_features(model: Classifier) -> int:
    """Width of the pooled features."""
    policy = model.image_policy
    with torch.no_grad(), eval_mode(model):
        return model.features(torch.zeros(1, policy.num_channels, *policy.size, device=model.mean.device)).flatten(1).shape[1]


def view_keys(keys: Tensor, number: int) -> Tensor:
    """Keys of an image's view: [B] -> [B]."""
    return fold_in(fold_in(keys, VIEW), number)
