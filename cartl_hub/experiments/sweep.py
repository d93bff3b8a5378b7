"""Sweeps over the source, the blocks that are trained, the number of images and the epochs of a transfer (Utrera et al.,
"Adversarially-trained deep nets transfer better", 2020, https://arxiv.org/abs/2007.05869)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..attacks import PGD, Attack
from ..batchnorm import BatchNormPolicy
from ..blocks import count_blocks
from ..config import to_dict
from ..files import write_files
from ..finetuner import open_untrained
from ..methods import FineTuning, Method
from ..ranges import check_whole
from ..recipe import RecipeData
from ..report.plots import encode
from ..training import Schedule, TrainingArguments
from .cell import Cell, CellResult
from .run import find_result, load_target, run_cells
from .sweep_page import PLACES, make_figures, render_sweep

WHOLE = "all"


def _thirds() -> TrainingArguments:
    """The paper's training arguments: SGD with lr 0.1, a tenth of it after each third, 150 epochs."""
    schedule = Schedule(warmup=0.0, decay="steps", milestones=(1 / 3, 2 / 3), gamma=0.1)
    return TrainingArguments(epochs=150, lr=0.1, schedule=schedule, nesterov=False, precision="fp32", validation_attack=None)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every source with every depth on every number of images; frozen blocks keep the source's statistics.

    Args:
        sources: Ids, folders or timm names; differences are from the last one, usually the natural one.
        target: Data to transfer to.
        blocks: Numbers of residual blocks that are trained with the classifier and the norm between them; None is the whole
            network.
        num_images: Numbers of target images, stratified, each set inside the larger ones; None is all.
        seeds: Seeds for the choice of images, the classifier and training; one cell for each.
        method: Transfer method; its ``num_blocks`` is replaced by each depth. Natural fine-tuning, as in the paper, by default.
        training: Training arguments; their seed is replaced. The paper's by default. If they have a ``cache``, cells that train
            the whole network don't use it.
        attacks: Attacks by name; with none, clean accuracy alone is measured.
        test_images: Number of test images, stratified; all by default.

    Raises:
        ValueError: On empty or wrong entries, a method without ``num_blocks`` or one that can't train the whole network if
            that is requested, or names of attacks that are already columns of the table.
    """

    sources: tuple[str, ...]
    target: RecipeData
    blocks: tuple[int | None, ...] = (0, 1, 3, 9, None)
    num_images: tuple[int | None, ...] = (100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, None)
    seeds: tuple[int, ...] = (0, 1, 2)
    method: Method = field(default_factory=FineTuning)
    training: TrainingArguments = field(default_factory=_thirds)
    attacks: dict[str, Attack] = field(default_factory=lambda: {"PGD-20": PGD(eps=8 / 255, step_size=2 / 255, steps=20)})
    test_images: int | None = None

    def __post_init__(self) -> None:
        for name in ("sources", "blocks", "num_images", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"expected different entries in {name}, at least one, got {values}.")
        for name, low in (("blocks", 0), ("num_images", 1)):
            for value in getattr(self, name):
                if value is not None:
                    check_whole(f"each of {name}", value, (">=", low))
        if not any(each.name == "num_blocks" and each.init for each in fields(self.method)):
            raise ValueError(
                f"expected a method that trains the last num_blocks blocks, got {type(self.method).__name__}, which has no such "
                "argument; take FineTuning, NEFT, AdversarialTraining or TRADES."
            )
        for blocks in self.blocks:
            self._method(None if blocks is None else 1)
        for name in self.attacks:
            if name in PLACES or not re.fullmatch(r"\w[\w .+-]*", name):
                raise ValueError(
                    "expected names of attacks that can be columns of the table and names of files, of letters, digits, spaces "
                    f"and '.+-', and none of {', '.join(PLACES)}; got {name!r}."
                )

    @property
    def num_cells(self) -> int:
        """Number of all cells that :meth:`cells` lists."""
        return math.prod(len(entries) for entries in (self.sources, self.blocks, self.num_images, self.seeds))

    def cells(self) -> dict[tuple[str, str, int | None, int], Cell]:
        """Cells by source, blocks ("all" is the whole network), number of images and seed.

        Raises:
            ValueError: If a source has fewer blocks.
        """
        depths = {source: self._depths(source) for source in self.sources}
        return {
            (source, WHOLE if blocks is None else str(blocks), number, seed): Cell(
                source=source,
                target=replace(self.target, read=replace(self.target.read, train_images=number, seed=seed)),
                method=self._method(depths[source][blocks]),
                bn=BatchNormPolicy(),
                training=replace(self.training, seed=seed, cache=None if blocks is None else self.training.cache),
                attacks=self.attacks,
                num_images=self.test_images,
                best=False,
            )
            for number in self.num_images  # data outermost: they are read once for all cells that share them
            for seed in self.seeds
            for blocks in self.blocks
            for source in self.sources
        }

    def _method(self, num_blocks: int | None) -> Method:
        try:
            return replace(self.method, num_blocks=num_blocks)  # type: ignore[call-arg]
        except ValueError as error:
            whole = " The whole network is one of blocks; leave it out." if num_blocks is None else ""
            raise ValueError(f"{type(self.method).__name__}: {error}{whole}") from error

    def _depths(self, source: str) -> dict[int | None, int | None]:
        model = open_untrained(source)
        return {blocks: None if blocks is None else count_blocks(model, blocks) for blocks in self.blocks}


def run_sweep(
    sweep: Sweep, folder: str | Path, *, jobs: int = 1, command: str | None = None, render: bool = False
) -> pd.DataFrame:
    """Run the missing cells of a sweep; write its table and its plots.

    The folder then holds ``sweep.csv`` and ``sweep.parquet`` (a row for each cell), ``epochs.csv`` (validation accuracy after
    each validation), ``saved_images.csv`` and ``saved_epochs.csv`` (what a source needs for the accuracy of the last one) and the
    plots, as PNG and SVG, and ``README.md``, which shows all that with paired differences. joblib runs the cells, in the backend
    of a surrounding ``joblib.parallel_config`` if there is one.

    Args:
        sweep: Sweep to run.
        folder: Folder for everything; run again after an interruption, the sweep resumes.
        jobs: Number of cells at a time.
        command: Command that reproduces this run, for the record.
        render: Write tables, plots and page from the existing results, and run none.

    Returns:
        The rows of ``sweep.csv``.

    Raises:
        DataError: Before anything is trained, if the data can't be read or hold fewer images.
        ExperimentError: After all others are done, if cells failed.
    """
    folder = Path(folder)
    cells = sweep.cells()
    missing = [cell for cell in cells.values() if not render and find_result(cell, folder / "cells") is None]
    if missing:
        most = max(missing, key=lambda cell: cell.target.read.train_images or 0)
        load_target(most.target, open_untrained(most.source).image_policy)
    try:
        run_cells(
            [] if render else cells.values(),
            results=folder / "cells",
            runs=folder / "runs",
            keep=False,
            jobs=jobs,
            command=command,
        )
    finally:  # what is there is worth a table
        results = {place: find_result(cell, folder / "cells") for place, cell in cells.items()}
        found = {place: result for place, result in results.items() if result is not None}
        table = sweep_table(found)
        if len(table):
            save_sweep(table, epochs_table(found, sweep), sweep, list(found.values()), folder)
    return table


def save_sweep(table: pd.DataFrame, epochs: pd.DataFrame, sweep: Sweep, results: Sequence[CellResult], folder: Path) -> None:
    """Write tables, plots and the page.

    Args:
        table: Table from :func:`sweep_table`.
        epochs: Table from :func:`epochs_table`.
        sweep: Sweep that the tables belong to.
        results: Results of its cells.
        folder: Folder to write to; created if it doesn't exist.
    """
    reference = sweep.sources[-1]
    tables = {"sweep": table, "epochs": epochs, "saved_images": saved_images(table, reference)}
    tables["saved_epochs"] = saved_epochs(epochs, reference)
    figures = make_figures(table, epochs, reference)
    contents: dict[Path, bytes | str] = {
        folder / f"{name}.{kind}": encode(figure, kind)  # type: ignore[arg-type]
        for name, figure in figures.items()
        for kind in ("png", "svg")
    }
    contents |= {folder / f"{name}.csv": part.to_csv(index=False) for name, part in tables.items()}
    contents[folder / "sweep.parquet"] = table.to_parquet(index=False)
    contents[folder / "README.md"] = render_sweep(
        tables, figures, results, sweep.sources, _in_words(sweep.method), sweep.num_cells - len(results)
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_files(contents)


def _in_words(method: Method) -> str:
    """A method in words, without the depth, which differs."""
    if isinstance(method, FineTuning):
        return "on natural images"
    options = [f"{name}={value}" for name, value in to_dict(method).items() if name not in ("name", "num_blocks", "attack")]
    return f"by {type(method).__name__} ({', '.join(options)})"


Found = Mapping[tuple[str, str, int | None, int], CellResult]


def sweep_table(found: Found) -> pd.DataFrame:
    """A row for each cell: source, blocks, number of images, seed, accuracies in [0, 1], number of test images."""
    rows = []
    for (source, blocks, _, seed), result in found.items():
        place = {"source": source, "blocks": blocks, "num_images": result.data["train"]["num_images"], "seed": seed}
        verdicts = result.last.verdicts
        accuracies = {name: result.last.accuracy(name).accuracy for name in verdicts}
        rows.append(place | accuracies | {"test_images": len(verdicts["clean"]), "steps": result.last.step})
    table = pd.DataFrame(rows)  # a number may be that of all images, and so occur twice
    return table.drop_duplicates(["source", "blocks", "num_images", "seed"], ignore_index=True) if rows else table


def epochs_table(found: Found, sweep: Sweep) -> pd.DataFrame:
    """A row for each validation: its epoch and the clean accuracy on the validation images, in [0, 1]."""
    rows = []
    for (source, blocks, _, seed), result in found.items():
        number = result.data["train"]["num_images"]
        per_epoch = max(1, number // sweep.training.batch_size)
        place = {"source": source, "blocks": blocks, "num_images": number, "seed": seed}
        rows += [place | {"epoch": one["step"] / per_epoch, "clean": one["clean_acc"]} for one in result.validations]
    table = pd.DataFrame(rows, columns=["source", "blocks", "num_images", "seed", "epoch", "clean"])
    return table.drop_duplicates(["source", "blocks", "num_images", "seed", "epoch"], ignore_index=True)


def saved_images(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Number of images that each source needs for the clean accuracy that the reference has with a given number.

    Means over seeds, for numbers of images that were run with all seeds, interpolated linearly in the logarithm of the number.
    If even the smallest number is enough, it is given with ``at_most``; if none is, nothing is given.

    Returns:
        Rows of source, blocks, num_images (of the reference), clean, enough (the fewest with which the reference has that
        accuracy: more images need not be better), needed, factor (enough / needed), at_most.
    """
    rows = []
    means = _means(table, ["source", "blocks", "num_images"])
    for source in (source for source in dict.fromkeys(table["source"]) if source != reference):
        for blocks in dict.fromkeys(table["blocks"]):
            if (source, blocks) not in means.index.droplevel(2) or (reference, blocks) not in means.index.droplevel(2):
                continue
            own, theirs = means[source, blocks], means[reference, blocks]
            for number, accuracy in theirs.items():
                needed, at_most = _reached(own.index.to_numpy(), own.to_numpy(), accuracy)
                enough, _ = _reached(theirs.index.to_numpy(), theirs.to_numpy(), accuracy)
                row = {"source": source, "blocks": blocks, "num_images": number, "clean": accuracy, "enough": enough}
                rows.append(row | {"needed": needed, "factor": enough / needed, "at_most": at_most})
    return pd.DataFrame(rows, columns=["source", "blocks", "num_images", "clean", "enough", "needed", "factor", "at_most"])


