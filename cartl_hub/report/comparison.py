"""Two or more reports side by side, and their differences on the same images."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from ..files import write_files
from .figures import Accuracy, paired_bootstrap
from .page import chart_lines, plain, render
from .results import Results

_DATA = ("revision", "index_hash", "fingerprint")  # they tell data apart where both reports state them


@dataclass(frozen=True)
class Difference:
    """Accuracy of a model minus that of the reference on the same images, with its 95% bootstrap interval; in [-1, 1]."""

    difference: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """The difference in words; "better" or "worse" only if the interval excludes 0."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


@dataclass(frozen=True)
class Entry:
    """One model in a row of the comparison.

    Args:
        model: Name of the model in the comparison.
        result: Accuracy of the model.
        difference: Difference from the reference; None for the reference itself and if a pairing would not be fair.
        reason: Reason why there is no difference; empty if there is one, and for the reference.
    """

    model: str
    result: Accuracy
    difference: Difference | None = None
    reason: str = ""


@dataclass(frozen=True)
class Measure:
    """One accuracy of all models that have it.

    Args:
        name: Name of the accuracy: "clean", "worst case" or that of an attack.
        threat: Threat model, e.g. "Linf 8/255"; empty for clean images.
        entries: Entries of the models; the first is the reference, if it has this accuracy.
    """

    name: str
    threat: str
    entries: tuple[Entry, ...]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.threat}" if self.threat else self.name


@dataclass(frozen=True, eq=False)
class Comparison:
    """Reports side by side; the first is the reference.

    Args:
        models: Unique name of each model.
        reports: Reports, as given.
        measures: Accuracies: clean, the worst cases, and attacks with the same settings in several reports.
        notes: Remarks that a reader must know about the differences.
    """

    models: tuple[str, ...]
    reports: tuple[Results, ...]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]

    def check_rows(self) -> list[tuple[str, list[str]]]:
        """Name of each check, and its status for each model; "" if a model has no such check."""
        names = dict.fromkeys(check.name for report in self.reports for check in report.checks)
        found = [{check.name: check.status for check in report.checks} for report in self.reports]
        return [(name, [statuses.get(name, "") for statuses in found]) for name in names]

    def to_json(self) -> dict[str, Any]:
        """Everything that the page states except the curves, which are in the reports."""
        return {
            "schema_version": 1,
            "reference": self.models[0],
            "models": [
                {
                    "name": name,
                    "sentence": report.sentence,
                    "threat": report.threat,
                    "robust": report.robust.accuracy,
                    "clean": report.clean.accuracy,
                    "mean_of_curve": None if report.curve is None else report.curve.mean,
                    "checks": {check.name: check.status for check in report.checks},
                    "dropped": report.dropped,
                }
                for name, report in zip(self.models, self.reports, strict=True)
            ],
            "measures": [
                {
                    "name": measure.name,
                    "threat": measure.threat,
                    "entries": [_entry_json(entry) for entry in measure.entries],
                }
                for measure in self.measures
            ],
            "notes": self.notes,
        }

    def summary(self) -> RenderableType:
        """Clean accuracies and worst cases for the terminal (``rich.print`` shows them)."""
        table = Table(title=plain(f"Compared with {self.models[0]}"))
        for name in ("accuracy", "model", "share", "difference on the same images"):
            table.add_column(name, overflow="fold")
        for measure in self.measures:
            if measure.name not in ("clean", "worst case"):
                continue
            for position, entry in enumerate(measure.entries):
                words = f"not comparable: {entry.reason}" if entry.reason else ""
                change = f"{entry.difference.words}: {entry.difference}" if entry.difference else words
                cells = (measure.title if position == 0 else "", entry.model, str(entry.result), change)
                table.add_row(*map(plain, cells), end_section=entry is measure.entries[-1])
        return Group(table, *map(plain, self.notes))


