"""Checks of an evaluation: signs that gradients are masked or that an attack did not converge, on a few images.

They follow Carlini et al. (2019, https://arxiv.org/abs/1902.06705), Pintor et al. (2022, https://arxiv.org/abs/2106.09947) and
the warnings of AutoAttack (Croce and Hein, 2020, https://arxiv.org/abs/2003.01690). Only a difference in the suspicious direction
is flagged, and only above a threshold: its own, or two standard errors if that is more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..attacks import PGD, FeatureDistance, Transfer
from ..attacks.attack import confine, input_gradient, steepest_direction
from ..attacks.losses import cross_entropy, margin
from ..randomness import START, fold_in, uniform
from .trial import Comparison, Skipped, Trial, lower, share
from .verdict import NEIGHBOUR_CHANGE, RANDOM_CHANGE, neighbour_change, random_change

REPORTED = "reported-attacks"  # the check that is made last, once all attacks have run
STEP = 1 / 1020  # of finite differences: a quarter of a grey level
DRAWS = 4  # of their directions
COARSE = 20  # times the rounding of logits, below which differences of them say nothing
STEEPER = 2  # times what the gradient promises: honest models rise by up to 1.1 times as much
REVIVED = 0.05  # of the rise under PGD, by which pixels without a gradient must not raise the margin further
SCALES = (1e-2, 1e-1, 1e1, 1e2)  # that logits are multiplied by
LOGIT_SPREAD = (1e-2, 1e3)  # between the largest and the smallest logit, in which cross-entropy serves as a loss


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
        found = [input_gradient(trial.model, images, labels, cross_entropy)[0] for images, labels, _ in trial.correct_images()]
        zero = sum(int((gradient.nan_to_num() == 0).flatten(1).all(1).sum()) for gradient in found)
    return [share("images with a zero gradient", zero, num)]


def _small_gradient(trial: Trial) -> list[Comparison]:
    trial.need_ascent()
    num, small = int(trial.correct.sum()), 0
    for images, labels, _ in trial.correct_images():
        gradient, _, _ = input_gradient(trial.model, images, labels, margin)
        step = trial.eps * steepest_direction(gradient, trial.norm)
        up, down = (images + step).clamp(0, 1), (images - step).clamp(0, 1)
        with torch.no_grad():
            found = margin(trial.model(up).float(), labels) - margin(trial.model(down).float(), labels)
        promised = (gradient * (up - down)).flatten(1).sum(1)
        small += int((~(found < STEEPER * promised)).sum())  # also where both are zero
    return [share("images on which the margin is steeper than its gradient", small, num)]


def _dead_pixels(trial: Trial) -> list[Comparison]:
    trial.need_ascent()
    eps = trial.eps if trial.norm == "Linf" else trial.eps / math.sqrt(trial.images[0].numel())  # pixel by pixel
    attack = PGD(eps=eps, step_size=eps / 4, steps=20)
    num, raised = int(trial.correct.sum()), 0
    for images, labels, keys in trial.correct_images():
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
    trial.need_ascent()
    num, wrong = int(trial.correct.sum()), 0
    for images, labels, _ in trial.correct_images():
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
        same = trial.source(trial.images[:1]).shape[1] == trial.subject.num_classes
    if not (same or hasattr(trial.source, "features")):
        raise Skipped("the other model has other classes, and no features")
    attack = trial.pgd() if same else FeatureDistance(eps=trial.eps, norm=trial.norm, steps=20)
    transfer = Transfer(source=trial.source, source_name=type(trial.source).__name__, attack=attack)
    return [lower({"transfer": trial.standing(transfer)}, trial.both_losses())]


def _reported_attacks(trial: Trial) -> list[Comparison]:
    if trial.reported is None:
        raise Skipped("there is no report whose attacks it could judge")
    reported = {"all attacks of the report": trial.reported[trial.positions]}
    return [lower({"PGD-20": trial.standing(trial.pgd())}, reported)]


@dataclass(frozen=True)
class Probe:
    """A check in words and in code.

    Args:
        measure: Function that makes comparisons, of which none may exceed the threshold; raises :class:`Skipped`.
        threshold: Largest share of the images, unless ``unit`` says otherwise; or two standard errors, if that is more.
        flagged: Status of the check if a comparison exceeds the threshold.
        honest: Description of an honest model's result.
        suspicious: Description of a suspicious result, and what it means.
        remedy: Action to take after a suspicious result.
    """

    measure: Callable[[Trial], list[Comparison]]
    threshold: float
    flagged: Literal["warn", "fail"]
    honest: str
    suspicious: str
    remedy: str
    unit: str = "of the images"


_ATTACK_DIFFERENTLY = (
    "Do not trust the robust accuracy. Find the step of the model that has no useful gradient and attack without it, or through "
    "a smooth substitute (BPDA); add gradient-free attacks (strength='full')."
)
_SEARCH_LONGER = "Take the worst case of more and longer attacks: default_attacks(strength='full')."

CHECKS = {
    "determinism": Probe(
        _determinism,
        RANDOM_CHANGE,
        "fail",
        "Two passes over the same images give the same logits.",
        "Two passes over the same images give different logits: a random model misleads attacks, and its verdicts are luck.",
        "Evaluate the model without its random part, or attack the mean over many draws (EOT).",
        unit="of the logits' spread",
    ),
    "batch-independence": Probe(
        _batch_independence,
        NEIGHBOUR_CHANGE,
        "fail",
        "What the model says of an image doesn't depend on the other images of the batch.",
        "What the model says of an image depends on the other images of the batch, or now and then on random numbers.",
        "Use stored statistics instead of those of the batch; look for random numbers that are drawn in some passes only.",
        unit="of the logits' spread",
    ),
    "zero-gradient": Probe(
        _zero_gradient,
        0.005,
        "fail",
        "The loss has a gradient at the images.",
        "The gradient of the loss is zero at a part of the images: attacks that follow it stand still there.",
        _ATTACK_DIFFERENTLY,
    ),
    "small-gradient": Probe(
        _small_gradient,
        0.05,
        "fail",
        "Over the radius the margin rises at most twice as fast as its gradient at the image promises.",
        "Over the radius the margin rises more than twice as fast as its gradient at the image promises: logits are saturated.",
        "Attack the model without the function that saturates its logits; do not trust the robust accuracy.",
    ),
    "dead-pixels": Probe(
        _dead_pixels,
        0.15,  # a maximum over pixels, which is honest, shows up to 7 %, clipped pixels 30 % and more
        "warn",  # the margin rises further, but PGD may have broken all that can be broken
        "Pixels without a gradient don't matter where PGD ends.",
        "Pixels without a gradient, which PGD leaves alone, raise the margin further where PGD ends: they are clipped inside.",
        _ATTACK_DIFFERENTLY,
    ),
    "gradient-direction": Probe(
        _gradient_direction,
        0.1,
        "fail",
        "A quarter of the radius along the gradient the loss is higher than as far against it.",
        "A quarter of the radius along the gradient the loss is often not higher than as far against it: gradients are noise.",
        _ATTACK_DIFFERENTLY,
    ),
    "gradient-differences": Probe(
        _gradient_differences,
        0.3,  # honest models show 0.01 to 0.1, gradients of something else 0.5 to 1
        "fail",
        "The gradient is the slope of the margin in random directions.",
        "The gradient isn't the slope of the margin in random directions: it is that of something else, which misleads attacks.",
        _ATTACK_DIFFERENTLY,
        unit="median error",
    ),
    "logit-range": Probe(
        _logit_range,
        1.0,
        "warn",
        "Logits are of a size at which cross-entropy serves as a loss.",
        "The outputs are tiny, huge, or probabilities: cross-entropy is almost linear in them, or zero, or flat.",
        "Return logits from before the softmax, without a constant factor; and trust attacks on DLR (APGD-T) before others.",
        unit="times the bounds",
    ),
    "attack-order": Probe(
        _attack_order,
        0.005,
        "fail",
        "Stronger attacks break more: random noise, FGSM, PGD-20, APGD-CE.",
        "A weaker attack breaks more than a stronger one, so that the stronger one is misled: gradients are masked.",
        _ATTACK_DIFFERENTLY,
    ),
    "gradient-free": Probe(
        _gradient_free,
        0.005,
        "fail",
        "Square, which needs no gradients, breaks no more than APGD.",
        "Square, which needs no gradients, breaks more than APGD: gradients are masked.",
        _ATTACK_DIFFERENTLY,
    ),
    "more-steps": Probe(
        _more_steps,
        0.005,
        "warn",
        "Twice the steps change nothing: PGD has converged.",
        "Twice the steps break more: PGD has not converged, and robust accuracy is lower than it says.",
        _SEARCH_LONGER,
    ),
    "rising-loss": Probe(
        _rising_loss,
        0.05,  # a tenth of the steps has a tenth of it where nothing has converged
        "warn",
        "The loss has stopped rising when PGD-20 ends.",
        "The loss still rises when PGD-20 ends: it has not converged, and robust accuracy is lower than it says.",
        _SEARCH_LONGER,
        unit="of the rise",
    ),
    "logit-scale": Probe(
        _logit_scale,
        0.1,  # with other logits cross-entropy is another loss: honest models differ by up to 5 points
        "fail",
        "PGD finds no more where logits are multiplied by a constant.",
        "PGD breaks more where logits are multiplied by a constant: their size hides the gradient of cross-entropy.",
        "Trust attacks on DLR (APGD-T) before those on cross-entropy, and multiply the logits by the constant for the others.",
    ),
    "ce-against-dlr": Probe(
        _ce_against_dlr,
        0.1,  # two losses: honest models differ by up to 5 points
        "warn",
        "The same search on cross-entropy and on DLR breaks about the same.",
        "The search on DLR breaks far more than that on cross-entropy: attacks on cross-entropy are misled.",
        "Trust attacks on DLR (APGD-T) before those on cross-entropy.",
    ),
    "eps-order": Probe(
        _eps_order,
        0.005,
        "fail",
        "Robust accuracy falls as the radius grows.",
        "Robust accuracy rises with the radius: the attack is misled.",
        _ATTACK_DIFFERENTLY,
    ),
    "large-radius": Probe(
        _large_radius,
        0.005,
        "fail",
        "Where every image can become grey, the accuracy left is at most the share of the largest class.",
        "Accuracy is left where every image can become grey: the attack is misled.",
        _ATTACK_DIFFERENTLY,
    ),
    "transfer": Probe(
        _transfer,
        0.005,
        "fail",
        "Adversarial images of another model break no more than the attack on the model itself.",
        "Adversarial images of another model break more than the attack on the model itself: gradients are masked.",
        _ATTACK_DIFFERENTLY,
    ),
    REPORTED: Probe(
        _reported_attacks,
        0.005,
        "fail",
        "The report's attacks together break no less than PGD-20 does.",
        "PGD-20 breaks more than all of the report's attacks in this ball: they are too weak, or fail for a technical reason.",
        "Look at the attacks' steps and at what they return: images that left the ball count as standing. Add default_attacks().",
    ),
}


SECOND_VERDICT = Probe(
    lambda trial: [],  # it comes with the attacks
    0.005,
    "fail",
    "What broke once broke again, when it was classified in another batch.",
    "What broke once did not always break again, when it was classified in another batch; it counts as standing.",
    "Look for random numbers or a state in the model.",
)
