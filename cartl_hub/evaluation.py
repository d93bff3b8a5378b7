"""Clean and robust accuracy of a model."""

import logging
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attacks import FGSM, PGD, Attack
from .config import to_dict
from .data import Data, Drawn
from .randomness import image_keys
from .report import Accuracy, AttackResult, ClassAccuracy, Curve, Report, Sample, Verdicts, WorstCase, eps_text, plain_json

logger = logging.getLogger(__name__)

CURVE_EPS = tuple(k / 255 for k in (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64))
NUM_SAMPLES = 8


def default_attacks(eps: float = 8 / 255, l2_eps: float = 0.5) -> dict[str, Attack]:
    """FGSM and PGD with 20 and 100 steps in Linf, and PGD with 20 steps in L2.

    Args:
        eps: Radius in Linf, in pixel units of [0, 1]; a step of PGD is a quarter of it.
        l2_eps: Radius in L2; 20 steps of PGD can go 2.5 times as far.
    """
    return {
        "FGSM": FGSM(eps=eps),
        "PGD-20": PGD(eps=eps, step_size=eps / 4, steps=20),
        "PGD-100": PGD(eps=eps, step_size=eps / 4, steps=100),
        "PGD-20 L2": PGD(eps=l2_eps, step_size=2.5 * l2_eps / 20, steps=20, norm="L2"),
    }


