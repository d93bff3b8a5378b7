import copy
import json
from dataclasses import dataclass
from functools import partial

import by_hand
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import make_model
from timm.layers import StdConv2d
from torch import nn

from cartl_hub.attacks import FGSM, PGD, RFGSM, Attack, Transfer
from cartl_hub.attacks.attack import random_start
from cartl_hub.blocks import input_sizes, last_blocks
from cartl_hub.config import from_dict, to_dict
from cartl_hub.methods import FDM, NEFT, TRADES, AdversarialTraining, Batch, FineTuning, Jigsaw, LwF, MultiTask, Rotation, SimCLR
from cartl_hub.methods.adversarial import EpsSchedule, scaled
from cartl_hub.methods.fdm import feature_distance
from cartl_hub.methods.lwf import SourceFeatures
from cartl_hub.methods.method import Images
from cartl_hub.randomness import CHOSEN, image_keys, uniform
from cartl_hub.recipe import KINDS
from cartl_hub.spectral import kernel_norm, operator_norm, weighted

FAST = RFGSM(eps=8 / 255)
METHODS = {
    "finetuning": FineTuning(),
    "finetuning-2": FineTuning(num_blocks=2),
    "neft": NEFT(num_blocks=2),
    "adversarial": AdversarialTraining(attack=PGD(eps=8 / 255, step_size=4 / 255, steps=1)),
    "adversarial-2": AdversarialTraining(attack=FAST, num_blocks=2, eps_schedule=EpsSchedule(start=0.2, end=0.8)),
    "adversarial-1-added": AdversarialTraining(attack=FAST, num_blocks=1, adversarial_share=0.5),
    "trades": TRADES(attack=FAST, num_blocks=2),
    "fdm": FDM(num_blocks=2, attack=FAST),
    "lwf": LwF(warm_start=0.0),
    "simclr": SimCLR(),
    "rotation": Rotation(attack=FAST),
    "jigsaw": Jigsaw(grid=2, num_permutations=4),
    "multitask": MultiTask(tasks=(SimCLR(attack=FAST), Jigsaw(augmentation=None)), weights=(1.0, 0.5)),
}


def batch_of(data, progress=0.0, num_images=6):
    indices = torch.arange(num_images)
    images = data.get(indices).float() / 255
    return Batch(images, data.labels[indices], indices, image_keys(0, 0, indices), progress)


