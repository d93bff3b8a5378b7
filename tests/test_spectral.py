import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn.utils import parametrize

from cartl_hub.blocks import input_sizes, last_blocks
from cartl_hub.spectral import (
    LipschitzRow,
    kernel_norm,
    lipschitz_product,
    lipschitz_table,
    operator_norm,
    plain_state_dict,
    rescaled,
    weighted,
)


def last_layers(model, num_blocks=3):
    return weighted(layer for block in last_blocks(model, num_blocks) for layer in block.layers())


def train(model, data, steps=3, autocast=None):
    """A few steps on whatever requires a gradient."""
    images, labels = data.get(torch.arange(6)).float() / 255, data.labels[:6]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        with autocast or nullcontext():
            loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss


# Norms


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 4, 3, 3), (40, 2, 3, 3), (4, 4, 1, 1)])
def test_kernel_norm_is_the_largest_singular_value(shape):
    weight = torch.randn(shape)
    expected = torch.linalg.matrix_norm(weight.flatten(1).double(), 2)
    torch.testing.assert_close(kernel_norm(weight), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(3, 5, 1, stride=2),
        nn.Conv2d(2, 3, (3, 2), padding=2, dilation=2),
        nn.Conv2d(2, 3, 5, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
        Conv2dSame(3, 4, 3, stride=2),
    ],
    ids=repr,
)
def test_operator_norm_is_that_of_the_dense_matrix(layer):
    size = (6, 5)
    points = torch.eye(layer.in_channels * 30).unflatten(1, (layer.in_channels, *size))
    with torch.no_grad():
        matrix = (layer(points) - layer(torch.zeros_like(points))).flatten(1).double()
    expected = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(operator_norm(layer, size), expected, rtol=1e-5, atol=0)


