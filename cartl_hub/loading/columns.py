"""Finds the columns that hold pictures and labels."""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Array2D, Array3D, ClassLabel, Dataset, Image, IterableDataset

from ..data import DataError
from .arguments import ROLES, DataArguments, Notes

_IMAGE_COLUMNS = ("image", "img", "images", "pixels", "picture")
_LABEL_COLUMNS = ("label", "labels", "class", "target", "y")
_LABELS = re.compile(r"u?int\d+|bool|(large_)?string(_view)?|null")  # kinds of column that can hold classes


def find_columns(roles: Mapping[str, Any], arguments: DataArguments, notes: Notes) -> tuple[str, str]:
    """Names of the image and the label column.

    Raises:
        DataError: If they can't be found, or hold something else.
    """
    features = features_of(roles["train"])
    image = _column(features, "image", arguments.image_column, (Image, Array2D, Array3D), _IMAGE_COLUMNS)
    label = _column(features, "label", arguments.label_column, (ClassLabel,), _LABEL_COLUMNS)
    for role, split in roles.items():
        features = features_of(split)
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
            notes.add(f"the transform of the {role} split (set_transform) is not used; see Augmentation")
    return image, label


def labelled_splits(splits: Mapping[str, Any], arguments: DataArguments, notes: Notes) -> dict[str, Any]:
    """Splits without a test split that has no labels, as benchmarks publish it whose test labels are secret."""
    quiet = Notes.silent()
    kept = dict(splits)
    readable = [name for name, split in splits.items() if isinstance(split, (Dataset, IterableDataset))]
    for name in [name for name in ROLES["test"] if name in readable and len(splits) > 1]:
        try:
            _, label = find_columns({"train": splits[name]}, arguments, quiet)
        except DataError:  # reading reports it, where it matters
            continue
        labels, stream = undecoded(splits[name], label), not isinstance(splits[name], Dataset)
        found = [row[label] for row in islice(labels, 1)] if stream else labels[:][label]
        if found and all(value in (-1, None) for value in found):
            seen = "the first is" if stream else "all are"
            notes.add(f"the {name} split has no labels ({seen} -1 or missing): it is not used")
            del kept[name]
    return kept


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


def features_of(split: Any) -> Mapping[str, Any]:
    """Columns and their kinds; None for those of a stream that was mapped."""
    if split.features is not None:
        return split.features
    example = next(iter(split), None)
    if example is None:
        raise DataError("expected images in the stream, got none.")
    return dict.fromkeys(example)


def undecoded(split: Any, *columns: str) -> Any:
    """Some columns, with pictures as bytes: decoding is done here, so that an error can name its row."""
    split = split.with_format(None).select_columns(list(columns))
    for column in columns:
        if isinstance((split.features or {}).get(column), Image):
            split = split.cast_column(column, Image(decode=False))
    return split
