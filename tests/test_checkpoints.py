import argparse
import hashlib
import json
import pickle
from collections import OrderedDict
from functools import partial

import foreign
import numpy as np
import pytest
import timm
import torch
from conftest import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cartl_hub import ImagePolicy, list_blocks, load_model, save_model
from cartl_hub.checkpoints import CheckpointError, import_checkpoint

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
IDENTITY = {"mean": 0, "std": 1}
BN_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def images(size=32, chans=3):
    return torch.rand(2, chans, size, size, generator=torch.Generator().manual_seed(5))


def normalised(x, mean=MEAN, std=STD):
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@pytest.fixture
def write(tmp_path):
    """Save anything as a checkpoint."""

    def save(content, name="net.pt", **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


@pytest.fixture
def trades():
    """The weights of a tiny WRN that takes [0, 1], and its logits."""
    weights = foreign.Weights()
    return weights, foreign.wide_resnet(weights, images())


def prefixed(weights, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def robustness(weights, mean=MEAN, std=STD):
    """The state dict of an AttackerModel under DataParallel."""
    constants = {"new_mean": torch.tensor(mean).view(-1, 1, 1), "new_std": torch.tensor(std).view(-1, 1, 1)}
    parts = {
        "normalizer.": constants,
        "model.": weights,
        "attacker.normalize.": constants,
        "attacker.model.": weights,
    }
    return OrderedDict((f"module.{prefix}{name}", tensor) for prefix, part in parts.items() for name, tensor in part.items())


def assert_same(model, expected, x):
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


# The same function


DEEP = {"layers": (3, 4, 6, 3), "bottleneck": True}
torchvision = partial(foreign.resnet, names="torchvision")
cartl_resnet = partial(foreign.resnet, names="cartl")
preact = foreign.preact_resnet18
SHORTCUTS = [{"activated_shortcut": activated, "final_norm": final} for activated in (True, False) for final in (True, False)]
NETWORKS = [
    ("wrn10_1", "robustbench", foreign.wide_resnet, {}),
    ("wrn16_2", "robustbench", partial(foreign.wide_resnet, depth=16, width=2), {}),
    ("wrn16_2", "cartl", partial(foreign.wide_resnet, depth=16, width=2, slope=0.1), {"negative_slope": 0.1}),
    *(
        ("wrn16_1", "cartl", partial(foreign.wide_resnet, depth=16, slope=0.1, convex_blocks=k), {"convex_blocks": k})
        for k in (3, 5)
    ),
    ("resnet18_cifar", "robustbench", foreign.resnet, {}),
    ("resnet34_cifar", "robustness", partial(foreign.resnet, layers=(3, 4, 6, 3)), {}),
    ("resnet50_cifar", "robustbench", partial(foreign.resnet, **DEEP), {}),
    ("resnet18_cifar", "cartl", cartl_resnet, {}),
    ("resnet18_cifar", "cartl", partial(cartl_resnet, convex_blocks=3), {"convex_blocks": 3}),
    ("resnet50_cifar", "cartl", partial(cartl_resnet, **DEEP), {}),
    *(("preact_resnet18", "robustbench", partial(preact, **options), options) for options in SHORTCUTS),
    ("resnet18", "timm", torchvision, {}),
    ("resnet34", "robustbench", partial(torchvision, layers=(3, 4, 6, 3)), {}),
    ("resnet50", "timm", partial(torchvision, **DEEP), {}),
    ("resnext50_32x4d", "timm", partial(torchvision, **DEEP, base=4, groups=32), {}),
    ("wide_resnet50_2", "robustbench", partial(torchvision, **DEEP, base=128), {}),
]


@pytest.mark.parametrize(("architecture", "format", "network", "options"), NETWORKS)
def test_logits_are_those_of_the_network_written_out(architecture, format, network, options, write):
    size = 32 if architecture.endswith("cifar") or "wrn" in architecture or "preact" in architecture else 64
    weights, x = foreign.Weights(), images(size)
    expected = network(weights, normalised(x))
    given = {name: value for name, value in options.items() if name in ("convex_blocks", "activated_shortcut")}
    imported = import_checkpoint(write(dict(weights)), format=format, model_args=given, mean=MEAN, std=STD)
    assert_same(imported.model, expected, x)
    assert (imported.model.architecture, imported.format, imported.dropped) == (architecture, format, ())
    assert not imported.model.training
    assert imported.model.num_classes == 5
    wrong = {"convex_blocks": 0, "activated_shortcut": not options.get("activated_shortcut"), "negative_slope": 0.0}
    for name in options.keys() & wrong.keys():  # what weights don't show changes the function
        other = import_checkpoint(write(dict(weights)), format=format, model_args=given | {name: wrong[name]}, mean=MEAN, std=STD)
        assert (other.model(x) - expected).abs().max() > 1e-3


def test_one_channel(write):
    weights, x = foreign.Weights(), images(chans=1)
    expected = foreign.wide_resnet(weights, normalised(x, (0.3,), (0.4,)))
    imported = import_checkpoint(write(dict(weights)), format="robustbench", mean=0.3, std=0.4)
    assert_same(imported.model, expected, x)
    assert (imported.model.image_policy.mode, imported.model.model_args) == ("L", {"in_chans": 1})


def test_architecture_with_other_sizes_is_declared(write):
    """As the WRN-50-4 of Salman et al. (base_width 256), here a half: timm has it as an argument only."""
    weights, x = foreign.Weights(), images(64)
    network = partial(torchvision, layers=(1, 1, 1, 1), bottleneck=True, base=32)
    expected = network(weights, x)
    path = write(dict(weights))
    with pytest.raises(CheckpointError, match=r"expected an architecture .* got a ResNet of torchvision: .*pass architecture="):
        import_checkpoint(path, **IDENTITY)
    declared = {"architecture": "resnet50", "model_args": {"layers": [1, 1, 1, 1], "base_width": 32}}
    assert_same(import_checkpoint(path, **declared, **IDENTITY).model, expected, x)


def test_timm_weights_with_a_prefix(write, tmp_path):
    model = make_model("test_convnext").eval()
    state = prefixed(model.backbone.state_dict(), "module.model.")
    constants = {"module.normalize.mean": model.mean[None], "module.normalize.std": model.std[None]}
    imported = import_checkpoint(write(state | constants), architecture="test_convnext")
    x = images(160)
    assert torch.equal(imported.model(x), model(x))
    assert (imported.format, len(imported.dropped)) == ("timm", 2)
    assert imported.model.image_policy.size == (160, 160)
    with pytest.raises(
        CheckpointError, match=r"expected the names of a .*, got module\.model\.stem.* need the right architecture="
    ):
        import_checkpoint(write(state | constants))


@pytest.mark.parametrize("architecture", ["resnet18d", "hrnet_w18_small"])
def test_declared_relatives_of_a_resnet(architecture, write):
    model = make_model(architecture).eval()
    state = prefixed(model.backbone.state_dict(), "module.")
    imported = import_checkpoint(write(state), architecture=architecture, mean=0, std=1)
    assert torch.equal(imported.model.backbone(images(64)), model.backbone(images(64)))


def test_models_of_this_package_come_back(wrn, write):
    path = write(wrn.backbone.state_dict())
    given = {"architecture": "wrn10_1", "mean": wrn.mean.flatten().tolist(), "std": wrn.std.flatten().tolist()}
    refuse(path, "expected to be told the activation of the WRN", **given)
    imported = import_checkpoint(path, model_args={"negative_slope": 0.0}, **given)
    assert torch.equal(imported.model(images()), wrn.eval()(images()))


@pytest.mark.parametrize("options", SHORTCUTS)
def test_blocks_of_a_preact_resnet(options):
    model = make_model("preact_resnet18", **options)
    names = [block.name for block in list_blocks(model)]
    assert names == [
        "stem",
        *(f"stages.{stage}.{block}" for stage in range(4) for block in range(2)),
        *(["norm"] if options["final_norm"] else []),
        "head.fc",
    ]
    assert model.backbone.model_args == {name: value for name, value in options.items() if not value}
    x = images()
    torch.testing.assert_close(model.head(model.eval().features(x)), model(x))
    model.reset_head("abcd")
    assert model(x).shape == (2, 4)


def test_features_of_a_preact_resnet():
    model = timm.create_model("preact_resnet18", features_only=True)
    maps = model(images())
    assert model.feature_info.channels() == [x.shape[1] for x in maps] == [64, 128, 256, 512]
    assert model.feature_info.reduction() == [32 // x.shape[2] for x in maps] == [1, 2, 4, 8]


def test_round_trip_through_a_model_folder(write, tmp_path):
    weights = foreign.Weights()
    foreign.preact_resnet18(weights, images(), activated_shortcut=False, final_norm=False)
    model = import_checkpoint(
        write(dict(weights)), model_args={"activated_shortcut": False}, mean=MEAN, std=STD, label_names=[*"abcde"], license="mit"
    ).model
    loaded = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(loaded(images()), model(images()))
    assert (loaded.label_names, loaded.image_policy) == (tuple("abcde"), model.image_policy)
    assert loaded.lineage["imported"] == model.lineage["imported"]


# robustness


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_robustness_checkpoint(key, write):
    weights, x = foreign.Weights(), images()
    expected = foreign.resnet(weights, normalised(x))
    junk = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "schedule": {"last_epoch": 3, "lr_lambdas": [None]},
        "epoch": 3,
        "amp": None,
        "nat_prec1": np.float64(90.5),
        "adv_prec1": torch.tensor(50.0),
        "args": argparse.Namespace(lr=0.1),
        "flags": np.bool_(True),
    }
    imported = import_checkpoint(write({key: robustness(weights)} | junk))
    assert_same(imported.model, expected, x)
    assert (imported.format, imported.model.architecture) == ("robustness", "resnet18_cifar")
    reasons = dict(imported.dropped)
    assert {name for name, reason in reasons.items() if reason == "beside the weights"} == junk.keys()
    assert {name for name, reason in reasons.items() if reason.startswith("normalisation")} == {
        f"module.{place}.new_{what}" for place in ("normalizer", "attacker.normalize") for what in ("mean", "std")
    }
    copies = {name for name, reason in reasons.items() if reason.startswith("second name")}
    assert copies == {f"module.attacker.model.{name}" for name in weights}
    text = str(imported)
    assert text.startswith(
        "resnet18_cifar with 5 classes, from format robustness\ninput: 32x32 RGB, in [0, 1]; normalisation inside: "
        "mean 0.49, 0.48, 0.45; std 0.25,"
    )
    assert "threat model it was trained for: not stated, say it with norm and eps (--norm, --eps)\n" in text
    assert "dropped, second name of a weight, equal to it: module.attacker.model.conv1.weight, " in text
    assert f" and {len(weights) - 12} more" in text


def test_robustness_imagenet_checkpoint(write):
    weights, x = foreign.Weights(), images(64)
    expected = torchvision(weights, normalised(x))
    imported = import_checkpoint(write({"model": robustness(weights)}))
    assert_same(imported.model, expected, x)
    assert (imported.format, imported.model.architecture) == ("robustness", "resnet18")
    assert imported.model.image_policy == ImagePolicy(size=(224, 224), interpolation="bilinear", crop_pct=0.875)


def test_pictures_of_any_robustness_network_are_prepared_as_torchvision_does_it(write):
    model = make_model("mobilenetv3_small_050", num_classes=5).eval()
    imported = import_checkpoint(write({"model": robustness(model.backbone.state_dict())}), architecture="mobilenetv3_small_050")
    assert imported.format == "robustness"
    assert imported.model.image_policy == ImagePolicy(size=(224, 224), interpolation="bilinear", crop_pct=0.875)


def test_wrn_of_robustness_says_its_activation_too(trades, write):
    path = write({"model": robustness(trades[0])})
    with pytest.raises(CheckpointError, match="expected to be told the activation of the WRN"):
        import_checkpoint(path)
    assert import_checkpoint(path, model_args={"negative_slope": 0.1}).format == "cartl"


def test_attackers_copy_must_be_equal(write):
    weights = foreign.Weights()
    foreign.resnet(weights, images())
    state = robustness(weights)
    state["module.attacker.model.linear.bias"] = weights["linear.bias"] + 1e-3
    with pytest.raises(
        CheckpointError, match=r"left over: module\.attacker\.model\.linear\.bias \(not equal to module\.model\.l"
    ):
        import_checkpoint(write({"model": state}))


@pytest.mark.parametrize("zipped", [True, False])
def test_dill_is_not_needed(zipped, trades, write):
    """Old releases of torch wrote no zip file."""
    dill = pytest.importorskip("dill")
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)], 0.1), [1, 2]).state_dict()
    content = {"model": dict(trades[0]), "schedule": schedule, "prec1": np.float64(1)}
    path = write(content, pickle_module=dill, _use_new_zipfile_serialization=zipped)
    imported = import_checkpoint(path, format="robustbench", **IDENTITY)
    assert_same(imported.model, trades[1], images())
    with pytest.raises(CheckpointError, match=r"a pickle that names dill\._dill\._create_function, which may run code"):
        import_checkpoint(write(content | {"f": lambda x: x}, pickle_module=dill, _use_new_zipfile_serialization=zipped))


