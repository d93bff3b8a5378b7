import copy
import io

import numpy as np
import pytest
import timm
import torch
import torchvision
from by_hand import resnet18, wide_resnet
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize

from cartl_hub.models import Classifier, create_model
from cartl_hub.models.wide_resnet import DEPTHS, WIDTHS


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def randomised(model):
    """Batch norm as after training: no two layers alike."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def test_pictures_are_prepared_as_timm_does_it():
    own = {"crop_mode": "squash", "interpolation": "lanczos", "crop_pct": 0.9}
    for backbone in (timm.create_model("resnet10t"), timm.create_model("resnet10t", pretrained_cfg_overlay=own)):
        stated = timm.data.resolve_model_data_config(backbone) | {"mean": (0,) * 3, "std": (1,) * 3}
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
        expected = (timm.data.create_transform(**stated)(picture) * 255).round().to(torch.uint8)
        assert torch.equal(Classifier(backbone).image_policy(picture), expected)


# Architectures


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_wide_resnets_exist(depth, width):
    expected, chans = 3 * 16 * 9, 16
    for out_chans in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            expected += 2 * chans + chans * out_chans * 9 + 2 * out_chans + out_chans * out_chans * 9
            expected += chans * out_chans if chans != out_chans else 0
            chans = out_chans
    assert num_parameters(on_meta(f"wrn{depth}_{width}")) == expected + 2 * chans + chans * 10 + 10


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn16_2", 691_674),
        ("wrn28_4", 5_849_050),
        ("wrn28_10", 36_479_194),
        ("wrn34_10", 46_160_474),
        ("resnet18_cifar", 11_173_962),
        ("resnet34_cifar", 21_282_122),
        ("resnet50_cifar", 23_520_842),
    ],
)
def test_published_parameter_counts(name, expected):
    assert num_parameters(on_meta(name, num_classes=10)) == expected


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True])
def test_wide_resnet_is_the_papers(slope, training):
    model = randomised(timm.create_model("wrn16_2", num_classes=7, negative_slope=slope)).train(training)
    images = torch.randn(4, 3, 32, 32)
    expected, _ = wide_resnet(model.state_dict(), images, 16, slope=slope, training=training)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_cifar_resnet_is_the_papers():
    model = randomised(timm.create_model("resnet18_cifar", num_classes=7))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), resnet18(model.state_dict(), images)[0], rtol=1e-5, atol=1e-5)


def test_depth_must_fit():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 4 with n >= 1 .*, got 18"):
        timm.create_model("wrn16_2", depth=18)


@pytest.mark.parametrize(
    ("name", "channels", "reductions"),
    [("wrn10_2", [32, 64, 128], [1, 2, 4]), ("resnet18_cifar", [64, 64, 128, 256, 512], [1, 1, 2, 4, 8])],
)
def test_features_only(name, channels, reductions):
    model = on_meta(name, features_only=True)
    assert (model.feature_info.channels(), model.feature_info.reduction()) == (channels, reductions)
    maps = model(torch.zeros(2, 3, 32, 32, device="meta"))
    assert [tuple(x.shape) for x in maps] == [(2, c, 32 // r, 32 // r) for c, r in zip(channels, reductions, strict=True)]


def test_features_only_of_some_stages():
    maps = on_meta("wrn10_1", features_only=True, out_indices=(0, -1))(torch.zeros(2, 3, 32, 32, device="meta"))
    assert [x.shape[1] for x in maps] == [16, 64]


def test_forward_intermediates():
    model, images = randomised(timm.create_model("wrn10_1")), torch.randn(2, 3, 32, 32)
    _, inputs = wide_resnet(model.state_dict(), images, 10)
    final, maps = model.forward_intermediates(images)
    for found, expected in zip(maps, inputs[1:4], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(final, model.forward_features(images))
    (last,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(last, final)
    stopped, _ = model.forward_intermediates(images, indices=[0], stop_early=True)
    assert torch.equal(stopped, maps[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("name", ["wrn10_1", "resnet18_cifar"])
def test_common_arguments(name):
    grey = timm.create_model(name, num_classes=5, in_chans=1).eval()
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    grey.reset_classifier(4)
    assert grey.num_classes == 4
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    grey.reset_classifier(0)
    assert grey(torch.rand(2, 1, 32, 32)).shape == (2, grey.num_features)


def test_gradient_checkpointing_changes_nothing():
    plain = timm.create_model("wrn10_1")
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    images = torch.randn(4, 3, 32, 32)
    outputs = [model.train()(images) for model in (plain, saving)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_activation_is_kept_beside_a_convex_sum():
    model = timm.create_model("resnet18_cifar", act_layer="silu", convex_blocks=2).eval()
    images = torch.randn(1, 3, 32, 32)
    convex = model(images)
    model.set_convex_blocks(0)
    assert not torch.allclose(model(images), convex)
    assert all(isinstance(block.act2, nn.SiLU) for block in model.layer4)


# Classifier


def test_logits_are_those_of_timm_on_normalised_images(model):
    config = timm.data.resolve_model_data_config(model.backbone)
    images = torch.rand(3, 3, 32, 32)
    expected = model.eval().backbone(normalize(images, config["mean"], config["std"]))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.head(model.features(images)), expected, rtol=1e-5, atol=1e-5)


def test_weights_carry_the_keys_of_timm(model):
    plain = timm.create_model(model.architecture, num_classes=3, **model.model_args)
    assert list(model.backbone.state_dict()) == list(plain.state_dict())
    assert list(model.state_dict()) == [f"backbone.{name}" for name in plain.state_dict()]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("wrn10_1", {"negative_slope": 0.1}),
        ("wrn10_1", {"convex_blocks": 3, "in_chans": 1}),
        ("resnet18_cifar", {"convex_blocks": 2, "in_chans": 1}),
        ("test_convnext", {"in_chans": 1}),
    ],
)
def test_model_args_build_the_backbone_again(name, kwargs):
    model = randomised(create_model(name, num_classes=3, **kwargs))
    assert model.model_args == kwargs
    again = timm.create_model(model.architecture, num_classes=3, **model.model_args).eval()
    again.load_state_dict(model.backbone.state_dict())
    images = torch.rand(2, kwargs.get("in_chans", 3), 32, 32)
    assert torch.equal(again((images - model.mean) / model.std), model(images))


def test_one_channel():
    model = create_model("wrn10_1", in_chans=1)
    assert model.image_policy.mode == "L"
    assert model.mean.flatten().tolist() == pytest.approx([sum((0.5071, 0.4865, 0.4409)) / 3])


def test_architecture_has_no_tag():
    assert create_model("test_resnet.r160_in1k").architecture == "test_resnet"


def test_input_size_of_a_vit_is_the_one_it_was_made_for():
    assert create_model("test_vit", img_size=48).image_policy.size == (48, 48)
    assert create_model("test_vit").image_policy.size == (160, 160)


def distilled():
    return on_meta("deit_tiny_distilled_patch16_224")


@pytest.mark.parametrize(
    "make", [nn.Flatten, torchvision.models.squeezenet1_0, lambda: on_meta("wrn10_1", features_only=True), distilled]
)
def test_other_backbones_are_refused(make):
    with pytest.raises(
        TypeError, match=r"expected a timm model with a group_matcher and one classifier, got \w+; make it with timm"
    ):
        Classifier(make())


def test_new_head(model):
    images, state = torch.rand(2, 3, 32, 32), torch.random.get_rng_state()
    heads = []
    for seed in (1, 1, 2):
        model.reset_head("abcde", seed=seed)
        assert model.eval()(images).shape == (2, 5)
        heads.append(model.head.weight.clone())
    assert (model.label_names, model.num_classes) == (tuple("abcde"), 5)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_copy_is_equal_and_apart(wrn):
    images, other = torch.rand(2, 3, 32, 32), copy.deepcopy(wrn).eval()
    assert torch.equal(other(images), wrn.eval()(images))
    other.head.bias.data += 1
    assert not torch.equal(other(images), wrn(images))


# Prediction


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def test_prediction_of_any_form_of_a_picture(wrn, pixels, tmp_path):
    picture, encoded = Image.fromarray(pixels), io.BytesIO()
    picture.save(encoded, "PNG")
    (tmp_path / "picture.png").write_bytes(encoded.getvalue())
    forms = [picture, pixels, torch.from_numpy(pixels).permute(2, 0, 1), encoded.getvalue(), tmp_path / "picture.png"]
    wrn.reset_head(["cat", "dog", "ship"])
    predictions = wrn.predict(forms, batch_size=2)
    assert {prediction.names for prediction in predictions} == {predictions[0].names}
    assert predictions[0].probabilities == pytest.approx(predictions[4].probabilities, abs=1e-5)
    assert wrn.predict(picture)[0].names == predictions[0].names
    shares = wrn.eval()(wrn.image_policy(picture)[None] / 255).softmax(1)[0]
    named = sorted(zip(shares.tolist(), ("cat", "dog", "ship"), strict=True), reverse=True)
    assert predictions[0].names == tuple(name for _, name in named)
    assert predictions[0].probabilities == pytest.approx([share for share, _ in named], abs=1e-5)
    assert str(predictions[0]).startswith(f"{named[0][1]} {named[0][0]:.1%}, ")


def test_prediction_without_names_and_with_fewer_classes(wrn, pixels):
    (prediction,) = wrn.predict(pixels, top=2)
    assert len(prediction.names) == 2
    assert set(prediction.names) < {"0", "1", "2"}
    assert wrn.predict([]) == []


def test_prediction_leaves_the_modes_alone(wrn, pixels):
    wrn.train()
    wrn.backbone.norm.eval()
    before = [module.training for module in wrn.modules()], wrn.backbone.stages[0][0].norm1.running_mean.clone()
    wrn.predict(pixels)
    assert [module.training for module in wrn.modules()] == before[0]
    assert torch.equal(wrn.backbone.stages[0][0].norm1.running_mean, before[1])


def test_prediction_names_the_picture_it_cannot_read(wrn, pixels):
    with pytest.raises(ValueError, match="picture 1: expected a picture"):
        wrn.predict([pixels, 3])


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_no_picture_has(channels):
    with pytest.raises(ValueError, match=f"expected a network of 1 or 3 input channels, .* got {channels}"):
        Classifier(timm.create_model("test_resnet", in_chans=channels))
