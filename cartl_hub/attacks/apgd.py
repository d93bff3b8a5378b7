"""Auto-PGD, untargeted and targeted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ranges import check_whole
from .attack import Attack, Norm, ascend, confine, input_gradient, likely_targets, random_start, restart_keys
from .losses import LOSSES, LossName, check_loss, targeted_dlr

MOMENTUM = 0.75
RISING = 0.75  # share of steps between checkpoints on which the loss must rise, or the step size is halved


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD (Croce and Hein, 2020, https://arxiv.org/abs/2003.01690): ascent with momentum whose step size begins at 2 eps
    and is halved at checkpoints where the loss has stopped rising.

    The authors' code differs from the paper, which is followed here: it rounds checkpoints otherwise (the same for 100 steps)
    and halves also where the loss rose on exactly the required share of steps. Starts are uniform in the ball, as in
    :class:`PGD`, while their code takes its surface.

    Args:
        steps: Number of gradient steps.
        loss: Loss to maximise: cross-entropy, the margin between logits, or their difference ratio (DLR).
        restarts: Number of runs from other starts, each on the images that are not broken yet.

    Raises:
        ValueError: On values out of range, beside what :class:`Attack` raises.
    """

    steps: int = 100
    loss: LossName = "ce"
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "restarts"):
            check_whole(name, getattr(self, name), (">=", 1))
        check_loss(self.loss)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._climb(model, images, labels, keys, until_broken=False)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._climb(model, images, labels, keys, until_broken=True)

    def _climb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, *, until_broken: bool) -> Tensor:
        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            return LOSSES[self.loss](logits, labels[rows])

        losses = [loss] * self.restarts
        return climb(model, images, labels, keys, losses, self.eps, self.norm, self.steps, until_broken=until_broken)


@dataclass(frozen=True, kw_only=True)
class APGDT(Attack):
    """Auto-PGD on the targeted DLR loss, "APGD-T" (Croce and Hein, 2020, https://arxiv.org/abs/2003.01690).

    Targets are the wrong classes of largest logit on the clean image, in this order, each next one only for the images that
    are not broken yet. It departs from the authors' code as :class:`APGD` does, and works for fewer than four classes.

    Args:
        steps: Number of gradient steps for each target.
        num_targets: Number of wrong classes to try; all of them if there are fewer.
        restarts: Number of runs from other starts for each target.

    Raises:
        ValueError: On values out of range, beside what :class:`Attack` raises.
    """

    steps: int = 100
    num_targets: int = 9
    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "num_targets", "restarts"):
            check_whole(name, getattr(self, name), (">=", 1))

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._climb(model, images, labels, keys, until_broken=False)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._climb(model, images, labels, keys, until_broken=True)

    def _climb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor, *, until_broken: bool) -> Tensor:
        targets = likely_targets(model, images, labels, self.num_targets)

        def towards(place: int) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda logits, rows: targeted_dlr(logits, labels[rows], targets[rows, place])

        losses = [towards(place) for place in range(targets.shape[1]) for _ in range(self.restarts)]
        return climb(model, images, labels, keys, losses, self.eps, self.norm, self.steps, until_broken=until_broken)


