"""What was measured of a model, as data: counts, their intervals, verdicts per image, and all of it as JSON.

The JSON is described by ``report.schema.json``.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from ..config import to_dict
from .reading import SCHEMA, SCHEMA_VERSION, damaged, read_content

DRAWN = tuple(f"{name}.{kind}" for name in ("robustness", "curve", "classes") for kind in ("png", "svg"))
FILES = ("report.html", *DRAWN, "samples.png", "curve.csv", "per_image.csv", "report.json")  # all that a report can write


def wilson_interval(correct: int, num_images: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927), in [0, 1]; (0, 1) for no images."""
    if not num_images:
        return 0.0, 1.0
    z = 1.959963984540054
    share, weight = correct / num_images, z * z / num_images
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / num_images + weight / (4 * num_images)) / (1 + weight)
    # at the ends rounding would exclude what was measured
    return (0.0 if correct == 0 else middle - half), (1.0 if correct == num_images else middle + half)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, num_samples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images, with its 95% bootstrap interval over images.

    Args:
        a: Verdicts, bool [N].
        b: Verdicts on the same images in the same order.
        num_samples: Bootstrap samples.
        seed: Of the samples.

    Returns:
        Accuracy of ``a`` minus that of ``b``, and the ends of the interval, in [-1, 1].

    Raises:
        ValueError: If the verdicts can't be paired.
    """
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"expected verdicts on the same images, [N] each with N >= 1; got {list(a.shape)} and {list(b.shape)}.")
    won, lost = int((a & ~b).sum()), int((b & ~a).sum())
    # resampling images is drawing from three kinds of them
    counts = np.random.default_rng(seed).multinomial(len(a), np.array([won, lost, len(a) - won - lost]) / len(a), num_samples)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / len(a), [0.025, 0.975])
    return (won - lost) / len(a), float(low), float(high)


def eps_text(norm: str, eps: float) -> str:
    """A radius as people write it: "8/255" for Linf, where it is a whole number of grey levels."""
    levels = round(eps * 255)
    whole = norm == "Linf" and levels > 0 and abs(eps * 255 - levels) < 1e-4
    return f"{levels}/255" if whole else f"{eps:.4g}"


def threat_text(norm: str, eps: float) -> str:
    """E.g. "Linf 8/255"."""
    return f"{norm} {eps_text(norm, eps)}"


def plain_json(value: Any, what: str) -> Any:
    """The value as JSON gives it back.

    Raises:
        ValueError: If JSON can't hold it; the message names ``what``.
    """
    try:
        return json.loads(json.dumps(to_dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected JSON (text, finite numbers, lists, mappings) in the {what}: {error}.") from error


@dataclass(frozen=True)
class Accuracy:
    """Share of images that are classified correctly."""

    correct: int
    num_images: int

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval, in [0, 1]."""
        return wilson_interval(self.correct, self.num_images)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.interval_text})"

    @property
    def interval_text(self) -> str:
        """E.g. "52.2 to 54.2%"."""
        low, high = map(_percent, self.interval)
        return f"{low} to {high}%"


def _percent(share: float) -> str:
    """With one digit, and more where that would read 0 or 100 without being it."""
    digits = next((digits for digits in (1, 2, 3) if round(100 * share, digits) not in (0, 100)), 1)
    return f"{100 * share:.{digits}f}"


