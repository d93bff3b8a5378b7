"""Commands that fine-tune."""

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    DATA,
    METHOD,
    RESULT,
    TRAINING,
    Checks,
    Curve,
    DataId,
    Fresh,
    ImageColumn,
    LabelColumn,
    NumImages,
    Set,
    Strength,
    StrengthOption,
    curve_radii,
    fraction,
    is_given,
    settings,
)
from .shown import command, show

if TYPE_CHECKING:
    from ..attacks import Attack
    from ..methods import Method

commands = typer.Typer(rich_markup_mode="markdown")


class MethodName(StrEnum):
    """Transfer methods."""

    neft = "neft"
    finetune = "finetune"
    lwf = "lwf"
    adversarial = "adversarial"
    trades = "trades"


ATTACKED = (MethodName.adversarial, MethodName.trades)  # those with a training attack


class AttackName(StrEnum):
    """Training attacks."""

    pgd = "pgd"
    fgsm = "fgsm"
    rfgsm = "rfgsm"
    nfgsm = "nfgsm"


class Statistics(StrEnum):
    """Statistics that batch norm in the frozen blocks uses."""

    source = "source"
    target = "target"


class Affine(StrEnum):
    """Whether batch norm's affine maps in the trained blocks are trained."""

    trained = "trained"
    frozen = "frozen"


@commands.command(epilog="Example: cartl-hub quickstart --output quickstart")
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for models and reports.")] = Path("runs/quickstart"),
) -> None:
    """Fine-tune the bundled sources on handwritten digits, attack them, compare; a few minutes on two CPU cores."""
    from ..quickstart import run

    run(output)