def saved_epochs(epochs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Number of epochs that each source needs for the validation accuracy that the reference has after its last one.

    As :func:`saved_images`, with the same number of images, interpolated linearly between validations.

    Returns:
        Rows of source, blocks, num_images, clean, epochs (of the reference), enough, needed, factor (enough / needed), at_most.
    """
    rows = []
    means = _means(epochs, ["source", "blocks", "num_images", "epoch"])
    places = epochs[epochs["source"] != reference].groupby(["source", "blocks", "num_images"], sort=False).groups
    for source, blocks, number in places:
        if {(source, blocks, number), (reference, blocks, number)} <= set(means.index.droplevel(3)):
            own, theirs = means[source, blocks, number], means[reference, blocks, number]
            last, accuracy = theirs.index[-1], theirs.iloc[-1]
            needed, at_most = _reached(own.index.to_numpy(), own.to_numpy(), accuracy, scale=np.asarray, back=float)
            enough, _ = _reached(theirs.index.to_numpy(), theirs.to_numpy(), accuracy, scale=np.asarray, back=float)
            row = {"source": source, "blocks": blocks, "num_images": number, "clean": accuracy, "epochs": last, "enough": enough}
            rows.append(row | {"needed": needed, "factor": enough / needed, "at_most": at_most})
    columns = ["source", "blocks", "num_images", "clean", "epochs", "enough", "needed", "factor", "at_most"]
    return pd.DataFrame(rows, columns=columns)


def _means(table: pd.DataFrame, places: list[str]) -> pd.Series:
    """Mean clean accuracy of each place that has all seeds: means over other seeds would differ because of these too."""
    groups = table.groupby(places)["clean"]
    return groups.mean()[groups.size() == table["seed"].nunique()]


def _reached(
    numbers: np.ndarray,
    accuracies: np.ndarray,
    wanted: float,
    scale: Callable[[np.ndarray], np.ndarray] = np.log,
    back: Callable[[float], float] = math.exp,
) -> tuple[float, bool]:
    """The smallest number with which an accuracy is reached, NaN if it never is; whether a smaller one might do too.

    Args:
        scale: Function to the scale on which the number is interpolated.
        back: Inverse of ``scale``.
    """
    if accuracies[0] >= wanted:
        return float(numbers[0]), True
    above = np.flatnonzero(accuracies >= wanted)
    if not len(above):
        return math.nan, False
    right = above[0]
    share = (wanted - accuracies[right - 1]) / (accuracies[right] - accuracies[right - 1])
    low, high = scale(numbers[right - 1 : right + 1])
    return back(float(low + share * (high - low))), False
