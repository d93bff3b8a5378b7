import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import toy_data
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture

from cartl_hub.data import DataError, StreamingData
from cartl_hub.images import ImagePolicy
from cartl_hub.loading import DataArguments, columns, confinement, load_splits, load_test_split, opening, pictures, streams
from cartl_hub.sampling import index_hash, stratified_sample, stratified_split

POLICY = ImagePolicy(size=(8, 8))
SHARED = Path(__file__).parent / "../../shared/data"
NAMES = ["cat", "dog", "emu"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def encoded(array: np.ndarray, kind: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    Picture.fromarray(array).save(file, kind, **kwargs)
    return file.getvalue()


def pixels(number: int, seed: int = 0, size: int = 8) -> np.ndarray:
    return toy_data(number, size=size, seed=seed).images.permute(0, 2, 3, 1).numpy()


def table(number: int = 30, *, seed: int = 0, size: int = 8, broken: int | None = None, labels=None, feature=None) -> Dataset:
    """A split of PNG images with labels 0, 1, 2, 0, ..."""
    images = [{"bytes": encoded(image), "path": None} for image in pixels(number, seed, size)]
    if broken is not None:
        images[broken]["bytes"] = images[broken]["bytes"][:60]
    labels = [row % 3 for row in range(number)] if labels is None else labels
    return Dataset.from_dict(
        {"image": images, "label": labels}, features=Features(image=Image(), label=feature or ClassLabel(names=NAMES))
    )


def read(data, policy: ImagePolicy = POLICY, label_names=None, **kwargs):
    return load_splits(data, policy, DataArguments(**kwargs), label_names=label_names)


def images_of(*parts) -> list:
    return sorted(tuple(image.flatten().tolist()) for part in parts for image in part.images)


# Splits


def test_a_dict_of_splits_is_read_as_it_is():
    data = DatasetDict(train=table(30), validation=table(9, seed=1), test=table(12, seed=2))
    splits = read(data)
    assert splits.notes == ()
    assert splits.label_names == tuple(NAMES)
    for part, name, number, seed in (
        (splits.train, "train", 30, 0),
        (splits.validation, "validation", 9, 1),
        (splits.test, "test", 12, 2),
    ):
        assert torch.equal(part.images, toy_data(number, size=8, seed=seed).images)
        assert part.labels.tolist() == [row % 3 for row in range(number)]
        assert part.description["split"] == name
        assert part.description["num_images"] == number
        assert part.description["image_policy"] == {
            "size": [8, 8],
            "mode": "RGB",
            "interpolation": "bilinear",
            "crop_mode": "center",
            "crop_pct": 1.0,
        }
        json.dumps(part.description)


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_folder_that_datasets_read_keeps_its_name(tmp_path, inner):
    for label in ("cat", "dog"):
        folder = tmp_path / "my_photos" / inner / label
        folder.mkdir(parents=True)
        for index in range(3):
            Picture.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    found = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "my_photos"), cache_dir=str(tmp_path / "cache"))
    assert load_splits(found, ImagePolicy(size=(8, 8))).train.description["id"] == "my_photos"


def test_what_is_missing_is_split_off():
    splits = read(table(90))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [66, 6, 18]
    assert images_of(splits.train, splits.validation, splits.test) == images_of(toy_data(90, size=8, seed=0))
    assert splits.test.labels.bincount().tolist() == [6, 6, 6]
    assert splits.validation.labels.bincount().tolist() == [2, 2, 2]
    _, held = stratified_split(torch.arange(90) % 3, 0.2, 0)
    assert torch.equal(splits.test.images, toy_data(90, size=8, seed=0).images[held])
    assert splits.test.description["index_hash"] == index_hash(held)
    assert splits.test.description["split"] == "test (split off)"
    tested, validated = splits.notes
    assert tested.startswith("no test split: 20% of the training images (18, stratified, seed 0, index hash " + index_hash(held))
    assert f"index hash {splits.validation.description['index_hash']}" in validated
    again, other, third = read(table(90)), read(table(90), seed=1), read(table(90), test_seed=1)
    assert torch.equal(again.train.images, splits.train.images)
    assert again.train.description["fingerprint"] == splits.train.description["fingerprint"]
    assert torch.equal(other.test.images, splits.test.images)  # runs with several seeds are measured on the same images
    assert images_of(other.validation) != images_of(splits.validation)
    assert images_of(third.test) != images_of(splits.test)
    assert len({part.train.description["fingerprint"] for part in (splits, other, third)}) == 3
    shares = read(table(90), test_share=0.5, validation_share=1 / 3)
    assert [len(part) for part in (shares.train, shares.validation, shares.test)] == [30, 15, 45]


def test_the_fingerprint_tells_images_and_labels_apart():
    prints = [
        read(DatasetDict(train=train, validation=table(), test=table())).train.description["fingerprint"]
        for train in (table(), table(seed=1), table(labels=[0, 1, 2] * 9 + [0, 2, 1]))
    ]
    assert len(set(prints)) == 3


def test_stratified_split_keeps_the_shares_of_the_classes():
    labels = torch.cat([torch.zeros(700), torch.ones(290), torch.full((9,), 2.0), torch.full((1,), 3.0)]).long()
    labels = labels[torch.randperm(1000)]
    kept, held = stratified_split(labels, 0.1, 0)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(1000))
    assert labels[held].bincount(minlength=4).tolist() == [70, 29, 1, 0]
    assert index_hash(held) == index_hash(held.flip(0)) != index_hash(kept)


def test_samples_are_nested_balanced_and_of_their_seed():
    labels = (torch.arange(100) % 10)[torch.randperm(100)]
    smaller: set[int] = set()
    for number in range(10, 101):
        sample = stratified_sample(labels, number, 3)
        counts = labels[sample].bincount(minlength=10)
        assert len(set(sample.tolist())) == number
        assert int(counts.max() - counts.min()) <= 1
        assert smaller <= set(sample.tolist())
        smaller = set(sample.tolist())
    assert len({index_hash(stratified_sample(labels, 20, seed)) for seed in range(5)}) == 5
    unbalanced = torch.cat([torch.zeros(700), torch.ones(290), torch.full((10,), 2.0)]).long()
    assert unbalanced[stratified_sample(unbalanced, 100, 0)].bincount().tolist() == [70, 29, 1]
    assert unbalanced[stratified_sample(unbalanced, 3, 0)].bincount().tolist() == [1, 1, 1]


