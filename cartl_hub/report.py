"""What was measured of a model: for programs (JSON), for people (one HTML page, plots, a table for the terminal)."""

import base64
import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .config import to_dict
from .files import write_file

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
MANY_CLASSES = 20  # more than these are folded away on the page


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
        low, high = self.interval
        return f"{100 * low:.1f} to {high:.1%}"


@dataclass(frozen=True)
class AttackResult(Accuracy):
    """Share of images that are classified correctly before and after an attack.

    Args:
        attack: Its settings, with its class under "name".
        rejected: Images that it moved out of [0, 1] or the ball; they count as not broken.
    """

    attack: dict[str, Any]
    rejected: int = 0

    @property
    def threat(self) -> str:
        """E.g. "Linf 8/255"."""
        return f"{self.attack['norm']} {eps_text(self.attack['norm'], self.attack['eps'])}"

    @property
    def settings(self) -> str:
        """Everything but the threat model, for people."""
        shown = {key: value for key, value in self.attack.items() if key not in ("name", "norm", "eps")}
        if "step_size" in shown:
            shown["step_size"] = eps_text(self.attack["norm"], shown["step_size"])
        return ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in shown.items()) or "one step"


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
        num_images: The first ones of the data.
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


@dataclass(frozen=True)
class Check:
    """Whether the numbers can be trusted, from one point of view.

    Args:
        name: Of the check.
        status: What came out.
        figures: Numbers it rests on; JSON.
        sentence: What it means, for people.
    """

    name: str
    status: Literal["pass", "warn", "fail"]
    figures: dict[str, Any]
    sentence: str


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Per image, in the order in which they were read.

    Args:
        indices: Position in the data, int64 [N].
        labels: True classes, int64 [N].
        correct: "clean" and each attack to bool [N]: classified correctly, for attacks before and after.
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
class Report:
    """What :func:`cartl_hub.evaluation.evaluate` measured.

    Args:
        context: What the caller says of the model: "id", "revision", "method", "notes" (a list), "command", ...
        data: Description of the data set.
        split: That was measured on.
        num_images: That were measured on.
        complete: Whether that is all of the data; otherwise its first images.
        seed: Of the random starts.
        label_names: Name of each class.
        clean: On images that aren't attacked.
        attacks: By name.
        worst_case: By threat model, e.g. "Linf 8/255"; the first is the headline.
        curve: Accuracy against radius.
        per_class: In the order of the classes; robust under the first threat model.
        environment: Versions, device, threads, seconds, date.
        verdicts: Per image.
        checks: Of the numbers.
        samples: Images to look at; they are in the files for people alone, a loaded report has none.
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
    samples: tuple[Sample, ...] = field(default=(), repr=False, compare=False)
    schema_version: int = SCHEMA_VERSION

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
        images = f"{'' if self.complete else 'the first '}{self.num_images:,} image{'s' * (self.num_images > 1)}"
        return f"{model} was measured on {images} of {data}, split: {self.split}, with seed {self.seed}."

    # Files

    def save(self, folder: str | Path) -> None:
        """Write report.json, report.html, robustness.png, curve.png, samples.png and per_image.csv.

        Each file is replaced at once and report.json comes last: whenever the process dies, it is the old or the new one.
        """
        from . import plots

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {
            "robustness.png": plots.robustness(self),
            "curve.png": None if self.curve is None else plots.curve(self.curve),
            "samples.png": plots.samples(self) if self.samples else None,
        }
        for name, picture in pictures.items():
            if picture is None:
                (folder / name).unlink(missing_ok=True)
            else:
                write_file(folder / name, picture)
        write_file(folder / "per_image.csv", self._csv())
        write_file(folder / "report.html", self._html(pictures).encode(errors="replace"))
        write_file(folder / "report.json", json.dumps(self.to_json(), indent=2, allow_nan=False).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read what :meth:`save` wrote; everything but the samples.

        Raises:
            ValueError: If there is no report that this version can read.
        """
        path = Path(folder) / "report.json"
        try:
            content = json.loads(path.read_bytes())
            schema = content["schema_version"]
        except FileNotFoundError:
            raise ValueError(f"expected a report in {path}, which does not exist.") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"expected a report of cartl_hub in {path}, got something else ({error!r}).") from error
        if schema != SCHEMA_VERSION:
            raise ValueError(
                f"expected a report of schema version {SCHEMA_VERSION} in {path}, got {schema}; update cartl_hub to read it."
            )
        try:
            return cls._from_json(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"expected a whole report in {path}, got a damaged one ({error!r}).") from error

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples, with accuracies and intervals written out."""
        curve, verdicts = self.curve, self.verdicts
        return {
            "schema_version": self.schema_version,
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
    def _from_json(cls, content: Mapping[str, Any]) -> "Report":
        same = ("schema_version", "context", "data", "split", "num_images", "complete", "seed", "environment")
        curve, rows = content["curve"], content["per_image"]
        return cls(
            **{key: content[key] for key in same},
            label_names=tuple(content["label_names"]),
            clean=_without_accuracy(Accuracy, content["clean"]),
            attacks={name: _without_accuracy(AttackResult, result) for name, result in content["attacks"].items()},
            worst_case={
                threat: _without_accuracy(WorstCase, result | {"attacks": tuple(result["attacks"])})
                for threat, result in content["worst_case"].items()
            },
            curve=None
            if curve is None
            else Curve(
                curve["norm"],
                tuple(curve["eps"]),
                tuple(curve["correct"]),
                curve["num_images"],
                curve["attack"],
                curve["mean_eps"],
            ),
            per_class=tuple(ClassAccuracy(**row) for row in content["per_class"]),
            checks=tuple(Check(**check) for check in content["checks"]),
            verdicts=Verdicts(
                np.array([int(index) for index in rows["indices"].split()]),
                np.array([int(label) for label in rows["labels"].split()]),
                {name: np.array([digit == "1" for digit in row]) for name, row in rows["correct"].items()},
            ),
        )

    def _csv(self) -> str:
        verdicts, file = self.verdicts, io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "label", *verdicts.correct])
        columns = (verdicts.indices, verdicts.labels, *(row.astype(int) for row in verdicts.correct.values()))
        writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
        return file.getvalue()

    # For people

    def summary(self) -> "Table":
        """A table for the terminal (``rich.print`` shows it)."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(f"{self.title} on {self.data.get('id', 'the data')}"), caption=Text(self.sentence))
        table.add_column("attack")
        table.add_column("threat model")
        for name in ("accuracy", "95% interval"):
            table.add_column(name, justify="right")
        for name, threat, result, worst in self.rows():
            style = "bold" if worst else ""
            table.add_row(
                *(Text(cell, style=style) for cell in (name, threat, f"{result.accuracy:.1%}", result.interval_text)),
                end_section=name == "clean" or name == list(self.attacks)[-1],
            )
        return table

    def rows(self) -> list[tuple[str, str, Accuracy, bool]]:
        """Name, threat model, accuracy and whether it is a worst case: clean images, each attack, each threat model."""
        return [
            ("clean", "", self.clean, False),
            *((name, result.threat, result, False) for name, result in self.attacks.items()),
            *(("worst case", threat, result, True) for threat, result in self.worst_case.items()),
        ]

    def _html(self, pictures: Mapping[str, bytes | None]) -> str:
        import jinja2

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,  # names of classes and models are other people's text
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"percent": lambda share: f"{share:.1%}", "text": _text}
        notes = self.context.get("notes") or []
        return environment.get_template("report.html.j2").render(
            report=self,
            plots={name.removesuffix(".png"): _inline(picture) for name, picture in pictures.items() if picture},
            samples=[
                (sample, [_inline(_png(pixels)) for pixels in (sample.image, sample.perturbation, sample.adversarial)])
                for sample in self.samples
            ],
            notes=[notes] if isinstance(notes, str) else notes,
            context={key: value for key, value in self.context.items() if key not in ("notes", "command")},
            data=self.data | {"split": self.split, "images measured": self.num_images, "seed": self.seed},
            eps_text=eps_text,
            many_classes=MANY_CLASSES,
        )


def _with_accuracy(result: Accuracy) -> dict[str, Any]:
    return asdict(result) | {"accuracy": result.accuracy, "interval": result.interval}


def _without_accuracy(kind: type, content: Mapping[str, Any]) -> Any:
    return kind(**{key: value for key, value in content.items() if key not in ("accuracy", "interval")})


def _text(value: Any) -> str:
    """Any JSON, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _png(pixels: np.ndarray) -> bytes:
    """[C, H, W] in [0, 1] with one or three channels."""
    from PIL import Image

    array, file = np.round(pixels * 255).astype(np.uint8), io.BytesIO()
    Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(file, format="PNG")
    return file.getvalue()


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
