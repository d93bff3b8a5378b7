"""Auto-PGD, the square attack, noise and transfer; most checks are those of ``test_attacks.py``."""

import copy
import json
import math
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, toy_data
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from test_attacks import (
    Linear,
    Needle,
    check_ball,
    check_best_iterate,
    check_evaluation,
    check_keyed,
    check_model_left_alone,
    check_optimum,
    check_pixels,
    check_restarts,
    correct,
    linear_problem,
    size,
    small_problem,
    trained_toy,
)
from torch import Tensor, nn

import cartl_hub
from cartl_hub.attacks import APGD, APGDT, FABT, FGSM, PGD, FeatureDistance, Noise, Square, Transfer, apgd, fab, square
from cartl_hub.attacks.attack import input_gradient, random_start
from cartl_hub.attacks.losses import LOSSES, cross_entropy, dlr, margin, targeted_dlr
from cartl_hub.config import to_dict
from cartl_hub.randomness import START, image_keys, uniform

NORMS = {"Linf": 0.1, "L2": 0.5}
ATTACKS = {
    f"{name} {norm}": make(eps=eps, norm=norm)
    for norm, eps in NORMS.items()
    for name, make in {
        "APGD": partial(APGD, steps=10),
        "APGD DLR": partial(APGD, steps=10, loss="dlr"),
        "APGD margin": partial(APGD, steps=5, loss="margin", restarts=2),
        "APGDT": partial(APGDT, steps=10),
        "FABT": partial(FABT, steps=10),
        "PGD DLR": partial(PGD, steps=5, loss="dlr", step_size=0.3 * eps),
        "Square": partial(Square, queries=30),
        "Noise": partial(Noise, samples=4),
    }.items()
}
both_norms = pytest.mark.parametrize("norm", NORMS)


class Scorer(nn.Module):
    """Linear logits of images of any shape, for any number of classes."""

    def __init__(self, shape: tuple[int, ...], num_classes: int):
        super().__init__()
        generator = torch.Generator().manual_seed(num_classes)
        self.weight = nn.Parameter(torch.randn(math.prod(shape), num_classes, generator=generator) / math.sqrt(math.prod(shape)))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight


class Counting(nn.Module):
    """Keeps the images of every forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.model(images)


@pytest.fixture(scope="module")
def toy():
    """A small model trained for a moment, and 400 images that it hasn't seen."""
    return trained_toy(0.0, 1.0)


def robust_acc(attack, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    keys = image_keys(0, 0, torch.arange(len(images)))
    adversarial = attack(model, images, labels, keys, until_broken=True)
    assert size(adversarial - images, attack.norm).max() <= attack.eps + 1e-6
    return correct(model, adversarial, labels).double().mean().item()


# Losses


def by_formula(z: list[float], y: int, t: int) -> dict[str, float]:
    """The losses of one image, as their papers write them."""
    order, others = sorted(z, reverse=True), max(value for i, value in enumerate(z) if i != y)
    untargeted, targeted = 1.0, 1.0
    if len(z) > 2:
        untargeted, targeted = order[0] - order[2], order[0] - (order[1] + order[2]) / 2
    if len(z) > 3:
        targeted = order[0] - (order[2] + order[3]) / 2
    exponentials = math.fsum(math.exp(value - order[0]) for value in z)
    return {
        "ce": math.log(exponentials) + order[0] - z[y],
        "margin": others - z[y],
        "dlr": -(z[y] - others) / untargeted,
        "targeted": -(z[y] - z[t]) / targeted,
    }


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 10, 1000])
def test_losses(num_classes):
    logits = 3 * torch.randn(20, num_classes)
    labels, targets = torch.randint(num_classes - 1, (20,)), torch.full((20,), num_classes - 1)
    labels[:5] = logits[:5, :-1].argmax(1)
    expected = [by_formula(*row) for row in zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)]
    for name, loss in LOSSES.items():
        torch.testing.assert_close(loss(logits, labels), torch.tensor([row[name] for row in expected]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        targeted_dlr(logits, labels, targets), torch.tensor([row["targeted"] for row in expected]), rtol=1e-4, atol=1e-5
    )


def test_losses_of_few_logits():
    two, three, four = torch.tensor([[4.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[4.0, 1.0, 2.0, 0.0]])
    first, last = torch.tensor([0]), torch.tensor([1])
    assert [margin(z, first).item() for z in (two, three, four)] == [-3.0, -2.0, -2.0]
    assert [dlr(z, first).item() for z in (two, three, four)] == pytest.approx([-3.0, -2 / 3, -2 / 3])
    assert [targeted_dlr(z, first, last).item() for z in (two, three, four)] == pytest.approx([-3.0, -3 / 2.5, -3 / 3.5])


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_each_target_has_a_gradient(num_classes):
    logits = torch.arange(num_classes, 0, -1.0).repeat(num_classes - 1, 1).requires_grad_()
    labels, targets = torch.zeros(num_classes - 1, dtype=torch.int64), torch.arange(1, num_classes)
    (gradient,) = torch.autograd.grad(targeted_dlr(logits, labels, targets).sum(), logits)
    assert (gradient[range(num_classes - 1), targets] > 0.01).all()


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e4, 1e30])
def test_dlr_is_the_same_for_logits_of_any_scale_and_shift(scale):
    logits, labels, targets = torch.randn(20, 10), torch.arange(20) % 10, (torch.arange(20) + 1) % 10
    torch.testing.assert_close(dlr(scale * logits, labels), dlr(logits, labels))
    torch.testing.assert_close(targeted_dlr(scale * logits, labels, targets), targeted_dlr(logits, labels, targets))
    torch.testing.assert_close(dlr(logits + 10, labels), dlr(logits, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [2, 3, 4, 1000])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_no_loss_or_gradient_is_nan(num_classes, scale):
    logits = (scale * torch.randn(20, num_classes)).requires_grad_()
    labels, targets = torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.int64)
    for loss in (cross_entropy, margin, dlr, partial(targeted_dlr, targets=targets)):
        losses = loss(logits, labels)
        assert losses.isfinite().all()
        assert torch.autograd.grad(losses.sum(), logits)[0].isfinite().all()


