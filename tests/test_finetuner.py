import json
import math

import pytest
import timm
import torch
from conftest import make_model
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as PILImage

import cartl_hub
from cartl_hub import (
    NEFT,
    PGD,
    AdversarialTraining,
    BatchNormPolicy,
    Classifier,
    DataError,
    FineTuning,
    ModelError,
    RobustFineTuner,
    TrainingArguments,
    create_model,
    load_model,
    save_model,
)
from cartl_hub.finetuner import open_source

ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)
ARGUMENTS = TrainingArguments(epochs=1, batch_size=8, precision="fp32", validation_attack=ATTACK)


def pictures(num_images, *, size=(32, 32), mode="RGB", names=("cat", "dog", "eel")):
    generator = torch.Generator().manual_seed(num_images)
    shades = [int(torch.randint(0, 255, (), generator=generator)) for _ in range(num_images)]
    images = [PILImage.new("L", size, shade).convert(mode) for shade in shades]
    labels = [index % len(names) for index in range(num_images)]
    return Dataset.from_dict(
        {"image": images, "label": labels}, features=Features({"image": Image(), "label": ClassLabel(names=list(names))})
    )


@pytest.fixture
def tuner(tmp_path):
    return RobustFineTuner(
        make_model("wrn10_1"),
        DatasetDict(train=pictures(36), test=pictures(12)),
        method=NEFT(num_blocks=2, beta=0.4),
        bn=BatchNormPolicy(extractor_statistics="source", submodel_affine="frozen"),
        arguments=ARGUMENTS,
        output_dir=tmp_path / "run",
    )


def test_main_job(tuner, tmp_path):
    result = tuner.train()
    report = tuner.evaluate(attacks={"PGD-2": ATTACK}, curve_images=4)
    assert result.steps == result.num_steps
    assert report.num_images == 12
    folder = tuner.save()
    assert {"model.safetensors", "config.json", "report.json", "report.html", "README.md"} <= {p.name for p in folder.iterdir()}
    loaded = load_model(folder)
    images = torch.rand(5, 3, 32, 32)
    assert torch.equal(loaded(images), tuner.model(images))
    assert loaded.label_names == ("cat", "dog", "eel")
    assert loaded.predict(PILImage.new("RGB", (80, 50)))[0].names[0] in loaded.label_names
    again = cartl_hub.evaluate(loaded, tuner.splits.test, attacks={"PGD-2": ATTACK}, curve=None)
    assert (again.clean, again.attacks) == (report.clean, report.attacks)


def test_the_report_is_in_the_ball_of_the_training_attack(tuner):
    tuner.method = AdversarialTraining(attack=PGD(eps=0.25, norm="L2", step_size=0.1, steps=1), num_blocks=1)
    report = tuner.evaluate(strength="quick", checks=False)
    assert list(report.worst_case) == ["L2 0.25"]
    assert report.curve is None
    assert list(tuner.evaluate(attacks={"PGD-2": ATTACK}, curve=None, checks=False).worst_case) == ["Linf 8/255"]


def test_frozen_blocks_of_a_new_network_are_pointed_out(tuner, tmp_path, caplog):
    data = DatasetDict(train=pictures(36), test=pictures(12))
    options = {"arguments": ARGUMENTS, "output_dir": tmp_path / "other"}
    new = make_model("wrn10_1")
    RobustFineTuner(new, data, method=FineTuning(num_blocks=2), **options)
    assert "stay frozen look untrained" in caplog.text
    caplog.clear()
    RobustFineTuner(new, data, method=FineTuning(), **options)
    new.train()(torch.rand(4, 3, 32, 32))
    RobustFineTuner(new, data, method=FineTuning(num_blocks=2), **options)
    assert "untrained" not in caplog.text


def _leaky(model):
    return timm.create_model("test_resnet", num_classes=3, act_layer="leaky_relu")


def _unpooled(model):
    model.maxpool = torch.nn.Identity()
    return model


def _small_patches(model):
    return timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8)


