"""Plots of a report. They are drawn without pyplot, so that none of the caller's figures is touched."""

import io
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .figures import Accuracy, AttackResult, Curve, WorstCase
from .results import Results
from .words import printable

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, ORANGE, VERMILION, BLACK, GREY = "#0072B2", "#E69F00", "#D55E00", "#1a1a1a", "#767676"
MANY_CLASSES, SHOWN_CLASSES = 20, 10  # of more than the first, the second number of worst and best ones are shown

STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": BLACK,
    "text.parse_math": False,  # a "$" in somebody's class name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "cartl_hub",  # the same file for the same report
}


@matplotlib.rc_context(STYLE)
def robustness(report: Results) -> Figure:
    """Bars of the clean and robust accuracies with their intervals."""
    rows = report.rows()
    figure = Figure(figsize=(7, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    results = [result for _, _, result in rows]
    colours = [
        VERMILION if isinstance(result, WorstCase) else ORANGE if isinstance(result, AttackResult) else BLUE for result in results
    ]
    _bars(axes, range(len(rows)), results, 0.62, colours)
    for position, result in enumerate(results):
        place = (100 * result.interval[1], position)
        axes.annotate(f"{result.accuracy:.1%}", place, xytext=(6, 0), textcoords="offset points", va="center")
    cumulative = [isinstance(result, AttackResult) and not result.alone for _, _, result in rows]
    labels = [
        short(name, 24) + f", {threat}" * bool(threat) + " (cumulative)" * later
        for (name, threat, _), later in zip(rows, cumulative, strict=True)
    ]
    _bar_axes(axes, labels, f"% of {report.num_images:,} images, with 95% intervals")
    return figure


@matplotlib.rc_context(STYLE)
def classes(report: Results) -> Figure:
    """Bars of each class, the least robust first; of many classes the worst and the best."""
    ranked = report.ranked_classes()
    many = len(ranked) > MANY_CLASSES
    shown = [*ranked[:SHOWN_CLASSES], *ranked[-SHOWN_CLASSES:]] if many else ranked
    figure = Figure(figsize=(7, 1.1 + 0.34 * (len(shown) + many)), layout="constrained")
    axes = figure.add_subplot()
    places = np.array([k + (many and k >= SHOWN_CLASSES) for k in range(len(shown))], dtype=float)
    _bars(axes, places - 0.19, [row.clean for row in shown], 0.36, BLUE)
    _bars(axes, places + 0.19, [row.robust for row in shown], 0.36, VERMILION)
    labels = [short(row.name, 28) for row in shown]
    if many:
        labels.insert(SHOWN_CLASSES, f"{len(ranked) - 2 * SHOWN_CLASSES:,} more classes")
    _bar_axes(axes, labels, "accuracy, %, with 95% intervals")
    names = ["clean", f"worst case, {report.threat}"]
    bars: Any = axes.containers[::2]
    figure.legend(bars, names, loc="outside upper right", ncols=2, frameon=False)
    return figure


@matplotlib.rc_context(STYLE)
def curve(found: Curve) -> Figure:
    """Accuracy against radius, with intervals."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    unit = 255 if found.norm == "Linf" else 1
    radii, heights = unit * np.array(found.eps), 100 * np.array(found.accuracy)
    low, high = 100 * np.array(found.intervals).T
    axes.axvspan(0, unit * found.mean_eps, color="#f0f0f0", linewidth=0)
    axes.fill_between(radii, low, high, color=VERMILION, alpha=0.22, linewidth=0)
    axes.plot(radii, heights, color=VERMILION, marker="o", markersize=4.5, linewidth=1.8, clip_on=False, zorder=3)
    axes.annotate(
        f"mean {found.mean:.1%} up to {found.mean_eps_text}",
        (unit * found.mean_eps, 98),
        xytext=(6, 0),
        textcoords="offset points",
        va="top",
        color=GREY,
    )
    axes.set_xlim(0, 1.02 * radii[-1])
    axes.set_ylim(0, 100)
    axes.grid(axis="y")
    axes.set_xlabel(f"radius eps of the {found.norm} ball" + ", in grey levels (1/255)" * (found.norm == "Linf"))
    axes.set_ylabel(f"accuracy, % of {found.num_images:,} images")
    return figure


@matplotlib.rc_context(STYLE)
def samples(report: Results) -> Figure:
    """Clean image, perturbation and adversarial image of each sample, one column each."""
    num = len(report.samples)
    figure = Figure(figsize=(max(1.25 * num, 3) + 0.4, 4.6), layout="constrained")
    grid = figure.subplots(3, num, squeeze=False)
    for column, sample in zip(grid.T, report.samples, strict=True):
        true, seen = (short(report.label_names[label], 14) for label in (sample.label, sample.predicted))
        for axes, pixels in zip(column, (sample.image, sample.perturbation, sample.adversarial), strict=True):
            axes.imshow(np.clip(pixels.transpose(1, 2, 0), 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        column[0].set_title(true, color=BLUE, fontsize=9, loc="center", pad=5)
        column[2].set_title(seen, color=VERMILION, fontsize=9, loc="center", pad=5)
    for axes, name in zip(grid[:, 0], ("clean", "perturbation\n(stretched)", "adversarial"), strict=True):
        axes.set_ylabel(name, fontsize=9)
    return figure


@matplotlib.rc_context(STYLE)
def encode(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """A figure as the content of a file; the same bytes for the same figure."""
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # class names in scripts that the font lacks; the page has them
        figure.savefig(file, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _bars(axes: Any, positions: Any, results: Sequence[Accuracy], height: float, colour: Any) -> None:
    """Horizontal bars with their intervals."""
    lengths = 100 * np.array([result.accuracy for result in results])
    low, high = 100 * np.array([result.interval for result in results]).reshape(-1, 2).T
    errors = np.maximum([lengths - low, high - lengths], 0)
    axes.barh(positions, lengths, height=height, color=colour)
    axes.errorbar(lengths, positions, xerr=errors, color=BLACK, capsize=5 * height, linewidth=1.2, linestyle="none")


def _bar_axes(axes: Any, labels: list[str], meaning: str) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(meaning)


def short(name: str, longest: int) -> str:
    """Name shortened to one line, without control characters, which XML can't hold."""
    shown = printable(name)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