# Checks that all attacks pass


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("check", [check_ball, check_pixels, check_model_left_alone, check_keyed])
def test_attack(name, check):
    check(ATTACKS[name])


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith(("Noise", "PGD"))])
def test_evaluation(name):
    attack = ATTACKS[name]
    check_evaluation(replace(attack, eps=2 * attack.eps) if isinstance(attack, Square) else attack)


@both_norms
@pytest.mark.parametrize("loss", ["margin", "dlr"])
@pytest.mark.parametrize("check", [check_best_iterate, check_optimum])
def test_pgd_on_other_losses(norm, loss, check):
    check(PGD(eps=0.1, step_size=0.02, steps=2, norm=norm, loss=loss))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_ball_of_radius_zero_holds_the_image_only(name):
    model, images, labels, keys = small_problem()
    assert torch.equal(replace(ATTACKS[name], eps=0.0)(model, images, labels, keys), images)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_same_verdicts_for_any_batch_size_and_order(toy, name, batch_size):
    model, images, labels = toy
    model, images, labels = copy.deepcopy(model).double(), images[:10].double(), labels[:10]  # rounding depends on the batch
    keys = image_keys(0, 0, torch.arange(10))
    together = ATTACKS[name](model, images, labels, keys, until_broken=True)
    found = torch.empty_like(images)
    for rows in torch.randperm(10).split(batch_size):
        found[rows] = ATTACKS[name](model, images[rows], labels[rows], keys[rows], until_broken=True)
    torch.testing.assert_close(found, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("shape", "num_classes"), [((1, 28, 28), 2), ((3, 100, 100), 3), ((3, 12, 20), 5), ((3, 8, 8), 1000), ((2, 9, 2), 2)]
)
def test_images_and_classes_of_any_number(name, shape, num_classes):
    attack, model = ATTACKS[name], Scorer(shape, num_classes)
    images = torch.rand(6, *shape)
    labels = model(images).argmax(1)
    keys = image_keys(0, 0, torch.arange(6))
    for until_broken in (False, True):
        adversarial = attack(model, images, labels, keys, until_broken=until_broken)
        assert adversarial.isfinite().all()
        assert size(adversarial - images, attack.norm).min() > 0
        assert size(adversarial - images, attack.norm).max() <= attack.eps * (1 + 1e-5)
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
    if not name.startswith(("Noise", "Square")):
        assert (margin(model(adversarial), labels) > margin(model(images), labels)).all()


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(ATTACKS)),
    eps=st.floats(0, 1),
    num_classes=st.integers(2, 6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_nothing_leaves_the_ball_or_the_box(name, eps, num_classes, shape, seed):
    attack, model = replace(ATTACKS[name], eps=eps), Scorer(shape, num_classes)
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed))
    images[:2] = images[:2].round()
    labels, keys = torch.arange(4) % num_classes, image_keys(seed, 0, torch.arange(4))
    for until_broken in (False, True):
        adversarial = attack(model, images, labels, keys, until_broken=until_broken)
        assert size(adversarial - images, attack.norm).max() <= eps * (1 + 1e-5) + 1e-7
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1


@pytest.mark.parametrize("name", [name for name in ATTACKS if not name.startswith("FABT")])
def test_broken_images_leave_the_batch_in_evaluation(toy, name):
    """The model sees an image until it misclassifies it, and never again."""
    model, images, labels = Counting(toy[0]), toy[1][:40], toy[2][:40]
    attack = replace(ATTACKS[name], eps=(6 if name.startswith(("Noise", "Square")) else 1) * ATTACKS[name].eps)
    attack(model, images, labels, image_keys(0, 0, torch.arange(40)), until_broken=True)
    waiting = labels
    for seen in model.seen:
        assert len(seen) == len(waiting)
        waiting = waiting[correct(model.model, seen, waiting)]
    assert len(waiting) < 39


@pytest.mark.parametrize("name", ATTACKS)
def test_no_image_leaves_the_batch_in_training(toy, name):
    model = Counting(toy[0])
    ATTACKS[name](model, toy[1][:40], toy[2][:40], image_keys(0, 0, torch.arange(40)))
    assert {len(seen) for seen in model.seen} == {40}