def test_numpy_scalars_under_their_old_name(trades, write):
    path = write({"state_dict": dict(trades[0]), "acc": np.float64(0.5)}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert path.read_bytes() != content
    assert import_checkpoint(path, format="robustbench", **IDENTITY).dropped == (("acc", "beside the weights"),)


# RobustBench, TRADES and CARTL


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.module.", "module.model.", "1.", "_orig_mod.net."])
def test_prefix(prefix, trades, write):
    imported = import_checkpoint(write(prefixed(trades[0], prefix)), format="robustbench", **IDENTITY)
    assert_same(imported.model, trades[1], images())


@pytest.mark.parametrize("place", ["", "module.", "module.model.", "model."])
def test_block_that_is_never_used(place, trades, write):
    weights, expected = trades
    unused = {
        name.replace("block1.", "sub_block1."): tensor + 1 for name, tensor in weights.items() if name.startswith("block1.")
    }
    constants = {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}
    imported = import_checkpoint(write({"state_dict": prefixed(weights | unused | constants, place)}))  # not ambiguous
    assert_same(imported.model, expected, images())
    reasons = dict(imported.dropped)
    assert imported.format == "robustbench"
    assert reasons == {f"{place}{name}": "never used in the forward pass" for name in unused} | {
        f"{place}{name}": "normalisation, now in the config" for name in constants
    }


def test_activation_of_a_wrn_has_to_be_told(trades, write):
    path = write(dict(trades[0]))
    with pytest.raises(CheckpointError, match=r"the activation of the WRN, .* format='cartl' .* format='robustbench' \(ReLU"):
        import_checkpoint(path, **IDENTITY)
    for slope, format in ((0.0, "robustbench"), (0.1, "cartl")):
        imported = import_checkpoint(path, model_args={"negative_slope": slope}, **IDENTITY)
        assert (imported.format, imported.model.backbone.negative_slope) == (format, slope)


def test_shortcut_of_a_preact_resnet_has_to_be_told(write):
    weights = foreign.Weights()
    foreign.preact_resnet18(weights, images())
    with pytest.raises(CheckpointError, match=r"what the shortcut convolutions .* model_args=\{'activated_shortcut': True\}"):
        import_checkpoint(write(dict(weights)), **IDENTITY)


def test_second_names_of_the_first_layers(write):
    """Andriushchenko and Flammarion keep a sequence of the first layers, of which a part of the network is made again."""
    weights, x = foreign.Weights(), images()
    expected = foreign.preact_resnet18(weights, x, activated_shortcut=False, final_norm=False)
    copies = {"model_preact_hl1.1.weight": weights["conv1.weight"]}
    copies |= {f"model_preact_hl1.2.{leaf}": weights[f"layer1.0.bn1.{leaf}"] for leaf in BN_LEAVES}
    path = write({"last": weights | copies, "best": dict.fromkeys(weights, torch.zeros(1))})
    with pytest.raises(CheckpointError, match="expected one entry with weights, got last, best; choose one with entry="):
        import_checkpoint(path, **IDENTITY)
    arguments = {"model_args": {"activated_shortcut": False}, **IDENTITY}
    imported = import_checkpoint(path, entry="last", **arguments)
    assert_same(imported.model, expected, x)
    assert len(imported.dropped) == 7
    assert imported.model.lineage["imported"]["entry"] == "last"
    with pytest.raises(CheckpointError, match="expected an entry 'first' with weights, got last, best"):
        import_checkpoint(path, entry="first", **arguments)


def test_reparametrised_weights_are_refused(trades, write):
    state = dict(trades[0])
    state["fc.weight_orig"], state["fc.weight_u"] = state.pop("fc.weight"), torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"expected plain weights, got reparametrised ones \(fc\.weight_orig\)"):
        import_checkpoint(write({"model_weights": state}), format="cartl", **IDENTITY)


