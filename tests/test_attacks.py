"""The checks are functions of an attack: the real attacks pass them, and each mutant fails the one that is there for it."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cartl_hub.attacks import FGSM, NFGSM, PGD, RFGSM, Transfer, fgsm, pgd
from cartl_hub.attacks import attack as base
from cartl_hub.attacks.losses import cross_entropy
from cartl_hub.randomness import START, image_keys, uniform

ATTACKS = {
    "FGSM": FGSM(eps=0.1),
    "FGSM L2": FGSM(eps=0.5, norm="L2"),
    "RFGSM": RFGSM(eps=0.1),
    "RFGSM L2": RFGSM(eps=0.5, norm="L2"),
    "NFGSM": NFGSM(eps=0.1),
    "PGD": PGD(eps=0.1, step_size=0.03, steps=5),
    "PGD L2": PGD(eps=0.5, step_size=0.15, steps=5, norm="L2"),
    "PGD from the image": PGD(eps=0.1, step_size=0.03, steps=5, random_start=False),
    "PGD with restarts": PGD(eps=0.1, step_size=0.03, steps=3, restarts=3),
    "PGD L2 with restarts": PGD(eps=0.5, step_size=0.15, steps=3, restarts=3, norm="L2"),
}
RANDOM = [name for name in ATTACKS if name not in ("FGSM", "FGSM L2", "PGD from the image")]
EVALUATING = [name for name in ATTACKS if name != "NFGSM"]
PROJECTED = [name for name in RANDOM if name != "NFGSM"]


# What is attacked


def trained_toy(low: float, high: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model trained for a moment, and 400 images that it hasn't seen, with pixels in [low, high]."""
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.rand(4, 3, 8, 8, generator=generator)
    labels = torch.arange(800) % 4
    images = low + (high - low) * (0.3 * prototypes[labels] + 0.7 * torch.rand(800, 3, 8, 8, generator=generator))
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images[:400]), labels[:400]).backward()
        optimizer.step()
    return model.eval(), images[400:], labels[400:]


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 64, 4)
    )
    model(torch.rand(64, 3, 8, 8))  # statistics that eval mode doesn't share with a batch
    return model


def small_problem() -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A model, 24 images of which a third is black and white, labels that are wrong for a quarter of them, and keys."""
    model = small_model().eval()
    images = torch.rand(24, 3, 8, 8)
    images[:8] = images[:8].round()
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 4
    return model, images, labels, image_keys(0, 0, torch.arange(24))


class Linear(nn.Module):
    """Two classes. The worst loss in a ball is known: the margin falls by eps times the dual norm of the weights."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def margin(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight

    def forward(self, images: Tensor) -> Tensor:
        margin = self.margin(images)
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def linear_problem(eps: float, norm: str) -> tuple[Linear, Tensor, Tensor, Tensor, Tensor]:
    """Images at distances of 0.05 to 1.95 eps from the border, no pixel within 3 eps (Linf) of black or white; worst losses."""
    weight = torch.randn(192, generator=torch.Generator().manual_seed(0))
    dual = weight.norm(p=1 if norm == "Linf" else 2)
    weight *= 2 / (eps * dual)  # at eps the margin has fallen by 2
    margins = 2 * torch.linspace(0.05, 1.95, 24)
    labels = torch.arange(24) % 2
    signs = 1 - 2 * labels
    images = 0.5 + ((signs * margins / weight.norm(p=1))[:, None] * weight.sign()).view(24, 3, 8, 8)
    return Linear(weight), images, labels, image_keys(0, 0, torch.arange(24)), F.softplus(2 - margins)


class Hill(nn.Module):
    """The loss has its peak 0.6 of a step from the image, so that a second step leads back to the image.

    On the peak, an image that is grey in its second channel is misclassified, and one that is white there isn't.
    """

    def __init__(self, step: float):
        super().__init__()
        self.peak = nn.Parameter(torch.tensor(0.6 * step))

    def forward(self, images: Tensor) -> Tensor:
        position = (images[:, 0] - 0.5).flatten(1).sum(1)
        height = torch.exp(-(((position - self.peak) / self.peak) ** 2))  # 0.37 at the image, 0.64 after a step
        margin = images[:, 1].detach().flatten(1).mean(1) - height
        return torch.stack([margin, torch.zeros_like(margin)], 1)


