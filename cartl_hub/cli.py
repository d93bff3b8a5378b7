"""The command line, thin over the same functions; what needs torch is imported when a command runs."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .attacks import Attack
    from .experiments.cell import Measured
    from .methods import Method
    from .report import Report

INTERRUPTED = 130  # typer's exit code after Ctrl-C

app = typer.Typer(
    name="cartl-hub",
    help="Robust source models, robust fine-tuning, and a robustness report.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class MethodName(StrEnum):
    """Transfer methods."""

    neft = "neft"
    finetune = "finetune"
    lwf = "lwf"
    adversarial = "adversarial"


class AttackName(StrEnum):
    """Training attacks."""

    pgd = "pgd"
    fgsm = "fgsm"
    rfgsm = "rfgsm"
    nfgsm = "nfgsm"


class CheckpointFormat(StrEnum):
    """Projects whose checkpoints can be read."""

    auto = "auto"
    robustness = "robustness"
    cartl = "cartl"
    robustbench = "robustbench"
    timm = "timm"


class NormName(StrEnum):
    """Norms of threat models."""

    linf = "Linf"
    l2 = "L2"


class Strength(StrEnum):
    """Sets of attacks."""

    quick = "quick"
    standard = "standard"
    full = "full"


class TableName(StrEnum):
    """Tables of the papers."""

    all = "all"
    cases = "cases"
    ablation = "ablation"
    bn = "bn"
    targets = "targets"
    datasize = "datasize"
    ssl = "ssl"


class Statistics(StrEnum):
    """Whose statistics batch norm in the frozen blocks uses."""

    source = "source"
    target = "target"


class Affine(StrEnum):
    """Whether batch norm's affine maps in the trained blocks are trained."""

    trained = "trained"
    frozen = "frozen"


def _fraction(text: str) -> float:
    """ "8/255" or "0.03" as a number."""
    try:
        numerator, _, denominator = text.partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"expected a radius such as 8/255 or 0.031, got {text!r}.") from None


