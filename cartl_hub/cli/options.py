"""Options that several commands share, and the meaning of their values."""

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class NormName(StrEnum):
    """Norms of threat models."""

    linf = "Linf"
    l2 = "L2"


class Strength(StrEnum):
    """Sets of attacks."""

    quick = "quick"
    standard = "standard"
    full = "full"


def fraction(text: str) -> float:
    """ "8/255" or "0.03" as a number."""
    try:
        numerator, _, denominator = text.partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"expected a radius such as 8/255 or 0.031, got {text!r}.") from None


METHOD, TRAINING, DATA, RESULT = "Method", "Training", "Data", "Result"  # panels of --help
Device = Annotated[
    str | None, typer.Option(help="Device to run on, such as cuda:1, mps or cpu; by default a CUDA device if there is one.")
]
ImageColumn = Annotated[str | None, typer.Option(help="Column with the pictures; detected automatically.", rich_help_panel=DATA)]
LabelColumn = Annotated[str | None, typer.Option(help="Column with the labels; detected automatically.", rich_help_panel=DATA)]
DataId = Annotated[
    str | None,
    typer.Option(help="Name of the data in report and card; by default the folder's or the Hub id.", rich_help_panel=DATA),
]
NumImages = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of test images for the report, each class in proportion; by default all.", rich_help_panel=RESULT
    ),
]
StrengthOption = Annotated[
    Strength,
    typer.Option(
        help="Attacks. quick: FGSM and PGD-20, in Linf and L2; standard: also PGD-100, a short APGD-T; full: also AutoAttack's.",
        rich_help_panel=RESULT,
    ),
]
Checks = Annotated[
    bool, typer.Option("--checks/--no-checks", help="Whether to check that the figures can be trusted.", rich_help_panel=RESULT)
]
Curve = Annotated[
    bool | None,
    typer.Option(
        "--curve/--no-curve",
        help="Whether to measure accuracy against the radius; by default not with quick.",
        rich_help_panel=RESULT,
    ),
]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Start over; checkpoints of an earlier run in the folder are removed.", rich_help_panel=RESULT),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting, as in a recipe, e.g. training.weight_decay=0.001; may be given several times.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Random seed.")]


def settings(texts: list[str] | None, groups: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Values of --set, by the part of the settings and the name in it."""
    import yaml

    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for text in texts or ():
        name, equals, value = text.partition("=")
        group, _, field = name.strip().partition(".")
        if not equals or not field or group not in groups:
            raise typer.BadParameter(
                f"expected NAME=VALUE for --set, with a name in {', '.join(f'{group}.' for group in groups)}, got {text!r}."
            )
        try:
            found[group][field] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"expected a value as in YAML for --set {name}, got {value!r}.") from None
    return found


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_folder(path: Path) -> None:
    """Check that reports can be written there, before anything is measured for them."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"expected a folder for the output, got the file {path}.")
    if int(os.environ.get("RANK", 0)):
        return  # the first of several processes looks, and writes
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise typer.BadParameter(f"expected a folder that can be written for the output, got {path}: {error.strerror}.") from None
    if made:
        path.rmdir()


def curve_radii(curve: bool | None, strength: Strength) -> "tuple[float, ...] | None":
    """Radii of the curve: as --curve says, or else by the strength."""
    from ..evaluation import CURVE_EPS, default_curve

    return default_curve(strength.value) if curve is None else CURVE_EPS if curve else None


def open_device(name: str | None) -> Any:
    """Open a device, checking that a tensor can be put there."""
    import torch

    from ..processes import default_device

    try:
        device = default_device() if name is None else torch.device(name)
        torch.empty(1, device=device).item()  # which "meta" has not
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
        raise typer.BadParameter(f"expected a device that torch has here, got {name!r}: {str(error).splitlines()[0]}") from None
    return device