class Jump(nn.Module):
    """Misclassifies what is a step away, at a lower loss than that of the image; from there the loss rises on the way back."""

    def __init__(self, step: float):
        super().__init__()
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        position = (images[:, 0] - 0.5).flatten(1).sum(1) / self.step
        constant = torch.ones_like(position)
        near = torch.stack([1 - position, 0.9 * constant, 0.9 * constant], 1)
        far = torch.stack([1 + 0.01 * position, 1.2 * constant, -9 * constant], 1)
        return torch.where(position[:, None] < 0.5, near, far)


class Needle(nn.Module):
    """Misclassifies what lies above a threshold, and has no gradient."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, images: Tensor) -> Tensor:
        position = (images - 0.5).flatten(1).sum(1)
        margin = torch.where(position > self.threshold, -1.0, 1.0) + 0 * position
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def size(delta: Tensor, norm: str) -> Tensor:
    return delta.flatten(1).norm(p=math.inf if norm == "Linf" else 2, dim=1)


@torch.no_grad()
def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images).argmax(1) == labels


@torch.no_grad()
def losses_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels, reduction="none")


# Checks


def runs(attack):
    """The small problem with the attack's images, in training and in evaluation."""
    for until_broken in (False,) if isinstance(attack, NFGSM) else (False, True):
        model, images, labels, keys = small_problem()
        adversarial = attack(model, images.clone().requires_grad_(), labels, keys, until_broken=until_broken)
        yield model, images, labels, adversarial


def check_ball(attack):
    radius = attack.eps * (1 + attack.noise_factor if isinstance(attack, NFGSM) else 1)
    for _, images, _, adversarial in runs(attack):
        assert adversarial.shape == images.shape
        assert adversarial.dtype == images.dtype
        assert not adversarial.requires_grad
        assert size(adversarial - images, attack.norm).max() <= radius + 1e-6


def check_pixels(attack):
    for _, _, _, adversarial in runs(attack):
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1


def check_model_left_alone(attack, model=None, images=None):
    """Also: each layer is in eval mode while the attack runs, and the images are not written to."""
    if model is None:
        model, images, *_ = small_problem()
    labels, keys = torch.arange(len(images)) % 3, image_keys(0, 0, torch.arange(len(images)))
    model.train()
    layers = list(model.modules())
    layers[len(layers) // 2].training = False
    next(model.parameters()).requires_grad_(False)
    modes = [layer.training for layer in layers]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.training)) for layer in layers]
    before = images.clone()
    for until_broken in (False,) if isinstance(attack, NFGSM) else (False, True):
        attack(model, images, labels, keys, until_broken=until_broken)
    for hook in hooks:
        hook.remove()
    assert seen
    assert not any(seen)
    assert [layer.training for layer in layers] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, before)


def check_keyed(attack):
    """An image's perturbation depends on its key and not on its batch or a global generator."""
    order = torch.tensor([20, 3, 9, 10, 1])
    for until_broken in (False,) if isinstance(attack, NFGSM) else (False, True):
        model, images, labels, keys = small_problem()
        generator = torch.get_rng_state()
        together = attack(model, images, labels, keys, until_broken=until_broken)
        assert torch.equal(torch.get_rng_state(), generator)
        torch.manual_seed(123)
        alone = attack(model, images[order], labels[order], keys[order], until_broken=until_broken)
        torch.testing.assert_close(alone, together[order], rtol=0, atol=1e-5)


def check_optimum(attack):
    """The worst loss of a linear model, and its robust accuracy, which is 1/2."""
    model, images, labels, keys, worst = linear_problem(attack.eps, attack.norm)
    for sure in surely_optimal(attack):
        adversarial = sure(model, images, labels, keys)
        torch.testing.assert_close(losses_of(model, adversarial, labels), worst, rtol=1e-4, atol=1e-5)
        assert correct(model, adversarial, labels).tolist() == [False] * 12 + [True] * 12
        if not isinstance(attack, NFGSM):
            adversarial = sure(model, images, labels, keys, until_broken=True)
            torch.testing.assert_close(losses_of(model, adversarial, labels)[12:], worst[12:], rtol=1e-4, atol=1e-5)
            assert correct(model, adversarial, labels).tolist() == [False] * 12 + [True] * 12