Device = Annotated[
    str | None, typer.Option(help="Where to run, such as cuda:1, mps or cpu; by default a CUDA device where there is one.")
]
METHOD, TRAINING, DATA, RESULT = "Method", "Training", "Data", "Result"  # panels of --help
ImageColumn = Annotated[str | None, typer.Option(help="Column with the pictures; found by itself.", rich_help_panel=DATA)]
LabelColumn = Annotated[str | None, typer.Option(help="Column with the labels; found by itself.", rich_help_panel=DATA)]
DataId = Annotated[
    str | None,
    typer.Option(help="Name of the data in report and card; by default the folder's or the Hub id.", rich_help_panel=DATA),
]
NumImages = Annotated[
    int | None,
    typer.Option(min=1, help="Test images of the report, each class in proportion; by default all.", rich_help_panel=RESULT),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Begin anew; checkpoints of an earlier run in the folder are removed.", rich_help_panel=RESULT),
]
Seed = Annotated[int, typer.Option(min=0, help="Of all random draws.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: cartl-hub finetune wrn16_2.fdm4_cifar100 my_photos --num-blocks 4 --epochs 10")
def finetune(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Id of a bundled model, Hub id, model folder, or name of a timm model.")],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or Hub id.")],
    method: Annotated[MethodName, typer.Option(help="Transfer method.", rich_help_panel=METHOD)] = MethodName.neft,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            min=0, help="Blocks to train, from the classifier; 0: the whole network (not NEFT).", rich_help_panel=METHOD
        ),
    ] = 4,
    beta: Annotated[float, typer.Option(help="neft: spectral norm of each trained weight.", rich_help_panel=METHOD)] = 0.4,
    convex_residual: Annotated[
        bool,
        typer.Option(
            "--convex-residual", help="neft: convex residual sums, as part of the architecture.", rich_help_panel=METHOD
        ),
    ] = False,
    weight: Annotated[float, typer.Option(help="lwf: weight of the feature distance.", rich_help_panel=METHOD)] = 0.005,
    attack: Annotated[AttackName, typer.Option(help="adversarial: training attack.", rich_help_panel=METHOD)] = AttackName.pgd,
    eps: Annotated[
        float,
        typer.Option(
            parser=_fraction, metavar="RADIUS", help="adversarial: Linf radius of the training attack.", rich_help_panel=METHOD
        ),
    ] = "8/255",  # type: ignore[assignment]
    adversarial_share: Annotated[
        float | None,
        typer.Option(
            help="adversarial: share of the images whose adversarial versions are added to the clean ones; by default "
            "adversarial images alone.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    extractor_statistics: Annotated[
        Statistics, typer.Option(help="Batch norm of the frozen blocks.", rich_help_panel=METHOD)
    ] = Statistics.source,
    submodel_affine: Annotated[
        Affine, typer.Option(help="Batch norm of the trained blocks.", rich_help_panel=METHOD)
    ] = Affine.trained,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.", rich_help_panel=TRAINING)] = 20,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps instead of epochs, for a stream.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step over all processes.", rich_help_panel=TRAINING)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 0.02,
    flip: Annotated[
        bool, typer.Option(help="Mirror half of the images; wrong for digits and text.", rich_help_panel=TRAINING)
    ] = True,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.", rich_help_panel=TRAINING)] = "auto",
    cache: Annotated[
        bool, typer.Option("--cache", help="Compute once what the frozen blocks give.", rich_help_panel=TRAINING)
    ] = False,
    cache_views: Annotated[
        int,
        typer.Option(
            min=0, help="--cache: augmented views of each image, in turn; 0: the images as they are.", rich_help_panel=TRAINING
        ),
    ] = 8,
    log_with: Annotated[str | None, typer.Option(help="Tracker, e.g. tensorboard.", rich_help_panel=TRAINING)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws.", rich_help_panel=TRAINING)] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    train_images: Annotated[
        int | None,
        typer.Option(min=1, help="Train on this number of images, stratified; fewer lie among more.", rich_help_panel=DATA),
    ] = None,
    train_share: Annotated[
        float | None, typer.Option(help="Train on this share of the images, in (0, 1].", rich_help_panel=DATA)
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data as a stream.", rich_help_panel=DATA)] = False,
    num_images: NumImages = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/ and the model's name.", rich_help_panel=RESULT)
    ] = None,
    fresh: Fresh = False,
    licence: Annotated[
        str | None, typer.Option(help="Of the new weights, e.g. mit; by default none is stated.", rich_help_panel=RESULT)
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(help="Publish as org/name on the Hub; the token is checked first.", rich_help_panel=RESULT),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="--push-to: of a new repository.", rich_help_panel=RESULT)
    ] = None,
) -> None:
    """Fine-tune a source on your images, measure clean and robust accuracy, write a model folder.

    Run again with the same arguments it goes on where it was interrupted; with `--fresh` it begins anew.
    """
    from . import Augmentation, BatchNormPolicy, DataArguments, FeatureCache, RobustFineTuner, TrainingArguments

    _refuse_options_of_other_methods(context, method)
    if _is_given(context, "cache_views") and not cache:
        raise typer.BadParameter("--cache-views is of --cache; add that, or leave it out.")
    if private is not None and push_to is None:
        raise typer.BadParameter("--private and --public are of the repository of --push-to; add that, or leave them out.")
    tuner = RobustFineTuner(
        source,
        data,
        method=_method(method, num_blocks or None, beta, convex_residual, weight, _attack(attack, eps), adversarial_share),
        bn=BatchNormPolicy(extractor_statistics=extractor_statistics.value, submodel_affine=submodel_affine.value),
        arguments=TrainingArguments(
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            lr=lr,
            precision=precision,  # type: ignore[arg-type]
            log_with=log_with,
            seed=seed,
            augmentation=None if cache and not cache_views else Augmentation(flip=flip),
            cache=FeatureCache(views=cache_views or None) if cache else None,
        ),
        data_arguments=DataArguments(
            image_column=image_column,
            label_column=label_column,
            id=data_id,
            train_images=train_images,
            train_share=train_share,
            streaming=streaming,
            seed=seed,
        ),
        output_dir=output,
        licence=licence,
        push_to_hub=push_to is not None,
        hub_model_id=push_to,
        hub_private_repo=private,
    )
    result = tuner.train(resume=not fresh)
    if result.stopped:
        typer.echo(f"Ended early: {result.stopped}.")
    if push_to is None:
        tuner.save()  # before the evaluation, which may be long
    report = tuner.evaluate(num_images=num_images, context={"command": _command()})
    folder = tuner.save()
    _show(report.summary())
    typer.echo(f"\nModel, card and report: {folder}\nReport to read: {folder / 'report.html'}")
    if tuner.commit:
        typer.echo(f"Published: {tuner.commit.commit_url}")
    typer.echo(f"Use it: cartl-hub predict {folder} PICTURE")


