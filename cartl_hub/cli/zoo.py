"""Commands that make, show and publish models of the zoo."""

import os
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import RESULT, Fresh, NormName, NumImages, Set, fraction, is_given, settings
from .shown import command, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..blocks import Block
    from ..models import Classifier

commands = typer.Typer(rich_markup_mode="markdown")


class CheckpointFormat(StrEnum):
    """Projects whose checkpoints can be read."""

    auto = "auto"
    robustness = "robustness"
    cartl = "cartl"
    robustbench = "robustbench"
    timm = "timm"


@commands.command(epilog="Example: cartl-hub pretrain model_cards/wrn16_2.fdm4_cifar100/recipe.yaml")
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, or the folder that contains it.", exists=True)],
    folder: Annotated[
        Path | None, typer.Option(help="Folder for the model; by default beside the recipe.", rich_help_panel=RESULT)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/ and the recipe's id.", rich_help_panel=RESULT)
    ] = None,
    fresh: Fresh = False,
    num_images: NumImages = None,
    changes: Set = None,
) -> None:
    """Train a source model from a recipe, measure it on the test split, write its folder with its card.

    Run again, it resumes where it was interrupted; with `--fresh` it starts over.
    """
    from .. import load_recipe
    from .. import pretrain as make
    from ..config import with_changes
    from ..folder import read_report
    from ..processes import is_main_process
    from ..recipe import KINDS

    loaded = load_recipe(recipe)
    if changes:
        if folder is None:
            raise typer.BadParameter("--set makes another model than the recipe's; say where it goes with --folder.")
        output = output or Path("runs", folder.name)
        changed = settings(changes, ("method", "training", "data", "probe"))
        flat = {f"{group}.{field}": value for group, values in changed.items() for field, value in values.items()}
        loaded = with_changes(loaded, flat, KINDS)
    home = recipe if recipe.is_dir() else recipe.parent
    target = make(loaded, folder or home, output_dir=output, num_images=num_images, command=command(), resume=not fresh)
    if not is_main_process():
        return
    report = read_report(target)
    if report is not None:
        show(report.summary())
    typer.echo(f"Model, card and report: {target}")


@commands.command(epilog="Example: cartl-hub blocks wrn28_4")
def blocks(
    model: Annotated[str, typer.Argument(help="Name of a timm model, id of a bundled model, model folder, or Hub id.")],
    norms: Annotated[
        bool, typer.Option("--norms", help="Load the weights and print how far each layer can stretch a difference (2-norm).")
    ] = False,
) -> None:
    """Print the blocks of a model, counted from the classifier, as --num-blocks counts them."""
    from rich.table import Table

    from .. import list_blocks
    from ..finetuner import open_source, open_untrained

    if norms:
        _show_norms(model, open_source(model).model)
        return

    parts = list_blocks(open_untrained(model))
    table = Table("k", "block", "layers with parameters", "parameters", title=f"{model}: {len(parts) - 1} blocks and the stem")
    for index, block in enumerate(parts):
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name in block.parameters)
        table.add_row(_count(index, parts), block.name, ", ".join(layers), f"{block.num_parameters:,}")
    show(table)


def _show_norms(name: str, model: "Classifier") -> None:
    """Show bounds of all layers, by block."""
    from rich.table import Table

    from .. import list_blocks
    from ..blocks import input_sizes
    from ..spectral import lipschitz_table, weighted

    table = Table("k", "layer", "norm of the kernel", "norm of the operator", "batch norm", title=f"Lipschitz bounds of {name}")
    parts, sizes = list_blocks(model), input_sizes(model, weighted(model.backbone.modules()))
    for index, block in enumerate(parts):
        layers = dict(chain.from_iterable(module.named_modules(prefix=prefix) for prefix, module in block.modules.items()))
        for row in lipschitz_table(layers, sizes):
            found = (row.kernel_norm, row.operator_norm, row.batch_norm)
            shown = ("" if value is None else f"{value:.3f}" for value in found)
            table.add_row(_count(index, parts), row.name, *shown)
    show(table)


def _count(index: int, parts: "Sequence[Block]") -> str:
    """The k with which a block is the first one that is trained; the stem has none."""
    return str(len(parts) - index) if index else "-"


