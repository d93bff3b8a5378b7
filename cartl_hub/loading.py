"""From any ``datasets`` data set to the images and labels that training, model choice and report draw from."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from torch import Tensor
from tqdm.auto import tqdm

from .data import DataError, ImageData, StreamingData
from .images import ImagePolicy, policy_to_dict, to_pil
from .randomness import image_keys, uniform

logger = logging.getLogger(__name__)

IN_MEMORY_BYTES = 4 << 30  # larger splits are decoded when they are drawn
_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}
_IMAGE_FEATURES = tuple(getattr(datasets, name) for name in ("Image", "Array2D", "Array3D") if hasattr(datasets, name))

AnyData = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict | Mapping[str, Any]


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
        image_column: Found by itself where there is one image column.
        label_column: Found by itself where there is one label column.
        config: Configuration of a data set on the Hub.
        revision: Commit, branch or tag of a data set on the Hub.
        label_names: For integer labels without names.
        validation_share: Of the training images, split off where there is no validation split.
        test_share: Of the training images, split off where there is no test split.
        streaming: Read a data set on the Hub or in a folder as a stream.
        shuffle_buffer: Examples from which a stream draws at random.
        seed: Of the splits.
    """

    image_column: str | None = None
    label_column: str | None = None
    config: str | None = None
    revision: str | None = None
    label_names: tuple[str, ...] | None = None
    validation_share: float = 0.1
    test_share: float = 0.2
    streaming: bool = False
    shuffle_buffer: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be a share in (0, 1), got {getattr(self, name)}.")


def load_splits(
    data: AnyData, policy: ImagePolicy, arguments: DataArguments | None = None, *, label_names: Sequence[str] | None = None
) -> Splits:
    """Read, check and split a data set; everything that can be wrong with it is an error here.

    Args:
        data: A ``datasets`` object, a Hub id, a folder of images (one folder per class, or ``train/`` and ``test/`` of them), or
            a parquet file or folder of them.
        policy: How pictures become inputs.
        arguments: How to read it.
        label_names: Classes that a model already has: the labels must be these.

    Raises:
        DataError: On columns, labels or pictures that can't be used; the message names the row and the remedy.
    """
    arguments = arguments or DataArguments()
    splits, origin = open_splits(data, arguments)
    return _Reader(splits, origin, policy, arguments, label_names).read()