def _refuse_options_of_other_methods(context: typer.Context, method: MethodName) -> None:
    """An option that the method does not have would have no effect."""
    of_methods = {
        "num_blocks": (MethodName.neft, MethodName.finetune, MethodName.adversarial),
        "beta": (MethodName.neft,),
        "convex_residual": (MethodName.neft,),
        "weight": (MethodName.lwf,),
        "attack": (MethodName.adversarial,),
        "eps": (MethodName.adversarial,),
        "adversarial_share": (MethodName.adversarial,),
    }
    for name, methods in of_methods.items():
        if method not in methods and _is_given(context, name):
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(
                f"{option} is an option of {' and '.join(methods)}, got it with --method {method}; leave it out."
            )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _check_folder(path: Path) -> None:
    """That reports can be written there, before anything is measured for them."""
    import tempfile

    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"expected a folder for the output, got the file {path}.")
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise typer.BadParameter(f"expected a folder that can be written for the output, got {path}: {error.strerror}.") from None
    if made:
        path.rmdir()


def _attack(name: AttackName, eps: float) -> "Attack":
    from . import FGSM, NFGSM, PGD, RFGSM

    if name is AttackName.pgd:
        return PGD(eps=eps, step_size=eps / 4, steps=7)
    return {AttackName.fgsm: FGSM, AttackName.rfgsm: RFGSM, AttackName.nfgsm: NFGSM}[name](eps=eps)


def _method(
    name: MethodName,
    num_blocks: int | None,
    beta: float,
    convex_residual: bool,
    weight: float,
    attack: "Attack",
    adversarial_share: float | None,
) -> "Method":
    from . import NEFT, AdversarialTraining, FineTuning, LwF

    if name is MethodName.neft:
        if num_blocks is None:
            raise typer.BadParameter("NEFT needs the number of blocks to train, --num-blocks 1 or more.")
        return NEFT(num_blocks=num_blocks, beta=beta, convex_residual=convex_residual)
    if name is MethodName.lwf:
        return LwF(weight=weight)
    if name is MethodName.adversarial:
        return AdversarialTraining(attack=attack, num_blocks=num_blocks, adversarial_share=adversarial_share)
    return FineTuning(num_blocks=num_blocks)


@app.command(epilog="Example: cartl-hub evaluate runs/my_model/model my_photos --num-images 1000 --fail-under 0.4")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Model folder, bundled id, Hub id, name of a timm model, or module:function that makes a module."),
    ],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or Hub id; its test split is used.")],
    norm: Annotated[NormName, typer.Option(help="Of the attacks; beside Linf ones stands PGD-20 in L2.")] = NormName.linf,
    eps: Annotated[
        float | None,
        typer.Option(parser=_fraction, metavar="RADIUS", help="In pixel units of [0, 1]; 8/255 in Linf, 0.5 in L2 by default."),
    ] = None,
    strength: Annotated[Strength, typer.Option(help="Which attacks.")] = Strength.standard,
    checks: Annotated[
        bool, typer.Option("--checks/--no-checks", help="Whether to check that the figures can be trusted.")
    ] = True,
    budget: Annotated[float | None, typer.Option(help="Minutes it may take; the report says what was left out.")] = None,
    fail_under: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit code 1 if robust accuracy is below this share.", rich_help_panel=RESULT),
    ] = None,
    num_images: NumImages = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="module:function: height and width of its input.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 128,
    device: Device = None,
    seed: Seed = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder in which finished batches are kept, to go on after a kill.", rich_help_panel=RESULT),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.", rich_help_panel=RESULT)] = Path("report"),
) -> None:
    """Measure clean and robust accuracy of a model; write report.json, report.html and pictures.

    Where the data have no test split, the images are measured that were set aside when the model was trained on them; if it was
    not, all images. Exit code 1 says that a check failed, or that robust accuracy is below --fail-under.
    """
    from . import Budget, DataArguments, default_attacks, load_test_split
    from . import evaluate as measure

    _check_folder(output)
    chosen_device = _device(device)
    radius = {} if eps is None else {"eps" if norm is NormName.linf else "l2_eps": eps}
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
        attacks=default_attacks(**radius, norm=norm.value, strength=strength.value),
        checks=checks,
        budget=None if budget is None else Budget(minutes=budget),
        num_images=num_images,
        batch_size=batch_size,
        seed=seed,
        device=chosen_device,
        resume=resume,
        context={"id": model, "command": _command(), "notes": list(notes)} | context,
    )
    report.save(output)
    _show(report.summary())
    typer.echo(f"\nReport to read: {output / 'report.html'}")
    failed = [check.name for check in report.checks if check.status == "fail"]
    if failed:
        typer.echo(f"Failed checks: {', '.join(failed)}.", err=True)
    low = fail_under is not None and report.robust.accuracy < fail_under
    if low:
        typer.echo(f"Robust accuracy {report.robust.accuracy:.4f} is below {fail_under}.", err=True)
    unfinished = fail_under is not None and bool(report.dropped)
    if unfinished:
        typer.echo(f"Left out for the budget, so that robust accuracy may be lower: {'; '.join(report.dropped)}.", err=True)
    if failed or low or unfinished:
        raise typer.Exit(1)