@commands.command(epilog="Example: cartl-hub sources --hub --author my_org")
def sources(
    hub: Annotated[bool, typer.Option("--hub", help="List models on the Hub too.")] = False,
    author: Annotated[str | None, typer.Option(help="User or organisation on the Hub.")] = None,
    search: Annotated[str | None, typer.Option(help="Part of the model's name.")] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="Also list recipes whose models aren't trained yet.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the README, or with --recipes that of model_cards.")
    ] = False,
) -> None:
    """List the models that came with the package, and those on the Hub, with their measured accuracies.

    "recipe only": not trained yet; `cartl-hub pretrain` trains it.
    """
    from rich.table import Table
    from rich.text import Text

    from .. import ModelError, list_sources
    from ..hub import RECIPE_ONLY, models_table, recipes_table
    from ..report import printable

    if markdown:
        if hub or author or search:
            raise typer.BadParameter(
                "--markdown prints the table of what came with the package; leave --hub, --author and --search out."
            )
        typer.echo(recipes_table() if recipes else models_table())
        return
    table = Table("id", "network", "trained", "clean", "worst case", "MB", "where")
    table.columns[0].no_wrap = True
    for column in table.columns[3:6]:
        column.justify, column.no_wrap = "right", True
    unreachable = None
    try:
        found = list_sources(hub=hub or author is not None, author=author, search=search)
    except ModelError as error:
        found, unreachable = list_sources(search=search), error
    shown = found if recipes else [info for info in found if info.where != RECIPE_ONLY]
    for info in shown:
        clean, worst, robust = (
            "-" if share is None else f"{100 * share:.2f} %" for share in (info.clean_acc, info.worst_acc, info.robust_acc)
        )
        worst_cell = "checks failed" if info.doubtful else worst
        if info.attack:
            worst_cell = f"{worst}\n{info.threat_model}\n{info.attack} {robust}"
        cells = (
            info.id,
            info.architecture + (f"\n{info.num_parameters:,} parameters" if info.num_parameters else ""),
            f"{info.data}\n{info.method}",
            f"{clean}\nn = {info.num_images}" if info.num_images else clean,
            worst_cell,
            "-" if info.size is None else f"{info.size / 1e6:.1f}",
            info.where + (f"\n{info.revision[:7]}" if info.revision else ""),
        )
        table.add_row(*(Text(printable(cell, keep="\n")) for cell in cells))
    show(table)
    if waiting := len(found) - len(shown):
        typer.echo(f"{waiting} recipes wait for their training; --recipes lists them.")
    if unreachable is not None:  # what is here is shown first
        raise unreachable