@both_norms
@pytest.mark.parametrize("attack", [APGD(eps=0.1, steps=4), APGDT(eps=0.1, steps=4)], ids=["APGD", "APGDT"])
def test_restarts(attack, norm):
    check_restarts(replace(attack, norm=norm))


# Auto-PGD


def test_checkpoints_as_published():
    assert apgd.checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    assert apgd.checkpoints(1000) == [10 * step for step in apgd.checkpoints(100)]
    assert apgd.checkpoints(20) == [0, 5, 9, 12, 14, 16, 18, 19, 20]
    assert apgd.checkpoints(1) == [0, 1]


def by_the_book(loss, image: Tensor, start: Tensor, eps: float, norm: str, steps: int) -> Tensor:
    """Algorithm 1 of Croce and Hein (2020) for one image [1, C, H, W], one step after the other."""
    shares = [Fraction(0), Fraction(22, 100)]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - Fraction(3, 100), Fraction(6, 100)))
    w = sorted({math.ceil(share * steps) for share in shares if share <= 1})

    def into_the_set(z):
        if norm == "Linf":
            return torch.maximum(torch.minimum(z, image + eps), image - eps).clamp(0, 1)
        length = float((z - image).norm())
        return (z if length <= eps else image + (z - image) * eps / length).clamp(0, 1)

    def value_and_direction(z):
        z = z.clone().requires_grad_()
        value = loss(z)
        (gradient,) = torch.autograd.grad(value, z)
        return value.item(), gradient.sign() if norm == "Linf" else gradient / gradient.norm()

    x, before, step_size = start, start, 2 * eps
    value, direction = value_and_direction(x)
    best, best_value, best_direction = x, value, direction
    rises, best_at_last, step_at_last = 0, value, None
    for k in range(1, steps + 1):
        z = into_the_set(x + step_size * direction)
        alpha = 0.75 if k > 1 else 1
        x, before = into_the_set(x + alpha * (z - x) + (1 - alpha) * (x - before)), x
        last_value = value
        value, direction = value_and_direction(x)
        rises += value > last_value
        if value > best_value:
            best, best_value, best_direction = x, value, direction
        if k in w:
            step_here = step_size
            if rises < 0.75 * (k - w[w.index(k) - 1]) or (step_at_last in (None, step_here) and best_at_last == best_value):
                step_size, x, value, direction = step_size / 2, best, best_value, best_direction
            rises, best_at_last, step_at_last = 0, best_value, step_here
    return best


class Rugged(nn.Module):
    """A loss with many hills, on which step sizes are halved for each reason."""

    def forward(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        first, second = (
            torch.randn(*shape, generator=generator, dtype=images.dtype) for shape in ((images[0].numel(), 20), (20, 4))
        )
        return torch.sin(4 * images.flatten(1) @ first) @ second


@both_norms
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_apgd_by_the_book(norm, loss):
    """In double precision, where rounding doesn't choose between the signs of a gradient."""
    model, images, labels, keys = (
        Rugged(),
        torch.rand(24, 1, 4, 4).double(),
        torch.arange(24) % 4,
        image_keys(0, 0, torch.arange(24)),
    )
    eps = {"Linf": 0.1, "L2": 0.3}[norm]
    found = APGD(eps=eps, norm=norm, loss=loss, steps=100)(model, images, labels, keys)
    starts = random_start(images, keys, eps, norm)
    for i in range(24):

        def image_loss(x, label=labels[i : i + 1]):
            return LOSSES[loss](model(x).float(), label).sum()

        expected = by_the_book(image_loss, images[i : i + 1], starts[i : i + 1], eps, norm, 100)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=1e-5)


def test_step_size_is_not_halved_twice_in_a_row_for_the_same_best():
    rows, images = torch.arange(2), torch.rand(2, 1, 2, 2)
    climbers = apgd._Climbers.at(rows, images, images, 0.2)
    climbers.arrive(torch.ones(2))
    climbers.check(0)
    sizes = []
    for _ in range(4):
        climbers.rises = torch.tensor([10, 7])  # the second one's loss rises too seldom
        climbers.check(10)
        sizes.append(climbers.step_size.flatten().tolist())
    assert sizes == [pytest.approx(pair) for pair in ([0.1, 0.1], [0.1, 0.05], [0.05, 0.025], [0.05, 0.0125])]


@both_norms
@pytest.mark.parametrize("attack", [APGD, partial(APGD, loss="margin"), APGDT], ids=["ce", "margin", "targeted"])
def test_apgd_finds_the_optimum_of_a_linear_model(norm, attack):
    check_optimum(attack(eps=0.1, norm=norm, steps=30))