@pytest.mark.parametrize("change", [_leaky, _unpooled, _small_patches])
def test_a_network_that_would_be_loaded_as_another_is_refused(change, tmp_path):
    data = DatasetDict(train=pictures(36), test=pictures(12))
    network = change(timm.create_model("test_resnet", num_classes=3))
    with pytest.raises(
        ValueError, match=r"make it with cartl_hub\.create_model\('test_\w+', \.\.\.\), which keeps the arguments"
    ):
        RobustFineTuner(network, data, method=FineTuning(num_blocks=1), arguments=ARGUMENTS, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="which keeps the arguments"):
        save_model(Classifier(network), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_arguments_that_were_recorded_make_the_same_network(tmp_path):
    model = create_model("test_resnet", num_classes=3, act_layer="leaky_relu").eval()
    images = torch.rand(2, 3, *model.image_policy.size)
    assert torch.equal(load_model(save_model(model, tmp_path))(images), model(images))


def test_shared_weights_are_refused(tmp_path):
    model = make_model("wrn10_1")
    model.backbone.stages[0][0].conv2.weight = model.backbone.stages[0][0].conv1.weight
    with pytest.raises(ValueError, match=r"got one for both stages\.0\.0\.conv1\.weight and stages\.0\.0\.conv2\.weight"):
        RobustFineTuner(model, DatasetDict(train=pictures(36), test=pictures(12)), output_dir=tmp_path)


def test_a_model_that_was_trained_since_it_was_loaded_is_another_one(tuner, tmp_path):
    model = load_model(tuner.save(tmp_path / "toy"))
    assert open_source(model).origin["id"] == "toy"
    with torch.no_grad():
        model.head.bias += 1
    assert open_source(model).origin == {"id": "wrn10_1", "weights": "given"}
    assert open_source(tuner.model).origin == {"id": tuner.name, "weights": "given"}


def test_card_states_what_the_report_holds(tuner):
    tuner.train()
    report = tuner.evaluate(attacks={"PGD-2": ATTACK}, curve=None)
    card = ModelCard.load(tuner.save() / "README.md")
    assert f"| none | {100 * report.clean.accuracy:.2f} % |" in card.text
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == round(100 * report.clean.accuracy, 2)
    assert results["robust accuracy, PGD-2 (Linf 8/255)"] == round(100 * report.attacks["PGD-2"].accuracy, 2)
    assert "NEFT (num blocks 2, beta 0.4" in card.text
    assert card.data.library_name == "cartl_hub"


def test_interrupted_script_goes_on_and_a_finished_one_returns(tuner, tmp_path):
    tuner.train()
    weights = {name: tensor.clone() for name, tensor in tuner.model.state_dict().items()}
    same = RobustFineTuner(
        make_model("wrn10_1"),
        DatasetDict(train=pictures(36), test=pictures(12)),
        method=tuner.method,
        bn=tuner.bn,
        arguments=ARGUMENTS,
        output_dir=tmp_path / "run",
    )
    same.train()
    assert all(torch.equal(weights[name], tensor) for name, tensor in same.model.state_dict().items())


def test_another_source_in_the_same_folder_is_refused(tuner, tmp_path):
    tuner.train()
    other = make_model("wrn10_1")
    other.backbone.stem.weight.data.mul_(2)
    data = DatasetDict(train=pictures(36), test=pictures(12))
    changed = RobustFineTuner(other, data, method=tuner.method, bn=tuner.bn, arguments=ARGUMENTS, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"got others \(weights: .*Use the same ones, or another output_dir"):
        changed.train()


def test_a_run_that_begins_anew_forgets_the_earlier_one(tuner, tmp_path):
    tuner.train()
    data = DatasetDict(train=pictures(36), test=pictures(12))
    options = {"method": FineTuning(num_blocks=1), "arguments": ARGUMENTS}
    changed = RobustFineTuner(make_model("wrn10_1"), data, **options, output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"begin anew with resume=False"):
        changed.train()
    changed.train(resume=False)
    alone = RobustFineTuner(make_model("wrn10_1"), data, **options, output_dir=tmp_path / "alone")
    alone.train()
    expected = alone.model.state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in changed.model.state_dict().items())


