"""Saliency, influence functions, and their page."""

import base64
import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from conftest import make_model, toy_data
from known_models import Curved
from PIL import Image
from reports import NASTY, Page, make_report
from sklearn.datasets import load_digits
from test_finetuner import pictures
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from cartl_hub import (
    ClassifierLoss,
    DataArguments,
    Explanation,
    classifier_inputs,
    explain,
    influence,
    integrated_gradients,
    load_model,
    load_splits,
    map_pictures,
    saliency,
    save_model,
    smooth_grad,
)
from cartl_hub.cli import app
from cartl_hub.data import ImageData
from cartl_hub.explanation import page, training_images
from cartl_hub.explanation.page import explanation_html
from cartl_hub.explanation.results import SCHEMA, Match
from cartl_hub.images import ImagePolicy
from cartl_hub.loading import Splits
from cartl_hub.report.page import report_html
from cartl_hub.weights import weights_sha256

MAPS = (saliency, smooth_grad, integrated_gradients)


def batch(num: int = 4, channels: int = 3, size: int = 4):
    return torch.rand(num, channels, size, size), torch.arange(num) % 4


# Saliency


def test_gradient_is_the_slope_of_the_loss():
    model, (images, labels) = Curved().double(), batch()
    images = images.double()
    found, step = saliency(model, images, labels), 1e-5

    def loss(moved):
        return F.cross_entropy(model(moved), labels, reduction="none")

    for place in ((0, 0, 0), (1, 2, 3), (2, 3, 1)):
        moved = torch.zeros_like(images)
        moved[:, *place] = step
        with torch.no_grad():
            slope = (loss(images + moved) - loss(images - moved)) / (2 * step)
        torch.testing.assert_close(found[:, *place], slope, rtol=1e-4, atol=1e-7)


def test_smooth_grad_is_the_mean_of_gradients_at_noisy_images():
    model, (images, labels) = Curved(), batch(size=4)
    seen = []
    with torch.no_grad():
        handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    found = smooth_grad(model, images, labels, noise=0.02, num_samples=40, seed=3)
    handle.remove()
    noise = torch.stack(seen) - images
    assert noise.std() == pytest.approx(0.02, rel=0.05)
    assert noise.mean().abs() < 0.001
    assert len(noise.unique()) > 0.9 * noise.numel()  # each copy of each image has its own
    inside = torch.stack([saliency(model, noisy.clamp(0, 1), labels) for noisy in seen]).mean(0)
    torch.testing.assert_close(found, inside, rtol=0, atol=0.02 * float(found.abs().max()))
    torch.testing.assert_close(
        smooth_grad(model, images, labels, noise=1e-5), saliency(model, images, labels), rtol=1e-3, atol=1e-5
    )
    assert torch.equal(found, smooth_grad(model, images, labels, noise=0.02, num_samples=40, seed=3))


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_integrated_gradients_add_up_to_the_difference_of_losses(baseline):
    model, (images, labels) = Curved(), batch()
    found = integrated_gradients(model, images, labels, baseline=baseline, steps=64).flatten(1).sum(1)
    with torch.no_grad():
        here, there = (F.cross_entropy(model(at), labels, reduction="none") for at in (images, torch.full_like(images, baseline)))
    torch.testing.assert_close(found, here - there, rtol=1e-3, atol=1e-3)


def test_map_pictures_have_grey_for_zero_and_a_scale_for_each_image():
    maps = torch.zeros(3, 1, 10, 20)
    maps[0].view(-1)[:] = torch.linspace(-1, 1, 200)
    maps[1, 0, 0, 0] = -5.0
    shown = map_pictures(maps)
    assert shown[0].min() == 0
    assert shown[0].max() == 1
    assert (shown[0] == 1).sum() == 1  # of 200 values, 1% are beyond the scale: one at each end
    torch.testing.assert_close(shown[0, 0, 5, 0], 0.5 + 0.5 * maps[0, 0, 5, 0] / 0.99, rtol=0.01, atol=0)
    assert (shown[1, 0, 0, 0], shown[1, 0, 0, 1]) == (0, 0.5)
    assert (shown[2] == 0.5).all()


