"""TRADES: cross-entropy on clean images plus how far predictions move under attack."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import NFGSM, PGD, RFGSM, Attack
from ..models import Classifier
from ..modules import eval_mode
from ..ranges import check_number, check_whole
from .method import Batch, Method, check_attack


@dataclass(frozen=True, kw_only=True)
class TRADES(Method):
    """Cross-entropy on clean images plus ``beta`` times the Kullback-Leibler divergence from clean to adversarial predictions
    (Zhang et al., ICML 2019, https://arxiv.org/abs/1901.08573).

    The attack maximises that divergence too, from clean predictions in eval mode. Both terms are differentiated, the second
    through both passes, which run in train mode. The authors start the attack from a Gaussian of 0.001; here it starts as the
    attack does.

    Args:
        beta: Weight of the divergence, > 0, a mean over the batch; the authors' 1 / lambda, 6 in most of their experiments.
        attack: Attack of the inner maximisation; it needs a random start, as the divergence has no gradient at the clean image.
        num_blocks: Number of blocks to train, counted from the classifier; None is the whole network.

    Raises:
        ValueError: On values out of range, or an attack that starts at the image or maximises something else.
    """

    beta: float = 6.0
    attack: Attack = field(default=PGD(eps=8 / 255, step_size=2 / 255, steps=10))
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        check_number("beta", self.beta, (">", 0))
        check_attack(self.attack)
        if not isinstance(self.attack, (PGD, RFGSM, NFGSM)) or not getattr(self.attack, "random_start", True):
            raise ValueError(f"expected PGD, RFGSM or NFGSM with a random start for TRADES, got {self.attack!r}.")
        if getattr(self.attack, "loss", "ce") != "ce":
            raise ValueError(f"expected an attack with loss='ce', to which TRADES gives soft labels, got {self.attack!r}.")
        if self.num_blocks is not None:
            check_whole("num_blocks", self.num_blocks, (">=", 1))

    @property
    def trained_blocks(self) -> int | None:
        return self.num_blocks

    def losses(self, model: Classifier, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), eval_mode(model):
            soft_labels = model(batch.images).float().softmax(1)  # cross-entropy to these is the divergence plus a constant
        adversarial = self.attack(model, batch.images, soft_labels, batch.keys)
        logits = model(batch.images)
        cross_entropy = F.cross_entropy(logits, batch.labels)
        moved, clean = (outputs.float().log_softmax(1) for outputs in (model(adversarial), logits))
        divergence = F.kl_div(moved, clean, reduction="batchmean", log_target=True)
        return {
            "loss": cross_entropy + self.beta * divergence,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
            "logits": logits,
        }
