import itertools

import datasets
import numpy as np
import pytest
import torch
from conftest import toy_data

from cartl_hub.data import Augmentation, DataError, ImageData, StreamingData
from cartl_hub.images import ImagePolicy
from cartl_hub.randomness import CROP, FLIP, image_keys, uniform


def augmented(image: torch.Tensor, key: torch.Tensor, padding: int, flip: bool) -> torch.Tensor:
    """The slow reference: pad, crop, mirror one image."""
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    top, left = (int(x) for x in uniform(key[None], (2,), stream=CROP)[0] * (2 * padding + 1)) if padding else (0, 0)
    cropped = padded[:, top : top + height, left : left + width]
    return cropped.flip(2) if flip and uniform(key[None], stream=FLIP)[0] < 0.5 else cropped


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("padding", "flip"), [(4, True), (0, True), (2, False), (0, False)])
def test_augmentation_equals_the_slow_reference(padding, flip, dtype):
    images = (torch.rand(40, 3, 8, 11) * 255).to(dtype)
    keys = image_keys(3, 5, torch.arange(40))
    found = Augmentation(padding=padding, flip=flip)(images, keys)
    assert found.dtype == dtype
    for image, key, one in zip(images, keys, found, strict=True):
        assert torch.equal(one, augmented(image, key, padding, flip))


def test_augmentation_depends_on_the_image_and_not_on_its_batch():
    images, keys = torch.rand(16, 3, 8, 8), image_keys(0, 1, torch.arange(16))
    together, order = Augmentation()(images, keys), torch.randperm(16)
    assert torch.equal(Augmentation()(images[order], keys[order]), together[order])
    assert torch.equal(Augmentation()(images[5:7], keys[5:7]), together[5:7])
    other = Augmentation()(images, image_keys(0, 2, torch.arange(16)))
    assert not torch.equal(other, together)


def test_flips_are_half_and_crops_uniform():
    number, size = 20_000, 3
    image = torch.arange(1, size * size + 1, dtype=torch.float32).view(1, 1, size, size)
    keys = image_keys(7, 0, torch.arange(number))
    flipped = Augmentation(padding=0)(image.expand(number, -1, -1, -1), keys)[:, 0, 0, 0] == 3
    assert flipped.float().mean() == pytest.approx(0.5, abs=4 * 0.5 / number**0.5)
    dot = torch.zeros(1, 1, 9, 9)
    dot[0, 0, 4, 4] = 1
    moved = Augmentation(padding=4, flip=False)(dot.expand(number, -1, -1, -1), keys)
    counts, expected = moved.sum((0, 1)), number / 81
    assert counts.sum() == number  # the dot never leaves the picture
    assert counts.sub(expected).abs().max() < 5 * expected**0.5
    chi_squared = float((counts - expected).square().sum() / expected)
    assert 40 < chi_squared < 130  # 80 degrees of freedom
    assert abs(np.corrcoef(flipped.numpy(), moved.argmax(3).amax((1, 2)).numpy())[0, 1]) < 0.03


def drawn(data, **kwargs) -> list:
    return list(data.training_batches(**{"batch_size": 5, "seed": 3, "start": 0, "stop": 11} | kwargs))


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        and a.epoch == b.epoch
        for a, b in zip(first, second, strict=True)
    )


def test_each_epoch_has_each_image_once_in_another_order():
    data = toy_data(23)
    assert data.steps_per_epoch(5) == 4
    batches = drawn(data, stop=8)
    assert [batch.epoch for batch in batches] == [0] * 4 + [1] * 4
    epochs = [torch.cat([batch.indices for batch in batches if batch.epoch == epoch]) for epoch in (0, 1)]
    for indices in epochs:
        assert len(set(indices.tolist())) == 20
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0], torch.cat([batch.indices for batch in drawn(data, stop=4, seed=4)]))
    for batch in batches:
        assert torch.equal(batch.images, data.images[batch.indices])
        assert torch.equal(batch.labels, data.labels[batch.indices])


def test_a_small_set_is_one_batch_per_epoch():
    batches = drawn(toy_data(3), stop=2)
    assert [sorted(batch.indices.tolist()) for batch in batches] == [[0, 1, 2]] * 2


