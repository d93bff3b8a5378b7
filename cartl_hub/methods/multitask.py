"""Several pretext tasks at once."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..attacks import Attack
from ..models import Classifier
from ..ranges import check_number
from .method import Batch, Images, Method
from .pretext import Pretext, all_but_classifier


@dataclass(frozen=True, kw_only=True)
class MultiTask(Method):
    """Weighted sum of pretext tasks on one network, each with a head of its own (Jaiswal and Fan, 2021).

    Each task draws its own views of the batch and has a forward pass of its own.

    Args:
        tasks: Pretext tasks, e.g. (SimCLR(), Rotation(), Jigsaw()).
        weights: Weights of their losses, > 0; none means 1 each.

    Raises:
        ValueError: If there is no task, or the number of weights differs.
    """

    tasks: tuple[Pretext, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, tuple) or not self.tasks or not all(isinstance(task, Pretext) for task in self.tasks):
            raise ValueError(f"tasks must be a tuple of pretext tasks, such as (SimCLR(), Rotation()), got {self.tasks!r}.")
        if self.weights and len(self.weights) != len(self.tasks):
            raise ValueError(f"weights must be {len(self.tasks)} numbers, one for each task, got {self.weights!r}.")
        for weight in self.weights:
            check_number("each of weights", weight, (">", 0))

    @property
    def uses_labels(self) -> bool:
        return False

    @property
    def attack(self) -> Attack | None:
        """The first attack that a task has."""
        return next((task.attack for task in self.tasks if task.attack is not None), None)

    @contextmanager
    def setup(self, model: Classifier, images: Images | None = None) -> Iterator[Mapping[str, nn.Module]]:
        with all_but_classifier(model):
            yield {f"head_{number}": task.head(model) for number, task in enumerate(self.tasks)}

    def losses(self, model: Classifier, batch: Batch, **heads: nn.Module) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for number, task in enumerate(self.tasks):
            found = task.losses(model, batch, head=heads[f"head_{number}"])
            losses[f"{type(task).__name__.lower()}_{number}"] = found["loss"]
        total = batch.images.new_zeros(())
        for weight, loss in zip(self.weights or (1.0,) * len(self.tasks), losses.values(), strict=True):
            total = total + weight * loss
        return losses | {"loss": total}
