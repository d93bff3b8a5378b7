import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from PIL import Image
from timm.data import create_transform

from cartl_hub.images import ImagePolicy, policy_to_dict, to_pil

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Blobs of colour with some noise, so that a resize has something to blur."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(blobs).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


@pytest.mark.parametrize(("crop_mode", "crop_pct"), [("center", 1.0), ("squash", 1.0), ("center", 0.875)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
def test_pixels_are_those_of_timms_evaluation_transform(size, crop_mode, crop_pct):
    for interpolation in ("nearest", "bilinear", "bicubic", "lanczos"):
        policy = ImagePolicy(size=size, interpolation=interpolation, crop_mode=crop_mode, crop_pct=crop_pct)
        transform = create_transform(
            (3, *size), is_training=False, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, mean=MEAN, std=STD
        )
        for width, height in ((32, 32), (40, 24), (24, 40), (64, 48), (33, 100), (131, 57), (20, 20), (9, 31), (200, 200)):
            image = photo(width, height)
            normalised = transform(image)
            expected = (normalised * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
            assert torch.equal(policy(image), expected.round().to(torch.uint8)), (interpolation, width, height)


def test_a_picture_of_the_right_size_is_kept():
    image = photo(32, 32)
    pixels = ImagePolicy()(image)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_every_form_of_a_picture_gives_the_same_pixels(tmp_path):
    image = photo(32, 32)
    array = np.asarray(image)
    data = encoded(image)
    image.save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", data)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = {
        "image": image,
        "bytes": data,
        "bytearray": bytearray(data),
        "path": tmp_path / "a.png",
        "string": str(tmp_path / "a.png"),
        "inside an archive": f"zip://a.png::{tmp_path / 'a.zip'}",
        "datasets, bytes": {"bytes": data, "path": None},
        "datasets, path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "webp": encoded(image, "WEBP", lossless=True),
        "bmp": encoded(image, "BMP"),
        "array": array,
        "array, int64": array.astype(np.int64),
        "array, 16 bits": array.astype(np.uint16) * 257,
        "array, floats": (array / 255).astype(np.float32),
        "list": array.tolist(),
        "tensor": tensor,
        "tensor, floats": tensor / 255,
        "tensor, doubles": tensor.double() / 255,
    }
    expected = ImagePolicy()(image)
    for name, form in forms.items():
        assert torch.equal(ImagePolicy()(form), expected), name
    gray = np.asarray(image.convert("L"))
    for form in (gray, gray[:, :, None], torch.from_numpy(gray.copy()), torch.from_numpy(gray.copy())[None]):
        assert torch.equal(ImagePolicy()(form), torch.from_numpy(gray.copy()).expand(3, -1, -1))
        assert torch.equal(ImagePolicy(mode="L")(form), torch.from_numpy(gray.copy())[None])
    assert torch.equal(ImagePolicy()(gray > 100), torch.from_numpy((gray > 100) * np.uint8(255)).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_become_what_pil_and_so_timm_make_of_them(mode):
    image = photo(32, 32)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    for target in ("RGB", "L"):
        expected = np.asarray(image.convert(target))
        pixels = ImagePolicy(mode=target)(image)
        assert np.array_equal(pixels[0].numpy() if target == "L" else pixels.permute(1, 2, 0).numpy(), expected)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colours():
    image = photo(32, 32).convert("P", palette=Image.Palette.ADAPTIVE)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    assert "transparency" in Image.open(io.BytesIO(data)).info
    assert torch.equal(ImagePolicy()(data), expected)
    assert torch.equal(ImagePolicy()(encoded(image, "GIF", transparency=3)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(kind):
    gray = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    pixels = ImagePolicy()(encoded(Image.fromarray(gray), kind))
    assert np.array_equal(pixels[0].numpy(), np.round(gray / 257).astype(np.uint8))
    dark = ImagePolicy()(encoded(Image.fromarray(gray // 256), kind))
    assert int(dark.max()) <= 1  # every picture on the same scale: a dark one isn't taken for one of 8 bits
    # PIL before version 11 reads such a file in mode "I"
    assert torch.equal(ImagePolicy()(Image.fromarray(gray.astype(np.int32))), pixels)


def test_float_pictures_are_scaled():
    values = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    expected = torch.from_numpy(np.round(values * 255).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(ImagePolicy()(encoded(Image.fromarray(values), "TIFF")), expected)
    assert torch.equal(ImagePolicy()(values), expected)
    assert torch.equal(ImagePolicy()(torch.from_numpy(values)), expected)
    halves = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(ImagePolicy()(halves), (halves.float() * 255).round().to(torch.uint8).expand(3, -1, -1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_rotated_by_exif(kind, tmp_path):
    image = photo(32, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, exif=exif, **lossless)
    (tmp_path / "a").write_bytes(data)
    plain = Image.open(io.BytesIO(encoded(image, kind, **lossless)))
    policy = ImagePolicy(size=(32, 48))
    expected = policy(plain.transpose(Image.Transpose.ROTATE_270))
    for form in (data, tmp_path / "a", Image.open(io.BytesIO(data))):
        assert to_pil(form).size == (48, 32)
        assert torch.equal(policy(form), expected)
    turned = to_pil(data)
    assert to_pil(turned).size == (48, 32)  # once only


def test_animations_give_their_first_picture():
    frames = [photo(32, 32, seed=seed) for seed in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert torch.equal(ImagePolicy()(data), ImagePolicy()(frames[0]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_value_errors_or_pictures(kind):
    """Whatever a decoder raises on a broken file must be an error that names its row later on."""
    data, rng, errors = encoded(photo(16, 16), kind), np.random.default_rng(0), []
    for _ in range(60):
        broken = bytearray(data)
        broken[rng.integers(len(data))] = rng.integers(256)
        try:
            assert ImagePolicy(size=(8, 8))(bytes(broken[: rng.integers(1, len(data) + 1)])).shape == (3, 8, 8)
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) > 10
    assert all(error.startswith("expected a readable picture, got ") for error in errors)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"", "readable picture, got bytes of no known kind"),
        (b"RIFF\0\0\0\0WAVE", "readable picture, got bytes of no known kind"),
        (Path("nowhere.png"), "readable picture, got FileNotFoundError"),
        ("nothing://a.png", "readable picture, got ValueError: Protocol not known"),
        (None, "expected a picture: .* got NoneType"),
        ({"bytes": None, "path": None}, "got NoneType"),
        (np.zeros((3, 32, 32)), r"array \[H, W\] or \[H, W, C\].* got shape \(3, 32, 32\)"),
        (torch.zeros(32, 32, 3), r"tensor \[C, H, W\].* got shape \(32, 32, 3\)"),
        (np.zeros((0, 5)), r"got shape \(0, 5\)"),
        (np.full((4, 4), "a"), "pixels that are numbers"),
        (np.full((4, 4), 300), r"int64 pixels in \[0, 255\], got values in \[300, 300\].*uint16"),
        (np.full((4, 4), -1), r"got values in \[-1, -1\]"),
        (np.full((4, 4), 255.0), r"float64 pixels in \[0, 1\], got values in \[255, 255\]"),
        (np.full((4, 4), np.nan), r"got values in \[nan, nan\]"),
        (Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), r"int32 pixels in \[0, 65535\]"),
    ],
)
def test_what_is_not_a_picture(picture, message):
    with pytest.raises(ValueError, match=message):
        ImagePolicy()(picture)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "RGBA"),
        ("interpolation", "box"),
        ("crop_mode", "border"),
        ("crop_pct", 0.0),
        ("crop_pct", 1.1),
        ("crop_pct", 1e-9),
        ("crop_pct", float("nan")),
        ("size", (0, 32)),
        ("size", (True, 32)),
        ("size", 32),
        ("size", (32,)),
    ],
)
def test_policy_checks_its_fields(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be"):
        ImagePolicy(**{field: value})


def test_policy_survives_json():
    policy = ImagePolicy(size=(24, 40), mode="L", interpolation="bicubic", crop_mode="squash")
    again = ImagePolicy(**policy_to_dict(policy))
    assert again == policy
    assert again(photo(50, 50)).shape == (1, 24, 40)


def test_predict_reads_every_form(tmp_path):
    model = make_model("wrn10_1")
    model.image_policy = ImagePolicy(crop_mode="squash")
    image = photo(50, 70)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    forms = [image, tmp_path / "a.png", encoded(image), array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    with torch.no_grad():
        expected = model.eval()(ImagePolicy(crop_mode="squash")(image)[None] / 255).softmax(1)[0].sort(descending=True)
    for prediction in (*model.predict(forms, top=3), *model.predict(image, top=3)):
        assert prediction.names == tuple(map(str, expected.indices.tolist()))
        assert prediction.probabilities == pytest.approx(expected.values.tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="picture 1: expected a readable picture"):
        model.predict([image, b"no picture"])


def test_pictures_of_32_bits_with_8_bit_values():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    policy = ImagePolicy(size=(8, 8))
    assert torch.equal(policy(grey.convert("I")), policy(grey))
