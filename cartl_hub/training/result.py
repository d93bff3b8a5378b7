"""What a training run did."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Validation:
    """Accuracies on validation images, in [0, 1]."""

    step: int
    clean_acc: float
    robust_acc: float
    fgsm_acc: float | None = None


@dataclass
class Result:
    """What a training run did.

    Args:
        steps: Steps done.
        num_steps: Steps planned.
        precision: Of the forward passes, "fp32" or "bf16".
        seconds: Spent in the loop, over all resumed parts.
        images_per_second: Training images per second, over all resumed parts.
        validations: In the order of the steps.
        best: The validation with the highest robust accuracy, on whose weights ``load_best`` settles.
        stopped: Why it ended early, or None.
        weights: Which weights the model has now: "last" or "best".
        device: Where it ran.
        timing: Seconds per step of fp32 and bf16, where "auto" measured them.
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
    timing: dict[str, float] = field(default_factory=dict)