def compare(reports: Sequence[Results], names: Sequence[str] | None = None) -> Comparison:
    """Put reports side by side and compare each with the first.

    Accuracies are compared image by image, by a paired bootstrap over images, and only where that is fair: on the same images
    and under the same attacks. Elsewhere the comparison says why not.

    Args:
        reports: Two or more reports; the first is the reference.
        names: Names of the models; by default their titles. The same ones are numbered.

    Raises:
        ValueError: On fewer than two reports, or another number of names.
    """
    if len(reports) < 2:
        raise ValueError(f"expected two or more reports to compare, got {len(reports)}.")
    titles = [report.title for report in reports] if names is None else list(names)
    if len(titles) != len(reports):
        raise ValueError(f"expected a name for each of the {len(reports)} reports, got {len(titles)}.")
    models, reference = _numbered(titles), reports[0]
    images = [_other_images(reference, report) for report in reports]
    measures = [_measure("clean", "", models, [report.verdicts.correct["clean"] for report in reports], images)]
    for threat in dict.fromkeys(threat for report in reports for threat in report.worst_case):
        standing = [report.standing(threat) if threat in report.worst_case else None for report in reports]
        reasons = [other or _other_attacks(reference, report, threat) for other, report in zip(images, reports, strict=True)]
        measures.append(_measure("worst case", threat, models, standing, reasons))
    for name, attack in reference.attacks.items():
        same = [_settings(report, name) == _settings(reference, name) and attack.alone for report in reports]
        if sum(same) > 1:
            verdicts = [report.verdicts.correct[name] if has else None for has, report in zip(same, reports, strict=True)]
            measures.append(_measure(name, attack.threat, models, verdicts, images))
    return Comparison(models, tuple(reports), tuple(measures), tuple(_notes(reports, models)))


def save_comparison(reports: Sequence[Results], folder: str | Path, names: Sequence[str] | None = None) -> Comparison:
    """Write comparison.html and comparison.json.

    Args:
        reports: Reports, as for :func:`compare`.
        folder: Folder to write to; created if it doesn't exist.
        names: Names of the models, as for :func:`compare`.
    """
    comparison = compare(reports, names)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    html, content = comparison_html(comparison), json.dumps(comparison.to_json(), indent=2, allow_nan=False)
    write_files({folder / "comparison.html": html.encode(errors="replace"), folder / "comparison.json": content.encode()})
    return comparison


def comparison_html(comparison: Comparison) -> str:
    """The HTML page: a self-contained file without scripts."""
    curves = {name: report.curve for name, report in zip(comparison.models, comparison.reports, strict=True) if report.curve}
    norm = next(iter(curves.values())).norm if curves else ""
    return render(
        "report_comparison.html.j2",
        comparison=comparison,
        lines=chart_lines({name: curve for name, curve in curves.items() if curve.norm == norm}) if curves else [],
    )


def _numbered(titles: Sequence[str]) -> tuple[str, ...]:
    """Titles, numbered if several models have the same."""
    often, seen = Counter(titles), Counter[str]()
    names = []
    for title in titles:
        seen[title] += 1
        names.append(f"{title} ({seen[title]})" if often[title] > 1 else title)
    return tuple(names)


def _measure(
    name: str, threat: str, models: Sequence[str], verdicts: Sequence[np.ndarray | None], reasons: Sequence[str]
) -> Measure:
    """Accuracies of the models that have verdicts, each with its difference from the first unless a reason speaks against it."""
    entries = []
    for position, (model, row, reason) in enumerate(zip(models, verdicts, reasons, strict=True)):
        if row is None:
            continue
        result, reference = Accuracy(int(row.sum()), len(row)), verdicts[0]
        if position == 0:
            entries.append(Entry(model, result))
        elif reason or reference is None:
            entries.append(Entry(model, result, reason=reason))
        else:
            entries.append(Entry(model, result, Difference(*paired_bootstrap(row, reference))))
    return Measure(name, threat, tuple(entries))