def test_training_on_a_part_of_the_images():
    whole, few, more = read(table(90)), read(table(90), train_images=9), read(table(90), train_share=0.5)
    assert [len(splits.train) for splits in (whole, few, more)] == [66, 9, 33]
    assert set(images_of(few.train)) < set(images_of(more.train)) < set(images_of(whole.train))
    assert few.train.labels.bincount().tolist() == [3, 3, 3]
    for part in ("validation", "test"):
        assert torch.equal(getattr(few, part).images, getattr(whole, part).images)
    assert few.notes[:2] == whole.notes
    assert few.notes[2] == (f"training on 9 of 66 images, stratified, seed 0, index hash {few.train.description['index_hash']}")
    assert few.train.description["num_images"] == 9
    assert few.train.description["fingerprint"] == few.train.fingerprint() != whole.train.fingerprint()
    assert len(read(table(90), train_share=0.001).train) == 3  # one of each class
    assert torch.equal(read(table(90), train_share=1).train.images, whole.train.images)


@pytest.mark.parametrize("number", [2, 67])
def test_too_few_or_too_many_images_to_train_on(number):
    with pytest.raises(DataError, match=f"expected train_images from 3, one for each class, to 66, .*; got {number}"):
        read(table(90), train_images=number)
    with pytest.raises(DataError, match="expected data that are not a stream for train_images and train_share"):
        read(table(90).to_iterable_dataset(), train_images=number)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": 0}, "train_images must be >= 1, got 0"),
        ({"train_images": 2.5}, "train_images must be a whole number, got 2.5"),
        ({"train_share": 0.0}, "train_share must be > 0 and <= 1, got 0.0"),
        ({"train_share": 10}, "train_share must be > 0 and <= 1, got 10"),
        ({"train_images": 9, "train_share": 0.1}, r"expected train_images or train_share, got both \(9 and 0.1\)"),
    ],
)
def test_number_and_share_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**options)


@pytest.mark.parametrize(
    ("given", "notes"),
    [
        (["training", "val", "testing"], []),
        (["train", "dev", "valid", "test"], ["splits that are not used: dev"]),
        (["train", "validation", "test", "unsupervised"], ["splits that are not used: unsupervised"]),
        (["images"], ["the only split, 'images', is divided", "no test split", "no validation split"]),
        (["test"], ["the only split, 'test', is divided", "no test split", "no validation split"]),
        (["train", "test"], ["no validation split"]),
    ],
)
def test_names_of_splits(given, notes):
    found = read({name: table() for name in given}).notes
    assert len(found) == len(notes)
    assert all(text.startswith(note) for text, note in zip(found, notes, strict=True))


@pytest.mark.parametrize("labels", [[-1] * 6, [None] * 6])
def test_a_test_split_without_labels_is_not_used(labels):
    splits = read(DatasetDict(train=table(60), test=table(6, labels=labels)))
    assert splits.notes[0] == "the test split has no labels (all are -1 or missing): it is not used"
    assert splits.notes[1].startswith("no test split: 20% of the training images (12, ")
    assert len(splits.test) == 12


def test_a_test_split_without_labels_is_not_measured_either():
    secret = DatasetDict(train=table(60), validation=table(9, seed=1), test=table(6, labels=[-1] * 6))
    measured, notes = load_test_split(secret, POLICY)
    assert torch.equal(measured.images, read(secret).validation.images)
    assert notes[0] == "the test split has no labels (all are -1 or missing): it is not used"
    lone = DatasetDict(train=secret["train"], test=secret["test"])
    trained = read(lone, test_share=0.3)
    aside, notes = load_test_split(lone, POLICY, trained_on=trained.train.description)
    assert torch.equal(aside.images, trained.test.images)
    streams = {name: split.to_iterable_dataset() for name, split in secret.items()}
    assert next(load_test_split(streams, POLICY)[0].batches(9)).labels.tolist() == secret["validation"]["label"]


def test_a_test_split_that_is_none_is_refused_in_words():
    with pytest.raises(DataError, match=r"expected a datasets\.Dataset for the test split, got list"):
        read({"train": table(60), "test": [1, 2]})


def test_tiny_sets():
    splits = read(table(9))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [3, 3, 3]
    with pytest.raises(
        DataError, match=r"at least two images to split off a validation part, got 3 images, each of.*'validation' split"
    ):
        read(table(6))
    with pytest.raises(DataError, match=r"to split off a test part, got 3 images"):
        read(table(3))
    assert len(read(DatasetDict(train=table(6), test=table(6))).train) == 3
    assert len(read(DatasetDict(train=table(2), validation=table(1), test=table(1))).train) == 2
    lonely = read(table(7, labels=[0, 0, 0, 1, 1, 1, 2]))  # the only image of its class is trained on
    assert lonely.train.labels.tolist() == [0, 1, 2]
    assert lonely.test.labels.tolist() == [0, 1]


def test_a_class_without_a_training_image_is_said():
    splits = read(DatasetDict(train=table(8, labels=[0, 1] * 4), test=table(6)))
    assert splits.notes[-1] == "no training image of 1 of 3 classes: 'emu'"


# Columns


def test_columns_are_found_by_kind_or_by_name():
    data = table()
    other = data.rename_columns({"image": "photo", "label": "kind"}).add_column("width", [8] * 30)
    by_name = (
        data.cast_column("label", Value("int64"))
        .add_column("id", list(range(30)))
        .rename_columns({"image": "x", "label": "Label"})
    )
    plain = Dataset.from_dict(
        {"img": data.with_format(None).cast_column("image", Image(decode=False))["image"][:], "y": data["label"][:]}
    )
    for changed in (other, by_name, plain, data.rename_columns({"image": "a", "label": "b"})):
        assert torch.equal(read(changed).train.images, read(data).train.images)
    named = other.cast_column("kind", Value("int64"))
    assert torch.equal(read(named, label_column="kind").train.labels, read(data).train.labels)


