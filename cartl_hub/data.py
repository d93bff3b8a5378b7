"""Images and labels that training and evaluation draw from."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .images import ImagePolicy
from .randomness import CROP, FLIP, image_keys, permutation, uniform
from .ranges import check_bool, check_whole


class DataError(ValueError):
    """Data that can't be used; the message names the row and the remedy."""


class UnknownClassError(DataError):
    """A label that is none of the known classes."""


class Drawn(NamedTuple):
    """One batch as stored in the data: uint8 images [B, C, H, W], labels [B], indices [B], number of the epoch."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop from a padded image and horizontal flip, for a whole batch at once on its device.

    Args:
        padding: Number of black pixels added on each side before the crop, >= 0.
        flip: Whether half of the images are mirrored. Wrong for digits and text.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_whole("padding", self.padding, (">=", 0))
        check_bool("flip", self.flip)

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Augmented images, [B, C, H, W], [B] -> [B, C, H, W], of the same dtype."""
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device).expand(len(images), -1)
        columns = torch.arange(width, device=images.device).expand(len(images), -1)
        if self.flip:
            flipped = uniform(keys, stream=FLIP) < 0.5
            columns = torch.where(flipped[:, None], columns.flip(1), columns)
        if self.padding:
            offsets = (uniform(keys, (2,), stream=CROP) * (2 * self.padding + 1)).long()
            images = torch.nn.functional.pad(images, [self.padding] * 4)
            rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Data(Protocol):
    """Interface that the training loop and the evaluation need from a data set."""

    label_names: tuple[str, ...]
    description: dict[str, Any]

    def steps_per_epoch(self, batch_size: int) -> int | None: ...

    def training_batches(
        self, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[Drawn]: ...

    def batches(self, batch_size: int) -> Iterator[Drawn]: ...


@dataclass(eq=False)
class ImageData:
    """A data set of known size: in memory, or decoded when it is drawn.

    Args:
        labels: Class of each image, int64 [N].
        label_names: Name of each class.
        images: All images, uint8, [N, C, H, W]; or a function from a list of indices to them.
        policy: Policy that turned pictures into these images.
        description: Id, revision, split and anything else that a report should say about the data; JSON.
        workers: Number of processes that decode, if ``images`` is a function.

    Raises:
        DataError: If images or labels have another type, shape, number or range.
    """

    labels: Tensor
    label_names: tuple[str, ...]
    images: Tensor | Callable[[Sequence[int]], Tensor]
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    description: dict[str, Any] = field(default_factory=dict)
    workers: int = 0

    def __post_init__(self) -> None:
        labels, number = self.labels, len(self.label_names)
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DataError(f"expected int64 labels [N], got {labels.dtype} {list(labels.shape)}; convert with labels.long().")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < number:
            raise DataError(
                f"expected labels from 0 to {number - 1}, as there are {number} label names, got labels from "
                f"{int(labels.min())} to {int(labels.max())}; number the classes from 0 and name each."
            )
        if not isinstance(self.images, Tensor):
            return
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"expected uint8 images [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}; for floats in [0, 1] "
                "pass (255 * images).round().to(torch.uint8)."
            )
        if len(self.images) != len(labels):
            raise DataError(f"expected a label for each of the {len(self.images)} images, got {len(labels)} labels.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    def to(self, device: torch.device) -> "ImageData":
        """The same data with its images on ``device``, if they are in memory."""
        if isinstance(self.images, Tensor) and self.images.device != device:
            return ImageData(self.labels, self.label_names, self.images.to(device), self.policy, self.description)
        return self

    def subset(self, indices: Sequence[int] | Tensor, **description: Any) -> "ImageData":
        """Some of the images, in the given order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        source: Any = self.images
        images = source[chosen.to(source.device)] if isinstance(source, Tensor) else _Chosen(source, chosen)
        kept = {key: value for key, value in self.description.items() if key != "fingerprint"}
        described = kept | {"num_images": len(chosen)} | description
        return ImageData(self.labels[chosen], self.label_names, images, self.policy, described, self.workers)

    def fingerprint(self) -> str:
        """Hash of the labels and, if the images are in memory, of the pixels."""
        digest = hashlib.sha256(self.labels.contiguous().numpy().data)
        if isinstance(self.images, Tensor):
            digest.update(self.images.cpu().contiguous().numpy().data)  # not tobytes: a copy would be as large as the data
        return digest.hexdigest()[:16]

    def get(self, indices: Tensor) -> Tensor:
        """Images at ``indices``, uint8."""
        if isinstance(self.images, Tensor):
            return self.images[indices.to(self.images.device)]
        return self.images(indices.tolist())

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of steps; an incomplete batch at the end of an epoch is left out, and the next epoch has another order."""
        return max(1, len(self) // batch_size)

    def training_batches(
        self, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[Drawn]:
        """Batches of the steps ``start`` to ``stop`` of a run, regardless of what was drawn before.

        Each process gets every ``world``-th image of the batch.
        """
        per_epoch = self.steps_per_epoch(batch_size)
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            order = permutation(seed, epoch, len(self)).split(batch_size)
            first = epoch * per_epoch
            parts = [
                part[: len(part) - len(part) % world][rank::world]
                for part in order[max(start - first, 0) : min(stop - first, per_epoch)]
            ]
            for indices, images in zip(parts, self._fetch(parts), strict=True):
                yield Drawn(images, self.labels[indices], indices, epoch)

    def batches(self, batch_size: int) -> Iterator[Drawn]:
        """All images in order."""
        parts = torch.arange(len(self)).split(batch_size)
        for indices, images in zip(parts, self._fetch(parts), strict=True):
            yield Drawn(images, self.labels[indices], indices, 0)

    def _fetch(self, plans: Sequence[Tensor]) -> Iterator[Tensor]:
        if isinstance(self.images, Tensor) or not self.workers:
            yield from map(self.get, plans)
            return
        # a generator of its own: the global one must not depend on where images come from
        options: Any = {"generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
        loader = torch.utils.data.DataLoader(_Planned(self.images, plans), batch_size=None, num_workers=self.workers, **options)
        for drawn in loader:
            if isinstance(drawn, DataError):
                raise drawn
            yield drawn


class _Chosen:
    """Images of a subset."""

    def __init__(self, images: Callable[[Sequence[int]], Tensor], chosen: Tensor):
        self.images, self.chosen = images, chosen

    def __call__(self, indices: Sequence[int]) -> Tensor:
        return self.images(self.chosen[list(indices)].tolist())


class _Planned(torch.utils.data.Dataset):
    """One item per planned batch, for the worker processes of a ``DataLoader``."""

    def __init__(self, images: Callable[[Sequence[int]], Tensor], plans: Sequence[Tensor]):
        self.images, self.plans = images, plans

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Tensor | DataError:
        try:
            return self.images(self.plans[index].tolist())
        except DataError as error:  # given back, as a raised one would arrive with the worker's traceback for its message
            return error


def as_stored(picture: Any) -> Any:
    """A picture as it is: the confinement of pictures that the user put into rows."""
    return picture


_PART = 101  # stream of random numbers that divides a stream of examples
_PIECES = 64  # of a stream, at most


@dataclass(eq=False)
class StreamingData:
    """A data set that is read from front to back and never held in memory (``datasets.IterableDataset``).

    The stream must give the same examples in the same order each time it is read.

    Args:
        stream: The data set.
        label_names: Name of each class.
        policy: Policy that turns pictures into inputs.
        image_column: Name of the column with the pictures.
        label_column: Name of the column with the labels.
        classes: Class of each raw label; by default a label is the class or its name.
        part: Share of the stream that is used, as (from, to) in [0, 1]; examples are chosen by their position.
        split_seed: Seed of that choice.
        shuffle_buffer: Number of examples from which the next one is drawn in training.
        confinement: Function through which a picture goes as it is stored, and which refuses one that lies elsewhere.
        description: Id, split and so on, for reports.
    """

    stream: Any
    label_names: tuple[str, ...]
    policy: ImagePolicy
    image_column: str
    label_column: str
    classes: Mapping[Any, int] | None = None
    part: tuple[float, float] = (0.0, 1.0)
    split_seed: int = 0
    shuffle_buffer: int = 1000
    confinement: Callable[[Any], Any] = as_stored
    description: dict[str, Any] = field(default_factory=dict)

    def steps_per_epoch(self, batch_size: int) -> None:
        """Number of steps, which is unknown."""
        return None

    def training_batches(
        self, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[Drawn]:
        """Batches, as for :class:`ImageData`; a resumed run reads through the stream once to count its batches."""
        step, epoch = 0, 0
        while step < stop:
            shuffled, per_epoch = self._shuffled(seed, epoch), 0
            while examples := list(islice(shuffled, batch_size)):
                if len(examples) < batch_size and (per_epoch or len(examples) < world):
                    break
                if step >= start:
                    yield self._draw(examples[: len(examples) - len(examples) % world][rank::world], epoch)
                step, per_epoch = step + 1, per_epoch + 1
                if step == stop:
                    return
            if not per_epoch:
                raise DataError(f"expected images in the {self._name} stream, at least one per process, got none.")
            passed = max(start - step, 0) // per_epoch
            step, epoch = step + passed * per_epoch, epoch + passed + 1

    def batches(self, batch_size: int) -> Iterator[Drawn]:
        """All images in order."""
        examples = (example for piece in range(self._num_pieces) for example in self._examples(piece))
        while part := list(islice(examples, batch_size)):
            yield self._draw(part, 0)

    def held(self, num_images: int) -> ImageData:
        """Some images of the part, in memory: the first ones of each piece of the stream, as a stream may be sorted by class."""
        each = -(-num_images // self._num_pieces)
        examples: list[tuple[Any, Any, int, int]] = []
        for piece in range(self._num_pieces):
            examples += islice(self._examples(piece), min(each, num_images - len(examples)))
        if not examples:
            raise DataError(f"expected images in the {self._name} stream, got none.")
        drawn = self._draw(examples, 0)
        return ImageData(
            drawn.labels, self.label_names, drawn.images, self.policy, self.description | {"num_images": len(examples)}
        )

    @property
    def _name(self) -> str:
        return str(self.description.get("split", "data"))

    @property
    def _num_pieces(self) -> int:
        return max(1, min(self.stream.num_shards, _PIECES))

    def _examples(self, piece: int) -> Iterator[tuple[Any, Any, int, int]]:
        """Picture, label, piece and row of the examples of the part in one piece of the stream, undecoded."""
        low, high = self.part
        pieces = self._num_pieces
        stream = self.stream if pieces == 1 else self.stream.shard(pieces, piece)
        blocks = (image_keys(self.split_seed, piece, torch.arange(start, start + 1024)) for start in count(step=1024))
        draws = (draw for keys in blocks for draw in uniform(keys, stream=_PART).tolist())
        for row, (example, draw) in enumerate(zip(stream, draws, strict=False)):
            if low <= draw < high:
                yield example[self.image_column], example[self.label_column], piece, row

    def _shuffled(self, seed: int, epoch: int) -> Iterator[tuple[Any, Any, int, int]]:
        """Pieces in random order, each next example drawn from a buffer.

        ``IterableDataset.shuffle`` would renumber the examples in each epoch, and so move them between the parts.
        """
        generator = random.Random(f"{seed} {epoch}")
        buffer: list[tuple[Any, Any, int, int]] = []
        for piece in permutation(seed, epoch, self._num_pieces).tolist():
            for example in self._examples(piece):
                if len(buffer) < self.shuffle_buffer:
                    buffer.append(example)
                    continue
                position = generator.randrange(len(buffer))
                yield buffer[position]
                buffer[position] = example
        generator.shuffle(buffer)
        yield from buffer

    def _draw(self, examples: Sequence[tuple[Any, Any, int, int]], epoch: int) -> Drawn:
        images, labels, indices = [], [], []
        classes = self.classes
        if classes is None:
            classes = dict(enumerate(range(len(self.label_names)))) | {name: i for i, name in enumerate(self.label_names)}
        for picture, label, piece, row in examples:
            where = f"row {row} of the {self._name} stream" + (
                f".shard({self._num_pieces}, {piece})" if self._num_pieces > 1 else ""
            )
            if label not in classes:
                raise DataError(f"{where}: expected one of {listed(classes)} in {self.label_column!r}, got {label!r}.")
            try:
                images.append(self.policy(self.confinement(picture)))
            except ValueError as error:
                raise DataError(f"{where}: {error} Remove or repair it.") from error
            labels.append(classes[label])
            indices.append((piece << 40) + row)
        return Drawn(torch.stack(images), torch.tensor(labels), torch.tensor(indices), epoch)


def listed(values: Iterable[Any], most: int = 10) -> str:
    """The first few values, for a message."""
    first = [repr(value) for value in islice(values, most + 1)]
    return ", ".join(first[:most]) + (", ..." if len(first) > most else "")