def test_all_images_in_order():
    data = toy_data(23)
    assert torch.equal(torch.cat([batch.images for batch in data.batches(5)]), data.images)
    assert [len(batch.labels) for batch in data.batches(5)] == [5, 5, 5, 5, 3]


def test_subset_keeps_images_labels_and_description():
    data = toy_data(23)
    part = data.subset([4, 2, 19], split="some")
    assert torch.equal(part.images, data.images[[4, 2, 19]])
    assert torch.equal(part.labels, data.labels[[4, 2, 19]])
    assert part.description == {"id": "toy", "split": "some", "num_images": 3}  # the whole's fingerprint is not the part's


def test_the_fingerprint_is_of_the_content():
    data = toy_data(23)
    assert data.fingerprint() == toy_data(23).fingerprint() == data.subset(range(23)).fingerprint()
    other = toy_data(23)
    other.images[7, 1, 4, 4] ^= 1
    assert len({part.fingerprint() for part in (data, other, toy_data(22), data.subset(range(22, -1, -1)), lazy(data))}) == 5
    held = ImageData(data.labels, data.label_names, data.images.contiguous(memory_format=torch.channels_last))
    assert held.fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.rand(6, 3, 8, 8)},
            r"expected uint8 images \[N, C, H, W\], got torch.float32 \[6, 3, 8, 8\]; for floats",
        ),
        ({"images": torch.zeros(6, 8, 8, dtype=torch.uint8)}, r"expected uint8 images .* got torch.uint8 \[6, 8, 8\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "expected a label for each of the 6 images, got 5 labels"),
        ({"labels": torch.zeros(6)}, r"expected int64 labels \[N\], got torch.float32 \[6\]"),
        ({"labels": torch.zeros(6, 1, dtype=torch.int64)}, r"expected int64 labels \[N\], got torch.int64 \[6, 1\]"),
        ({"labels": torch.arange(6)}, "expected labels from 0 to 2, as there are 3 label names, got labels from 0 to 5"),
        ({"labels": torch.arange(6) % 3 - 1}, "expected labels from 0 to 2, .* got labels from -1 to 1"),
    ],
)
def test_images_and_labels_that_do_not_fit(changes, message):
    fitting = {
        "labels": torch.arange(6) % 3,
        "label_names": ("a", "b", "c"),
        "images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8),
    }
    assert len(ImageData(**fitting)) == 6
    with pytest.raises(DataError, match=message):
        ImageData(**fitting | changes)


@pytest.mark.parametrize("padding", [-1, 1.5])
def test_padding_out_of_range(padding):
    with pytest.raises(ValueError, match="padding must be"):
        Augmentation(padding=padding)


class Lazy:
    """Images that are made when they are drawn; row ``broken`` can't be."""

    def __init__(self, images: torch.Tensor, broken: int = -1):
        self.images, self.broken = images, broken

    def __call__(self, rows):
        if self.broken in rows:
            raise DataError(f"row {self.broken} of the train split: expected a readable picture.")
        return self.images[list(rows)]