@pytest.mark.parametrize("names", [("init_conv", "layer.0.block.0.conv_0"), ("conv_2d", "layer_0.0.conv_2d_1")])
def test_uneven_padding_is_refused(names, write):
    with pytest.raises(CheckpointError, match=r"one of Gowal et al\. .* padded on one side; cartl_hub has no such architecture"):
        import_checkpoint(write({f"{name}.weight": torch.zeros(16, 3, 3, 3) for name in names}), **IDENTITY)


# Everything is accounted for


def refuse(path, match, **kwargs):
    with pytest.raises(CheckpointError, match=match) as caught:
        import_checkpoint(path, **{"format": "robustbench"} | IDENTITY | kwargs)
    assert str(caught.value).startswith(f"{path}: expected ")
    return str(caught.value)


def test_every_name_that_does_not_fit_is_named(trades, write):
    state = dict(trades[0])
    for name in ("conv1.weight", "block2.layer.0.bn1.running_mean", "fc.bias"):
        del state[name]
    state["extra.weight"] = state["block1.layer.0.conv3.weight"] = torch.zeros(1)
    state["block3.layer.0.convShortcut.weight"] = state["block3.layer.0.convShortcut.weight"].transpose(0, 1)
    state["bn1.bias"] = state["bn1.bias"].long()
    state["bn1.weight"] = state["bn1.weight"] / 0
    message = refuse(write(state), "expected all weights of wrn10_1 .* and no others")
    for part in (
        "left over: block1.layer.0.conv3.weight, extra.weight",
        "missing: head.fc.bias, stages.1.0.norm1.running_mean, stem.weight",
        "of another shape or type: block3.layer.0.convShortcut.weight (torch.float32 [32, 64, 1, 1] instead of torch.float32 "
        "[64, 32, 1, 1]), bn1.bias (torch.int64 [64] instead of torch.float32 [64])",
        "not finite: bn1.weight",
    ):
        assert part in message