def train(model, method, data, *, steps=2, images=None):
    """A few steps as the training loop makes them; returns the losses of the last one."""
    with method.setup(model, images) as modules:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(steps):
            model.train()
            modes = [module.training for module in model.modules()]
            losses = method.losses(model, batch_of(data, step / steps), **modules)
            assert [module.training for module in model.modules()] == modes
            assert all(value.isfinite().all() for value in losses.values())
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changes(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def held(model):
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    return list(model.state_dict()), hooks, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


# What holds for every method


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_method_trains_what_it_says_and_leaves_nothing_behind(method, model, data):
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # a new ConvNeXt scales its branches by 1e-6: fp32 would swallow their first steps
            parameter.data.fill_(1)
    model.head.bias.requires_grad_(False)
    before, state = held(model), snapshot(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained = {names[p] for block in last_blocks(model, method.trained_blocks) for p in block.parameters.values()}
    if not method.uses_labels:
        trained -= {names[parameter] for parameter in model.head.parameters()}
    losses = train(model, method, data)
    assert held(model) == before
    assert losses["logits"].shape == (6, 3) if method.uses_labels else "logits" not in losses
    assert changes(model, state) & set(names.values()) == trained


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_options_are_json(method):
    assert from_dict(json.loads(json.dumps(to_dict(method))), KINDS) == method


@pytest.mark.parametrize("make", [FineTuning, NEFT, FDM, AdversarialTraining, TRADES])
def test_number_of_blocks_is_checked_before_the_first_step(make, wrn):
    with pytest.raises(ValueError, match=r"num_blocks must be in \[1, 5\] for this wrn10_1, got 6"):
        make(num_blocks=6).setup(wrn).__enter__()


def test_one_block_is_the_classifier(model):
    expected = set(model.head.parameters())
    if model.architecture == "test_convnext":  # whose classifier begins with a norm
        expected |= set(model.backbone.head.norm.parameters())
    with FineTuning(num_blocks=1).setup(model):
        assert {parameter for parameter in model.parameters() if parameter.requires_grad} == expected


# FDM


@dataclass(frozen=True, kw_only=True)
class Brighter(Attack):
    """An attack whose images are known."""

    def perturb(self, model, images, labels, keys):
        return (images + self.eps).clamp(0, 1)


def test_feature_distance():
    clean, adversarial = torch.randn(2, 5, 3, 4, 4)
    difference = (clean - adversarial).numpy().reshape(5, -1)
    expected = np.mean(np.sqrt((difference**2).sum(1))) / np.sqrt(48)
    assert float(feature_distance(clean, adversarial)) == pytest.approx(expected, rel=1e-6)


def test_weight_is_that_of_the_authors_times_their_batch():
    clean, adversarial = torch.randn(2, 128, 3, 4, 4)
    summed = torch.stack([(one - other).norm() / 48**0.5 for one, other in zip(clean, adversarial, strict=True)]).sum()
    ours = FDM(num_blocks=4).weight * feature_distance(clean, adversarial)
    torch.testing.assert_close(ours, 0.005 * summed)


@pytest.mark.parametrize("num_blocks", [1, 3, 4, 5])
def test_fdm_is_the_formula_with_gradients_through_both_passes(wrn, data, num_blocks):
    method, batch = FDM(num_blocks=num_blocks, weight=2.0, attack=Brighter(eps=0.1)), batch_of(data)
    state = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in wrn.backbone.state_dict().items()
    }

    def forward(images):
        return by_hand.wide_resnet(state, (images - wrn.mean) / wrn.std, 10, training=True)

    _, clean = forward(batch.images)
    logits, adversarial = forward((batch.images + 0.1).clamp(0, 1))
    distance = (clean[-num_blocks] - adversarial[-num_blocks]).flatten(1).norm(dim=1)
    distance = distance.mean() / clean[-num_blocks][0].numel() ** 0.5
    expected = F.cross_entropy(logits, batch.labels) + 2.0 * distance
    expected.backward()
    with method.setup(wrn) as modules:
        losses = method.losses(wrn.train(), batch, **modules)
        losses["loss"].backward()
    torch.testing.assert_close(losses["feature_distance"], distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-5)
    for name, parameter in wrn.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-4)


# TRADES


def test_trades_is_the_formula_and_its_attack_maximises_the_divergence(wrn, data):
    method, batch = TRADES(beta=3.0, attack=PGD(eps=0.1, step_size=0.04, steps=2)), batch_of(data)
    with torch.no_grad():
        target = wrn.eval()(batch.images).softmax(1)
    adversarial = random_start(batch.images, batch.keys, 0.1, "Linf")
    for _ in range(2):  # written out: steps up the divergence, not the cross-entropy of the labels
        adversarial.requires_grad_()
        divergence = (target * (target.log() - wrn(adversarial).log_softmax(1))).sum()
        (gradient,) = torch.autograd.grad(divergence, adversarial)
        moved = adversarial.detach() + 0.04 * gradient.sign()
        adversarial = torch.min(torch.max(moved, batch.images - 0.1), batch.images + 0.1).clamp(0, 1)
    state = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in wrn.backbone.state_dict().items()
    }

    def forward(images):
        return by_hand.wide_resnet(state, (images - wrn.mean) / wrn.std, 10, training=True)[0]

    logits, shifted = forward(batch.images), forward(adversarial)
    probabilities = logits.softmax(1)
    divergence = (probabilities * (probabilities.log() - shifted.log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(logits, batch.labels) + 3.0 * divergence
    expected.backward()
    losses = method.losses(wrn.train(), batch)
    losses["loss"].backward()
    assert divergence > 1e-3
    torch.testing.assert_close(losses["divergence"], divergence, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-5)
    for name, parameter in wrn.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta must be > 0"),
        ({"attack": FGSM(eps=0.1)}, r"expected PGD, RFGSM or NFGSM with a random start for TRADES, got FGSM"),
        ({"attack": PGD(eps=0.1, step_size=0.1, steps=1, random_start=False)}, "with a random start"),
        ({"attack": PGD(eps=0.1, step_size=0.1, steps=1, loss="dlr")}, "expected an attack with loss='ce'"),
    ],
)
def test_trades_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TRADES(**options)