def test_apgdt_goes_for_the_most_likely_wrong_classes_in_order(monkeypatch):
    model = Scorer((3, 8, 8), 5)
    images = torch.rand(8, 3, 8, 8)
    logits = model(images).detach()
    labels, keys = logits.argmax(1), image_keys(0, 0, torch.arange(8))
    labels[0] = logits[0].argmin()  # training attacks misclassified images too
    ranks = [[c for c in row.argsort(descending=True).tolist() if c != label] for row, label in zip(logits, labels, strict=True)]
    seen = []
    monkeypatch.setattr(apgd, "targeted_dlr", lambda *args: (seen.append(args[2].tolist()), targeted_dlr(*args))[1])
    for num_targets in (2, 9):
        seen.clear()
        APGDT(eps=1e-4, steps=3, num_targets=num_targets, restarts=2)(model, images, labels, keys)
        tried = min(num_targets, 4)
        assert seen == [[row[place] for row in ranks] for place in range(tried) for _ in range(2 * 4)]


def test_apgdt_tries_the_next_target_on_survivors_only():
    """Only the second of two targets can be reached, from half of the images."""

    class Corner(nn.Module):
        def forward(self, images):
            x = images[:, 0].mean((1, 2))
            return torch.stack([0 * x + 1, 0.9 - (x - 0.5).abs(), 25 * (x - 0.5) - 0.5 - 2 * images[:, 1].mean((1, 2))], 1)

    images, labels = torch.full((8, 2, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    images[4:, 1] = 1.0
    model = Corner()
    attack = APGDT(eps=0.1, steps=10)
    keys = image_keys(0, 0, torch.arange(8))
    assert not (~correct(model, replace(attack, num_targets=1)(model, images, labels, keys, until_broken=True), labels)).any()
    adversarial = attack(model, images, labels, keys, until_broken=True)
    assert correct(model, adversarial, labels).tolist() == [False] * 4 + [True] * 4


# Square and noise


@pytest.mark.parametrize(
    ("queries", "last"),
    [
        (10_000, (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 9999)),
        (5000, (5, 25, 100, 250, 500, 1000, 2000, 3000, 4000, 4999)),
        (1000, (1, 5, 20, 50, 100, 200, 400, 600, 800, 999)),
    ],
)
def test_schedule_of_the_squares_as_published(queries, last):
    """The share of pixels is halved after these queries, whatever their number."""
    shares = [square.pixel_share(query, queries, 0.8) for query in range(queries)]
    expected = [0.8 / 2**halvings for halvings, (a, b) in enumerate(zip((-1, *last), last, strict=False)) for _ in range(b - a)]
    assert shares == expected


@both_norms
def test_square_makes_its_queries_and_no_more(norm):
    model = Counting(Scorer((1, 9, 9), 3))
    images = torch.rand(3, 1, 9, 9)
    Square(eps=0.01, norm=norm, queries=17)(model, images, torch.arange(3), image_keys(0, 0, torch.arange(3)))
    assert len(model.seen) == 17


def test_square_begins_with_vertical_stripes():
    keys = image_keys(0, 0, torch.arange(50))
    delta = square.stripes(torch.full((50, 3, 6, 10), 0.5), keys, 0.1) - 0.5
    assert torch.equal(delta, delta[:, :, :1].expand_as(delta))
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, 0.1))
    assert 0.45 < (delta > 0).double().mean() < 0.55


@pytest.mark.parametrize(("shape", "side"), [((6, 6), 5), ((6, 10), 4), ((4, 12), 4)])
def test_squares_lie_anywhere(shape, side):
    """Also at the last row and column; inside each channel has a sign, outside nothing changes."""
    keys, share = image_keys(0, 0, torch.arange(2000)), side**2 / math.prod(shape)
    images, best = torch.full((2000, 2, *shape), 0.5), torch.full((2000, 2, *shape), 0.52)
    moved = square.square(images, best, keys, 0.1, share) - images
    changed = (moved - 0.02).abs() > 1e-6
    assert (changed.sum((2, 3)) == side**2).all()
    corners = Counter((int(rows.min()), int(columns.min())) for rows, columns in (c[0].nonzero(as_tuple=True) for c in changed))
    places = [(row, column) for row in range(shape[0] - side + 1) for column in range(shape[1] - side + 1)]
    assert sorted(corners) == places
    assert max(corners.values()) < 2000 / len(places) + 6 * math.sqrt(2000 / len(places))
    signs = moved[changed].view(2000, 2, -1)
    torch.testing.assert_close(signs, 0.1 * signs[:, :, :1].sign().expand_as(signs))
    assert Counter(map(tuple, signs[:, :, 0].sign().tolist())).keys() == {(a, b) for a in (-1, 1) for b in (-1, 1)}