@pytest.mark.parametrize("leaf", ["conv1.weight", "fc.weight", "block1.layer.0.conv1.weight", "bn1.running_var"])
def test_one_missing_or_extra(leaf, trades, write):
    state = dict(trades[0])
    tensor = state.pop(leaf)
    refuse(write(state), "expected")
    refuse(write(state | {leaf: tensor, f"{leaf}2": tensor}), rf"left over: {leaf}2\.")


@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight", "block2.layer.0.convShortcut.weight"])
def test_transposed_weights(name, trades, write):
    state = dict(trades[0])
    state[name] = state[name].transpose(0, 1).contiguous()
    refuse(write(state), "of another shape|architecture")


def test_negative_variances(trades, write):
    refuse(
        write(dict(trades[0]) | {"bn1.running_var": -trades[0]["bn1.running_var"]}), r"got variances below 0: bn1\.running_var"
    )


def test_step_counters_are_created(trades, write):
    state = {name: tensor for name, tensor in trades[0].items() if "num_batches" not in name}
    imported = import_checkpoint(write(state), format="robustbench", **IDENTITY)
    assert_same(imported.model, trades[1], images())
    assert len(imported.created) == 7
    assert "created: 7 (step counters of batch norm)" in str(imported)
    assert int(imported.model.backbone.norm.num_batches_tracked) == 0
    whole = import_checkpoint(write(dict(trades[0])), format="robustbench", **IDENTITY)
    assert (whole.created, int(whole.model.backbone.norm.num_batches_tracked)) == ((), 7)


