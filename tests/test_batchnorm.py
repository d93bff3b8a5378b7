import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, toy_data

from cartl_hub.batchnorm import BatchNormPolicy, batch_norms
from cartl_hub.blocks import list_blocks
from cartl_hub.methods import FineTuning
from cartl_hub.training import TrainingArguments, train

POLICIES = [
    BatchNormPolicy(extractor_statistics=statistics, submodel_affine=affine)
    for statistics in ("source", "target")
    for affine in ("trained", "frozen")
]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{p.extractor_statistics}-{p.submodel_affine}")
STATISTICS, AFFINE = ("running_mean", "running_var", "num_batches_tracked"), ("weight", "bias")


def parts(model, num_blocks=3):
    blocks = list_blocks(model)
    return [[layer for block in part for layer in block.layers()] for part in (blocks[:-num_blocks], blocks[-num_blocks:])]


def values(layers, names):
    return [getattr(layer, name).detach().clone() for layer in batch_norms(layers) for name in names]


def changed(before, after):
    """Which of them changed: all, none, or a mixture."""
    found = {not torch.equal(one, other) for one, other in zip(before, after, strict=True)}
    return found.pop() if len(found) == 1 else found


def state_of(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in model.modules()], [
        p.requires_grad for p in model.parameters()
    ]


@each_policy
def test_policy_through_training(model, data, policy):
    extractor, submodel = parts(model)
    if not batch_norms(model.modules()):
        assert policy.describe(extractor, submodel).endswith("nothing to do")
    images, labels = data.get(torch.arange(6)).float() / 255, data.labels[:6]
    before = {
        (part, kind): values(layers, kind) for part, layers in enumerate((extractor, submodel)) for kind in (STATISTICS, AFFINE)
    }
    head, state = model.head.weight.detach().clone(), state_of(model)
    with FineTuning(num_blocks=3).setup(model), policy.hold(extractor, submodel):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.01)
        for _ in range(2):
            model.train().eval().train()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = {
        (part, kind): values(layers, kind) for part, layers in enumerate((extractor, submodel)) for kind in (STATISTICS, AFFINE)
    }
    assert not torch.equal(model.head.weight, head)
    assert state_of(model) == state
    if batch_norms(model.modules()):
        assert changed(before[0, STATISTICS], after[0, STATISTICS]) is (policy.extractor_statistics == "target")
        assert changed(before[0, AFFINE], after[0, AFFINE]) is False
        assert changed(before[1, STATISTICS], after[1, STATISTICS]) is True
        assert changed(before[1, AFFINE], after[1, AFFINE]) is (policy.submodel_affine == "trained")


def test_source_statistics_are_what_normalises(wrn):
    images = torch.rand(4, 3, 32, 32)
    expected = wrn.eval()(images)
    with BatchNormPolicy().hold(wrn.modules(), []):
        assert torch.equal(wrn.train()(images), expected)
    assert not torch.allclose(wrn.train()(images), expected)


def test_policy_is_undone_after_an_error(wrn):
    wrn.backbone.norm.eval()
    wrn.backbone.norm.bias.requires_grad_(False)
    extractor, submodel = parts(wrn)
    before = state_of(wrn)
    with pytest.raises(KeyError), BatchNormPolicy(submodel_affine="frozen").hold(extractor, submodel):
        raise KeyError
    assert state_of(wrn) == before


@pytest.mark.parametrize(
    ("policy", "num_blocks", "expected"),
    [
        (POLICIES[0], 3, "batch norm: statistics of 4 frozen layers the source's, affine maps of 3 trained layers trained"),
        (
            POLICIES[3],
            3,
            "batch norm: statistics of 4 frozen layers updated on the target, affine maps of 3 trained layers frozen",
        ),
        (POLICIES[0], 1, "batch norm: statistics of 7 frozen layers the source's"),
        (POLICIES[0], 6, "batch norm: affine maps of 7 trained layers trained"),
    ],
)
def test_description(wrn, policy, num_blocks, expected):
    assert policy.describe(*parts(wrn, num_blocks)) == expected


@pytest.mark.parametrize("option", ["extractor_statistics", "submodel_affine"])
def test_unknown_option(option):
    with pytest.raises(ValueError, match=rf"{option} must be one of \(.*\), got 'batch'"):
        BatchNormPolicy(**{option: "batch"})


def test_statistics_of_the_trained_blocks_are_those_of_a_short_run():
    """Three steps over all images with weights that stay: the stored statistics are those of the images, not the source's."""
    data, model = toy_data(12), make_model("wrn10_1")
    for layer in batch_norms(model.modules()):
        layer.running_mean.fill_(5.0)
    arguments = TrainingArguments(max_steps=3, batch_size=12, lr=1e-12, weight_decay=0.0, precision="fp32", augmentation=None)
    train(model, FineTuning(num_blocks=3), data, arguments=arguments)
    trained, last = list_blocks(model)[-3:], []
    for block in trained:
        for layer in batch_norms(block.layers()):
            layer.register_forward_hook(lambda layer, inputs, output: last.append((layer, inputs[0].mean((0, 2, 3)))))
    with torch.no_grad():
        model.eval()(data.images.float() / 255)
    assert last
    first = last[0]  # what enters it depends on no other stored statistics of a trained block
    torch.testing.assert_close(first[0].running_mean, first[1], atol=1e-4, rtol=1e-4)


def test_statistics_of_a_whole_network_follow_as_torch_lets_them():
    data, model = toy_data(12), make_model("wrn10_1")
    for layer in batch_norms(model.modules()):
        layer.running_mean.fill_(5.0)
    arguments = TrainingArguments(max_steps=1, batch_size=12, lr=1e-12, weight_decay=0.0, precision="fp32", augmentation=None)
    train(model, FineTuning(), data, arguments=arguments)
    assert all((layer.running_mean > 4).all() for layer in batch_norms(model.modules()))
