"""Result of a training run."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Validation:
    """Accuracies on validation images, in [0, 1]: robust accuracy if there is a validation attack, and that under FGSM in the
    ball of a training attack of a single step, which shows catastrophic overfitting."""

    step: int
    clean_acc: float
    robust_acc: float | None = None
    fgsm_acc: float | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Sort key, larger is better: robust accuracy decides if it is known, then clean accuracy."""
        return (0.0 if self.robust_acc is None else self.robust_acc), self.clean_acc


@dataclass
class Result:
    """Result of a training run.

    Args:
        steps: Number of steps done.
        num_steps: Number of steps planned.
        precision: Precision of the forward passes, "fp32" or "bf16".
        seconds: Seconds spent in the loop, over all resumed parts.
        images_per_second: Training images per second, over all resumed parts.
        validations: Validations in the order of the steps.
        best: Validation with the highest robust accuracy, or clean accuracy without a validation attack; ``load_best`` returns
            its weights. After a run that was killed and could not be repeated to the bit, it may be one that is not among them.
        stopped: Reason why the run ended early, or None.
        weights: Weights that the model has now: "last" or "best".
        device: Device that the run used.
    """

    steps: int = 0
    num_steps: int = 0
    precision: str = "fp32"
    seconds: float = 0.0
    images_per_second: float = 0.0
    validations: list[Validation] = field(default_factory=list)
    best: Validation | None = None
    stopped: str | None = None
    weights: str = "last"
    device: str = "cpu"
