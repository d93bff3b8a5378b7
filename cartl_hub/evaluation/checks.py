"""Checks of an evaluation: signs that gradients are masked or that an attack did not converge, on a few images.

They follow Carlini et al. (2019, https://arxiv.org/abs/1902.06705), Pintor et al. (2022, https://arxiv.org/abs/2106.09947) and
the warnings of AutoAttack (Croce and Hein, 2020, https://arxiv.org/abs/2003.01690). Only a difference in the suspicious direction
is flagged, and only above a threshold: the one of :data:`THRESHOLDS`, or two standard errors if that is more.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import APGD, FGSM, PGD, Attack, FeatureDistance, Noise, Square, Transfer
from ..attacks.attack import Norm, confine, input_gradient, steepest_direction
from ..attacks.losses import LossName, cross_entropy, margin
from ..data import ImageData
from ..randomness import START, fold_in, image_keys, uniform
from ..ranges import check_whole
from ..report import Check
from .given import AnyTestData, Part, as_data
from .pool import Pool, evenly_spaced, read_pool
from .verdict import (
    FEW,
    NEIGHBOUR_CHANGE,
    RANDOM_CHANGE,
    check_model,
    first_look,
    has_gradient,
    judge,
    measuring,
    neighbour_change,
    random_change,
)

FEWEST = 8  # images classified correctly of which a share says something
STEP = 1 / 1020  # of finite differences: a quarter of a grey level
DRAWS = 4  # of their directions
COARSE = 20  # times the rounding of logits, below which differences of them say nothing
STEEPER = 2  # times what the gradient promises: honest models rise by up to 1.1 times as much
REVIVED = 0.05  # of the rise under PGD, by which pixels without a gradient must not raise the margin further
SCALES = (1e-2, 1e-1, 1e1, 1e2)  # that logits are multiplied by
LOGIT_SPREAD = (1e-2, 1e3)  # between the largest and the smallest logit, in which cross-entropy serves as a loss

# Shares of the images, where nothing else is said
THRESHOLDS = {
    "determinism": RANDOM_CHANGE,  # share of the logits' spread
    "batch-independence": NEIGHBOUR_CHANGE,  # share of the logits' spread
    "zero-gradient": 0.005,
    "small-gradient": 0.05,
    "dead-pixels": 0.15,  # a maximum over pixels, which is honest, shows up to 7 %, clipped pixels 30 % and more
    "gradient-direction": 0.1,
    "gradient-differences": 0.3,  # median error; honest models show 0.01 to 0.1, gradients of something else 0.5 to 1
    "logit-range": 1.0,  # times the bounds LOGIT_SPREAD
    "attack-order": 0.005,
    "gradient-free": 0.005,
    "more-steps": 0.005,
    "rising-loss": 0.05,  # share of the rise; a tenth of the steps has a tenth of it where nothing has converged
    "logit-scale": 0.1,  # with other logits cross-entropy is another loss: honest models differ by up to 5 points
    "ce-against-dlr": 0.1,  # two losses: honest models differ by up to 5 points
    "eps-order": 0.005,
    "large-radius": 0.005,
    "transfer": 0.005,
    "second-verdict": 0.005,
}


class Comparison(NamedTuple):
    """A figure that is suspicious where it is large, its standard error, and the figures that it comes from."""

    excess: float
    error: float
    figures: dict[str, float]


class Skipped(Exception):
    """A check that can't be made; the message says why."""


