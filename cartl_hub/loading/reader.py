"""Reads any ``datasets`` data set into the images and labels that training, model choice and report draw from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor

from ..data import DataError, ImageData, StreamingData, UnknownClassError, listed
from ..images import ImagePolicy
from ..sampling import index_hash, stratified_split
from .arguments import ROLES, DataArguments, Notes, Splits
from .classes import Classes
from .columns import features_of, find_columns, labelled_splits, undecoded
from .dividing import divide, pixel_hash
from .opening import AnyData, OpenedData, describe, open_data
from .pictures import Decoder, note_large_pictures, read_pictures
from .streams import divide_stream


def load_splits(
    data: AnyData,
    policy: ImagePolicy,
    arguments: DataArguments | None = None,
    *,
    label_names: Sequence[str] | None = None,
    trained_on: Mapping[str, Any] | None = None,
) -> Splits:
    """Read, check and split a data set; any fault of one that fits into memory is an error here.

    Args:
        data: ``datasets`` object, mapping from split names to such objects, Hub id, folder of images (one folder per class, or
            ``train/`` and ``test/`` with these), or parquet file or folder of them.
        policy: Policy that turns pictures into inputs.
        arguments: Arguments for reading the data set.
        label_names: Classes that a model already has: labels are matched to these by name.
        trained_on: Description of the data in a model's lineage: images set aside when it was trained on them are set aside
            again.

    Raises:
        DataError: On columns, labels or pictures that can't be used; the message names the row and the remedy.
    """
    return _reader(data, policy, arguments, label_names, trained_on).read_again(trained_on or {})


def load_test_split(
    data: AnyData,
    policy: ImagePolicy,
    arguments: DataArguments | None = None,
    *,
    label_names: Sequence[str] | None = None,
    trained_on: Mapping[str, Any] | None = None,
) -> tuple[ImageData | StreamingData, tuple[str, ...]]:
    """The images to measure a model on: the test split; without one, the images set aside when the model was trained on this
    data; without those, the validation split, or all images.

    Args:
        data: Data set, as for :func:`load_splits`.
        policy: Policy that turns pictures into inputs.
        arguments: Arguments for reading the data set.
        label_names: Classes of the model.
        trained_on: Description of the data in the model's lineage.

    Returns:
        The images, and the decisions made for the user.

    Raises:
        DataError: As :func:`load_splits`; also if the images set aside aren't those of the training.
    """
    reader = _reader(data, policy, arguments, label_names, trained_on)
    try:
        return reader.read_test(trained_on or {}), tuple(reader.notes)
    except UnknownClassError as error:
        raise UnknownClassError(f"{error} A model is measured on the classes that it has; fine-tune it for others.") from error


def _reader(
    data: AnyData,
    policy: ImagePolicy,
    arguments: DataArguments | None,
    label_names: Sequence[str] | None,
    trained_on: Mapping[str, Any] | None,
) -> "_Reader":
    arguments, notes = arguments or DataArguments(), Notes()
    opened = open_data(data, arguments, notes)
    opened = replace(opened, splits=labelled_splits(opened.splits, arguments, notes))
    reader = _Reader(opened, policy, arguments, Classes(label_names, arguments.label_names, notes), notes)
    streamed = any(isinstance(split, IterableDataset) for split in opened.splits.values())
    if not streamed and reader.was_streamed(trained_on or {}):
        if not isinstance(data, (str, Path)):
            raise DataError(
                "expected a stream, as the model was trained on one of which a part was set aside by position; got data of which "
                "that part can't be told. Pass the stream, or its path or id."
            )
        return _reader(data, policy, replace(arguments, streaming=True), label_names, None)
    return reader


@dataclass
class _Reader:
    """Reads one data set."""

    opened: OpenedData
    policy: ImagePolicy
    arguments: DataArguments
    classes: Classes
    notes: Notes
    measures: bool = False  # a model that was trained on these data, and reads them again for their test part

    def read(self) -> Splits:
        """All parts."""
        roles = self._roles()
        image, label = find_columns(roles, self.arguments, self.notes)
        note_large_pictures(roles["train"], image, self.policy, self.notes, self.opened.confinement)
        if any(isinstance(split, IterableDataset) for split in roles.values()):
            return divide_stream(roles, image, label, self.policy, self.opened, self.classes, self.arguments, self.notes)
        raw = {role: undecoded(split, label)[:][label] for role, split in roles.items()}
        names = self.classes.names(roles["train"].features[label], label, raw)
        labels = {
            role: self.classes.labels(raw[role], split.features[label], label, names, role) for role, split in roles.items()
        }
        parts = {role: self._images(split, image, labels[role], names, role) for role, split in roles.items()}
        return divide(parts, self.arguments, self.notes, measures=self.measures)

    def read_again(self, trained_on: Mapping[str, Any]) -> Splits:
        """All parts, with the images that were set aside when a model was trained on these data."""
        set_aside = self._set_aside(trained_on)
        return self._with_part(set_aside) if set_aside else self.read()

    def _with_part(self, set_aside: Mapping[str, Any]) -> Splits:
        """All parts, of which the test part is the one that was set aside.

        Raises:
            DataError: If it has changed.
        """
        chosen = {key: set_aside[key] for key in ("seed", "test_share", "validation_share")}
        chosen["test_seed"] = set_aside.get("test_seed", set_aside["seed"])  # older models state one seed for both
        self.arguments = replace(self.arguments, **chosen)
        again = self.read()
        if isinstance(again.test, ImageData):
            stated = ("index_hash", "pixels")  # older models lack the latter
            expected = {key: set_aside[key] for key in stated if key in set_aside}
            got = {key: again.train.description["split_off"][key] for key in expected}
            if got != expected:
                raise DataError(
                    f"expected the images that were set aside when the model was trained ({expected}), got others ({got}); the "
                    "data have changed since, or their files have other names, so that some may have been trained on."
                )
        return again

    def was_streamed(self, trained_on: Mapping[str, Any]) -> bool:
        """Whether a model was trained on these data as a stream, of which a part was set aside."""
        set_aside = trained_on.get("split_off")
        return set_aside is not None and set_aside.get("index_hash") is None and self._set_aside(trained_on) is not None

    def _set_aside(self, trained_on: Mapping[str, Any]) -> dict[str, Any] | None:
        """Record of how a test split was made for a model, if these are its data and have none."""
        set_aside = trained_on.get("split_off")
        if set_aside is None or any(name in self.opened.splits for name in ROLES["test"]):
            return None
        return set_aside if trained_on.get("id") == self.opened.origin["id"] or self._recognised(set_aside) else None

    def _recognised(self, set_aside: Mapping[str, Any]) -> bool:
        """Whether these are, under another name, the data of which a part was set aside: its indices and pixels tell."""
        if set_aside.get("index_hash") is None or set_aside.get("pixels") is None:
            return False
        notes = Notes.silent()
        trial = replace(self, classes=replace(self.classes, notes=notes), notes=notes)
        try:
            split = trial._roles()["train"]
            if isinstance(split, IterableDataset):
                return False
            image, label = find_columns({"train": split}, self.arguments, notes)
            names, labels = trial._classified(split, label, "train")
            seed = set_aside.get("test_seed", set_aside["seed"])
            _, held = stratified_split(labels, set_aside["test_share"], seed)
            if index_hash(held) != set_aside["index_hash"]:
                return False
            decode = Decoder.of(split, image, self.policy, "train", self.opened.confinement)
            return pixel_hash(ImageData(labels, names, decode, self.policy).subset(held)) == set_aside["pixels"]
        except DataError:  # reading reports it
            return False

    def read_test(self, trained_on: Mapping[str, Any]) -> ImageData | StreamingData:
        """The images to measure a model on."""
        splits = self.opened.splits
        if set_aside := self._set_aside(trained_on):
            self.measures = True
            return self._with_part(set_aside).test
        found = {role: name for role in ("test", "validation", "train") for name in reversed(ROLES[role]) if name in splits}
        name = found.get("test") or found.get("validation") or found.get("train")
        if name is None and len(splits) > 1:
            raise DataError(f"expected a split named 'test', got {listed(splits)}; pass a mapping with 'test'.")
        name = name or next(iter(splits))
        if name != found.get("test"):
            self.notes.add(f"no test split: all of the split {name!r} is measured; the model must not have been trained on it")
        split = splits[name]
        if not isinstance(split, IterableDataset) and not len(split):
            raise DataError(f"expected at least one image in the split {name!r}, got none; pass data that have images.")
        image, label = find_columns({"train": split}, self.arguments, self.notes)
        note_large_pictures(split, image, self.policy, self.notes, self.opened.confinement)
        if isinstance(split, IterableDataset):
            feature = features_of(split)[label]
            names = self.classes.names_of_stream(feature, label)
            classes = self.classes.numbers(feature, names)
            description = describe(self.opened.origin, name, self.policy)
            columns = undecoded(split, image, label)
            return StreamingData(
                columns,
                names,
                self.policy,
                image,
                label,
                classes=classes,
                confinement=self.opened.confinement,
                description=description,
            )
        names, labels = self._classified(split, label, name)
        return self._images(split, image, labels, names, name)

    def _classified(self, split: Dataset, label: str, role: str) -> tuple[tuple[str, ...], Tensor]:
        """Classes of one split, and that of each of its images."""
        feature, raw = split.features[label], undecoded(split, label)[:][label]
        names = self.classes.names(feature, label, {role: raw})
        return names, self.classes.labels(raw, feature, label, names, role)

    def _roles(self) -> dict[str, Any]:
        """Splits by role; the rest is ignored with a note."""
        splits = self.opened.splits
        found = {role: [name for name in names if name in splits] for role, names in ROLES.items()}
        chosen = {role: names[0] for role, names in found.items() if names}
        if "train" not in chosen:
            if len(splits) > 1:
                raise DataError(f"expected a split named 'train', got {listed(splits)}; pass a mapping with 'train' and 'test'.")
            chosen = {"train": next(iter(splits))}
            self.notes.add(f"the only split, {chosen['train']!r}, is divided into parts to train, choose and report on")
        ignored = [str(name) for name in splits if name not in chosen.values()]
        if ignored:
            self.notes.add(f"splits that are not used: {', '.join(ignored)}")
        for role, name in chosen.items():
            if not isinstance(splits[name], (Dataset, IterableDataset)):
                raise DataError(f"expected a datasets.Dataset for the {role} split, got {type(splits[name]).__name__}.")
            if isinstance(splits[name], Dataset) and not len(splits[name]):
                raise DataError(f"expected images in the {role} split, got none.")
        return {role: splits[name] for role, name in chosen.items()}

    def _images(self, split: Dataset, column: str, labels: Tensor, names: tuple[str, ...], role: str) -> ImageData:
        description = describe(self.opened.origin, role, self.policy) | {"num_images": len(labels)}
        return read_pictures(split, column, labels, names, self.policy, role, description, self.opened.confinement)
