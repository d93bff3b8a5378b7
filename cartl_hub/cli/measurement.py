"""Commands that measure and explain a model, or use it."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    RESULT,
    Checks,
    Curve,
    DataId,
    Device,
    ImageColumn,
    LabelColumn,
    NormName,
    NumImages,
    Seed,
    Strength,
    StrengthOption,
    check_folder,
    curve_radii,
    fraction,
    open_device,
)
from .shown import command, show, without_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..report import Report

commands = typer.Typer(rich_markup_mode="markdown")


@commands.command(epilog="Example: cartl-hub evaluate runs/my_model/model my_photos --num-images 1000 --fail-under 0.4")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Model folder, bundled id, Hub id, name of a timm model, or module:function that returns a module."),
    ],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or Hub id; its test split is used.")],
    norm: Annotated[NormName, typer.Option(help="Norm of the attacks; Linf also runs PGD-20 in L2.")] = NormName.linf,
    eps: Annotated[
        float | None,
        typer.Option(
            parser=fraction, metavar="RADIUS", help="Radius in pixel units of [0, 1]; by default 8/255 in Linf, 0.5 in L2."
        ),
    ] = None,
    strength: StrengthOption = Strength.standard,
    checks: Checks = True,
    curve: Curve = None,
    budget: Annotated[float | None, typer.Option(help="Time limit in minutes; the report says what was left out.")] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit code 1 if robust accuracy is below this share.", rich_help_panel=RESULT),
    ] = None,
    num_images: NumImages = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width of the input, for module:function.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images per forward pass.")] = 128,
    device: Device = None,
    seed: Seed = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder in which finished batches are kept, to resume from.", rich_help_panel=RESULT),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.", rich_help_panel=RESULT)] = Path("report"),
) -> None:
    """Measure clean and robust accuracy of a model; write report.json, report.html and pictures.

    Without a test split, the images that were set aside when the model was trained on the data are measured; if it was not, all
    images. Exit code 1 says that a check failed, or that robust accuracy is below --fail-under.
    """
    from .. import Budget, DataArguments, default_attacks, load_test_split
    from .. import evaluate as measure
    from ..processes import gather, is_main_process

    if curve and norm is not NormName.linf:
        raise typer.BadParameter("--curve is against the Linf radius; leave it out with --norm L2.")
    radii = curve_radii(curve, strength) if norm is NormName.linf else None
    check_folder(output)
    chosen_device = open_device(device)
    measured, policy, label_names, lineage, context = _any_model(model, image_size)
    test, notes = load_test_split(
        data,
        policy,
        DataArguments(image_column=image_column, label_column=label_column, id=data_id),
        label_names=label_names,
        trained_on=lineage.get("data", {}),
    )
    report = measure(
        measured,
        test,
        attacks=default_attacks(eps, norm=norm.value, strength=strength.value),
        checks=checks,
        curve=radii,
        budget=None if budget is None else Budget(minutes=budget),
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        device=chosen_device,
        resume=resume,
        context={"id": _own_name(model, lineage), "command": command(), "notes": list(notes)} | context,
    )
    if is_main_process():
        report.save(output)
        show(report.summary())
        typer.echo(f"\nReport to read: {output / 'report.html'}")
    gather(None)  # a launcher ends all processes as soon as one of them ends with an error
    problems = []
    if report.failed_checks:
        problems.append(f"Failed checks: {', '.join(check.name for check in report.failed_checks)}.")
    if fail_under is not None and report.robust.accuracy < fail_under:
        problems.append(f"Robust accuracy {report.robust.accuracy:.4f} is below {fail_under}.")
    if fail_under is not None and report.dropped:
        problems.append(f"Left out for the budget, so that robust accuracy may be lower: {'; '.join(report.dropped)}.")
    if is_main_process():
        for problem in problems:
            typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)


def _any_model(name: str, image_size: int | None) -> tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]:
    """A model in eval mode, its image policy, label names and lineage, and its description for a report."""
    from .. import Classifier, ImagePolicy
    from ..finetuner import open_source

    module_name, separator, function = name.partition(":")
    if not separator or Path(name).exists():
        if image_size is not None:
            raise typer.BadParameter(f"--image-size is of module:function, and {name} knows its own; leave it out.")
        opened = open_source(name)
        model, told = opened.model, {key: value for key, value in opened.origin.items() if key == "revision"}
        return model.eval(), model.image_policy, model.label_names, model.lineage, told
    import importlib
    import traceback

    from torch import nn

    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"expected module:function, where function() makes a torch module: {error}.") from error
    except (Exception, SystemExit) as error:  # of its other lines, which run too
        traceback.print_exc()
        raise typer.BadParameter(f"expected a module that can be imported, {module_name} ended with {error!r}.") from error
    try:
        model = make()
    except (Exception, SystemExit) as error:  # its author needs the traceback; 1 is the code of a failed check
        traceback.print_exc()
        raise typer.BadParameter(f"expected a torch module from {name}, which ended with {type(error).__name__}.") from error
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"expected a torch module from {name}, got {type(model).__name__}.")
    if isinstance(model, Classifier):
        return model.eval(), model.image_policy, model.label_names, model.lineage, {}
    if image_size is None:
        raise typer.BadParameter(f"expected the size of the input of {name}, got none; pass --image-size.")
    return model.eval(), ImagePolicy(size=(image_size, image_size)), None, {}, {}


@commands.command(epilog="Example: cartl-hub compare report_a report_b --output comparison")
def compare(
    reports: Annotated[
        list[str],
        typer.Argument(help="Folders with reports, bundled ids or Hub ids; the others are compared with the first."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("comparison"),
) -> None:
    """Put reports side by side in one page, with paired intervals where they measured the same images."""
    from ..report.comparison import save_comparison

    check_folder(output)
    if len(reports) < 2:
        raise typer.BadParameter("expected two or more reports.")
    opened = [_report(name) for name in reports]
    often = Counter(report.title for report in opened)
    names = [
        f"{report.title} ({name})" if often[report.title] > 1 else report.title
        for name, report in zip(reports, opened, strict=True)
    ]
    comparison = save_comparison(opened, output, names)
    show(comparison.summary())
    typer.echo(f"\nComparison to read: {output / 'comparison.html'}")


def _report(name: str) -> "Report":
    """Report in a folder, or that of a model."""
    from .. import Report
    from ..folder import read_report
    from ..hub import find_model

    if Path(name).exists():
        return Report.load(name)
    folder, _ = find_model(name)
    report = read_report(folder)
    if report is None:
        raise typer.BadParameter(f"expected a model with a report, got {name}, which has none; cartl-hub evaluate makes one.")
    return report


@commands.command(
    epilog="Example: cartl-hub explain runs/my_model/model my_photos --against wrn16_2.natural_cifar100 --output explain"
)
def explain(
    model: Annotated[str, typer.Argument(help="Model folder, bundled id, Hub id, or name of a timm model.")],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or Hub id.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another model, to show alongside; may be given more than once."),
    ] = None,
    num_images: Annotated[
        int, typer.Option(min=1, help="Number of test images, drawn at random; eight of them are shown.")
    ] = 100,
    top: Annotated[int, typer.Option(min=1, max=100, help="Number of most influential training images to show for each.")] = 5,
    train_images: Annotated[int, typer.Option(min=2, help="Number of training images, drawn at random.")] = 5000,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the classifiers to these training images first, to convergence.")
    ] = False,
    weight_decay: Annotated[float, typer.Option(min=0, help="Weight decay in the classifier's training loss.")] = 5e-4,
    damping: Annotated[float, typer.Option(min=0, help="Number added to the diagonal of the Hessian.")] = 0.0,
    device: Device = None,
    seed: Seed = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model's report: its page, with the explanation added, goes into --output.", rich_help_panel=RESULT
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the explanation.", rich_help_panel=RESULT)] = Path("explain"),
) -> None:
    """Show which pixels and which training images a model's predictions rest on; write explain.html, explain.json and pictures.

    Saliency maps, and influence functions on the classifier, for one model or several side by side. A model of --against whose
    classes aren't those of the data gets a new classifier, fitted to the training images.
    """
    from .. import DataArguments
    from .. import explain as find
    from ..explanation.page import check_report
    from ..finetuner import open_source
    from ..weights import weights_sha256

    check_folder(output)
    chosen_device = open_device(device)
    first, *others = (open_source(name).model.to(chosen_device) for name in (model, *(against or [])))
    if report is not None:
        check_report(report, weights_sha256(first))
    name, *names = _shown_names([model, *(against or [])], [first, *others])
    explanation = find(
        first,
        data,
        against=dict(zip(names, others, strict=True)),
        name=name,
        num_images=num_images,
        top=top,
        train_images=train_images,
        weight_decay=weight_decay,
        damping=damping,
        refit=refit,
        seed=seed,
        data_arguments=DataArguments(image_column=image_column, label_column=label_column, id=data_id),
        context={"id": model, "command": command()},
    )
    explanation.save(output, report=report)
    show(explanation.summary())
    typer.echo(f"\nExplanation to read: {output / 'explain.html'}")
    if report is not None:
        typer.echo(f"In the report: {output / 'report.html'}")


def _own_name(typed: str, lineage: "Mapping[str, Any]") -> str:
    """Name of a model: its own if it was typed as a folder, else what was typed."""
    return str((lineage.get("name") if Path(typed).is_dir() else None) or without_folder(typed))


def _shown_names(given: list[str], models: list[Any]) -> list[str]:
    """Names to show: a model in a folder has its own name, if no other has the same; the rest are shown as typed."""
    if len(set(given)) < len(given):
        raise typer.BadParameter(f"expected different models, got {', '.join(given)}; leave out what is there twice.")
    names = [_own_name(name, model.lineage) for name, model in zip(given, models, strict=True)]
    return names if len(set(names)) == len(names) else given


@commands.command(epilog="Example: cartl-hub predict wrn16_2.fdm4_cifar100 cat.jpg dog.png")
def predict(
    model: Annotated[str, typer.Argument(help="Model folder, id of a bundled model, or Hub id.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.", exists=True)],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print for each.")] = 3,
) -> None:
    """Classify pictures."""
    from PIL import Image

    from .. import load_model
    from ..report import printable

    known = [ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN]
    pictures = []
    for path in files:
        inside = (item for item in path.rglob("*") if item.suffix.lower() in known and item.is_file())
        found = sorted(inside) if path.is_dir() else [path]
        if not found:
            raise typer.BadParameter(f"expected pictures in {path}, got none.")
        pictures += found
    for file, prediction in zip(pictures, load_model(model).predict(pictures, top=top), strict=True):
        typer.echo(printable(f"{file}: {prediction}", keep="\n"))