def lazy(data: ImageData, workers: int = 0, broken: int = -1) -> ImageData:
    return ImageData(data.labels, data.label_names, Lazy(data.images, broken), data.policy, data.description, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_decoded_when_drawn_are_the_same_batches(workers):
    data = toy_data(23)
    state = torch.get_rng_state()
    assert same(drawn(lazy(data, workers)), drawn(data))
    assert same(drawn(lazy(data, workers), start=3, stop=9), drawn(data)[3:9])
    assert same(list(lazy(data, workers).batches(7)), list(data.batches(7)))
    kept = [3, 1, 20, 7, 8, 22]
    assert same(drawn(lazy(data, workers).subset(kept).subset([5, 0, 1])), drawn(data.subset(kept).subset([5, 0, 1])))
    assert torch.equal(lazy(data, workers).get(torch.tensor([4, 0])), data.get(torch.tensor([4, 0])))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_breaks_late_is_named(workers):
    data = lazy(toy_data(20), workers, broken=13)
    batches = data.batches(5)
    assert torch.equal(torch.cat([next(batches).indices for _ in range(2)]), torch.arange(10))
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == "row 13 of the train split: expected a readable picture."


# Streams


def stream(number: int = 40, shards: int = 1) -> datasets.IterableDataset:
    images = toy_data(number, size=4).images.permute(0, 2, 3, 1).numpy()
    table = datasets.Dataset.from_dict({"image": images.tolist(), "label": [row % 3 for row in range(number)]})
    return table.to_iterable_dataset(num_shards=shards)


def streaming(source, **kwargs) -> StreamingData:
    return StreamingData(source, ("a", "b", "c"), ImagePolicy(size=(4, 4)), "image", "label", **kwargs)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_stream_in_order(shards):
    data, expected = streaming(stream(shards=shards)), toy_data(40, size=4)
    assert data.steps_per_epoch(7) is None
    batches = list(data.batches(7))
    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 7, 7, 5]
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected.images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), expected.labels)
    assert len(set(torch.cat([batch.indices for batch in batches]).tolist())) == 40