def test_declared_architecture_and_classes_are_checked(trades, write):
    path = write(dict(trades[0]))
    message = refuse(path, "expected all weights of wrn16_1", architecture="wrn16_1")
    assert "stages.0.1.conv1.weight" in message
    assert message.endswith("The file has the shapes of wrn10_1.")
    refuse(path, "expected 10 classes, as declared, got 5", num_classes=10)
    refuse(path, "expected 5 different label names, one for each class, got 3", label_names=[*"abc"])
    refuse(path, "got a WRN of .*: 'wrn11_1'", architecture="wrn11_1")
    refuse(path, r"expected arguments of wrn10_1, got \{'colour': 1\}: .*colour", model_args={"colour": 1})
    refuse(path, "expected format 'timm', got a WRN of .*; pass cartl or robustbench as format", format="timm")
    with pytest.raises(ValueError, match=r"format must be one of \('auto', .*\), got 'zoo'"):
        import_checkpoint(path, format="zoo")
    imported = import_checkpoint(path, format="robustbench", architecture="wrn10_1", num_classes=5, input_size=64, **IDENTITY)
    assert imported.model.image_policy == ImagePolicy(size=(64, 64))


def test_several_networks_are_refused(trades, write):
    both = prefixed(trades[0], "student.") | prefixed(trades[0], "teacher.")
    refuse(write(both), r"expected one network, got student\., teacher\.; save the one")