def two(data: Dataset, column: str, name: str) -> Dataset:
    """With a copy of a column."""
    copied = data.rename_column(column, name)
    return datasets.concatenate_datasets([data, copied.select_columns(name)], axis=1)


def many(number: int) -> Dataset:
    """Without pictures and with as many labels as rows."""
    features = Features(image=Image(), id=Value("int32"))
    return Dataset.from_dict({"image": [None] * number, "id": list(range(number))}, features)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: d.remove_columns("label"), {}, r"one label column, .* are image; .*folder per class"),
        (lambda d: d.remove_columns("image"), {}, r"one image column, .* are label; name it with"),
        (lambda d: two(d, "label", "coarse"), {}, "be it: label, coarse; name it with"),
        (lambda d: two(d, "image", "mask"), {}, "be it: image, mask; name it with"),
        (lambda d: d, {"label_column": "kind"}, "a column 'kind' for the labels, got the columns image"),
        (lambda d: d, {"image_column": "photo"}, "a column 'photo' for the images, got the columns image"),
        (lambda d: d.cast_column("label", Value("float32")), {}, r"classes .*'label' of the train split, got Value\('float32'\)"),
        (lambda d: d.remove_columns("label").add_column("label", [[1]] * 30), {}, r"classes .*'label' .*, got List"),
        (lambda d: {"train": d, "test": d.remove_columns("label")}, {}, "'label' in the test split too, got image; rename"),
        (lambda d: {"train": d, "val": d.rename_column("image", "x")}, {}, "'image' in the validation split too, got x"),
        (lambda d: {"train": d, "test": d.select([])}, {}, "expected images in the test split, got none"),
        (lambda d: {"train": [1, 2]}, {}, r"expected a datasets.Dataset for the train split, got list"),
        (lambda d: {"a": d, "b": d}, {}, "expected a split named 'train', got 'a', 'b'; pass a mapping"),
        (lambda d: {}, {}, "at least one split, got an empty mapping"),
        (lambda d: [1, 2], {}, r"expected a datasets.Dataset, .*got list; datasets.Dataset.from_dict"),
        (lambda d: d.select([0, 3, 6]).cast_column("label", Value("int64")), {}, r"two or more different .*, got '0'"),
        (lambda d: many(1500), {"label_column": "id"}, "got 1500 different values; is it the right column"),
        (
            lambda d: {"train": table(feature=Value("int64")), "test": table(labels=["a"] * 30, feature=Value("string"))},
            {},
            "labels of one kind in 'label' of all splits, got numbers and strings: 0 in train, 'a' in test",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_columns_and_splits(change, arguments, message):
    with pytest.raises(DataError, match=message):
        read(change(table()), **arguments)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1])
def test_shares_are_checked(value):
    for name in ("test_share", "validation_share"):
        with pytest.raises(ValueError, match=f"{name} must be > 0 and < 1, got"):
            DataArguments(**{name: value})
    with pytest.raises(ValueError, match="shuffle_buffer must be >= 1"):
        DataArguments(shuffle_buffer=0)
    with pytest.raises(ValueError, match=r"seed must be a whole number, got 1.5"):
        DataArguments(seed=1.5)


# Labels


@pytest.mark.parametrize(
    ("raw", "kind", "arguments", "names", "note"),
    [
        ([0, 1, 2], "int64", {}, ("0", "1", "2"), None),
        ([0, 1, 2], "uint8", {}, ("0", "1", "2"), None),
        ([1, 2, 3], "int64", {}, ("1", "2", "3"), "labels are not 0 to K-1 (1, 2, 3): classes are numbered in their order"),
        ([7, 10, 300], "int32", {}, ("7", "10", "300"), "labels are not 0 to K-1 (7, 10, 300)"),
        ([-1, 1, 1], "int8", {}, ("-1", "1"), "labels are not 0 to K-1 (-1, 1)"),
        (["b", "a", "c"], "string", {}, ("a", "b", "c"), None),
        (["b", "a", "c"], "large_string", {}, ("a", "b", "c"), None),
        (["b", "a", "c"], "string", {"label_names": ("c", "b", "a")}, ("c", "b", "a"), None),
        ([False, True, True], "bool", {}, ("False", "True"), None),
        ([False, True, True], "bool", {"label_names": ("no", "yes")}, ("no", "yes"), None),
        ([0, 1, 2], "int64", {"label_names": ("x", "y", "z", "w")}, ("x", "y", "z", "w"), "no training image of 1 of 4"),
    ],
)  # fmt: skip
def test_kinds_of_labels(raw, kind, arguments, names, note):
    split = table(labels=raw * 10, feature=Value(kind))
    splits = read(DatasetDict(train=split, validation=split, test=split), **arguments)
    assert splits.label_names == names
    expected = arguments.get("label_names", names)
    texts = [expected[value] if "label_names" in arguments and not isinstance(value, str) else str(value) for value in raw * 10]
    assert [names[label] for label in splits.train.labels] == texts
    assert splits.train.labels.dtype == torch.int64
    assert len(splits.notes) == (note is not None)
    assert note is None or splits.notes[0].startswith(note)


@pytest.mark.parametrize(
    ("role", "row", "value", "feature", "message"),
    [
        ("train", 7, -1, None, "row 7 of the train split: expected one of 0, 1, 2 in 'label', got -1."),
        ("train", 29, None, None, "row 29 of the train split: expected one of 0, 1, 2 in 'label', got None."),
        ("test", 3, -1, None, "row 3 of the test split: expected one of 0, 1, 2 in 'label', got -1."),
        ("validation", 0, None, None, "row 0 of the validation split"),
        ("train", 4, -1, Value("int64"), "row 4 of the train split: expected one of 0, 1, 2 in 'label', got -1."),
        ("train", 4, None, Value("int64"), "row 4 of the train split"),
    ],
)
def test_a_wrong_label_is_named_before_any_image_is_read(role, row, value, feature, message):
    labels = [row % 3 for row in range(30)]
    labels[row] = value
    splits = {name: table(feature=feature, broken=0) for name in ("train", "validation", "test")}
    with pytest.raises(DataError) as caught:
        read(splits | {role: table(labels=labels, feature=feature)})
    assert message in str(caught.value)


