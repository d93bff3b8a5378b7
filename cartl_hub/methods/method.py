"""Base class of training methods."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attacks import Attack
from ..blocks import last_blocks, trained_only
from ..models import Classifier


@dataclass(frozen=True, eq=False)
class Batch:
    """Batch of one training step.

    Args:
        images: Augmented images in [0, 1], [B, C, H, W].
        labels: Classes, [B].
        indices: Positions of the images in the training data, [B].
        keys: Keys of the images' random numbers in this epoch, [B] (:func:`cartl_hub.randomness.image_keys`).
        progress: Share of the training done before this step, in [0, 1).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    keys: Tensor
    progress: float


@dataclass(frozen=True)
class Images:
    """The training images as a method may want to see them before the first step.

    Args:
        num_images: Number of images.
        get: Function from indices [B] to images in [0, 1], not augmented, on the model's device.
    """

    num_images: int
    get: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The hyper-parameters of a training method, how it holds the model, and what it minimises.

    A method leaves batch norm's statistics alone: they are the business of :class:`cartl_hub.BatchNormPolicy`.
    """

    @property
    def trained_blocks(self) -> int | None:
        """Number of blocks to train, counted from the classifier; None is the whole network."""
        return None

    @property
    def tag(self) -> str:
        """Tag for names of models: the method, and how many blocks it trains or splits off, e.g. "neft4"."""
        blocks = getattr(self, "num_blocks", None)
        return type(self).__name__.lower() + ("" if blocks is None else str(blocks))

    @property
    def uses_labels(self) -> bool:
        """Whether labels are learned. A method without labels leaves the classifier untrained and draws its own views."""
        return True

    @property
    def natural(self) -> bool:
        """Whether ``losses`` does nothing with the images but ``model(batch.images)``; then frozen blocks can be cached."""
        return False

    def adapt(self, model: Classifier) -> None:
        """Change the architecture if the method needs it; the change is permanent and saved with the model."""
        return None

    @contextmanager
    def setup(self, model: Classifier, images: Images | None = None) -> Iterator[Mapping[str, nn.Module]]:
        """Put ``model`` into the state in which it is trained; yield the other modules that the losses need.

        Args:
            model: The model to train.
            images: The training images, if they can be looked up and are not augmented.
        """
        parameters = [p for block in last_blocks(model, self.trained_blocks) for p in block.parameters.values()]
        with trained_only(model, parameters):
            yield {}

    @abstractmethod
    def losses(self, model: Classifier, batch: Batch, *args: Any, **modules: Any) -> dict[str, Tensor]:
        """Losses of one batch: ``"loss"`` is minimised, the other scalars are logged.

        ``"logits"`` [B, K], if given, is what the training accuracy is computed from. A method takes as keywords the
        modules that its ``setup`` yields, and no others.
        """


def check_attack(attack: Attack) -> None:
    if not isinstance(attack, Attack):
        raise ValueError(f"attack must be an attack, such as PGD(eps=8/255, step_size=2/255, steps=7), got {attack!r}.")