def _other_images(reference: Results, report: Results) -> str:
    """Reason why two reports can't be compared image by image; empty if they can."""
    ids = reference.data.get("id"), report.data.get("id")
    if None in ids:
        return "a report does not say which data it was measured on"
    if ids[0] != ids[1]:
        return f"measured on {ids[1]} instead of {ids[0]}"
    if reference.split != report.split:
        return f"measured on the {report.split} split instead of {reference.split}"
    for key in _DATA:
        stated = reference.data.get(key), report.data.get(key)
        if None not in stated and stated[0] != stated[1]:
            return f"measured on data with {key.replace('_', ' ')} {stated[1]} instead of {stated[0]}"
    pixels, others = reference.data.get("pixels"), report.data.get("pixels")
    same_number = reference.num_images == report.num_images  # else the reason below is the plainer one
    if pixels and others and same_number and pixels["shape"] == others["shape"] and pixels != others:
        return "measured on images with other pixels"
    if reference.label_names != report.label_names:
        return "measured with other classes"
    if not np.array_equal(reference.verdicts.indices, report.verdicts.indices):
        return f"measured on other images of the same data ({report.num_images:,}, the reference on {reference.num_images:,})"
    return "" if np.array_equal(reference.verdicts.labels, report.verdicts.labels) else "measured with other labels"


def _other_attacks(reference: Results, report: Results, threat: str) -> str:
    """Reason why the worst cases of two reports can't be compared; empty if the attacks and their settings are the same."""
    if threat not in reference.worst_case or threat not in report.worst_case:
        return "the reference was not measured in this threat model"
    if reference.dropped or report.dropped:
        return "a budget cut one of the two measurements short"
    names = [one.worst_case[threat].attacks for one in (reference, report)]
    settings = [{name: _settings(one, name) for name in found} for one, found in zip((reference, report), names, strict=True)]
    if settings[0] == settings[1]:
        return ""
    changed = sorted(name for name in settings[0].keys() | settings[1].keys() if settings[0].get(name) != settings[1].get(name))
    return f"it met other attacks, or others with other settings ({', '.join(changed)})"


def _settings(report: Results, attack: str) -> tuple[Any, bool] | None:
    """Settings that the figure of an attack depends on; None if the report has no such attack."""
    found = report.attacks.get(attack)
    return None if found is None else (found.attack, found.alone)


def _notes(reports: Sequence[Results], models: Sequence[str]) -> Iterator[str]:
    """Remarks that a reader must know about the differences."""
    for model, report in zip(models, reports, strict=True):
        if any(check.status == "fail" for check in report.checks):
            yield f"A check of {model} failed: its robust accuracy may be far too high, and so may any advantage that it shows."
    for model, report in zip(models[1:], reports[1:], strict=True):
        if other := _other_images(reports[0], report):
            yield (
                f"{model} is not compared with {models[0]} image by image: {other}. Measure both with the same data, split and "
                "number of images."
            )
    sizes = dict.fromkeys(str(report.data.get("image_policy", {}).get("size", "")) for report in reports)
    if len(sizes) > 1:
        yield "The models see images of different sizes; an attack acts after resizing, so that a radius is not the same change."
    curves = [report.curve for report in reports if report.curve]
    if len({(curve.norm, curve.num_images, json.dumps(curve.attack, sort_keys=True)) for curve in curves}) > 1:
        yield "The curves differ in more than the model: in their norm, their number of images, or the settings of their attack."


def _entry_json(entry: Entry) -> dict[str, Any]:
    found = entry.difference
    return {
        "model": entry.model,
        "correct": entry.result.correct,
        "num_images": entry.result.num_images,
        "accuracy": entry.result.accuracy,
        "interval": entry.result.interval,
        "difference": None if found is None else {"difference": found.difference, "interval": [found.low, found.high]},
        "verdict": None if found is None else found.words,
        "reason": entry.reason,
    }
