from functools import partial

import by_hand
import pytest
import timm
import torch
from conftest import make_model
from torch import nn

from cartl_hub.blocks import last_blocks, list_blocks, recorded_input, trained_only
from cartl_hub.models import Classifier


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return Classifier(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn34_10", 17),
        ("wrn28_4", 14),
        ("wrn16_2", 8),
        ("resnet18", 9),
        ("resnet18_cifar", 9),
        ("resnet50_cifar", 17),
        ("wide_resnet50_2", 17),
        ("vit_tiny_patch16_224", 13),
        ("convnext_tiny", 19),
    ],
)
def test_number_of_blocks_beside_the_stem(name, expected):
    assert len(list_blocks(on_meta(name))) - 1 == expected


@pytest.mark.parametrize(
    "name",
    [
        "coatnet_0_224",
        "convnext_tiny",
        "densenet121",
        "dpn68",
        "efficientnet_b0",
        "eva02_tiny_patch14_224",
        "hrnet_w18_small",
        "maxvit_tiny_tf_224",
        "mixer_s32_224",
        "mobilenetv3_small_100",
        "nf_resnet50",
        "regnety_004",
        "resnet50d",
        "resnetv2_50",
        "swin_tiny_patch4_window7_224",
        "vgg11_bn",
        "vit_base_patch16_clip_224",
        "wrn16_2",
        "xcit_nano_12_p16_224",
    ],
)
def test_every_parameter_and_layer_is_in_one_block(name):
    model = on_meta(name, num_classes=10)
    blocks = list_blocks(model)
    names = [name for block in blocks for name in block.parameters]
    assert sorted(names) == sorted(name for name, _ in model.backbone.named_parameters())
    assert sum(block.num_parameters for block in blocks) == sum(p.numel() for p in model.parameters())
    layers = [layer for block in blocks for layer in block.layers()]
    assert len(layers) == len(set(layers))
    assert {m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm))} <= set(layers)
    assert set(model.head.modules()) <= set(last_blocks(model, 1)[0].layers())


def test_names_in_forward_order():
    names = [block.name for block in list_blocks(on_meta("wrn10_1"))]
    assert names == ["stem", "stages.0.0", "stages.1.0", "stages.2.0", "norm", "head.fc"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "forward"),
    [("wrn16_2", partial(by_hand.wide_resnet, depth=16)), ("resnet18_cifar", by_hand.resnet18), ("test_vit", by_hand.tiny_vit)],
)
def test_input_of_the_last_blocks_for_every_number_of_them(name, forward, training):
    model, images = make_model(name).train(training), torch.rand(2, 3, 32, 32)
    _, expected = forward(model.backbone.state_dict(), (images - model.mean) / model.std, training=training)
    assert len(expected) == len(list_blocks(model)) - 1
    for num_blocks in range(1, len(expected) + 1):
        with recorded_input(model, last_blocks(model, num_blocks)[0].modules.values()) as inputs:
            model(images)
        (found,) = inputs
        torch.testing.assert_close(found, expected[-num_blocks], rtol=1e-4, atol=1e-4)


def test_input_is_recorded_once_per_pass_and_only_while_asked(wrn):
    images = torch.rand(2, 3, 32, 32)
    block = last_blocks(wrn, 3)[0]
    with recorded_input(wrn, block.modules.values()) as inputs:
        wrn(images)
        wrn(images)
        wrn.backbone.norm(wrn.backbone.stages(wrn.backbone.stem(images)))
    wrn(images)
    assert len(inputs) == 2
    assert not any(module._forward_pre_hooks for module in wrn.modules())


@pytest.mark.parametrize("name", ["wrn10_1", "test_resnet", "test_convnext", "test_vit"])
def test_input_is_recorded_under_gradient_checkpointing(name):
    model, images = make_model(name).eval(), torch.rand(2, 3, 32, 32)
    recorded = []
    for enable in (False, True):
        model.backbone.set_grad_checkpointing(enable)
        for num_blocks in range(1, len(list_blocks(model))):
            with recorded_input(model, last_blocks(model, num_blocks)[0].modules.values()) as inputs:
                model(images)
            recorded += inputs
    plain, saving = recorded[: len(recorded) // 2], recorded[len(recorded) // 2 :]
    assert len(plain) == len(list_blocks(model)) - 1
    assert all(torch.equal(one, other) for one, other in zip(plain, saving, strict=True))
    assert all(inputs.requires_grad for inputs in saving)


def test_input_of_a_block_that_takes_several_maps():
    model = Classifier(timm.create_model("densenet121", growth_rate=4, block_config=(2, 2)))
    with recorded_input(model, last_blocks(model, 2)[0].modules.values()) as inputs:
        model(torch.rand(2, 3, 32, 32))
    assert last_blocks(model, 2)[0].name == "features.denseblock2.denselayer2"
    assert inputs[0].shape == (2, (8 + 4) * 4 * 4)  # (8 + 2 * 4) / 2 maps from the transition, 4 from the layer before


def test_norm_without_parameters_is_in_the_block_where_it_lies():
    plain = partial(nn.BatchNorm2d, affine=False)
    model = make_model("resnet18_cifar", norm_layer=plain)
    blocks = {block.name: set(block.layers()) for block in list_blocks(model)}
    assert len(blocks) == 10
    assert model.backbone.bn1 in blocks["conv1 + bn1"]
    assert set(model.backbone.layer4[0].modules()) == blocks["layer4.0"]


def test_norm_without_parameters_between_blocks_goes_with_the_one_before(wrn):
    wrn.backbone.norm = nn.BatchNorm2d(64, affine=False)
    assert [block.name for block in list_blocks(wrn)][-2:] == ["stages.2.0 + norm", "head.fc"]


@pytest.mark.parametrize("num_blocks", [0, -1, 6, 99, True, 1.5, "2"])
def test_number_of_blocks_out_of_range(wrn, num_blocks):
    with pytest.raises(ValueError, match=rf"num_blocks must be in \[1, 5\] for this wrn10_1, got {num_blocks}\."):
        last_blocks(wrn, num_blocks)


@pytest.mark.parametrize("name", ["wrn10_1", "resnet18_cifar", "test_vit"])
def test_model_without_classifier(name):
    with pytest.raises(ValueError, match="with a classifier, got one without; create it with num_classes > 0"):
        last_blocks(on_meta(name, num_classes=0), 1)


def test_whole_network_has_its_stem(wrn):
    assert [block.name for block in last_blocks(wrn, None)] == [block.name for block in list_blocks(wrn)]


def test_trained_only_is_undone_even_after_an_error(wrn):
    wrn.backbone.stem.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in wrn.parameters()]
    with trained_only(wrn, wrn.head.parameters()):
        assert [name for name, p in wrn.named_parameters() if p.requires_grad] == [
            "backbone.head.fc.weight",
            "backbone.head.fc.bias",
        ]
    with pytest.raises(KeyError), trained_only(wrn, wrn.head.parameters()):
        raise KeyError
    assert [parameter.requires_grad for parameter in wrn.parameters()] == before