@pytest.mark.parametrize("make", MAPS)
def test_maps_leave_the_model_as_it_was(make, wrn):
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 2])
    wrn.train()
    wrn.backbone.norm.eval()
    wrn.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in wrn.state_dict().items()}
    modes = [module.training for module in wrn.modules()]
    kwargs = {} if make is saliency else {"num_samples": 2} if make is smooth_grad else {"steps": 2}
    found = make(wrn, images, labels, **kwargs)
    assert found.shape == images.shape
    assert not found.requires_grad
    assert [module.training for module in wrn.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in wrn.state_dict().items())
    assert all(parameter.grad is None for parameter in wrn.parameters())
    assert [name for name, parameter in wrn.named_parameters() if not parameter.requires_grad] == ["backbone.head.fc.weight"]
    torch.testing.assert_close(found, make(wrn.eval(), images, labels, **kwargs))


@pytest.mark.parametrize("make", MAPS)
def test_maps_of_images_that_are_not_contiguous(make):
    model, (images, labels) = Curved(), batch()
    apart = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not apart.is_contiguous()
    torch.testing.assert_close(make(model, apart, labels), make(model, images, labels))


@pytest.mark.parametrize("make", MAPS)
def test_maps_refuse(make):
    images, labels = batch()
    with pytest.raises(ValueError, match=r"expected images \[B, C, H, W\] of floats in \[0, 1\], got torch.uint8"):
        make(Curved(), (255 * images).to(torch.uint8), labels)
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\], got values in \[0.*normalisation is the model's"):
        make(Curved(), 255 * images, labels)
    with pytest.raises(ValueError, match="expected a class for each of 4 images, got"):
        make(Curved(), images, labels[:2])
    with pytest.raises(ValueError, match="noise must be > 0, got 0"):
        smooth_grad(Curved(), images, labels, noise=0)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        integrated_gradients(Curved(), images, labels, steps=0)


# Influence


def problem(num: int = 14, depth: int = 4, classes: int = 3, weight_decay: float = 0.01) -> ClassifierLoss:
    inputs = torch.randn(num, depth, dtype=torch.float64)
    inputs[:, -1] = 1
    parameters = torch.randn(classes, depth, dtype=torch.float64)
    return ClassifierLoss(inputs, torch.arange(num) % classes, parameters, weight_decay)


def by_autograd(loss: ClassifierLoss, inputs, labels, damping=0.0):
    """The definition, written with autograd."""

    def one(parameters, image, label):
        return F.cross_entropy((image @ parameters.T)[None], label[None])

    def mean(parameters):
        losses = [one(parameters, image, label) for image, label in zip(loss.inputs, loss.labels, strict=True)]
        return torch.stack(losses).mean() + loss.weight_decay / 2 * (parameters**2).sum()

    size = loss.parameters.numel()
    hessian = torch.autograd.functional.hessian(mean, loss.parameters).reshape(size, size)
    gradient = torch.func.grad(mean)(loss.parameters)
    own, queries = (
        torch.stack([torch.func.grad(one)(loss.parameters, *pair).flatten() for pair in zip(*pairs, strict=True)])
        for pairs in ((loss.inputs, loss.labels), (inputs, labels))
    )
    inverse = torch.linalg.pinv(hessian + damping * torch.eye(size, dtype=torch.float64), rtol=1e-10)
    return hessian, gradient, queries @ inverse @ own.T


@pytest.mark.parametrize(("classes", "weight_decay", "damping"), [(3, 0.01, 0), (2, 0.01, 0), (3, 0, 0.1), (3, 0, 0)])
def test_influence_is_what_autograd_says(classes, weight_decay, damping):
    loss = problem(classes=classes, weight_decay=weight_decay)
    inputs, labels = loss.inputs[:5].flip(1), torch.arange(5) % classes
    if weight_decay + damping == 0:
        inputs = loss.inputs[:5] * 1.5
    hessian, gradient, expected = by_autograd(loss, inputs, labels, damping)
    torch.testing.assert_close(loss.hessian(), hessian, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.gradient, gradient, rtol=1e-9, atol=1e-12)
    found = influence(loss, inputs, labels, damping=damping)
    assert found.shape == (5, 14)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_excess_is_what_fitting_takes_off(monkeypatch):
    loss = problem(num=40, depth=12, classes=5, weight_decay=1e-3)
    best = loss.refitted()
    near = replace(best, parameters=best.parameters + 0.02 * torch.randn(5, 12, dtype=torch.float64))
    above = float(near.value() - best.value())
    assert above > 1e-4
    assert near.excess() == pytest.approx(above, rel=0.1)
    assert best.excess() < 1e-12
    far = replace(best, parameters=100 * torch.randn(5, 12, dtype=torch.float64))
    assert 0 < far.excess() <= float(far.value())
    assert near.excess(100.0) == near.excess()  # damping would hide the distance
    exact = near.excess()
    monkeypatch.setattr(training_images, "EXACT", 10)
    assert near.excess() == pytest.approx(exact, rel=1e-6)
    undecayed = replace(near, weight_decay=0.0)
    with pytest.raises(ValueError, match="expected damping or weight_decay > 0"):
        undecayed.excess()
    assert 0 < undecayed.excess(0.1) < float(undecayed.value())


def test_conjugate_gradients_find_what_the_whole_hessian_gives(monkeypatch):
    loss = problem(num=40, depth=12, classes=5, weight_decay=1e-3)
    inputs, labels = torch.randn(6, 12, dtype=torch.float64), torch.arange(6) % 5
    vectors = torch.randn(3, 5, 12, dtype=torch.float64)
    product = (loss.hessian() @ vectors.flatten(1).T).T.view_as(vectors)
    torch.testing.assert_close(loss.hessian_product(vectors), product, rtol=1e-10, atol=1e-12)
    exact = influence(loss, inputs, labels, damping=1e-3)
    monkeypatch.setattr(training_images, "EXACT", 10)
    monkeypatch.setattr(training_images, "_AT_ONCE", 2 * 40 * 5)  # two queries at once
    monkeypatch.setattr(ClassifierLoss, "hessian", None)
    assert loss.solver == "conjugate gradients"
    torch.testing.assert_close(
        influence(loss, inputs, labels, damping=1e-3), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max())
    )
    assert (loss.solve(torch.zeros(2, 5, 12, dtype=torch.float64)) == 0).all()
    with pytest.raises(ValueError, match=r"expected damping or weight_decay > 0 for a classifier of 60 parameters, got 0"):
        influence(replace(loss, weight_decay=0), inputs, labels)
    monkeypatch.setattr(training_images, "MOST_STEPS", 2)
    with pytest.raises(ValueError, match=r"did not converge in 2 steps with damping 0 .* raise the damping"):
        influence(loss, inputs, labels)