def _device(name: str | None) -> Any:
    """A device, once a tensor could be put there."""
    import torch

    from .processes import default_device

    try:
        device = default_device() if name is None else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        raise typer.BadParameter(f"expected a device that torch has here, got {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _any_model(name: str, image_size: int | None) -> tuple[Any, Any, Any, dict[str, Any], dict[str, Any]]:
    """A model in eval mode, its image policy, label names and lineage, and what a report says of it."""
    from . import Classifier, ImagePolicy
    from .finetuner import open_source

    module_name, separator, function = name.partition(":")
    if not separator or Path(name).exists():
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
    try:
        model = make()
    except Exception as error:  # somebody else's code; its traceback is of use to them, and 1 is the code of a failed check
        traceback.print_exc()
        raise typer.BadParameter(f"expected a torch module from {name}, which ended with {type(error).__name__}.") from error
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(f"expected a torch module from {name}, got {type(model).__name__}.")
    if isinstance(model, Classifier):
        return model.eval(), model.image_policy, model.label_names, model.lineage, {}
    if image_size is None:
        raise typer.BadParameter(f"expected the size of the input of {name}, got none; pass --image-size.")
    return model.eval(), ImagePolicy(size=(image_size, image_size)), None, {}, {}


@app.command(epilog="Example: cartl-hub compare report_a report_b --output comparison")
def compare(
    reports: Annotated[
        list[str],
        typer.Argument(help="Folders with reports, bundled ids or Hub ids; the first is what the others are compared with."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("comparison"),
) -> None:
    """Put reports side by side in one page, with paired intervals where they measured the same images."""
    from .report.comparison import save_comparison

    _check_folder(output)
    if len(reports) < 2:
        raise typer.BadParameter("expected two or more reports.")
    comparison = save_comparison([_report(name) for name in reports], output)
    _show(comparison.summary())
    typer.echo(f"\nComparison to read: {output / 'comparison.html'}")


def _report(name: str) -> "Report":
    """In a folder, or that of a model."""
    from . import Report
    from .folder import read_report
    from .hub import find_model

    if Path(name).exists():
        return Report.load(name)
    folder, _ = find_model(name)
    report = read_report(folder)
    if report is None:
        raise typer.BadParameter(f"expected a model with a report, got {name}, which has none; cartl-hub evaluate makes one.")
    return report


@app.command(
    epilog="Example: cartl-hub explain runs/my_model/model my_photos --against wrn16_2.natural_cifar100 --output explain"
)
def explain(
    model: Annotated[str, typer.Argument(help="Model folder, bundled id, Hub id, or name of a timm model.")],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or Hub id.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another model, to stand beside it; may be given more than once."),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Test images, drawn at random; eight of them are shown.")] = 100,
    top: Annotated[int, typer.Option(min=1, help="Most influential training images to show for each.")] = 5,
    train_images: Annotated[int, typer.Option(min=2, help="Training images, drawn at random.")] = 5000,
    refit: Annotated[
        bool, typer.Option("--refit", help="Fit the classifiers to these training images first, to convergence.")
    ] = False,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of the classifier's training loss.")] = 5e-4,
    damping: Annotated[float, typer.Option(min=0, help="Added to the diagonal of the Hessian.")] = 0.0,
    device: Device = None,
    seed: Seed = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model's report: its page, with the explanation in it, goes into --output.", rich_help_panel=RESULT
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the explanation.", rich_help_panel=RESULT)] = Path("explain"),
) -> None:
    """Show which pixels and which training images a model's predictions rest on; write explain.html, explain.json and pictures.

    Saliency maps, and influence functions on the classifier, for one model or several side by side. A model of --against whose
    classes aren't those of the data gets a new classifier, fitted to the training images.
    """
    from . import DataArguments
    from . import explain as find
    from .explanation.page import check_report
    from .finetuner import open_source
    from .weights import weights_sha256

    _check_folder(output)
    chosen_device = _device(device)
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
        context={"id": model, "command": _command()},
    )
    explanation.save(output, report=report)
    _show(explanation.summary())
    typer.echo(f"\nExplanation to read: {output / 'explain.html'}")
    if report is not None:
        typer.echo(f"In the report: {output / 'report.html'}")


