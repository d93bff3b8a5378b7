"""Commands that run the tables of the papers, and sweeps."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import DataId, ImageColumn, LabelColumn
from .shown import command, show

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..experiments.cell import Measured

commands = typer.Typer(rich_markup_mode="markdown")


class SweptMethod(StrEnum):
    """Transfer methods with a depth."""

    finetune = "finetune"
    neft = "neft"


class TableName(StrEnum):
    """Tables of the papers."""

    all = "all"
    cases = "cases"
    ablation = "ablation"
    bn = "bn"
    targets = "targets"
    datasize = "datasize"
    ssl = "ssl"


@commands.command(epilog="Example: cartl-hub reproduce cases --only fdm4 --dry-run")
def reproduce(
    table: Annotated[TableName, typer.Argument(help="Table to run.")],
    plan: Annotated[
        Path, typer.Option(help="Plan with sources, target, cases, seeds and training; results go beside it.", dir_okay=False)
    ] = Path("model_cards/results/plan.yaml"),
    only: Annotated[str | None, typer.Option(metavar="PART", help="Run only cells with this in their name.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
    runs: Annotated[Path, typer.Option(help="Folder for checkpoints and finished batches.")] = Path("runs/cells"),
    page: Annotated[Path, typer.Option(help="Page to write from all results.")] = Path("RESULTS.md"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and which are done; run none.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Write the page from the results that are there; run none.")] = False,
) -> None:
    """Run the papers' tables on a plan, and show them alongside the papers' figures.

    A cell is a transfer and its measurement. Finished ones are left alone, interrupted ones resume.
    """
    from collections import Counter

    from rich.table import Table

    from ..experiments import load_plan, make_tables, run_cells, save_results
    from ..experiments.run import DONE, NOT_RUN, UNTRAINED_SOURCE, state

    if not plan.exists():
        raise typer.BadParameter(f"expected a plan, got {plan}, which does not exist: run it in the checkout, or pass --plan.")
    chosen = load_plan(plan)
    tables = make_tables(chosen) if table is TableName.all else make_tables(chosen, [table.value])
    cells = {cell.key: cell for part in tables for cell in part.cells if only is None or only in cell.key}
    if not cells:
        raise typer.BadParameter(f"expected a part of a cell's name for --only, got {only!r}, which is in none; see --dry-run.")
    if dry_run:
        shown = Table("cell", "method", "state")
        shown.columns[0].no_wrap = True
        states = {key: state(cell, plan.parent) for key, cell in cells.items()}
        for key, cell in cells.items():
            shown.add_row(key, cell.setting, states[key])
        show(shown)
        counts = dict.fromkeys((DONE, NOT_RUN, UNTRAINED_SOURCE), 0) | Counter(states.values())
        typer.echo(f"{len(cells)} cells: {', '.join(f'{number} {name}' for name, number in counts.items())}")
        return
    try:
        if not render:
            found = run_cells(cells.values(), results=plan.parent, runs=runs, jobs=jobs, command=command())
            show(_results_table({cells[key].title: result.last for key, result in found.items()}))
    finally:
        save_results(chosen, plan.parent, page)
        typer.echo(f"Written: {page}")


def _results_table(measured: "Mapping[str, Measured]") -> Any:
    """Accuracies of cells."""
    from rich.table import Table

    from ..report.page import plain

    names = list(dict.fromkeys(name for one in measured.values() for name in one.verdicts))
    shown = Table("cell", *names)
    for title, one in measured.items():
        shown.add_row(plain(title), *(f"{one.accuracy(name).accuracy:.2%}" if name in one.verdicts else "" for name in names))
    return shown


@commands.command(
    epilog="Example: cartl-hub sweep wrn16_2.fdm4_cifar100 wrn16_2.natural_cifar100 --data my_photos --num-images 100,400,all"
)
def sweep(
    sources: Annotated[list[str], typer.Argument(help="Sources; differences are from the last one.")],
    data: Annotated[str, typer.Option(help="Folder of images, parquet file or folder, or Hub id.")],
    blocks: Annotated[
        str,
        typer.Option(
            help="Numbers of residual blocks to train; 0: the classifier, all: everything. --num-blocks of finetune counts "
            "the classifier too, and a WRN's norm: its 3 is 1 here (cartl-hub blocks)."
        ),
    ] = "0,1,3,all",
    num_images: Annotated[
        str, typer.Option(help="Numbers of target images to train on; all: all of them.")
    ] = "100,200,400,800,1600,3200,6400",
    seeds: Annotated[str, typer.Option(help="Random seeds for images, classifier and training.")] = "0,1,2",
    method: Annotated[SweptMethod, typer.Option(help="Transfer method.")] = SweptMethod.finetune,
    beta: Annotated[float | None, typer.Option(help="Spectral norm of each trained weight, for neft; by default 0.4.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Number of passes over the images.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate; a tenth of it after each third.")] = 0.1,
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs between points of the curve against epochs.")] = 10,
    attack: Annotated[
        bool, typer.Option("--attack/--clean-only", help="Measure accuracy under PGD-20 too, which takes most of the time.")
    ] = True,
    test_images: Annotated[
        int | None, typer.Option(min=1, help="Number of test images to measure, stratified; by default all.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the training images.")] = True,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment/--no-augment", help="Crop and flip; without it, the frozen blocks' outputs are computed only once."
        ),
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for results, tables and plots.")] = Path("runs/sweep"),
    render: Annotated[bool, typer.Option("--render", help="Write the page from the results that are there; run none.")] = False,
) -> None:
    """Fine-tune sources at several depths on several numbers of images, and plot accuracy against both and against epochs.

    Finished cells are left alone, interrupted ones resume. Chen et al. call it TL, Utrera et al. (2020) swept it.
    """
    from dataclasses import replace

    from ..data import Augmentation
    from ..experiments import Sweep, run_sweep
    from ..loading import DataArguments
    from ..methods import NEFT, FineTuning
    from ..recipe import RecipeData
    from ..training import FeatureCache

    name = Path(data).resolve().name if Path(data).exists() else data
    if data_id is not None and not Path(data).exists():
        raise typer.BadParameter(f"--data-id names data that lie here, and {data!r} is loaded by that name; leave it out.")
    if beta is not None and method is not SweptMethod.neft:
        raise typer.BadParameter(f"--beta is an option of --method neft, got it with {method}; leave it out.")
    read = DataArguments(image_column=image_column, label_column=label_column)
    wanted = Sweep(sources=tuple(sources), target=RecipeData(id=data_id or name, local=data, read=read))
    training = replace(
        wanted.training,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        validate_every=validate_every,
        augmentation=Augmentation(flip=flip) if augment else None,
        cache=None if augment else FeatureCache(),
    )
    chosen = replace(
        wanted,
        blocks=counts("--blocks", blocks),
        num_images=counts("--num-images", num_images),
        seeds=tuple(whole_seed(seed) for seed in counts("--seeds", seeds)),
        method=FineTuning() if method is SweptMethod.finetune else NEFT(num_blocks=1, beta=0.4 if beta is None else beta),
        training=training,
        attacks=wanted.attacks if attack else {},
        test_images=test_images,
    )
    table = run_sweep(chosen, output, jobs=jobs, command=command(), render=render)
    typer.echo(f"{len(table)} cells: {output / 'sweep.csv'}, plots beside it")


def whole_seed(seed: int | None) -> int:
    if seed is None:
        raise typer.BadParameter("expected whole numbers for --seeds, got all.")
    return seed


def counts(option: str, text: str) -> tuple[int | None, ...]:
    """Whole numbers separated by commas; "all" is None."""
    try:
        return tuple(None if part.strip() == "all" else int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected whole numbers, or all, separated by commas for {option}, got {text!r}.") from None
