"""An explanation in readable form: its folder of files with one HTML page, and its figures for the terminal."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from ..files import write_files
from ..report import Report
from ..report.page import SCALED_UP, csv_text, inline, interval_words, plain, render
from ..report.plots import encode
from . import plots
from .results import Findings, Match, ModelExplanation

LONGEST = 160  # pixels of a side in the page; the figures have them all
COUNTS = (1, 5, 10, 20, 50, 100)  # k that the page and the terminal show as numbers
_BEGIN, _END = "<!-- explanation -->", "<!-- end of the explanation -->"
_BEFORE = "<section>\n<h2>Model</h2>"  # of a report's page, where the sections go


def save_explanation(explanation: Findings, folder: str | Path, report: str | Path | None = None) -> None:
    """Write the files of :meth:`cartl_hub.Explanation.save`; all are on the disk before the first one is replaced.

    Raises:
        ValueError: If there is no report to extend, or it is on other weights.
    """
    folder = Path(folder)
    extended = {} if report is None else {"report.html": extended_report(explanation, Path(report))}
    folder.mkdir(parents=True, exist_ok=True)
    kinds: tuple[Literal["png", "svg"], ...] = ("png", "svg")
    drawn = {draw.__name__: draw(explanation) for draw in (plots.saliency, plots.influence, plots.match)}
    contents: dict[str, bytes | str] = {
        **{f"{name}.{kind}": encode(figure, kind) for name, figure in drawn.items() for kind in kinds},
        "match.csv": _match_csv(explanation),
        "explain.html": explanation_html(explanation).encode(errors="replace"),
        **extended,
        "explain.json": json.dumps(explanation.to_json(), indent=2, allow_nan=False),
    }
    write_files({folder / name: content for name, content in contents.items()})


def explanation_html(explanation: Findings) -> str:
    """The HTML page: a self-contained file without scripts."""
    most = min(10, len(explanation.models[0].match["test"].shares))
    return render("explanation.html.j2", headline_count=most, **_content(explanation))


def check_report(folder: Path, weights_sha256: str) -> str:
    """The page of a report, as far as it can be extended by an explanation of these weights.

    Raises:
        ValueError: If there is none, or it is on other weights.
    """
    path = folder / "report.html"
    if not Report.load(folder).is_of(weights_sha256):
        raise ValueError(f"expected a report of the explained weights ({weights_sha256[:12]}) in {folder}, got one of others.")
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    if page.count(_BEFORE) != 1 or "</head>" not in page:
        raise ValueError(f"expected the page of a report of this version in {path}, got something else; evaluate again.")
    return page


def extended_report(explanation: Findings, folder: Path) -> bytes:
    """A report's page with the sections of an explanation, instead of those of an earlier one."""
    page = check_report(folder, explanation.models[0].weights_sha256)
    page = re.sub(f"{_BEGIN}.*?{_END}\n", "", page, flags=re.DOTALL)
    sections = render("explanation_sections.html.j2", **_content(explanation))
    before, after = page.split(_BEFORE)
    whole = f"{before}{_BEGIN}\n{sections}\n{_END}\n{_BEFORE}{after}"
    # its style may be an earlier version's, which lacks what the sections need
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    head = render("head.html.j2", title=title[1] if title else "Robustness report")
    return re.sub(r"<head>.*?</head>", lambda _: head, whole, count=1, flags=re.DOTALL).encode(errors="replace")


def _content(explanation: Findings) -> dict[str, Any]:
    """Content for the template of the sections."""
    height, width = explanation.images.shape[2:]
    return {
        "explanation": explanation,
        "cards": [_card(explanation, place, int(query)) for place, query in enumerate(explanation.shown)],
        "charts": [(queries, _lines(explanation, queries)) for queries in explanation.models[0].match],
        "counts": {
            queries: [count for count in COUNTS if count <= len(match.shares)]
            for queries, match in explanation.models[0].match.items()
        },
        "fewest": int(np.bincount(explanation.train_labels, minlength=len(explanation.label_names)).min()),
        "size": (height, width),
        "small": width <= SCALED_UP,
        "model_facts": _model_facts,
    }


