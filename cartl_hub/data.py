"""Images and labels that training and evaluation draw from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .images import ImagePolicy
from .randomness import CROP, FLIP, image_keys, permutation, uniform


class DataError(ValueError):
    """Data that can't be used; the message names the row and the remedy."""


class Drawn(NamedTuple):
    """One batch as it lies in the data: uint8 images [B, C, H, W], labels [B], indices [B], number of the epoch."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop from a padded image and horizontal flip, for a whole batch at once on its device.

    Args:
        padding: Black pixels added on each side before the crop.
        flip: Whether half of the images are mirrored. Wrong for digits and text.
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """[B, C, H, W], [B] -> [B, C, H, W], of the same dtype."""
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
    """What the training loop and the evaluation need of a data set."""

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
        labels: [N], int64.
        label_names: Name of each class.
        images: All images, uint8, [N, C, H, W]; or a function from a list of indices to them.
        policy: How pictures became these images.
        description: Id, revision, split and whatever else a report should say of the data; JSON.
        workers: Processes that decode, where ``images`` is a function.
    """

    labels: Tensor
    label_names: tuple[str, ...]
    images: Tensor | Callable[[Sequence[int]], Tensor]
    policy: ImagePolicy = field(default_factory=ImagePolicy)
    description: dict[str, Any] = field(default_factory=dict)
    workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    def to(self, device: torch.device) -> "ImageData":
        """The same data with its images on ``device``, where they are in memory."""
        if isinstance(self.images, Tensor) and self.images.device != device:
            return ImageData(self.labels, self.label_names, self.images.to(device), self.policy, self.description)
        return self

    def subset(self, indices: Sequence[int] | Tensor, **description: Any) -> "ImageData":
        """Some of the images, in the given order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images: Any = self.images
        if isinstance(images, Tensor):
            images = images[chosen.to(images.device)]
        else:
            images = _Chosen(images, chosen)
        return ImageData(
            self.labels[chosen], self.label_names, images, self.policy, self.description | description, self.workers
        )

    def get(self, indices: Tensor) -> Tensor:
        """Images at ``indices``, uint8."""
        if isinstance(self.images, Tensor):
            return self.images[indices.to(self.images.device)]
        return self.images(indices.tolist())

    def steps_per_epoch(self, batch_size: int) -> int:
        """An incomplete batch at the end of an epoch is left out; the next epoch has another order."""
        return max(1, len(self) // batch_size)

    def training_batches(
        self, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[Drawn]:
        """Batches of the steps ``start`` to ``stop`` of a run, whatever was drawn before.

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
        loader = torch.utils.data.DataLoader(
            _Batched(self.images, plans), batch_size=None, num_workers=self.workers, generator=torch.Generator(), prefetch_factor=4
        )
        yield from loader


class _Chosen:
    """Images of a subset."""

    def __init__(self, images: Callable[[Sequence[int]], Tensor], chosen: Tensor):
        self.images, self.chosen = images, chosen

    def __call__(self, indices: Sequence[int]) -> Tensor:
        return self.images(self.chosen[list(indices)].tolist())


class _Batched(torch.utils.data.Dataset):
    """One item per planned batch, for the worker processes of a ``DataLoader``."""

    def __init__(self, images: Callable[[Sequence[int]], Tensor], plans: Sequence[Tensor]):
        self.images, self.plans = images, plans

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Tensor:
        return self.images(self.plans[index].tolist())


@dataclass(eq=False)
class StreamingData:
    """A data set that is read from front to back and never held in memory (``datasets.IterableDataset``).

    Args:
        stream: The data set.
        label_names: Name of each class.
        policy: How pictures become inputs.
        image_column: Its name.
        label_column: Its name.
        part: Share of the stream that is used, as (from, to) in [0, 1]; which examples is decided by their position.
        split_seed: Of that decision.
        shuffle_buffer: Examples from which the next one is drawn in training.
        description: For reports.
    """

    stream: Any
    label_names: tuple[str, ...]
    policy: ImagePolicy
    image_column: str
    label_column: str
    part: tuple[float, float] = (0.0, 1.0)
    split_seed: int = 0
    shuffle_buffer: int = 1000
    description: dict[str, Any] = field(default_factory=dict)

    def steps_per_epoch(self, batch_size: int) -> None:
        """Unknown."""
        return None

    def training_batches(
        self, *, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> Iterator[Drawn]:
        """As of :class:`ImageData`; a resumed run reads over what it has had."""
        step, epoch, waiting = 0, 0, []
        while step < stop:
            before = step
            shuffled = self._numbered().shuffle(seed=seed + epoch, buffer_size=self.shuffle_buffer)
            for example in shuffled:
                waiting.append(example)
                if len(waiting) == batch_size:
                    if step >= start:
                        yield self._draw(waiting[rank::world], epoch)
                    step, waiting = step + 1, []
                    if step == stop:
                        return
            if step == before and len(waiting) < batch_size and not self._any():
                raise DataError("expected images in the stream, got none.")
            epoch += 1

    def batches(self, batch_size: int) -> Iterator[Drawn]:
        """All images in order."""
        waiting = []
        for example in self._numbered():
            waiting.append(example)
            if len(waiting) == batch_size:
                yield self._draw(waiting, 0)
                waiting = []
        if waiting:
            yield self._draw(waiting, 0)

    def held(self, num_images: int) -> ImageData:
        """The first images of the part, in memory."""
        taken: list[Drawn] = []
        for drawn in self.batches(min(64, num_images)):
            taken.append(drawn)
            if sum(len(part.labels) for part in taken) >= num_images:
                break
        if not taken:
            raise DataError(f"expected images in the {self.description.get('split', 'data')} part of the stream, got none.")
        images = torch.cat([part.images for part in taken])[:num_images]
        labels = torch.cat([part.labels for part in taken])[:num_images]
        return ImageData(labels, self.label_names, images, self.policy, self.description | {"num_images": len(labels)})

    def _any(self) -> bool:
        return next(iter(self._numbered()), None) is not None

    def _numbered(self) -> Any:
        """The examples of the part, each with its position in the stream."""
        import datasets

        low, high = self.part

        def number(example: dict[str, Any], position: int) -> dict[str, Any]:
            return {"image": example[self.image_column], "label": example[self.label_column], "position": position}

        def inside(position: int) -> bool:
            draw = float(uniform(image_keys(self.split_seed, 0, torch.tensor([position])), stream=101))
            return low <= draw < high

        stream = self.stream
        features = stream.features
        if features is not None and isinstance(features.get(self.image_column), datasets.Image):
            stream = stream.cast_column(self.image_column, datasets.Image(decode=False))
        stream = stream.map(number, with_indices=True, remove_columns=list(features) if features is not None else None)
        return stream if (low, high) == (0.0, 1.0) else stream.filter(inside, input_columns="position")

    def _draw(self, examples: Sequence[dict[str, Any]], epoch: int) -> Drawn:
        images, labels = [], []
        for example in examples:
            where = f"example {example['position']} of the stream"
            label = example["label"]
            if isinstance(label, str) and label in self.label_names:
                label = self.label_names.index(label)
            if not isinstance(label, int) or not 0 <= label < len(self.label_names):
                raise DataError(f"{where}: expected a class from 0 to {len(self.label_names) - 1}, got {example['label']!r}.")
            try:
                images.append(self.policy(example["image"]))
            except ValueError as error:
                raise DataError(f"{where}: {error} Remove or repair it.") from error
            labels.append(label)
        indices = torch.tensor([example["position"] for example in examples])
        return Drawn(torch.stack(images), torch.tensor(labels), indices, epoch)
