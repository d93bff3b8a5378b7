"""Fast adaptive boundary attack, targeted."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ranges import check_whole
from .attack import Attack, Norm, confine, input_gradient, likely_targets

OVERSHOOT = 1.05  # of each step beyond the hyperplane
PULL = 0.1  # largest weight of the image in the next iterate
RETREAT = 0.9  # share of the way from the image that is kept once the boundary is crossed


@dataclass(frozen=True, kw_only=True)
class FABT(Attack):
    """The nearest adversarial image, "FAB-T" (Croce and Hein, 2020, https://arxiv.org/abs/1907.02044), as AutoAttack runs it.

    The network is linearised at the iterate, which moves onto the hyperplane where true class and target are alike, pulled
    towards the image; once it is misclassified it goes a part of the way back, to come nearer from there. The radius plays no
    part in that: an image is broken where the nearest one lies in the ball. Steps have no size and don't depend on the scale of
    the logits. Targets are those of :class:`APGDT`; there is no random start.

    Args:
        steps: Number of gradient steps for each target.
        num_targets: Number of wrong classes to try; all of them if there are fewer.

    Raises:
        ValueError: On values out of range, beside what :class:`Attack` raises.
    """

    passes_per_step: ClassVar[int] = 2  # one for the gradient, one to see whether the new iterate is misclassified

    steps: int = 100
    num_targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "num_targets"):
            check_whole(name, getattr(self, name), (">=", 1))

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._approach(model, images, labels, until_broken=False)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self._approach(model, images, labels, until_broken=True)

    def _approach(self, model: nn.Module, images: Tensor, labels: Tensor, *, until_broken: bool) -> Tensor:
        targets = likely_targets(model, images, labels, self.num_targets)
        nearest, distance = images.clone(), torch.full((len(images),), torch.inf, dtype=images.dtype, device=images.device)
        rows = torch.arange(len(images), device=images.device)
        for place in range(targets.shape[1]):
            iterate = images[rows]
            for _ in range(self.steps):
                if not len(rows):
                    return nearest
                pairs = torch.stack([targets[rows, place], labels[rows]], 1)
                gradient, lead, _ = input_gradient(model, iterate, pairs, _lead)
                iterate = step(images[rows], iterate, gradient, lead, self.norm)
                with torch.no_grad():
                    crossed = model(iterate).argmax(1) != labels[rows]
                lengths = _lengths(iterate - images[rows], self.norm)
                nearer = crossed & (lengths < distance[rows])
                nearest[rows[nearer]], distance[rows[nearer]] = iterate[nearer], lengths[nearer]
                back = images[rows] + RETREAT * (iterate - images[rows])
                iterate = torch.where(crossed.view(-1, 1, 1, 1), back, iterate)
                if until_broken:
                    left = distance[rows] > self.eps
                    rows, iterate = rows[left], iterate[left]
        inside = (distance <= self.eps).view(-1, 1, 1, 1)
        return torch.where(inside, nearest, confine(images, nearest, self.eps, self.norm))


def _lead(logits: Tensor, pairs: Tensor) -> Tensor:
    """Logit of the first class of a pair minus that of the second: [B, K], [B, 2] -> [B]."""
    first, second = logits.gather(1, pairs).unbind(1)
    return first - second


def step(images: Tensor, iterate: Tensor, gradient: Tensor, lead: Tensor, norm: Norm) -> Tensor:
    """The next iterate: beyond the hyperplane on which the linearised lead is 0, and pulled towards the images.

    Shape:
        [B, C, H, W], lead [B] -> [B, C, H, W] in [0, 1].
    """
    gradient = gradient.nan_to_num()
    offset = (gradient * (iterate - images)).flatten(1).sum(1)
    move = onto_hyperplane(iterate, gradient, -lead, norm)
    from_image = onto_hyperplane(images, gradient, offset - lead, norm)
    length, whole = (_lengths(delta, norm).clamp(min=1e-8) for delta in (move, from_image))
    pull = (length / (length + whole)).clamp(max=PULL).view(-1, 1, 1, 1)
    return ((1 - pull) * (iterate + OVERSHOOT * move) + pull * (images + OVERSHOOT * from_image)).clamp(0, 1)


def onto_hyperplane(points: Tensor, weights: Tensor, change: Tensor, norm: Norm) -> Tensor:
    """The shortest move, in ``norm``, that changes ``sum(weights * points)`` by ``change`` and stays in [0, 1]; else the one that
    changes it most.

    A pixel moves in the direction that serves, until it has no room: by ``min(r, room)`` in Linf and ``min(r * |weight|, room)``
    in L2, with the same r for all pixels. The change is piecewise linear in r, and its pieces end where a pixel's room does.

    Shape:
        [B, C, H, W], change [B] -> [B, C, H, W].
    """
    shape, points, weights = points.shape, points.flatten(1), weights.flatten(1)
    scale = weights.abs().amax(1, keepdim=True).clamp(min=1e-30)  # squares of tiny gradients would be zero in fp32
    weights, change = weights / scale, change[:, None] / scale
    direction = weights.sign() * change.sign()
    room = torch.where(direction > 0, 1 - points, points) * direction.abs()
    speed = torch.ones_like(weights) if norm == "Linf" else weights.abs()
    gain = weights.abs() * speed  # per unit of r
    ends, order = (room / speed.clamp(min=1e-30)).sort(1)
    gains = gain.gather(1, order)
    used = (gains * ends).cumsum(1)
    going = gains.sum(1, keepdim=True) - gains.cumsum(1)
    reached = used + ends * going.clamp(min=0)  # at the end of each piece
    piece = torch.searchsorted(reached, change.abs()).clamp(max=ends.shape[1] - 1)
    before = (piece - 1).clamp(min=0)
    first = piece == 0
    spent = used.gather(1, before).masked_fill(first, 0)
    rate = torch.where(first, gains.sum(1, keepdim=True), going.gather(1, before))
    radius = ((change.abs() - spent) / rate.clamp(min=1e-30)).minimum(ends[:, -1:])
    return (direction * (radius * speed).minimum(room)).view(shape)


def _lengths(delta: Tensor, norm: Norm) -> Tensor:
    """Length of each sample, [B, ...] -> [B]."""
    return delta.flatten(1).norm(p=torch.inf if norm == "Linf" else 2, dim=1)
