"""Conversion of any picture to the uint8 tensor that a model takes."""

import io
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .ranges import check_number, check_whole

_LONGEST = 2000

Mode = Literal["RGB", "L"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropMode = Literal["center", "squash"]


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """Policy that turns a picture of any size and mode into a model input; it is saved with the model.

    The geometry is timm's evaluation transform, so that plain timm sees the same pixels. Transparency is dropped, as there.

    Args:
        size: Height and width of the input, in pixels.
        mode: Colour mode: "RGB", or "L" for one channel.
        interpolation: Interpolation used for resizing.
        crop_mode: Crop mode. "center": the picture is resized until it just covers ``size``, and its middle is cut out; "squash":
            each side is resized by itself.
        crop_pct: Share of the resized picture, per side, that "center" keeps; 0.875 is 224 pixels of 256, as for many ImageNet
            models, at least 0.01. With 1 a picture of the right size is taken as it is.

    Raises:
        ValueError: On values that aren't listed here.
    """

    size: tuple[int, int] = (32, 32)
    mode: Mode = "RGB"
    interpolation: Interpolation = "bilinear"
    crop_mode: CropMode = "center"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.size, (tuple, list)) or len(self.size) != 2:
            raise ValueError(f"size must be a height and a width in pixels, got {self.size!r}.")
        object.__setattr__(self, "size", tuple(self.size))  # a list comes from JSON
        for side in self.size:
            check_whole("each side of size", side, (">=", 1))
        check_number("crop_pct", self.crop_pct, (">=", 0.01), ("<=", 1))  # below, the resized picture would fill the memory
        for name, allowed in (
            ("mode", get_args(Mode)),
            ("interpolation", get_args(Interpolation)),
            ("crop_mode", get_args(CropMode)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")

    @property
    def num_channels(self) -> int:
        return 3 if self.mode == "RGB" else 1

    def __call__(self, picture: Any) -> Tensor:
        """Convert one picture to a uint8 tensor, [C, H, W].

        Args:
            picture: PIL image, path, encoded bytes, ``{"bytes", "path"}`` as ``datasets`` stores it, array [H, W] or [H, W, C],
                tensor [C, H, W]. Numbers are 8-bit integers, 16-bit ones in an array of uint16, or floats in [0, 1].

        Raises:
            ValueError: If it can't be read as a picture.
        """
        image = self._convert(to_pil(picture))
        if max(image.size) > _LONGEST * min(image.size):  # resized until its short side fits, it would fill the memory
            raise ValueError(f"expected a picture at most {_LONGEST} times as long as wide, got {image.size[0]}x{image.size[1]}.")
        if image.size != (self.size[1], self.size[0]) or self.crop_pct < 1:
            return _evaluation_transform(self.size, self.interpolation, self.crop_mode, self.crop_pct)(image).contiguous()
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def _convert(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these instead of scaling them
            pixels = np.asarray(image)
            top = 1.0 if image.mode == "F" else 255 if image.mode == "I" and pixels.max() <= 255 else 65535
            image = Image.fromarray(_eight_bits(pixels, top=top))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours, without PIL's warning
        return image if image.mode == self.mode else image.convert(self.mode)


@lru_cache(maxsize=16)
def _evaluation_transform(size: tuple[int, int], interpolation: str, crop_mode: str, crop_pct: float) -> Any:
    from timm.data import create_transform

    return create_transform(size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, normalize=False)


def to_pil(picture: Any) -> Image.Image:
    """Convert any form of a picture to a loaded, upright PIL image; :class:`ImagePolicy` lists the forms.

    Raises:
        ValueError: If it can't be read as a picture.
    """
    name = ""
    if isinstance(picture, dict) and {"bytes", "path"} & picture.keys():
        name = Path(picture.get("path") or "").name
        picture = picture["bytes"] if picture.get("bytes") is not None else picture["path"]
    if isinstance(picture, (Tensor, np.ndarray, list, tuple)):
        return _from_numbers(picture)
    if not isinstance(picture, (Image.Image, bytes, bytearray, str, Path)):
        raise ValueError(
            "expected a picture: PIL image, path, encoded bytes, array [H, W] or [H, W, C], or tensor [C, H, W]; "
            f"got {type(picture).__name__}."
        )
    try:
        image = picture if isinstance(picture, Image.Image) else _open(picture)
        image.load()
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)
    except Exception as error:  # the decoders of PIL raise many kinds
        got = "bytes of no known kind" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a readable picture{name and f' in {name}'}, got {got}.") from error


def _open(picture: bytes | bytearray | str | Path) -> Image.Image:
    if isinstance(picture, (bytes, bytearray)):
        data = bytes(picture)
    elif isinstance(picture, str) and "://" in picture:  # what ``datasets`` gives for a folder or an archive on the Hub
        import fsspec

        with fsspec.open(picture, "rb") as file:
            data = file.read()
    else:
        data = Path(picture).read_bytes()
    # PIL tries WebP after dozens of others, which takes as long as the decoding of a small picture
    return Image.open(io.BytesIO(data), formats=["WEBP"] if data[:4] == b"RIFF" else None)


def _from_numbers(picture: Any) -> Image.Image:
    shape = tuple(np.shape(picture))
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
        picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture
    array = np.asarray(picture)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (2, 3, 4)):
        raise ValueError(f"expected an array [H, W] or [H, W, C], or a tensor [C, H, W], of 1 to 4 channels; got shape {shape}.")
    return Image.fromarray(_eight_bits(array))


def _eight_bits(array: np.ndarray, top: float | None = None) -> np.ndarray:
    """Pixels as uint8.

    Args:
        array: Booleans, integers or floats.
        top: Value of white; by default 1 for floats, 65535 for uint16, and 255 for other integers.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
        raise ValueError(f"expected pixels that are numbers, got {array.dtype}.")
    if top is None:
        top = 1.0 if np.issubdtype(array.dtype, np.floating) else 65535 if array.dtype == np.uint16 else 255
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= top):
        raise ValueError(
            f"expected {array.dtype} pixels in [0, {top:g}], got values in [{low:g}, {high:g}]; scale them to that range"
            + (", or pass 16-bit pixels as uint16." if top == 255 else ".")
        )
    return np.round(array.astype(np.float64) * (255 / top)).astype(np.uint8)


def policy_to_dict(policy: ImagePolicy) -> dict[str, Any]:
    """The policy as JSON."""
    return asdict(policy) | {"size": list(policy.size)}