def test_architecture_that_nobody_has(write):
    weights = foreign.Weights()
    foreign.wide_resnet(weights, images(), width=3)
    refuse(write(dict(weights)), "got a WRN of .*: 'wrn10_3'; pass architecture=")
    weights = foreign.Weights()
    foreign.resnet(weights, images(), layers=(1, 1, 1, 1))
    refuse(write(dict(weights)), "got a ResNet for CIFAR: a stem or sizes")


def test_small_stem_with_names_of_torchvision_has_to_be_declared(write):
    """Its weights don't show whether the pooling of the large stem is still there."""
    weights = foreign.Weights()
    expected = foreign.resnet(weights, images())
    state = {name.replace("linear", "fc").replace("shortcut", "downsample"): tensor for name, tensor in weights.items()}
    refuse(write(state), "got a ResNet of torchvision: a stem or sizes", format="auto")
    imported = import_checkpoint(write(state), architecture="resnet18_cifar", **IDENTITY)
    assert_same(imported.model, expected, images())


# Normalisation


def test_normalisation_is_declared_or_found(trades, write):
    weights = trades[0]
    pair = {"mu": torch.tensor(MEAN).view(1, 3, 1, 1), "sigma": torch.tensor(STD).view(1, 3, 1, 1)}
    plain, holding = write(dict(weights), "plain.pt"), write(weights | pair, "holding.pt")
    refuse(
        plain,
        r"got mean=None, std=None, and none in the file; .* --mean 0\.4914,0\.4822,.* 0 and 1 .* TRADES",
        mean=None,
        std=None,
    )
    refuse(plain, "got mean=0, std=None, and none in the file", std=None)
    refuse(holding, "got mean=0, std=None, and both in the file", std=None)
    refuse(holding, r"got mean \(0\.4\d+, .* in the file, but also mean \(0\.0, 0\.0, 0\.0\), std \(1\.0, 1\.0, 1\.0\)")
    refuse(holding, "expected one normalisation", mean=MEAN, std=(*STD[:2], 0.261))
    found = [import_checkpoint(holding, format="robustbench", **kwargs) for kwargs in ({}, {"mean": MEAN, "std": STD})]
    declared = import_checkpoint(plain, format="robustbench", mean=MEAN, std=STD)
    for imported in (*found, declared):
        assert_same(imported.model, foreign.wide_resnet(weights, normalised(images())), images())
    assert torch.equal(found[0].model.mean, pair["mu"][0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)},
            r"expected a mean in \[0, 1\], as pixels are, .* got \(123\.7, ",
        ),
        ({"mean": 0.5, "std": 0}, r"and a std in \(0, 1000\]"),
        ({"mean": 0.5, "std": 1e7}, r"and a std in \(0, 1000\]"),
        ({"mean": 0.5, "std": float("inf")}, r"and a std in \(0, 1000\]"),
        ({"mean": (0.5, 0.5), "std": 1}, "for each of 3 channels, or for all, got 2"),
        ({"mean": float("nan"), "std": 1}, r"expected a mean in \[0, 1\]"),
    ],
)
def test_constants_out_of_range(kwargs, message, trades, write):
    refuse(write(dict(trades[0])), message, **kwargs)


def test_places_that_disagree(write):
    weights = foreign.Weights()
    foreign.resnet(weights, images())
    state = robustness(weights)
    state["module.attacker.normalize.new_std"] = torch.ones(3, 1, 1)
    refuse(write(state), "expected one normalisation, got mean", format="robustness", mean=None, std=None)


@pytest.mark.parametrize(
    "extra", [{"mu": torch.zeros(3)}, {"mu": torch.zeros(2), "sigma": torch.ones(2)}, {"sigma": torch.ones(3)}]
)
def test_half_a_normalisation_is_left_over(extra, trades, write):
    refuse(write(trades[0] | extra), "left over: " + ", ".join(extra))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, write):
    weights, x = foreign.Weights(), images()
    foreign.wide_resnet(weights, x)
    state = weights | {"mu": torch.tensor(MEAN), "sigma": torch.tensor(STD)}
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    rounded = foreign.Weights({name: t.float() if t.is_floating_point() else t for name, t in stored.items()})
    mean, std = rounded.pop("mu"), rounded.pop("sigma")
    imported = import_checkpoint(write(stored), format="robustbench", mean=MEAN, std=STD)
    assert_same(imported.model, foreign.wide_resnet(rounded, normalised(x, mean.tolist(), std.tolist())), x)
    assert {parameter.dtype for parameter in imported.model.parameters()} == {torch.float32}


