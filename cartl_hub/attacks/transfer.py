"""Perturbations found on another model."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..modules import eval_mode
from ..ranges import check_whole
from .apgd import climb
from .attack import Attack, Norm


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Perturbations that ``attack`` finds on another model, e.g. on a model with the same labels, or with
    :class:`FeatureDistance` on the source that a model was fine-tuned from.

    The attack runs to its end on the source, as what just breaks one model rarely breaks another. If a white-box attack
    breaks fewer images, the gradients of the attacked model are masked.

    Args:
        source: Model that the perturbations are made on, on the device of the images.
        source_name: Name of the source in the report, e.g. its id; the model itself is not part of a report.
        attack: Attack to run on the source; its ball is the threat model.

    Raises:
        ValueError: In use, if the source has another number of classes than the attacked model.
    """

    eps: float = field(init=False)
    norm: Norm = field(init=False)
    source: nn.Module = field(repr=False)
    source_name: str
    attack: Attack

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", self.attack.eps)
        object.__setattr__(self, "norm", self.attack.norm)
        super().__post_init__()

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        if not isinstance(self.attack, FeatureDistance):
            self._check_classes(model, images[:1])
        return self.attack(self.source, images, labels, keys)

    def _check_classes(self, model: nn.Module, images: Tensor) -> None:
        with torch.no_grad(), eval_mode(self.source):
            expected, got = model(images).shape[1], self.source(images).shape[1]
        if got != expected:
            raise ValueError(
                f"expected a source with the {expected} classes of the attacked model, got {self.source_name} with {got}; use "
                "attack=FeatureDistance(...), which needs no classes."
            )


@dataclass(frozen=True, kw_only=True)
class FeatureDistance(Attack):
    """Auto-PGD on the squared distance between the features of an image and of its perturbation; labels play no part.

    For :class:`Transfer` from a source with other labels. The model needs a method ``features``, images in [0, 1] to
    features, as :class:`cartl_hub.Classifier` has it.

    Args:
        steps: Number of gradient steps.

    Raises:
        ValueError: If ``steps`` is below 1, or in use, if the model has no ``features``, beside what :class:`Attack` raises.
    """

    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("steps", self.steps, (">=", 1))

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        features = getattr(model, "features", None)
        if features is None:
            raise ValueError(
                f"expected a model with a method features(images), got {type(model).__name__}; wrap it in cartl_hub.Classifier "
                "or give it one."
            )
        with torch.no_grad():
            clean = features(images).float().flatten(1)

        def distance(moved: Tensor, rows: Tensor) -> Tensor:
            return (moved.flatten(1) - clean[rows]).square().sum(1)

        return climb(features, images, labels, keys, [distance], self.eps, self.norm, self.steps, until_broken=False)