def test_a_fresh_run_starts_from_the_source_again(tuner):
    tuner.train()
    first = {name: tensor.clone() for name, tensor in tuner.model.state_dict().items()}
    tuner.train(resume=False)
    assert all(torch.equal(first[name], tensor) for name, tensor in tuner.model.state_dict().items())


def test_a_fresh_run_that_fails_leaves_the_trained_model(tuner, monkeypatch):
    tuner.train()
    first = {name: tensor.clone() for name, tensor in tuner.model.state_dict().items()}
    monkeypatch.setattr(NEFT, "losses", lambda self, model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuner.train(resume=False)
    assert all(torch.equal(first[name], tensor) for name, tensor in tuner.model.state_dict().items())
    assert tuner.model.lineage["result"]["steps"] == tuner.result.steps


@pytest.mark.parametrize("source", [make_model("wrn10_1"), "resnet18.a1_in1k"])
def test_a_revision_of_what_has_none_is_refused(source, tmp_path):
    with pytest.raises(ModelError, match=r"expected no revision for .*, got 'v2'"):
        RobustFineTuner(source, pictures(30), revision="v2", output_dir=tmp_path)


def test_nothing_of_an_earlier_run_is_left_once_a_fresh_one_has_begun(tuner, tmp_path, monkeypatch):
    tuner.train()
    monkeypatch.setattr(FineTuning, "losses", lambda self, model, batch: 1 / 0)
    data = DatasetDict(train=pictures(36), test=pictures(12))
    changed = RobustFineTuner(
        make_model("wrn10_1"), data, method=FineTuning(num_blocks=1), arguments=ARGUMENTS, output_dir=tmp_path / "run"
    )
    with pytest.raises(ZeroDivisionError):
        changed.train(resume=False)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_weights_that_could_not_be_saved_are_refused_before_training(tmp_path):
    damaged = make_model("wrn10_1")
    damaged.backbone.stem.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinite values in stem\.weight"):
        RobustFineTuner(damaged, pictures(30), output_dir=tmp_path)


def test_a_source_in_half_precision_is_trained_in_fp32(tmp_path):
    half = make_model("wrn10_1").half()
    tuner = RobustFineTuner(half, pictures(30), method=FineTuning(num_blocks=1), arguments=ARGUMENTS, output_dir=tmp_path)
    tuner.train()
    assert {parameter.dtype for parameter in tuner.model.parameters()} == {torch.float32}
    assert next(half.parameters()).dtype == torch.float16


def test_a_run_that_cannot_begin_anew_leaves_the_earlier_one(tuner, tmp_path, monkeypatch):
    tuner.train()
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(NEFT, "setup", lambda self, model, images=None: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuner.train(resume=False)
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_a_report_of_the_source_that_makes_no_sense_is_left_out(tuner, tmp_path, caplog):
    tuner.evaluate(attacks={"PGD-2": ATTACK}, curve=None, checks=False)
    folder = tuner.save()
    content = json.loads((folder / "report.json").read_text())
    content["clean"]["correct"] = "x"
    (folder / "report.json").write_text(json.dumps(content))
    second = RobustFineTuner(folder, pictures(30, names=("sun", "moon")), arguments=ARGUMENTS, output_dir=tmp_path / "b")
    assert "the source's report is left out" in caplog.text
    assert second.evaluate(attacks={"PGD-2": ATTACK}, curve=None, checks=False).source is None


def test_a_folder_of_somebody_else_is_refused_before_training(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"a foreign README\.md"):
        RobustFineTuner(make_model("wrn10_1"), pictures(30), output_dir=tmp_path / "run")


def test_source_is_left_alone_and_lineage_names_it(tmp_path):
    source = make_model("wrn10_1")
    cartl_hub.save_model(source, tmp_path / "source")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    tuner = RobustFineTuner(
        tmp_path / "source", pictures(30), method=FineTuning(num_blocks=1), arguments=ARGUMENTS, output_dir=tmp_path
    )
    tuner.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    config = json.loads((tuner.save(tmp_path / "new") / "config.json").read_text())
    lineage = config["cartl_hub"]["lineage"]
    assert lineage["source"]["id"] == "source"
    assert lineage["method"] == {"name": "FineTuning", "num_blocks": 1}
    assert any("kept for the report" in note for note in lineage["notes"])


def test_report_stands_beside_that_of_the_source(tuner, tmp_path, caplog):
    attacks = {"PGD-2": ATTACK}
    first = tuner.evaluate(attacks=attacks, curve=None, checks=False)
    folder = tuner.save()

    def source_in_report():
        data = pictures(30, names=("sun", "moon"))
        second = RobustFineTuner(folder, data, method=FineTuning(num_blocks=1), arguments=ARGUMENTS, output_dir=tmp_path / "b")
        return second.evaluate(attacks=attacks, curve=None, checks=False).source

    source = source_in_report()
    assert (source.id, source.threat, source.attacks) == (tuner.name, "Linf 8/255", ("PGD-2",))
    assert (source.clean, source.robust.correct, source.num_images) == (first.clean, first.robust.correct, 12)
    report = folder / "report.json"
    report.write_text(report.read_text().replace(first.context["weights_sha256"], "0" * 64))
    assert source_in_report() is None  # of other weights
    report.write_text("{")
    assert source_in_report() is None
    assert "the source's report is left out" in caplog.text


def test_same_classes_keep_the_classifier(tmp_path):
    source = make_model("wrn10_1")
    source.label_names = ("cat", "dog", "eel")
    tuner = RobustFineTuner(source, pictures(30), method=AdversarialTraining(attack=ATTACK), output_dir=tmp_path)
    assert torch.equal(tuner.model.head.weight, source.head.weight)
    assert "the source's classifier is kept" in tuner.notes[-1]


@pytest.mark.parametrize(
    ("source", "method", "error", "message"),
    [
        ("no_such_model", FineTuning(), ModelError, "expected a folder, a Hub id"),
        ("wrn10_1", FineTuning(), ModelError, "expected a source with weights, got 'wrn10_1'"),
        (
            "wrn16_2.fdm5_cifar100",
            FineTuning(),
            ModelError,
            r"Similar names: wrn16_2\.fdm4_cifar100, .*create_model\('wrn16_2'\)",
        ),
        (make_model("wrn10_1"), FineTuning(num_blocks=9), ValueError, r"num_blocks must be in \[1, 5\]"),
        (
            make_model("test_vit"),
            NEFT(num_blocks=2, convex_residual=True),
            ValueError,
            "convex_residual is part of the architecture",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_before_any_work(source, method, error, message, tmp_path):
    with pytest.raises(error, match=message):
        RobustFineTuner(source, pictures(12), method=method, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_label_is_an_error_before_any_work(tmp_path):
    data = pictures(12).cast_column("label", ClassLabel(names=["cat", "dog", "eel"]))
    broken = Dataset.from_dict({"image": data["image"], "label": [*data["label"][:-1], None]}).cast_column("image", Image())
    with pytest.raises(DataError, match="row 11 of the train split"):
        RobustFineTuner(make_model("wrn10_1"), broken, method=FineTuning(), output_dir=tmp_path)


def test_timm_models_of_other_sizes_are_sources(tmp_path):
    tuner = RobustFineTuner(
        cartl_hub.create_model("test_vit"),
        pictures(20, size=(60, 40), mode="L"),
        method=NEFT(num_blocks=2),
        arguments=ARGUMENTS,
        output_dir=tmp_path,
    )
    assert tuner.train().steps == 1
    assert tuner.model.image_policy.size == (160, 160)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bn": "source"}, r"expected BatchNormPolicy\(...\) as bn, got 'source'"),
        ({"method": NEFT}, r"expected Method\(...\) as method, got <class"),
        ({"arguments": {"epochs": 3}}, r"expected TrainingArguments\(...\) as arguments, got {'epochs': 3}"),
    ],
)
def test_choices_of_another_kind_are_refused_at_once(option, message):
    with pytest.raises(ValueError, match=message):
        RobustFineTuner("no such source", pictures(6), **option)