@commands.command(epilog="Example: cartl-hub finetune wrn16_2.fdm4_cifar100 my_photos --num-blocks 4 --epochs 10")
def finetune(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Id of a bundled model, Hub id, model folder, or name of a timm model.")],
    data: Annotated[str, typer.Argument(help="Folder of images, parquet file or folder, or Hub id.")],
    method: Annotated[MethodName, typer.Option(help="Transfer method.", rich_help_panel=METHOD)] = MethodName.neft,
    num_blocks: Annotated[
        int | None,
        typer.Option(min=0, help="Number of last blocks to train; 0: the whole network (not NEFT).", rich_help_panel=METHOD),
    ] = 4,
    beta: Annotated[float, typer.Option(help="Spectral norm of each trained weight, for neft.", rich_help_panel=METHOD)] = 0.4,
    convex_residual: Annotated[
        bool,
        typer.Option(
            "--convex-residual", help="Use convex residual sums, as part of the architecture, for neft.", rich_help_panel=METHOD
        ),
    ] = False,
    weight: Annotated[float, typer.Option(help="Weight of the feature distance, for lwf.", rich_help_panel=METHOD)] = 0.005,
    trades_weight: Annotated[float, typer.Option(help="Weight of the divergence, for trades.", rich_help_panel=METHOD)] = 6.0,
    attack: Annotated[
        AttackName, typer.Option(help="Training attack, for adversarial and trades.", rich_help_panel=METHOD)
    ] = AttackName.pgd,
    eps: Annotated[
        float,
        typer.Option(
            parser=fraction,
            metavar="RADIUS",
            help="Linf radius of the training attack, for adversarial and trades.",
            rich_help_panel=METHOD,
        ),
    ] = "8/255",  # type: ignore[assignment]
    adversarial_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the images whose adversarial versions are added to the clean ones, for adversarial; by default "
            "adversarial images alone.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    extractor_statistics: Annotated[
        Statistics, typer.Option(help="Batch-norm statistics in the frozen blocks.", rich_help_panel=METHOD)
    ] = Statistics.source,
    submodel_affine: Annotated[
        Affine, typer.Option(help="Batch-norm affine maps in the trained blocks.", rich_help_panel=METHOD)
    ] = Affine.trained,
    epochs: Annotated[int, typer.Option(min=1, help="Number of passes over the data.", rich_help_panel=TRAINING)] = 20,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps, instead of epochs, for a stream.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of images per step over all processes.", rich_help_panel=TRAINING)
    ] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 0.02,
    flip: Annotated[
        bool, typer.Option(help="Mirror half of the images; wrong for digits and text.", rich_help_panel=TRAINING)
    ] = True,
    precision: Annotated[str, typer.Option(help="Precision: auto, fp32 or bf16.", rich_help_panel=TRAINING)] = "auto",
    cache: Annotated[
        bool, typer.Option("--cache", help="Compute the frozen blocks' outputs only once.", rich_help_panel=TRAINING)
    ] = False,
    cache_views: Annotated[
        int,
        typer.Option(
            min=0,
            help="Augmented views of each image, in turn, for --cache; 0: the images as they are.",
            rich_help_panel=TRAINING,
        ),
    ] = 8,
    changes: Set = None,
    log_with: Annotated[str | None, typer.Option(help="Tracker, e.g. tensorboard.", rich_help_panel=TRAINING)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.", rich_help_panel=TRAINING)] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    data_id: DataId = None,
    train_images: Annotated[
        int | None,
        typer.Option(min=1, help="Train on this number of images, stratified; smaller sets lie in larger.", rich_help_panel=DATA),
    ] = None,
    train_share: Annotated[
        float | None, typer.Option(help="Train on this share of the images, in (0, 1].", rich_help_panel=DATA)
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data as a stream.", rich_help_panel=DATA)] = False,
    num_images: NumImages = None,
    strength: StrengthOption = Strength.standard,
    checks: Checks = True,
    curve: Curve = None,
    report_eps: Annotated[
        float | None,
        typer.Option(
            parser=fraction,
            metavar="RADIUS",
            help="Linf radius of the report's attacks; by default they are in the ball of the training attack, or 8/255.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/ and the model's name.", rich_help_panel=RESULT)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the new model; by default architecture, method and data.", rich_help_panel=RESULT),
    ] = None,
    fresh: Fresh = False,
    license: Annotated[
        str | None, typer.Option(help="License of the new weights, e.g. mit; by default none is stated.", rich_help_panel=RESULT)
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(help="Repository to publish to on the Hub, org/name; the token is checked first.", rich_help_panel=RESULT),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository, for --push-to.", rich_help_panel=RESULT),
    ] = None,
) -> None:
    """Fine-tune a source on your images, measure clean and robust accuracy, write a model folder.

    Run again with the same arguments, it resumes where it was interrupted; with `--fresh` it starts over.
    """
    from .. import (
        PGD,
        Augmentation,
        BatchNormPolicy,
        DataArguments,
        FeatureCache,
        RobustFineTuner,
        TrainingArguments,
        default_attacks,
    )
    from ..attacks.attack import DEFAULT_EPS
    from ..config import with_changes
    from ..processes import is_main_process, remove_folder
    from ..recipe import KINDS

    _refuse_options_of_other_methods(context, method)
    if is_given(context, "cache_views") and not cache:
        raise typer.BadParameter("--cache-views is of --cache; add that, or leave it out.")
    if private is not None and push_to is None:
        raise typer.BadParameter("--private and --public are of the repository of --push-to; add that, or leave them out.")
    changed = settings(changes, ("method", "bn", "training", "data"))
    chosen = with_changes(
        _method(
            method, num_blocks or None, beta, convex_residual, weight, trades_weight, _attack(attack, eps), adversarial_share
        ),
        changed["method"],
        KINDS,
    )
    trained = getattr(chosen, "attack", None)
    eps, norm = (DEFAULT_EPS["Linf"], "Linf") if trained is None else (trained.eps, trained.norm)
    policy = BatchNormPolicy(extractor_statistics=extractor_statistics.value, submodel_affine=submodel_affine.value)
    arguments = TrainingArguments(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        lr=lr,
        precision=precision,  # type: ignore[arg-type]
        log_with=log_with,
        seed=seed,
        validation_attack=PGD(eps=eps, norm=norm, step_size=eps / 4, steps=10),  # type: ignore[arg-type]
        augmentation=None if cache and not cache_views else Augmentation(flip=flip),
        cache=FeatureCache(views=cache_views or None) if cache else None,
    )
    data_arguments = DataArguments(
        image_column=image_column,
        label_column=label_column,
        id=data_id,
        train_images=train_images,
        train_share=train_share,
        streaming=streaming,
        seed=seed,
    )
    tuner = RobustFineTuner(
        source,
        data,
        method=chosen,
        bn=with_changes(policy, changed["bn"], KINDS),
        arguments=with_changes(arguments, changed["training"], KINDS),
        data_arguments=with_changes(data_arguments, changed["data"], KINDS),
        output_dir=output,
        name=name,
        license=license,
        push_to_hub=push_to is not None,
        hub_model_id=push_to,
        hub_private_repo=private,
    )
    result = tuner.train(resume=not fresh)
    if result.stopped:
        typer.echo(f"Ended early: {result.stopped}.")
    if push_to is None:
        tuner.save()  # before the evaluation, which may be long
    radii = curve_radii(curve, strength)
    if report_eps is not None:
        eps, norm = report_eps, "Linf"
    attacks = default_attacks(eps, norm=norm, strength=strength.value)  # type: ignore[arg-type]
    measured = repr((attacks, num_images, checks, radii is not None)).encode()
    finished = tuner.output_dir / "evaluation"
    if fresh:
        remove_folder(finished)  # of the weights before
    report = tuner.evaluate(
        attacks=attacks,
        num_images=num_images,
        checks=checks,
        curve=radii,
        resume=finished / hashlib.sha256(measured).hexdigest()[:8],
        context={"command": command()},
    )
    folder = tuner.save()
    remove_folder(finished)
    if not is_main_process():
        return
    show(report.summary())
    typer.echo(f"\nModel, card and report: {folder}\nReport to read: {folder / 'report.html'}")
    if tuner.commit:
        typer.echo(f"Published: {tuner.commit.commit_url}")
    typer.echo(f"Use it: cartl-hub predict {folder} PICTURE")


def _refuse_options_of_other_methods(context: typer.Context, method: MethodName) -> None:
    """Refuse options that the method does not have, as they would have no effect."""
    of_methods = {
        "num_blocks": (MethodName.neft, MethodName.finetune, *ATTACKED),
        "beta": (MethodName.neft,),
        "convex_residual": (MethodName.neft,),
        "weight": (MethodName.lwf,),
        "trades_weight": (MethodName.trades,),
        "attack": ATTACKED,
        "eps": ATTACKED,
        "adversarial_share": (MethodName.adversarial,),
    }
    for name, methods in of_methods.items():
        if method not in methods and is_given(context, name):
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(
                f"{option} is an option of {' and '.join(methods)}, got it with --method {method}; leave it out."
            )


def _attack(name: AttackName, eps: float) -> "Attack":
    from .. import FGSM, NFGSM, PGD, RFGSM

    if name is AttackName.pgd:
        return PGD(eps=eps, step_size=eps / 4, steps=7)
    return {AttackName.fgsm: FGSM, AttackName.rfgsm: RFGSM, AttackName.nfgsm: NFGSM}[name](eps=eps)


def _method(
    name: MethodName,
    num_blocks: int | None,
    beta: float,
    convex_residual: bool,
    weight: float,
    trades_weight: float,
    attack: "Attack",
    adversarial_share: float | None,
) -> "Method":
    from .. import NEFT, TRADES, AdversarialTraining, FineTuning, LwF

    if name is MethodName.neft:
        if num_blocks is None:
            raise typer.BadParameter("NEFT needs the number of blocks to train, --num-blocks 1 or more.")
        return NEFT(num_blocks=num_blocks, beta=beta, convex_residual=convex_residual)
    if name is MethodName.lwf:
        return LwF(weight=weight)
    if name is MethodName.adversarial:
        return AdversarialTraining(attack=attack, num_blocks=num_blocks, adversarial_share=adversarial_share)
    if name is MethodName.trades:
        return TRADES(beta=trades_weight, attack=attack, num_blocks=num_blocks)
    return FineTuning(num_blocks=num_blocks)
