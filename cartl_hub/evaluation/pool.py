"""The images that an evaluation measures, each accessible by its position."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data, Drawn, ImageData


@dataclass(frozen=True, eq=False)
class Pool:
    """Images, with their labels and indices.

    Args:
        images: Images as uint8, or as floats in [0, 1], [N, C, H, W].
        labels: True classes, [N].
        indices: Position of each image in the data, [N].
        complete: Whether the pool holds all of the data.
        digest: Hash of pixels and labels.
    """

    images: Tensor | np.ndarray
    labels: Tensor
    indices: Tensor
    complete: bool
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, positions: Tensor, device: torch.device) -> Tensor:
        """Images in [0, 1], float32: [B] -> [B, C, H, W]."""
        if isinstance(self.images, Tensor):
            images = self.images[positions.to(self.images.device)].to(device)
        else:
            images = torch.from_numpy(self.images[positions.numpy()]).to(device)
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()


@contextmanager
def read_pool(
    data: Data, num_images: int | None, batch_size: int, on_first: Callable[[Tensor, Tensor], None] = lambda images, indices: None
) -> Iterator[Pool]:
    """Read ``data`` once, from front to back.

    Images in memory stay there. Others go to an unnamed file in the folder for temporary files (``TMPDIR``), which is gone
    afterwards, however the process ends.

    Args:
        num_images: Number of images to read from the front.
        on_first: Function called with the images of the first batch, in [0, 1], and their indices, before the rest is read.

    Raises:
        ValueError: If there are no images, if they are outside [0, 1] or of several shapes, or if labels are outside the classes.
    """
    held = isinstance(data, ImageData) and data.in_memory
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    complete, num = True, 0
    seen = hashlib.sha256(), hashlib.sha256()
    shape: tuple[int, ...] = ()
    dtype = torch.uint8
    with tempfile.TemporaryFile(prefix="cartl_hub_") as spool:
        for drawn in data.batches(batch_size):
            left = len(drawn.labels) if num_images is None else num_images - num
            complete = left >= len(drawn.labels)
            if not left:
                break
            drawn = Drawn(drawn.images[:left].detach().cpu(), drawn.labels[:left].cpu(), drawn.indices[:left].cpu(), drawn.epoch)
            _check(drawn, len(data.label_names))
            images = drawn.images if drawn.images.dtype == torch.uint8 else drawn.images.float()
            if not num:
                shape, dtype = tuple(images.shape[1:]), images.dtype
                on_first(images / 255 if dtype == torch.uint8 else images, drawn.indices)
            if (images.shape[1:], images.dtype) != (shape, dtype):
                raise ValueError(
                    f"expected images of one shape and dtype, got {list(shape)} in {dtype} and {list(images.shape[1:])} in "
                    f"{images.dtype} from index {int(drawn.indices[0])}; resize them."
                )
            pixels: Any = images.contiguous().numpy()
            seen[0].update(pixels)
            seen[1].update(drawn.labels.contiguous().numpy())  # type: ignore[arg-type]
            if not held:
                spool.write(pixels)
            labels.append(drawn.labels)
            indices.append(drawn.indices)
            num += len(drawn.labels)
            if not complete:
                break
        if not num:
            raise ValueError("expected at least one image, got none; pass a split that has images.")
        spool.flush()
        spooled = np.float32 if dtype.is_floating_point else np.uint8
        source: Any = data.images if held else np.memmap(spool, spooled, mode="r", shape=(num, *shape))  # type: ignore[attr-defined]
        yield Pool(source, torch.cat(labels), torch.cat(indices), complete, "-".join(part.hexdigest() for part in seen))


def _check(drawn: Drawn, num_classes: int) -> None:
    if drawn.labels.min() < 0 or drawn.labels.max() >= num_classes:
        raise ValueError(
            f"expected labels from 0 to {num_classes - 1}, got {int(drawn.labels.min())} to {int(drawn.labels.max())}; "
            "evaluate on a split that has labels, with the names of all its classes."
        )
    images = drawn.images
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"expected images as uint8 or floats in [0, 1], got {images.dtype}; convert them.")
    outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)  # also where a pixel is NaN
    if outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"expected images in [0, 1], got image {int(drawn.indices[i])} with values in [{images[i].min():.3g}, "
            f"{images[i].max():.3g}]; leave out the normalisation of the data (it belongs into the model) and divide by 255."
        )