class Trial:
    """What checks share: a model, a few images, and the verdicts of attacks on them; no attack is run twice.

    Args:
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        keys: One for each image's random numbers, [N].
        source: Model whose adversarial images are tried on this one.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        *,
        num_classes: int,
        eps: float,
        norm: Norm,
        batch_size: int,
        source: nn.Module | None = None,
    ):
        self.model, self.images, self.labels, self.keys = model, images, labels, keys
        self.num_classes, self.eps, self.norm, self.batch_size, self.source = num_classes, eps, norm, batch_size, source
        self._standing: dict[tuple[Attack, float], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def few(self) -> Tensor:
        """Images for a look at the logits."""
        return self.images[: min(self.batch_size, FEW)]

    @property
    def grey(self) -> float:
        """Radius in which every image can become grey."""
        return 128 / 255 * (1 if self.norm == "Linf" else math.sqrt(self.images[0].numel()))

    def batches(self, chosen: np.ndarray) -> Sequence[Tensor]:
        """Positions of some images, bool [N], in batches."""
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(self.labels.device)
        return rows.split(self.batch_size) if len(rows) else ()

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(part).float() for part in self.images.split(self.batch_size)])

    @cached_property
    def correct(self) -> np.ndarray:
        return (self.logits.argmax(1) == self.labels).cpu().numpy()

    @cached_property
    def has_gradient(self) -> bool:
        return has_gradient(self.model, self.images[:1])

    def need_gradient(self) -> None:
        if not self.has_gradient:
            raise Skipped("the logits have no gradient in the pixels")

    def need_images(self) -> None:
        if self.correct.sum() < FEWEST:
            raise Skipped(f"only {self.correct.sum()} of {len(self)} images are classified correctly, and {FEWEST} are needed")

    def need_radius(self) -> None:
        if not self.eps:
            raise Skipped("the radius is 0")

    # Attacks

    def noise(self) -> Noise:
        self.need_radius()
        return Noise(eps=self.eps, norm=self.norm, samples=20)

    def fgsm(self) -> FGSM:
        return FGSM(eps=self.eps, norm=self.norm)

    def pgd(self, steps: int = 20, eps: float | None = None) -> PGD:
        eps = self.eps if eps is None else eps
        if not eps:
            self.need_radius()
        return PGD(eps=eps, norm=self.norm, step_size=eps / 4 if self.norm == "Linf" else eps / 8, steps=steps)

    def apgd(self, loss: LossName = "ce") -> APGD:
        self.need_radius()
        return APGD(eps=self.eps, norm=self.norm, steps=50, loss=loss)

    def square(self) -> Square:
        self.need_radius()
        return Square(eps=self.eps, norm=self.norm, queries=300)

    def both_losses(self) -> dict[str, np.ndarray]:
        """What stands under APGD on cross-entropy and on DLR, which an honest model takes for different losses."""
        return {"APGD-CE and APGD-DLR": self.standing(self.apgd()) & self.standing(self.apgd("dlr"))}

    def standing(self, attack: Attack, *, scale: float = 1.0, among: np.ndarray | None = None) -> np.ndarray:
        """Images that are classified correctly before and after an attack, bool [N].

        Args:
            scale: Factor of the logits that the attack sees.
            among: Images that it is run on; by default those that are classified correctly.
        """
        self.need_images()
        if (attack, scale) not in self._standing:
            if not isinstance(attack, (Noise, Square, Transfer)):
                self.need_gradient()
            attacked = _Scaled(self.model, scale) if scale != 1 else self.model
            standing = (self.correct if among is None else among).copy()
            for rows in self.batches(standing):
                images, labels = self.images[rows], self.labels[rows]
                found = attack(attacked, images, labels, self.keys[rows], until_broken=True)
                verdict = judge(self.model, images, found, attack, rows, self.num_classes, "adversarial images of a check")
                standing[rows.cpu().numpy()] = ~verdict.breaks(labels).cpu().numpy()
            self._standing[attack, scale] = standing
        return self._standing[attack, scale]


class _Scaled(nn.Module):
    """A model with its logits times a factor."""

    def __init__(self, model: nn.Module, factor: float):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) * self.factor


def lower(suspect: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> Comparison:
    """By how much accuracy is lower under one attack than under another on the same images.

    Args:
        suspect: Name of the attack that should not be the stronger one, and the images that stand under it, bool [N].
        reference: Those of the other.
    """
    (low,), (high,) = suspect.values(), reference.values()
    won, lost = int((high & ~low).sum()), int((low & ~high).sum())
    # McNemar's error, of two attacks that are equally strong: it isn't zero where all differences go one way
    error = math.sqrt(won + lost) / len(low)
    figures = {f"accuracy, {name}": float(standing.mean()) for name, standing in (reference | suspect).items()}
    return Comparison((won - lost) / len(low), error, figures)


def share(name: str, count: int, num: int) -> Comparison:
    """A number of images that should be zero."""
    return Comparison(count / num, math.sqrt(count) / num, {name: count / num})


# The checks


def _determinism(trial: Trial) -> list[Comparison]:
    change = random_change(trial.model, trial.few)
    return [Comparison(change, 0.0, {"change of logits between two passes": change})]


def _batch_independence(trial: Trial) -> list[Comparison]:
    if random_change(trial.model, trial.few) > RANDOM_CHANGE:
        raise Skipped("the model draws random numbers")
    change = neighbour_change(trial.model, trial.few)
    return [Comparison(change, 0.0, {"change of logits in a smaller batch": change})]


def _zero_gradient(trial: Trial) -> list[Comparison]:
    trial.need_images()
    num = zero = int(trial.correct.sum())
    if trial.has_gradient:
        batches = ((trial.images[rows], trial.labels[rows]) for rows in trial.batches(trial.correct))
        found = [input_gradient(trial.model, images, labels, cross_entropy)[0] for images, labels in batches]
        zero = sum(int((gradient.nan_to_num() == 0).flatten(1).all(1).sum()) for gradient in found)
    return [share("images with a zero gradient", zero, num)]


def _small_gradient(trial: Trial) -> list[Comparison]:
    trial.need_images()
    trial.need_radius()
    trial.need_gradient()
    num, small = int(trial.correct.sum()), 0
    for rows in trial.batches(trial.correct):
        images, labels = trial.images[rows], trial.labels[rows]
        gradient, _, _ = input_gradient(trial.model, images, labels, margin)
        step = trial.eps * steepest_direction(gradient, trial.norm)
        up, down = (images + step).clamp(0, 1), (images - step).clamp(0, 1)
        with torch.no_grad():
            found = margin(trial.model(up).float(), labels) - margin(trial.model(down).float(), labels)
        promised = (gradient * (up - down)).flatten(1).sum(1)
        small += int((~(found < STEEPER * promised)).sum())  # also where both are zero
    return [share("images on which the margin is steeper than its gradient", small, num)]


def _dead_pixels(trial: Trial) -> list[Comparison]:
    trial.need_images()
    trial.need_radius()
    trial.need_gradient()
    eps = trial.eps if trial.norm == "Linf" else trial.eps / math.sqrt(trial.images[0].numel())  # pixel by pixel
    attack = PGD(eps=eps, step_size=eps / 4, steps=20)
    num, raised = int(trial.correct.sum()), 0
    for rows in trial.batches(trial.correct):
        images, labels, keys = trial.images[rows], trial.labels[rows], trial.keys[rows]
        gradient, start, _ = input_gradient(trial.model, images, labels, margin)
        if gradient.all():
            continue
        found = attack(trial.model, images, labels, keys)
        gradient, end, _ = input_gradient(trial.model, found, labels, margin)
        dead = gradient == 0
        sign = (uniform(keys, images.shape[1:], stream=START) < 0.5) * 2.0 - 1
        # a pixel that was clipped has a gradient again where one of both moves goes inwards
        one, other = (confine(images, found + eps * move * dead, eps, "Linf") for move in (sign, -sign))
        revived = sum((input_gradient(trial.model, moved, labels, margin)[0] for moved in (one, other)), torch.zeros_like(found))
        moved = confine(images, found + 2 * eps * torch.sign(revived) * dead, eps, "Linf")
        with torch.no_grad():
            gain = margin(trial.model(moved).float(), labels) - end
        raised += int((gain > REVIVED * (end - start).clamp(min=1e-12)).sum())
    return [share("images on which pixels without a gradient matter", raised, num)]


def _gradient_direction(trial: Trial) -> list[Comparison]:
    trial.need_images()
    trial.need_radius()
    trial.need_gradient()
    num, wrong = int(trial.correct.sum()), 0
    for rows in trial.batches(trial.correct):
        images, labels = trial.images[rows], trial.labels[rows]
        gradient, _, _ = input_gradient(trial.model, images, labels, cross_entropy)
        step = trial.eps / 4 * steepest_direction(gradient, trial.norm)
        with torch.no_grad():  # the margin is not rounded to zero where cross-entropy is
            along, against = (margin(trial.model((images + s).clamp(0, 1)).float(), labels) for s in (step, -step))
        wrong += int((along <= against).sum())
    return [share("images on which the gradient points elsewhere", wrong, num)]


def _gradient_differences(trial: Trial) -> list[Comparison]:
    trial.need_images()
    trial.need_gradient()
    rows = torch.from_numpy(np.flatnonzero(trial.correct)[: len(trial.few)]).to(trial.labels.device)
    images, labels = trial.images[rows], trial.labels[rows]
    gradient, _, _ = input_gradient(trial.model, images, labels, margin)
    errors = []
    with torch.no_grad():
        signs = [
            (uniform(fold_in(trial.keys[rows], draw), images.shape[1:], stream=START) < 0.5) * 2.0 - 1 for draw in range(DRAWS)
        ]
        if torch.equal(trial.model(images), trial.model(images + 1e-5 * signs[0])):
            raise Skipped("the model rounds its input, so that small differences say nothing")
        for sign in signs:
            up, down = (images + STEP * sign).clamp(0, 1), (images - STEP * sign).clamp(0, 1)
            found = margin(trial.model(up).float(), labels) - margin(trial.model(down).float(), labels)
            promised = (gradient * (up - down)).flatten(1).sum(1)
            errors.append((found - promised).abs() / (found.abs() + promised.abs()).clamp(min=1e-12))
    if float(found.abs().median()) < COARSE * float(trial.logits.abs().max()) * torch.finfo(torch.float32).eps:
        raise Skipped("the rounding of large logits hides their slope")
    error = round(float(torch.cat(errors).median()), 3)  # smaller parts are rounding
    return [Comparison(error, 0.0, {"median error of the gradient against finite differences": error})]


def _logit_range(trial: Trial) -> list[Comparison]:
    logits = trial.logits
    spread = float((logits.amax(1) - logits.amin(1)).median())
    probabilities = bool((logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4))
    outside = max(LOGIT_SPREAD[0] / max(spread, 1e-12), spread / LOGIT_SPREAD[1], 2.0 * probabilities)
    return [Comparison(outside, 0.0, {"median spread of logits": spread, "probabilities": float(probabilities)})]


def _attack_order(trial: Trial) -> list[Comparison]:
    attacks = {"noise": trial.noise(), "FGSM": trial.fgsm(), "PGD-20": trial.pgd(), "APGD-CE": trial.apgd()}
    standing = [{name: trial.standing(attack)} for name, attack in attacks.items()]
    return [lower(weaker, stronger) for weaker, stronger in pairwise(standing)]


def _gradient_free(trial: Trial) -> list[Comparison]:
    return [lower({"Square": trial.standing(trial.square())}, trial.both_losses())]


def _more_steps(trial: Trial) -> list[Comparison]:
    short = trial.standing(trial.pgd())
    return [lower({"PGD-40": trial.standing(trial.pgd(40), among=short)}, {"PGD-20": short})]


def _rising_loss(trial: Trial) -> list[Comparison]:
    batches = trial.batches(trial.standing(trial.pgd()))
    if not batches:
        raise Skipped("no image stands")

    def losses(steps: int) -> Tensor:
        found = []
        for rows in batches:
            images = trial.images[rows]
            if steps:
                images = trial.pgd(steps)(trial.model, images, trial.labels[rows], trial.keys[rows])
            with torch.no_grad():
                found.append(cross_entropy(trial.model(images).float(), trial.labels[rows]))
        return torch.cat(found)

    end = losses(20)
    last, rise = end - losses(18), float((end - losses(0)).mean().clamp(min=1e-12))
    excess, error = float(last.mean()) / rise, float(last.std(correction=0)) / math.sqrt(len(last)) / rise
    return [Comparison(excess, error, {"share of the rise in the last tenth of the steps": excess})]


def _logit_scale(trial: Trial) -> list[Comparison]:
    plain = trial.standing(trial.pgd())
    return [lower({f"logits times {scale:g}": trial.standing(trial.pgd(), scale=scale)}, {"PGD-20": plain}) for scale in SCALES]


def _ce_against_dlr(trial: Trial) -> list[Comparison]:
    return [lower({"APGD-DLR": trial.standing(trial.apgd("dlr"))}, {"APGD-CE": trial.standing(trial.apgd())})]


def _eps_order(trial: Trial) -> list[Comparison]:
    twice = min(2 * trial.eps, 1.0 if trial.norm == "Linf" else math.inf)
    radii = {"half the radius": trial.eps / 2, "the radius": trial.eps, "twice the radius": twice}
    standing = [{name: trial.standing(trial.pgd(eps=eps))} for name, eps in radii.items()]
    return [lower(smaller, larger) for smaller, larger in pairwise(standing)]


def _large_radius(trial: Trial) -> list[Comparison]:
    largest = int(torch.bincount(trial.labels).max())
    if largest == len(trial):
        raise Skipped("all of the images are of one class")
    standing = int(trial.standing(trial.pgd(eps=trial.grey)).sum())
    figures = {"accuracy": standing / len(trial), "share of the largest class": largest / len(trial)}
    return [Comparison((standing - largest) / len(trial), math.sqrt(standing) / len(trial), figures)]


def _transfer(trial: Trial) -> list[Comparison]:
    if trial.source is None:
        raise Skipped("no other model was given as transfer_source")
    with torch.no_grad():
        same = trial.source(trial.images[:1]).shape[1] == trial.num_classes
    if not (same or hasattr(trial.source, "features")):
        raise Skipped("the other model has other classes, and no features")
    attack = trial.pgd() if same else FeatureDistance(eps=trial.eps, norm=trial.norm, steps=20)
    transfer = Transfer(source=trial.source, source_name=type(trial.source).__name__, attack=attack)
    return [lower({"transfer": trial.standing(transfer)}, trial.both_losses())]


@dataclass(frozen=True)
class Probe:
    """A check in words and in code.

    Args:
        measure: Comparisons, of which none may exceed the threshold; raises :class:`Skipped`.
        flagged: Result of one that does.
        honest: What a model without tricks shows.
        suspicious: What the others show, and what that means.
        remedy: What to do then.
    """

    measure: Callable[[Trial], list[Comparison]]
    flagged: Literal["warn", "fail"]
    honest: str
    suspicious: str
    remedy: str


_ATTACK_DIFFERENTLY = (
    "Do not trust the robust accuracy. Find the step of the model that has no useful gradient and attack without it, or through "
    "a smooth substitute (BPDA); add gradient-free attacks (strength='full')."
)
_SEARCH_LONGER = "Take the worst case of more and longer attacks: default_attacks(strength='full')."

CHECKS = {
    "determinism": Probe(
        _determinism,
        "fail",
        "Two passes over the same images give the same logits.",
        "Two passes over the same images give different logits: a random model misleads attacks, and its verdicts are luck.",
        "Evaluate the model without its random part, or attack the mean over many draws (EOT).",
    ),
    "batch-independence": Probe(
        _batch_independence,
        "fail",
        "What the model says of an image doesn't depend on the other images of the batch.",
        "What the model says of an image depends on the other images of the batch.",
        "Use stored statistics instead of those of the batch.",
    ),
    "zero-gradient": Probe(
        _zero_gradient,
        "fail",
        "The loss has a gradient at the images.",
        "The gradient of the loss is zero at a part of the images: attacks that follow it stand still there.",
        _ATTACK_DIFFERENTLY,
    ),
    "small-gradient": Probe(
        _small_gradient,
        "fail",
        "Over the radius the margin rises at most twice as fast as its gradient at the image promises.",
        "Over the radius the margin rises more than twice as fast as its gradient at the image promises: logits are saturated.",
        "Attack the model without the function that saturates its logits; do not trust the robust accuracy.",
    ),
    "dead-pixels": Probe(
        _dead_pixels,
        "warn",  # the margin rises further, but PGD may have broken all that can be broken
        "Pixels without a gradient don't matter where PGD ends.",
        "Pixels without a gradient, which PGD leaves alone, raise the margin further where PGD ends: they are clipped inside.",
        _ATTACK_DIFFERENTLY,
    ),
    "gradient-direction": Probe(
        _gradient_direction,
        "fail",
        "A quarter of the radius along the gradient the loss is higher than as far against it.",
        "A quarter of the radius along the gradient the loss is often not higher than as far against it: gradients are noise.",
        _ATTACK_DIFFERENTLY,
    ),
    "gradient-differences": Probe(
        _gradient_differences,
        "fail",
        "The gradient is the slope of the margin in random directions.",
        "The gradient isn't the slope of the margin in random directions: it is that of something else, which misleads attacks.",
        _ATTACK_DIFFERENTLY,
    ),
    "logit-range": Probe(
        _logit_range,
        "warn",
        "Logits are of a size at which cross-entropy serves as a loss.",
        "The outputs are tiny, huge, or probabilities: cross-entropy is almost linear in them, or zero, or flat.",
        "Return logits from before the softmax, without a constant factor; and trust attacks on DLR (APGD-T) before others.",
    ),
    "attack-order": Probe(
        _attack_order,
        "fail",
        "Stronger attacks break more: random noise, FGSM, PGD-20, APGD-CE.",
        "A weaker attack breaks more than a stronger one, so that the stronger one is misled: gradients are masked.",
        _ATTACK_DIFFERENTLY,
    ),
    "gradient-free": Probe(
        _gradient_free,
        "fail",
        "Square, which needs no gradients, breaks no more than APGD.",
        "Square, which needs no gradients, breaks more than APGD: gradients are masked.",
        _ATTACK_DIFFERENTLY,
    ),
    "more-steps": Probe(
        _more_steps,
        "warn",
        "Twice the steps change nothing: PGD has converged.",
        "Twice the steps break more: PGD has not converged, and robust accuracy is lower than it says.",
        _SEARCH_LONGER,
    ),
    "rising-loss": Probe(
        _rising_loss,
        "warn",
        "The loss has stopped rising when PGD-20 ends.",
        "The loss still rises when PGD-20 ends: it has not converged, and robust accuracy is lower than it says.",
        _SEARCH_LONGER,
    ),
    "logit-scale": Probe(
        _logit_scale,
        "fail",
        "PGD finds no more where logits are multiplied by a constant.",
        "PGD breaks more where logits are multiplied by a constant: their size hides the gradient of cross-entropy.",
        "Trust attacks on DLR (APGD-T) before those on cross-entropy, and multiply the logits by the constant for the others.",
    ),
    "ce-against-dlr": Probe(
        _ce_against_dlr,
        "warn",
        "The same search on cross-entropy and on DLR breaks about the same.",
        "The search on DLR breaks far more than that on cross-entropy: attacks on cross-entropy are misled.",
        "Trust attacks on DLR (APGD-T) before those on cross-entropy.",
    ),
    "eps-order": Probe(
        _eps_order,
        "fail",
        "Robust accuracy falls as the radius grows.",
        "Robust accuracy rises with the radius: the attack is misled.",
        _ATTACK_DIFFERENTLY,
    ),
    "large-radius": Probe(
        _large_radius,
        "fail",
        "Where every image can become grey, the accuracy left is at most the share of the largest class.",
        "Accuracy is left where every image can become grey: the attack is misled.",
        _ATTACK_DIFFERENTLY,
    ),
    "transfer": Probe(
        _transfer,
        "fail",
        "Adversarial images of another model break no more than the attack on the model itself.",
        "Adversarial images of another model break more than the attack on the model itself: gradients are masked.",
        _ATTACK_DIFFERENTLY,
    ),
}


SECOND_VERDICT = Probe(
    lambda trial: [],  # it comes with the attacks
    "fail",
    "What broke once broke again, when it was classified in another batch.",
    "What broke once did not always break again, when it was classified in another batch; it counts as standing.",
    "Look for random numbers or a state in the model.",
)


def make_check(name: str, trial: Trial) -> Check:
    """Run one of :data:`CHECKS`."""
    try:
        comparisons = CHECKS[name].measure(trial)
    except Skipped as reason:
        return Check(name, "skipped", {}, f"Not made: {reason}.", num_images=len(trial))
    return _judged(name, CHECKS[name], comparisons, len(trial))


def second_verdict(unconfirmed: dict[str, int], num_verdicts: int, num_images: int) -> Check:
    """How many images broke in the first verdict of an attack and not in the second.

    Args:
        unconfirmed: Number of those images by attack.
        num_verdicts: Second verdicts.
    """
    comparisons = [share(f"not confirmed, {name}", count, num_images) for name, count in unconfirmed.items() if count]
    comparisons = comparisons or [Comparison(0.0, 0.0, {})]
    check = _judged("second-verdict", SECOND_VERDICT, comparisons, num_images)
    counts = {"second verdicts": num_verdicts, "not confirmed": sum(unconfirmed.values())}
    return replace(check, figures=counts | check.figures)


def _judged(name: str, probe: Probe, comparisons: list[Comparison], num_images: int) -> Check:
    least = THRESHOLDS[name]
    margins = [comparison.excess - max(least, 2 * comparison.error) for comparison in comparisons]
    worst = comparisons[int(np.argmax(margins))]
    figures = {key: value for comparison in comparisons for key, value in comparison.figures.items()}
    figures |= {"excess": worst.excess, "threshold": max(least, 2 * worst.error)}
    if max(margins) > 0:
        return Check(name, probe.flagged, figures, probe.suspicious, probe.remedy, num_images)
    return Check(name, "pass", figures, probe.honest, num_images=num_images)


def chosen_checks(names: bool | Iterable[str] | None) -> tuple[str, ...]:
    """All for True or None, none for False, or those that are named, in the order in which they are made.

    Raises:
        ValueError: If there is no such check.
    """
    if names is None or isinstance(names, bool):
        return () if names is False else tuple(CHECKS)
    names = {names} if isinstance(names, str) else set(names)
    if unknown := sorted(names - CHECKS.keys()):
        raise ValueError(f"expected names of checks, got {', '.join(map(repr, unknown))}; there are {', '.join(CHECKS)}.")
    return tuple(name for name in CHECKS if name in names)


def run_checks(
    model: nn.Module,
    data: AnyTestData,
    *,
    names: Iterable[str] | None = None,
    num_images: int = 256,
    eps: float = 8 / 255,
    norm: Norm = "Linf",
    transfer_source: nn.Module | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Check, ...]:
    """Look for signs that attacks on a model are misled.

    All checks together take at most about 800 passes for each image, of which 300 are Square's, without a gradient; an image
    that breaks early takes fewer.

    Args:
        model: As for :func:`cartl_hub.evaluate`.
        data: As for :func:`cartl_hub.evaluate`.
        names: Some of the checks; all by default.
        num_images: Images to make them on, evenly spaced over data of known size, otherwise the first ones.
        eps: Radius of the threat model, in pixel units of [0, 1].
        norm: Its norm.
        transfer_source: Another model, whose adversarial images are tried on this one; by its logits where it has the same
            number of classes, otherwise by its ``features``.
        batch_size: Images that are attacked at once.
        seed: Of the random starts.
        device: Where to run; by default where the model is, and it is back there afterwards.
        progress: Show a progress bar.

    Raises:
        ValueError: If there is no such check, or as :func:`cartl_hub.evaluate` does for the model and the data.
    """
    chosen = chosen_checks(names)
    check_model(model)
    for name, number in (("num_images", num_images), ("batch_size", batch_size)):
        check_whole(name, number, (">=", 1))
    test: Any = as_data(data, model, batch_size)
    if isinstance(test, ImageData):
        test = Part(test, evenly_spaced(num_images, len(test)))
    with ExitStack() as stack:
        device, _ = stack.enter_context(measuring(model, device))
        look = partial(first_look, model, len(test.label_names), device)
        pool = stack.enter_context(read_pool(test, num_images, batch_size, look))
        source = transfer_source
        if source is not None:
            stack.enter_context(measuring(source, device))
        trial = make_trial(model, pool, num_images, len(test.label_names), eps, norm, batch_size, seed, device, source)
        bar = stack.enter_context(tqdm(chosen, unit="check", dynamic_ncols=True, **({} if progress else {"disable": True})))
        found = []
        for name in bar:
            bar.set_description(name)
            found.append(make_check(name, trial))
    return tuple(found)


def make_trial(
    model: nn.Module,
    pool: Pool,
    num_images: int,
    num_classes: int,
    eps: float,
    norm: Norm,
    batch_size: int,
    seed: int,
    device: torch.device,
    source: nn.Module | None,
) -> Trial:
    """Images of a pool for checks, evenly spaced, as data may be sorted by class."""
    positions = evenly_spaced(num_images, len(pool))
    keys = image_keys(seed, 0, pool.indices[positions].to(device))
    images, labels = pool.get(positions, device), pool.labels[positions].to(device)
    return Trial(model, images, labels, keys, num_classes=num_classes, eps=eps, norm=norm, batch_size=batch_size, source=source)


def thresholds_table() -> str:
    """The checks as Markdown, for the documentation."""
    lines = ["| check | an honest model | flagged from | result |", "|---|---|---|---|"]
    units = {
        "determinism": "of the logits' spread",
        "batch-independence": "of the logits' spread",
        "gradient-differences": "median error",
        "rising-loss": "of the rise",
    }
    for name, probe in (CHECKS | {"second-verdict": SECOND_VERDICT}).items():
        unit = units.get(name, "of the images")
        threshold = "spread outside 0.01 to 1,000" if name == "logit-range" else f"{100 * THRESHOLDS[name]:g} % {unit}"
        lines.append(f"| `{name}` | {probe.honest} | {threshold} | {probe.flagged} |")
    return "\n".join(lines)