def _shown_names(given: list[str], models: list[Any]) -> list[str]:
    """A model in a folder is known by its own name, where no other has the same; the rest as they were typed."""
    if len(set(given)) < len(given):
        raise typer.BadParameter(f"expected different models, got {', '.join(given)}; leave out what is there twice.")
    own = [model.lineage.get("name") if Path(name).is_dir() else None for name, model in zip(given, models, strict=True)]
    names = [str(name or typed) for name, typed in zip(own, map(_without_folder, given), strict=True)]
    return names if len(set(names)) == len(names) else given


@app.command(epilog="Example: cartl-hub predict wrn16_2.fdm4_cifar100 cat.jpg dog.png")
def predict(
    model: Annotated[str, typer.Argument(help="Model folder, id of a bundled model, or Hub id.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.", exists=True)],
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each.")] = 3,
) -> None:
    """Name what is in pictures."""
    from PIL import Image

    from . import load_model
    from .report import printable

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


@app.command(epilog="Example: cartl-hub pretrain model_cards/wrn16_2.fdm4_cifar100/recipe.yaml")
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="Recipe, or the folder it lies in.", exists=True)],
    folder: Annotated[
        Path | None, typer.Option(help="Where the model goes; by default beside the recipe.", rich_help_panel=RESULT)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/ and the recipe's id.", rich_help_panel=RESULT)
    ] = None,
    fresh: Fresh = False,
    num_images: NumImages = None,
) -> None:
    """Train a source model from a recipe, measure it on the test split, write its folder with its card.

    Run again it goes on where it was interrupted; with `--fresh` it begins anew.
    """
    from . import load_recipe
    from . import pretrain as make
    from .folder import read_report

    loaded = load_recipe(recipe)
    home = recipe if recipe.is_dir() else recipe.parent
    target = make(loaded, folder or home, output_dir=output, num_images=num_images, command=_command(), resume=not fresh)
    report = read_report(target)
    if report is not None:
        _show(report.summary())
    typer.echo(f"Model, card and report: {target}")


@app.command(epilog="Example: cartl-hub blocks wrn28_4")
def blocks(
    model: Annotated[str, typer.Argument(help="Name of a timm model, id of a bundled model, model folder, or Hub id.")],
) -> None:
    """Print the blocks of a model, counted from the classifier, as --num-blocks counts them."""
    from rich.table import Table

    from . import list_blocks
    from .finetuner import open_untrained

    parts = list_blocks(open_untrained(model))
    table = Table("k", "block", "layers with parameters", "parameters", title=f"{model}: {len(parts) - 1} blocks and the stem")
    for index, block in enumerate(parts):
        layers = dict.fromkeys(name.rpartition(".")[0] or name for name in block.parameters)
        table.add_row(str(len(parts) - index) if index else "-", block.name, ", ".join(layers), f"{block.num_parameters:,}")
    _show(table)