# Lineage


def test_lineage_is_recorded(trades, write, tmp_path):
    path = write({"state_dict": dict(trades[0]), "epoch": 7}, "trades.pt")
    arguments = {
        "format": "robustbench",
        "norm": "Linf",
        "eps": 8 / 255,
        "license": "mit",
        "url": "https://example.org/net",
        **IDENTITY,
    }
    imported = import_checkpoint(path, **arguments)
    assert imported.model.lineage == {
        "source": None,
        "threat_model": {"norm": "Linf", "eps": 8 / 255},
        "license": "mit",
        "imported": {
            "file": "trades.pt",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "format": "robustbench",
            "num_dropped": 1,
            "url": "https://example.org/net",
        },
    }
    assert imported.model.backbone.pretrained_cfg["license"] == "mit"
    json.dumps(imported.model.lineage)
    bare = import_checkpoint(path, format="robustbench", **IDENTITY).model
    assert bare.lineage["threat_model"] is None
    assert "license" not in bare.lineage
    assert bare.backbone.pretrained_cfg.get("license") is None  # not the one of timm's weights


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("Linf", 8, r"eps must be in \(0, 1\] for Linf, as pixels are; got 8\. Did you mean 8/255"),
        ("L1", 0.5, "expected norm 'Linf' or 'L2' with a radius eps > 0 .*, got 'L1' and 0.5"),
        ("L2", None, "got 'L2' and None"),
        (None, 0.5, "got None and 0.5"),
        ("L2", 0.0, "a radius eps > 0"),
        ("L2", float("inf"), "a radius eps > 0"),
    ],
)
def test_threat_model_out_of_range(norm, eps, message, trades, write):
    with pytest.raises(ValueError, match=message):
        import_checkpoint(write(dict(trades[0])), format="robustbench", norm=norm, eps=eps, **IDENTITY)


# Files


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_bomb_is_not_run(zipped, trades, write, tmp_path):
    path = write({"state_dict": dict(trades[0]), "x": Bomb(tmp_path / "ran")}, _use_new_zipfile_serialization=zipped)
    refuse(path, r"a pickle that names (\w+\.)?open, which may run code when it is read; nothing of it was run\. Where you trust")
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # it is a bomb
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickle_is_not_run(protocol, tmp_path):
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"a": 1.5, "x": Bomb(tmp_path / "ran")}, protocol))
    refuse(path, r"a pickle that names (io|_io)?\.?open, which may run code")
    assert not (tmp_path / "ran").exists()


def test_whole_module_is_refused(write):
    refuse(write(torch.nn.Linear(2, 2)), r"a pickle that names torch\.nn\.modules\.linear\.Linear, which may run code")


def test_safetensors(trades, tmp_path):
    save_file(dict(trades[0]), tmp_path / "net.safetensors")
    imported = import_checkpoint(tmp_path / "net.safetensors", format="robustbench", **IDENTITY)
    assert_same(imported.model, trades[1], images())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_file_that_is_cut_off(kind, share, trades, write, tmp_path):
    path = tmp_path / "net.pt"
    if kind == "safetensors":
        save_file(dict(trades[0]), path)
    else:
        write(dict(trades[0]), _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refuse(path, r"expected a whole checkpoint of torch\.save or safetensors, got .*; if the file was cut off, get it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file; download it again"),
        (b"\n<!DOCTYPE html><html>quota exceeded</html>", "got a web page; download it again"),
        (b"\x00" * 100, "expected a whole checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "got a pointer of git-lfs; fetch the file itself"),
        (b"\x1f\x8b\x08" + bytes(20), "got a gzip file; unpack it"),
        (b"hello, this is no checkpoint", "expected a whole checkpoint"),
    ],
)
def test_file_that_is_no_checkpoint(content, message, tmp_path):
    (tmp_path / "net.pt").write_bytes(content)
    refuse(tmp_path / "net.pt", message)