def retrained(loss: ClassifierLoss) -> ClassifierLoss:
    """At the minimum, by Newton's method from a point near it."""
    for _ in range(8):
        gradient = (
            loss.residuals(loss.inputs, loss.labels).T @ loss.inputs / len(loss.inputs) + loss.weight_decay * loss.parameters
        )
        step = torch.linalg.solve(loss.hessian(), gradient.flatten()).view_as(gradient)
        loss = replace(loss, parameters=loss.parameters - step)
    assert loss.gradient.norm() < 1e-12
    return loss


def test_influence_is_what_retraining_without_the_image_does():
    digits = load_digits(n_class=3)
    pixels = torch.tensor(digits.data / 16)
    inputs, labels = torch.cat([pixels, torch.ones(len(pixels), 1)], 1), torch.tensor(digits.target)
    start = ClassifierLoss(inputs[:80], labels[:80], torch.randn(3, 65, dtype=torch.float64), weight_decay=0.01)
    loss = start.refitted()
    assert loss.gradient.norm() < 1e-7 < start.gradient.norm()
    torch.testing.assert_close(loss.parameters, retrained(loss).parameters, rtol=0, atol=1e-5)
    queries, classes = inputs[80:90], labels[80:90]
    found = influence(loss, queries, classes) / len(loss.inputs)

    def query_losses(parameters):
        return F.cross_entropy(queries @ parameters.T, classes, reduction="none")

    rises = []
    left_out = torch.arange(0, 80, 2)
    for number in left_out:
        kept = torch.arange(80) != number
        other = retrained(replace(loss, inputs=loss.inputs[kept], labels=loss.labels[kept]))
        rises.append(query_losses(other.parameters) - query_losses(loss.parameters))
    rise = torch.stack(rises, 1)
    pearson = torch.corrcoef(torch.stack([found[:, left_out].flatten(), rise.flatten()]))[0, 1]
    assert pearson > 0.95, pearson
    most = found[:, left_out].argmax(1, keepdim=True)
    assert (rise.gather(1, most) > 0).all()  # positive: removing the image raises the loss
    assert (found[:, left_out].gather(1, most) / rise.gather(1, most)).median() == pytest.approx(1, abs=0.4)


