import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import make_model, toy_data
from test_methods import batch_of
from torchvision.transforms import functional

from cartl_hub import FGSM, PGD, RFGSM, Augmentation, ImagePolicy, RobustFineTuner, load_recipe
from cartl_hub.config import from_dict, to_dict
from cartl_hub.data import ImageData
from cartl_hub.methods import Jigsaw, MultiTask, Rotation, SimCLR, Views, views
from cartl_hub.methods.jigsaw import permutations, shuffled
from cartl_hub.methods.simclr import similarities
from cartl_hub.randomness import image_keys
from cartl_hub.recipe import KINDS
from cartl_hub.training import TrainingArguments, loop, train

KEYS = image_keys(0, 0, torch.arange(200))
PLAIN = {"colour": 0.0, "blur": 0.0}
CARDS = Path(__file__).parent.parent / "model_cards"


def arguments(**changes):
    return TrainingArguments(**{"epochs": 2, "batch_size": 8, "lr": 0.05, "precision": "fp32", "augmentation": None} | changes)


# SimCLR


def slow_nt_xent(outputs, temperature):
    """Two loops over plain numbers; views i and i + N show the same image."""
    number, loss = len(outputs), 0.0
    vectors = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in outputs.tolist()]
    for i in range(number):
        total = 0.0
        for j in range(number):
            similarity = sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True)) / temperature
            total += math.exp(similarity) if i != j else 0.0
            if j == (i + number // 2) % number:
                positive = similarity
        loss += math.log(total) - positive
    return loss / number


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_formula(temperature):
    outputs = torch.randn(10, 7)
    _, answers = SimCLR().pose(torch.rand(5, 3, 16, 16), KEYS[:5])
    loss = F.cross_entropy(similarities(outputs, temperature), answers)
    assert float(loss) == pytest.approx(slow_nt_xent(outputs, temperature), rel=1e-5)


def test_the_loss_is_that_of_the_projected_views(wrn, data):
    method, batch = SimCLR(dim=5), batch_of(data)
    with method.setup(wrn.eval()) as modules:
        shown, _ = method.pose(batch.images, batch.keys)
        expected = slow_nt_xent(modules["head"](wrn.features(shown)), 0.5)
        assert method.losses(wrn, batch, **modules)["loss"].item() == pytest.approx(expected, rel=1e-5)
        hidden, activation, last = modules["head"]
    assert (hidden.weight.shape, last.weight.shape) == ((64, 64), (5, 64))
    assert isinstance(activation, torch.nn.ReLU)


# Views


def test_views_are_images_of_their_keys_alone():
    images = torch.rand(8, 3, 20, 24)
    shown = Views()(images, KEYS[:8])
    assert shown.shape == images.shape
    assert 0 <= shown.min() < shown.max() <= 1
    assert Views()(torch.ones(200, 3, 8, 8), KEYS).max() <= 1
    torch.testing.assert_close(Views()(images[3:5], KEYS[3:5]), shown[3:5])
    first, second = SimCLR().pose(images, KEYS[:8])[0].chunk(2)
    assert all(not torch.allclose(a, b, atol=0.05) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("min_area", [0.08, 0.5])
def test_a_crop_shows_a_rectangle_of_the_image(min_area):
    """A picture of the coordinates tells where each pixel was."""
    place = (torch.arange(32) + 0.5) / 32
    picture = torch.stack([place.expand(32, 32), place[:, None].expand(32, 32), torch.zeros(32, 32)])
    shown = Views(min_area=min_area, **PLAIN)(picture.expand(200, 3, 32, 32), KEYS)[:, :2, 2:-2, 2:-2]  # borders are repeated
    across, down = shown[:, 0].diff(dim=2), shown[:, 1].diff(dim=1)
    torch.testing.assert_close(across, across[:, :1, :1].expand_as(across), atol=1e-5, rtol=0)
    width, height = 32 * across[:, 0, 0], 32 * down[:, 0, 0]
    ratio, area = width.abs() / height, width.abs() * height
    assert 0.35 < float((width < 0).float().mean()) < 0.65
    assert height.min() > 0
    assert 0.74 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.34
    assert min_area - 1e-3 < area.min() < min_area + 0.1
    assert area.max() > 0.9
    assert (Views(min_area=1.0, flip=False, **PLAIN)(picture[None], KEYS[:1])[0, 0].diff(dim=1) >= 0).all()


def drawn(monkeypatch, *numbers):
    """Give these numbers in place of random ones, the same for all images."""
    monkeypatch.setattr(views, "uniform", lambda keys, shape, *, stream: torch.tensor(numbers).expand(len(keys), -1))


def test_colours_are_those_of_torchvision(monkeypatch):
    images = 0.2 + 0.5 * torch.rand(4, 3, 8, 8)
    drawn(monkeypatch, 0.7, 0.2, 0.9, 0.5, 0.0, 1.0)
    expected = functional.adjust_brightness(images, 1 + 0.8 * 0.5 * 0.4)
    expected = torch.stack([functional.adjust_contrast(image, 1 - 0.8 * 0.5 * 0.6) for image in expected])
    expected = functional.adjust_saturation(expected, 1 + 0.8 * 0.5 * 0.8)
    torch.testing.assert_close(Views(colour=0.5)._coloured(images, KEYS[:4]), expected, atol=2e-3, rtol=0)
    drawn(monkeypatch, 0.5, 0.5, 0.5, 0.5, 0.0, 0.1)
    grey = functional.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(Views()._coloured(images, KEYS[:4]), grey, atol=2e-3, rtol=0)
    drawn(monkeypatch, 0.7, 0.2, 0.9, 0.9, 0.85, 1.0)
    torch.testing.assert_close(Views()._coloured(images, KEYS[:4]), images, atol=1e-5, rtol=0)


def test_hue_turns_colours_and_keeps_their_brightness(monkeypatch):
    red = torch.tensor([0.6, 0.3, 0.3])[None, :, None, None].expand(1, 3, 4, 4)
    drawn(monkeypatch, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0)
    turned = Views(colour=1.0)._coloured(red, KEYS[:1])
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(turned[0, :, 0, 0] @ luma, red[0, :, 0, 0] @ luma, atol=1e-4, rtol=0)
    assert (turned[0, :, 0, 0] - red[0, :, 0, 0]).abs().max() > 0.1


def test_a_fifth_of_the_views_is_grey_and_one_channel_stays_one():
    shown = Views()(torch.rand(1, 3, 8, 8).expand(200, 3, 8, 8), KEYS)
    grey = (shown - shown.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-3
    assert 0.12 < float(grey.float().mean()) < 0.28
    assert Views()(torch.rand(6, 1, 8, 8), KEYS[:6]).shape == (6, 1, 8, 8)


@pytest.mark.parametrize(("height", "half"), [(24, 1), (60, 3)])
def test_blur_is_that_of_torchvision(height, half, monkeypatch):
    images = torch.rand(2, 3, height, 16)
    drawn(monkeypatch, 0.4, 0.5)
    expected = functional.gaussian_blur(images, [2 * half + 1, 2 * half + 1], [1.05, 1.05])
    inner = (slice(None), slice(None), slice(half, -half), slice(half, -half))  # theirs reflects at the border
    torch.testing.assert_close(Views()._blurred(images, KEYS[:2])[inner], expected[inner])
    drawn(monkeypatch, 0.6, 0.5)
    torch.testing.assert_close(Views()._blurred(images, KEYS[:2]), images)


# Rotation and jigsaw


def test_answers_of_rotations_are_quarter_turns():
    images = torch.rand(40, 3, 6, 6)
    turned, answers = Rotation(augmentation=None).pose(images, KEYS[:40])
    assert set(answers.tolist()) == {0, 1, 2, 3}
    for image, shown, answer in zip(images, turned, answers.tolist(), strict=True):
        assert torch.equal(shown, torch.rot90(image, answer, dims=(1, 2)))
    corner = torch.zeros(1, 1, 2, 2)
    corner[0, 0, 0, 1] = 1  # at the top right; a quarter anticlockwise it is at the top left
    places = [[[0, 1], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 1]]]
    shown, answers = Rotation(augmentation=None).pose(corner.expand(40, 1, 2, 2), KEYS[:40])
    assert all(picture[0].tolist() == places[answer] for picture, answer in zip(shown, answers.tolist(), strict=True))


@pytest.mark.parametrize("task", [Rotation(), Jigsaw(grid=2)])
def test_augmentation_comes_first(task):
    images, augmentation = torch.rand(6, 3, 8, 8), Augmentation(padding=2)
    plain = from_dict(to_dict(task) | {"augmentation": None}, KINDS)
    shown, answers = from_dict(to_dict(task) | {"augmentation": to_dict(augmentation)}, KINDS).pose(images, KEYS[:6])
    expected, same = plain.pose(augmentation(images, KEYS[:6]), KEYS[:6])
    assert torch.equal(shown, expected)
    assert torch.equal(answers, same)


@pytest.mark.parametrize(("grid", "num", "side"), [(2, 24, 8), (3, 30, 32)])
def test_answers_of_puzzles_are_the_orders_of_their_tiles(grid, num, side):
    images, tile = torch.rand(60, 3, side, side), side // grid
    shown, answers = Jigsaw(grid=grid, num_permutations=num, augmentation=None).pose(images, KEYS[:60])
    orders = permutations(grid**2, num)
    for image, picture, answer in zip(images, shown, answers.tolist(), strict=True):
        for place, source in enumerate(orders[answer].tolist()):
            (y, x), (top, left) = divmod(place, grid), divmod(source, grid)
            found = picture[:, y * tile : (y + 1) * tile, x * tile : (x + 1) * tile]
            assert torch.equal(found, image[:, top * tile : (top + 1) * tile, left * tile : (left + 1) * tile])
    whole = grid * tile
    assert not shown[:, :, whole:].any()
    assert not shown[:, :, :, whole:].any()
    assert len(set(answers.tolist())) > num // 2
    assert torch.equal(shuffled(shown, orders[answers].argsort(1), grid)[:, :, :whole, :whole], images[:, :, :whole, :whole])


def test_orders_differ_much_and_are_always_the_same():
    def distance(first, second):
        return sum(a != b for a, b in zip(first, second, strict=True))

    chosen = [(0, 1, 2, 3)]
    while len(chosen) < 9:  # max keeps the first of equals
        chosen.append(
            max(
                itertools.permutations(range(4)),
                key=lambda order: (min(distance(order, c) for c in chosen), sum(distance(order, c) for c in chosen)),
            )
        )
    assert permutations(4, 9).tolist() == [list(order) for order in chosen]
    assert len({tuple(order) for order in permutations(4, 24).tolist()}) == 24
    large = permutations(9, 30).numpy()
    distances = (large[:, None] != large[None]).sum(2)[~np.eye(30, dtype=bool)]
    assert distances.min() == 7
    assert permutations(9, 30)[:5].equal(permutations(9, 5))


# Adversarial views


@pytest.mark.parametrize("task", [SimCLR, Rotation, Jigsaw])
@pytest.mark.parametrize("attack", [FGSM(eps=4 / 255), PGD(eps=0.5, step_size=0.2, steps=3, norm="L2", random_start=False)])
def test_attacks_raise_the_loss_of_the_task(task, attack, wrn, data):
    batch, hard = batch_of(data), task(attack=attack)
    seen = []
    with hard.setup(wrn.eval()) as modules:
        features = wrn.features
        wrn.features = lambda images: seen.append(images.detach()) or features(images)
        losses = [method.losses(wrn, batch, **modules)["loss"].item() for method in (task(), hard)]
        assert wrn.training is False
        assert all(parameter.grad is None for parameter in wrn.parameters())
    assert losses[1] > losses[0] + 0.01
    change = (seen[-1] - seen[0]).flatten(1)
    size = change.abs().amax(1) if attack.norm == "Linf" else change.norm(dim=1)
    assert 0 < size.max() <= attack.eps + 1e-5


# Several tasks


def test_several_tasks_are_a_weighted_sum(wrn, data):
    tasks, batch = (SimCLR(), Rotation(attack=RFGSM(eps=8 / 255)), Jigsaw(grid=2)), batch_of(data)
    method = MultiTask(tasks=tasks, weights=(1.0, 0.5, 2.0))
    with method.setup(wrn.eval()) as modules:
        alone = [task.losses(wrn, batch, head)["loss"] for task, head in zip(tasks, modules.values(), strict=True)]
        losses = method.losses(wrn, batch, **modules)
        torch.testing.assert_close(losses["loss"], alone[0] + 0.5 * alone[1] + 2.0 * alone[2])
        torch.testing.assert_close(losses["rotation_1"], alone[1])
        torch.testing.assert_close(MultiTask(tasks=tasks).losses(wrn, batch, **modules)["loss"], sum(alone))
    assert method.attack == RFGSM(eps=8 / 255)
    assert MultiTask(tasks=(SimCLR(),)).attack is None


def test_tasks_are_read_from_yaml():
    text = """
    name: MultiTask
    tasks:
      - {name: SimCLR, views: {flip: false}, attack: {name: FGSM, eps: 8/255}}
      - {name: Jigsaw, grid: 2, augmentation: null}
    weights: [1, 1/2]
    """
    expected = MultiTask(
        tasks=(SimCLR(views=Views(flip=False), attack=FGSM(eps=8 / 255)), Jigsaw(grid=2, augmentation=None)), weights=(1.0, 0.5)
    )
    found = from_dict(yaml.safe_load(text), KINDS)
    assert found == expected
    assert from_dict(json.loads(json.dumps(to_dict(found))), KINDS) == expected
    with pytest.raises(ValueError, match=r"tasks: unknown name 'NEFT'; expected one of Jigsaw, Rotation, SimCLR"):
        from_dict({"name": "MultiTask", "tasks": [{"name": "NEFT"}]}, KINDS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiTask(tasks=()), "tasks must be a tuple of pretext tasks, such as"),
        (lambda: MultiTask(tasks=(SimCLR(), "Rotation")), "tasks must be a tuple of pretext tasks, such as"),
        (lambda: MultiTask(tasks=(SimCLR(),), weights=(1, 2)), r"weights must be 1 numbers, one for each task, got \(1, 2\)"),
        (lambda: MultiTask(tasks=(SimCLR(),), weights=(0,)), "each of weights must be > 0, got 0"),
        (lambda: SimCLR(temperature=0), "temperature must be > 0, got 0"),
        (lambda: SimCLR(views=0.5), "views must be Views, such as"),
        (lambda: SimCLR(attack="FGSM"), "attack must be an attack, such as"),
        (lambda: Views(min_area=0), "min_area must be > 0 and <= 1, got 0"),
        (lambda: Views(colour=1.5), "colour must be >= 0 and <= 1, got 1.5"),
        (lambda: Jigsaw(grid=4), "grid must be >= 2 and <= 3, got 4"),
        (lambda: Jigsaw(grid=2, num_permutations=25), "num_permutations must be >= 2 and <= 24, got 25"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_that_a_task_can_not_be_asked_of(wrn):
    for task, size, message in (
        (Rotation(), (32, 16), "expected square images for Rotation, got 32x16 of this wrn10_1"),
        (Jigsaw(), (2, 8), r"expected 3 pixels or more along each side, got images of \(2, 8\)"),
    ):
        wrn.image_policy = ImagePolicy(size=size)
        with pytest.raises(ValueError, match=message):
            task.setup(wrn).__enter__()


# In the loop

ALL = MultiTask(
    tasks=(
        SimCLR(temperature=0.2, views=Views(colour=0.0)),
        Rotation(augmentation=None),
        Jigsaw(grid=2, num_permutations=4, augmentation=None),
    )
)


def shaded(num_images):
    """Images of different colours that become brighter to the right and, less so, to the bottom."""
    colours = torch.rand(num_images, 3, 1, 1)
    place = torch.arange(32) / 31
    images = 0.5 * colours + 0.3 * place + 0.2 * place[:, None]
    labels = torch.zeros(num_images, dtype=torch.int64)
    return ImageData(labels, ("a", "b", "c"), (255 * images).to(torch.uint8))


def losses_of(folder):
    return [float(row.split(",")[1]) for row in (folder / "losses.csv").read_text().splitlines()[1:]]


def test_a_run_learns_without_validation_and_saves_no_head(wrn, tmp_path):
    names = list(wrn.state_dict())
    classifier = wrn.head.weight.clone()
    result = train(wrn, ALL, shaded(16), validation=toy_data(6), arguments=arguments(epochs=10), output_dir=tmp_path)
    losses = losses_of(tmp_path)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert result.validations == []
    assert list(wrn.state_dict()) == names
    assert torch.equal(wrn.head.weight, classifier)
    assert (tmp_path / "losses.csv").read_text().splitlines()[1].endswith(",nan")


@pytest.mark.parametrize("method", [SimCLR(), ALL], ids=["SimCLR", "MultiTask"])
def test_heads_are_drawn_from_the_seed_and_a_run_goes_on_exactly(method, tmp_path, monkeypatch):
    def run(folder):
        model, data = make_model("wrn10_1"), toy_data(24)
        torch.manual_seed(len(list(tmp_path.iterdir())))  # the user's own random state has no part in it
        train(model, method, data, arguments=arguments(), output_dir=tmp_path / folder, resume=True)
        return model.state_dict()

    whole, step_of = run("whole"), loop._Run._step

    def interrupted(self, wrapped, task, optimizer, trained, drawn, step):
        if step == 4:  # one after a checkpoint
            raise KeyboardInterrupt
        step_of(self, wrapped, task, optimizer, trained, drawn, step)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("part")
    monkeypatch.setattr(loop._Run, "_step", step_of)
    part = run("part")
    assert all(torch.equal(tensor, part[name]) for name, tensor in whole.items())
    assert (tmp_path / "part" / "losses.csv").read_text() == (tmp_path / "whole" / "losses.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentation": Augmentation()}, "expected augmentation=None, as SimCLR draws its own views, got Augmentation"),
        ({"load_best": True}, "load_best=True needs accuracies, and SimCLR learns without labels"),
        ({"patience": 3}, "patience=3 needs accuracies, and SimCLR learns without labels"),
    ],
)
def test_arguments_that_need_labels(changes, message, wrn, data):
    with pytest.raises(ValueError, match=message):
        train(wrn, SimCLR(), data, validation=data, arguments=arguments(**changes))


def test_a_fine_tuner_needs_labels(wrn):
    with pytest.raises(ValueError, match="expected a method that learns from labels, got Rotation; pretrain a source with it"):
        RobustFineTuner(wrn, "no data", method=Rotation())


def test_recipes_learn_as_in_the_paper():
    for name in ("wrn16_2.simclr_cifar100", "wrn16_2.multitask_cifar100", "resnet18_cifar.simclr_cifar100"):
        recipe = load_recipe(CARDS / name)
        assert (recipe.training.batch_size, recipe.training.epochs) == (256, 100)
        assert recipe.training.schedule.decay == "exponential"
        assert recipe.training.augmentation is None
        assert not recipe.method.uses_labels
        assert recipe.probe is not None


def test_one_image_has_nothing_to_be_told_from(wrn, data):
    with pytest.raises(ValueError, match="expected two images or more in a batch"):
        train(wrn, SimCLR(), data.subset([0]), arguments=TrainingArguments(max_steps=1, augmentation=None, precision="fp32"))