def surely_optimal(attack):
    """The attack with settings that reach the optimum of a linear model, in Linf with no step to spare."""
    if isinstance(attack, RFGSM):
        return [replace(attack, step_factor=1000.0)]  # a long step leaves nothing of the start
    if isinstance(attack, NFGSM):
        return [replace(attack, noise_factor=0.0)]
    if isinstance(attack, PGD):
        straight = replace(attack, random_start=False, restarts=1, steps=5, step_size=attack.eps / 5)
        return [straight, replace(attack, steps=8 if attack.norm == "Linf" else 40, step_size=attack.eps / 4)]
    return [attack]


def check_evaluation(attack):
    """Evaluation finds what training finds, or worse, and doesn't touch what needs no attack."""
    model, images, labels, keys = small_problem()
    attack = replace(attack, eps=attack.eps / 2)  # so that some images survive
    last = attack(model, images, labels, keys)
    worst = attack(model, images, labels, keys, until_broken=True)
    at_first, after_last, after_worst = (correct(model, x, labels) for x in (images, last, worst))
    assert torch.equal(worst[~at_first], images[~at_first])
    assert not (after_worst & ~(at_first & after_last)).any()
    assert (losses_of(model, worst, labels) >= losses_of(model, last, labels) - 1e-5)[after_worst].all()
    assert 0 < after_worst.sum() < at_first.sum(), "a check on images that all survive, or all break, checks nothing"