def test_refitting_refuses_what_has_no_minimum():
    with pytest.raises(ValueError, match="expected weight_decay > 0 to fit a classifier to convergence, got 0"):
        problem(weight_decay=0).refitted()
    with pytest.raises(ValueError, match="weight_decay must be >= 0, got -1"):
        problem(weight_decay=-1)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        influence(problem(), problem().inputs, problem().labels, damping=-1)


@pytest.mark.parametrize("name", ["wrn10_1", "test_convnext", "test_vit"])
def test_classifier_inputs_are_those_of_the_classifier(name, data):
    model = make_model(name)
    inputs, labels = classifier_inputs(model.train(), data, batch_size=10)
    assert model.training
    assert torch.equal(labels, data.labels)
    assert inputs.dtype == torch.float64
    loss = ClassifierLoss.from_model(model, data, batch_size=10)
    assert torch.equal(loss.inputs, inputs)
    with torch.no_grad():
        logits = model.eval()(data.images / 255)
    torch.testing.assert_close((inputs @ loss.parameters.T).float(), logits, rtol=1e-4, atol=1e-4)
    before = model.head.weight.detach().clone()
    replace(loss, parameters=2 * loss.parameters).put_into(model)
    torch.testing.assert_close(model.head.weight, 2 * before)


def test_classifiers_that_influence_says_nothing_about(wrn, data):
    wrn.backbone.head.fc = nn.Sequential(nn.Linear(64, 3), nn.Softplus())
    with pytest.raises(ValueError, match="expected a linear layer as the classifier of wrn10_1, got Sequential"):
        classifier_inputs(wrn, data)
    doubled = make_model("wrn10_1")
    doubled.backbone.register_forward_hook(lambda module, args, logits: 2 * logits)
    with pytest.raises(ValueError, match="expected logits that are the output of the classifier of wrn10_1, got others"):
        classifier_inputs(doubled, data)
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        classifier_inputs(make_model("wrn10_1"), data.subset([]))


def test_match_counts_the_most_influential_images_of_the_same_class():
    influences = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, -1.0, 5.0, 4.0]])
    found = Match.of(influences, np.array([0, 1]), np.array([0, 1, 0, 1]))
    assert found.shares == pytest.approx((0.5, 0.5, 0.5, 0.5))  # 1, 1/2, 2/3, 1/2 and 0, 1/2, 1/3, 1/2
    assert (found.chance, found.num_images) == (0.5, 2)
    assert (found.low[0], found.high[0]) == (0, 1)
    assert (found.low[1], found.high[1]) == (0.5, 0.5)
    own = Match.of(influences, np.array([0, 1]), np.array([0, 1, 0, 1]), np.array([0, 3]))
    assert own.shares == pytest.approx((0, 0.25, 1 / 3))  # 0, 1/2, 1/3 and 0, 0, 1/3: none counts itself
    assert own.chance == pytest.approx(1 / 3)
    alone = Match.of(influences[:1], np.array([0]), np.array([0, 1, 0, 1]))
    assert (alone.shares[0], alone.low[0], alone.high[0]) == (1, 0, 1)
    many = Match.of(np.random.default_rng(0).random((3, 150)), np.array([0, 1, 2]), np.arange(150) % 3)
    assert len(many.shares) == 100


# Explanation


def toy_splits(num_classes: int = 3, channels: int = 3) -> Splits:
    parts = [toy_data(number, num_classes=num_classes, seed=seed) for number, seed in ((18, 1), (4, 2), (5, 3))]
    if channels == 1:
        policy = ImagePolicy(size=(32, 32), mode="L")
        parts = [ImageData(part.labels, part.label_names, part.images[:, :1], policy, part.description) for part in parts]
    return Splits(*parts)


