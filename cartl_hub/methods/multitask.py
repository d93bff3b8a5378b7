"""Several pretext tasks at once."""

from contextlib import contextmanager
from dataclasses import dataclass

from ..attacks import Attack
from ..ranges import check_number
from .method import Method
from .pretext import Pretext, all_but_classifier


@dataclass(frozen=True, kw_only=True)
class MultiTask(Method):
    """Weighted sum of pretext tasks on one network, each with a head of its own (Jaiswal and Fan, 2021).

    Each task draws its own views of the batch and has a forward pass of its own.

    Args:
        tasks: Such as (SimCLR(), Rotation(), Jigsaw()).
        weights: Of their losses, > 0; none means 1 each.

    Raises:
        ValueError: If there is no task, or another number of weights.
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
    def uses_labels(self):
        return False

    @property
    def attack(self) -> Attack | None:
        """The first one that a task has."""
        return next((task.attack for task in self.tasks if task.attack is not None), None)

    @contextmanager
    def setup(self, model, images=None):
        with all_but_classifier(model):
            yield {f"head_{number}": task.head(model) for number, task in enumerate(self.tasks)}

    def losses(self, model, batch, **heads):
        losses = {}
        for number, task in enumerate(self.tasks):
            found = task.losses(model, batch, head=heads[f"head_{number}"])
            losses[f"{type(task).__name__.lower()}_{number}"] = found["loss"]
        weights = self.weights or (1.0,) * len(self.tasks)
        return losses | {"loss": sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True))}