def evaluate(
    model: nn.Module,
    data: Data,
    *,
    attacks: Mapping[str, Attack] | None = None,
    num_images: int | None = None,
    curve: Sequence[float] | None = CURVE_EPS,
    curve_images: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    context: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Measure accuracy on clean images and under attacks, in fp32.

    An image counts as robust to an attack if it is classified correctly before and after; one that is wrong before is not
    attacked. What an attack returns is verified: an image that left [0, 1] or the ball breaks nothing.

    Args:
        model: Any module in eval mode from images in [0, 1] to logits [B, K], with K classes as in ``data``.
        data: Read once, from front to back.
        attacks: By name, which the report shows; by default :func:`default_attacks`.
        num_images: Only the first ones.
        curve: Linf radii, from 0 upwards, at which PGD-20 measures accuracy against radius; None for none.
        curve_images: First images that the curve is measured on.
        batch_size: Images that are attacked at once.
        seed: Of the random starts; an image's start doesn't depend on the batch it is in.
        device: Where to run; by default where the model is, and it is back there afterwards.
        context: What the report should say of the model, e.g. "id", "revision", "method", "notes", "command"; JSON.
        progress: Show a progress bar.

    Raises:
        ValueError: If the model is in train mode or not in fp32, if images are outside [0, 1] or labels outside the classes, if
            logits have another shape or aren't finite, or if there are no images.
    """
    attacks = default_attacks() if attacks is None else dict(attacks)
    _check_model(model)
    _check_arguments(attacks, num_images, curve, curve_images, batch_size)
    stated, description = plain_json(context or {}, "context"), plain_json(data.description, "description of the data")
    home = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    device = home if device is None else torch.device(device)
    run = _Run(model, data, attacks, num_images, curve, curve_images, batch_size, seed, device, progress)
    begun = time.perf_counter()
    with _at(device, home, model), _frozen(model), _without_tf32(), torch.autocast(device.type, enabled=False):
        run.measure()
    return run.report(stated, description, _environment(device, time.perf_counter() - begun))


@dataclass(eq=False)
class _Stage:
    """An attack, the images that wait for it, and the stages that those go on to which stand it.

    Args:
        standing: Indices of the images that stood it.
        rejected: Images that the attack moved out of [0, 1] or the ball.
    """

    name: str
    attack: Attack
    later: list["_Stage"] = field(default_factory=list)
    waiting: Drawn | None = None
    standing: list[int] = field(default_factory=list)
    rejected: int = 0

    @property
    def verdicts(self) -> int:
        """Verdicts on an image from here on."""
        return 1 + sum(stage.verdicts for stage in self.later)


class _Run:
    """One call of :func:`evaluate`.

    The data is read once and each image flows through the stages until it is broken, so that a stream is never held and
    batches stay full although images leave.
    """

    def __init__(self, model, data, attacks, num_images, curve, curve_images, batch_size, seed, device, progress):
        self.model, self.data, self.num_images, self.batch_size = model, data, num_images, batch_size
        self.seed, self.device, self.progress = seed, device, progress
        self.stages = {name: _Stage(name, attack) for name, attack in attacks.items()}
        self.configs = {name: plain_json(to_dict(attack), name) for name, attack in attacks.items()}
        self.first = _chain(self.stages.values())
        self.curve_eps, self.curve_images = curve, curve_images
        self.curve = [_Stage(f"curve at {eps_text('Linf', eps)}", curve_attack(eps)) for eps in (curve or ())[1:]]
        for stage, larger in pairwise(self.curve):
            stage.later.append(larger)
        self.indices: list[int] = []
        self.labels: list[int] = []
        self.correct: list[bool] = []
        self.more = False  # images that were left out
        self.pictured = self._pictured()
        self.of_new_class: dict[int, Sample] = {}
        self.spare: list[Sample] = []

    def measure(self) -> None:
        known = len(self.data) if hasattr(self.data, "__len__") else None
        num = min((n for n in (known, self.num_images) if n is not None), default=None)
        total = None if num is None else num * len(self.stages) + min(num, self.curve_images) * len(self.curve)
        with tqdm(total=total, unit="verdict", dynamic_ncols=True, **({} if self.progress else {"disable": True})) as self.bar:
            for drawn in self.data.batches(self.batch_size):
                left = len(drawn.labels) if self.num_images is None else self.num_images - len(self.labels)
                self.more = left < len(drawn.labels)
                if left:
                    self._start(_select(drawn, slice(left)))
                if self.more:
                    break
            for stage in (*self.first, *self.curve[:1]):
                self._finish(stage)
        if not self.labels:
            raise ValueError("expected at least one image, got none; pass a split that has images.")

    def _start(self, drawn: Drawn) -> None:
        """Classify clean images and hand the correct ones to the first stages."""
        drawn = Drawn(drawn.images.cpu(), drawn.labels.cpu(), drawn.indices.cpu(), drawn.epoch)
        num_classes = len(self.data.label_names)
        if drawn.labels.min() < 0 or drawn.labels.max() >= num_classes:
            raise ValueError(
                f"expected labels from 0 to {num_classes - 1}, got {int(drawn.labels.min())} to {int(drawn.labels.max())}; "
                "evaluate on a split that has labels, with the names of all its classes."
            )
        correct = self._predict(_pixels(drawn).to(self.device), drawn.indices, "clean images").cpu() == drawn.labels
        on_curve = torch.arange(len(self.labels), len(self.labels) + len(drawn.labels)) < self.curve_images
        self.indices += drawn.indices.tolist()
        self.labels += drawn.labels.tolist()
        self.correct += correct.tolist()
        for stage in self.first:
            self.bar.update(int((~correct).sum()) * stage.verdicts)
            self._put(stage, _select(drawn, correct))
        for stage in self.curve[:1]:
            self.bar.update(int((~correct & on_curve).sum()) * stage.verdicts)
            self._put(stage, _select(drawn, correct & on_curve))

    def _put(self, stage: _Stage, drawn: Drawn) -> None:
        """Attack as soon as a batch is full."""
        waiting = drawn if stage.waiting is None else _join(stage.waiting, drawn)
        while len(waiting.labels) >= self.batch_size:
            self._attack(stage, _select(waiting, slice(self.batch_size)))
            waiting = _select(waiting, slice(self.batch_size, None))
        stage.waiting = waiting

    def _finish(self, stage: _Stage) -> None:
        if stage.waiting is not None and len(stage.waiting.labels):
            self._attack(stage, stage.waiting)
        for later in stage.later:
            self._finish(later)

    def _attack(self, stage: _Stage, drawn: Drawn) -> None:
        self.bar.set_description(stage.name, refresh=False)
        images, labels = _pixels(drawn).to(self.device), drawn.labels.to(self.device)
        keys = image_keys(self.seed, 0, drawn.indices.to(self.device))
        adversarial = stage.attack(self.model, images, labels, keys, until_broken=True).detach().float()
        allowed = _allowed(adversarial, images, stage.attack)
        if not allowed.all() and not stage.rejected:
            logger.warning(
                "%s: %s moved images out of [0, 1] or its ball; they do not count as broken.", stage.name, stage.attack
            )
        stage.rejected += int((~allowed).sum())
        # An attack may search as it likes, the verdict is taken here; an image that left the ball is judged as if clean
        adversarial = torch.where(allowed.view(-1, *[1] * (images.ndim - 1)), adversarial, images)
        predicted = self._predict(adversarial, drawn.indices, f"the images of {stage.name}").cpu()
        broken = predicted != drawn.labels
        stage.standing += drawn.indices[~broken].tolist()
        if stage in self.pictured:
            self._picture(drawn, images.cpu(), adversarial.cpu(), predicted, broken, stage.name)
        for later in stage.later:
            self._put(later, _select(drawn, ~broken))
        self.bar.update(len(broken) + int(broken.sum()) * (stage.verdicts - 1))

    def _predict(self, images: Tensor, indices: Tensor, what: str) -> Tensor:
        with torch.no_grad():
            logits = self.model(images)
        expected = (len(images), len(self.data.label_names))
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"expected logits {list(expected)} for {expected[0]} images of {expected[1]} classes, got {got}; wrap the model "
                "in a module that returns one logit per class of the data."
            )
        infinite = indices[~logits.isfinite().all(1).cpu()].tolist()
        if infinite:
            shown = ", ".join(map(str, infinite[:5])) + (f" and {len(infinite) - 5} more" if len(infinite) > 5 else "")
            raise ValueError(
                f"expected finite logits, got NaN or infinite ones on {what} with index {shown}; check the weights and the "
                "normalisation inside the model."
            )
        return logits.argmax(1)

    # Pictures

    def _pictured(self) -> list[_Stage]:
        """The stages whose images are shown: those of the last attack in the first threat model."""
        norm, eps = _threats(self.stages)[0]
        last = [stage for stage in self.stages.values() if (stage.attack.norm, stage.attack.eps) == (norm, eps)][-1]
        return [stage for stage in self.stages.values() if stage is last or _continues(last.attack, stage.attack)]

    def _picture(self, drawn: Drawn, images: Tensor, adversarial: Tensor, predicted: Tensor, broken: Tensor, attack: str) -> None:
        """Keep a few broken images, of different classes if possible."""
        if images.shape[1] not in (1, 3):
            return
        for i in broken.nonzero().flatten().tolist():
            if len(self.of_new_class) == NUM_SAMPLES:
                return
            label, pictures = int(drawn.labels[i]), (images[i].clone().numpy(), adversarial[i].clone().numpy())
            sample = Sample(int(drawn.indices[i]), label, int(predicted[i]), attack, *pictures)
            if label not in self.of_new_class:
                self.of_new_class[label] = sample
            elif len(self.spare) < NUM_SAMPLES:
                self.spare.append(sample)

    # Result

    def report(self, context: dict[str, Any], description: dict[str, Any], environment: dict[str, Any]) -> Report:
        indices, labels = np.array(self.indices), np.array(self.labels)
        correct = {"clean": np.array(self.correct)}
        correct |= {name: np.isin(indices, stage.standing) for name, stage in self.stages.items()}
        worst_case, standing = {}, {}
        for norm, eps in _threats(self.stages):
            # an image of a smaller ball lies in this one too
            names = [name for name, stage in self.stages.items() if stage.attack.norm == norm and stage.attack.eps <= eps]
            threat = f"{norm} {eps_text(norm, eps)}"
            standing[threat] = np.logical_and.reduce([correct[name] for name in names])
            counts = {"correct": int(standing[threat].sum()), "num_images": len(labels)}
            worst_case[threat] = WorstCase(**counts, norm=norm, eps=eps, attacks=tuple(names))
        robust = next(iter(standing.values()))
        return Report(
            context=context,
            data=description,
            split=str(description.get("split", "not stated")),
            num_images=len(labels),
            complete=not self.more,
            seed=self.seed,
            label_names=tuple(map(str, self.data.label_names)),
            clean=Accuracy(int(correct["clean"].sum()), len(labels)),
            attacks={
                name: AttackResult(int(correct[name].sum()), len(labels), attack=self.configs[name], rejected=stage.rejected)
                for name, stage in self.stages.items()
            },
            worst_case=worst_case,
            curve=self._curve_result(),
            per_class=tuple(
                ClassAccuracy(
                    str(name),
                    int((labels == label).sum()),
                    int(correct["clean"][labels == label].sum()),
                    int(robust[labels == label].sum()),
                )
                for label, name in enumerate(self.data.label_names)
            ),
            environment=environment,
            verdicts=Verdicts(indices, labels, correct),
            samples=tuple(sorted((*self.of_new_class.values(), *self.spare)[:NUM_SAMPLES], key=lambda sample: sample.index)),
        )

    def _curve_result(self) -> Curve | None:
        if not self.curve_eps:
            return None
        num = min(len(self.labels), self.curve_images)
        counts = (sum(self.correct[:num]), *(len(stage.standing) for stage in self.curve))
        norm, eps = _threats(self.stages)[0]
        radius = min(eps if norm == "Linf" else 8 / 255, self.curve_eps[-1])
        attack = to_dict(self.curve[0].attack)
        stated = {key: attack[key] for key in ("name", "steps", "random_start", "restarts")} | {"step_size": "eps / 4"}
        return Curve("Linf", tuple(self.curve_eps), counts, num, stated, radius)


def curve_attack(eps: float) -> PGD:
    """PGD-20 whose step is a quarter of the radius."""
    return PGD(eps=eps, step_size=eps / 4, steps=20)


def _chain(stages) -> list[_Stage]:
    """Put stages behind those they continue; returns the ones that begin with clean images."""
    first = []
    for stage in stages:
        shorter = [other for other in stages if _continues(stage.attack, other.attack)]
        if shorter:
            max(shorter, key=lambda other: other.attack.steps).later.append(stage)
        else:
            first.append(stage)
    return first


def _continues(attack: Attack, shorter: Attack) -> bool:
    """Whether ``attack`` is ``shorter`` with more steps.

    An image's random start depends on its key alone and no step depends on the number of steps, so the longer attack passes
    through the shorter one's iterates. It breaks what that breaks and needs to run on the survivors only.
    """
    if not (type(attack) is type(shorter) is PGD) or attack.restarts > 1:
        return False
    return attack.steps > shorter.steps and replace(attack, steps=shorter.steps) == shorter


def _threats(stages: Mapping[str, _Stage]) -> list[tuple[str, float]]:
    """Norms and radii of the attacks, Linf first."""
    threats = dict.fromkeys((stage.attack.norm, stage.attack.eps) for stage in stages.values())
    return sorted(threats, key=lambda threat: threat[0] != "Linf")


def _allowed(adversarial: Tensor, images: Tensor, attack: Attack) -> Tensor:
    """Whether each image is in [0, 1] and in the ball, up to rounding. [B, C, H, W] -> [B]."""
    pixels, delta = adversarial.flatten(1), (adversarial - images).flatten(1)
    size = delta.norm(dim=1, p=math.inf if attack.norm == "Linf" else 2)
    return (size <= attack.eps + 1e-5 * max(attack.eps, 0.1)) & (pixels.amin(1) >= 0) & (pixels.amax(1) <= 1)


def _pixels(drawn: Drawn) -> Tensor:
    """Images in [0, 1], checked."""
    images = drawn.images
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"expected images as uint8 or floats in [0, 1], got {images.dtype}; convert them.")
    outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)  # also where a pixel is NaN
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"expected images in [0, 1], got image {int(drawn.indices[i])} with values in [{images[i].min():.3g}, "
            f"{images[i].max():.3g}]; leave out the normalisation of the data (it belongs into the model) and divide by 255."
        )
    return images.float()


def _select(drawn: Drawn, chosen: Tensor | slice) -> Drawn:
    return Drawn(drawn.images[chosen], drawn.labels[chosen], drawn.indices[chosen], drawn.epoch)


def _join(*parts: Drawn) -> Drawn:
    images, labels, indices, epochs = zip(*parts, strict=True)
    return Drawn(torch.cat(images), torch.cat(labels), torch.cat(indices), epochs[0])


def _check_model(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"expected a model in eval mode, got {len(training)} modules in train mode ({', '.join(training[:3])}); call "
            "model.eval() first."
        )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"expected a model in torch.float32, got {name} in {tensor.dtype}; call model.float() first.")


def _check_arguments(attacks, num_images, curve, curve_images, batch_size) -> None:
    if not attacks:
        raise ValueError("expected at least one attack, got none; leave attacks out for the default ones.")
    if "clean" in attacks:
        raise ValueError('expected another name for the attack "clean": the report uses it for images that aren\'t attacked.')
    for name, value in (("num_images", num_images), ("curve_images", curve_images), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}.")
    if curve is not None and (len(curve) < 2 or curve[0] != 0 or any(b <= a for a, b in pairwise(curve))):
        raise ValueError(f"expected rising radii from 0 for the curve, or None for no curve; got {tuple(curve)}.")


@contextmanager
def _at(device: torch.device, home: torch.device, model: nn.Module) -> Iterator[None]:
    if device == home:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter can get a gradient, whatever an attack does, and the graph keeps nothing for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products and convolutions of fp32 numbers in fp32."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the caller uses the switches of torch 2.9, and torch refuses a mix of both kinds
        switches: Any = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        precisions = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, precision in zip(switches, precisions, strict=True):
                switch.fp32_precision = precision
        return
    if before[0] != "highest":
        torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if before[0] != "highest":
            torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def _environment(device: torch.device, seconds: float) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
        "cartl_hub": version("cartl_hub"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
