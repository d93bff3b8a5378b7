"""Recipes: what a source model is made from, in one YAML file that reproduces it."""

import re
from dataclasses import dataclass, field, replace
from inspect import isabstract
from pathlib import Path
from typing import Any, Literal

import torch

from . import attacks, methods
from .attacks.attack import Norm
from .batchnorm import BatchNormPolicy
from .checkpoints import Format
from .config import from_dict, read_yaml
from .data import Augmentation, DataError
from .images import ImagePolicy
from .loading import DataArguments, Splits, load_splits
from .methods import Method, Views
from .methods.adversarial import EpsSchedule
from .models import Classifier, create_model
from .models.settings import check_model_args, check_normalisation
from .training import FeatureCache, Schedule, TrainingArguments

RECIPE, IMPORT = "recipe.yaml", "import.yaml"


@dataclass(frozen=True, kw_only=True)
class RecipeData:
    """Data that a recipe trains on.

    Args:
        id: Id of the data on the Hub.
        local: Folder to use instead if it exists, relative to the working directory.
        read: Arguments for reading the data.
        license: License of the data, for the card.
    """

    id: str
    local: str | None = None
    read: DataArguments = field(default_factory=DataArguments)
    license: str = "unknown"

    @property
    def location(self) -> str:
        return self.local if self.local and Path(self.local).exists() else self.id

    def load(self, policy: ImagePolicy, **changes: Any) -> Splits:
        """Read the data, with ``changes`` to the arguments for reading them.

        Raises:
            DataError: As :func:`cartl_hub.load_splits`; the message names the local copy if it is missing.
        """
        try:
            return load_splits(self.location, policy, replace(self.read, **changes))
        except DataError as error:
            if self.local is None or self.location == self.local:
                raise
            raise DataError(f"{error} The local copy, {self.local!r}, does not exist here.") from error


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Recipe for a source model.

    Args:
        id: Id of the model: architecture, objective with its split, data; e.g. "wrn16_2.fdm4_cifar100".
        title: One sentence on the model, for the card.
        architecture: Name of the architecture in timm.
        model_args: Further arguments of the architecture.
        mean: Mean of the normalisation, per channel.
        std: Standard deviation of the normalisation, per channel.
        remarks: Remarks for the card, on how it was trained.
        license: License of the weights, e.g. "mit"; by default none is stated.
        weights: Dtype of the weights in the file; the model is measured with the weights as stored.
        data: Data to train on.
        method: Training objective of the source.
        training: Training arguments.
        probe: Training arguments of the linear probe, for a method that learns without labels: the classifier is trained
            afterwards on the finished network. Without it such a source is not measured.

    Raises:
        ValueError: On an id that can't be the name of a folder, arguments of the architecture that name weights, an invalid
            mean or std, or a probe for a method that trains the classifier itself.
    """

    id: str
    title: str
    architecture: str
    data: RecipeData
    method: Method
    training: TrainingArguments
    model_args: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = (0.5071, 0.4865, 0.4409)
    std: tuple[float, ...] = (0.2673, 0.2564, 0.2762)
    remarks: tuple[str, ...] = ()
    license: str | None = None
    weights: Literal["float32", "float16"] = "float32"
    probe: TrainingArguments | None = None

    def __post_init__(self) -> None:
        _check_id(self.id)
        check_model_args(self.model_args)
        check_normalisation(self.mean, self.std)
        if self.probe is not None and self.method.uses_labels:
            raise ValueError(f"expected no probe, as {type(self.method).__name__} trains the classifier itself; leave it out.")

    def create_model(self, num_classes: int) -> Classifier:
        """The untrained network, drawn from the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.training.seed)  # torch.manual_seed would seed accelerators too
            return create_model(
                self.architecture,
                num_classes=num_classes,
                pretrained_cfg_overlay={"mean": self.mean, "std": self.std},
                **self.model_args,
            )


def _is_choice(kind: Any) -> bool:
    """An attack or a method, as their packages export them; attacks that hold a network can't be read from a file."""
    if not isinstance(kind, type) or not issubclass(kind, (attacks.Attack, Method)) or isabstract(kind):
        return False
    return kind not in (attacks.Transfer, attacks.FeatureDistance)


KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(kind for module in (methods, attacks) for kind in vars(module).values() if _is_choice(kind)),
        *(
            Augmentation,
            BatchNormPolicy,
            DataArguments,
            EpsSchedule,
            FeatureCache,
            Recipe,
            RecipeData,
            Schedule,
            TrainingArguments,
            Views,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class ImportRecipe:
    """A public checkpoint of another project, and everything about it that the file doesn't state.

    Args:
        id: Id of the model, "architecture.tag".
        title: Title of the model, for its card.
        checkpoint: File beside the recipe or in the working directory, or "org/name/FILE" on the Hub.
        remarks: Remarks for its card, e.g. the paper.
        format: Format of the file; this and all that follow are arguments of :func:`cartl_hub.import_checkpoint`.
        architecture: Name of the architecture in timm.
        model_args: Arguments of the architecture that can't be inferred from the weights.
        num_classes: Expected number of classes; verified.
        mean: Mean of the normalisation, if the file holds none.
        std: Standard deviation of the normalisation, if the file holds none.
        input_size: Side of the input in pixels.
        label_names: Name of each class.
        entry: Entry of the file that holds the weights.
        norm: Norm of the threat model.
        eps: Radius of the threat model, in pixel units of [0, 1].
        license: License of the weights.
        url: Address of the file.
    """

    id: str
    title: str
    checkpoint: str
    remarks: tuple[str, ...] = ()
    format: Format = "auto"
    architecture: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: int | None = None
    label_names: tuple[str, ...] | None = None
    entry: str | None = None
    norm: Norm | None = None
    eps: float | None = None
    license: str | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        _check_id(self.id)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of :func:`cartl_hub.import_checkpoint`."""
        return {name: value for name, value in vars(self).items() if name not in ("id", "title", "checkpoint", "remarks")}


def load_import_recipe(path: str | Path) -> ImportRecipe:
    """Read an import recipe.

    Args:
        path: Path of the file, or of the folder with an ``import.yaml``; a checkpoint beside it is found there.

    Raises:
        ValueError: If the file isn't an import recipe; the message names the entry.
    """
    path = Path(path)
    path = path / IMPORT if path.is_dir() else path
    recipe = _load(path, {"ImportRecipe": ImportRecipe}, "ImportRecipe")
    beside = path.parent / recipe.checkpoint
    return replace(recipe, checkpoint=str(beside)) if beside.is_file() else recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: If the file isn't a recipe; the message names the entry.
    """
    path = Path(path)
    return _load(path / RECIPE if path.is_dir() else path, KINDS, "Recipe")


def _check_id(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"expected an id of letters, digits, '.', '-' and '_', the name of its folder; got {name!r}.")


def _load(path: Path, kinds: dict[str, type], kind: str) -> Any:
    content = read_yaml(path)
    try:
        return from_dict(content, kinds, default=kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