def test_a_number_out_of_range_is_named():
    with pytest.raises(DataError, match=r"row 2 of the train split: expected one of 0, 1 in 'label', got 2"):
        read(table(feature=Value("int64")), label_names=("a", "b"))
    words, text = (
        table(labels=["a", "b", "c"] * 10, feature=Value("string")),
        table(3, labels=["a", "d", "a"], feature=Value("string")),
    )
    with pytest.raises(DataError, match=r"row 1 of the test split: expected one of 'a', 'b', 'c' in 'label', got 'd'"):
        read({"train": words, "test": text}, label_names=("a", "b", "c"))


def test_splits_may_name_classes_in_another_order_or_kind():
    raw = [0, 1, 2] * 10
    turned = table(labels=[2 - label for label in raw], feature=ClassLabel(names=NAMES[::-1]))
    words = table(labels=[NAMES[label] for label in raw], feature=Value("string"))
    numbers = table(labels=raw, feature=Value("int64"))
    splits = read({"train": table(), "validation": turned, "test": words})
    assert splits.train.labels.tolist() == splits.validation.labels.tolist() == splits.test.labels.tolist() == raw
    assert read({"train": table(), "validation": numbers, "test": turned}).validation.labels.tolist() == raw
    with pytest.raises(DataError, match=r"row 0 of the test split: expected one of 'cat', 'dog', 'emu' in 'label', got 'cow'"):
        read({"train": table(), "test": table(feature=ClassLabel(names=["cow", "dog", "emu"]))})


def test_labels_are_matched_to_the_classes_of_a_model_by_name():
    names = ("emu", "bee", "cat", "dog")
    for data in (table(), table(labels=[NAMES[row % 3] for row in range(30)], feature=Value("string"))):
        splits = read({"train": data, "test": data, "validation": data}, label_names=names)
        assert splits.label_names == names
        assert splits.test.labels.tolist() == [2, 3, 0] * 10
    splits = read({"train": table(feature=Value("int64")), "test": table(feature=Value("int64"))}, label_names=NAMES)
    assert splits.test.labels.tolist() == [0, 1, 2] * 10  # numbers without names are positions
    ones = {name: table(labels=[1, 2, 3] * 10, feature=Value("int64")) for name in ("train", "test")}
    assert (
        read(ones, label_names=read(ones).label_names).test.labels.tolist() == [0, 1, 2] * 10
    )  # "1" is the name of the first class
    with pytest.raises(DataError, match=r"row 0 of the train split: expected one of 'cow', 'dog', 'emu' in 'label', got 'cat'"):
        read(table(), label_names=("cow", "dog", "emu"))


def test_label_names_beside_a_class_label_are_refused_aloud():
    splits = read(table())
    renamed = load_splits(table(), POLICY, DataArguments(label_names=("x", "y", "z")))
    assert renamed.label_names == splits.label_names
    assert "label_names is not used: the label column has names of its own" in renamed.notes


def test_labels_are_read_without_images():
    split = table(broken=5)
    with pytest.raises(DataError, match="row 5 of the train split: expected a readable picture"):
        read(split)
    assert columns.undecoded(split, "label")[:]["label"] == [row % 3 for row in range(30)]


# Pictures


def test_a_broken_picture_is_named():
    with pytest.raises(DataError, match=r"row 17 of the validation split: expected a readable picture, .* Remove or repair it\."):
        read({"train": table(), "validation": table(broken=17), "test": table()})
    missing = Dataset.from_dict(
        {"image": [{"bytes": encoded(image), "path": None} for image in pixels(5)] + [None], "label": [0, 1] * 3},
        Features(image=Image(), label=ClassLabel(names=NAMES)),
    )
    with pytest.raises(DataError, match=r"row 5 of the train split: expected a picture.* got NoneType"):
        read(missing)
    shuffled = table(30, broken=17).shuffle(seed=0)
    with pytest.raises(
        DataError, match=f"row {shuffled.with_format(None)._indices['indices'].to_pylist().index(17)} of the train"
    ):
        read(shuffled)