def climb(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    keys: Tensor,
    losses: Sequence[Callable[[Tensor, Tensor], Tensor]],
    eps: float,
    norm: Norm,
    steps: int,
    *,
    until_broken: bool,
) -> Tensor:
    """The point of highest loss for each image, over one run of Auto-PGD for each loss.

    Args:
        losses: Functions of logits [B', K] and the positions [B'] of their images in the batch, to losses [B'].
        until_broken: Whether an image stops at the first point where it is misclassified.

    Shape:
        [B, C, H, W] -> [B, C, H, W].
    """
    best = images.clone()
    highest = torch.full((len(images),), -torch.inf, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    intervals = {0: 0} | {end: end - start for start, end in pairwise(checkpoints(steps))}
    for run, loss in enumerate(losses):
        start = random_start(images[rows], restart_keys(keys[rows], run), eps, norm)
        climbers = _Climbers.at(rows, images[rows], start, 2 * eps)
        for step in range(steps + 1):
            if step:
                climbers.step(eps, norm, MOMENTUM if step > 1 else 1.0)
            climbers.gradient, heights, logits = input_gradient(model, climbers.iterate, climbers.rows, loss)
            climbers.arrive(heights)
            if until_broken:
                broken = logits.argmax(1) != labels[climbers.rows]
                best[climbers.rows[broken]] = climbers.iterate[broken]
                if broken.all():
                    return best
                climbers = climbers.select(~broken) if broken.any() else climbers
            if step in intervals:
                climbers.check(intervals[step])
        rows = climbers.rows
        higher = climbers.best_height > highest[rows]
        best[rows[higher]] = climbers.best[higher]
        highest[rows[higher]] = climbers.best_height[higher]
    return best


def checkpoints(steps: int) -> list[int]:
    """Steps w_0 = 0, w_1, ... after which the step size may be halved.

    They are ``ceil(p_j * steps)`` for ``p_0 = 0``, ``p_1 = 0.22``, ``p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)`` up to 1.
    """
    shares = [0, 22]  # in hundredths, as sums of decimal fractions round to the next step
    while shares[-1] <= 100:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 3, 6))
    return sorted({-(-share * steps // 100) for share in shares[:-1]})


@dataclass(eq=False)
class _Climbers:
    """Images on their way up, each with a state of its own.

    Args:
        rows: Positions of the images in the batch.
        height: Loss at the iterate.
        best_height: Highest loss so far, at ``best``.
        checked_height: Highest loss at the last checkpoint.
        rises: Number of steps since the last checkpoint on which the loss rose.
        halved: Whether the step size was halved at the last checkpoint.
    """

    rows: Tensor
    images: Tensor
    iterate: Tensor
    previous: Tensor
    gradient: Tensor
    height: Tensor
    best: Tensor
    best_gradient: Tensor
    best_height: Tensor
    checked_height: Tensor
    rises: Tensor
    halved: Tensor
    step_size: Tensor

    @classmethod
    def at(cls, rows: Tensor, images: Tensor, start: Tensor, step_size: float) -> "_Climbers":
        none, low = torch.zeros_like(rows), torch.full(rows.shape, -torch.inf, device=rows.device)
        steps = torch.full((len(rows), 1, 1, 1), step_size, device=rows.device)
        return cls(rows, images, start, start, start, -low, start, start, low, low, none, none.bool(), steps)

    def select(self, chosen: Tensor) -> "_Climbers":
        return type(self)(**{name: values[chosen] for name, values in vars(self).items()})

    def step(self, eps: float, norm: Norm, momentum: float) -> None:
        target = ascend(self.images, self.iterate, self.gradient, self.step_size, eps, norm)
        moved = self.iterate + momentum * (target - self.iterate) + (1 - momentum) * (self.iterate - self.previous)
        self.previous, self.iterate = self.iterate, confine(self.images, moved, eps, norm)

    def arrive(self, heights: Tensor) -> None:
        self.rises = self.rises + (heights > self.height)
        self.height = heights
        higher = heights > self.best_height
        self.best_height = torch.where(higher, heights, self.best_height)
        self.best = torch.where(_each(higher), self.iterate, self.best)
        self.best_gradient = torch.where(_each(higher), self.gradient, self.best_gradient)

    def check(self, interval: int) -> None:
        """Halve the step size and continue from the best point, where the loss rose too seldom or the best stayed the same."""
        stayed = ~self.halved & (self.best_height <= self.checked_height)
        self.halved = stayed | (self.rises < RISING * interval)
        self.step_size = torch.where(_each(self.halved), self.step_size / 2, self.step_size)
        self.iterate = torch.where(_each(self.halved), self.best, self.iterate)
        self.gradient = torch.where(_each(self.halved), self.best_gradient, self.gradient)
        self.height = torch.where(self.halved, self.best_height, self.height)
        self.checked_height, self.rises = self.best_height, torch.zeros_like(self.rises)


def _each(flags: Tensor) -> Tensor:
    return flags.view(-1, 1, 1, 1)
