"""Parts of a stream, which are divided by position."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..data import DataError, StreamingData
from ..images import ImagePolicy
from .arguments import DataArguments, Notes, Splits
from .classes import Classes
from .columns import features_of, undecoded
from .dividing import split_off
from .opening import OpenedData, describe

_HELD = 512  # validation images


def divide_stream(
    roles: Mapping[str, Any],
    image: str,
    label: str,
    policy: ImagePolicy,
    opened: OpenedData,
    classes: Classes,
    arguments: DataArguments,
    notes: Notes,
) -> Splits:
    """Streams to train and report on, and images to choose on, which are held in memory.

    Args:
        roles: Splits by their use.
        image: Name of the column with the pictures.
        label: Name of the column with the labels.

    Raises:
        DataError: If classes have no names, or a part of the images was asked for.
    """
    if arguments.train_images or arguments.train_share:
        raise DataError(
            "expected data that are not a stream for train_images and train_share, which choose among all labels; got a "
            "stream. Leave streaming out, or these."
        )
    streams = {
        role: undecoded(split.to_iterable_dataset() if isinstance(split, Dataset) else split, image, label)
        for role, split in roles.items()
    }
    names = classes.names_of_stream(features_of(roles["train"])[label], label)
    tested = 0.0 if "test" in streams else arguments.test_share
    split_seed = arguments.seed if "test" in streams else arguments.test_seed  # one draw divides it
    held = tested if "validation" in streams else tested + (1 - tested) * arguments.validation_share

    def part(role: str, low: float, high: float) -> StreamingData:
        given = role in streams
        if not given:
            use = "are kept for the report and not trained on" if role == "test" else "are for validation"
            notes.add(f"no {role} split: {high - low:.0%} of the stream, chosen by position, seed {split_seed}, {use}")
        return StreamingData(
            streams[role if given else "train"],
            names,
            policy,
            image,
            label,
            classes=classes.numbers(features_of(roles[role if given else "train"])[label], names),
            part=(low, high) if low < high else (0.0, 1.0),
            split_seed=split_seed,
            shuffle_buffer=arguments.shuffle_buffer,
            confinement=opened.confinement,
            description=describe(opened.origin, role if given else f"{role} (split off)", policy),
        )

    test, train = part("test", 0.0, tested), part("train", held, 1.0)
    validation = part("validation", tested, held).held(_HELD)
    location = [opened.location, image, label]
    if "test" not in streams:
        train.description["split_off"] = split_off(arguments, index_hash=None)
    identity = [location, train.description, train.label_names, train.part, train.split_seed, train.shuffle_buffer]
    train.description["fingerprint"] = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    present, number, most = len(validation.labels.unique()), len(validation), len(names)
    if present < 0.5 * most * (1 - (1 - 1 / most) ** number):  # half of what so many random images would show
        notes.add(
            f"the {number} images for validation show only {present} of {most} classes: the stream seems "
            "sorted by class. Training needs it mixed: a larger shuffle_buffer, or no streaming"
        )
    return Splits(train, validation, test, tuple(notes))
