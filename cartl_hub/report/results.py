"""All measurements of a model, also as the JSON that ``report.schema.json`` describes."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..config import to_dict
from .contradictions import contradictions
from .figures import Accuracy, AttackResult, Check, ClassAccuracy, Curve, Sample, SourceResult, Verdicts, WorstCase
from .reading import SCHEMA, SCHEMA_VERSION, damaged, read_content
from .words import text

DRAWN = tuple(f"{name}.{kind}" for name in ("robustness", "curve", "classes") for kind in ("png", "svg"))
FILES = ("report.html", *DRAWN, "samples.png", "curve.csv", "per_image.csv", "report.json")  # all that a report can write

IN_BALL = "accuracy, "  # before the name of an attack, in the figures of a check
OTHER_BALLS = ("eps-order",)  # checks whose attacks go further


def plain_json(value: Any, what: str) -> Any:
    """The value after a round trip through JSON.

    Raises:
        ValueError: If JSON can't hold it; the message names ``what``.
    """
    try:
        return json.loads(json.dumps(to_dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected JSON (text, finite numbers, lists, mappings) in the {what}: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class Results:
    """Measurements of a model; :class:`cartl_hub.report.Report` adds the files and the table that people look at.

    Args:
        context: Information on the model from the caller: "id", "revision", "method", "notes" (a list), "command", ...
        data: Description of the data set.
        split: Split that was measured.
        num_images: Number of images that were measured.
        complete: Whether that is all of the data; otherwise its first images or, if ``data`` says "sampled_from" how many, a
            sample: stratified, or as "sampled" says.
        seed: Seed of the random starts.
        label_names: Name of each class.
        clean: Accuracy on images that aren't attacked.
        attacks: Results by name, in the order in which they ran.
        worst_case: Worst case by threat model, e.g. "Linf 8/255"; the first is the headline.
        curve: Accuracy against radius.
        per_class: Accuracies in the order of the classes; robust under the first threat model.
        environment: Versions, device, threads, seconds, date.
        verdicts: Verdicts per image.
        checks: Checks of the numbers.
        source: The source's own figures, if the model was fine-tuned from a source with a report.
        dropped: Parts that a budget left out, in words.
        samples: Images to look at; they are in the readable files only, loaded results have none.
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
    def failed_checks(self) -> list[Check]:
        """Checks that say that the robust accuracy can't be trusted."""
        return [check for check in self.checks if check.status == "fail"]

    @property
    def below(self) -> tuple[str, float, int] | None:
        """Accuracy that a check's attack in the ball of the headline left, if lower than the robust accuracy, although checks
        are no measurements: its name, the share and the number of images; None if no check failed, or none found less."""
        if not self.failed_checks:
            return None
        found = [
            (float(share), key.removeprefix(IN_BALL), check.num_images)
            for check in self.checks
            for key, share in check.figures.items()
            if key.startswith(IN_BALL) and check.name not in OTHER_BALLS
        ]
        share, name, number = min(found, default=(math.inf, "", 0))
        return (name, share, number) if share < self.robust.accuracy else None

    @property
    def doubt(self) -> str:
        """Reasons not to rely on the robust accuracy, in sentences; empty if there are none."""
        return " ".join(filter(None, (self.guess, self.mistrust)))

    @property
    def mistrust(self) -> str:
        """Warning if checks failed; otherwise empty."""
        if not (failed := self.failed_checks):
            return ""
        less = ""
        if (below := self.below) is not None:
            name, share, number = below
            less = f"; in the same ball {name} left {share:.1%} of {number:,} images"
        made = len(self.made_checks)
        names = ", ".join(check.name for check in failed)
        return (
            f"{len(failed)} of {made} check{'s' * (made > 1)} failed ({names}): the robust accuracy may be far too high{less}. "
            "Read them before you rely on it."
        )

    @property
    def guess(self) -> str:
        """Warning if clean accuracy, within its interval, is no higher than the same answer for all images gets; otherwise
        empty."""
        largest = max((row.num_images for row in self.per_class), default=0) / self.num_images
        if self.clean.interval[0] > largest:
            return ""
        return (
            f"The model may be guessing: its clean accuracy, {self.clean}, is not above the {largest:.1%} that one answer for "
            "all images gets."
        )

    def is_of(self, weights_sha256: str | None) -> bool:
        """Whether it can be a report on these weights: it says so, or it doesn't say which ones it is about."""
        return self.context.get("weights_sha256") in (None, weights_sha256)

    @property
    def notes(self) -> list[str]:
        """Notes from the caller."""
        notes = self.context.get("notes") or []
        return [notes] if isinstance(notes, str) else list(map(text, notes))

    def as_source(self, threat: str | None = None) -> SourceResult:
        """Figures of this model for the report of a model that was fine-tuned from it.

        Args:
            threat: Threat model of the other report's headline; this report's own headline if it doesn't know that one.
        """
        threat = threat if threat in self.worst_case else self.threat
        worst = self.worst_case[threat]
        robust = Accuracy(worst.correct, worst.num_images)
        return SourceResult(self.title, str(self.data.get("id", "not stated")), threat, self.clean, robust, worst.attacks)

    def standing(self, threat: str) -> np.ndarray:
        """Surviving images, which no attack of the threat model broke, bool [N]."""
        return np.logical_and.reduce([self.verdicts.correct[name] for name in self.worst_case[threat].attacks])

    @property
    def sentence(self) -> str:
        """One sentence on what was measured."""
        model = self.title + (f" (revision {self.context['revision']})" if self.context.get("revision") else "")
        data = str(self.data.get("id", "the data")) + (
            f" (revision {self.data['revision']})" if self.data.get("revision") else ""
        )
        images = f"{self.num_images:,} image{'s' * (self.num_images > 1)}"
        if total := self.data.get("sampled_from"):
            images += f" (of {total:,}, {self.data.get('sampled', 'each class in proportion')})"
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
        """Checks in order: failures, warnings, passes, then those skipped."""
        return sorted(self.checks, key=lambda check: ("fail", "warn", "pass", "skipped").index(check.status))

    @property
    def made_checks(self) -> list[Check]:
        """Checks that were made, failures first; none if there is only the second verdict, which comes with the attacks."""
        made = [check for check in self.ranked_checks() if check.status != "skipped"]
        alone = [(check.name, check.status) for check in made] == [("second-verdict", "pass")]
        return [] if alone else made

    # JSON

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read report.json; it has everything except the samples.

        Raises:
            ValueError: If there is no report that this version can read.
        """
        path = Path(folder) / "report.json"
        report = cls.from_json(read_content(path))
        if contradiction := next(contradictions(report), None):
            raise damaged(path, contradiction)
        return report

    def to_json(self) -> dict[str, Any]:
        """Everything except the samples, with accuracies and intervals written out."""
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
        """Results from what :meth:`to_json` returned."""
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


def _with_accuracy(result: Accuracy) -> dict[str, Any]:
    return asdict(result) | {"accuracy": result.accuracy, "interval": result.interval}


def _without_accuracy(kind: type, content: Mapping[str, Any]) -> Any:
    """Build a figure without the values that follow from others; JSON's lists were tuples."""
    kept = {key: value for key, value in content.items() if key not in ("accuracy", "interval", "mean")}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()})
