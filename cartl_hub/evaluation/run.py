"""Clean and robust accuracy of a model."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import chain, pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attacks import APGD, APGDT, FABT, FGSM, NFGSM, PGD, RFGSM, Attack, Square, Transfer
from ..attacks.attack import DEFAULT_EPS, Norm
from ..config import to_dict
from ..models import Classifier
from ..processes import bar_interval, environment, gather, is_main_process, rank_and_world
from ..randomness import SEEDS
from ..ranges import check_whole
from ..report import (
    Accuracy,
    AttackResult,
    Check,
    ClassAccuracy,
    Curve,
    Report,
    Results,
    Sample,
    Verdicts,
    WorstCase,
    eps_text,
    plain_json,
    threat_text,
)
from ..sampling import evenly_spaced
from ..weights import weights_sha256
from .cascade import BAR, ON_SURVIVORS, Budget, Cascade, Stage, entering, few_of_each_class, lies_in, planned, planned_passes
from .checks import chosen_checks, make_check, second_verdict
from .given import AnyTestData, as_data, sampled
from .journal import open_journal, refuse_other
from .pool import read_pool
from .probes import REPORTED
from .subject import Subject
from .trial import Trial
from .verdict import FEWER, check_model, first_logits, first_look, has_gradient, measuring

logger = logging.getLogger(__name__)

CURVE_EPS = tuple(k / 255 for k in (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64))

Strength = Literal["quick", "standard", "full"]


def default_attacks(
    eps: float | None = None, *, norm: Norm = "Linf", strength: Strength = "standard", beside_l2: float | None = 0.5
) -> dict[str, Attack]:
    """Attacks in one norm, and for Linf also PGD with 20 steps in L2.

    Args:
        eps: Radius in ``norm``, in pixel units of [0, 1]; by default 8/255 in Linf and 0.5 in L2.
        norm: Norm of the attacks.
        strength: "quick": FGSM and PGD with 20 steps. "standard": also PGD with 100 steps, and APGD-T with 30 steps for each of
            3 targets. "full": also APGD-CE, APGD-T and FAB-T of 100 steps for each of 9 targets, and Square of 5,000 queries:
            the attacks of AutoAttack's standard version (Croce and Hein, 2020), so that the worst case, which includes PGD's,
            can be compared with its figure.
        beside_l2: L2 radius of the PGD that runs alongside attacks in Linf; None for none.

    Raises:
        ValueError: On an unknown norm or strength, or a radius out of range.
    """
    if norm not in get_args(Norm) or strength not in get_args(Strength):
        raise ValueError(
            f"expected a norm of {get_args(Norm)} and a strength of {get_args(Strength)}, got {norm!r} and {strength!r}."
        )
    eps = DEFAULT_EPS[norm] if eps is None else eps
    ball: dict[str, Any] = {"eps": eps, "norm": norm}
    pgd = partial(PGD, **ball, step_size=eps / 4 if norm == "Linf" else eps / 8)  # in L2 20 steps can go 2.5 times as far
    attacks: dict[str, Attack] = {"FGSM": FGSM(**ball), "PGD-20": pgd(steps=20)}
    if strength != "quick":
        attacks["PGD-100"] = pgd(steps=100)
    if strength == "standard":
        attacks["APGD-T"] = APGDT(**ball, steps=30, num_targets=3)
    if strength == "full":
        attacks |= {"APGD-CE": APGD(**ball), "APGD-T": APGDT(**ball), "FAB-T": FABT(**ball), "Square": Square(**ball)}
    if norm == "L2":
        return {f"{name} L2": attack for name, attack in attacks.items()}
    if beside_l2 is not None:
        attacks["PGD-20 L2"] = PGD(eps=beside_l2, step_size=beside_l2 / 8, steps=20, norm="L2")
    return attacks


def default_curve(strength: Strength) -> tuple[float, ...] | None:
    """Linf radii at which accuracy is measured: 12 up to 64/255, and none with strength "quick"."""
    return None if strength == "quick" else CURVE_EPS


class EvaluationOptions(TypedDict, total=False):
    """Arguments of :func:`evaluate`, except for what is evaluated."""

    attacks: Mapping[str, Attack] | None
    strength: Strength | None
    num_images: int | None
    curve: Sequence[float] | Literal["auto"] | None
    curve_images: int
    checks: bool | Iterable[str]
    check_images: int
    transfer_source: nn.Module | None
    budget: Budget | None
    resume: str | Path | None
    keep: bool
    batch_size: int
    seed: int
    device: torch.device | str | None
    context: Mapping[str, Any] | None
    progress: bool


def evaluate(
    model: nn.Module,
    data: AnyTestData,
    *,
    attacks: Mapping[str, Attack] | None = None,
    strength: Strength | None = None,
    num_images: int | None = None,
    curve: Sequence[float] | Literal["auto"] | None = "auto",
    curve_images: int = 1000,
    checks: bool | Iterable[str] = True,
    check_images: int = 256,
    transfer_source: nn.Module | None = None,
    budget: Budget | None = None,
    resume: str | Path | None = None,
    keep: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    context: Mapping[str, Any] | None = None,
    source_report: Results | None = None,
    progress: bool = True,
) -> Report:
    """Measure accuracy on clean images and under attacks, in fp32.

    An image counts as robust to an attack if it is classified correctly before and after; one that is wrong before is not
    attacked. FGSM, PGD and attacks of other kinds run on every image that is classified correctly, so that each figure is the
    attack's own; APGD, APGD-T, FAB-T, Square and Transfer run after them, on images that no attack in their ball has broken. What
    an attack returns is verified, and what broke once more at the end of the attack, in another batch: an image that left
    [0, 1] or the ball, or whose second verdict differs, is not broken.

    Under ``torchrun`` or ``accelerate launch``, every process calls this with the same arguments, takes its share of the
    batches, and returns the same report.

    Args:
        model: Any module in eval mode from images in [0, 1] to logits [B, K], with K classes as in ``data``.
        data: Data from :func:`cartl_hub.load_splits`, a PyTorch ``DataLoader`` or ``Dataset``, or images [N, C, H, W] in
            [0, 1] (or uint8) and labels [N]. Read once, from front to back; what isn't in memory is kept in a temporary file.
        attacks: Attacks by name, which the report shows; by default :func:`default_attacks`. The cheapest runs first.
        strength: Strength of the default attacks: "quick", "standard" (the same as None) or "full". Not with ``attacks``.
        num_images: Number of images to measure, the same ones each time: each class in proportion, smaller samples inside
            larger ones; evenly spaced if a PyTorch data set has no ``targets``; the first ones of a stream, or of a loader with
            its own order.
        curve: Linf radii, from 0 upwards, at which PGD-20 measures accuracy against radius; None for none. "auto": 12 radii up to
            64/255, but none with strength "quick".
        curve_images: Number of images that the curve is measured on, evenly spaced over those that are measured.
        checks: Whether to run :func:`cartl_hub.run_checks` too, or the names of the checks to make.
        check_images: Number of images that checks are made on, evenly spaced too.
        transfer_source: Another model, for the check that its adversarial images break no more than the attacks.
        budget: Time and passes that the evaluation may take. Clean accuracy and the cheapest attack of the first threat model
            are always measured; the rest is done in this order until the budget is spent: the other attacks on every image,
            checks, curve, the attacks on survivors, APGD-CE before APGD-T before Square, and the check of all attacks. The report
            says what was left out.
        resume: Folder in which finished batches are kept. If it holds batches of the same evaluation, that one is resumed;
            those of another, finished one are replaced. Several machines must share it.
        keep: Keep each adversarial image that broke the model in that folder. Otherwise those of an attack are deleted after
            their second verdict, except for a few.
        batch_size: Number of images attacked at once.
        seed: Seed of the random starts; an image's start doesn't depend on the batch it is in.
        device: Device to run on; by default the model's. The model is moved back afterwards.
        context: Description of the model for the report, e.g. "id", "revision", "method", "notes", "command"; JSON.
        source_report: Report of the source that the model was fine-tuned from, to show alongside.
        progress: Show a progress bar.

    Raises:
        ValueError: If the model is in train mode or not in fp32, if its logits have another shape, aren't finite, depend on the
            other images of a batch, or have no gradient for an attack that needs one; if images are outside [0, 1] or labels
            outside the classes, if there are no images; or if ``resume`` holds another evaluation.
    """
    if attacks is not None and strength is not None:
        raise ValueError(f"expected attacks or their strength, got both (strength={strength!r}); leave one out.")
    attacks = default_attacks(strength=strength or "standard") if attacks is None else _by_name(attacks)
    check_names = chosen_checks(checks)
    if curve == "auto":
        curve = default_curve(strength or "standard")
    curve = None if curve is None else tuple(map(float, curve))
    check_model(model)
    _check_arguments(attacks, num_images, curve, curve_images, check_images, batch_size, seed, resume, keep)
    test, num_images = sampled(as_data(data, model, batch_size), num_images)
    _refuse_other_order(model, test.label_names)
    stated, description = plain_json(context or {}, "context"), plain_json(test.description, "description of the data")
    if isinstance(model, Classifier):
        stated.setdefault("weights_sha256", weights_sha256(model))
    num_classes = len(test.label_names)
    identity = {
        "format": 2,
        "cartl_hub": version("cartl_hub"),
        "weights": weights_digest(model),
        "label_names": list(map(str, test.label_names)),
        "attacks": [[stage.name, _config(stage) | _source(stage.attack)] for stage in planned(attacks)],
        "curve": None if curve is None else list(curve),
        "curve_images": curve_images,
        "check_images": check_images,
        "transfer_source": None if transfer_source is None else weights_digest(transfer_source),
        "seed": seed,
    }
    if len(set(gather(json.dumps(identity)))) > 1:
        raise ValueError("expected the same model, attacks and settings in all processes, got others in some of them.")
    if resume is not None:
        refuse_other(resume, identity)  # before the data are read, which may take long
    with ExitStack() as stack:
        device, counter = stack.enter_context(measuring(model, device))
        others = [attack.source for attack in attacks.values() if isinstance(attack, Transfer)]
        for other in (*others, *([] if transfer_source is None else [transfer_source])):
            stack.enter_context(measuring(other, device))
        bar = stack.enter_context(_bar(progress))
        look = partial(first_look, model, num_classes, device)
        pool = stack.enter_context(read_pool(test, num_images, batch_size, look))
        _refuse_without_gradient(model, pool.get(torch.arange(1), device), attacks, curve)
        if resume is not None:  # weights don't show what a model does with them
            identity["logits"] = first_logits(model, pool.get(torch.arange(min(FEWER, len(pool))), device))
        journal = stack.enter_context(open_journal(resume, identity | {"images": pool.digest}))
        subject = Subject(model, pool, num_classes, seed, batch_size, device)
        cascade = Cascade(subject, journal, counter, bar, budget=budget or Budget(), keep_images=keep)
        run = _Run(cascade, attacks, curve, curve_images)
        trial = Trial(subject, check_images, eps=run.eps, norm=run.norm, source=transfer_source)
        run.measure(check_names, trial)
        journal.finished = not (keep or run.dropped)
        report = run.report(
            context=stated,
            source=source_report,
            data=description | {"pixels": {"sha256": pool.digest, "shape": list(pool.images.shape[1:])}},
            split=str(description.get("split", "not stated")),
            seed=seed,
            label_names=tuple(map(str, test.label_names)),
            environment=environment(device, cascade.seconds),
        )
    if report.mistrust and is_main_process():
        logger.warning(report.mistrust)
    return report


class _Run:
    """The stages of one evaluation, and the report of them."""

    def __init__(self, cascade: Cascade, attacks: Mapping[str, Attack], curve: Sequence[float] | None, curve_images: int):
        self.cascade, self.pool = cascade, cascade.subject.pool
        self.clean, self.stages = Stage("clean", "clean images"), planned(attacks)
        self.threats = _threats(list(attacks.values()))
        self.norm, self.eps = self.threats[0]
        self.radii = tuple(curve or ())
        self.on_curve = np.zeros(len(self.pool), dtype=bool)
        self.on_curve[evenly_spaced(curve_images, len(self.pool))] = True
        self.curve = [
            Stage(f"curve{place:03d}", f"curve at {eps_text('Linf', eps)}", curve_attack(eps))
            for place, eps in enumerate(self.radii[1:], 1)
        ]
        self.own: set[str] = set()  # attacks that ran on every image
        self.checks: dict[str, Check] = {}
        self.unchecked: list[str] = []

    # Measure

    def measure(self, check_names: Sequence[str], trial: Trial) -> None:
        """Clean images, attacks on every image, checks, curve, attacks on survivors, and the check of all attacks."""
        every = np.ones(len(self.pool), dtype=bool)
        self._run(self.clean, every, always=True)
        self.correct = self.clean.standing
        for stage in self.stages:
            if not isinstance(stage.attack, ON_SURVIVORS):
                self._attack(stage)
        self._check([name for name in check_names if name != REPORTED], trial)
        standing = self.correct & self.on_curve
        for stage in self.curve:
            self._run(stage, standing)
            standing = stage.standing
        for stage in self.stages:
            if isinstance(stage.attack, ON_SURVIVORS):
                self._attack(stage)
        if REPORTED in check_names:
            trial.reported = self._standing(self.norm, self.eps)
            self._check([REPORTED], trial)

    def _attack(self, stage: Stage) -> None:
        assert stage.attack is not None
        earlier = [other for other in self.stages if other.entering is not None]
        images, own = entering(stage.attack, earlier, self.correct)
        measured = any(other.finished and other.threat == threat_text(*self.threats[0]) for other in earlier)
        self._run(stage, images, always=not measured)
        if own and stage.finished:
            self.own.add(stage.name)

    def _run(self, stage: Stage, images: np.ndarray, *, always: bool = False) -> None:
        waiting = [other for other in (*self.stages, *self.curve) if other is not stage and other.entering is None]
        later = sum(planned_passes(other.attack) * int(self._still(other, images).sum()) for other in waiting)
        self.cascade.run(stage, images, always=always, later=later)

    def _still(self, stage: Stage, images: np.ndarray) -> np.ndarray:
        """Images on which a stage may have to run, as far as it is known while another one runs on ``images``, bool [N]."""
        correct = self.correct if self.clean.entries else images
        if stage in self.curve:
            return next((smaller.standing for smaller in reversed(self.curve) if smaller.begun), correct & self.on_curve)
        assert stage.attack is not None
        return entering(stage.attack, [other for other in self.stages if other.begun], correct)[0]

    def _check(self, names: Sequence[str], trial: Trial) -> None:
        found = self.cascade.check(names, lambda name: asdict(make_check(name, trial)))
        left_out = {"status": "skipped", "figures": {}, "meaning": "Left out: the budget was spent."}
        self.checks |= {name: Check(**found.get(name, {"name": name} | left_out)) for name in names}
        self.unchecked += [name for name in names if name not in found]

    def _inside(self, norm: str, eps: float) -> list[Stage]:
        """Attacks that have begun in a ball; an image of a smaller one lies in it too."""
        return [stage for stage in self.stages if stage.begun and lies_in(stage.attack, norm, eps)]

    def _standing(self, norm: str, eps: float) -> np.ndarray:
        """Images that no attack in a ball broke, bool [N]."""
        return np.logical_and.reduce([self.correct, *(stage.standing for stage in self._inside(norm, eps))])

    @property
    def dropped(self) -> list[str]:
        """Parts that the budget left out, in words."""
        words = []
        for stage in self.stages:
            if stage.entering is None or not stage.begun:
                words.append(f"{stage.name}: not run")
            elif not stage.finished:
                words.append(f"{stage.name}: run on {stage.attacked.sum():,} of {stage.entering.sum():,} images")
        if self.unchecked:
            words.append(f"checks: {', '.join(self.unchecked)} not made")
        radii = self._measured_radii()
        if len(radii) < len(self.radii):
            words.append(f"curve: not measured beyond {eps_text('Linf', radii[-1])}" if len(radii) > 1 else "curve: not measured")
        return words

    # Report

    def report(self, *, source: Results | None, **stated: Any) -> Report:
        begun = [stage for stage in self.stages if stage.begun]
        correct = {"clean": self.correct} | {stage.name: stage.standing for stage in begun}
        worst_case, standing = {}, {}
        for norm, eps in self.threats:
            title = threat_text(norm, eps)
            if not any(stage.threat == title for stage in begun):
                continue
            standing[title] = self._standing(norm, eps)
            inside = tuple(stage.name for stage in self._inside(norm, eps))
            counts = {"correct": int(standing[title].sum()), "num_images": len(self.pool)}
            worst_case[title] = WorstCase(**counts, norm=norm, eps=eps, attacks=inside)
        robust, labels = next(iter(standing.values())), self.pool.labels.numpy()
        names = stated["label_names"]
        judged = [stage for stage in (*begun, *self.curve) if stage.again]
        unconfirmed = {stage.name: int(stage.unconfirmed.sum()) for stage in judged}
        verdicts = sum(len(entry.positions) for stage in judged for entry in stage.again)
        again = second_verdict(unconfirmed, verdicts, len(self.pool))
        return Report(
            **stated,
            num_images=len(self.pool),
            complete=self.pool.complete and "sampled_from" not in stated["data"],
            clean=Accuracy(int(self.correct.sum()), len(self.pool)),
            attacks={stage.name: self._result(stage) for stage in begun},
            worst_case=worst_case,
            curve=self._curve_result(),
            per_class=tuple(
                ClassAccuracy(name, *(int((labels == label)[chosen].sum()) for chosen in (slice(None), self.correct, robust)))
                for label, name in enumerate(names)
            ),
            verdicts=Verdicts(self.pool.indices.numpy(), labels, correct),
            checks=(*self.checks.values(), again),
            dropped=tuple(self.dropped),
            samples=self._samples(),
            # a robust accuracy that can't be trusted stands beside no other
            source=None if source is None or source.failed_checks else source.as_source(next(iter(worst_case))),
        )

    def _result(self, stage: Stage) -> AttackResult:
        entries = (*stage.entries, *stage.again)
        return AttackResult(
            int(stage.standing.sum()),
            len(self.pool),
            _config(stage),
            int(stage.attacked.sum()),
            rejected=sum(entry.rejected for entry in entries),
            alone=stage.name in self.own,
            seconds=round(sum(entry.seconds for entry in entries), 1),
            passes=sum(entry.passes for entry in entries),
        )

    def _measured_radii(self) -> tuple[float, ...]:
        """Radii of the curve up to the last one that was measured on all of its images."""
        measured = list(takewhile(lambda stage: stage.finished, self.curve))
        return self.radii[: len(measured) + 1]

    def _curve_result(self) -> Curve | None:
        radii = self._measured_radii()
        if len(radii) < 2:
            return None
        num = int(self.on_curve.sum())
        counts = int((self.correct & self.on_curve).sum()), *(int(stage.standing.sum()) for stage in self.curve[: len(radii) - 1])
        mean_eps = min(self.eps if self.norm == "Linf" else 8 / 255, radii[-1])
        attack = to_dict(curve_attack(radii[-1]))
        stated = {key: attack[key] for key in ("name", "steps", "random_start", "restarts")} | {"step_size": "eps / 4"}
        return Curve("Linf", radii, counts, num, stated, mean_eps)

    def _samples(self) -> tuple[Sample, ...]:
        """A few images of the attack that broke most in the first threat model, of different classes as far as possible."""
        stage = max(reversed(self._inside(self.norm, self.eps)), key=lambda stage: stage.broken.sum())
        at = few_of_each_class(stage.broken, self.pool.labels)
        if not len(at) or self.pool.images.shape[1] not in (1, 3):
            return ()
        images = self.pool.get(at, torch.device("cpu")).numpy()
        adversarial = self.cascade.journal.images(stage.key, stage.entries, at).numpy()
        predicted = {int(p): int(q) for entry in stage.entries for p, q in zip(entry.positions, entry.predicted, strict=True)}
        return tuple(
            Sample(int(self.pool.indices[p]), int(self.pool.labels[p]), predicted[int(p)], stage.name, image, changed)
            for p, image, changed in zip(at, images, adversarial, strict=True)
        )


def curve_attack(eps: float) -> PGD:
    """PGD-20 whose step is a quarter of the radius."""
    return PGD(eps=eps, step_size=eps / 4, steps=20)


def weights_digest(model: nn.Module) -> str:
    """Hash of the class, the parameters and the buffers of a model."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _config(stage: Stage) -> dict[str, Any]:
    return plain_json(to_dict(stage.attack), stage.name)