def open_splits(data: AnyData, arguments: DataArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """The splits by name, and where they come from."""
    if isinstance(data, (Dataset, IterableDataset)):
        name = str(data.split) if data.split is not None else "train"
        return {name: data}, _origin(data)
    if isinstance(data, Mapping):
        if not data:
            raise DataError("expected at least one split, got an empty mapping.")
        return dict(data), _origin(next(iter(data.values())))
    if not isinstance(data, (str, Path)):
        raise DataError(
            f"expected a datasets.Dataset, a DatasetDict, a Hub id or a folder, got {type(data).__name__}; "
            "datasets.Dataset.from_dict makes one from arrays."
        )
    path = Path(data)
    try:
        if path.exists():
            loaded = datasets.load_dataset(*_builder(path)[:1], **_builder(path)[1], streaming=arguments.streaming)
            return dict(loaded), {"id": path.resolve().name, "path": str(data)}
        if str(data).startswith((".", "/", "~")) or str(data).count("/") > 1:
            raise DataError(f"expected a folder, a parquet file or a Hub id, got {str(data)!r}, which does not exist.")
        loaded = datasets.load_dataset(str(data), arguments.config, revision=arguments.revision, streaming=arguments.streaming)
        return dict(loaded), {"id": str(data), "config": arguments.config, "revision": arguments.revision or _revision(str(data))}
    except (DataError, KeyboardInterrupt):
        raise
    except Exception as error:  # the loaders of datasets raise many kinds
        raise DataError(f"the data set {str(data)!r} can't be read: {type(error).__name__}: {error}") from error


def _builder(path: Path) -> tuple[str, dict[str, Any]]:
    """Which loader of ``datasets`` reads a local path, and its arguments."""
    if path.is_file():
        kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
        if path.suffix not in kinds:
            raise DataError(f"expected a folder of images or a parquet file, got {path}.")
        return kinds[path.suffix], {"data_files": str(path)}
    files = sorted(path.rglob("*.parquet"))
    if not files:
        return "imagefolder", {"data_dir": str(path)}
    found: dict[str, list[str]] = {}
    for file in files:
        words = file.relative_to(path).with_suffix("").as_posix().replace("/", "-").replace("_", "-").split("-")
        name = next((split for split, names in _NAMES.items() for word in words if word in names), "train")
        found.setdefault(name, []).append(str(file))
    return "parquet", {"data_files": found}


def _revision(hub_id: str) -> str | None:
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(hub_id).sha
    except Exception:  # offline, from the cache: the revision isn't known
        return None


def _origin(split: Any) -> dict[str, Any]:
    info = getattr(split, "info", None)
    return {"id": (getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "in memory")}


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (kept, held out), each class in proportion.

    Args:
        labels: [N].
        share: To hold out, in (0, 1); at least one image of each class that has two.
        seed: Which images.
    """
    draws = uniform(image_keys(seed, 0, torch.arange(len(labels))), stream=100)
    held = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held.append(members[draws[members].argsort()[:count]])
    chosen = torch.cat(held).sort().values
    mask = torch.ones(len(labels), dtype=torch.bool)
    mask[chosen] = False
    return torch.nonzero(mask).flatten(), chosen


def index_hash(indices: Tensor) -> str:
    """Short hash of which images a split holds."""
    return hashlib.sha256(indices.sort().values.numpy().astype("<i8").tobytes()).hexdigest()[:16]


@dataclass
class _Reader:
    """Reads the splits of one data set."""

    splits: dict[str, Any]
    origin: dict[str, Any]
    policy: ImagePolicy
    arguments: DataArguments
    known_names: Sequence[str] | None
    notes: list[str] = field(default_factory=list)

    def read(self) -> Splits:
        roles = self._roles()
        columns = self._columns(roles["train"])
        self._large_pictures(roles["train"], columns[0])
        if any(isinstance(split, IterableDataset) for split in roles.values()):
            return self._stream(roles, columns)
        names, mapping = self._label_names(roles, columns[1])
        parts: dict[str, ImageData] = {}
        for role, split in roles.items():
            labels = self._labels(split, columns[1], names, mapping, role)
            if role == "test" and labels is None:
                self._note("the test split has no labels (all are -1): it is not used")
                continue
            assert labels is not None
            parts[role] = self._images(split, columns[0], labels, names, role)
        train = parts["train"]
        kept = torch.arange(len(train))
        if "test" not in parts:
            kept, held = stratified_split(train.labels, self.arguments.test_share, self.arguments.seed)
            if not len(held):
                raise DataError("expected at least two images of some class to split off a test part, got one of each.")
            parts["test"] = train.subset(held, split="test (split off)", index_hash=index_hash(held), split_seed=self.arguments.seed)
            self._note(
                f"no test split: {self.arguments.test_share:.0%} of the training images ({len(held)}, stratified, seed "
                f"{self.arguments.seed}, index hash {index_hash(held)}) are kept for the report and not trained on"
            )
        if "validation" not in parts:
            inner, held = stratified_split(train.labels[kept], self.arguments.validation_share, self.arguments.seed + 1)
            parts["validation"] = train.subset(kept[held], split="validation (split off)", index_hash=index_hash(kept[held]))
            kept = kept[inner]
            self._note(
                f"no validation split: {self.arguments.validation_share:.0%} of the training images ({len(held)}, stratified, "
                f"index hash {parts['validation'].description['index_hash']}) choose the best checkpoint"
            )
        if len(kept) < len(train):
            train = train.subset(kept, index_hash=index_hash(kept))
        missing = [names[label] for label in range(len(names)) if not (train.labels == label).any()]
        if missing:
            self._note(f"no training image of {len(missing)} of {len(names)} classes: {', '.join(missing[:5])}")
        train.description["fingerprint"] = _fingerprint(train)
        return Splits(train, parts["validation"], parts["test"], tuple(self.notes))

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning(text)

    # Splits and columns

    def _roles(self) -> dict[str, Any]:
        """Which split is which; the rest is ignored aloud."""
        roles: dict[str, Any] = {}
        for role, names in _NAMES.items():
            for name in names:
                if name in self.splits:
                    roles[role] = self.splits[name]
                    break
        if "train" not in roles:
            left = [name for name in self.splits if not any(self.splits[name] is split for split in roles.values())]
            if len(self.splits) == 1:
                roles = {"train": next(iter(self.splits.values()))}
            elif len(left) == 1:
                roles["train"] = self.splits[left[0]]
            else:
                raise DataError(f"expected a split named 'train', got {sorted(self.splits)}; pass a mapping with 'train' and 'test'.")
        ignored = [name for name, split in self.splits.items() if not any(split is used for used in roles.values())]
        if ignored:
            self._note(f"splits that are not used: {', '.join(ignored)}")
        for role, split in roles.items():
            if isinstance(split, Dataset) and not len(split):
                raise DataError(f"expected images in the {role} split, got none.")
        return roles

    def _columns(self, split: Any) -> tuple[str, str]:
        features = split.features
        if features is None:  # a stream whose columns were changed
            features = dict.fromkeys(next(iter(split)))
        return (
            self._column(features, "image", self.arguments.image_column, _IMAGE_FEATURES, ("image", "img", "pixels", "picture")),
            self._column(features, "label", self.arguments.label_column, (ClassLabel,), ("label", "labels", "class", "target", "y")),
        )

    def _column(
        self, features: Mapping[str, Any], role: str, named: str | None, kinds: tuple[type, ...], usual: tuple[str, ...]
    ) -> str:
        if named is not None:
            if named not in features:
                raise DataError(f"expected a column {named!r} for the {role}s, got the columns {', '.join(features)}.")
            return named
        found = [name for name, feature in features.items() if isinstance(feature, kinds)]
        if len(found) != 1:
            found = [name for name in usual if name in (found or features)] or found
            if role == "label" and len(found) > 1 and sum(isinstance(features[name], ClassLabel) for name in found) > 1:
                found = [name for name in features if isinstance(features[name], ClassLabel)]
            else:
                found = found[:1] if found and found[0] in usual else found
        if len(found) != 1:
            several = f"several could be it: {', '.join(found)}" if found else f"the columns are {', '.join(features)}"
            raise DataError(f"expected one {role} column, but {several}; name it with {role}_column=...")
        return found[0]

    def _large_pictures(self, split: Any, column: str) -> None:
        """Say so when most pixels are thrown away."""
        if isinstance(split, IterableDataset):
            return
        sizes = []
        for row in range(0, len(split), max(1, len(split) // 32)):
            try:
                sizes.append(min(to_pil(_undecoded(split, column)[row][column]).size))
            except ValueError:
                continue
        height = self.policy.size[0]
        if sizes and float(np.median(sizes)) > 3 * height:
            self._note(
                f"pictures are about {int(np.median(sizes))} pixels wide and the source takes {height}: most detail is lost, and an "
                "attack acts after resizing. A source for larger inputs keeps it, e.g. 'resnet50' of timm (224 pixels)"
            )

    # Labels

    def _label_names(self, roles: Mapping[str, Any], column: str) -> tuple[tuple[str, ...], dict[Any, int] | None]:
        """Names of the classes, and the class of each raw label where it isn't the class itself."""
        feature = roles["train"].features[column]
        given = self.arguments.label_names or self.known_names
        if isinstance(feature, ClassLabel):
            return tuple(feature.names), None
        values = [value for split in roles.values() for value in _column_values(split, column)]
        strings = sum(isinstance(value, str) for value in values)
        if strings:
            names = tuple(given) if given else tuple(sorted({value for value in values if isinstance(value, str)}))
            return names, {name: index for index, name in enumerate(names)}
        integers = sorted({int(value) for value in values if isinstance(value, (int, np.integer)) and not isinstance(value, float)})
        if not integers:
            kind = type(values[0]).__name__
            raise DataError(f"expected labels that are classes (ClassLabel, integers or strings) in {column!r}, got {kind}.")
        if given:
            return tuple(given), None
        if integers[0] == 0 and integers[-1] == len(integers) - 1:
            return tuple(map(str, integers)), None
        if integers[0] == -1:
            integers = integers[1:]
        if len(integers) > max(1000, len(values) // 2):
            raise DataError(f"expected class labels in {column!r}, got {len(integers)} different integers; is it the right column?")
        self._note(f"labels are not 0 to K-1 ({integers[:5]}...): classes are numbered in their order")
        return tuple(map(str, integers)), {value: index for index, value in enumerate(integers)}

    def _labels(
        self, split: Dataset, column: str, names: Sequence[str], mapping: dict[Any, int] | None, role: str
    ) -> Tensor | None:
        feature = split.features.get(column)
        if feature is None:
            raise DataError(f"expected the column {column!r} in the {role} split too, got {', '.join(split.features)}.")
        values = _column_values(split, column)
        if isinstance(feature, ClassLabel) and tuple(feature.names) != tuple(names):
            if set(feature.names) != set(names):
                raise DataError(f"expected the classes of the training split in the {role} split, got {list(feature.names)[:10]}.")
            mapping = {index: list(names).index(name) for index, name in enumerate(feature.names)}
        if role == "test" and all(value in (-1, None) for value in values):
            return None
        labels = torch.empty(len(values), dtype=torch.int64)
        for row, value in enumerate(values):
            label = mapping.get(value) if mapping is not None else value
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < len(names):
                expected = f"one of {', '.join(map(str, list(mapping)[:10]))}" if mapping else f"a class from 0 to {len(names) - 1}"
                raise DataError(f"row {row} of the {role} split: expected {expected} in {column!r}, got {value!r}.")
            labels[row] = int(label)
        return labels

    # Images

    def _images(self, split: Dataset, column: str, labels: Tensor, names: Sequence[str], role: str) -> ImageData:
        source = _undecoded(split, column)
        decode = Decoder(source, column, self.policy, role)
        height, width = self.policy.size
        images: Any = decode
        if len(split) * height * width * self.policy.num_channels <= IN_MEMORY_BYTES:
            images = torch.empty((len(split), self.policy.num_channels, height, width), dtype=torch.uint8)
            parts = range(0, len(split), 512)
            for start in tqdm(parts, desc=f"reading {role} images", disable=len(parts) < 40, leave=False, unit_scale=512):
                rows = range(start, min(start + 512, len(split)))
                images[start : rows.stop] = decode(rows)
        description = self.origin | {"split": role, "num_images": len(split), "image_policy": policy_to_dict(self.policy)}
        return ImageData(labels, tuple(names), images, self.policy, description, workers=0 if isinstance(images, Tensor) else 2)

    # Streams

    def _stream(self, roles: Mapping[str, Any], columns: tuple[str, str]) -> Splits:
        image, label = columns
        feature = (roles["train"].features or {}).get(label)
        given = feature.names if isinstance(feature, ClassLabel) else (self.arguments.label_names or self.known_names)
        if not given:
            raise DataError(f"expected class names for the stream's labels in {label!r}: it has no ClassLabel; pass label_names=...")

        def stream(split: Any, role: str, part: tuple[float, float]) -> StreamingData:
            return StreamingData(
                split,
                tuple(given),
                self.policy,
                image,
                label,
                part=part,
                split_seed=self.arguments.seed,
                shuffle_buffer=self.arguments.shuffle_buffer,
                description=self.origin | {"split": role, "image_policy": policy_to_dict(self.policy)},
            )

        share = self.arguments.test_share if "test" not in roles else 0.0
        test = stream(roles.get("test", roles["train"]), "test" if "test" in roles else "test (split off)", (0.0, share or 1.0))
        if share:
            self._note(f"no test split: {share:.0%} of the stream, chosen by position, are kept for the report")
        if "validation" in roles:
            held = stream(roles["validation"], "validation", (0.0, 1.0))
            begin = share
        else:
            begin = share + (1 - share) * self.arguments.validation_share
            held = stream(roles["train"], "validation (split off)", (share, begin))
            self._note(f"no validation split: {begin - share:.0%} of the stream, chosen by position, choose the best checkpoint")
        return Splits(stream(roles["train"], "train", (begin, 1.0)), held.held(512), test, tuple(self.notes))


def _column_values(split: Dataset, column: str) -> list[Any]:
    """One column, without decoding the others."""
    return list(split.select_columns(column)[:][column])


def _undecoded(split: Any, column: str) -> Any:
    """The split with pictures as bytes: ours is the decoder, so that an error can name its row."""
    feature = split.features[column]
    return split.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else split


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
        contiguous = isinstance(rows, range) and rows.step == 1
        batch = self.source[rows.start : rows.stop] if contiguous else self.source[list(rows)]
        images = []
        for row, picture in zip(rows, batch[self.column], strict=True):
            try:
                images.append(self.policy(picture))
            except ValueError as error:
                raise DataError(f"row {row} of the {self.role} split: {error} Remove or repair it.") from error
        return torch.stack(images)


def _fingerprint(data: ImageData) -> str:
    """Hash of labels and, where they are in memory, pixels."""
    digest = hashlib.sha256(data.labels.numpy().tobytes())
    if isinstance(data.images, Tensor):
        digest.update(data.images.numpy().tobytes())
    return digest.hexdigest()[:16]