# LwF


@pytest.mark.parametrize("norm", [1, 2])
def test_lwf_is_the_formula(wrn, data, norm):
    batch, target = batch_of(data), torch.randn(6, 64)
    wrn.eval().requires_grad_(False)
    losses = LwF(norm=norm, weight=0.3, warm_start=0.0).losses(wrn, batch, source=lambda images, indices: target)
    difference = (wrn.features(batch.images) - target).numpy()
    distance = np.mean(np.abs(difference).sum(1)) if norm == 1 else np.mean(np.sqrt((difference**2).sum(1)))
    expected = float(F.cross_entropy(wrn(batch.images), batch.labels)) + 0.3 * distance
    assert float(losses["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("known", [False, True])
def test_warm_start_trains_the_classifier_alone(model, data, known):
    images = Images(len(data), lambda indices: data.get(indices).float() / 255) if known else None
    before = snapshot(model)
    train(model, LwF(warm_start=1.0), data, images=images)
    assert changes(model, before) == {
        name for name, p in model.named_parameters() if any(p is q for q in model.head.parameters())
    }


def test_warm_start_ends(wrn, data):
    method = LwF(warm_start=0.5)
    with method.setup(wrn) as modules:
        first, second = (method.losses(wrn, batch_of(data, progress), **modules) for progress in (0.49, 0.5))
    assert "feature_distance" not in first
    assert "feature_distance" in second


@pytest.mark.parametrize("known", [False, True])
def test_source_features_are_computed_once_where_images_are_known(wrn, data, known, monkeypatch):
    seen, compute = [], SourceFeatures._compute
    monkeypatch.setattr(SourceFeatures, "_compute", lambda self, images: seen.append(len(images)) or compute(self, images))
    expected = wrn.eval().features(batch_of(data).images)
    images = Images(len(data), lambda indices: data.get(indices).float() / 255) if known else None
    method = LwF(warm_start=0.0)
    train(wrn, method, data, images=images, steps=3)
    assert seen == ([24] if known else [6, 6, 6])
    source = SourceFeatures(make_model("wrn10_1"), images)
    batch = batch_of(data)
    torch.testing.assert_close(source(batch.images, batch.indices), expected, rtol=1e-5, atol=1e-5)


def test_source_is_frozen_and_not_part_of_what_is_trained(wrn, data):
    with LwF().setup(wrn) as modules:
        source, batch = modules["source"].train(), batch_of(data)
        before = source(batch.images, batch.indices)
        with torch.no_grad():
            for parameter in wrn.parameters():
                parameter += 1
        assert torch.equal(source(batch.images, batch.indices), before)
        assert not before.requires_grad
        assert not list(source.parameters())
        assert not source.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 3}, "norm must be 1 or 2, got 3"),
        ({"weight": float("nan")}, "weight must be a finite number, got nan"),
        ({"weight": -0.1}, "weight must be >= 0, got -0.1"),
        ({"warm_start": 1.5}, "warm_start must be >= 0 and <= 1, got 1.5"),
    ],
)
def test_lwf_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LwF(**options)


# Adversarial training


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.25, 0.0), (0.375, 0.25), (0.5, 0.5), (0.75, 1.0), (0.99, 1.0), (1.0, 1.0)]
)
def test_radius_over_the_run(progress, expected):
    assert EpsSchedule(start=0.25, end=0.75).factor(progress) == pytest.approx(expected)


@pytest.mark.parametrize(("start", "end", "before", "after"), [(0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.0, 1.0), (0.0, 1.0, 0.49, 0.5)])
def test_radius_without_a_beginning_or_a_slope(start, end, before, after):
    schedule = EpsSchedule(start=start, end=end)
    assert (schedule.factor(0.49), schedule.factor(0.5)) == pytest.approx((before, after))


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_schedule_out_of_range(start, end):
    with pytest.raises(ValueError, match=r"expected 0 <= start <= end <= 1, shares of the run; got start="):
        EpsSchedule(start=start, end=end)


