"""Plots of a report, as PNG files. They are drawn without pyplot, so that no figure of the caller's is touched."""

import io
import warnings
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .report import Curve, Report

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, ORANGE, VERMILION, BLACK, GREY = "#0072B2", "#E69F00", "#D55E00", "#1a1a1a", "#767676"

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
}


@matplotlib.rc_context(STYLE)
def robustness(report: "Report") -> bytes:
    """Bars of the clean and robust accuracies with their intervals."""
    rows = report.rows()
    figure = Figure(figsize=(7, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for position, (_, _, result, worst) in enumerate(rows):
        low, high = result.interval
        colour = VERMILION if worst else BLUE if result is report.clean else ORANGE
        axes.barh(position, 100 * result.accuracy, height=0.62, color=colour)
        errors = [[max(0.0, 100 * (result.accuracy - low))], [max(0.0, 100 * (high - result.accuracy))]]
        axes.errorbar(100 * result.accuracy, position, xerr=errors, color=BLACK, capsize=3, linewidth=1.2)
        axes.annotate(f"{result.accuracy:.1%}", (100 * high, position), xytext=(6, 0), textcoords="offset points", va="center")
    labels = [name if not threat else f"{name}, {threat}" for name, threat, _, _ in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(f"accuracy, % of {report.num_images:,} images (lines: 95% intervals)")
    return _png(figure)


@matplotlib.rc_context(STYLE)
def curve(found: "Curve") -> bytes:
    """Accuracy against radius, with intervals."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.add_subplot()
    radii, heights = 255 * np.array(found.eps), 100 * np.array(found.accuracy)
    low, high = 100 * np.array(found.intervals).T
    axes.axvspan(0, 255 * found.mean_eps, color="#f0f0f0", linewidth=0)
    axes.fill_between(radii, low, high, color=VERMILION, alpha=0.22, linewidth=0)
    axes.plot(radii, heights, color=VERMILION, marker="o", markersize=4.5, linewidth=1.8, clip_on=False, zorder=3)
    axes.annotate(
        f"mean {found.mean:.1%} up to {found.mean_eps_text}",
        (255 * found.mean_eps, 98),
        xytext=(6, 0),
        textcoords="offset points",
        va="top",
        color=GREY,
    )
    axes.set_xlim(0, 1.02 * radii[-1])
    axes.set_ylim(0, 100)
    axes.grid(axis="y")
    axes.set_xlabel(f"radius eps of the {found.norm} ball, in grey levels (1/255)")
    axes.set_ylabel(f"accuracy, % of {found.num_images:,} images")
    return _png(figure)


@matplotlib.rc_context(STYLE)
def samples(report: "Report") -> bytes:
    """Clean image, perturbation and adversarial image of each sample, one column each."""
    num = len(report.samples)
    figure = Figure(figsize=(max(1.25 * num, 3) + 0.4, 4.6), layout="constrained")
    grid = figure.subplots(3, num, squeeze=False)
    for column, sample in zip(grid.T, report.samples, strict=True):
        true, seen = (_short(report.label_names[label]) for label in (sample.label, sample.predicted))
        for axes, pixels in zip(column, (sample.image, sample.perturbation, sample.adversarial), strict=True):
            axes.imshow(np.clip(pixels.transpose(1, 2, 0), 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        column[0].set_title(true, color=BLUE, fontsize=9, loc="center", pad=5)
        column[2].set_title(seen, color=VERMILION, fontsize=9, loc="center", pad=5)
    for axes, name in zip(grid[:, 0], ("clean", "perturbation\n(stretched)", "adversarial"), strict=True):
        axes.set_ylabel(name, fontsize=9)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # class names in scripts that the font lacks; the page has them
        figure.savefig(file, format="png", dpi=200)
    return file.getvalue()