def test_operator_norm_of_known_layers():
    box = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(box.weight)
    assert float(kernel_norm(box.weight)) == pytest.approx(3)
    assert float(operator_norm(box, (20, 20))) == pytest.approx((1 + 2 * math.cos(math.pi / 21)) ** 2, rel=1e-6)  # towards 9
    assert float(operator_norm(nn.Linear(4, 6), (1, 1), weight=2 * torch.eye(6, 4))) == pytest.approx(2)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_operator_norm_lies_between_kernel_norm_and_its_bound(kernel):
    for layer in [nn.Conv2d(4, 8, kernel, padding=kernel // 2) for _ in range(3)]:
        low, found = float(kernel_norm(layer.weight)), float(operator_norm(layer, (9, 9)))
        assert low * (1 - 1e-9) <= found <= low * kernel * (1 + 1e-9)


def test_operator_norm_of_small_weights():
    layer = nn.Conv2d(16, 16, 3, padding=1)
    expected = operator_norm(layer, (6, 6))
    for scale in (1e-5, 1e-30, 0.0):
        torch.testing.assert_close(operator_norm(layer, (6, 6), weight=layer.weight.double() * scale), expected * scale)


@pytest.mark.parametrize("of", [lambda layer: kernel_norm(layer.weight), lambda layer: operator_norm(layer, (4, 4))])
def test_norm_of_a_weight_that_is_not_finite(of):
    layer = nn.Conv2d(2, 2, 3)
    layer.weight.data[0, 0, 0, 0] = torch.inf
    assert of(layer).isnan()


# Rescaling


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sigma", ["kernel", "operator"])
@pytest.mark.parametrize("name", ["wrn10_1", "test_resnet", "test_convnext", "test_vit"])
def test_rescaled_layers_have_the_norm_and_nothing_else_has_changed(name, sigma, precision, data):
    model = make_model(name)
    layers = last_layers(model)
    sizes = input_sizes(model, layers)
    model.requires_grad_(False)
    for layer in layers:
        layer.weight.requires_grad_(True)
        layer.weight.data *= 0.01 if layer is layers[0] else 3.0
    parameters, keys, kinds = list(model.parameters()), list(model.state_dict()), [type(layer) for layer in layers]
    before, flags = [parameter.detach().clone() for parameter in parameters], [p.requires_grad for p in parameters]
    with rescaled(layers, 0.4, sigma=sigma, sizes=sizes):
        train(model, data, autocast=torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else None)
        inside = plain_state_dict(model)
    for layer in layers:
        operator = sigma == "operator" and isinstance(layer, nn.Conv2d)
        norm = operator_norm(layer, sizes[layer]) if operator else kernel_norm(layer.weight)
        assert float(norm) == pytest.approx(0.4, rel=1e-4)
    assert list(model.state_dict()) == keys
    for key, tensor in model.state_dict().items():
        assert torch.equal(inside[key], tensor)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert [p.requires_grad for p in parameters] == flags
    assert [not torch.equal(now, then) for now, then in zip(parameters, before, strict=True)] == flags
    assert [type(layer) for layer in layers] == kinds
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_shortcuts_and_classifier_are_among_the_layers(wrn):
    names = {module: name for name, module in wrn.backbone.named_modules()}
    assert [names[layer] for layer in last_layers(wrn)] == [
        "stages.2.0.conv1",
        "stages.2.0.conv2",
        "stages.2.0.shortcut",
        "head.fc",
    ]


@pytest.mark.parametrize("sigma", ["kernel", "operator"])
def test_scale_of_the_weight_gets_no_gradient(sigma):
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with rescaled([layer], 0.5, sigma=sigma, sizes={layer: (6, 6)}, iterations=100):
        layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
        original = layer.parametrizations.weight.original
    assert F.cosine_similarity(original.flatten(), original.grad.flatten(), dim=0).abs() < 1e-4


def test_running_state_is_what_eval_mode_uses():
    model = nn.Sequential(nn.Linear(20, 30), nn.Conv2d(2, 3, 3))
    with rescaled(model, 1.0):
        model.train()[0](torch.randn(2, 20))
        state = plain_state_dict(model.train(), converged=False)
        assert model[0].parametrizations.weight[0].training
        model.eval()
        assert list(state) == ["0.bias", "0.weight", "1.bias", "1.weight"]
        assert all(torch.equal(state[f"{index}.weight"], layer.weight) for index, layer in enumerate(model))


def test_power_iteration_goes_on_in_train_mode_only():
    layer = nn.Linear(20, 30)
    images = torch.randn(2, 20)
    with rescaled([layer], 1.0):
        running = layer.parametrizations.weight[0]
        start = running.v.clone()
        layer.eval()(images)
        assert torch.equal(running.v, start)
        layer.train()(images)
        assert not torch.equal(running.v, start)


@pytest.mark.parametrize("sigma", ["kernel", "operator"])
def test_weight_does_not_depend_on_autocast(sigma):
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with rescaled([layer], 0.4, sigma=sigma, sizes={layer: (6, 6)}):
        expected = layer.eval().weight
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.weight, expected)


def test_two_passes_before_one_step_back(wrn):
    images = torch.rand(4, 3, 32, 32)
    with rescaled(last_layers(wrn), 0.4):
        (wrn(images) + wrn(images.flip(3))).square().sum().backward()
    assert wrn.head.weight.grad.isfinite().all()


def diverge(layers, value):
    with rescaled(layers, 0.4):
        layers[0].parametrizations.weight.original.data.fill_(value)
        raise RuntimeError("diverged")


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_error_inside_leaves_a_plain_model(wrn, value):
    layers = last_layers(wrn)
    with pytest.raises(RuntimeError, match="diverged"):
        diverge(layers, value)
    assert not any(parametrize.is_parametrized(module) for module in wrn.modules())
    assert float(kernel_norm(layers[-1].weight)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("layer", "sigma", "message"),
    [
        (nn.Conv2d(2, 2, 3), "operator", r"expected the size of the input of Conv2d\(.*, got none; pass it in sizes"),
        (StdConv2d(2, 2, 3), "kernel", "layers that use their weight as it is, got StdConv2d, which standardises it"),
        (nn.Linear(2, 2).requires_grad_(False), "kernel", r"spectral norm > 0, to rescale it to 0.4, got zeros in Linear\("),
    ],
)
def test_layer_that_cannot_be_rescaled(layer, sigma, message):
    other = nn.Linear(3, 3)
    before = other.weight.detach().clone()
    if isinstance(layer, nn.Linear):
        layer.weight.zero_()
    with pytest.raises(ValueError, match=message), rescaled([other, layer], 0.4, sigma=sigma):
        pass
    assert torch.equal(other.weight, before)
    assert not parametrize.is_parametrized(other)


# Lipschitz bounds


def test_lipschitz_table_of_known_layers():
    layers = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, eps=1.0), nn.ReLU(), nn.Linear(2, 2))
    layers[0].weight.data = torch.diag(torch.tensor([2.0, 0.5])).view(2, 2, 1, 1)
    layers[1].weight.data, layers[1].running_var = torch.tensor([1.0, -6.0]), torch.tensor([0.0, 3.0])
    layers[3].weight.data = torch.diag(torch.tensor([0.1, 0.5]))
    rows = lipschitz_table(dict(layers.named_children()), {layers[0]: (4, 4)})
    assert rows == [
        LipschitzRow(name="0", kernel_norm=pytest.approx(2), operator_norm=pytest.approx(2)),
        LipschitzRow(name="1", batch_norm=pytest.approx(3)),
        LipschitzRow(name="3", kernel_norm=pytest.approx(0.5), operator_norm=pytest.approx(0.5)),
    ]
    assert lipschitz_product(rows) == pytest.approx(3)
    assert [row.factor for row in rows] == pytest.approx([2, 3, 0.5])


def test_lipschitz_table_of_batch_norm_without_affine_map():
    (row,) = lipschitz_table({"norm": nn.BatchNorm2d(3, affine=False, eps=3.0)}, {})
    assert row.factor == pytest.approx(0.5)


def test_lipschitz_product_bounds_a_chain():
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).eval()
    rows = lipschitz_table(dict(chain.named_children()), {chain[0]: (8, 8), chain[3]: (8, 8)})
    one, other = torch.randn(2, 64, 3, 8, 8)
    stretch = (chain(one) - chain(other)).flatten(1).norm(dim=1) / (one - other).flatten(1).norm(dim=1)
    assert 0 < stretch.max() <= lipschitz_product(rows)


def test_lipschitz_table_refuses_standardised_weights():
    with pytest.raises(ValueError, match="got StdConv2d"):
        lipschitz_table({"conv": StdConv2d(2, 2, 3)}, {})