@dataclass(frozen=True)
class AttackResult(Accuracy):
    """Share of images that stand after an attack: classified correctly before it, and broken neither by it nor by an attack
    that ran before it on the same images.

    Args:
        attack: Its settings, with its class under "name".
        attacked: Images that it ran on.
        rejected: Images that it moved out of [0, 1] or the ball; they count as not broken.
        alone: The figure is the attack's own, as it had every correctly classified image; a longer run of the same attack has
            the shorter one's result and needs only the images that stood it. Otherwise it ran on what other attacks had left,
            and the figure is cumulative.
        seconds: Wall time.
        passes: Images that went through the model, with or without a gradient.
    """

    attack: dict[str, Any]
    attacked: int
    rejected: int = 0
    alone: bool = True
    seconds: float | None = field(default=None, compare=False)
    passes: int | None = None

    @property
    def threat(self) -> str:
        """E.g. "Linf 8/255"."""
        return threat_text(self.attack["norm"], self.attack["eps"])

    @property
    def settings(self) -> str:
        """Everything but the threat model, for people."""
        shown = {key: value for key, value in self.attack.items() if key not in ("name", "norm", "eps")}
        if "step_size" in shown:
            shown["step_size"] = eps_text(self.attack["norm"], shown["step_size"])
        return ", ".join(f"{key.replace('_', ' ')} {text(value)}" for key, value in shown.items()) or "one step"