@pytest.mark.parametrize(("progress", "eps"), [(0.0, 0.0), (0.2, 0.0), (0.3, 0.05), (0.4, 0.1), (0.9, 0.1)])
def test_training_images_follow_the_schedule(wrn, data, progress, eps):
    method = AdversarialTraining(attack=Brighter(eps=0.1), eps_schedule=EpsSchedule(start=0.2, end=0.4))
    batch = batch_of(data, progress)
    logits = wrn.eval()((batch.images + eps).clamp(0, 1))
    losses = method.losses(wrn, batch)
    torch.testing.assert_close(losses["logits"], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits, batch.labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_share_of_adversarial_images_is_added_to_the_clean_ones(wrn, data, share):
    method, batch = AdversarialTraining(attack=Brighter(eps=0.1), adversarial_share=share), batch_of(data, num_images=24)
    losses = method.losses(wrn.eval(), batch)
    chosen = [index for index in range(24) if float(uniform(batch.keys[index : index + 1], stream=CHOSEN)) < share]
    assert 0 < len(chosen) <= 24
    clean, brighter = (
        F.cross_entropy(wrn(images), batch.labels, reduction="none")
        for images in (batch.images, (batch.images + 0.1).clamp(0, 1))
    )
    expected = (clean.sum() + sum(brighter[index] for index in chosen)) / (24 * (1 + share))
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["logits"], wrn(batch.images))


def test_the_added_images_are_others_in_each_epoch_and_may_be_none(wrn, data):
    batch, method = batch_of(data), AdversarialTraining(attack=Brighter(eps=0.1), adversarial_share=1e-6)
    torch.testing.assert_close(
        method.losses(wrn.eval(), batch)["loss"] * (1 + 1e-6), F.cross_entropy(wrn(batch.images), batch.labels)
    )
    first, second = (uniform(image_keys(0, epoch, torch.arange(100)), stream=CHOSEN) < 0.3 for epoch in (0, 1))
    assert 15 < int(first.sum()) < 45
    assert not torch.equal(first, second)


@pytest.mark.parametrize("share", [0.0, 1.1, True])
def test_share_out_of_range(share):
    with pytest.raises(ValueError, match="adversarial_share must be"):
        AdversarialTraining(adversarial_share=share)


def test_step_is_scaled_with_the_radius():
    attack = PGD(eps=0.4, step_size=0.1, steps=7)
    assert scaled(attack, 0.5) == PGD(eps=0.2, step_size=0.05, steps=7)
    assert scaled(attack, 1.0) is attack
    assert scaled(RFGSM(eps=0.4), 0.5) == RFGSM(eps=0.2)
    transfer = scaled(Transfer(source=nn.Identity(), source_name="another", attack=attack), 0.5)
    assert (transfer.eps, transfer.attack) == (0.2, scaled(attack, 0.5))


# NEFT


@pytest.mark.parametrize("sigma", ["kernel", "operator"])
def test_weights_of_the_last_blocks_have_the_norm(wrn, data, sigma):
    train(wrn, NEFT(num_blocks=3, beta=0.6, sigma=sigma), data)
    layers = weighted(layer for block in last_blocks(wrn, 3) for layer in block.layers())
    sizes = input_sizes(wrn, layers)
    norms = [operator_norm(layer, sizes.get(layer)) if sigma == "operator" else kernel_norm(layer.weight) for layer in layers]
    assert [float(norm) for norm in norms] == pytest.approx([0.6] * 4, rel=1e-4)