def _card(explanation: Findings, place: int, query: int) -> dict[str, Any]:
    """One test image, with its findings."""
    return {
        "picture": inline(explanation.images[place], LONGEST),
        "index": int(explanation.indices[query]),
        "label": int(explanation.labels[query]),
        "predictions": [(model.name, int(model.predicted[query])) for model in explanation.models],
        "maps": [
            (model.name, [(method, inline(maps[place], LONGEST)) for method, maps in model.maps.items()])
            for model in explanation.models
        ],
        "influential": [
            (
                model.name,
                [
                    {
                        "picture": inline(explanation.train_images[position], LONGEST),
                        "index": int(explanation.train_indices[position]),
                        "label": int(explanation.train_labels[position]),
                        "influence": value,
                    }
                    for position, value in zip(model.top[query].tolist(), model.values[query].tolist(), strict=True)
                ],
            )
            for model in explanation.models
        ],
    }


def _lines(explanation: Findings, queries: str) -> list[dict[str, Any]]:
    """Curves in percent of a chart's width and height, as those of a report; last, what chance would give."""
    lines: list[dict[str, Any]] = []
    for model in explanation.models:
        match = model.match[queries]
        largest = len(match.shares)
        across = [round(100 * k / largest, 2) for k in range(1, largest + 1)]
        down, low, high = ([round(100 - 100 * share, 2) for share in shares] for shares in (match.shares, match.low, match.high))
        lines.append(
            {
                "name": model.name,
                "largest": largest,
                "points": list(zip(across, down, strict=True)),
                "band": [*zip(across, high, strict=True), *reversed(list(zip(across, low, strict=True)))],
                "dots": [(across[k - 1], down[k - 1], f"k = {k}: {_at(match, k)}") for k in COUNTS if k <= largest],
            }
        )
    height = round(100 - 100 * match.chance, 2)
    chance = {"name": f"drawn at random: {match.chance:.1%}", "points": [(0, height), (100, height)], "band": [], "dots": []}
    return [*lines, {"kind": "chance", "largest": largest} | chance]


def _at(match: Match, count: int) -> str:
    """Share among the ``count`` most influential images, with its interval."""
    return interval_words(match.shares[count - 1], (match.low[count - 1], match.high[count - 1]))


def _model_facts(model: ModelExplanation) -> dict[str, Any]:
    inverse = {"exact": "the whole Hessian, factorised", "conjugate gradients": "conjugate gradients, without the whole Hessian"}
    return {
        "classifier": "fitted to these training images, to convergence" if model.refitted else "the model's own",
        "parameters of the classifier": f"{model.num_parameters:,}",
        "training loss": f"{model.loss:.3g}, about {model.excess:.2g} above its minimum (influence functions assume 0)",
        "inverse of the Hessian": inverse[model.solver],
        "sha256 of the weights": model.weights_sha256,
    }


def _match_csv(explanation: Findings) -> str:
    return csv_text(
        ["model", "queries", "k", "share", "low", "high", "chance", "num_images"],
        (
            [model.name, queries, k, *ends, match.chance, match.num_images]
            for model in explanation.models
            for queries, match in model.match.items()
            for k, ends in enumerate(zip(match.shares, match.low, match.high, strict=True), 1)
        ),
    )


def summary(explanation: Findings) -> RenderableType:
    """Classes of the most influential images, for the terminal."""
    table = Table(title=plain("own class among the k most influential training images"), caption=plain(explanation.sentence))
    table.add_column("model")
    table.add_column("queries")
    counts = [count for count in COUNTS if count <= len(explanation.models[0].match["test"].shares)]
    for count in counts:
        table.add_column(f"k = {count}", justify="right")
    table.add_column("chance", justify="right")
    table.add_column("loss above minimum", justify="right")
    for model in explanation.models:
        for queries, match in model.match.items():
            shares = [f"{match.shares[count - 1]:.1%}" if count <= len(match.shares) else "-" for count in counts]
            cells = [
                model.name,
                f"{match.num_images:,} {queries}",
                *shares,
                f"{match.chance:.1%}",
                f"{model.excess:.2g}",
            ]
            table.add_row(*map(plain, cells))
    return Group(table, *(plain(note) for note in explanation.notes))
