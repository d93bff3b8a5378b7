"""From any ``datasets`` data set to the images and labels that training, model choice and report draw from."""

import glob
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import huggingface_hub
import numpy as np
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as PictureFolder
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from torch import Tensor
from tqdm.auto import tqdm

from .data import DataError, ImageData, StreamingData, UnknownClassError, listed
from .images import ImagePolicy, policy_to_dict, to_pil
from .ranges import check_bool, check_number, check_whole
from .sampling import index_hash, stratified_sample, stratified_split

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 4 << 30  # larger splits are decoded when they are drawn
_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}
_IMAGE_COLUMNS = ("image", "img", "images", "pixels", "picture")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "y")
_FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_LOADERS = ("arrow", "csv", "generator", "json", "parquet", "webdataset")  # of datasets, whose name says nothing of the data
_LABELS = re.compile(r"u?int\d+|bool|(large_)?string(_view)?|null")  # kinds of column that can hold classes
_HELD = 512  # validation images of a stream
_LARGE = 3  # times the side of the input, from which on a picture loses most of its detail
# where the cache of datasets keeps what came from the Hub: owner___name/configuration/version/commit/
_CACHED = re.compile(r"/(?P<id>[^/]+)/[^/]+/[^/]+/(?P<revision>[0-9a-f]{40})/[^/]+$")