def test_pictures_of_every_kind_in_one_set():
    rng = np.random.default_rng(0)
    rgb, gray = rng.integers(0, 256, (11, 9, 3)).astype(np.uint8), rng.integers(0, 256, (8, 8)).astype(np.uint8)
    exif = Picture.Exif()
    exif[0x0112] = 6
    palette, cmyk = io.BytesIO(), io.BytesIO()
    Picture.fromarray(rgb).convert("P").save(palette, "PNG", transparency=bytes(range(256)))
    Picture.fromarray(rgb).convert("CMYK").save(cmyk, "JPEG")
    files = [
        encoded(gray), encoded(np.dstack([rgb, rgb[:, :, :1]])), palette.getvalue(), cmyk.getvalue(), encoded(gray > 100),
        encoded(gray.astype(np.uint16) * 257), encoded(gray.astype(np.float32) / 255, "TIFF"), encoded(rgb, "JPEG", exif=exif),
        encoded(rng.integers(0, 256, (3, 40, 3)).astype(np.uint8), "WEBP"), encoded(rgb[:1, :1]),
    ]  # fmt: skip
    data = Dataset.from_dict(
        {"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1] * 5},
        Features(image=Image(), label=ClassLabel(names=NAMES)),
    )
    splits = read({"train": data, "validation": data, "test": data})
    assert torch.equal(splits.train.images, torch.stack([POLICY(file) for file in files]))
    for index in (0, 5, 6):
        assert torch.equal(splits.train.images[index], torch.from_numpy(gray).expand(3, -1, -1))
    assert read(data, ImagePolicy(size=(8, 8), mode="L")).train.images.shape[1] == 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_arrays_as_pictures(dtype):
    gray = np.random.default_rng(0).integers(0, 256, (12, 8, 8))
    scaled = {
        "uint8": gray.astype(np.uint8),
        "uint16": (gray * 257).astype(np.uint16),
        "float32": (gray / 255).astype(np.float32),
    }[dtype]
    data = Dataset.from_dict({"image": scaled, "label": [0, 1] * 6}, Features(image=Array2D((8, 8), dtype), label=Value("int64")))
    splits = read({"train": data, "validation": data, "test": data})
    assert torch.equal(splits.train.images, torch.from_numpy(gray.astype(np.uint8))[:, None].expand(-1, 3, -1, -1))


def test_formats_and_transforms_of_the_user_do_not_matter():
    expected = read(table())
    for changed in (table().with_format("torch"), table().with_format("numpy", columns=["label"])):
        assert torch.equal(read(changed).train.images, expected.train.images)
        assert torch.equal(read(changed).train.labels, expected.train.labels)
    splits = read(table().with_transform(lambda batch: {"image": [0], "label": [9]}))
    assert torch.equal(splits.train.images, expected.train.images)
    assert splits.notes[0].startswith("the transform of the train split (set_transform) is not used")


@pytest.mark.parametrize(
    ("side", "size", "text"),
    [
        (24, 8, None),
        (25, 8, r"pictures are about 25 pixels wide and the source takes 8: most detail is lost, .*after resizing. .*resnet50"),
        (97, 32, "about 97 pixels wide and the source takes 32"),
        (673, 224, r"after resizing. A source for larger inputs keeps more, e.g. timm's convnext_base.fb_in22k_ft_in1k_384"),
        (1153, 384, "after resizing$"),
    ],
)
def test_large_pictures_are_pointed_out(side, size, text):
    image = {"bytes": encoded(np.zeros((side, side + 5, 3), dtype=np.uint8)), "path": None}
    data = Dataset.from_dict({"image": [image] * 3, "label": [0, 1, 0]}, Features(image=Image(), label=ClassLabel(names=NAMES)))
    notes = [
        note
        for note in read({"train": data, "validation": data, "test": data}, ImagePolicy(size=(size, size))).notes
        if "pixels" in note
    ]
    assert len(notes) == (text is not None)
    if text is not None:
        assert re.search(text, notes[0])
        if "timm's" in notes[0]:
            name = notes[0].split("timm's ")[1].split()[0]
            assert timm.get_pretrained_cfg(name).input_size[1] > size


# Larger than memory


@pytest.mark.parametrize("workers", [0, 2])
def test_large_sets_are_decoded_when_drawn(workers, monkeypatch):
    data = {"train": table(60), "test": table(12, seed=1)}
    whole = read(data)
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 15 * 3 * 8 * 8)
    monkeypatch.setattr(pictures.os, "cpu_count", lambda: workers)
    splits = read(data)
    assert [part.in_memory for part in (splits.train, splits.validation, splits.test)] == [False, False, True]
    assert splits.train.workers == max(workers, 1)
    splits.train.workers = workers
    assert splits.train.description["num_images"] == len(splits.train) == 54
    for lazy, held in ((splits.train, whole.train), (splits.validation, whole.validation)):
        for one, other in zip(lazy.batches(7), held.batches(7), strict=True):
            assert torch.equal(one.images, other.images)
    draws = [list(part.training_batches(batch_size=8, seed=2, start=1, stop=9)) for part in (splits.train, whole.train)]
    for one, other in zip(*draws, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_found_late_is_named(workers, monkeypatch):
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    splits = read({"train": table(30, broken=21), "validation": table(6), "test": table(6)})
    splits.train.workers = workers
    with pytest.raises(DataError) as caught:
        list(splits.train.training_batches(batch_size=5, seed=0, start=0, stop=6))
    assert str(caught.value).startswith("row 21 of the train split: expected a readable picture, got ")
    assert str(caught.value).endswith("Remove or repair it.")
    assert "Traceback" not in str(caught.value)


# Files


def folder(root: Path, classes=("cat", "dog"), number: int = 6, seed: int = 0) -> Path:
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for row, image in enumerate(pixels(number, seed + index)):
            Picture.fromarray(image).save(root / name / f"{row}.png")
    return root


def test_a_folder_of_images(tmp_path):
    splits = read(folder(tmp_path / "pets"))
    assert splits.label_names == ("cat", "dog")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 2, 2]
    assert splits.train.description["id"] == "pets"
    assert str(tmp_path) not in str(splits.train.description)
    cat = images_of(toy_data(6, size=8, seed=0))
    for part in (splits.train, splits.validation, splits.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert (tuple(image.flatten().tolist()) in cat) == (label == 0)


def test_a_folder_with_splits(tmp_path):
    for seed, name in enumerate(("Train", "val", "test")):
        folder(tmp_path / "my [1] pets" / name, seed=10 * seed)
    (tmp_path / "my [1] pets" / "notes").mkdir()
    splits = read(str(tmp_path / "my [1] pets"))
    assert images_of(splits.test) == images_of(toy_data(6, size=8, seed=20), toy_data(6, size=8, seed=21))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [12, 12, 12]
    assert splits.notes == ("folders that are not used, as there is Train, test, val: 'notes'",)


def test_words_in_names_of_folders_and_files_do_not_make_splits(tmp_path):
    root = folder(tmp_path / "test-photos", ("boat", "bullet train", "crash test"))
    (root / "boat" / "0.png").rename(root / "boat" / "test_0.png")
    splits = read(root)
    assert splits.label_names == ("boat", "bullet train", "crash test")
    assert sum(len(part) for part in (splits.train, splits.validation, splits.test)) == 18


def test_a_broken_file_in_a_folder_is_named(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "dog" / "3.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"row 9 of the train split: expected a readable picture in 3\.png, got bytes of no known kind"
    ):
        read(root)
    with pytest.raises(DataError, match=r"one label column, but the columns are image; .*one folder per class"):
        read(root / "cat")


def test_pictures_beside_the_folders_of_classes_are_left_out_aloud(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "cat" / "0.png").rename(root / "cover.PNG")
    splits = read(root)
    assert splits.label_names == ("cat", "dog")
    assert sum(len(part) for part in (splits.train, splits.validation, splits.test)) == 11
    assert "they lie beside the folders of the classes in pets: 'cover.PNG'" in splits.notes[0]


def test_a_damaged_folder_of_save_to_disk(tmp_path):
    table(12).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"got arrow files without its state\.json or dataset_dict\.json; save the data again"):
        read(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"expected what save_to_disk wrote in .*saved: KeyError.*; save it again"):
        read(tmp_path / "saved")


