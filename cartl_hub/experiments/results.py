"""The page of results: tables beside the paper's, differences, claims, and the plot of clean against robust accuracy."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..files import write_files
from ..folder import CARD, stated_weights
from ..hub import bundled_models, untrained_recipes
from ..report import paired_bootstrap
from ..report.plots import BLUE, GREY, ORANGE, STYLE, VERMILION, encode
from .cell import WORST, Cell, CellResult
from .markdown import render
from .plan import Plan
from .run import NOT_RUN, find_result
from .tables import NAMES, Claim, Row, Table, make_tables

TEMPLATE = Path(__file__).parent / "results.md.j2"
ATTACK = "PGD-100"  # CARTL's


@dataclass(frozen=True)
class Difference:
    """Accuracy in the worst case of one row minus another's, on the same images.

    Args:
        column: Column of the table.
        seed: Seed of both cells.
        middle: The difference, in [-1, 1].
        low: Lower end of its 95% bootstrap interval.
        high: Upper end of its 95% bootstrap interval.
        beside: Further differences, under the table's attack and on clean images, by name.
    """

    column: str
    seed: int
    middle: float
    low: float
    high: float
    beside: Mapping[str, float]

    @property
    def seen(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        numbers = f"{100 * self.middle:+.2f} points, {100 * self.low:+.2f} to {100 * self.high:+.2f}"
        beside = ", ".join(f"{name} {100 * share:+.2f}" for name, share in self.beside.items())
        return f"{self.column}, seed {self.seed}: {numbers}; {beside}"


def find_results(tables: Sequence[Table], folder: Path) -> dict[str, CellResult]:
    """Results of all cells that have one, by their keys."""
    cells = {cell.key: cell for table in tables for cell in table.cells}
    return {key: found for key, cell in cells.items() if (found := find_result(cell, folder)) is not None}


def entry_text(cells: Sequence[Cell], results: Mapping[str, CellResult], attack: str = ATTACK, weights: str = "last") -> str:
    """Clean, attacked and worst-case accuracy in %, means over the seeds that were run; "not run" where none was."""
    found = [results[cell.key] for cell in cells if cell.key in results]
    measured = [part for part in (getattr(result, weights) for result in found) if part is not None]
    if not measured:
        return NOT_RUN if weights == "last" else ""
    text = " / ".join(
        f"{100 * np.mean([part.accuracy(name).accuracy for part in measured]):.2f}" for name in ("clean", attack, WORST)
    )
    return text if len(measured) == len(cells) else f"{text} ({len(measured)} of {len(cells)} seeds)"


def differences(table: Table, claim: Claim, results: Mapping[str, CellResult]) -> list[Difference]:
    """Differences in every column, for every seed for which both cells were run on the same images."""
    rows = {row.label: row for row in table.rows}
    better, worse = rows[claim.better], rows[claim.worse]
    found = []
    for column in table.columns:
        for a, b in zip(better.cells.get(column, ()), worse.cells.get(column, ()), strict=True):
            if a.key in results and b.key in results and a.key != b.key:
                pair = [results[cell.key] for cell in (a, b)]
                if pair[0].data["test"] == pair[1].data["test"]:
                    ours, theirs = (part.last.verdicts for part in pair)
                    beside = {name: float(ours[name].mean() - theirs[name].mean()) for name in (table.attack, "clean")}
                    worst = paired_bootstrap(ours[WORST], theirs[WORST])
                    found.append(Difference(column, a.training.seed, *worst, beside))
    return found


def claim_text(claim: Claim, found: Sequence[Difference]) -> str:
    """Plain statement of how far a claim was confirmed."""
    if not found:
        return f"{claim.text}: {NOT_RUN}."
    seen = sum(difference.seen for difference in found)
    against = sum(difference.high < 0 for difference in found)
    if seen == len(found):
        verdict = f"seen in all {len(found)} pairs of cells that were run"
    elif not seen:
        verdict = f"**not seen** in any of the {len(found)} pairs of cells that were run"
    else:
        verdict = f"seen in {seen} of the {len(found)} pairs of cells that were run"
    if against:
        verdict += f"; in {against} **the opposite** is"
    return f"{claim.text}: {verdict} ({'; '.join(map(str, found))})."


@dataclass(frozen=True)
class Point:
    """A model in the plot: means over the seeds that were run, in [0, 1]; robust in the worst case."""

    label: str
    clean: float
    robust: float
    best: bool = False  # by validation, not the last

    @property
    def title(self) -> str:
        return f"{self.label} (best by validation)" if self.best else self.label


def points(tables: Sequence[Table], results: Mapping[str, CellResult]) -> list[Point]:
    """Points for each entry of a table that was run on the whole target, and for its best weights by validation, without
    repetition."""
    found: dict[tuple[str, ...], Point] = {}
    for table in (table for table in tables if table.name in ("cases", "ablation", "bn")):
        for row in table.rows:
            for column, cells in row.cells.items():
                for weights in ("last", "best"):
                    parts = [getattr(results[cell.key], weights) for cell in cells if cell.key in results]
                    measured = [part for part in parts if part is not None]
                    if measured:
                        clean, worst = (
                            float(np.mean([part.accuracy(name).accuracy for part in measured])) for name in ("clean", WORST)
                        )
                        point = Point(f"{row.label}, {column}", clean, worst, best=weights == "best")
                        found.setdefault((weights, *(cell.key for cell in cells)), point)
    return list(found.values())


def pareto_front(found: Sequence[Point]) -> list[Point]:
    """Points of which no other is at least as good in both and better in one, from the most robust to the cleanest."""
    front: list[Point] = []
    for point in sorted(found, key=lambda point: (-point.robust, -point.clean)):
        if not front or point.clean > front[-1].clean:
            front.append(point)
    return front


def area_under(front: Sequence[Point]) -> float:
    """Share of the unit square of clean and robust accuracy that the front dominates."""
    cleans = [0.0, *(point.clean for point in front)]
    return float(sum((right - left) * point.robust for left, right, point in zip(cleans, cleans[1:], front, strict=False)))


@matplotlib.rc_context(STYLE)
def scatter(found: Sequence[Point]) -> Figure:
    """Robust against clean accuracy, with the Pareto front."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = (("NEFT", VERMILION, "o"), ("LwF", ORANGE, "^"), ("TL", BLUE, "s"))
    for kind, colour, marker in kinds:
        chosen = [point for point in found if (kind in point.label) or (kind == "TL" and "affine" in point.label)]
        for best in sorted({point.best for point in chosen}):
            places = np.array([(100 * point.clean, 100 * point.robust) for point in chosen if point.best is best])
            style: dict[str, Any] = {"facecolor": "none" if best else colour, "edgecolor": colour, "marker": marker, "s": 32}
            axes.scatter(places[:, 0], places[:, 1], label=f"{kind}, best by validation" if best else kind, zorder=3, **style)
    front = pareto_front(found)
    axes.step(
        [100 * point.clean for point in front], [100 * point.robust for point in front], where="pre", color=GREY, linewidth=1.2
    )
    for number, point in enumerate(front):
        place = (100 * point.clean, 100 * point.robust)
        left = point.clean < (front[0].clean + front[-1].clean) / 2  # labels stay inside
        offset = (5 if left else -5, -12 if number % 2 else 5)  # neighbours have theirs on different sides
        axes.annotate(
            point.label, place, xytext=offset, textcoords="offset points", ha="left" if left else "right", fontsize=7, color=GREY
        )
    axes.set_xlabel("clean accuracy, %")
    axes.set_ylabel("accuracy in the worst case, %")
    axes.grid()
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    axes.margins(0.12)
    return figure