def _source(attack: Attack | None) -> dict[str, Any]:
    return {"source": weights_digest(attack.source)} if isinstance(attack, Transfer) else {}


def _threats(attacks: Sequence[Attack]) -> list[tuple[Norm, float]]:
    """Norms and radii of the attacks, Linf first; of radii that read the same, the largest."""
    threats: dict[str, tuple[Norm, float]] = {}
    for attack in sorted(attacks, key=lambda attack: attack.eps):
        threats[threat_text(attack.norm, attack.eps)] = attack.norm, attack.eps
    order = {threat_text(attack.norm, attack.eps): None for attack in attacks}
    return sorted((threats[title] for title in order), key=lambda threat: threat[0] != "Linf")


def _bar(progress: bool) -> tqdm:
    shown = {} if progress and rank_and_world()[0] == 0 else {"disable": True}
    return tqdm(desc="reading", total=0, bar_format=BAR.format(left=""), dynamic_ncols=True, mininterval=bar_interval(), **shown)


def _by_name(attacks: Any) -> dict[str, Attack]:
    if not isinstance(attacks, Mapping) or not all(isinstance(name, str) for name in attacks):
        raise TypeError(f"expected attacks by name, such as {{'PGD-20': PGD(...)}}, got {attacks!r:.200}.")
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise TypeError(
                f"expected an attack for {name!r}, such as PGD(...) or one of your own that derives from "
                f"cartl_hub.Attack and has perturb, got {attack!r:.200}."
            )
    return dict(attacks)