AnyData: TypeAlias = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict | Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """What a data set is used for.

    Args:
        train: To train on.
        validation: To choose on.
        test: To report on.
        notes: What was decided for the user: splits made, splits ignored, labels mapped.
    """

    train: ImageData | StreamingData
    validation: ImageData
    test: ImageData | StreamingData
    notes: tuple[str, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.train.label_names


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """How to read a data set.

    Args:
        id: Of the data, in names of models, reports and cards; found by itself for a folder or a data set of the Hub.
        image_column: Found by itself where there is one image column.
        label_column: Found by itself where there is one label column.
        config: Configuration of a data set on the Hub.
        revision: Commit, branch or tag of a data set on the Hub.
        label_names: For integer labels without names.
        validation_share: Of the training images, split off where there is no validation split.
        test_share: Of the training images, split off where there is no test split.
        train_images: Train on this number of the images that are left for it, at least one of each class; all by default.
            Of one seed, fewer lie among more. Validation and test keep their images.
        train_share: The same as a share, in (0, 1].
        streaming: Read a data set on the Hub or in a folder as a stream.
        shuffle_buffer: Examples from which a stream draws at random.
        seed: Of the choice of validation images and of ``train_images``.
        test_seed: Of the choice of test images where there is no test split: another ``seed`` leaves them as they are, so that
            runs with several seeds are measured on the same images. It divides such a stream into all its parts.

    Raises:
        ValueError: On values out of range.
    """

    id: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    config: str | None = None
    revision: str | None = None
    label_names: tuple[str, ...] | None = None
    validation_share: float = 0.1
    test_share: float = 0.2
    train_images: int | None = None
    train_share: float | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    seed: int = 0
    test_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            check_number(name, getattr(self, name), (">", 0), ("<", 1))
        if self.train_images is not None and self.train_share is not None:
            raise ValueError(f"expected train_images or train_share, got both ({self.train_images} and {self.train_share}).")
        if self.train_images is not None:
            check_whole("train_images", self.train_images, (">=", 1))
        if self.train_share is not None:
            check_number("train_share", self.train_share, (">", 0), ("<=", 1))
        for name in ("seed", "test_seed"):
            check_whole(name, getattr(self, name), (">=", 0), ("<", 1 << 31))
        if self.id is not None and (not self.id.strip() or not self.id.isprintable()):
            raise ValueError(f"id must be one line of printable text, got {self.id!r}.")
        check_whole("shuffle_buffer", self.shuffle_buffer, (">=", 1))
        check_bool("streaming", self.streaming)


def load_splits(
    data: AnyData,
    policy: ImagePolicy,
    arguments: DataArguments | None = None,
    *,
    label_names: Sequence[str] | None = None,
    trained_on: Mapping[str, Any] | None = None,
) -> Splits:
    """Read, check and split a data set; all that can be wrong with one that fits into memory is an error here.

    Args:
        data: A ``datasets`` object, a mapping from split names to such, a Hub id, a folder of images (one folder per class, or
            ``train/`` and ``test/`` of them), or a parquet file or folder of them.
        policy: How pictures become inputs.
        arguments: How to read it.
        label_names: Classes that a model already has: labels are matched to these by name.
        trained_on: Description of the data in a model's lineage: what was set aside when it was trained on them, is again.

    Raises:
        DataError: On columns, labels or pictures that can't be used; the message names the row and the remedy.
    """
    reader = _Reader(policy, arguments or DataArguments(), label_names)
    return reader.read_again(reader.open(data), trained_on or {})


def load_test_split(
    data: AnyData,
    policy: ImagePolicy,
    arguments: DataArguments | None = None,
    *,
    label_names: Sequence[str] | None = None,
    trained_on: Mapping[str, Any] | None = None,
) -> tuple[ImageData | StreamingData, tuple[str, ...]]:
    """The images to measure a model on: the test split; without one, what was set aside when the model was trained on this data;
    without that, the validation split, or all images.

    Args:
        data: As for :func:`load_splits`.
        policy: How pictures become inputs.
        arguments: How to read it.
        label_names: Classes of the model.
        trained_on: Description of the data in the model's lineage.

    Returns:
        The images, and what was decided for the user.

    Raises:
        DataError: As :func:`load_splits`; also if the images set aside aren't those of the training.
    """
    reader = _Reader(policy, arguments or DataArguments(), label_names)
    try:
        return reader.read_test(reader.open(data), trained_on or {}), tuple(reader.notes)
    except UnknownClassError as error:
        raise UnknownClassError(f"{error} A model is measured on the classes that it has; fine-tune it for others.") from error


@dataclass
class _Reader:
    """Reads one data set."""

    policy: ImagePolicy
    arguments: DataArguments
    known_names: Sequence[str] | None
    origin: dict[str, Any] = field(default_factory=dict)
    location: str = ""
    notes: list[str] = field(default_factory=list)
    measures: bool = False  # a model that was trained on these data, and reads them again for their test part

    def _note(self, text: str, level: int = logging.WARNING) -> None:
        self.notes.append(text)
        logger.log(level, text)

    # Where it lies

    def open(self, data: AnyData) -> dict[str, Any]:
        """The splits by name."""
        splits = self._open(data)
        if self.arguments.id is not None:
            self.origin["id"] = self.arguments.id
        return splits

    def _open(self, data: AnyData) -> dict[str, Any]:
        if isinstance(data, (Dataset, IterableDataset)):
            data = {"train": data}
        if isinstance(data, Mapping):
            if not data:
                raise DataError("expected at least one split, got an empty mapping.")
            self.origin = _origin(next(iter(data.values())))
            return dict(data)
        if not isinstance(data, (str, Path)):
            raise DataError(
                f"expected a datasets.Dataset, a DatasetDict, a Hub id or a folder, got {type(data).__name__}; "
                "datasets.Dataset.from_dict makes one from arrays."
            )
        if not str(data).strip():
            raise DataError(f"expected a folder, a parquet file or a Hub id, got {str(data)!r}.")
        path = Path(data).expanduser()
        if path.exists():
            self.location = str(path.resolve())  # not a part of what cards and reports show
            self.origin = {"id": path.resolve().name}
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                return self._saved(path)
            builder, files = self._files(path)
            return self._load(str(data), builder, data_files=files)
        if str(data).startswith((".", "/", "~")) or str(data).count("/") > 1:
            raise DataError(f"expected a folder, a parquet file or a Hub id, got {str(data)!r}, which does not exist.")
        revision = _commit(str(data), self.arguments.revision)
        self.origin = {"id": str(data), "config": self.arguments.config, "revision": revision}
        return self._load(str(data), str(data), name=self.arguments.config, revision=revision)

    def _load(self, described: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return dict(datasets.load_dataset(*args, **kwargs, streaming=self.arguments.streaming))
        except Exception as error:  # the loaders of datasets raise many kinds
            here = "" if Path(described).exists() else f" (there is no file or folder {described!r} here)"
            raise DataError(f"the data set {described!r} can't be read{here}: {_reason(error)}") from error

    def _saved(self, path: Path) -> dict[str, Any]:
        """What ``save_to_disk`` wrote."""
        try:
            saved: Any = datasets.load_from_disk(str(path))
        except Exception as error:  # of a folder that lacks files, or holds others
            raise DataError(f"expected what save_to_disk wrote in {path}: {_reason(error)}; save it again.") from error
        splits = dict(saved) if isinstance(saved, Mapping) else {"train": saved}
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if self.arguments.streaming else splits

    def _files(self, path: Path) -> tuple[str, dict[str, Any]]:
        """Loader of ``datasets`` for a local path, and the files of each split.

        ``datasets`` by itself takes a "train" or "test" anywhere in a path for a split and leaves the other files out: of the
        classes "boat" and "bullet train" it would read the second one only.
        """
        if path.is_file():
            if path.suffix not in _FILES:
                raise DataError(f"expected a folder or a file of one of the kinds {', '.join(_FILES)}, got {path}.")
            return _FILES[path.suffix], {"train": str(path)}
        files: dict[str, Any] = {}
        for file in sorted(path.rglob("*.parquet")):
            words = re.split("[^a-z]+", file.relative_to(path).with_suffix("").as_posix().lower())
            split = next((split for split, names in _NAMES.items() if set(names).intersection(words)), "train")
            files.setdefault(split, []).append(str(file))
        if files:
            return "parquet", files
        if any(path.rglob("*.arrow")):
            raise DataError(
                f"expected pictures, parquet files or what save_to_disk wrote in {path}, got arrow files without its "
                "state.json or dataset_dict.json; save the data again, or name one file."
            )
        folders = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
        named = [name for name in folders if any(name.lower() in names for names in _NAMES.values())]
        unused = [name for name in folders if name not in named]
        if named and unused:
            self._note(f"folders that are not used, as there is {', '.join(named)}: {listed(unused)}")
        parts = {name.lower(): path / name for name in named} or {"train": path}
        return "imagefolder", {name: self._pictures(part) for name, part in parts.items()}

    def _pictures(self, folder: Path) -> str:
        """Pattern of the pictures of a split: where there are folders of classes, ``datasets`` would take a picture beside them
        for a sign that they are none."""
        inside = [item for item in folder.iterdir() if not item.name.startswith(".")]
        loose = [item.name for item in inside if item.suffix.lower() in PictureFolder.EXTENSIONS and item.is_file()]
        classes = any(item.is_dir() for item in inside)
        if not loose or not classes or any(item.stem == "metadata" for item in inside):
            return f"{glob.escape(str(folder))}/**"
        self._note(f"pictures that are not used, as they lie beside the folders of the classes in {folder.name}: {listed(loose)}")
        return f"{glob.escape(str(folder))}/*/**"

    # What it holds

    def read(self, splits: Mapping[str, Any]) -> Splits:
        roles = self._roles(splits)
        image, label = self._columns(roles)
        self._large_pictures(roles["train"], image)
        if any(isinstance(split, IterableDataset) for split in roles.values()):
            return self._stream(roles, image, label)
        raw = {role: _undecoded(split, label)[:][label] for role, split in roles.items()}
        if "test" in raw and all(value in (-1, None) for value in raw["test"]):
            self._note("the test split has no labels (all are -1 or missing): it is not used")
            del roles["test"], raw["test"]
        names = self._label_names(roles["train"].features[label], label, raw)
        labels = {role: self._labels(raw[role], split.features[label], label, names, role) for role, split in roles.items()}
        return self._divide({role: self._images(split, image, labels[role], names, role) for role, split in roles.items()})

    def read_again(self, splits: Mapping[str, Any], trained_on: Mapping[str, Any]) -> Splits:
        """With what was set aside when a model was trained on these data."""
        set_aside = self._set_aside(splits, trained_on)
        if not set_aside:
            return self.read(splits)
        chosen = {key: set_aside[key] for key in ("seed", "test_share", "validation_share")}
        chosen["test_seed"] = set_aside.get("test_seed", set_aside["seed"])  # older models state one seed for both
        self.arguments = replace(self.arguments, **chosen)
        again = self.read(splits)
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

    def _set_aside(self, splits: Mapping[str, Any], trained_on: Mapping[str, Any]) -> dict[str, Any] | None:
        """How a test split was made for a model, where these are its data and have none."""
        has_test = any(name in splits for name in _NAMES["test"])
        return None if has_test or trained_on.get("id") != self.origin["id"] else trained_on.get("split_off")

    def read_test(self, splits: Mapping[str, Any], trained_on: Mapping[str, Any]) -> ImageData | StreamingData:
        if self._set_aside(splits, trained_on):
            self.measures = True
            return self.read_again(splits, trained_on).test
        found = {role: name for role in ("test", "validation", "train") for name in reversed(_NAMES[role]) if name in splits}
        name = found.get("test") or found.get("validation") or found.get("train")
        if name is None and len(splits) > 1:
            raise DataError(f"expected a split named 'test', got {listed(splits)}; pass a mapping with 'test'.")
        name = name or next(iter(splits))
        if name != found.get("test"):
            self._note(f"no test split: all of the split {name!r} is measured; the model must not have been trained on it")
        split = splits[name]
        if not isinstance(split, IterableDataset) and not len(split):
            raise DataError(f"expected at least one image in the split {name!r}, got none; pass data that have images.")
        image, label = self._columns({"train": split})
        self._large_pictures(split, image)
        if isinstance(split, IterableDataset):
            names = self._given_names(_features(split)[label])
            if names is None:
                raise DataError(f"expected class names for the labels in {label!r} of a stream, got none; pass label_names=...")
            classes = self._classes(_features(split)[label], names)
            undecoded, description = _undecoded(split, image, label), self._description(name)
            return StreamingData(undecoded, tuple(names), self.policy, image, label, classes=classes, description=description)
        raw = _undecoded(split, label)[:][label]
        names = self._label_names(split.features[label], label, {"test": raw})
        return self._images(split, image, self._labels(raw, split.features[label], label, names, name), names, name)

    def _roles(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        """Which split is which; the rest is ignored aloud."""
        found = {role: [name for name in names if name in splits] for role, names in _NAMES.items()}
        chosen = {role: names[0] for role, names in found.items() if names}
        if "train" not in chosen:
            if len(splits) > 1:
                raise DataError(f"expected a split named 'train', got {listed(splits)}; pass a mapping with 'train' and 'test'.")
            chosen = {"train": next(iter(splits))}
            self._note(f"the only split, {chosen['train']!r}, is divided into parts to train, choose and report on")
        ignored = [str(name) for name in splits if name not in chosen.values()]
        if ignored:
            self._note(f"splits that are not used: {', '.join(ignored)}")
        for role, name in chosen.items():
            if not isinstance(splits[name], (Dataset, IterableDataset)):
                raise DataError(f"expected a datasets.Dataset for the {role} split, got {type(splits[name]).__name__}.")
            if isinstance(splits[name], Dataset) and not len(splits[name]):
                raise DataError(f"expected images in the {role} split, got none.")
        return {role: splits[name] for role, name in chosen.items()}

    def _columns(self, roles: Mapping[str, Any]) -> tuple[str, str]:
        """Names of the image and the label column."""
        features = _features(roles["train"])
        image = _column(features, "image", self.arguments.image_column, (Image, Array2D, Array3D), _IMAGE_COLUMNS)
        label = _column(features, "label", self.arguments.label_column, (ClassLabel,), _LABEL_COLUMNS)
        for role, split in roles.items():
            features = _features(split)
            for column in (image, label):
                if column not in features:
                    raise DataError(
                        f"expected the column {column!r} in the {role} split too, got {', '.join(features)}; rename it, or pass "
                        "a mapping without this split."
                    )
            kind = features[label]
            if kind is not None and not _LABELS.fullmatch(getattr(kind, "dtype", None) or ""):
                raise DataError(
                    f"expected classes (ClassLabel, integers, strings or booleans) in {label!r} of the {role} split, got {kind}."
                )
            if isinstance(split, Dataset) and split.format["type"] == "custom":
                self._note(f"the transform of the {role} split (set_transform) is not used; see Augmentation")
        return image, label

    def _large_pictures(self, split: Any, column: str) -> None:
        """Say so when most pixels are thrown away."""
        source = split.select(range(0, len(split), max(1, len(split) // 32))) if isinstance(split, Dataset) else split
        sides = []
        for row in islice(_undecoded(source, column), 8 if source is split else None):
            try:
                sides.append(min(to_pil(row[column]).size))
            except ValueError:  # reading reports it, with its row
                continue
        height, side = self.policy.size[0], int(np.median(sides or [0]))
        if side > _LARGE * height:
            larger = "resnet50 (224 pixels)" if height < 224 else "convnext_base.fb_in22k_ft_in1k_384 (384 pixels)"
            self._note(
                f"pictures are about {side} pixels wide and the source takes {height}: most detail is lost, and an attack acts "
                "after resizing" + (f". A source for larger inputs keeps more, e.g. timm's {larger}" if height < 384 else "")
            )

    def _label_names(self, feature: Any, column: str, raw: Mapping[str, list[Any]]) -> tuple[str, ...]:
        """Names of the classes, in order."""
        given = self._given_names(feature)
        names = tuple(map(str, self._found_classes(feature, column, raw) if given is None else given))
        if len(set(names)) < max(2, len(names)):
            raise DataError(f"expected two or more different classes in {column!r}, got {listed(names) or 'none'}.")
        return names

    def _given_names(self, feature: Any) -> Sequence[str] | None:
        """Of the model, of the column or of the user; None where nobody gives any."""
        if not isinstance(feature, ClassLabel):
            return self.known_names or self.arguments.label_names
        if self.arguments.label_names is not None:
            self._note("label_names is not used: the label column has names of its own")
        return self.known_names or feature.names

    def _found_classes(self, feature: Any, column: str, raw: Mapping[str, list[Any]]) -> list[Any]:
        """Classes that occur among labels without names."""
        if feature.dtype == "bool":
            return [False, True]
        values = {value for split in raw.values() for value in split if value is not None}
        if len({isinstance(value, str) for value in values}) > 1:
            kinds = ", ".join(f"{split[0]!r} in {role}" for role, split in raw.items())
            raise DataError(f"expected labels of one kind in {column!r} of all splits, got numbers and strings: {kinds}.")
        found = sorted(values)
        if len(found) > max(1000, sum(map(len, raw.values())) // 2):
            raise DataError(f"expected classes in {column!r}, got {len(found)} different values; is it the right column?")
        if found and found[0] == -1 and found != [-1, 1]:  # the usual mark of a missing label: its row is an error
            del found[0]
        if feature.dtype.lstrip("u").startswith("int") and found != list(range(len(found))):
            self._note(f"labels are not 0 to K-1 ({listed(found)}): classes are numbered in their order")
        return found

    def _classes(self, feature: Any, names: Sequence[str]) -> dict[Any, int]:
        """Class of each raw label of a column: by its name, which is its position where the names aren't numbers."""
        if isinstance(feature, ClassLabel):
            named = dict(enumerate(feature.names))
        elif self.arguments.label_names is None and all(re.fullmatch(r"-?\d+", name) for name in names):
            named = {int(name): name for name in names}
        else:
            named = dict(enumerate(self.arguments.label_names or names))
        index = {name: number for number, name in enumerate(names)}
        numbers = {raw: index[name] for raw, name in named.items() if name in index}
        if feature is None:
            return index | numbers
        return index if "string" in feature.dtype else numbers

    def _labels(self, raw: Sequence[Any], feature: Any, column: str, names: tuple[str, ...], role: str) -> Tensor:
        classes = self._classes(feature, names)
        for row, value in enumerate(raw):
            if value not in classes:
                own = getattr(feature, "names", ())
                expected, got = (names, own[value]) if value in range(len(own)) else (classes, value)
                raise UnknownClassError(
                    f"row {row} of the {role} split: expected one of {listed(expected)} in {column!r}, got {got!r}."
                )
        return torch.tensor([classes[value] for value in raw])

    def _images(self, split: Dataset, column: str, labels: Tensor, names: tuple[str, ...], role: str) -> ImageData:
        source, feature = _undecoded(split, column), split.features[column]
        if isinstance(feature, (Array2D, Array3D)):
            source = source.with_format("numpy", dtype=feature.dtype)
        decode = Decoder(source, column, self.policy, role)
        description = self._description(role) | {"num_images": len(labels)}
        shape = (len(labels), self.policy.num_channels, *self.policy.size)
        if math.prod(shape) > IN_MEMORY_BYTES:
            return ImageData(labels, names, decode, self.policy, description, workers=min(8, os.cpu_count() or 1))
        images = torch.empty(shape, dtype=torch.uint8)
        with tqdm(total=len(labels), desc=f"reading {role} images", disable=len(labels) < 20_000, leave=False) as bar:
            for rows in torch.arange(len(labels)).split(64):
                images[rows[0] : rows[-1] + 1] = decode(range(int(rows[0]), int(rows[-1]) + 1))
                bar.update(len(rows))
        return ImageData(labels, names, images, self.policy, description)

    def _description(self, split: str) -> dict[str, Any]:
        return self.origin | {"split": split, "image_policy": policy_to_dict(self.policy)}

    # What is missing is split off

    def _divide(self, parts: dict[str, ImageData]) -> Splits:
        """First images to report on are taken from the training images, then images to choose on."""
        train, arguments = parts["train"], self.arguments
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
            if self.measures:
                use = "were set aside when the model was trained, and are measured"
            if role == "test" or not self.measures:
                self._note(
                    f"no {role} split: {share:.0%} of the training images ({len(chosen)}, stratified, seed {seed}, index hash "
                    f"{index_hash(chosen)}) {use}"
                )
        kept = self._sampled(train.labels, kept)
        if len(kept) < len(train):
            train = train.subset(kept, index_hash=index_hash(kept))
        present = set(train.labels.tolist())
        missing = [name for number, name in enumerate(train.label_names) if number not in present]
        if missing:
            self._note(f"no training image of {len(missing)} of {len(train.label_names)} classes: {listed(missing)}")
        if set_aside := parts["test"].description.get("index_hash"):
            train.description["split_off"] = self._split_off(index_hash=set_aside, pixels=_pixel_hash(parts["test"]))
        train.description["fingerprint"] = train.fingerprint()
        return Splits(train, parts["validation"], parts["test"], tuple(self.notes))

    def _sampled(self, labels: Tensor, kept: Tensor) -> Tensor:
        """Those of the ``kept`` images that are trained on."""
        arguments, most, classes = self.arguments, len(kept), len(labels[kept].unique())
        if arguments.train_images is None and arguments.train_share is None:
            return kept
        number = arguments.train_images or max(classes, round((arguments.train_share or 1) * most))
        if not classes <= number <= most:
            raise DataError(
                f"expected train_images from {classes}, one for each class, to {most}, the images that are left for training; "
                f"got {number}."
            )
        chosen = kept[stratified_sample(labels[kept], number, arguments.seed)]
        self._note(
            f"training on {number:,} of {most:,} images, stratified, seed {arguments.seed}, index hash {index_hash(chosen)}",
            logging.INFO,  # as it was asked for
        )
        return chosen

    def _split_off(self, **known: str | None) -> dict[str, Any]:
        """How the test part was made, to make it again, and what is known of it, to see whether it is the same."""
        names = ("seed", "test_seed", "test_share", "validation_share")
        return {name: getattr(self.arguments, name) for name in names} | known

    def _stream(self, roles: Mapping[str, Any], image: str, label: str) -> Splits:
        if self.arguments.train_images or self.arguments.train_share:
            raise DataError(
                "expected data that are not a stream for train_images and train_share, which choose among all labels; got a "
                "stream. Leave streaming out, or these."
            )
        streams = {}
        for role, split in roles.items():
            stream = split.to_iterable_dataset() if isinstance(split, Dataset) else split
            if role == "test" and next(iter(_undecoded(stream, label)))[label] in (-1, None):
                self._note("the test split has no labels (the first is -1 or missing): it is not used")
                continue
            streams[role] = _undecoded(stream, image, label)
        names = self._given_names(_features(roles["train"])[label])
        if names is None:
            raise DataError(f"expected class names for the labels in {label!r} of a stream, got none; pass label_names=...")
        tested = 0.0 if "test" in streams else self.arguments.test_share
        split_seed = self.arguments.seed if "test" in streams else self.arguments.test_seed  # one draw divides it
        held = tested if "validation" in streams else tested + (1 - tested) * self.arguments.validation_share

        def part(role: str, low: float, high: float) -> StreamingData:
            given = role in streams
            if not given:
                use = "are kept for the report and not trained on" if role == "test" else "are for validation"
                self._note(f"no {role} split: {high - low:.0%} of the stream, chosen by position, seed {split_seed}, {use}")
            return StreamingData(
                streams[role if given else "train"],
                tuple(names),
                self.policy,
                image,
                label,
                classes=self._classes(_features(roles[role if given else "train"])[label], names),
                part=(low, high) if low < high else (0.0, 1.0),
                split_seed=split_seed,
                shuffle_buffer=self.arguments.shuffle_buffer,
                description=self._description(role if given else f"{role} (split off)"),
            )

        test, train = part("test", 0.0, tested), part("train", held, 1.0)
        validation = part("validation", tested, held).held(_HELD)
        location = [self.location, image, label]
        if "test" not in streams:
            train.description["split_off"] = self._split_off(index_hash=None)
        identity = [location, train.description, train.label_names, train.part, train.split_seed, train.shuffle_buffer]
        train.description["fingerprint"] = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        present, number, most = len(validation.labels.unique()), len(validation), len(names)
        if present < 0.5 * most * (1 - (1 - 1 / most) ** number):  # half of what so many random images would show
            self._note(
                f"the {number} images for validation show only {present} of {most} classes: the stream seems "
                "sorted by class. Training needs it mixed: a larger shuffle_buffer, or no streaming"
            )
        return Splits(train, validation, test, tuple(self.notes))


def _reason(error: BaseException) -> str:
    """What ``datasets`` says, with what it says of the cause."""
    if "corresponds to no data" in str(error):
        return "it holds no pictures"
    reason = f"{type(error).__name__}: {error}"
    return f"{reason} ({_reason(error.__cause__)})" if error.__cause__ is not None else reason


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The commit that a branch is at now, so that the one that is read is the one that is reported."""
    try:
        return huggingface_hub.HfApi().dataset_info(hub_id, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled):  # what the loader makes of it is said
        return revision
    except Exception:  # without a network the loader tries for half a minute
        logger.warning(
            "the Hub can't be reached for the data set %r, which is no file or folder here; is it in the cache?", hub_id
        )
        return revision


def _origin(split: Any) -> dict[str, Any]:
    for file in getattr(split, "cache_files", ()):
        if match := _CACHED.search(Path(file["filename"]).as_posix()):
            return {"id": match["id"].replace("___", "/"), "revision": match["revision"]}
    info = getattr(split, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    if name == "imagefolder" and isinstance(split, Dataset):
        return {"id": _folder_name(split)}
    return {"id": "data in memory" if name in (None, *_LOADERS) else name}


def _folder_name(split: Dataset) -> str:
    """Of the folder whose folders are the classes, which ``load_dataset("imagefolder", data_dir=...)`` doesn't keep."""
    column = next((name for name, feature in split.features.items() if isinstance(feature, Image)), None)
    if column is None or not len(split):
        return "imagefolder"
    rows = range(0, len(split), max(1, len(split) // 32))  # files are in order, so that these lie in more than one class
    pictures = _undecoded(split.select(rows), column)[:][column]
    paths = [Path(picture["path"]) for picture in pictures if picture and picture.get("path")]
    if not paths or not all(path.is_absolute() for path in paths):
        return "imagefolder"
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    splits = {name for names in _NAMES.values() for name in names}
    return (folder.parent if folder.name.lower() in splits else folder).name or "imagefolder"


def _features(split: Any) -> Mapping[str, Any]:
    """Columns and their kinds; None for those of a stream that was mapped."""
    if split.features is not None:
        return split.features
    example = next(iter(split), None)
    if example is None:
        raise DataError("expected images in the stream, got none.")
    return dict.fromkeys(example)


def _column(features: Mapping[str, Any], role: str, named: str | None, kinds: tuple[type, ...], usual: tuple[str, ...]) -> str:
    """The column that is named, or the only one of the right kind, or the only one with a usual name."""
    if named is not None:
        if named not in features:
            raise DataError(f"expected a column {named!r} for the {role}s, got the columns {', '.join(features)}.")
        return named
    found = [name for name, feature in features.items() if isinstance(feature, kinds)]
    found = found or [name for name in features if name.lower() in usual]
    if len(found) != 1:
        several = f"several could be it: {', '.join(found)}" if found else f"the columns are {', '.join(features)}"
        remedy = "" if found or role == "image" else ", or make one folder per class"
        raise DataError(
            f"expected one {role} column, but {several}; name it with DataArguments({role}_column=...), in "
            f"the shell --{role}-column{remedy}"
        )
    return found[0]


def _pixel_hash(data: ImageData, most: int = 64) -> str:
    """Of images evenly spaced over the data."""
    chosen = torch.linspace(0, len(data) - 1, min(len(data), most)).long()
    return hashlib.sha256(data.get(chosen).cpu().contiguous().numpy().data).hexdigest()[:16]


def _undecoded(split: Any, *columns: str) -> Any:
    """Some columns, with pictures as bytes: ours is the decoder, so that an error can name its row."""
    split = split.with_format(None).select_columns(list(columns))
    for column in columns:
        if isinstance((split.features or {}).get(column), Image):
            split = split.cast_column(column, Image(decode=False))
    return split


@dataclass
class Decoder:
    """Pictures of a split, by row, as uint8 tensors."""

    source: Dataset
    column: str
    policy: ImagePolicy
    role: str

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """[B] -> [B, C, H, W].

        Raises:
            DataError: If a picture can't be decoded; the message names its row.
        """
        batch = self.source[rows.start : rows.stop] if isinstance(rows, range) else self.source[rows]
        images = []
        for row, picture in zip(rows, batch[self.column], strict=True):
            try:
                images.append(self.policy(picture))
            except ValueError as error:
                raise DataError(f"row {row} of the {self.role} split: {error} Remove or repair it.") from error
        return torch.stack(images)