@pytest.mark.parametrize("side", [1, 2, 3, 6, 7, 20])
def test_bumps_of_the_paper(side):
    def eta(height, width):
        n = max(height, width) // 2
        hill = np.zeros((height, width))
        for r in range(height):
            for s in range(width):
                reach = n - max(abs(r - height // 2), abs(s - width // 2))
                hill[r, s] = sum(1 / (n + 1 - k) ** 2 for k in range(reach + 1))
        return hill / np.sqrt((hill**2).sum()) if hill.size else hill

    expected = np.concatenate([eta(side // 2, side), -eta(side - side // 2, side)])
    expected /= np.sqrt((expected**2).sum())
    np.testing.assert_allclose(square.bumps(side, torch.device("cpu")).numpy(), expected, atol=1e-6)


def test_l2_begins_with_a_grid_of_bumps():
    delta = square.tiles(torch.full((20, 3, 32, 32), 0.5), image_keys(0, 0, torch.arange(20)), 0.5) - 0.5
    torch.testing.assert_close(size(delta, "L2"), torch.full((20,), 0.5))
    bump = square.bumps(6, torch.device("cpu")) / math.sqrt(25 * 3) / 2
    known = {"standing": bump, "turned over": -bump, "lying": bump.T, "lying, turned over": -bump.T}
    kinds = Counter()
    for blocks in delta[:, :, 1:31, 1:31].unflatten(2, (5, 6)).unflatten(4, (5, 6)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2):
        matches = [kind for kind, eta in known.items() if torch.allclose(blocks[0], eta, atol=1e-6)]
        assert len(matches) == 1
        assert all(torch.allclose(block.abs(), blocks[0].abs(), atol=1e-6) for block in blocks)
        kinds[matches[0]] += 1
    assert len(kinds) == 4
    assert min(kinds.values()) > 80
    assert delta[:, :, [0, 31]].abs().max() == 0
    assert delta[:, :, :, [0, 31]].abs().max() == 0


@pytest.mark.parametrize(("shape", "side"), [((12, 12), 5), ((9, 14), 3), ((2, 6), 2)])
def test_l2_moves_length_between_squares(shape, side):
    """Algorithm 3 of the paper for one image after the other, with windows cut out."""
    keys, share, eps = image_keys(0, 0, torch.arange(50)), side**2 / math.prod(shape), 0.5
    images = 0.3 + 0.4 * torch.rand(50, 3, *shape)
    best = images + 0.3 * F.normalize(torch.randn(50, 3 * math.prod(shape))).view_as(images)
    found = square.two_squares(images, best, keys, eps, share)
    draws = uniform(keys, (8,), stream=START)
    spots = (draws[:, :4] * (torch.tensor([*shape, *shape]) - side + 1)).long().tolist()
    for i, (top, left, other_top, other_left) in enumerate(spots):
        first = np.s_[:, top : top + side, left : left + side]
        second = np.s_[:, other_top : other_top + side, other_left : other_left + side]
        delta = (best - images)[i].clone()
        in_windows = torch.zeros(3, *shape)
        in_windows[first] = in_windows[second] = 1
        available = (delta * in_windows).norm(dim=(1, 2)) ** 2 + (eps**2 - delta.norm() ** 2) / 3
        bump = square.bumps(side, delta.device)
        bump = torch.where(draws[i, 4] < 0.5, bump.T, bump) * torch.where(draws[i, 5:] < 0.5, -1, 1)[:, None, None]
        new = bump + delta[first] / delta[first].norm(dim=(1, 2), keepdim=True)
        delta[second] = 0
        delta[first] = new / new.norm(dim=(1, 2), keepdim=True) * available.sqrt()[:, None, None]
        assert delta.norm().item() == pytest.approx(eps, rel=1e-5)
        torch.testing.assert_close(found[i], (images[i] + delta).clamp(0, 1), rtol=0, atol=1e-5)


def test_square_finds_the_optimum_of_a_linear_model():
    """The corner in Linf; in L2 most of the way."""
    model = Scorer((1, 5, 5), 2)
    weight = (model.weight[:, 1] - model.weight[:, 0]).detach()
    images, labels = torch.full((4, 1, 5, 5), 0.5), torch.zeros(4, dtype=torch.int64)
    keys = image_keys(0, 0, torch.arange(4))
    for norm, eps, dual, share in (("Linf", 0.1, 1, 1 - 1e-4), ("L2", 0.4, 2, 0.6)):
        adversarial = Square(eps=eps, norm=norm, queries=600)(model, images, labels, keys)
        rise = margin(model(adversarial), labels) - margin(model(images), labels)
        assert (rise >= share * eps * weight.norm(p=dual)).all()


@both_norms
def test_noise_keeps_the_worst_of_its_samples(norm):
    model = Counting(Scorer((3, 8, 8), 4))
    images, keys = torch.rand(5, 3, 8, 8), image_keys(0, 0, torch.arange(5))
    images[0] = images[0].round()
    labels = torch.arange(5) % 4
    adversarial = Noise(eps=0.1, norm=norm, samples=10)(model, images, labels, keys)
    assert len(model.seen) == 10
    heights = torch.stack([margin(model.model(seen), labels) for seen in model.seen])
    torch.testing.assert_close(margin(model.model(adversarial), labels), heights.amax(0))
    assert (heights.argmax(0) > 0).any()
    corners = [bool(((seen - images).abs()[1:] > 0.0999).double().mean() > 0.8) for seen in model.seen]
    assert corners == ([False, True] * 5 if norm == "Linf" else [False] * 10)


@both_norms
def test_more_noise_breaks_the_same_images_and_others(norm):
    width = 0.1 * (math.sqrt(192 / 3) if norm == "Linf" else 1.0)
    model, images, labels = Needle(1.2 * width), torch.full((64, 3, 8, 8), 0.5), torch.zeros(64, dtype=torch.int64)
    keys = image_keys(0, 0, torch.arange(64))
    few, many = (
        ~correct(model, Noise(eps=0.1, norm=norm, samples=num)(model, images, labels, keys, until_broken=True), labels)
        for num in (3, 20)
    )
    assert not (few & ~many).any()
    assert 0 < few.sum() < many.sum()


# The nearest adversarial image


@both_norms
def test_moves_onto_a_hyperplane_are_the_shortest(norm):
    generator = np.random.default_rng(0)
    for case in range(200):
        num = int(generator.integers(1, 8))
        point, weights = generator.random(num), generator.normal(size=num)
        weights[generator.random(num) < 0.2] = 0
        weights[0] += weights.any() == 0
        point[generator.random(num) < 0.2] = generator.integers(2)
        change = float(weights @ (generator.random(num) - point)) * (1, 0.3, 3)[case % 3]
        scaled = torch.tensor(weights * 10.0 ** (case % 9 - 4)).view(1, 1, 1, -1)
        asked = torch.tensor([change * 10.0 ** (case % 9 - 4)])
        move = fab.onto_hyperplane(torch.tensor(point).view(1, 1, 1, -1), scaled, asked, norm).numpy().ravel()
        bounds = list(zip(-point, 1 - point, strict=True))
        possible = [
            sum(choose(w * low, w * high) for w, (low, high) in zip(weights, bounds, strict=True)) for choose in (min, max)
        ]
        change = float(np.clip(change, *possible))
        assert weights @ move == pytest.approx(change, abs=1e-6)
        assert (point + move).min() >= -1e-9
        assert (point + move).max() <= 1 + 1e-9
        if norm == "Linf":
            least = [*[0] * num, 1]
            sides = np.block([[np.eye(num), -np.ones((num, 1))], [-np.eye(num), -np.ones((num, 1))]])
            best = linprog(least, sides, np.zeros(2 * num), [[*weights, 0]], [change], [*bounds, (0, None)])
        else:
            onto = {"type": "eq", "fun": lambda other, w=weights, c=change: w @ other - c}
            best = minimize(lambda other: other @ other, move, bounds=bounds, constraints=onto)
        found = np.abs(move).max() if norm == "Linf" else move @ move
        assert not best.success or found <= best.fun + 1e-6
    assert best.success


@both_norms
def test_the_nearest_image_of_a_linear_model_is_found(norm):
    model, images = Scorer((3, 8, 8), 4), 0.5 + 0.02 * torch.randn(50, 3, 8, 8)
    logits = model(images).detach()
    labels, normals = logits.argmax(1), model.weight.detach().T
    distances = torch.full((50, 4), torch.inf)
    for target in range(4):
        across = (normals[target] - normals[labels]).norm(p=1 if norm == "Linf" else 2, dim=1)
        lead = logits[:, target] - logits.gather(1, labels[:, None])[:, 0]
        distances[labels != target, target] = (-lead / across)[labels != target]
    largest = {"Linf": 0.5, "L2": 5.0}[norm]  # with all targets, the nearest one is not always that of the largest logit
    found = FABT(eps=largest, norm=norm, steps=50)(model, images, labels)
    assert not correct(model, found, labels).any()
    torch.testing.assert_close(size(found - images, norm), distances.amin(1), rtol=0.01, atol=0)


@both_norms
def test_an_image_leaves_once_an_adversarial_one_lies_in_its_ball(toy, norm):
    model, images, labels = Counting(toy[0]), toy[1][:40], toy[2][:40]
    standing = correct(toy[0], images, labels)
    attack = FABT(eps=NORMS[norm] / 2, norm=norm, steps=10)
    broken = ~correct(toy[0], attack(model, images, labels, until_broken=True), labels)
    sizes = [len(seen) for seen in model.seen[2:]]  # after the clean images, and those of which targets are chosen
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (standing.sum(), (~broken).sum())
    nearest = size(attack(toy[0], images, labels) - images, norm)
    assert 0 < (broken & standing).sum() < standing.sum()
    assert (nearest[broken & standing] < 0.99 * attack.eps).any()  # it goes on to the nearest one where it is not for evaluation


@both_norms
def test_no_batch_is_empty_once_all_images_are_broken(toy, norm):
    model, images, labels = Counting(toy[0]), toy[1][:20], toy[2][:20]
    attack = FABT(eps=4 * NORMS[norm], norm=norm, steps=20)
    assert not correct(toy[0], attack(model, images, labels, until_broken=True), labels).any()
    assert min(map(len, model.seen)) > 0


# Models that look robust


@both_norms
def test_order_of_strength(toy, norm):
    eps = {"Linf": 0.06, "L2": 0.6}[norm]
    noise, fgsm, pgd, untargeted, targeted = (
        robust_acc(attack, *toy)
        for attack in (
            Noise(eps=eps, norm=norm, samples=20),
            FGSM(eps=eps, norm=norm),
            PGD(eps=eps, norm=norm, step_size=eps / 4, steps=20),
            APGD(eps=eps, norm=norm, steps=20),
            APGDT(eps=eps, norm=norm, steps=20),
        )
    )
    assert noise > fgsm + 0.05
    assert fgsm >= pgd >= untargeted >= targeted
    assert 0.1 < targeted < 0.9


@both_norms
def test_dlr_breaks_saturated_logits(toy, norm):
    class Saturated(nn.Module):
        def forward(self, images):
            return 1e4 * toy[0](images)

    model, images, labels = Saturated(), *toy[1:]
    gradient, *_ = input_gradient(model, images, labels, cross_entropy)
    assert (gradient.flatten(1).abs().amax(1) == 0).double().mean() > 0.5
    attack = APGD(eps=NORMS[norm], norm=norm, steps=20)
    fooled, honest = robust_acc(attack, model, images, labels), robust_acc(attack, *toy)
    assert fooled > honest + 0.3
    pgd = PGD(eps=attack.eps, norm=norm, step_size=attack.eps / 4, steps=20)
    assert robust_acc(pgd, model, images, labels) > honest + 0.3
    for strong in (
        replace(attack, loss="dlr"),
        replace(attack, loss="margin"),
        replace(pgd, loss="dlr"),
        replace(pgd, loss="margin"),
        APGDT(eps=attack.eps, norm=norm, steps=20),
        FABT(eps=attack.eps, norm=norm, steps=20),
    ):
        assert robust_acc(strong, model, images, labels) <= honest + 0.02


@both_norms
def test_square_breaks_a_model_without_gradient(toy, norm):
    class Masked(nn.Module):
        def forward(self, images):
            return toy[0](images.detach()) + 0 * images.sum()

    model, images, labels = Masked(), *(part[:100] for part in toy[1:])
    eps = {"Linf": 0.2, "L2": 3.0}[norm]
    by_gradient = robust_acc(APGDT(eps=eps, norm=norm, steps=3), model, images, labels)
    assert by_gradient > 0.9
    assert robust_acc(Square(eps=eps, norm=norm, queries=150), model, images, labels) < by_gradient - 0.3


# Against an established library


LIBRARY_EPS = {"Linf": 0.06, "L2": 0.6}


def theirs(name: str, model: nn.Module, images: Tensor, labels: Tensor, norm: str, seed: int) -> Tensor:
    """Adversarial images of the Adversarial Robustness Toolbox."""
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(3, 8, 8), nb_classes=4, clip_values=(0.0, 1.0), device_type="cpu"
    )
    random.seed(seed)  # the library draws from both
    np.random.seed(seed)  # noqa: NPY002
    eps = LIBRARY_EPS[norm]
    shared = {"norm": np.inf if norm == "Linf" else 2, "eps": eps, "batch_size": len(images), "verbose": False}
    if name == "Square":
        attack = evasion.SquareAttack(classifier, max_iter=100, **shared)
    else:
        loss = {"APGD": "cross_entropy", "APGD DLR": "difference_logits_ratio"}[name]
        attack = evasion.AutoProjectedGradientDescent(
            classifier, eps_step=2 * eps, max_iter=20, nb_random_init=1, loss_type=loss, **shared
        )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


@both_norms
@pytest.mark.parametrize("name", ["APGD", "APGD DLR", "Square"])
def test_as_strong_as_the_library(toy, name, norm):
    model, images, labels = toy
    settings = {"eps": LIBRARY_EPS[norm], "norm": norm}
    ours = {
        "APGD": APGD(**settings, steps=20),
        "APGD DLR": APGD(**settings, steps=20, loss="dlr"),
        "Square": Square(**settings, queries=100),
    }
    seeds, indices = range(4), torch.arange(len(images))  # of one run, either is ahead by up to 2 points
    found = [ours[name](model, images, labels, image_keys(seed, 0, indices), until_broken=True) for seed in seeds]
    expected = [theirs(name, model, images, labels, norm, seed) for seed in seeds]
    own, library = (
        np.mean([correct(model, part, labels).double().mean().item() for part in parts]) for parts in (found, expected)
    )
    assert 0.1 < library < 0.99
    assert own <= library + 0.005


# Transfer


class Featured(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).repeat(1, 7)


def test_transfer_returns_what_the_attack_makes_on_the_source(toy):
    model, images, labels = toy
    keys = image_keys(0, 0, torch.arange(400))
    source, attack = Linear(torch.randn(192)), PGD(eps=0.05, step_size=0.02, steps=3)
    source = nn.Sequential(source, nn.Linear(2, 4)).train()
    transfer = Transfer(source=source, source_name="linear", attack=attack)
    assert (transfer.eps, transfer.norm) == (0.05, "Linf")
    expected = attack(source, images, labels, keys)
    assert torch.equal(transfer(model, images, labels, keys), expected)
    right = correct(model, images, labels)
    assert torch.equal(transfer(model, images, labels, keys, until_broken=True)[right], expected[right])
    assert source.training
    assert all(parameter.grad is None for parameter in source.parameters())


def test_transfer_from_the_same_model_is_its_attack_and_from_another_is_weaker(toy):
    model, attack = toy[0], APGD(eps=0.1, steps=10)
    other = Linear(torch.randn(192, generator=torch.Generator().manual_seed(5)))
    other = nn.Sequential(other, nn.Linear(2, 4))
    itself = robust_acc(Transfer(source=model, source_name="itself", attack=attack), *toy)
    assert itself <= robust_acc(attack, *toy) + 0.005
    assert robust_acc(Transfer(source=other, source_name="other", attack=attack), *toy) > itself + 0.2


@both_norms
def test_feature_distance_finds_the_farthest_features_of_a_linear_source(norm):
    weight = torch.randn(192, 1)
    source, eps = Featured(weight), NORMS[norm]
    images, keys = torch.full((6, 3, 8, 8), 0.5), image_keys(0, 0, torch.arange(6))
    attack = FeatureDistance(eps=eps, norm=norm, steps=30)
    adversarial = attack(source, images, torch.zeros(6, dtype=torch.int64), keys)
    distance = (source.features(adversarial) - source.features(images)).abs().flatten()
    torch.testing.assert_close(distance, (eps * weight.norm(p=1 if norm == "Linf" else 2)).expand(6), rtol=1e-4, atol=0)
    assert torch.equal(attack(source, images, torch.ones(6, dtype=torch.int64), keys), adversarial)


def test_feature_distance_from_a_source_with_other_classes():
    model, source = make_model("wrn10_1", num_classes=3), make_model("wrn10_1", num_classes=7)
    images, labels, keys = torch.rand(4, 3, 32, 32), torch.arange(4) % 3, image_keys(0, 0, torch.arange(4))
    transfer = Transfer(source=source, source_name="seven", attack=FeatureDistance(eps=8 / 255, steps=5))
    adversarial = transfer(model, images, labels, keys)
    noisy = random_start(images, keys, 8 / 255, "Linf")
    source.eval()
    with torch.no_grad():
        clean, moved, noise = (source.features(x) for x in (images, adversarial, noisy))
    assert ((moved - clean).norm(dim=1) > 2 * (noise - clean).norm(dim=1)).all()


def test_report_names_the_source_and_leaves_its_weights_out(toy):
    transfer = Transfer(source=toy[0], source_name="toy", attack=PGD(eps=0.1, step_size=0.02, steps=3))
    assert "Conv2d" not in repr(transfer)
    described = to_dict(transfer)
    assert json.loads(json.dumps(described)) == described
    assert described == {
        "name": "Transfer",
        "eps": 0.1,
        "norm": "Linf",
        "source_name": "toy",
        "attack": {"name": "PGD", "eps": 0.1, "norm": "Linf", "step_size": 0.02, "steps": 3, "random_start": True, "restarts": 1}
        | {"loss": "ce"},
    }


def test_all_of_them_in_one_report():
    model, data = make_model("wrn10_1").eval(), toy_data(6)
    attacks = {name: attack for name, attack in ATTACKS.items() if name.endswith("Linf")}
    attacks["transfer"] = Transfer(source=make_model("wrn10_1"), source_name="twin", attack=APGD(eps=0.1, steps=2))
    report = cartl_hub.evaluate(model, data, attacks=attacks, curve=None, progress=False)
    assert report.attacks.keys() == attacks.keys()
    assert all(result.rejected == 0 for result in report.attacks.values())
    assert report.attacks["transfer"].attack["source_name"] == "twin"
    assert "loss dlr" in report.attacks["APGD DLR Linf"].settings


# Messages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(eps=0.1, step_size=0.1, steps=1, loss="CE"), r"loss must be one of \('ce', 'margin', 'dlr'\), got 'CE'"),
        (lambda: APGD(eps=0.1, loss="DLR"), "loss must be one of"),
        (lambda: APGD(eps=0.1, steps=0), "steps must be >= 1"),
        (lambda: APGD(eps=0.1, restarts=0), "restarts must be >= 1"),
        (lambda: APGD(eps=8), "Did you mean 8/255"),
        (lambda: APGDT(eps=0.1, num_targets=0), "num_targets must be >= 1"),
        (lambda: FABT(eps=0.1, steps=0), "steps must be >= 1"),
        (lambda: Square(eps=0.1, queries=0), "queries must be >= 1"),
        (lambda: Square(eps=0.1, p_init=0.0), "p_init must be > 0 and <= 1"),
        (lambda: Noise(eps=0.1, samples=0), "samples must be >= 1, got 0"),
        (lambda: FeatureDistance(eps=0.1, steps=0), "steps must be >= 1, got 0"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_messages_of_transfer():
    model, images, labels, keys, _ = linear_problem(0.1, "Linf")
    seven = Featured(torch.randn(192, 1))
    with pytest.raises(ValueError, match=r"expected a source with the 2 classes .* got seven with 7; use attack=FeatureDistance"):
        Transfer(source=seven, source_name="seven", attack=FGSM(eps=0.1))(model, images, labels, keys)
    with pytest.raises(ValueError, match=r"expected a model with a method features\(images\), got Linear"):
        FeatureDistance(eps=0.1)(model, images, labels, keys)
