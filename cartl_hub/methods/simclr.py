"""SimCLR, contrastive learning of two views."""

from dataclasses import dataclass, field

import torch
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn

from ..processes import rank_and_world
from ..ranges import check_number, check_whole
from .pretext import Pretext, num_features, view_keys
from .views import Views


@dataclass(frozen=True, kw_only=True)
class SimCLR(Pretext):
    """Find the view in the batch that shows the same image (Chen et al., 2020, https://arxiv.org/abs/2002.05709).

    The loss is NT-Xent over the 2N views of the batch, those of other processes included. An ``attack`` perturbs all views
    together (as Jiang et al., 2020, https://arxiv.org/abs/2010.13337).

    Args:
        temperature: Temperature of the cosines, > 0.
        dim: Width of the projection's output; its hidden layer is as wide as the features.
        views: Distribution of the views.

    Raises:
        ValueError: On values out of range.
    """

    temperature: float = 0.5
    dim: int = 128
    views: Views = field(default_factory=Views)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("temperature", self.temperature, (">", 0))
        check_whole("dim", self.dim, (">=", 1))
        if not isinstance(self.views, Views):
            raise ValueError(f"views must be Views, such as Views(flip=False), got {self.views!r}.")

    def head(self, model):
        width = num_features(model)
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.dim))

    def pose(self, images, keys):
        if len(images) * rank_and_world()[1] < 2:
            raise ValueError("expected two images or more in a batch, as SimCLR tells them apart, got 1; raise batch_size.")
        views = torch.cat([self.views(images, view_keys(keys, number)) for number in (0, 1)])
        other = torch.arange(len(views), device=views.device).roll(len(images))
        return views, rank_and_world()[0] * len(views) + other

    def logits(self, outputs):
        return similarities(outputs, self.temperature)


def similarities(outputs: Tensor, temperature: float) -> Tensor:
    """Cosines with the outputs of all processes, in their order, divided by the temperature; minus infinity with itself.

    Gradients flow through the outputs of other processes too. Each process must hold the same number.

    Shape:
        [M, D] -> [M, processes * M].
    """
    rank, world = rank_and_world()
    with torch.autocast(outputs.device.type, enabled=False):
        own = F.normalize(outputs.float(), dim=1)
        every = torch.cat(list(differentiable.all_gather(own))) if world > 1 else own
        itself = torch.eye(len(own), dtype=torch.bool, device=own.device)
        itself = F.pad(itself, (rank * len(own), (world - 1 - rank) * len(own)))
        return (own @ every.T / temperature).masked_fill(itself, -torch.inf)