def test_a_damaged_parquet_file_with_what_is_wrong(tmp_path):
    table(20).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"can't be read: .*Parquet magic bytes not found"):
        read(tmp_path / "train.parquet")


def test_rows_name_pictures_in_the_folder_of_the_data_only(tmp_path):
    root = tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    paths = [root / "pictures" / f"{row}.png" for row in range(10)]
    for path, image in zip([*paths, tmp_path / "other.png"], pixels(11), strict=True):
        Picture.fromarray(image).save(path)

    def written(last: str) -> Path:
        names = [f"pictures/{row}.png" for row in range(9)] + [last]
        rows = [{"image": {"bytes": None, "path": name}, "label": "ab"[row % 2]} for row, name in enumerate(names)]
        (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return root / "rows.jsonl"

    splits = read(written(str(paths[9])))
    found = images_of(splits.train, splits.validation, splits.test)
    assert sorted(found) == sorted(tuple(image.transpose(2, 0, 1).flatten().tolist()) for image in pixels(11)[:10])
    for elsewhere in ("../other.png", str(tmp_path / "other.png"), "ftp://127.0.0.1/x.png", "http://127.0.0.1/x.png"):
        with pytest.raises(DataError, match=r"row 9 of the train split: expected a picture inside .*data, got the path"):
            read(written(elsewhere))


def test_streams_and_data_of_the_hub_name_no_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "cache").mkdir()
    for place in ("data", "cache", "."):
        Picture.fromarray(pixels(1)[0]).save(tmp_path / place / "a.png")

    def rows(path) -> Dataset:
        return Dataset.from_dict({"image": [str(path)] * 60, "label": [0, 1] * 30}).cast_column("image", Image(decode=False))

    rows(tmp_path / "a.png").to_parquet(tmp_path / "data" / "rows.parquet")
    with pytest.raises(DataError, match=r"row [0-9]+ of the .* stream: expected a picture inside .*data, got the path"):
        read(tmp_path / "data" / "rows.parquet", streaming=True, label_names=("cat", "dog"), validation_share=0.5)
    hub = confinement.hub_confinement()
    assert hub(str(tmp_path / "cache" / "a.png")) == tmp_path / "cache" / "a.png"
    assert hub({"bytes": b"1", "path": "/etc/passwd"}) == {"bytes": b"1", "path": "/etc/passwd"}
    for address in ("hf://datasets/org/name/a.png", "zip://a.png::hf://datasets/org/name/b.zip"):
        assert hub({"bytes": None, "path": address}) == address
    chained = ("file:///etc/passwd::hf://datasets/x", "/etc/passwd::hf://x")
    for elsewhere in (str(tmp_path / "a.png"), "http://127.0.0.1/a.png", "zip://hf://a::/etc/x.zip", *chained, "../a.png"):
        with pytest.raises(ValueError, match="expected a picture inside"):
            hub({"bytes": None, "path": elsewhere})


def test_no_name_of_data():
    with pytest.raises(DataError, match="expected a folder, a parquet file or a Hub id, got ''"):
        read("")


