"""A report in readable form: its folder of files with one HTML page, and its figures for the terminal."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..files import write_files
from . import plots
from .figures import AttackResult, Curve, WorstCase
from .results import FILES, Results
from .words import FEW_CHECKS, NO_CHECK, eps_text, few_made, printable, text

TEMPLATES = Path(__file__).parent / "templates"
SCALED_UP = 96  # images of fewer pixels a side are shown with square pixels
FEW_IMAGES = 30  # with fewer, the interval of a class can be wider than 34 points
WORDS = {"pass": "passed", "warn": "warning", "fail": "failed", "skipped": "not made"}
COLOURS = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


# Files


def save_report(report: Results, folder: str | Path) -> None:
    """Write report.json, report.html, robustness, curve and classes as PNG and SVG, samples.png, curve.csv and per_image.csv.

    All are on the disk before the first one is replaced, and report.json comes last. Files of an earlier report that this one
    lacks are removed.

    Args:
        report: Results to write.
        folder: Folder to write to; created if it doesn't exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes | str] = {
        **_pictures(report),
        **({} if report.curve is None else {"curve.csv": _curve_csv(report.curve)}),
        "per_image.csv": _per_image_csv(report),
        "report.html": report_html(report).encode(errors="replace"),
        "report.json": json.dumps(report.to_json(), indent=2, allow_nan=False),
    }
    write_files({folder / name: content for name, content in contents.items()})
    for name in set(FILES).difference(contents):
        (folder / name).unlink(missing_ok=True)


def _pictures(report: Results) -> dict[str, bytes]:
    """Every plot that there is data for, by file name."""
    drawn = {"robustness": plots.robustness(report)}
    if report.curve is not None:
        drawn["curve"] = plots.curve(report.curve)
    if report.ranked_classes():
        drawn["classes"] = plots.classes(report)
    kinds: tuple[Literal["png", "svg"], ...] = ("png", "svg")
    pictures = {f"{name}.{kind}": plots.encode(figure, kind) for name, figure in drawn.items() for kind in kinds}
    return pictures | ({"samples.png": plots.encode(plots.samples(report), "png")} if report.samples else {})


def _curve_csv(curve: Curve) -> str:
    rows = zip(curve.eps, curve.correct, curve.accuracy, curve.intervals, strict=True)
    return csv_text(
        ["norm", "eps", "correct", "num_images", "accuracy", "low", "high"],
        ([curve.norm, eps, correct, curve.num_images, share, *ends] for eps, correct, share, ends in rows),
    )


def _per_image_csv(report: Results) -> str:
    verdicts = report.verdicts
    columns = (verdicts.indices, verdicts.labels, *(row.astype(int) for row in verdicts.correct.values()))
    return csv_text(["index", "label", *verdicts.correct], zip(*(column.tolist() for column in columns), strict=True))


