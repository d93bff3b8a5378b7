"""How to read a data set, and what is read."""

import logging
from dataclasses import dataclass

from ..data import ImageData, StreamingData
from ..ranges import check_bool, check_number, check_whole

logger = logging.getLogger(__name__)


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
        id: Name of the data in names of models, reports and cards; known for a folder or a data set of the Hub.
        image_column: Detected automatically where there is one image column.
        label_column: Detected automatically where there is one label column.
        config: Configuration of a data set on the Hub.
        revision: Commit, branch or tag of a data set on the Hub.
        label_names: Names of the classes, for integer labels without names.
        validation_share: Share of the training images, split off where there is no validation split.
        test_share: Share of the training images, split off where there is no test split.
        train_images: Train on this number of the images that are left for it, at least one of each class; all by default.
            Of one seed, fewer lie among more. Validation and test keep their images.
        train_share: The same as a share, in (0, 1].
        streaming: Read a data set on the Hub or in a folder as a stream.
        shuffle_buffer: Examples from which a stream draws at random.
        seed: Seed of the choice of validation images and of ``train_images``.
        test_seed: Seed of the choice of test images where there is no test split: another ``seed`` leaves them as they are, so
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
    """What was decided for the user; also said in the log, but where it is only tried out."""

    quiet = False

    def add(self, text: str, level: int = logging.WARNING) -> None:
        self.append(text)
        if not self.quiet:
            logger.log(level, text)