def test_parquet(tmp_path):
    data = {"train": table(20), "more": table(10, seed=1), "test": table(9, seed=2)}
    (tmp_path / "set" / "data").mkdir(parents=True)
    data["train"].to_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet")
    data["more"].to_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet")
    data["test"].to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    splits = read(tmp_path / "set")
    assert images_of(splits.train, splits.validation) == images_of(toy_data(20, size=8, seed=0), toy_data(10, size=8, seed=1))
    assert torch.equal(splits.test.images, toy_data(9, size=8, seed=2).images)
    assert splits.label_names == tuple(NAMES)
    file = read(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    assert images_of(file.train, file.validation, file.test) == images_of(splits.test)
    assert not any("divided" in note for note in file.notes)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk(tmp_path, streaming):
    DatasetDict(train=table(30), validation=table(9, seed=1), test=table(12, seed=2)).save_to_disk(tmp_path / "saved")
    splits = read(tmp_path / "saved", streaming=streaming)
    assert splits.train.description["id"] == "saved"
    assert torch.equal(splits.validation.images, toy_data(9, size=8, seed=1).images)
    assert torch.equal(next(splits.test.batches(12)).images, toy_data(12, size=8, seed=2).images)
    assert isinstance(splits.train, StreamingData) == streaming


def test_parquet_without_metadata_of_datasets(tmp_path):
    rows = [{"image": {"bytes": encoded(image), "path": None}, "label": NAMES[row % 3]} for row, image in enumerate(pixels(12))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plain.parquet")
    splits = read(tmp_path / "plain.parquet")
    assert splits.label_names == tuple(NAMES)
    assert images_of(splits.train, splits.validation, splits.test) == images_of(toy_data(12, size=8, seed=0))


def test_paths_that_can_not_be_read(tmp_path):
    with pytest.raises(DataError, match="which does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="which does not exist"):
        read("./nowhere")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a folder or a file of one of the kinds \.parquet, .*got .*a\.txt"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"a\.csv\. Beside the pictures, as metadata\.csv with a column file_name"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("a")
    with pytest.raises(DataError, match=r"the data set '.*a\.parquet' can't be read"):
        read(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the data set '.*empty' can't be read"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match=r"the data set 'me/not-there' can't be read"):
        read("me/not-there")


def test_a_data_set_of_the_hub(monkeypatch, caplog):
    commit, calls = "1234567890" * 4, []

    def load_dataset(path, **kwargs):
        calls.append((path, kwargs))
        return DatasetDict(train=table(), test=table())

    class Api:
        def dataset_info(self, repo_id, revision=None):
            return type("Info", (), {"sha": commit})

    monkeypatch.setattr(opening.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(opening.huggingface_hub, "HfApi", Api)
    splits = read("me/pets", config="small", revision="main")
    assert calls == [("me/pets", {"name": "small", "revision": commit, "streaming": False})]
    assert {"id": "me/pets", "config": "small", "revision": commit}.items() <= splits.train.description.items()
    monkeypatch.setattr(opening.huggingface_hub, "HfApi", None)  # without a network the copy in the cache is read
    assert read("me/pets", revision="v1").train.description["revision"] == "v1"
    assert "the Hub can't be reached for the data set 'me/pets', which is no file or folder here" in caplog.text


def test_the_cache_tells_where_a_data_set_came_from():
    class Cached:
        cache_files = ({"filename": "/home/me/cache/me___pets/default/0.0.0/" + "0123456789" * 4 + "/pets-train.arrow"},)

    assert opening.origin_of(Cached()) == {"id": "me/pets", "revision": "0123456789" * 4}
    assert opening.origin_of(table())["id"] == "data in memory"


def test_the_name_of_a_loader_is_no_name_of_the_data(tmp_path):
    table(20).to_parquet(tmp_path / "a.parquet")
    read_by_hand = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"))
    assert read(read_by_hand).train.description["id"] == "data in memory"


# Streams


def test_a_stream_is_divided_by_position():
    splits = read(table(300).to_iterable_dataset(num_shards=3), validation_share=0.25)
    assert isinstance(splits.train, StreamingData)
    assert isinstance(splits.test, StreamingData)
    parts = [torch.cat([batch.images for batch in part.batches(50)]) for part in (splits.train, splits.validation, splits.test)]
    found = sorted(tuple(image.flatten().tolist()) for part in parts for image in part)
    assert found == images_of(toy_data(300, size=8, seed=0))
    assert 40 <= len(parts[2]) <= 80
    assert 40 <= len(parts[1]) <= 80
    assert splits.notes == (
        "no test split: 20% of the stream, chosen by position, seed 0, are kept for the report and not trained on",
        "no validation split: 20% of the stream, chosen by position, seed 0, are for validation",
    )
    assert splits.test.description["split"] == "test (split off)"
    assert splits.train.description["image_policy"]["size"] == [8, 8]
    json.dumps(splits.train.description)
    other = read(table(300).to_iterable_dataset(num_shards=3), validation_share=0.25, seed=1)
    assert other.train.description["fingerprint"] != splits.train.description["fingerprint"]


def test_a_dict_of_streams():
    data = {"train": table(60), "validation": table(9, seed=1), "test": table(12, seed=2)}
    splits = read({name: split.to_iterable_dataset() for name, split in data.items()})
    assert splits.notes == ()
    assert torch.equal(splits.validation.images, toy_data(9, size=8, seed=1).images)
    (batch,) = splits.test.batches(50)
    assert torch.equal(batch.images, toy_data(12, size=8, seed=2).images)
    batches = list(splits.train.training_batches(batch_size=16, seed=0, start=0, stop=3))
    indices = torch.cat([batch.indices for batch in batches])
    assert torch.equal(torch.cat([batch.images for batch in batches]), toy_data(60, size=8, seed=0).images[indices])
    mixed = read({"train": data["train"].to_iterable_dataset(), "validation": data["validation"], "test": data["test"]})
    (same,) = mixed.test.batches(50)
    assert torch.equal(same.images, batch.images)


def test_a_folder_and_a_parquet_file_as_streams(tmp_path):
    for seed, name in enumerate(("train", "test")):
        folder(tmp_path / "pets" / name, seed=10 * seed)
    splits = read(tmp_path / "pets", streaming=True, validation_share=0.4)
    assert isinstance(splits.train, StreamingData)
    assert splits.label_names == ("cat", "dog")
    (batch,) = splits.test.batches(50)
    assert torch.equal(batch.images[:6], toy_data(6, size=8, seed=10).images)
    assert batch.labels.tolist() == [0] * 6 + [1] * 6
    table(60).to_parquet(tmp_path / "a.parquet")
    parquet = read(tmp_path / "a.parquet", streaming=True)
    assert 0 < len(next(parquet.test.batches(60)).labels) < 30


def test_labels_of_streams():
    unlabelled = {"train": table().to_iterable_dataset(), "test": table(6, labels=[-1] * 6).to_iterable_dataset()}
    splits = read(unlabelled)
    assert splits.notes[0] == "the test split has no labels (the first is -1 or missing): it is not used"
    assert splits.notes[1].startswith("no test split: 20% of the stream")
    turned = table(labels=[2, 1, 0] * 10, feature=ClassLabel(names=NAMES[::-1])).to_iterable_dataset()
    parts = {"train": table().to_iterable_dataset(), "validation": table().to_iterable_dataset(), "test": turned}
    assert next(read(parts).test.batches(6)).labels.tolist() == [0, 1, 2] * 2
    assert next(read(parts, label_names=("emu", "cat", "dog")).test.batches(6)).labels.tolist() == [1, 2, 0] * 2
    numbers = table(feature=Value("int64")).to_iterable_dataset()
    with pytest.raises(
        DataError, match="expected class names for the labels in 'label' of a stream, got none; pass label_names="
    ):
        read(numbers)
    named = load_splits(numbers, POLICY, DataArguments(label_names=tuple(NAMES)))
    assert named.label_names == tuple(NAMES)
    with pytest.raises(DataError, match=r"row \d+ of the .* stream: expected one of 0, 1, 2.* in 'label', got -1"):
        list(read({"train": parts["train"], "test": table(6, labels=[0, 1, -1] * 2).to_iterable_dataset()}).test.batches(6))


def test_a_broken_picture_in_a_stream_is_named():
    splits = read(
        {name: table(30, broken=17 if name == "test" else None).to_iterable_dataset() for name in ("train", "test", "val")}
    )
    with pytest.raises(DataError, match=r"row 17 of the test stream: expected a readable picture, .* Remove or repair it"):
        list(splits.test.batches(10))


def test_a_stream_of_mapped_examples():
    mapped = table().to_iterable_dataset().map(lambda example: {"image": example["image"].rotate(90), "label": example["label"]})
    assert mapped.features is None  # what ``datasets`` doesn't know, the first example shows
    splits = load_splits({"train": mapped, "val": mapped, "test": mapped}, POLICY, DataArguments(label_names=tuple(NAMES)))
    assert torch.equal(next(splits.test.batches(30)).images, toy_data(30, size=8, seed=0).images.rot90(dims=(2, 3)))


def test_a_sorted_stream_is_pointed_out(monkeypatch):
    labels = sorted(row % 10 for row in range(1000))
    data = table(1000, labels=labels, feature=ClassLabel(names=list("abcdefghij"))).to_iterable_dataset()
    assert not read({"train": data, "validation": data, "test": data}).notes
    monkeypatch.setattr(streams, "_HELD", 100)
    (note,) = read({"train": data, "validation": data, "test": data}).notes
    assert note.startswith("the 100 images for validation show only 1 of 10 classes: the stream seems sorted")


def test_an_empty_stream():
    empty = table().to_iterable_dataset().filter(lambda example: False)
    with pytest.raises(DataError, match="expected images in the"):
        read(empty)


def test_columns_of_a_stream():
    with pytest.raises(DataError, match="one label column, but the columns are image"):
        read(table().remove_columns("label").to_iterable_dataset())


# Real images


@pytest.mark.skipif(not (SHARED / "svhn_mini").exists(), reason="needs the data in ../shared/data")
def test_real_images():
    splits = read(SHARED / "svhn_mini", ImagePolicy())
    assert len(splits.train) + len(splits.validation) == 759
    assert len(splits.test) == 324
    assert splits.label_names == tuple("0123456789")
    streamed = read(SHARED / "svhn_mini", ImagePolicy(), streaming=True)
    assert torch.equal(torch.cat([batch.images for batch in streamed.test.batches(100)]), splits.test.images)


def test_data_can_be_named(tmp_path):
    for data in (folder(tmp_path / "pets"), table(12)):
        assert read(data, id="my pets").train.description["id"] == "my pets"


def test_what_a_model_is_measured_on():
    lone, both = table(30), DatasetDict(train=table(30), test=table(12, seed=2))
    test, notes = load_test_split(both, POLICY)
    assert (len(test), test.description["split"], notes) == (12, "test", ())
    trained = read(lone, seed=4, test_share=0.3)
    aside, notes = load_test_split(lone, POLICY, trained_on=trained.train.description)
    assert torch.equal(aside.images, trained.test.images)
    assert len(notes) == 1
    assert notes[0].startswith("no test split: 30% of the training images")
    assert notes[0].endswith("were set aside when the model was trained, and are measured")
    with pytest.raises(DataError, match=r"got 'cat'\. A model is measured on the classes that it has; fine-tune it for others"):
        load_test_split(both, POLICY, label_names=("cow", "dog", "emu"))
    whole, notes = load_test_split(lone, POLICY, trained_on={"id": "something else"})
    assert len(whole) == 30
    assert "the model must not have been trained on it" in notes[0]
    only, notes = load_test_split(DatasetDict(test=table(9)), POLICY)
    assert (len(only), notes) == (9, ())
    renamed = trained.train.description | {"id": "me/other"}
    aside, notes = load_test_split(lone, POLICY, trained_on=renamed)  # known by its images
    assert torch.equal(aside.images, trained.test.images)
    assert len(notes) == 1
    again = load_splits(lone, POLICY, trained_on=renamed)
    assert torch.equal(again.test.images, trained.test.images)
    for others in (table(30, seed=1), table(33)):  # other images, and another number of them
        assert len(load_test_split(others, POLICY, trained_on=renamed)[0]) == len(others)
    with pytest.raises(DataError, match="the data have changed since"):
        load_test_split(table(33), POLICY, trained_on=trained.train.description)


def test_a_model_of_a_stream_is_measured_on_what_the_stream_set_aside(tmp_path):
    table(300).to_parquet(tmp_path / "rows.parquet")
    trained = read(tmp_path / "rows.parquet", streaming=True, seed=3)
    told = trained.train.description
    measured, _ = load_test_split(tmp_path / "rows.parquet", POLICY, trained_on=told)
    assert images_of(next(measured.batches(300))) == images_of(next(trained.test.batches(300)))
    assert isinstance(load_splits(tmp_path / "rows.parquet", POLICY, trained_on=told).train, StreamingData)
    with pytest.raises(DataError, match="expected a stream, as the model was trained on one"):
        load_test_split(table(300), POLICY, DataArguments(id="rows.parquet"), trained_on=told)


def test_images_that_changed_places_are_noticed():
    """The labels are where they were, and so are the indices of the part that was set aside."""
    lone = table(30)
    labels = np.array(lone["label"])
    order = np.arange(30)
    for label in set(labels.tolist()):
        order[labels == label] = order[labels == label][::-1]
    moved, trained_on = lone.select(order), read(lone).train.description
    assert moved["label"] == lone["label"]
    with pytest.raises(DataError, match="or their files have other names"):
        load_test_split(moved, POLICY, trained_on=trained_on)
    del trained_on["split_off"]["pixels"]  # an older model
    assert len(load_test_split(moved, POLICY, trained_on=trained_on)[0]) == 6


def test_a_test_split_without_images():
    with pytest.raises(DataError, match="expected at least one image in the split 'test', got none"):
        load_test_split(DatasetDict(test=table(9).select([])), POLICY)


@pytest.mark.parametrize("names", [("a", "a", "c"), ("a",)])
def test_classes_of_a_stream_are_different(names):
    stream = table(feature=Value("int64")).to_iterable_dataset()
    with pytest.raises(DataError, match="expected two or more different classes in 'label'"):
        read(stream, label_names=names)