@dataclass(frozen=True)
class WorstCase(Accuracy):
    """Share of images that no attack of a threat model broke.

    Args:
        norm: Of the ball.
        eps: Its radius, in pixel units of [0, 1].
        attacks: Names of the attacks in it; those of smaller radius belong to it.
    """

    norm: str
    eps: float
    attacks: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy against the radius of an attack.

    Args:
        norm: Of the ball.
        eps: Radii, from 0 upwards.
        correct: Images that stood every radius up to this one.
        num_images: That it was measured on, evenly spaced over those of the report.
        attack: Its settings.
        mean_eps: Radius up to which the mean is taken.
    """

    norm: str
    eps: tuple[float, ...]
    correct: tuple[int, ...]
    num_images: int
    attack: dict[str, Any]
    mean_eps: float

    @property
    def accuracy(self) -> tuple[float, ...]:
        return tuple(correct / self.num_images for correct in self.correct)

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """95% Wilson interval at each radius."""
        return [wilson_interval(correct, self.num_images) for correct in self.correct]

    @property
    def mean_eps_text(self) -> str:
        """E.g. "8/255"."""
        return eps_text(self.norm, self.mean_eps)

    @property
    def mean(self) -> float:
        """Mean over [0, ``mean_eps``] by the trapezoid rule: "expected robustness" (Ngnawe et al., ICLR 2026)."""
        inner = [eps for eps in self.eps if eps < self.mean_eps]
        radii = np.array([*inner, self.mean_eps])
        heights = np.interp(radii, self.eps, self.accuracy)
        if self.mean_eps == 0:
            return float(heights[0])
        return float((np.diff(radii) * (heights[1:] + heights[:-1]) / 2).sum() / self.mean_eps)


@dataclass(frozen=True)
class ClassAccuracy:
    """Counts of one class: its images, those right when clean, those that no attack of the first threat model broke."""

    name: str
    num_images: int
    clean_correct: int
    robust_correct: int

    @property
    def clean(self) -> Accuracy:
        return Accuracy(self.clean_correct, self.num_images)

    @property
    def robust(self) -> Accuracy:
        return Accuracy(self.robust_correct, self.num_images)


@dataclass(frozen=True)
class Check:
    """Whether the numbers can be trusted, from one point of view.

    Args:
        name: Of the check.
        status: What came out; "skipped" if it could not be made, or a budget left it out.
        figures: Numbers it rests on; JSON.
        meaning: A sentence for people.
        remedy: What to do; empty where nothing is to be done.
        num_images: That it was made on.
    """

    name: str
    status: Literal["pass", "warn", "fail", "skipped"]
    figures: dict[str, Any]
    meaning: str
    remedy: str = ""
    num_images: int = 0


@dataclass(frozen=True)
class SourceResult:
    """What the report of the source says, from which the model was fine-tuned.

    Args:
        id: Of the source.
        data: Id of the data that the source was measured on.
        threat: Threat model of its robust accuracy, e.g. "Linf 8/255".
        clean: On images that aren't attacked.
        robust: In the worst case of the threat model.
        attacks: That its robust accuracy stands against.
    """

    id: str
    data: str
    threat: str
    clean: Accuracy
    robust: Accuracy
    attacks: tuple[str, ...]

    @property
    def num_images(self) -> int:
        return self.clean.num_images

    @classmethod
    def from_results(cls, source: "Results", threat: str | None = None) -> Self:
        """From the source's own report.

        Args:
            source: Its report.
            threat: That of the target's headline; the source's own headline where its report doesn't know that one.
        """
        threat = threat if threat in source.worst_case else source.threat
        worst = source.worst_case[threat]
        robust = Accuracy(worst.correct, worst.num_images)
        return cls(source.title, str(source.data.get("id", "not stated")), threat, source.clean, robust, worst.attacks)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Per image, in the order in which they were read.

    Args:
        indices: Position in the data, int64 [N].
        labels: True classes, int64 [N].
        correct: "clean" and each attack to bool [N]: classified correctly, for attacks also after it and those before it on
            the same images.
    """

    indices: np.ndarray
    labels: np.ndarray
    correct: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Sample:
    """An image that an attack broke.

    Args:
        index: Position in the data.
        label: True class, which is what the model says of the clean image.
        predicted: Class that the model sees in the adversarial image.
        attack: Name of the attack.
        image: [C, H, W] in [0, 1].
        adversarial: [C, H, W] in [0, 1].
    """

    index: int
    label: int
    predicted: int
    attack: str
    image: np.ndarray
    adversarial: np.ndarray

    @property
    def perturbation(self) -> np.ndarray:
        """Stretched to [0, 1]; 0.5 is no change."""
        delta = self.adversarial - self.image
        return 0.5 + delta / max(2 * float(np.abs(delta).max()), 1e-12)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured of a model; :class:`cartl_hub.report.Report` adds what people look at.

    Args:
        context: What the caller says of the model: "id", "revision", "method", "notes" (a list), "command", ...
        data: Description of the data set.
        split: That was measured on.
        num_images: That were measured on.
        complete: Whether that is all of the data; otherwise its first images, or a stratified sample where ``data`` says
            "sampled_from" how many.
        seed: Of the random starts.
        label_names: Name of each class.
        clean: On images that aren't attacked.
        attacks: By name, in the order in which they ran.
        worst_case: By threat model, e.g. "Linf 8/255"; the first is the headline.
        curve: Accuracy against radius.
        per_class: In the order of the classes; robust under the first threat model.
        environment: Versions, device, threads, seconds, date.
        verdicts: Per image.
        checks: Of the numbers.
        source: The source's own figures, where the model was fine-tuned from a source with a report.
        dropped: What a budget left out, in words.
        samples: Images to look at; they are in the files for people alone, loaded results have none.
    """

    context: dict[str, Any]
    data: dict[str, Any]
    split: str
    num_images: int
    complete: bool
    seed: int
    label_names: tuple[str, ...]
    clean: Accuracy
    attacks: dict[str, AttackResult]
    worst_case: dict[str, WorstCase]
    curve: Curve | None
    per_class: tuple[ClassAccuracy, ...]
    environment: dict[str, Any]
    verdicts: Verdicts = field(repr=False, compare=False)
    checks: tuple[Check, ...] = ()
    source: SourceResult | None = None
    dropped: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = field(default=(), repr=False, compare=False)

    @property
    def threat(self) -> str:
        """Threat model of the headline, e.g. "Linf 8/255"."""
        return next(iter(self.worst_case))

    @property
    def robust(self) -> WorstCase:
        """The headline: robust accuracy in the first threat model."""
        return self.worst_case[self.threat]

    @property
    def title(self) -> str:
        return str(self.context.get("id", "the model"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title!r}, clean {self.clean}, {self.threat} {self.robust}, n = {self.num_images:,})"

    @property
    def doubt(self) -> str:
        """Said where clean accuracy, within its interval, is no more than one answer for all images gets; otherwise empty."""
        largest = max((row.num_images for row in self.per_class), default=0) / self.num_images
        if self.clean.interval[0] > largest:
            return ""
        return (
            f"The model may be guessing: its clean accuracy, {self.clean}, is not above the {largest:.1%} that one answer for "
            "all images gets."
        )

    def is_of(self, weights_sha256: str | None) -> bool:
        """Whether it can be a report of these weights: it says so, or it doesn't say which ones it is about."""
        return self.context.get("weights_sha256") in (None, weights_sha256)

    @property
    def notes(self) -> list[str]:
        """What the caller noted."""
        notes = self.context.get("notes") or []
        return [notes] if isinstance(notes, str) else list(map(text, notes))

    def standing(self, threat: str) -> np.ndarray:
        """Images that no attack of the threat model broke, bool [N]."""
        return np.logical_and.reduce([self.verdicts.correct[name] for name in self.worst_case[threat].attacks])

    @property
    def sentence(self) -> str:
        """What was measured."""
        model = self.title + (f" (revision {self.context['revision']})" if self.context.get("revision") else "")
        data = str(self.data.get("id", "the data")) + (
            f" (revision {self.data['revision']})" if self.data.get("revision") else ""
        )
        images = f"{self.num_images:,} image{'s' * (self.num_images > 1)}"
        if total := self.data.get("sampled_from"):
            images += f" (of {total:,}, each class in proportion)"
        elif not self.complete:
            images = f"the first {images}"
        absent = sum(not row.num_images for row in self.per_class)
        unseen = f" Of {len(self.per_class):,} classes, {absent:,} have no image among them." if absent else ""
        return f"{model} was measured on {images} of {data}, split: {self.split}, with seed {self.seed}.{unseen}"

    def rows(self) -> list[tuple[str, str, Accuracy]]:
        """Name, threat model and accuracy: clean images, each attack, the worst case of each threat model."""
        return [
            ("clean", "", self.clean),
            *((name, result.threat, result) for name, result in self.attacks.items()),
            *(("worst case", threat, result) for threat, result in self.worst_case.items()),
        ]

    def ranked_classes(self) -> list[ClassAccuracy]:
        """The classes that have images, the least robust first."""
        present = [row for row in self.per_class if row.num_images]
        return sorted(present, key=lambda row: (row.robust.accuracy, row.clean.accuracy))

    def ranked_checks(self) -> list[Check]:
        """Failures first, then warnings, passes, and what was skipped."""
        return sorted(self.checks, key=lambda check: ("fail", "warn", "pass", "skipped").index(check.status))

    # JSON

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read report.json; it has everything but the samples.

        Raises:
            ValueError: If there is no report that this version can read.
        """
        path = Path(folder) / "report.json"
        report = cls.from_json(read_content(path))
        if contradiction := next(report._contradictions(), None):
            raise damaged(path, contradiction)
        return report

    def _contradictions(self) -> Iterator[str]:
        """What can't be, where somebody else wrote the figures: a count that is not that of the verdicts, above all."""
        rows, classes, curve = self.verdicts.correct, len(self.label_names), self.curve
        in_worst_cases = {name for worst in self.worst_case.values() for name in worst.attacks}
        if rows.keys() != {"clean", *self.attacks} or not in_worst_cases <= self.attacks.keys():
            yield f"per_image: expected verdicts of clean images and of {len(self.attacks)} attacks, with all of worst_case"
            return
        columns = (self.verdicts.indices, self.verdicts.labels, *rows.values())
        if {len(column) for column in columns} != {self.num_images}:
            yield f"per_image: expected entries for {self.num_images} images"
            return
        if len(self.per_class) != classes or self.verdicts.labels.max() >= classes:
            yield f"per_class: expected a row for each of the classes, got {len(self.per_class)}"
        verdicts = rows | {threat: self.standing(threat) for threat in self.worst_case}
        figures = {"clean": self.clean} | self.attacks | self.worst_case
        for name, result in figures.items():
            if (found := int(verdicts[name].sum())) != result.correct or result.num_images != self.num_images:
                got = f"{result.correct} of {result.num_images}"
                yield f"{name}: expected {found} of {self.num_images} images, as in per_image, got {got}"
        for result in (self.source.clean, self.source.robust) if self.source else ():
            if not 0 < result.num_images >= result.correct:
                yield f"source: expected a share of images, got {result.correct} of {result.num_images}"
        if curve and not (
            len(curve.eps) == len(curve.correct)
            and all(low < high for low, high in itertools.pairwise(curve.eps))
            and curve.mean_eps <= curve.eps[-1]
            and 0 < curve.num_images >= max(curve.correct)
        ):
            yield "curve: expected a share of images at each of growing radii, of which the last is not below mean_eps"

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples, with accuracies and intervals written out."""
        curve, verdicts, source = self.curve, self.verdicts, self.source
        return {
            "$schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "context": self.context,
            "data": self.data,
            "split": self.split,
            "num_images": self.num_images,
            "complete": self.complete,
            "seed": self.seed,
            "clean": _with_accuracy(self.clean),
            "attacks": {name: _with_accuracy(result) for name, result in self.attacks.items()},
            "worst_case": {threat: _with_accuracy(result) for threat, result in self.worst_case.items()},
            "curve": None if curve is None else asdict(curve) | {"accuracy": curve.accuracy, "mean": curve.mean},
            "checks": [asdict(check) for check in self.checks],
            "source": None
            if source is None
            else asdict(source) | {"clean": _with_accuracy(source.clean), "robust": _with_accuracy(source.robust)},
            "dropped": self.dropped,
            "environment": self.environment,
            "label_names": self.label_names,
            "per_class": [asdict(row) for row in self.per_class],
            # as text, since a line per number would make the file unreadable
            "per_image": {
                "indices": " ".join(map(str, verdicts.indices.tolist())),
                "labels": " ".join(map(str, verdicts.labels.tolist())),
                "correct": {name: "".join("01"[value] for value in row.tolist()) for name, row in verdicts.correct.items()},
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave."""
        same = ("context", "data", "split", "num_images", "complete", "seed", "environment")
        curve, source, rows = content["curve"], content["source"], content["per_image"]
        return cls(
            **{key: content[key] for key in same},
            label_names=tuple(content["label_names"]),
            clean=_without_accuracy(Accuracy, content["clean"]),
            attacks={name: _without_accuracy(AttackResult, result) for name, result in content["attacks"].items()},
            worst_case={threat: _without_accuracy(WorstCase, result) for threat, result in content["worst_case"].items()},
            curve=None if curve is None else _without_accuracy(Curve, curve),
            per_class=tuple(ClassAccuracy(**row) for row in content["per_class"]),
            checks=tuple(Check(**check) for check in content["checks"]),
            source=None
            if source is None
            else _without_accuracy(
                SourceResult, source | {key: _without_accuracy(Accuracy, source[key]) for key in ("clean", "robust")}
            ),
            dropped=tuple(content["dropped"]),
            verdicts=Verdicts(
                np.array([int(index) for index in rows["indices"].split()]),
                np.array([int(label) for label in rows["labels"].split()]),
                {name: np.array([digit == "1" for digit in row]) for name, row in rows["correct"].items()},
            ),
        )


def printable(words: str, keep: str = "") -> str:
    """Somebody's words without control characters but those to ``keep``, and without those that turn the direction of what
    follows."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in words)


def few_made(num_made: int) -> str:
    """What to add to the number of checks that passed: of some eighteen, a few say little."""
    return "; most were not made" if num_made <= 8 else ""


def text(value: Any) -> str:
    """Any JSON, for people."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(text, value)) or "none"
        case Mapping():
            parts = ", ".join(f"{str(key).replace('_', ' ')} {text(item)}" for key, item in value.items() if key != "name")
            if "name" not in value:
                return parts or "none"
            return f"{text(value['name'])} ({parts})" if parts else text(value["name"])
    return str(value)


def _with_accuracy(result: Accuracy) -> dict[str, Any]:
    return asdict(result) | {"accuracy": result.accuracy, "interval": result.interval}


def _without_accuracy(kind: type, content: Mapping[str, Any]) -> Any:
    """Figures that follow from others are left out; JSON's lists were tuples."""
    kept = {key: value for key, value in content.items() if key not in ("accuracy", "interval", "mean")}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