@pytest.mark.parametrize("shards", [1, 4])
def test_a_stream_is_shuffled_anew_in_each_epoch(shards):
    data = streaming(stream(shards=shards), shuffle_buffer=8)
    batches = drawn(data, batch_size=7, stop=10)
    assert [batch.epoch for batch in batches] == [0] * 5 + [1] * 5
    epochs = [torch.cat([batch.indices for batch in batches if batch.epoch == epoch]).tolist() for epoch in (0, 1)]
    assert all(len(set(indices)) == 35 for indices in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert same(batches, drawn(data, batch_size=7, stop=10))
    assert not same(batches, drawn(data, batch_size=7, stop=10, seed=4))


def test_pieces_of_a_stream_come_in_another_order_in_each_epoch():
    first = [
        batch.indices[0].item() >> 40 for batch in drawn(streaming(stream(shards=4), shuffle_buffer=1), batch_size=40, stop=6)
    ]
    assert len(set(first)) > 1


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("start", [1, 4, 5, 6, 13, 24])
def test_a_stream_resumes_exactly(start, shards):
    data = streaming(stream(shards=shards), shuffle_buffer=8, part=(0.0, 0.9))
    per_epoch = sum(batch.epoch == 0 for batch in drawn(data, batch_size=7, stop=10))
    assert per_epoch in (4, 5)
    assert same(drawn(data, batch_size=7, start=start, stop=26), drawn(data, batch_size=7, stop=26)[start:])


def test_a_resumed_stream_does_not_read_every_epoch():
    reads = []

    def examples():
        reads.append(1)
        yield from ({"image": np.zeros((4, 4), dtype=np.uint8).tolist(), "label": 0} for _ in range(10))

    data = streaming(datasets.IterableDataset.from_generator(examples))
    (batch,) = drawn(data, start=2001, stop=2002)
    assert batch.epoch == 1000
    assert len(reads) <= 4  # the count, the epoch itself, and what ``datasets`` peeks at


@pytest.mark.parametrize("shards", [1, 4])
def test_parts_of_a_stream_share_no_image_in_any_epoch(shards):
    source, parts = stream(200, shards), [(0.0, 0.2), (0.2, 0.28), (0.28, 1.0)]
    images = [
        {index for batch in streaming(source, part=part, split_seed=1).batches(16) for index in batch.indices.tolist()}
        for part in parts
    ]
    assert sum(map(len, images)) == len(set.union(*images)) == 200
    assert 25 <= len(images[0]) <= 55
    other = {index for batch in streaming(source, part=(0.0, 0.2), split_seed=2).batches(16) for index in batch.indices.tolist()}
    assert other != images[0]
    # numbered by what they are, not by when they come: an epoch in another order must not bring held-out images
    held = {
        tuple(image.flatten().tolist())
        for batch in streaming(source, part=parts[0], split_seed=1).batches(16)
        for image in batch.images
    }
    for batch in drawn(streaming(source, part=parts[2], split_seed=1, shuffle_buffer=20), batch_size=16, stop=30):
        assert not held.intersection(tuple(image.flatten().tolist()) for image in batch.images)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("source", ["memory", "stream"])
def test_processes_share_each_batch(source, shards):
    data = toy_data(43, size=4) if source == "memory" else streaming(stream(43, shards), shuffle_buffer=8)
    whole = drawn(data, batch_size=6)
    ranks = [drawn(data, batch_size=6, rank=rank, world=3) for rank in range(3)]
    for together, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert [len(part.indices) for part in parts] == [2, 2, 2]
        assert sorted(together.indices.tolist()) == sorted(itertools.chain(*(part.indices.tolist() for part in parts)))
    tiny = toy_data(5, size=4) if source == "memory" else streaming(stream(5))
    sizes = [[len(batch.indices) for batch in drawn(tiny, batch_size=8, stop=3, rank=rank, world=2)] for rank in (0, 1)]
    assert sizes == [[2, 2, 2]] * 2  # equal, or one process would wait for the other
    with pytest.raises(DataError, match="at least one per process"):
        drawn(streaming(stream(1)), batch_size=8, world=2)


def test_a_stream_is_not_held_in_memory():
    read = []

    def examples():
        for row in range(1000):
            read.append(row)
            yield {"image": np.zeros((4, 4), dtype=np.uint8).tolist(), "label": 0}

    data = streaming(datasets.IterableDataset.from_generator(examples), shuffle_buffer=10)
    batches = data.batches(5)
    next(batches)
    assert len(read) < 20
    read.clear()
    next(data.training_batches(batch_size=5, seed=0, start=0, stop=1))
    assert len(read) < 30


@pytest.mark.parametrize("shards", [1, 4])
def test_images_held_from_a_stream_come_from_all_of_it(shards):
    data = streaming(stream(shards=shards), description={"split": "validation"})
    held = data.held(8)
    assert isinstance(held, ImageData)
    assert len(held) == held.description["num_images"] == 8
    first = [0, 1, 2, 3, 4, 5, 6, 7] if shards == 1 else [0, 1, 10, 11, 20, 21, 30, 31]
    assert torch.equal(held.images, toy_data(40, size=4).images[first])
    assert len(data.held(1000)) == 40


def test_many_shards_are_read_in_few_pieces():
    data = streaming(stream(90, shards=90))
    assert torch.equal(torch.cat([batch.images for batch in data.batches(45)]), toy_data(90, size=4).images)
    assert len({index >> 40 for batch in data.batches(45) for index in batch.indices.tolist()}) == 64


def test_what_is_wrong_in_a_stream_is_named():
    rows = [{"image": np.zeros((4, 4), dtype=np.uint8).tolist(), "label": label} for label in ["a", "b", "d"]]
    data = streaming(datasets.Dataset.from_list(rows).to_iterable_dataset(), description={"split": "test"})
    with pytest.raises(DataError, match="row 2 of the test stream: expected one of 0, 1, 2, 'a', 'b', 'c' in 'label', got 'd'"):
        list(data.batches(2))
    rows = [{"image": np.full((4, 4), value).tolist(), "label": 1} for value in [3, 3, 3, 300]]
    data = streaming(datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2), description={"split": "train"})
    with pytest.raises(DataError, match=r"row 1 of the train stream.shard\(2, 1\): expected int64 pixels in \[0, 255\]"):
        list(data.batches(2))
    empty = streaming(stream().filter(lambda example: False), description={"split": "train"})
    for read in (lambda: drawn(empty), lambda: empty.held(3)):
        with pytest.raises(DataError, match=r"expected images in the train stream.* got none"):
            read()
    assert list(empty.batches(3)) == []


def test_labels_of_a_stream_are_numbers_or_names():
    rows = [{"image": np.zeros((4, 4), dtype=np.uint8).tolist(), "label": label} for label in ("b", "a", "c")]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert next(streaming(source).batches(3)).labels.tolist() == [1, 0, 2]
    data = streaming(source, classes={"a": 2, "b": 2, "c": 0})
    assert next(data.batches(3)).labels.tolist() == [2, 2, 0]
