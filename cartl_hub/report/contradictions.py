"""Contradictions in a report that somebody else wrote: above all, counts that differ from the verdicts."""

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .figures import Curve
from .words import threat_text

if TYPE_CHECKING:
    from .results import Results


def contradictions(report: "Results") -> Iterator[str]:
    """Contradictions in words; those that follow from an earlier one are left out."""
    in_table = list(_in_table(report))
    yield from in_table
    if not in_table:
        yield from _in_counts(report)
    for result in (report.source.clean, report.source.robust) if report.source else ():
        if not 0 < result.num_images >= result.correct:
            yield f"source: expected a share of images, got {result.correct} of {result.num_images}"
    if report.curve and not _falls(report.curve, report.num_images):
        yield "curve: expected falling shares of the images at growing radii, of which the last is not below mean_eps"
    if (report.data.get("sampled_from") or report.num_images) < report.num_images:
        yield f"data.sampled_from: expected at least the {report.num_images} images, got {report.data['sampled_from']}"


def _in_table(report: "Results") -> Iterator[str]:
    """Contradictions in the shape of the verdicts."""
    verdicts, number, classes = report.verdicts, report.num_images, len(report.label_names)
    if verdicts.correct.keys() != {"clean", *report.attacks}:
        yield f"per_image: expected verdicts of clean images and of {len(report.attacks)} attacks"
    columns = (verdicts.indices, verdicts.labels, *verdicts.correct.values())
    if {len(column) for column in columns} != {number} or verdicts.indices.dtype.kind != "i":
        yield f"per_image: expected entries for {number} images"
    elif len(np.unique(verdicts.indices)) != number:
        yield f"per_image.indices: expected {number} different ones"
    if len(report.per_class) != classes or verdicts.labels.max(initial=0) >= classes:
        yield f"per_class: expected a row for each of the classes, got {len(report.per_class)}"
    for threat, worst in report.worst_case.items():
        inside = {name for name, result in report.attacks.items() if _lies_in(result.attack, worst.norm, worst.eps)}
        if threat != threat_text(worst.norm, worst.eps) or set(worst.attacks) != inside:
            yield f"worst_case.{threat}: expected the attacks in {threat_text(worst.norm, worst.eps)}, which are {sorted(inside)}"


def _in_counts(report: "Results") -> Iterator[str]:
    """Contradictions in the figures, which follow from the verdicts."""
    rows, number, labels = report.verdicts.correct, report.num_images, report.verdicts.labels
    standing = {threat: report.standing(threat) for threat in report.worst_case}
    for name, result in ({"clean": report.clean} | report.attacks | report.worst_case).items():
        row = {**rows, **standing}[name]
        if (row & ~rows["clean"]).any():
            yield f"{name}: expected images to stand that are classified correctly before it"
        if (result.correct, result.num_images) != (int(row.sum()), number):
            got = f"{result.correct} of {result.num_images}"
            yield f"{name}: expected {int(row.sum())} of {number} images, as in per_image, got {got}"
    for name, attacked in report.attacks.items():
        if not attacked.rejected <= attacked.attacked <= number:
            yield f"attacks.{name}: expected at most {number} images, got {attacked.attacked} and {attacked.rejected} rejected"
    for label, found in enumerate(report.per_class):
        of_class = labels == label
        expected = [int((row & of_class).sum()) for row in (of_class, rows["clean"], standing[report.threat])]
        if [found.num_images, found.clean_correct, found.robust_correct] != expected:
            yield f"per_class.{label}: expected the counts {expected}, as in per_image"


def _lies_in(attack: dict, norm: str, eps: float) -> bool:
    return bool(attack["norm"] == norm and attack["eps"] <= eps)


def _falls(curve: Curve, num_images: int) -> bool:
    return (
        len(curve.eps) == len(curve.correct)
        and all(low < high for low, high in pairwise(curve.eps))
        and all(low >= high for low, high in pairwise(curve.correct))
        and curve.mean_eps <= curve.eps[-1]
        and 0 < curve.num_images <= num_images
        and curve.correct[0] <= curve.num_images
    )
