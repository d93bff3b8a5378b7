"""Findings of a sweep, as plots and as a page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ..report.plots import BLUE, GREY, ORANGE, STYLE, VERMILION
from .cell import WORST, CellResult
from .markdown import render

COLOURS = (VERMILION, BLUE, ORANGE, "#009E73", "#CC79A7", GREY)
TEMPLATE = Path(__file__).with_name("sweep.md.j2")
PLACES = ("source", "blocks", "num_images", "seed", "clean", WORST, "test_images", "steps")  # columns that aren't attacks
TITLES = {"0": "classifier", "1": "1 block", "all": "all blocks"}


def make_figures(table: pd.DataFrame, epochs: pd.DataFrame, reference: str) -> dict[str, Figure]:
    """All plots by name.

    Args:
        table: Table from :func:`cartl_hub.experiments.sweep.sweep_table`.
        epochs: Table from :func:`cartl_hub.experiments.sweep.epochs_table`.
        reference: Source that differences are from.
    """
    figures = {"accuracy": against_images(table, "clean")}
    if set(table["source"]) != {reference}:
        figures["difference"] = difference_from(table, reference, "clean")
    figures |= {f"accuracy_{name}": against_images(table, name) for name in measures(table) if name != "clean"}
    if len(epochs):
        figures["epochs"] = against_epochs(epochs)
    return figures


def measures(table: pd.DataFrame) -> list[str]:
    """Columns of accuracies: "clean" and each attack."""
    return [name for name in table.columns if name == "clean" or name not in PLACES]


# The page


def render_sweep(
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Figure],
    results: Sequence[CellResult],
    sources: Sequence[str],
    method: str,
    num_missing: int,
) -> str:
    """Means and paired differences over seeds with 95% intervals of Student's t, what is saved, and how it was made.

    Args:
        tables: Tables "sweep", "saved_images" and "saved_epochs", as the sweep writes them.
        figures: Figures by name.
        results: Results of the cells.
        sources: Sources in order; differences are from the last one.
        method: Method in words, after "fine-tuned".
        num_missing: Number of cells of the sweep that were not run.
    """
    table, reference = tables["sweep"], sources[-1]
    sections, counts = [], dict.fromkeys(((source, measure) for source in sources[:-1] for measure in measures(table)), (0, 0, 0))
    for measure in measures(table):
        for blocks in dict.fromkeys(table["blocks"]):
            part = table[table["blocks"] == blocks]
            columns = sorted(set(part["num_images"]))
            rows = []
            for source in sources:
                groups = part[part["source"] == source].groupby("num_images")[measure]
                rows.append((source, [_interval(groups.get_group(n)) if n in groups.groups else "not run" for n in columns]))
            paired = paired_differences(part, reference, measure)
            for source in sources[:-1]:
                entries = []
                for n in columns:
                    found = paired[(paired["source"] == source) & (paired["num_images"] == n)][measure].to_numpy()
                    entries.append(_interval(found, sign="+") if len(found) else "not run")
                    counts[source, measure] = _counted(counts[source, measure], found)
                rows.append((f"{source} minus {reference}", entries))
            sections.append((f"{'clean' if measure == 'clean' else measure} accuracy, {_title(blocks)}", columns, rows))
    made = [result.made for result in results]
    return render(
        TEMPLATE,
        target=results[0].cell["target"]["id"],
        method=method,
        training=results[0].cell["training"],
        sources=sources,
        reference=reference,
        sections=sections,
        counts=counts,
        compared=any(map(sum, counts.values())),
        same_images=len({result.data["test"].get("index_hash") for result in results}) == 1,
        figures=list(figures),
        saved={name: _best(tables[f"saved_{name}"]) for name in ("images", "epochs")},
        num_cells=len(table),
        num_missing=num_missing,
        seeds=sorted(set(table["seed"])),
        test_images=sorted(set(table["test_images"])),
        made={name: sorted({str(one[name]) for one in made}) for name in ("command", "device", "precision", "commit")},
        title=_title,
    )


def _title(blocks: str) -> str:
    return TITLES.get(blocks, f"{blocks} blocks")


def paired_differences(table: pd.DataFrame, reference: str, measure: str) -> pd.DataFrame:
    """Rows of the other sources with their measure minus the reference's, of the same blocks, images and seed; those without
    such a twin are left out."""
    places = ["blocks", "num_images", "seed"]
    theirs = table[table["source"] == reference].set_index(places)[measure]
    others = table[table["source"] != reference]
    twins = theirs.reindex(pd.MultiIndex.from_frame(others[places])).to_numpy()
    return others.assign(**{measure: others[measure] - twins}).dropna(subset=[measure])


def _half_width(values: "pd.Series | np.ndarray") -> float:
    """Half-width of the 95% interval of a mean by Student's t; infinite for one value."""
    number = len(values)
    if number < 2:
        return np.inf
    return float(np.std(values, ddof=1) / np.sqrt(number) * stats.t.ppf(0.975, number - 1))


