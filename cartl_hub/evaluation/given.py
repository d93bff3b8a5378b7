"""Data to measure on, in any of the accepted forms."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, TensorDataset

from ..data import Data, DataError, Drawn, ImageData
from ..sampling import evenly_spaced, stratified_sample

FEW = 16  # images that are read twice

AnyTestData = Data | DataLoader | Dataset | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Loaded:
    """Images and labels of a ``DataLoader``, in its order.

    Args:
        loader: Loader of (images, labels), [B, C, H, W] and [B].
        label_names: Name of each class.
        description: Description of the data for the report.
        positions: Positions of its images in the data set that they were sampled from, [N]; None if it gives all.
    """

    loader: DataLoader
    label_names: tuple[str, ...]
    description: dict[str, Any]
    positions: Tensor | None = None

    def batches(self, batch_size: int) -> Iterator[Drawn]:
        """All images in order, as many at once as the loader gives."""
        first = 0
        for images, labels in map(_pair, self.loader):
            places = slice(first, first + len(labels))
            first = places.stop
            indices = torch.arange(places.start, places.stop) if self.positions is None else self.positions[places]
            yield Drawn(images, labels.long(), indices, 0)

    def sample(self, num_images: int, stratified: bool) -> "Loaded | None":
        """Sample of the images: each class in proportion if requested and if the data set gives their classes without reading
        them, otherwise evenly spaced. None for data that can only be read from front to back, or in their own order."""
        loader, dataset = self.loader, self.loader.dataset
        if not isinstance(loader.sampler, SequentialSampler) or loader.batch_size is None:
            return None
        total = len(loader.sampler)
        if num_images >= total:
            return self
        targets = _targets(dataset) if stratified else None
        sampled: dict[str, Any] = {"sampled_from": total}
        if targets is None:
            positions, sampled = evenly_spaced(num_images, total), sampled | {"sampled": "evenly spaced"}
        else:
            positions = stratified_sample(targets, num_images, seed=0)
        part = DataLoader(
            Subset(dataset, positions.tolist()),
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )
        return Loaded(part, self.label_names, self.description | sampled, positions)


@dataclass(frozen=True, eq=False)
class Part:
    """Some images of a data set, with the indices that they have in it.

    Args:
        data: The data set.
        positions: Positions of the images, [N].
        description: Description of the data for the report.
    """

    data: ImageData
    positions: Tensor
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.data.label_names

    def batches(self, batch_size: int) -> Iterator[Drawn]:
        """All of them in order."""
        for part in self.positions.split(batch_size):
            yield Drawn(self.data.get(part), self.data.labels[part], part, 0)


def sampled(data: Any, num_images: int | None, *, stratified: bool = True) -> tuple[Any, int | None]:
    """A sample of data whose images can be chosen; for other data, the number of images to take from the front.

    Args:
        data: Data from :func:`as_data`.
        num_images: Number of images; None for all.
        stratified: Sample each class in proportion, smaller samples inside larger ones; otherwise evenly spaced.
    """
    if num_images is None:
        return data, None
    if isinstance(data, ImageData):
        if num_images >= len(data):
            return data, None
        labels = data.labels
        positions = stratified_sample(labels, num_images, seed=0) if stratified else evenly_spaced(num_images, len(labels))
        return Part(data, positions, data.description | {"sampled_from": len(data)}), None
    if isinstance(data, Loaded) and (part := data.sample(num_images, stratified)) is not None:
        return part, None
    return data, num_images


def _targets(dataset: Dataset) -> Tensor | None:
    """Classes of its images, if they can be obtained without reading the images."""
    if isinstance(dataset, Subset):
        inner = _targets(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices, dtype=torch.long)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    try:
        targets = torch.as_tensor(dataset.targets)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    known = targets.ndim == 1 and len(targets) == len(dataset) and not targets.is_floating_point()  # type: ignore[arg-type]
    return targets if known else None


def as_data(given: Any, model: nn.Module, batch_size: int) -> Any:
    """Data with label names; those of a PyTorch data set are its ``classes``, or else numbers.

    Args:
        given: Data from :func:`cartl_hub.load_splits`, a PyTorch ``DataLoader`` or ``Dataset``, or images and labels.
        model: Model whose logits tell the number of classes.
        batch_size: Number of images read at once, unless a loader sets it.

    Raises:
        TypeError: If it is something else.
        DataError: If a loader shuffles, leaves images out, draws random transforms, or gives something else than images and
            labels.
    """
    if hasattr(given, "batches") and hasattr(given, "label_names"):
        return given
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        if len(given[0]) != len(given[1]):
            raise DataError(f"expected a label for each of {len(given[0])} images, got {len(given[1])}.")
        given = TensorDataset(*given)
    if isinstance(given, Dataset):
        given = DataLoader(given, batch_size=batch_size)
    if not isinstance(given, DataLoader):
        raise TypeError(
            f"expected what load_splits makes, a DataLoader or Dataset of PyTorch, or (images, labels), got "
            f"{type(given).__name__}; load_test_split(data, ImagePolicy(size=(height, width)))[0] reads a datasets.Dataset or "
            "a folder."
        )
    if isinstance(given.sampler, RandomSampler):
        raise DataError("expected a DataLoader that keeps the order of its images, got one that shuffles; pass shuffle=False.")
    _refuse_incomplete(given)
    dataset = given.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return Loaded(given, _label_names(given, dataset, model), {"id": type(dataset).__name__})


def _refuse_incomplete(loader: DataLoader) -> None:
    sampler = loader.batch_sampler
    if not getattr(sampler, "drop_last", loader.drop_last):
        return
    size = getattr(sampler, "batch_size", loader.batch_size)
    try:
        left_out = str(len(loader.sampler) % size)  # type: ignore[arg-type, operator]
    except TypeError:  # a stream
        left_out = "some"
    if left_out != "0":
        raise DataError(
            f"expected a DataLoader that gives all images, got one that leaves {left_out} of the last ones out; pass "
            "drop_last=False."
        )


def _first(loader: DataLoader) -> tuple[Tensor, Tensor] | None:
    """The first images and labels, a few at least, or all that there are."""
    found: list[tuple[Tensor, Tensor]] = []
    for pair in map(_pair, loader):
        found.append(pair)
        if sum(len(labels) for _, labels in found) >= FEW:
            break
    images = [images for images, _ in found if images.shape[1:] == found[0][0].shape[1:]]
    return (torch.cat(images), torch.cat([labels for _, labels in found])) if found else None


def _label_names(loader: DataLoader, dataset: Any, model: nn.Module) -> tuple[str, ...]:
    first, again = _first(loader), _first(loader)
    if first is None or again is None:
        raise DataError("expected at least one image, got none; pass a data set that has images.")
    same = first[0].shape == again[0].shape and torch.allclose(first[0], again[0], rtol=0, atol=0, equal_nan=True)
    if not (same and torch.equal(first[1], again[1])):
        raise DataError(
            "expected the same images whenever they are read, got other ones the second time: transforms are random, or the "
            "order is; evaluate with fixed transforms, such as Resize and CenterCrop, in a fixed order."
        )
    images = first[0]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        logits = model((images[:1].float() / 255 if images.dtype == torch.uint8 else images[:1].float()).to(device))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected logits [B, K] from the model, got {got}; wrap it in a module that returns them.")
    names = getattr(dataset, "classes", None)
    known = isinstance(names, (list, tuple)) and len(names) == logits.shape[1]
    return tuple(map(str, names if known else range(logits.shape[1])))  # type: ignore[arg-type]


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        images, labels = batch
        if images.ndim == 4 and labels.ndim == 1:
            if labels.is_floating_point() or labels.is_complex():
                raise DataError(f"expected labels that are whole numbers, got {labels.dtype}; pass labels.long() if they are.")
            return images, labels
    shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in batch]
    raise DataError(f"expected batches of images [B, C, H, W] in [0, 1] and labels [B], got {shapes}.")
