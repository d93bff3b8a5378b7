"""Figures of an explanation, drawn without pyplot like those of a report."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..report.plots import BLUE, GREY, ORANGE, STYLE, VERMILION, short
from .results import Findings

COLOURS, DASHES = (VERMILION, BLUE, ORANGE), ("-", "--", ":", "-.")


@matplotlib.rc_context(STYLE)
def saliency(explanation: Findings) -> Figure:
    """One row for each image: itself, then the maps of each model."""
    sheet = _Sheet(explanation, len(explanation.models[0].maps))
    for block, model in enumerate(explanation.models):
        for column, (method, maps) in enumerate(model.maps.items()):
            sheet.heading(block, column, method)
            for row, pixels in enumerate(maps):
                sheet.picture(block, column, row, pixels)
    return sheet.figure


@matplotlib.rc_context(STYLE)
def influence(explanation: Findings) -> Figure:
    """One row for each image: itself, then the most influential training images for each model, red if of another class."""
    sheet = _Sheet(explanation, explanation.models[0].top.shape[1])
    for block, model in enumerate(explanation.models):
        for row, query in enumerate(explanation.shown):
            for column, position in enumerate(model.top[query].tolist()):
                label = explanation.train_labels[position]
                colour = GREY if label == explanation.labels[query] else VERMILION
                sheet.picture(block, column, row, explanation.train_images[position], explanation.label_names[label], colour)
    return sheet.figure


@matplotlib.rc_context(STYLE)
def match(explanation: Findings) -> Figure:
    """Share of the k most influential images that are of the query's class, one line for each model."""
    kinds = list(explanation.models[0].match)
    figure = Figure(figsize=(3.6 * len(kinds) + 0.4, 3.6), layout="constrained")
    for axes, queries in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for place, model in enumerate(explanation.models):
            found = model.match[queries]
            counts = np.arange(1, len(found.shares) + 1)
            colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
            axes.fill_between(
                counts, 100 * np.array(found.low), 100 * np.array(found.high), color=colour, alpha=0.18, linewidth=0
            )
            axes.plot(
                counts, 100 * np.array(found.shares), color=colour, linestyle=dashes, linewidth=1.8, label=short(model.name, 40)
            )
        axes.axhline(100 * found.chance, color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="drawn at random")
        axes.set_title(f"{found.num_images:,} {'test' if queries == 'test' else 'training'} images", fontsize=10)
        axes.set_xlabel("k, most influential training images")
        axes.set_ylim(0, 102)
        axes.grid(axis="y")
    first = figure.axes[0]
    first.set_ylabel("% of its own class, 95% band")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=1)
    return figure


class _Sheet:
    """Rows of pictures in one pair of axes, whose unit is the side of a picture: on the left the test images, then a block of
    columns for each model. (One pair of axes for each picture takes a hundred times as long to draw.)"""

    def __init__(self, explanation: Findings, columns: int):
        self.columns = columns
        rows, blocks = len(explanation.shown), len(explanation.models)
        width, height = self._left(blocks, 0) - 0.1, 0.75 + 1.32 * rows
        self.figure = Figure(figsize=(0.95 * width, 0.95 * height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        for block, model in enumerate(explanation.models):
            middle = self._left(block, 0) + 0.53 * columns
            self.axes.text(middle, 0.22, short(model.name, 14 * columns), ha="center", va="center", fontsize=9)
        for row, query in enumerate(explanation.shown):
            self.picture(-1, 0, row, explanation.images[row], explanation.label_names[explanation.labels[query]], BLUE)
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_autoscale_on(False)
        self.axes.set_axis_off()

    def _left(self, block: int, column: int) -> float:
        return 0.1 if block < 0 else 1.4 + block * (1.06 * self.columns + 0.3) + 1.06 * column

    def heading(self, block: int, column: int, words: str) -> None:
        """Write a heading above a column."""
        self.axes.text(self._left(block, column) + 0.5, 0.6, words, ha="center", va="center", fontsize=7, color=GREY)

    def picture(self, block: int, column: int, row: int, pixels: np.ndarray, words: str = "", colour: str = GREY) -> None:
        """A picture [C, H, W] with words above it."""
        left, top = self._left(block, column), 0.95 + 1.32 * row
        shown = pixels.transpose(1, 2, 0)
        place = (left, left + 1, top + 1, top)
        self.axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="none", extent=place, aspect="auto")
        self.axes.text(left + 0.5, top - 0.05, short(words, 16), ha="center", va="bottom", fontsize=7, color=colour)