def _bounds(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95% interval, in percent."""
    mean, half = 100 * float(np.mean(values)), 100 * _half_width(values)
    return mean, mean - half, mean + half


def _interval(values: "pd.Series | np.ndarray", sign: str = "") -> str:
    mean, low, high = _bounds(np.asarray(values))
    low, high = max(low, -100 if sign else 0), min(high, 100)
    return f"{mean:{sign}.1f}" + (f" ({low:{sign}.1f} to {high:{sign}.1f})" if len(values) > 1 else "")


def _counted(counts: tuple[int, int, int], differences: np.ndarray) -> tuple[int, int, int]:
    """Counts of ahead, behind, and undecided."""
    if not len(differences):
        return counts
    ahead, behind, undecided = counts
    _, low, high = _bounds(differences)
    if low > 0:
        return ahead + 1, behind, undecided
    if high < 0:
        return ahead, behind + 1, undecided
    return ahead, behind, undecided + 1


def _best(saved: pd.DataFrame) -> dict[str, dict]:
    """Row of the largest saving for each source, and how often it reaches the reference; none where it never does."""
    best = {}
    for source, part in saved.groupby("source", sort=False):
        reached = part.dropna(subset=["factor"])
        if len(reached):
            counted = {"reached": len(reached), "places": len(part)}
            best[str(source)] = reached.loc[reached["factor"].idxmax()].to_dict() | counted
    return best


# Plots


@matplotlib.rc_context(STYLE)
def against_images(table: pd.DataFrame, measure: str) -> Figure:
    """Accuracy against the number of images, a panel for each depth, means over seeds with 95% bands."""

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        for source, colour in _coloured(table):
            _band(axes, part[part["source"] == source].groupby("num_images")[measure], source, colour)

    name = "clean accuracy" if measure == "clean" else f"accuracy under {measure}"
    return _panels(table, draw, "target images", f"{name}, %", log=True)


@matplotlib.rc_context(STYLE)
def difference_from(table: pd.DataFrame, reference: str, measure: str) -> Figure:
    """Accuracy minus that of the reference with the same images, seed by seed, as :func:`against_images`."""
    paired = paired_differences(table, reference, measure)

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        axes.axhline(0, color=GREY, linewidth=1)
        for source, colour in _coloured(table):
            rows = part[part["source"] == source]
            if len(rows):
                _band(axes, rows.groupby("num_images")[measure], source, colour, bounds=(-100, 100))

    return _panels(
        paired if len(paired) else table, draw, "target images", f"accuracy minus that from\n{reference}, points", log=True
    )


@matplotlib.rc_context(STYLE)
def against_epochs(epochs: pd.DataFrame) -> Figure:
    """Validation accuracy against the epoch with the largest number of images, as :func:`against_images`."""
    most = epochs["num_images"].max()

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        for source, colour in _coloured(epochs):
            _band(axes, part[part["source"] == source].groupby("epoch")["clean"], source, colour)

    return _panels(epochs[epochs["num_images"] == most], draw, f"epoch ({most:,} images)", "validation accuracy, %", log=False)


def _panels(
    table: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None], horizontal: str, vertical: str, *, log: bool
) -> Figure:
    depths = list(dict.fromkeys(table["blocks"]))
    figure = Figure(figsize=(1.2 + 2.7 * len(depths), 3.6), layout="constrained")
    for axes, blocks in zip(figure.subplots(1, len(depths), sharey=True, squeeze=False)[0], depths, strict=True):
        draw(axes, table[table["blocks"] == blocks])
        axes.set_title(_title(blocks), fontsize=10)
        axes.set_xlabel(horizontal)
        axes.grid(axis="y")
        if log:  # the numbers that were measured stand at the axis: matplotlib's own labels of a log axis are formulas
            axes.set_xscale("log")
            numbers = sorted(set(table["num_images"]))
            axes.set_xticks(numbers, [f"{number:,}" for number in numbers], rotation=45, ha="right")
            axes.minorticks_off()
    figure.axes[0].set_ylabel(vertical)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return figure


def _band(
    axes: Axes, groups: "pd.core.groupby.SeriesGroupBy", label: str, colour: str, bounds: tuple[float, float] = (0, 100)
) -> None:
    """Means in percent, with the 95% interval of Student's t over seeds where there are several, cut off at the bounds."""
    mean = 100 * groups.mean()
    half = 100 * groups.agg(_half_width).replace(np.inf, 0)  # of one seed a line without a band
    axes.plot(mean.index, mean, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=label)
    axes.fill_between(mean.index, (mean - half).clip(*bounds), (mean + half).clip(*bounds), color=colour, alpha=0.2, linewidth=0)


def _coloured(table: pd.DataFrame) -> Sequence[tuple[str, str]]:
    """Each source with its colour, the same in every plot."""
    sources = list(dict.fromkeys(table["source"]))
    return [(source, COLOURS[place % len(COLOURS)]) for place, source in enumerate(sources)]