@app.command(epilog="Example: cartl-hub sources --hub --author my_org")
def sources(
    hub: Annotated[bool, typer.Option("--hub", help="Look on the Hub too.")] = False,
    author: Annotated[str | None, typer.Option(help="User or organisation on the Hub.")] = None,
    search: Annotated[str | None, typer.Option(help="Part of the name.")] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="Recipes too whose models aren't trained yet.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the README, or with --recipes that of model_cards.")
    ] = False,
) -> None:
    """List the models that came with the package, and those on the Hub, with what was measured of them.

    "recipe only": not trained yet; `cartl-hub pretrain` makes it.
    """
    from rich.table import Table
    from rich.text import Text

    from . import ModelError, list_sources
    from .hub import RECIPE_ONLY, models_table, recipes_table
    from .report import printable

    if markdown:
        typer.echo(recipes_table() if recipes else models_table())
        return
    table = Table("id", "network", "trained", "clean", "robust", "MB", "where")
    table.columns[0].no_wrap = True
    for column in table.columns[3:6]:
        column.justify, column.no_wrap = "right", True
    unreachable = None
    try:
        found = list_sources(hub=hub or author is not None, author=author, search=search)
    except ModelError as error:
        found, unreachable = list_sources(search=search), error
    untrained = [info for info in found if info.where == RECIPE_ONLY]
    for info in found if recipes else (info for info in found if info not in untrained):
        clean, robust = ("-" if share is None else f"{100 * share:.1f} %" for share in (info.clean_acc, info.robust_acc))
        cells = (
            info.id,
            info.architecture + (f"\n{info.num_parameters:,} parameters" if info.num_parameters else ""),
            f"{info.data}\n{info.method}",
            f"{clean}\nn = {info.num_images}" if info.num_images else clean,
            f"{robust}\n{info.attack}\n{info.threat_model}" if info.attack else robust,
            "-" if info.size is None else f"{info.size / 1e6:.1f}",
            info.where + (f"\n{info.revision[:7]}" if info.revision else ""),
        )
        table.add_row(*(Text(printable(cell, keep="\n")) for cell in cells))
    _show(table)
    if untrained and not recipes:
        typer.echo(f"{len(untrained)} recipes wait for their training; --recipes lists them.")
    if unreachable is not None:  # what is here is shown first
        raise unreachable


@app.command(epilog="Example: cartl-hub publish runs/my_model/model --to my_org/wrn16_2.neft4_photos --dry-run")
def publish(
    folder: Annotated[Path, typer.Argument(help="Model folder.", exists=True, file_okay=False)],
    to: Annotated[str, typer.Option(help="Repository on the Hub, org/name; made where it doesn't exist.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it doesn't exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print what would be sent.")] = False,
) -> None:
    """Put a model folder on the Hub in one commit: weights, config, report, pictures, card.

    The token is the one that `hf auth login` stored, or that of HF_TOKEN.
    """
    import yaml

    from .publishing import plan
    from .publishing import publish as send

    if dry_run:
        upload = plan(folder, to, revision=revision, create_pr=create_pr)
        typer.echo(f"To {upload.repo_id}, in one commit:")
        for name, size in upload.files.items():
            typer.echo(f"{size:>12,}  {name}")
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


@app.command(
    name="import",
    epilog="Example: cartl-hub import cifar_linf_8.pt --to models/resnet50.robustness_cifar10 --norm Linf --eps 8/255",
)
def import_(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="File, or org/name/FILE on the Hub, or a recipe that names one, a .yaml.")],
    to: Annotated[
        Path | None, typer.Option(help="Model folder; its name becomes the model's. Of a recipe by default models/ and its id.")
    ] = None,
    format: Annotated[CheckpointFormat, typer.Option(help="What made it.")] = CheckpointFormat.auto,
    architecture: Annotated[str | None, typer.Option(help="timm's name; found from the shapes where they show it.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Checked.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of the normalisation, e.g. 0.49,0.48,0.45; 0 where there is none.")] = None,
    std: Annotated[str | None, typer.Option(help="As --mean; 1 where there is none.")] = None,
    input_size: Annotated[int | None, typer.Option(min=1, help="Side of the input in pixels; by default the usual.")] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas, or a file of lines.")] = None,
    entry: Annotated[str | None, typer.Option(help="Which entry of the file, where several hold weights.")] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Argument of the network that weights don't show, e.g. negative_slope=0.1."),
    ] = None,
    norm: Annotated[NormName | None, typer.Option(help="Of the threat model it was trained for.")] = None,
    eps: Annotated[float | None, typer.Option(parser=_fraction, metavar="RADIUS", help="Of the threat model.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights, e.g. mit.")] = None,
    url: Annotated[str | None, typer.Option(help="Where they came from.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the Hub.")] = None,
) -> None:
    """Make a model folder of a robust checkpoint of another project; no code in it is run.

    Every entry of the file is mapped, or listed with the reason why it is not.
    """
    from . import import_checkpoint, save_model
    from .card import render_card
    from .hub import find_checkpoint
    from .recipe import load_import_recipe

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
        "licence": licence,
        "url": url,
    }
    stated: dict[str, Any] = {}
    if Path(checkpoint).suffix in (".yaml", ".yml") or Path(checkpoint).is_dir():
        recipe = load_import_recipe(checkpoint)
        if extra := [
            name for name in context.params if name not in ("checkpoint", "to", "revision") and _is_given(context, name)
        ]:
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
        found[name] = yaml.safe_load(value)
    return found