@commands.command(epilog="Example: cartl-hub publish runs/my_model/model --to my_org/wrn16_2.neft4_photos --dry-run")
def publish(
    folder: Annotated[Path, typer.Argument(help="Model folder.", exists=True, file_okay=False)],
    to: Annotated[str, typer.Option(help="Repository on the Hub, org/name; created if it doesn't exist.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository; by default as the organisation set, else public."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it doesn't exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print what would be uploaded.")] = False,
) -> None:
    """Publish a model folder on the Hub in one commit: weights, config, report, pictures, card.

    The token is the one that `hf auth login` stored, or that of HF_TOKEN.
    """
    import yaml

    from ..publishing import pictured, plan
    from ..publishing import publish as send

    if dry_run:
        upload = plan(folder, to, revision=revision, create_pr=create_pr)
        typer.echo(f"To {upload.repo_id}, in one commit:")
        for name, size in upload.files.items():
            typer.echo(f"{size:>12,}  {name}")
        if shown := pictured(upload.files):
            typer.echo(f"Some of the test images are in {' and '.join(shown)}; remove these files where they must stay private.")
        if upload.left_out:
            typer.echo(f"Left out: {', '.join(upload.left_out)}")
        typer.echo(f"\nMetadata of the card:\n{yaml.safe_dump(upload.metadata, sort_keys=False, allow_unicode=True)}".rstrip())
        typer.echo("\nNothing was sent.")
        return
    commit = send(folder, to, private=private, revision=revision, create_pr=create_pr, commit_message=message)
    if create_pr and commit.pr_url is None:
        typer.echo(f"Nothing differs from {commit.commit_url}: no pull request was opened.")
    else:
        typer.echo(f"Published: {commit.pr_url or commit.commit_url}")


@commands.command(
    name="import",
    epilog="Example: cartl-hub import cifar_linf_8.pt --to models/resnet50.robustness_cifar10 --norm Linf --eps 8/255",
)
def import_(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="File, or org/name/FILE on the Hub, or a recipe (.yaml) that names one.")],
    to: Annotated[
        Path | None, typer.Option(help="Model folder; its name becomes the model's. For a recipe by default models/ and its id.")
    ] = None,
    format: Annotated[CheckpointFormat, typer.Option(help="Format of the checkpoint.")] = CheckpointFormat.auto,
    architecture: Annotated[str | None, typer.Option(help="Name in timm; inferred from the shapes if they show it.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Expected number of classes; verified.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean of the normalisation, e.g. 0.49,0.48,0.45; 0 if there is none.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of the normalisation; 1 if there is none.")] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the input in pixels; by default the architecture's.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas, or a file of lines.")] = None,
    entry: Annotated[str | None, typer.Option(help="Entry of the file to read, if several hold weights.")] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Argument of the network that can't be inferred, e.g. negative_slope=0.1."),
    ] = None,
    norm: Annotated[NormName | None, typer.Option(help="Norm of the threat model it was trained for.")] = None,
    eps: Annotated[float | None, typer.Option(parser=fraction, metavar="RADIUS", help="Radius of the threat model.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the weights, e.g. mit.")] = None,
    url: Annotated[str | None, typer.Option(help="Address that the weights came from.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the Hub.")] = None,
) -> None:
    """Make a model folder from a robust checkpoint of another project; no code in it is run.

    Every entry of the file is mapped, or listed with the reason why it is not.
    """
    from .. import import_checkpoint, save_model
    from ..card import render_card
    from ..hub import find_checkpoint
    from ..recipe import load_import_recipe

    arguments: dict[str, Any] = {
        "format": format.value,
        "architecture": architecture,
        "model_args": _model_args(model_arg or []),
        "num_classes": num_classes,
        "mean": _numbers(mean),
        "std": _numbers(std),
        "input_size": input_size,
        "label_names": _lines(labels),
        "entry": entry,
        "norm": None if norm is None else norm.value,
        "eps": eps,
        "license": license,
        "url": url,
    }
    stated: dict[str, Any] = {}
    if Path(checkpoint).suffix in (".yaml", ".yml") or Path(checkpoint).is_dir():
        recipe = load_import_recipe(checkpoint)
        if extra := [name for name in context.params if name not in ("checkpoint", "to", "revision") and is_given(context, name)]:
            raise typer.BadParameter(
                f"--{extra[0].replace('_', '-')} is stated by the recipe, or not needed: change {checkpoint}, or leave it out."
            )
        checkpoint, arguments, to = recipe.checkpoint, recipe.arguments, to or Path("models", recipe.id)
        stated = {"title": recipe.title, "remarks": list(recipe.remarks)}
    if to is None:
        raise typer.BadParameter("expected a folder for the model, --to models/NAME.")
    path, origin = find_checkpoint(checkpoint, revision)
    imported = import_checkpoint(path, **arguments)
    model = imported.model
    _refuse_another_model(to, model.lineage["imported"]["sha256"])
    model.lineage["imported"] |= origin
    model.lineage |= {"name": to.resolve().name, "tag": to.resolve().name.partition(".")[2]} | stated
    save_model(model, to, card=render_card(model))
    typer.echo(f"{imported}\n\nModel folder: {to}\nMeasure it: cartl-hub evaluate {to} DATA")


def _model_args(pairs: list[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name.isidentifier():
            raise typer.BadParameter(f"expected NAME=VALUE for --model-arg, got {pair!r}.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = str(error).splitlines()[0]
            raise typer.BadParameter(
                f"expected NAME=VALUE for --model-arg, got {pair!r}, whose value is no YAML: {problem}."
            ) from None
    return found


def _refuse_another_model(folder: Path, sha256: str) -> None:
    """Refuse a folder of another model: its recipe and its losses would be taken for this one's."""
    from ..folder import CONFIG, read_config

    if (folder / CONFIG).exists():
        lineage = read_config(folder).get("cartl_hub", {}).get("lineage", {})
        if lineage.get("imported", {}).get("sha256") != sha256:
            raise typer.BadParameter(f"expected a new folder for --to, got {folder} with another model; choose another one.")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}.") from None


def _lines(text: str | None) -> list[str] | None:
    if text is None:
        return None
    if os.path.isfile(text):  # which takes any text; pathlib raises on one that is too long for a name
        return Path(text).read_text(encoding="utf-8").splitlines()
    return [name.strip() for name in text.split(",")]


@commands.command(epilog="Example: cartl-hub card model_cards/wrn16_2.fdm4_cifar100")
def card(folder: Annotated[Path, typer.Argument(help="Model folder.", exists=True, file_okay=False)]) -> None:
    """Write the card of a model folder again, from its config and its report."""
    from ..card import render_card
    from ..files import write_file
    from ..folder import CARD, read_model, read_report

    write_file(folder / CARD, render_card(read_model(folder), report=read_report(folder)))
    typer.echo(f"Written: {folder / CARD}")
