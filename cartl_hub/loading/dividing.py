"""Splits parts that a data set lacks off its training images."""

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor

from ..data import DataError, ImageData, listed
from ..sampling import index_hash, stratified_sample, stratified_split
from .arguments import DataArguments, Notes, Splits


def divide(parts: dict[str, ImageData], arguments: DataArguments, notes: Notes, *, measures: bool = False) -> Splits:
    """All parts: first images to report on are taken from the training images, then images to choose on.

    Args:
        parts: Parts by their use; changed in place.
        measures: Whether a model that was trained on these data reads them again for their test part.

    Raises:
        DataError: If there are too few images, or not as many as were asked for.
    """
    train = parts["train"]
    kept = torch.arange(len(train))
    for role, share, seed, use in (
        ("test", arguments.test_share, arguments.test_seed, "are kept for the report and not trained on"),
        ("validation", arguments.validation_share, arguments.seed + 1, "are for validation and not trained on"),
    ):
        if role in parts:
            continue
        inner, held = stratified_split(train.labels[kept], share, seed)
        if not len(held):
            raise DataError(
                f"expected a class with at least two images to split off a {role} part, got {len(kept)} images, each of "
                f"another class; add images, or pass a {role!r} split."
            )
        chosen, kept = kept[held], kept[inner]
        parts[role] = train.subset(chosen, split=f"{role} (split off)", index_hash=index_hash(chosen), split_seed=seed)
        if measures:
            use = "were set aside when the model was trained, and are measured"
        if role == "test" or not measures:
            notes.add(
                f"no {role} split: {share:.0%} of the training images ({len(chosen)}, stratified, seed {seed}, index hash "
                f"{index_hash(chosen)}) {use}"
            )
    kept = _sampled(train.labels, kept, arguments, notes)
    if len(kept) < len(train):
        train = train.subset(kept, index_hash=index_hash(kept))
    present = set(train.labels.tolist())
    missing = [name for number, name in enumerate(train.label_names) if number not in present]
    if missing:
        notes.add(f"no training image of {len(missing)} of {len(train.label_names)} classes: {listed(missing)}")
    if set_aside := parts["test"].description.get("index_hash"):
        train.description["split_off"] = split_off(arguments, index_hash=set_aside, pixels=pixel_hash(parts["test"]))
    train.description["fingerprint"] = train.fingerprint()
    return Splits(train, parts["validation"], parts["test"], tuple(notes))


def _sampled(labels: Tensor, kept: Tensor, arguments: DataArguments, notes: Notes) -> Tensor:
    """The ``kept`` images to train on."""
    most, classes = len(kept), len(labels[kept].unique())
    if arguments.train_images is None and arguments.train_share is None:
        return kept
    number = arguments.train_images or max(classes, round((arguments.train_share or 1) * most))
    if not classes <= number <= most:
        raise DataError(
            f"expected train_images from {classes}, one for each class, to {most}, the images that are left for training; "
            f"got {number}."
        )
    chosen = kept[stratified_sample(labels[kept], number, arguments.seed)]
    notes.add(
        f"training on {number:,} of {most:,} images, stratified, seed {arguments.seed}, index hash {index_hash(chosen)}",
        logging.INFO,  # as it was asked for
    )
    return chosen


def split_off(arguments: DataArguments, **known: str | None) -> dict[str, Any]:
    """Record of how the test part was made, to make it again, and of what is known about it, to verify it."""
    names = ("seed", "test_seed", "test_share", "validation_share")
    return {name: getattr(arguments, name) for name in names} | known


def pixel_hash(data: ImageData, most: int = 64) -> str:
    """Hash of the pixels of images evenly spaced over the data."""
    chosen = torch.linspace(0, len(data) - 1, min(len(data), most)).long()
    return hashlib.sha256(data.get(chosen).cpu().contiguous().numpy().data).hexdigest()[:16]