def _refuse_another_model(folder: Path, sha256: str) -> None:
    """What lies beside another model, its recipe and its losses, would be taken for this one's."""
    from .folder import CONFIG, read_config

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
    return Path(text).read_text(encoding="utf-8").splitlines() if Path(text).is_file() else text.split(",")


@app.command(epilog="Example: cartl-hub reproduce cases --only fdm4 --dry-run")
def reproduce(
    table: Annotated[TableName, typer.Argument(help="Which table.")],
    plan: Annotated[
        Path, typer.Option(help="Sources, target, cases, seeds and training; results go beside it.", exists=True, dir_okay=False)
    ] = Path("model_cards/results/plan.yaml"),
    only: Annotated[str | None, typer.Option(metavar="PART", help="Only cells with this in their name.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
    runs: Annotated[Path, typer.Option(help="Folder of checkpoints and finished batches.")] = Path("runs/cells"),
    page: Annotated[Path, typer.Option(help="Page that is written from all results.")] = Path("RESULTS.md"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and which are done; run none.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Write the page from the results that are there; run none.")] = False,
) -> None:
    """Run the papers' tables on a plan, and write them beside the papers' figures.

    A cell is a transfer and its measurement. Those that are done are left alone, interrupted ones go on.
    """
    from collections import Counter

    from rich.table import Table

    from .experiments import load_plan, make_tables, run_cells, save_results
    from .experiments.run import DONE, NOT_RUN, UNTRAINED_SOURCE, state

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
        _show(shown)
        counts = dict.fromkeys((DONE, NOT_RUN, UNTRAINED_SOURCE), 0) | Counter(states.values())
        typer.echo(f"{len(cells)} cells: {', '.join(f'{number} {name}' for name, number in counts.items())}")
        return
    try:
        if not render:
            found = run_cells(cells.values(), results=plan.parent, runs=runs, jobs=jobs, command=_command())
            _show(_results_table({cells[key].title: result.last for key, result in found.items()}))
    finally:
        save_results(chosen, plan.parent, page)
        typer.echo(f"Written: {page}")


def _results_table(measured: "Mapping[str, Measured]") -> Any:
    """Accuracies of cells."""
    from rich.table import Table

    from .report.page import plain

    names = list(dict.fromkeys(name for one in measured.values() for name in one.verdicts))
    shown = Table("cell", *names)
    for title, one in measured.items():
        shown.add_row(plain(title), *(f"{one.accuracy(name).accuracy:.2%}" if name in one.verdicts else "" for name in names))
    return shown


@app.command(
    epilog="Example: cartl-hub sweep wrn16_2.fdm4_cifar100 wrn16_2.natural_cifar100 --data my_photos --num-images 100,400,all"
)
def sweep(
    sources: Annotated[list[str], typer.Argument(help="Sources; differences are from the last one.")],
    data: Annotated[str, typer.Option(help="Folder of images, parquet file or folder, or Hub id.")],
    blocks: Annotated[
        str, typer.Option(help="Residual blocks that are trained; 0: the classifier, all: everything.")
    ] = "0,1,3,all",
    num_images: Annotated[
        str, typer.Option(help="Numbers of target images; all: all of them.")
    ] = "100,200,400,800,1600,3200,6400",
    seeds: Annotated[str, typer.Option(help="Of images, classifier and training.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate; a tenth of it after each third.")] = 0.1,
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs between points of the curve against epochs.")] = 10,
    attack: Annotated[
        bool, typer.Option("--attack/--clean-only", help="Measure accuracy under PGD-20 too, which takes most of the time.")
    ] = True,
    test_images: Annotated[
        int | None, typer.Option(min=1, help="Test images that are measured, stratified; by default all.")
    ] = None,
    data_id: DataId = None,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the training images.")] = True,
    augment: Annotated[
        bool,
        typer.Option("--augment/--no-augment", help="Crop and flip; without, what the frozen blocks give is computed once."),
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time; they share the cores.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of results, tables and plots.")] = Path("runs/sweep"),
) -> None:
    """Fine-tune sources at several depths on several numbers of images, and plot accuracy against both and against epochs.

    Cells that are done are left alone, interrupted ones go on. Chen et al. call it TL, Utrera et al. (2020) swept it.
    """
    from dataclasses import replace

    from .data import Augmentation
    from .experiments import Sweep, run_sweep
    from .recipe import RecipeData
    from .training import FeatureCache

    name = Path(data).resolve().name if Path(data).exists() else data
    wanted = Sweep(sources=tuple(sources), target=RecipeData(id=data_id or name, local=data))
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
        blocks=_counts("--blocks", blocks),
        num_images=_counts("--num-images", num_images),
        seeds=tuple(_seed(seed) for seed in _counts("--seeds", seeds)),
        training=training,
        attacks=wanted.attacks if attack else {},
        test_images=test_images,
    )
    table = run_sweep(chosen, output, jobs=jobs, command=_command())
    typer.echo(f"{len(table)} cells: {output / 'sweep.csv'}, plots beside it")


def _seed(seed: int | None) -> int:
    if seed is None:
        raise typer.BadParameter("expected whole numbers for --seeds, got all.")
    return seed


def _counts(option: str, text: str) -> tuple[int | None, ...]:
    """Whole numbers separated by commas; "all" is None."""
    try:
        return tuple(None if part.strip() == "all" else int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected whole numbers, or all, separated by commas for {option}, got {text!r}.") from None


@app.command(epilog="Example: cartl-hub card model_cards/wrn16_2.fdm4_cifar100")
def card(folder: Annotated[Path, typer.Argument(help="Model folder.", exists=True, file_okay=False)]) -> None:
    """Write the card of a model folder again, from its config and its report."""
    from .card import render_card
    from .files import write_file
    from .folder import CARD, read_model, read_report

    write_file(folder / CARD, render_card(read_model(folder), report=read_report(folder)))
    typer.echo(f"Written: {folder / CARD}")


@app.command(epilog="Example: cartl-hub quickstart --output quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for models and reports.")] = Path("runs/quickstart"),
) -> None:
    """Fine-tune the bundled sources on handwritten digits, attack them, compare; a few minutes on two CPU cores."""
    from .quickstart import run

    run(output)


def _show(renderable: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(renderable)


def _command() -> str:
    """What was typed, for cards and reports, where the folders of this machine are of no use to anybody."""
    import shlex

    return shlex.join(["cartl-hub", *map(_without_folder, sys.argv[1:])])


def _without_folder(argument: str) -> str:
    """The last part of an absolute path, also behind ``--option=``; anything else as it is."""
    option, separator, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return option + separator + (Path(value).name if Path(value).is_absolute() else value)


def _interrupted(arguments: list[str]) -> str:
    """What was kept, and the command that goes on."""
    import shlex

    command, again = (arguments or [""])[0], shlex.join(["cartl-hub", *arguments])
    if command == "evaluate":
        if any(argument.partition("=")[0] == "--resume" for argument in arguments):
            return f"Interrupted. Finished batches were kept; this goes on behind them: {again}"
        return f"Interrupted. Nothing was kept; with this, finished batches are: {again} --resume FOLDER"
    if command in ("finetune", "pretrain"):
        return f"Interrupted. The training's last checkpoint was kept, if it has reached one; this goes on: {again}"
    return "Interrupted."


def main() -> None:
    """Entry point: errors that a user can mend are one line on stderr and exit code 2."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo(_interrupted(sys.argv[1:]), err=True)
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.split(".")[0] not in ("cartl_hub", "builtins"):
            raise
        typer.echo(f"Error{_place(error)}: {error}", err=True)
        raise SystemExit(2) from error


def _place(error: BaseException) -> str:
    """Where in somebody else's code an error arose, such as a model of module:function; nothing where it is ours."""
    import sysconfig
    import traceback

    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(Path(__file__).parent.resolve()):
            return ""
        if path.is_file() and not any(path.is_relative_to(folder) for folder in installed):
            return f" in {path}, line {frame.lineno} ({frame.name}), {type(error).__name__}"
    return ""


if __name__ == "__main__":
    main()