@pytest.fixture(scope="module")
def explained() -> Explanation:
    torch.manual_seed(0)
    model, other = make_model("wrn10_1"), make_model("wrn10_1", num_classes=5)
    return explain(model, toy_splits(), against={"source": other}, name="tuned", num_images=4, top=3, context={"command": "x"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_that_are_not_in_fp32_are_refused(dtype):
    model = make_model("wrn10_1").to(dtype)
    images = torch.rand(2, 3, 32, 32)
    for look in (
        lambda: saliency(model, images, torch.tensor([0, 1])),
        lambda: explain(model, toy_splits(), progress=False),
        lambda: model.predict(images[0]),
    ):
        with pytest.raises(
            ValueError, match=rf"expected a model in torch\.float32, got .* in {dtype}; call model\.float\(\) first"
        ):
            look()


def test_weights_that_are_not_finite_are_named():
    model = make_model("wrn10_1")
    model.backbone.stem.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinite values in backbone\.stem\.weight"):
        explain(model, toy_splits(), progress=False)


def test_explanation_of_two_models(explained):
    tuned, source = explained.models
    assert (tuned.name, tuned.refitted, source.name, source.refitted) == ("tuned", False, "source", True)
    assert tuned.excess > 0.01 * tuned.loss
    assert source.excess < 1e-9
    assert [note for note in explained.notes if "above its minimum" in note] == [
        f"tuned: the training loss of its classifier, {tuned.loss:.3g}, lies about {tuned.excess:.2g} above its minimum, where "
        "influence is defined; refit=True (--refit) moves it there first"
    ]
    model = make_model("wrn10_1")
    assert tuned.weights_sha256 == weights_sha256(model)
    splits = toy_splits()
    assert explained.labels.tolist() == splits.test.labels[explained.indices].tolist()
    assert explained.train_labels.tolist() == splits.train.labels[explained.train_indices].tolist()
    images = splits.test.images[explained.indices] / 255
    assert np.allclose(explained.images, images[explained.shown])
    with torch.no_grad():
        assert tuned.predicted.tolist() == model.eval()(images).argmax(1).tolist()
    loss = ClassifierLoss.from_model(model, splits.train)
    expected = influence(loss, *classifier_inputs(model, splits.test))[explained.indices].numpy()
    assert np.allclose(np.take_along_axis(expected, explained.train_indices[tuned.top], 1), tuned.values)
    assert np.allclose(expected.max(1), tuned.values[:, 0])
    for position in tuned.top[explained.shown].flatten():
        assert np.allclose(explained.train_images[position], splits.train.images[explained.train_indices[position]] / 255)
    expected_map = map_pictures(saliency(model, torch.tensor(explained.images), torch.tensor(explained.labels[explained.shown])))
    assert np.allclose(tuned.maps["gradient"], expected_map, atol=1e-4)
    assert {len(match.shares) for match in tuned.match.values()} == {18, 17}
    refitted = make_model("wrn10_1", num_classes=5)
    refitted.reset_head(splits.label_names)
    ClassifierLoss.from_model(refitted, splits.train).refitted().put_into(refitted)
    with torch.no_grad():
        assert source.predicted.tolist() == refitted.eval()(images).argmax(1).tolist()
    expected_map = map_pictures(
        saliency(refitted, torch.tensor(explained.images), torch.tensor(explained.labels[explained.shown]))
    )
    assert np.abs(source.maps["gradient"] - expected_map.numpy()).mean() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_two_classes_more_wanted_than_there_are_and_a_new_classifier(channels):
    model = make_model("wrn10_1", num_classes=7, in_chans=channels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = explain(model, toy_splits(2, channels), num_images=50, top=30, train_images=8, refit=True, weight_decay=0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert found.models[0].top.shape == (5, 8)
    assert found.models[0].maps["SmoothGrad"].shape == (5, channels, 32, 32)
    assert "influence is that of a sample of 8 training images" in found.notes
    assert "there are 8 training images, fewer than 30" in found.notes
    assert "explain" in explanation_html(found).lower()


def test_what_cannot_be_explained(wrn):
    splits = toy_splits()
    with pytest.raises(ValueError, match=r"expected a model of the 3 classes of the data, got one of 5; .*--refit"):
        explain(make_model("wrn10_1", num_classes=5), splits)
    letters = make_model("wrn10_1", num_classes=2)
    letters.label_names = ("a", "b")
    with pytest.raises(ValueError, match=r"expected one of 'a', 'b' in 'label', got .*--refit"):
        explain(letters, pictures(20))
    with pytest.raises(ValueError, match="expected another name than 'wrn10_1' for a model of against"):
        explain(wrn, splits, against={"wrn10_1": wrn})
    with pytest.raises(ValueError, match=r"expected models with the same input, .* got \(\(32, 32\), 'L'\) for 'grey'"):
        explain(wrn, splits, against={"grey": make_model("wrn10_1", in_chans=1)})
    with pytest.raises(ValueError, match="top must be >= 1 and <= 100, got 0"):
        explain(wrn, splits, top=0)
    with pytest.raises(ValueError, match="train_images must be >= 2, got 1"):
        explain(wrn, splits, train_images=1)


# Files


def test_files_and_page(explained, tmp_path):
    explained.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    pictures = {f"{name}.{kind}" for name in ("saliency", "influence", "match") for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == pictures | {"explain.html", "explain.json", "match.csv"}
    for name in ("saliency", "influence", "match"):
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 500
    html = (folder / "explain.html").read_text()
    outside = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe|<object|<form", outside)
    sources = [attributes["src"] for attributes in Page(html).all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(sources) == 4 * (1 + 6) + 4 * (1 + 6)
    with open(folder / "match.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (18 + 17)
    assert float(rows[4]["share"]) == explained.models[0].match["test"].shares[4]

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((folder / "explain.json").read_text(), parse_constant=refuse)
    schema = json.loads((Path(page.__file__).parent / "explanation.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == content["$schema"] == SCHEMA
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(content)
    for name in ("excess", "solver", "match"):
        damaged = json.loads(json.dumps(content))
        damaged["models"][0][name] = -1
        assert not validator.is_valid(damaged)
    assert [model["weights_sha256"] for model in content["models"]] == [model.weights_sha256 for model in explained.models]
    first = content["test_images"][0]["models"]["tuned"]
    assert first["influence"] == explained.models[0].values[0].tolist()
    assert first["most_influential"] == explained.train_indices[explained.models[0].top[0]].tolist()
    assert content["context"]["command"] == "x"
    assert content["environment"]["torch"] == torch.__version__


def test_page_holds_any_name(explained):
    hostile = ('"><img src=x onerror=alert(1)>', NASTY, "{{ 7 * 7 }}")
    models = tuple(replace(model, name=name) for model, name in zip(explained.models, hostile, strict=False))
    html = explanation_html(replace(explained, label_names=hostile, models=models))
    assert "onerror=alert(1)>" not in re.sub("&#34;&gt;&lt;img src=x onerror=alert\\(1\\)&gt;", "", html)
    assert {element for element, _ in Page(html).elements} & {"script", "iframe", "object"} == set()
    assert "49" not in re.findall(r"<bdi>(\d+)</bdi>", html)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take long to draw."""
    monkeypatch.setattr(page, "encode", lambda figure, kind: b"drawn")


def write_report(folder, weights: str) -> str:
    """What a report of these weights has that an explanation looks at."""
    report = make_report(context={"id": "toy", "weights_sha256": weights})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.to_json()))
    (folder / "report.html").write_text(report_html(report))
    return report_html(report)


def test_report_page_is_extended(explained, tmp_path, undrawn):
    before = write_report(tmp_path / "report", explained.models[0].weights_sha256)
    explained.save(tmp_path / "out", report=tmp_path / "report")
    extended = (tmp_path / "out" / "report.html").read_text()
    assert Page(extended).text.startswith(Page(before).text[:200])
    assert (tmp_path / "report" / "report.html").read_text() == before
    assert extended.count('<section id="influence">') == 1
    assert extended.index('<section id="influence">') < extended.index("<h2>Model</h2>") < extended.index("</main>")
    assert set(re.findall("<h2>.*?</h2>", before)) < set(re.findall("<h2>.*?</h2>", extended))
    assert re.search("<title>(.*?)</title>", extended)[1] == re.search("<title>(.*?)</title>", before)[1]
    style = re.search("<style>(.*?)</style>", extended, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in extended.partition("<style>")[0]
    (tmp_path / "report" / "report.html").write_text(before.replace("<style>", "<style>/* of an earlier version */"))
    for _ in range(2):  # in its own folder, again and again
        explained.save(tmp_path / "report", report=tmp_path / "report")
    assert (tmp_path / "report" / "report.html").read_text() == extended


def test_reports_that_cannot_be_extended(explained, tmp_path):
    write_report(tmp_path, "0" * 64)
    with pytest.raises(ValueError, match=r"expected a report of the explained weights .* got one of others"):
        explained.save(tmp_path / "out", report=tmp_path)
    assert not (tmp_path / "out").exists()
    write_report(tmp_path, explained.models[0].weights_sha256)
    (tmp_path / "report.html").write_text("something")
    with pytest.raises(
        ValueError, match=r"expected the page of a report of this version in .* got something else; evaluate again"
    ):
        explained.save(tmp_path / "out", report=tmp_path)
    with pytest.raises(ValueError, match=r"expected a report in .* which does not exist"):
        explained.save(tmp_path / "out", report=tmp_path / "nowhere")


def test_what_was_set_aside_for_a_model_is_again(tmp_path):
    for label in ("bright", "dark"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (8, 8), (200 if label == "bright" else 10, index, 0)).save(
                tmp_path / "photos" / label / f"{index}.png"
            )
    policy = ImagePolicy(size=(8, 8))
    first = load_splits(tmp_path / "photos", policy, DataArguments(seed=7, test_seed=5, test_share=0.3))
    again = load_splits(tmp_path / "photos", policy, trained_on=first.train.description)
    assert again.test.fingerprint() == first.test.fingerprint()
    assert again.train.fingerprint() == first.train.fingerprint()
    older = load_splits(tmp_path / "photos", policy, DataArguments(seed=7, test_seed=7, test_share=0.3))
    del older.train.description["split_off"]["test_seed"]  # as models state it that were made before there was one
    again = load_splits(tmp_path / "photos", policy, trained_on=older.train.description)
    assert again.test.fingerprint() == older.test.fingerprint()
    assert load_splits(tmp_path / "photos", policy).test.fingerprint() != first.test.fingerprint()


def test_command(tmp_path, undrawn):
    for label, shade in (("bright", 200), ("dark", 50)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (40, 36), (shade + index, shade, shade)).save(tmp_path / "photos" / label / f"{index}.png")
    model = make_model("wrn10_1", num_classes=2)
    model.label_names = ("bright", "dark")
    save_model(model, tmp_path / "own")
    save_model(make_model("wrn10_1", num_classes=4), tmp_path / "other")

    def run(*arguments):
        command = ["explain", tmp_path / "own", tmp_path / "photos", "--num-images", 2, "--top", 2, *arguments]
        return CliRunner().invoke(app, list(map(str, command)), terminal_width=200)

    done = run("--against", tmp_path / "other", "--output", tmp_path / "out", "--seed", 1)
    assert done.exit_code == 0, done.output
    assert f"Explanation to read: {tmp_path / 'out' / 'explain.html'}" in done.output
    content = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert [(each["name"], each["refitted"]) for each in content["models"]] == [("own", False), ("other", True)]
    assert content["settings"] | {"seed": 1, "top": 2, "test_images": 2} == content["settings"]
    assert content["models"][0]["weights_sha256"] == weights_sha256(load_model(tmp_path / "own"))
    missing = run("--report", tmp_path / "nowhere", "--output", tmp_path / "out2")
    assert missing.exit_code != 0
    assert "expected a report in" in str(missing.exception)


def test_headline_says_which_shares_can_not_be_compared(explained):
    first, *others = explained.models
    at, far = (explanation_html(replace(explained, models=(replace(first, excess=excess), *others))) for excess in (0.0, 9.0))
    words = f"The classifier of <bdi>{first.name}</bdi>"
    assert words not in at
    assert far.count(words) == 1
    assert far.index(words) < far.index("Drawn at random")