def check_best_iterate(attack):
    """Two steps lead over the peak of the loss and back to the image: the best iterate is the one between."""
    attack = replace(attack, random_start=False, restarts=1, steps=2, step_size=attack.eps)
    step = attack.eps * (64 if attack.norm == "Linf" else 8)
    model = Hill(step)
    images, labels = torch.full((2, 3, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    images[1, 1] = 1.0
    last = attack(model, images, labels)
    torch.testing.assert_close(last, images, rtol=0, atol=1e-5)
    worst = attack(model, images, labels, until_broken=True)
    torch.testing.assert_close((worst - images)[:, 0].sum((1, 2)), torch.full((2,), step), rtol=1e-4, atol=0)
    assert correct(model, worst, labels).tolist() == [False, True]


def check_broken_for_good(attack):
    """Of an image that is misclassified once, neither a higher loss nor a later step makes anything else."""
    attack = replace(attack, random_start=False, restarts=1, steps=2, step_size=attack.eps)
    model = Jump(attack.eps * (64 if attack.norm == "Linf" else 8))
    images, labels = torch.full((1, 3, 8, 8), 0.5), torch.tensor([0])
    last = attack(model, images, labels)
    assert correct(model, last, labels).all()
    adversarial = attack(model, images, labels, until_broken=True)
    assert losses_of(model, adversarial, labels) < losses_of(model, last, labels)
    assert not correct(model, adversarial, labels).any()


def check_restarts(attack):
    """More restarts break the same images and others; here an image breaks by a lucky start only."""
    width = attack.eps * (math.sqrt(192 / 3) if attack.norm == "Linf" else 1.0)  # of a start's position, one deviation
    model, images, labels = Needle(0.5 * width), torch.full((64, 3, 8, 8), 0.5), torch.zeros(64, dtype=torch.int64)
    keys = image_keys(0, 0, torch.arange(64))
    broken = []
    for restarts in (1, 2, 5):
        adversarial = replace(attack, restarts=restarts)(model, images, labels, keys, until_broken=True)
        broken.append(~correct(model, adversarial, labels))
    assert not (broken[0] & ~broken[1]).any()
    assert not (broken[1] & ~broken[2]).any()
    assert 0 < broken[0].sum() < broken[1].sum() < broken[2].sum()


# The real attacks


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("check", [check_ball, check_pixels, check_model_left_alone, check_keyed, check_optimum])
def test_attack(name, check):
    check(ATTACKS[name])


@pytest.mark.parametrize("name", EVALUATING)
def test_evaluation(name):
    check_evaluation(ATTACKS[name])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("check", [check_best_iterate, check_broken_for_good, check_restarts])
def test_pgd_search(check, norm):
    check(PGD(eps=0.1, step_size=0.02, steps=2, norm=norm))


# Mutants


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_restarts_outside_of_an_evaluation_end_where_the_loss_is_highest(norm):
    model, images, labels = trained_toy(0.0, 1.0)
    keys = image_keys(0, 0, torch.arange(len(images)))
    eps = {"Linf": 0.1, "L2": 0.5}[norm]
    attack = PGD(eps=eps, norm=norm, step_size=eps / 10, steps=2)
    once, often = (replace(attack, restarts=restarts)(model, images, labels, keys) for restarts in (1, 4))
    risen = losses_of(model, often, labels) - losses_of(model, once, labels)
    assert (risen >= 0).all()
    assert 0 < (risen > 0).sum() < len(images)
    transfer = Transfer(source=model, source_name="itself", attack=replace(attack, restarts=4))
    assert torch.equal(transfer(model, images, labels, keys), often)


def patched(name, function):
    """Replaces a function of ``attacks/attack.py`` wherever the attacks use it."""

    def mutate(monkeypatch, attack):
        for module in (base, fgsm, pgd):
            monkeypatch.setattr(module, name, function, raising=False)
        return attack

    return mutate


def without_clamp(monkeypatch, attack):
    clamp = Tensor.clamp
    monkeypatch.setattr(Tensor, "clamp", lambda x, *args, **kwargs: x if args == (0, 1) else clamp(x, *args, **kwargs))
    return attack


def subclass(**methods):
    """The attack as an instance of a subclass with other methods."""
    return lambda monkeypatch, attack: type("Mutant", (type(attack),), methods)(**vars(attack))


def one_step_fewer(method):
    return lambda attack, *args: getattr(PGD(**(vars(attack) | {"steps": attack.steps - 1})), method)(*args)


def gradient_by_backward(model, images, labels, loss):
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        logits = model(images)
        losses = loss(logits, labels)
        losses.sum().backward()
    return images.grad, losses.detach(), logits.detach()


@contextmanager
def eval_without_restoring(model):
    model.eval()
    yield


project, direction, random_point = base.project, base.steepest_direction, base.random_point
PGDS, IN_L2 = [name for name in ATTACKS if name.startswith("PGD")], [name for name in PROJECTED if "L2" in name]
MUTANTS = {
    "no projection": (patched("project", lambda delta, eps, norm: delta), check_ball, PROJECTED),
    "a larger ball": (patched("project", lambda delta, eps, norm: project(delta, 1.2 * eps, norm)), check_ball, PROJECTED),
    "a smaller ball": (patched("project", lambda delta, eps, norm: project(delta, 0.9 * eps, norm)), check_optimum, PROJECTED),
    "the other ball": (patched("project", lambda delta, eps, norm: project(delta, eps, "Linf")), check_ball, IN_L2),
    "no clamp": (without_clamp, check_pixels, list(ATTACKS)),
    "downhill": (patched("steepest_direction", lambda *args: -direction(*args)), check_optimum, list(ATTACKS)),
    "no step": (patched("steepest_direction", lambda gradient, norm: 0 * gradient), check_optimum, list(ATTACKS)),
    "shorter steps": (
        patched("steepest_direction", lambda *args: 0.9 * direction(*args)),
        check_optimum,
        ["FGSM", "FGSM L2", *PGDS],
    ),
    "one step fewer": (
        subclass(perturb=one_step_fewer("perturb"), search=one_step_fewer("search")),
        check_optimum,
        PGDS,
    ),
    "one step fewer in evaluation": (subclass(search=one_step_fewer("search")), check_optimum, PGDS),
    "norm of the batch": (patched("sample_norm", lambda x: x.norm()), check_keyed, [name for name in ATTACKS if "L2" in name]),
    "global generator": (
        patched("random_point", lambda keys, shape, eps, norm: eps * (torch.rand(len(keys), *shape) - 0.5)),
        check_keyed,
        RANDOM,
    ),
    "keys by position": (
        patched("random_point", lambda keys, *args: random_point(torch.arange(len(keys)), *args)),
        check_keyed,
        RANDOM,
    ),
    "train mode": (patched("eval_mode", lambda model: nullcontext()), check_model_left_alone, list(ATTACKS)),
    "modes not restored": (patched("eval_mode", eval_without_restoring), check_model_left_alone, list(ATTACKS)),
    "gradients of parameters": (patched("input_gradient", gradient_by_backward), check_model_left_alone, list(ATTACKS)),
    "last iterate in evaluation": (subclass(search=PGD.perturb), check_best_iterate, PGDS),
    "broken images go on": (subclass(search=PGD.perturb), check_broken_for_good, PGDS),
    "the same start again": (
        patched("fold_in", lambda keys, data: keys),
        check_restarts,
        [name for name in PGDS if name in RANDOM],
    ),
    "misclassified images too": (
        subclass(__call__=lambda attack, *args, until_broken=False: attack.perturb(*args)),
        check_evaluation,
        EVALUATING,
    ),
}


@pytest.mark.parametrize(("mutant", "name"), [(mutant, name) for mutant, (_, _, names) in MUTANTS.items() for name in names])
def test_mutant_fails(mutant, name, monkeypatch):
    mutate, check, _ = MUTANTS[mutant]
    attack = mutate(monkeypatch, ATTACKS[name])
    with pytest.raises(AssertionError):
        check(attack)


# The rest


def test_models_of_each_family(model):
    check_model_left_alone(PGD(eps=0.1, step_size=0.03, steps=2), model, torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("name", RANDOM)
def test_random_start(name):
    """It follows the keys, and torch's generator where there are none."""
    model, images, labels, keys = small_problem()
    attack = ATTACKS[name]
    assert not torch.equal(attack(model, images, labels, keys), attack(model, images, labels, keys + 1))
    torch.manual_seed(5)
    first, second = attack(model, images, labels), attack(model, images, labels)
    torch.manual_seed(5)
    assert torch.equal(attack(model, images, labels), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_ball_of_radius_zero_holds_the_image_only(name):
    model, images, labels, keys = small_problem()
    assert torch.equal(replace(ATTACKS[name], eps=0.0)(model, images, labels, keys), images)


def test_logits_in_half_precision():
    class Half(Linear):
        def forward(self, images):
            return super().forward(images).bfloat16()

    model, images, labels, keys, _ = linear_problem(0.1, "Linf")
    model = Half(model.weight.detach())
    _, losses, logits = base.input_gradient(model, images, labels, cross_entropy)
    assert losses.dtype == logits.dtype == torch.float32
    adversarial = replace(ATTACKS["PGD"], steps=8)(model, images, labels, keys, until_broken=True)
    assert correct(model, adversarial, labels).tolist() == [False] * 12 + [True] * 12


def test_nfgsm_is_noise_and_a_step():
    model, images, labels, keys, _ = linear_problem(0.1, "Linf")
    noise = 0.2 * (2 * uniform(keys, (3, 8, 8), stream=START) - 1)
    step = 0.1 * ((2 * labels - 1)[:, None] * model.weight.sign()).view_as(images)
    adversarial = NFGSM(eps=0.1)(model, images, labels, keys)
    torch.testing.assert_close(adversarial, images + noise + step)


def test_rfgsm_overshoots_the_ball_by_its_step_factor():
    model, images, labels, keys, _ = linear_problem(0.1, "Linf")
    noise = 0.1 * (2 * uniform(keys, (3, 8, 8), stream=START) - 1)
    step = 0.125 * ((2 * labels - 1)[:, None] * model.weight.sign()).view_as(images)
    torch.testing.assert_close(RFGSM(eps=0.1)(model, images, labels, keys), images + (noise + step).clamp(-0.1, 0.1))


def test_modes_are_restored_after_an_error():
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("out of memory")

    model = nn.Sequential(Broken())
    with pytest.raises(RuntimeError, match="out of memory"):
        FGSM(eps=0.1)(model, torch.rand(1, 3, 8, 8), torch.tensor([0]))
    assert model.training
    assert model[0].training


def test_inside_no_grad():
    model, images, labels, keys = small_problem()
    outside = ATTACKS["PGD"](model, images, labels, keys)
    with torch.no_grad():
        assert torch.equal(ATTACKS["PGD"](model, images, labels, keys), outside)


def test_parameters_get_gradients_after_an_attack_under_autocast():
    """Autocast keeps the weights that it cast; those of the attack must do for the training step."""
    model, images, labels, keys = small_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = ATTACKS["PGD"](model, images, labels, keys)
        loss = F.cross_entropy(model(adversarial), labels)
    loss.backward()
    assert adversarial.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_l2_steps_have_their_length_for_gradients_of_any_size(scale):
    gradient = torch.randn(4, 3, 8, 8)
    expected = gradient / gradient.flatten(1).norm(dim=1).view(4, 1, 1, 1)
    torch.testing.assert_close(base.steepest_direction(scale * gradient, "L2"), expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_model_of_tiny_logits_is_attacked_like_any_other(norm):
    model, images, labels, keys, worst = linear_problem(0.1, norm)
    tiny = Linear(model.weight.detach() * 1e-25)
    adversarial = PGD(eps=0.1, step_size=0.05, steps=2, norm=norm, random_start=False)(tiny, images, labels, keys)
    torch.testing.assert_close(losses_of(model, adversarial, labels), worst, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_no_direction_where_the_gradient_is_zero_or_undefined(norm):
    gradient = torch.zeros(2, 3, 8, 8)
    gradient[1] = torch.nan
    assert torch.equal(base.steepest_direction(gradient, norm), torch.zeros_like(gradient))
    gradient[1, 0, 0, 0] = torch.inf
    assert base.steepest_direction(gradient, norm)[1, 0, 0, 0] == 1


@pytest.mark.parametrize("name", ATTACKS)
def test_no_pixel_is_nan_where_the_gradient_is(name):
    class Undefined(Linear):
        def forward(self, images):
            return super().forward(images) + (0 * images).sqrt().sum((1, 2, 3))[:, None]

    _, images, labels, keys, _ = linear_problem(0.1, "Linf")
    model = Undefined(torch.ones(192))
    gradient, *_ = base.input_gradient(model, images, labels, cross_entropy)
    assert gradient.isnan().all()
    assert ATTACKS[name](model, images, labels, keys).isfinite().all()


def test_project_onto_a_ball_of_l2():
    delta = torch.randn(16, 3, 8, 8) * torch.logspace(-3, 1, 16).view(-1, 1, 1, 1)
    lengths = size(delta, "L2")
    nearest = base.project(delta, 1.0, "L2")
    assert torch.equal(nearest[lengths < 1], delta[lengths < 1])
    outside = lengths > 1
    assert 0 < outside.sum() < 16
    torch.testing.assert_close(nearest[outside], delta[outside] / lengths[outside].view(-1, 1, 1, 1))
    for radius in (0.0, 0.5):
        assert size(base.project(delta, radius, "L2"), "L2").max() <= radius + 1e-6
        assert torch.equal(base.project(torch.zeros(1, 3, 8, 8), radius, "L2"), torch.zeros(1, 3, 8, 8))
    others = base.project(torch.randn(100, 16, 3, 8, 8).flatten(0, 1), 1.0, "L2").view(100, 16, 3, 8, 8)
    assert ((others - delta).flatten(2).norm(dim=2) >= size(nearest - delta, "L2")).all()


def test_project_onto_a_ball_of_linf():
    delta = torch.tensor([[0.3, -0.3, 0.05, 0.0]])
    torch.testing.assert_close(base.project(delta, 0.1, "Linf"), torch.tensor([[0.1, -0.1, 0.05, 0.0]]))


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])
def test_starts_are_uniform_in_the_ball(shape):
    keys = image_keys(0, 0, torch.arange(4000))
    cube = base.random_point(keys, shape, 0.1, "Linf").flatten()
    assert scipy.stats.kstest(cube.numpy(), "uniform", args=(-0.1, 0.2)).pvalue > 1e-4
    ball = base.random_point(keys, shape, 0.1, "L2").flatten(1)
    dimensions = ball.shape[1]
    volumes = (ball.norm(dim=1) / 0.1) ** dimensions  # share of the ball that is nearer to its centre
    assert scipy.stats.kstest(volumes.numpy(), "uniform").pvalue > 1e-4
    directions = ball / ball.norm(dim=1, keepdim=True)
    covariance = dimensions * directions.T @ directions / len(ball)
    assert directions.mean(0).abs().max() < 5 / math.sqrt(len(ball) * dimensions)
    assert (covariance - torch.eye(dimensions)).abs().max() < 0.15
    assert abs(torch.corrcoef(torch.stack([volumes, directions[:, 0].abs()]))[0, 1]) < 5 / math.sqrt(len(ball))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSM(eps=-0.1), "eps, a radius in pixel units.* must be >= 0, got -0.1"),
        (lambda: FGSM(eps=math.nan), "eps, .* must be a finite number, got nan"),
        (lambda: FGSM(eps=math.inf, norm="L2"), "eps, .* must be a finite number, got inf"),
        (lambda: FGSM(eps="8/255"), "eps, .* must be a finite number, got '8/255'"),
        (lambda: FGSM(eps=8), "Did you mean 8/255"),
        (lambda: FGSM(eps=0.1, norm="L1"), r"norm must be one of \('Linf', 'L2'\), got 'L1'"),
        (lambda: RFGSM(eps=0.1, step_factor=-1.0), "step_factor must be >= 0"),
        (lambda: NFGSM(eps=0.1, noise_factor=-1.0), "noise_factor must be >= 0"),
        (lambda: NFGSM(eps=0.1, norm="L2"), "NFGSM is an Linf attack"),
        (lambda: PGD(eps=0.1, step_size=0.1, steps=0), "steps must be >= 1, got 0"),
        (lambda: PGD(eps=0.1, step_size=0.1, steps=2.5), "steps must be a whole number, got 2.5"),
        (lambda: PGD(eps=0.1, step_size=0.1, steps=1, restarts=0), "restarts must be >= 1"),
        (lambda: PGD(eps=0.1, step_size=-0.1, steps=1), "step_size must be >= 0"),
        (lambda: PGD(eps=0.1, step_size=0.1, steps=1, restarts=2, random_start=False), "use random_start=True"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nfgsm_is_not_for_evaluation():
    model, images, labels, keys = small_problem()
    with pytest.raises(ValueError, match="use FGSM or PGD"):
        NFGSM(eps=0.1)(model, images, labels, keys, until_broken=True)


# Against an established library

EPS = {"Linf": 0.03, "L2": 0.35}
SETTINGS = [(norm, steps) for norm in ("Linf", "L2") for steps in (1, 10)]  # one step is FGSM


@pytest.fixture(scope="module")
def toy():
    """A small model trained for a moment, and 400 images that it hasn't seen.

    Their pixels are in [0.2, 0.8]: at the borders, the library clips an L2 step before it projects it, and ours after that.
    """
    return trained_toy(0.2, 0.8)


def ours(norm, steps, *, random_start):
    eps = EPS[norm]
    if steps == 1:
        return FGSM(eps=eps, norm=norm)
    return PGD(eps=eps, norm=norm, step_size=eps / 4, steps=steps, random_start=random_start)


def theirs(model, images, labels, norm, steps, *, random_start):
    """Adversarial images of the Adversarial Robustness Toolbox."""
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=(3, 8, 8), nb_classes=4, clip_values=(0.0, 1.0), device_type="cpu"
    )
    shared = {"norm": np.inf if norm == "Linf" else 2, "eps": EPS[norm], "batch_size": len(images)}
    if steps == 1:
        attack = evasion.FastGradientMethod(classifier, **shared)
    else:
        np.random.seed(0)  # noqa: NPY002 (the library draws from it)
        attack = evasion.ProjectedGradientDescent(
            classifier, eps_step=EPS[norm] / 4, max_iter=steps, num_random_init=int(random_start), verbose=False, **shared
        )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


@pytest.mark.parametrize(("norm", "steps"), SETTINGS)
def test_same_images_as_the_library(toy, norm, steps):
    model, images, labels = toy
    expected = theirs(model, images, labels, norm, steps, random_start=False)
    adversarial = ours(norm, steps, random_start=False)(model, images, labels)
    different = (adversarial - expected).abs() > 1e-5
    assert different.float().mean() < 1e-3  # gradients around 0 have either sign


def check_as_strong_as_the_library(toy, norm, steps):
    model, images, labels = toy
    expected = correct(model, theirs(model, images, labels, norm, steps, random_start=True), labels).float().mean()
    keys = image_keys(0, 0, torch.arange(len(images)))
    adversarial = ours(norm, steps, random_start=True)(model, images, labels, keys, until_broken=True)
    assert 0.2 < expected < 0.8
    assert correct(model, adversarial, labels).float().mean() <= expected + 0.005


@pytest.mark.parametrize(("norm", "steps"), SETTINGS)
def test_as_strong_as_the_library(toy, norm, steps):
    check_as_strong_as_the_library(toy, norm, steps)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("mutant", ["a smaller ball", "downhill"])
def test_a_weaker_attack_is_noticed(toy, norm, mutant, monkeypatch):
    pytest.importorskip("art.attacks.evasion")
    mutate, *_ = MUTANTS[mutant]
    mutate(monkeypatch, None)
    with pytest.raises(AssertionError):
        check_as_strong_as_the_library(toy, norm, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 3, 4, 4), 255.0), r"in \[0, 1\], got values in \[255, 255\]"),
        (torch.full((2, 3, 4, 4), -0.5), r"in \[0, 1\]"),
        (torch.full((2, 3, 4, 4), math.nan), r"in \[0, 1\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "divide uint8 by 255"),
    ],
)
def test_images_that_are_no_pixels_are_refused(images, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(ValueError, match=message):
        PGD(eps=8 / 255, step_size=2 / 255, steps=2)(model, images, torch.tensor([0, 1]))
