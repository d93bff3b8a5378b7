"""From any picture to the uint8 tensor that a model takes."""

import io
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """How a picture of any size and mode becomes a model input; it is saved with the model.

    The geometry is that of timm's evaluation transform with ``crop_pct=1``, so that plain timm sees the same pixels.

    Args:
        size: Height and width of the input, in pixels.
        mode: "RGB", or "L" for one channel.
        interpolation: Of the resize.
        crop_mode: "center": the shorter side becomes ``size`` and the middle is cut out; "squash": both sides are resized.
    """

    size: tuple[int, int] = (32, 32)
    mode: Literal["RGB", "L"] = "RGB"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    crop_mode: Literal["center", "squash"] = "center"

    @property
    def num_channels(self) -> int:
        return 3 if self.mode == "RGB" else 1

    def __call__(self, picture: Any) -> Tensor:
        """One picture as a uint8 tensor, [C, H, W].

        Args:
            picture: PIL image, path, encoded bytes, ``{"bytes", "path"}`` as ``datasets`` stores it, array [H, W] or [H, W, C],
                tensor [C, H, W]; integers of 8 or 16 bits, or floats in [0, 1].

        Raises:
            ValueError: If it can't be read as a picture.
        """
        image = self._convert(to_pil(picture))
        if image.size != (self.size[1], self.size[0]):
            image = _resize(self.size, self.interpolation, self.crop_mode)(image)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def _convert(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these instead of scaling them
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == self.mode else image.convert(self.mode)


@lru_cache(maxsize=16)
def _resize(size: tuple[int, int], interpolation: str, crop_mode: str) -> Any:
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    target: Any = size if crop_mode == "squash" or size[0] != size[1] else size[0]
    if crop_mode == "center" and size[0] != size[1]:
        from timm.data.transforms import ResizeKeepRatio

        return transforms.Compose([ResizeKeepRatio(size, longest=0.0, interpolation=interpolation), transforms.CenterCrop(size)])
    return transforms.Compose([transforms.Resize(target, interpolation=str_to_interp_mode(interpolation)), transforms.CenterCrop(size)])


def to_pil(picture: Any) -> Image.Image:
    """Any form of a picture as a loaded PIL image; :class:`ImagePolicy` says which forms there are."""
    try:
        if isinstance(picture, Image.Image):
            picture.load()
            return picture
        if isinstance(picture, dict) and {"bytes", "path"} & picture.keys():
            return to_pil(picture["bytes"] if picture.get("bytes") is not None else picture["path"])
        if isinstance(picture, (bytes, bytearray, str, Path)):
            file: Any = io.BytesIO(picture) if isinstance(picture, (bytes, bytearray)) else picture
            with Image.open(file) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a readable picture, got {type(error).__name__}: {error}.") from error
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().numpy()
        if picture.ndim == 3:
            picture = picture.transpose(1, 2, 0)
    if isinstance(picture, (list, tuple)):  # datasets gives nested lists for array columns
        picture = np.asarray(picture)
    if isinstance(picture, np.ndarray) and picture.ndim in (2, 3) and picture.size:
        array = _eight_bits(picture)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.ndim == 2 or array.shape[2] in (2, 3, 4):
            return Image.fromarray(array, mode={2: "LA", 3: "RGB", 4: "RGBA"}[array.shape[2]] if array.ndim == 3 else "L")
    shape = getattr(picture, "shape", None)
    described = type(picture).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")
    raise ValueError(f"expected a picture: PIL image, path, bytes, array [H, W] or [H, W, C], or tensor [C, H, W]; got {described}.")


def _eight_bits(array: np.ndarray) -> np.ndarray:
    """Pixels as uint8: 16-bit integers are scaled by 1/257, floats in [0, 1] by 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating):
        if not (low >= 0 and high <= 1):
            raise ValueError(f"expected float pixels in [0, 1], got values in [{low:.3g}, {high:.3g}]; divide them by their maximum.")
        return np.round(array * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"expected integer pixels of 8 or 16 bits, got values in [{low}, {high}].")
    wide = array.dtype in (np.uint16, np.int16) or high > 255
    return np.round(array / 257).astype(np.uint8) if wide else array.astype(np.uint8)


def policy_to_dict(policy: ImagePolicy) -> dict[str, Any]:
    return asdict(policy) | {"size": list(policy.size)}