def _check_arguments(attacks, num_images, curve, curve_images, check_images, batch_size, seed, resume, keep) -> None:
    if not attacks:
        raise ValueError("expected at least one attack, got none; leave attacks out for the default ones.")
    if any(isinstance(attack, NFGSM) for attack in attacks.values()):
        raise ValueError("expected attacks that stay in their ball, got NFGSM, which is for training; use FGSM or PGD.")
    if reserved := {"clean", "index", "label"} & attacks.keys():
        raise ValueError(f'expected another name for the attack "{min(reserved)}": the report has a column of that name.')
    counts = {"num_images": num_images, "curve_images": curve_images, "check_images": check_images, "batch_size": batch_size}
    for name, value in counts.items():
        if value is not None:
            check_whole(name, value, (">=", 1))
    check_whole("seed", seed, (">=", SEEDS[0]), ("<=", SEEDS[1]))
    if curve is not None and (len(curve) < 2 or curve[0] != 0 or not all(b > a for a, b in pairwise(curve))):
        raise ValueError(f"expected rising radii from 0 for the curve, or None for no curve; got {tuple(curve)}.")
    if keep and resume is None:
        raise ValueError("expected resume=, the folder to keep, with keep=True; got none.")


def _refuse_other_order(model: nn.Module, label_names: Sequence[str]) -> None:
    """Refuse a model with its classes in another order: a class that both know must have the same position."""
    own = {name: position for position, name in enumerate(getattr(model, "label_names", None) or ())}
    for position, name in enumerate(map(str, label_names)):
        if own.get(name, position) != position:
            raise ValueError(
                f"expected {name!r} as class {own[name]}, as in the model's label_names, got data in which it is {position}; "
                "read them in its order with load_test_split(..., label_names=model.label_names)."
            )


def _refuse_without_gradient(model: nn.Module, images: Tensor, attacks: Mapping[str, Attack], curve: Any) -> None:
    climbing = [name for name, attack in attacks.items() if isinstance(attack, (FGSM, RFGSM, PGD, APGD, APGDT))]
    if (climbing or curve) and not has_gradient(model, images):
        raise ValueError(
            f"expected logits with a gradient in the pixels for {', '.join(climbing) or 'the curve'}, got logits without one: a "
            "step such as argmax, .detach() or torch.no_grad() cuts it. Attack the model without that step, or pass attacks that "
            "need no gradient (Square, Noise) and curve=None."
        )
