"""Losses that gradient attacks maximise, as functions of logits z and the true class y."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["ce", "margin", "dlr"]


def check_loss(loss: str) -> None:
    """Raise ValueError on the name of an unknown loss."""
    if loss not in get_args(LossName):
        raise ValueError(f"loss must be one of {get_args(LossName)}, got {loss!r}.")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``log sum_i exp(z_i) - z_y``. Zero in fp32 where logits are far apart, and then without a gradient.

    Shape:
        [B, K], [B] -> [B].
    """
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{i != y} z_i - z_y`` (Carlini and Wagner, 2017, https://arxiv.org/abs/1608.04644): above 0 where misclassified.

    Shape:
        [B, K], [B] -> [B].
    """
    true = logits.gather(1, labels[:, None])
    return (without_label(logits, labels).amax(1, keepdim=True) - true).squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio ``(max_{i != y} z_i - z_y) / (z_1 - z_3)``, where z_k is the k-th largest logit (Croce and
    Hein, 2020, https://arxiv.org/abs/2003.01690).

    The same for logits of any scale and shift. Two classes have no third logit, so that it is :func:`margin` for them.

    Shape:
        [B, K], [B] -> [B].
    """
    return margin(logits, labels) / _spread(logits, 3, 1)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """``(z_t - z_y) / (z_1 - (z_3 + z_4) / 2)`` for a wrong class t (Croce and Hein, 2020).

    With three classes, z_2 and z_3 take the places of z_3 and z_4: z_3 alone would make the loss of the third class the
    constant -1. With two classes there is no denominator.

    Shape:
        [B, K], [B], [B] -> [B].
    """
    chosen = logits.gather(1, torch.stack([targets, labels], 1))
    return (chosen[:, 0] - chosen[:, 1]) / _spread(logits, 4, 2)


def without_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits with that of the true class at minus infinity: [B, K], [B] -> [B, K]."""
    return logits.scatter(1, labels[:, None], -torch.inf)


def _spread(logits: Tensor, place: int, num: int) -> Tensor:
    """Largest logit minus the mean of the ``num`` ones down to the ``place``-th or the last: [B, K] -> [B], above 0.

    1 for two classes.
    """
    largest = logits.topk(min(place, logits.shape[1]), 1).values
    if largest.shape[1] < 3:
        return torch.ones_like(largest[:, 0])
    return (largest[:, 0] - largest[:, -num:].mean(1)).clamp(min=1e-12)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