def test_flipped_bit_in_a_zip_file(trades, write):
    path = write(dict(trades[0]))
    content = bytearray(path.read_bytes())
    content[content.index(trades[0]["fc.weight"].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(content)
    refuse(path, r"got one whose record .*/data/\d+ is damaged; get it again")


@pytest.mark.parametrize("zipped", [True, False])
def test_newer_pickle_protocols(zipped, trades, write):
    path = write(dict(trades[0]), pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    refuse(path, "got one of protocol 4 or 5, .* save its state_dict\\(\\) again")


def test_weights_inside_of_inner_dicts(trades, write):
    content = {"model": {"state_dict": dict(trades[0]), "epoch": 3}, "optimizer": {"state": {0: {"buffer": torch.ones(2, 2)}}}}
    path = write(content)
    for entry in (None, "model.state_dict"):
        imported = import_checkpoint(path, format="robustbench", entry=entry, **IDENTITY)
        assert_same(imported.model, trades[1], images())
    assert dict(imported.dropped)["optimizer"] == "beside the weights"


def test_file_that_is_not_there(tmp_path):
    refuse(tmp_path / "net.pt", "expected a checkpoint file, got No such file or directory")
    refuse(tmp_path, "expected a checkpoint file, got Is a directory")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a state dict, or a dict that holds one, got an empty dict"),
        ([torch.zeros(2)], "got a list"),
        (torch.zeros(2), "got a Tensor"),
        ({"epoch": 3}, r"expected named dense tensors as weights, got among them epoch \(int\)"),
        ({"a.weight": torch.zeros(2, 2), 3: torch.zeros(2)}, r"got among them 3 \(a name of type int\)"),
        ({"a.weight": torch.zeros(2, 2).to_sparse()}, r"got among them a\.weight \(sparse Tensor\)"),
        ({"a.weight": torch.zeros(1).expand(10**9, 10**9)}, r"got among them a\.weight \(Tensor of repeated"),
        (
            {"a.weight": torch.zeros(2, 2), "ema": {"a.weight": torch.zeros(2, 2)}},
            "got ema and weights outside of it; choose one",
        ),
        (
            {"a.weight": torch.zeros(2, 2)},
            r"expected the names of a WRN .*, got a\.weight, .*; the formats are robustness, cartl",
        ),
    ],
)
def test_content_that_is_no_state_dict(content, message, write):
    refuse(write(content), message)


# Any prefix, any junk

PARTS = st.one_of(
    st.sampled_from(["module", "model", "net", "0", "1", "_orig_mod", "block1", "layer", "conv1", "fc"]),
    st.text("abcxyz_0", min_size=1, max_size=4),
)
JUNK = st.dictionaries(
    st.one_of(
        st.sampled_from(
            ["mu", "sigma", "fc.weight2", "fc", "bn1.weight.", ".fc.weight", "sub_block.x", "block4.layer.0.bn1.bias"]
        ),
        st.lists(PARTS, min_size=1, max_size=3).map(".".join),
    ),
    st.sampled_from([torch.zeros(()), torch.ones(2), torch.zeros(2, 2), 3]),
    max_size=2,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=st.lists(PARTS, max_size=3), junk=JUNK, beside=st.booleans(), wrapped=st.booleans())
def test_any_checkpoint_is_imported_exactly_or_refused(prefix, junk, beside, wrapped, trades, write):
    weights, expected = trades
    state = prefixed(weights, "".join(f"{part}." for part in prefix))
    extra = {name: value for name, value in junk.items() if name not in state}
    content = {"net": state | extra} if wrapped else state | extra
    path = write(content | ({"epoch": 3, "acc": torch.tensor(0.5)} if beside and wrapped else {}))
    if extra:
        refuse(path, "left over|got among them")
        return
    imported = import_checkpoint(path, format="robustbench", **IDENTITY)
    assert torch.equal(imported.model(images()), expected)
    assert [name for name, _ in imported.dropped] == (["epoch", "acc"] if beside and wrapped else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "model_args must describe an architecture, got checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "model_args must describe an architecture, got pretrained"),
        ({"input_size": 10**9}, "input_size must be"),
        ({"input_size": 32.5}, "input_size must be a whole number, got 32.5"),
        ({"label_names": "abcde"}, "label_names must be a list, one name for each class, got 'abcde'"),
    ],
)
def test_arguments_that_fit_no_network(changes, message, write):
    path = write(dict(make_model("wrn10_1", num_classes=5).backbone.state_dict()))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(path, **{"format": "robustbench", "architecture": "wrn10_1"} | IDENTITY | changes)
