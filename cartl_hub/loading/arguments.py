"""Arguments for reading a data set, and the splits that are read."""

import logging
from dataclasses import dataclass

from ..data import ImageData, StreamingData
from ..ranges import check_bool, check_number, check_whole

logger = logging.getLogger(__name__)

ROLES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Splits:
    """Splits of a data set by their use.

    Args:
        train: Images to train on.
        validation: Images to choose the best weights on.
        test: Images to report on.
        notes: Decisions made for the user: splits made, splits ignored, labels mapped.
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
    """Arguments for reading a data set.

    Args:
        id: Name of the data in names of models, reports and cards; known for a folder or a data set on the Hub.
        image_column: Name of the image column; detected automatically if there is only one.
        label_column: Name of the label column; detected automatically if there is only one.
        config: Configuration of a data set on the Hub.
        revision: Commit, branch or tag of a data set on the Hub.
        label_names: Names of the classes, for integer labels without names.
        validation_share: Share of the training images to split off if there is no validation split.
        test_share: Share of the training images to split off if there is no test split.
        train_images: Number of the remaining images to train on, at least one of each class; all by default. With one seed,
            smaller samples lie inside larger ones. Validation and test keep their images.
        train_share: Share of the remaining images to train on, in (0, 1], instead of ``train_images``.
        streaming: Read a data set on the Hub or in a folder as a stream.
        shuffle_buffer: Number of examples from which a stream draws at random.
        seed: Seed for the choice of validation images and of ``train_images``.
        test_seed: Seed for the choice of test images if there is no test split: changing ``seed`` leaves them as they are, so
            that runs with several seeds are measured on the same images. It divides such a stream into all its parts.

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


class Notes(list[str]):
    """Decisions made for the user; also logged, except when only trying something out."""

    quiet = False

    @classmethod
    def silent(cls) -> "Notes":
        notes = cls()
        notes.quiet = True
        return notes

    def add(self, text: str, level: int = logging.WARNING) -> None:
        self.append(text)
        if not self.quiet:
            logger.log(level, text)
