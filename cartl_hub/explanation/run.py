"""Explains a model's predictions by pixels and training images."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageData, StreamingData, UnknownClassError
from ..evaluation.cascade import few_of_each_class
from ..loading import AnyData, DataArguments, Splits, load_splits
from ..models import Classifier
from ..processes import environment
from ..randomness import permutation
from ..ranges import check_number, check_whole
from ..report import plain_json
from ..weights import weights_sha256
from .explanation import Explanation
from .pixels import integrated_gradients, map_pictures, saliency, smooth_grad
from .results import Match, ModelExplanation, ranked
from .training_images import ClassifierLoss, classifier_inputs, influence


def explain(
    model: Classifier,
    data: AnyData | Splits,
    *,
    against: Mapping[str, Classifier] | None = None,
    name: str | None = None,
    num_images: int = 100,
    top: int = 5,
    train_images: int = 5000,
    weight_decay: float = 5e-4,
    damping: float = 0.0,
    refit: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    data_arguments: DataArguments | None = None,
    context: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Explanation:
    """Saliency maps of test images, the training images that influence them most, and whether those are of the same class
    (Utrera et al., 2020), for one model or several side by side.

    Influence is that on the classifier alone, a linear layer (:func:`cartl_hub.influence`). A model of ``against`` whose classes
    aren't those of the data gets a new classifier, fitted to the training images.

    Args:
        model: Model to explain.
        data: Data set, as for :func:`cartl_hub.load_splits`, or its result. Images set aside when the model was trained on these
            data are set aside again.
        against: Other models, by name, with inputs of the same size: the source, or the same transfer from a natural one.
        name: Name to show for the model; by default its own.
        num_images: Number of test images, drawn at random; all if there are fewer. Eight of them are shown. As many training
            images are queries too.
        top: Number of most influential training images to show for each, at most 100.
        train_images: Number of training images, drawn at random; all if there are fewer. The Hessian is that of the loss on
            these.
        weight_decay: Weight decay in the classifier's training loss.
        damping: Number added to the Hessian's diagonal.
        refit: Fit each model's classifier to these training images first, to convergence: away from the optimum, influence
            functions are a guess. The model may then have other classes than the data.
        seed: Seed for the choice of images, and of the noise of SmoothGrad.
        batch_size: Number of images per forward pass.
        data_arguments: Arguments for reading the data.
        context: Information to show on the page, e.g. "command"; JSON.
        progress: Show progress bars.

    Raises:
        DataError: If the data can't be used, or have other classes than the model.
        ValueError: If models take other inputs, share a name, or have no linear classifier; if a number is out of range.
    """
    begun = time.monotonic()
    check_whole("num_images", num_images, (">=", 1))
    check_whole("top", top, (">=", 1), ("<=", 100))
    check_whole("train_images", train_images, (">=", 2))
    check_number("weight_decay", weight_decay, (">=", 0))
    check_number("damping", damping, (">=", 0))
    models = _named(model, name, against or {})
    stated = plain_json(context or {}, "context")
    if isinstance(data, Splits):
        splits = data
    else:
        names = None if refit else model.label_names
        trained_on = model.lineage.get("data", {})
        try:
            splits = load_splits(data, model.image_policy, data_arguments, label_names=names, trained_on=trained_on)
        except UnknownClassError as error:
            raise UnknownClassError(f"{error} The model has other classes: with refit=True (--refit) it gets these.") from error
    if not refit and model.num_classes != len(splits.label_names):
        raise ValueError(
            f"expected a model of the {len(splits.label_names)} classes of the data, got one of {model.num_classes}; with "
            "refit=True (--refit) it gets a new classifier."
        )
    train, train_indices = _drawn(splits.train, train_images, seed, 1)
    test, test_indices = _drawn(splits.test, num_images, seed, 0)
    if len(train) < 2:
        raise ValueError(f"expected two or more training images, got {len(train)}.")
    shown = few_of_each_class(np.ones(len(test), dtype=bool), test.labels)
    pictures = test.get(shown).cpu() / 255
    run = _Run(train, test, shown, pictures, splits.label_names, top, weight_decay, damping, refit, seed, batch_size, progress)
    found = tuple(run.explain(named, each) for named, each in models.items())
    needed = sorted({int(position) for each in found for position in each.top[shown.numpy()].flatten()})
    needed_images = (train.get(torch.tensor(needed)).cpu() / 255).numpy()
    return Explanation(
        models=found,
        label_names=tuple(map(str, splits.label_names)),
        indices=test_indices.numpy(),
        labels=test.labels.numpy(),
        shown=shown.numpy(),
        images=pictures.numpy(),
        train_indices=train_indices.numpy(),
        train_labels=train.labels.numpy(),
        train_images=dict(zip(needed, needed_images, strict=True)),
        settings={
            "test_images": len(test),
            "training_images": len(train),
            "top": top,
            "weight_decay": weight_decay,
            "damping": damping,
            "refit": refit,
            "seed": seed,
        },
        data=plain_json({"train": train.description, "test": test.description}, "description of the data"),
        notes=tuple(_notes(model, splits, train, top, found)),
        context=stated,
        environment=environment(next(model.parameters()).device, time.monotonic() - begun),
    )


def _named(model: Classifier, name: str | None, against: Mapping[str, Classifier]) -> dict[str, Classifier]:
    own = name or str(model.lineage.get("name") or model.architecture)
    if own in against:
        raise ValueError(f"expected another name than {own!r} for a model of against, got it twice; pass name=...")
    wanted = (model.image_policy.size, model.image_policy.mode)
    for other, each in against.items():
        got = (each.image_policy.size, each.image_policy.mode)
        if got != wanted:
            raise ValueError(f"expected models with the same input, {wanted}, got {got} for {other!r}; compare others with it.")
    return {own: model, **against}


def _drawn(data: ImageData | StreamingData, number: int, seed: int, stream: int) -> tuple[ImageData, Tensor]:
    """Some images, in random order, and their positions in the split; for a stream, among those that were read."""
    if isinstance(data, StreamingData):
        data = data.held(number)
    order = permutation(seed, stream, len(data))[:number]
    return data.subset(order), order


def _notes(model: Classifier, splits: Splits, train: ImageData, top: int, found: tuple[ModelExplanation, ...]) -> list[str]:
    notes = list(splits.notes)
    trained_on = model.lineage.get("data", {}).get("fingerprint")
    if not found[0].refitted and trained_on != splits.train.description.get("fingerprint", ""):
        notes.append("the model is not known to have been trained on these training images")
    if isinstance(splits.train, StreamingData) or len(train) < len(splits.train):
        notes.append(f"influence is that of a sample of {len(train):,} training images")
    if len(train) < top:
        notes.append(f"there are {len(train)} training images, fewer than {top}")
    notes += [
        f"{each.name}: the training loss of its classifier, {each.loss:.3g}, lies about {each.excess:.2g} above its minimum, "
        "where influence is defined; "
        + ("its fit did not converge: raise weight_decay" if each.refitted else "refit=True (--refit) moves it there first")
        for each in found
        if each.far_from_minimum
    ]
    return notes


@dataclass(frozen=True, eq=False)
class _Run:
    """State that is the same for every model."""

    train: ImageData
    test: ImageData
    shown: Tensor
    pictures: Tensor
    label_names: tuple[str, ...]
    top: int
    weight_decay: float
    damping: float
    refit: bool
    seed: int
    batch_size: int
    progress: bool

    def explain(self, name: str, model: Classifier) -> ModelExplanation:
        refit = self.refit or model.num_classes != len(self.label_names) or _other(model.label_names, self.label_names)
        digest = weights_sha256(model)
        if refit:
            model = copy.deepcopy(model)
            model.reset_head(self.label_names)
        loss = ClassifierLoss.from_model(
            model, self.train, weight_decay=self.weight_decay, batch_size=self.batch_size, progress=self.progress
        )
        if refit:
            loss = loss.refitted()
            loss.put_into(model)
        inputs, labels = classifier_inputs(model, self.test, batch_size=self.batch_size)
        influences = influence(loss, inputs, labels, damping=self.damping).cpu().numpy()
        queries = slice(None, len(self.test))
        among_train = influence(loss, loss.inputs[queries], loss.labels[queries], damping=self.damping).cpu().numpy()
        train_labels, test_labels = self.train.labels.numpy(), self.test.labels.numpy()
        own = np.arange(len(among_train))
        top = ranked(influences, self.top)
        return ModelExplanation(
            name=name,
            weights_sha256=digest,
            refitted=refit,
            num_parameters=loss.num_parameters,
            solver=loss.solver,
            loss=float(loss.value()),
            excess=loss.excess(self.damping),
            predicted=(inputs @ loss.parameters.T).argmax(1).cpu().numpy(),
            maps=self._maps(model),
            top=top,
            values=np.take_along_axis(influences, top, 1),
            match={
                "test": Match.of(influences, test_labels, train_labels, seed=self.seed),
                "train": Match.of(among_train, train_labels[queries], train_labels, own, seed=self.seed),
            },
        )

    def _maps(self, model: Classifier) -> dict[str, np.ndarray]:
        device = next(model.parameters()).device
        images, labels = self.pictures.to(device), self.test.labels[self.shown].to(device)
        maps = {
            "gradient": saliency(model, images, labels),
            "SmoothGrad": smooth_grad(model, images, labels, seed=self.seed),
            "integrated gradients": integrated_gradients(model, images, labels),
        }
        return {method: map_pictures(found).cpu().numpy() for method, found in maps.items()}


def _other(own: tuple[str, ...] | None, names: tuple[str, ...]) -> bool:
    """Whether a model's classes are known to differ from those of the data."""
    return own is not None and own != tuple(names)