def render_results(plan: Plan, folder: Path, page: Path) -> str:
    """Text of the page.

    Args:
        plan: Plan of the tables.
        folder: Folder of the results.
        page: Path of the page; links are relative to it.
    """
    tables = make_tables(plan, NAMES)
    results = find_results(tables, folder)
    found = points(tables, results)
    front = pareto_front(found)
    untrained = {cell.source for table in tables for cell in table.cells} & untrained_recipes().keys()
    home = Path(os.path.relpath(folder.resolve(), page.resolve().parent))
    return render(
        TEMPLATE,
        plan=plan,
        tables=[_shown(table, results) for table in tables],
        num_cells=len({cell.key for table in tables for cell in table.cells}),
        results=dict(sorted(results.items())),
        published=_published(page),
        untrained=sorted(untrained),
        sweeps=sorted(path.parent.name for path in folder.glob("*/sweep.csv")),
        front=front,
        points=found,
        area=area_under(front),
        folder=home.as_posix(),
        percent=lambda share: f"{100 * share:.2f}",
    )


def _published(page: Path) -> dict[str, str]:
    """Links to the cards of the models in the checkout, by the hash of their weights."""
    found = {}
    for name, folder in bundled_models().items():
        if weights := stated_weights(folder):
            card = Path(os.path.relpath((folder / CARD).resolve(), page.resolve().parent)).as_posix()
            found[weights] = f"[{name}]({card})"
    return found


def save_results(plan: Plan, folder: Path, page: Path) -> None:
    """Write the page, and the plot beside the results."""
    tables = make_tables(plan, NAMES)
    found = points(tables, find_results(tables, folder))
    pictures = {f"pareto.{kind}": encode(scatter(found), kind) for kind in ("png", "svg")} if found else {}  # type: ignore[arg-type]
    write_files({**{folder / name: content for name, content in pictures.items()}, page: render_results(plan, folder, page)})


def _shown(table: Table, results: Mapping[str, CellResult]) -> dict:
    """Content of a table for the template."""
    claims = [claim_text(claim, differences(table, claim, results)) for claim in table.claims]
    rows = [(row.label, [_entry(row, column, table.attack, results) for column in table.columns]) for row in table.rows]
    kept = ("title", "columns", "notes", "attack")
    was_run = any(cell.key in results for cell in table.cells)
    return {"rows": rows, "claims": claims, "was_run": was_run, **{name: getattr(table, name) for name in kept}}


def _entry(row: Row, column: str, attack: str, results: Mapping[str, CellResult]) -> str:
    cells = row.cells.get(column, ())
    lines = [entry_text(cells, results, attack)]
    if best := entry_text(cells, results, attack, "best"):
        lines.append(f"best by validation: {best}")
    if column in row.paper:
        lines.append(row.paper[column])
    return "<br>".join(lines)