def csv_text(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


# Pages


def report_html(report: Results) -> str:
    """The HTML page: a self-contained file without scripts."""
    return render(
        "report.html.j2",
        report=report,
        verdict=verdict(report),
        lines=chart_lines({report.title: report.curve}) if report.curve else [],
        samples=[
            (sample, [inline(pixels) for pixels in (sample.image, sample.perturbation, sample.adversarial)])
            for sample in report.samples
        ],
        context={key: value for key, value in report.context.items() if key not in ("notes", "command")},
        data=report.data | {"split": report.split, "images measured": report.num_images, "seed": report.seed},
        scaled_up=SCALED_UP,
        few_images=FEW_IMAGES,
        many_classes=plots.MANY_CLASSES,
        shown_classes=plots.SHOWN_CLASSES,
    )


def render(template: str, **content: Any) -> str:
    """A page from a template of this package, with the style that all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # names of classes and models are other people's text
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": lambda share: f"{share:.1%}", "text": text, "ticks": ticks, "number": "{:,}".format}
    environment.globals |= {"eps_text": eps_text, "allowed": allowed, "of_hundred": of_hundred, "words": WORDS, "zip": zip}
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    # the page allows this style and no other, nor any script or request
    allowed_style = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=style, style_hash=allowed_style, **content)


def allowed(norm: str, eps: float) -> str:
    """Description of what an attacker may do in a ball, for readers who have never heard of norms."""
    if norm == "L2":
        return f"all pixel values together by up to {eps:.4g} (Euclidean length, where pixel values go from 0 to 1)"
    level = eps_text(norm, eps).partition("/")
    change = f"{level[0]} on the scale from 0 to 255" if level[1] else f"{100 * eps:.3g}% of its range"
    return f"each colour value of each pixel by up to {change}"


def of_hundred(accuracy: float) -> str:
    """A share as people say it, of 100 images."""
    if accuracy in (0, 1):
        return "all" if accuracy else "none"
    number = round(100 * accuracy)
    return "fewer than 1" if number == 0 else "nearly all" if number == 100 else f"about {number}"


def verdict(report: Results) -> tuple[str, str]:
    """The worst status of the checks, and what they say together; at least a warning of a model that may be guessing."""
    status, sentence = _checked(report)
    if not report.guess:
        return status, sentence
    if status in ("pass", "skipped") and report.made_checks:
        sentence = "The checks that were made passed, which says little of such a model."
    return "fail" if status == "fail" else "warn", f"{report.guess} {sentence}"


def _checked(report: Results) -> tuple[str, str]:
    made = [check.status for check in report.made_checks]
    if not made:
        return "skipped", NO_CHECK.capitalize()
    counts = f"of {len(made)} check{'s' * (len(made) > 1)}"
    if report.mistrust:
        return "fail", report.mistrust
    if warned := made.count("warn"):
        return "warn", f"{warned} {counts} gave a warning: read what it means for the robust accuracy."
    passed = "The one check that was made passed" if len(made) == 1 else f"All {len(made)} checks that were made passed"
    few = few_made([check.num_images for check in report.made_checks])
    return "skipped" if len(made) <= FEW_CHECKS else "pass", f"{passed}{few}."


def chart_lines(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Curves in percent of a chart's width and height, from its upper left corner; the largest radius is its right edge."""
    largest = max(curve.eps[-1] for curve in curves.values())
    lines = []
    for name, curve in curves.items():
        across = [round(100 * eps / largest, 2) for eps in curve.eps]
        down = [round(100 - 100 * share, 2) for share in curve.accuracy]
        low, high = ([round(100 - 100 * ends[i], 2) for ends in curve.intervals] for i in (0, 1))
        band = [*zip(across, high, strict=True), *reversed(list(zip(across, low, strict=True)))]
        lines.append(
            {
                "name": name,
                "curve": curve,
                "largest": largest,
                "points": list(zip(across, down, strict=True)),
                "dots": [
                    (x, y, f"{eps_text(curve.norm, eps)}: {interval_words(share, ends)}")
                    for x, y, eps, share, ends in zip(across, down, curve.eps, curve.accuracy, curve.intervals, strict=True)
                ],
                "band": band,
                "mean_end": round(100 * min(curve.mean_eps / largest, 1), 2),
            }
        )
    return lines


def interval_words(share: float, ends: tuple[float, float]) -> str:
    """Share with its interval, e.g. "60.0% (52.1% to 67.4%)"."""
    return f"{share:.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to ``largest`` for an axis."""
    values = MaxNLocator(8, steps=[1, 2, 2.5, 4, 5, 8, 10]).tick_values(0, largest)
    return [float(value) for value in values if value <= largest * (1 + 1e-9)]


def inline(pixels: np.ndarray, longest: int | None = None) -> str:
    """Image [C, H, W] in [0, 1] with one or three channels, as the address of a picture; shrunk if a side has more than
    ``longest`` pixels."""
    array, file = np.round(pixels * 255).astype(np.uint8), io.BytesIO()
    picture = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
    if longest is not None:
        picture.thumbnail((longest, longest))
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# Terminal


def summary(report: Results) -> RenderableType:
    """Figures, and what the checks found, for the terminal (``rich.print`` shows it)."""
    data = report.data.get("id", "the data")
    table = Table(title=plain(f"{report.title} on {data}"), caption=plain(report.sentence))
    table.add_column("attack")
    table.add_column("threat model")
    for name in ("accuracy", "95% interval"):
        table.add_column(name, justify="right")
    for index, (name, threat, result) in enumerate(report.rows()):
        cumulative = isinstance(result, AttackResult) and not result.alone
        cells = (name + " (cumulative)" * cumulative, threat, f"{result.accuracy:.1%}", result.interval_text)
        style = "bold" if isinstance(result, WorstCase) else ""
        table.add_row(*(plain(cell, style) for cell in cells), end_section=index in (0, len(report.attacks)))
    status, sentence = verdict(report)
    lines = [plain(sentence, COLOURS[status])]
    for check in report.ranked_checks():
        if check.status in ("fail", "warn"):
            label = Text(f"{WORDS[check.status].upper()} ", COLOURS[check.status])
            lines.append(label + plain(f"{check.name}: {check.meaning} {check.remedy}".rstrip()))
    if report.dropped:
        lines.append(plain(f"Left out to keep within the budget: {'; '.join(report.dropped)}."))
    return Group(table, *lines)


def plain(words: str, style: str = "") -> Text:
    """Somebody's words on one line, without terminal control codes."""
    return Text(printable(words), style)