def test_sizes_of_the_inputs(wrn):
    block = wrn.backbone.stages[2][0]
    layers = [block.conv1, block.conv2, block.shortcut, wrn.head]
    assert input_sizes(wrn, layers) == {block.conv1: (16, 16), block.conv2: (8, 8), block.shortcut: (16, 16)}


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("name", "forward"), [("wrn10_1", partial(by_hand.wide_resnet, depth=10)), ("resnet18_cifar", by_hand.resnet18)]
)
def test_convex_residual_is_part_of_the_architecture(name, forward, num_blocks):
    model = make_model(name).eval()
    plain = copy.deepcopy(model.backbone)
    NEFT(num_blocks=num_blocks, convex_residual=True).adapt(model)
    assert not any(module.training for module in model.modules())
    images = torch.rand(2, 3, 32, 32)
    inputs = (images - model.mean) / model.std
    expected, _ = forward(model.backbone.state_dict(), inputs, convex_blocks=num_blocks)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    holds_a_sum = num_blocks >= {"wrn10_1": 3, "resnet18_cifar": 2}[name]
    assert torch.allclose(model(images), plain(inputs), rtol=1e-3) is not holds_a_sum
    assert model.model_args == {"convex_blocks": num_blocks}
    again = timm.create_model(model.architecture, num_classes=3, **model.model_args).eval()
    again.load_state_dict(model.backbone.state_dict())
    assert torch.equal(again(inputs), model(images))


@pytest.mark.parametrize("num_blocks", [3, 5])
def test_frozen_blocks_of_a_source_keep_their_convex_sums(num_blocks):
    model = make_model("wrn10_1", convex_blocks=4)
    NEFT(num_blocks=num_blocks, convex_residual=True).adapt(model)
    assert model.model_args == {"convex_blocks": max(4, num_blocks)}


def test_weights_without_a_bound_are_named(caplog):
    model = make_model("test_vit")
    with NEFT(num_blocks=3).setup(model):
        assert not caplog.messages
    model.backbone.blocks[-1].table = nn.Parameter(torch.ones(2, 2))
    with NEFT(num_blocks=3).setup(model):
        assert caplog.messages == ["NEFT bounds weights of Conv2d and Linear only, so not: blocks.5.table"]


def test_convex_residual_of_another_architecture():
    with pytest.raises(ValueError, match=r"part of the architecture, and test_resnet has no such option; use a wrn\*"):
        NEFT(num_blocks=2, convex_residual=True).adapt(make_model("test_resnet"))


def test_adapting_without_options_changes_nothing(model):
    images = torch.rand(2, 3, 32, 32)
    expected = model.eval()(images)
    for method in METHODS.values():
        method.adapt(model)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0, got 0.0"),
        ({"beta": float("inf")}, "beta must be a finite number, got inf"),
        ({"beta": float("nan")}, "beta must be a finite number, got nan"),
        ({"power_iterations": 0}, "power_iterations must be >= 1, got 0"),
        ({"sigma": "svd"}, "sigma must be 'kernel' or 'operator', got 'svd'"),
    ],
)
def test_neft_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        NEFT(num_blocks=2, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FDM(num_blocks=2, weight=float("nan")), "weight must be a finite number, got nan"),
        (lambda: FDM(num_blocks=2, weight=-1), "weight must be >= 0, got -1"),
        (lambda: FDM(num_blocks=2, attack=None), "attack must be an attack, .* got None"),
        (lambda: AdversarialTraining(attack=None), "attack must be an attack, .* got None"),
        (lambda: AdversarialTraining(eps_schedule=0.5), "eps_schedule must be an EpsSchedule, got 0.5"),
        *(
            (partial(kind, num_blocks=1.5), "num_blocks must be a whole number")
            for kind in (FineTuning, NEFT, FDM, AdversarialTraining, TRADES)
        ),
    ],
)
def test_options_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_neft_of_standardised_weights():
    model = make_model("resnetv2_50", conv_layer=StdConv2d, layers=(1, 1), channels=(8, 8), stem_chs=8)
    with pytest.raises(ValueError, match="got StdConv2d, which standardises it"):
        NEFT(num_blocks=2).setup(model).__enter__()


def test_zeros_cannot_be_rescaled(wrn):
    nn.init.zeros_(wrn.head.weight)
    with pytest.raises(ValueError, match=r"spectral norm > 0, to rescale it to 0\.4, got zeros in Linear"):
        NEFT(num_blocks=2).setup(wrn).__enter__()
