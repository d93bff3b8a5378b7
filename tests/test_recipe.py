import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from datasets import DatasetDict
from test_finetuner import pictures

from cartl_hub import (
    FDM,
    NFGSM,
    PGD,
    AdversarialTraining,
    DataArguments,
    Jigsaw,
    MultiTask,
    Recipe,
    Report,
    SimCLR,
    TrainingArguments,
    evaluate,
    import_checkpoint,
    load_model,
    load_recipe,
    pretrain,
    pretraining,
)
from cartl_hub.card import describe_classifier
from cartl_hub.config import from_dict, to_dict
from cartl_hub.files import sha256
from cartl_hub.folder import read_report, stated_weights
from cartl_hub.loading import load_splits
from cartl_hub.recipe import KINDS, RecipeData, load_import_recipe
from cartl_hub.training import train

CARDS = Path(__file__).parent.parent / "model_cards"
ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_committed_recipes_are_recipes(path):
    recipe = load_recipe(path)
    assert recipe.id == path.parent.name
    assert recipe.id.startswith(recipe.architecture + ".")
    assert from_dict(to_dict(recipe), KINDS) == recipe


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/import.yaml")), ids=lambda path: path.parent.name)
def test_committed_import_recipes_are_import_recipes(path):
    recipe = load_import_recipe(path)
    assert recipe.id == path.parent.name
    assert recipe.id.startswith(f"{recipe.architecture}.")
    assert recipe.eps == {"L2": 3.0, "Linf": 4 / 255}[recipe.norm]
    assert recipe.arguments.keys() == set(signature(import_checkpoint).parameters) - {"path"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: [", "expected YAML, encoded as UTF-8, in .*recipe.yaml: while parsing"),
        ("id: x", "Recipe can't be made: "),
        ("trainig: {}", r"Recipe has no 'trainig' \(did you mean 'training'\?\)"),
        ("method: {name: FDN}", r"unknown name 'FDN' \(did you mean 'FDM'\?\)"),
        ("method: {name: FDM, num_blocks: four}", "num_blocks: Input should be a valid integer"),
        ("[1, 2]", "expected a mapping"),
        ("id: Größe", "expected YAML, encoded as UTF-8, in .*recipe.yaml: 'utf-8' codec can't decode byte 0xf6"),
        ("id: a\nid: b", "expected YAML, .*recipe.yaml: the key 'id' occurs twice"),
        ("[" * 5000, "expected YAML in .*recipe.yaml, got one that is nested too deeply"),
        (None, "expected a YAML file in .*recipe.yaml, which does not exist"),
    ],
)
def test_what_is_no_recipe(text, message, tmp_path):
    if text is not None:
        (tmp_path / "recipe.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"checkpoint_path": "x.pth"}}, "model_args must describe an architecture, got checkpoint_path"),
        ({"mean": (float("nan"),)}, "expected one or three numbers as mean"),
        ({"std": (0.0, 0.2, 0.2)}, "expected numbers > 0 as std"),
        ({"std": (0.2, 0.2)}, "expected one or three numbers as std"),
    ],
)
def test_a_network_that_is_none(changes, message, toy):
    with pytest.raises(ValueError, match=message):
        replace(without_labels(toy), **changes)


@pytest.mark.parametrize("name", ["../../x", "", "a/b", ".x"])
def test_an_id_names_a_folder(name, toy):
    with pytest.raises(ValueError, match="expected an id of letters, digits"):
        replace(without_labels(toy), id=name)


def without_labels(data, **changes):
    return Recipe(
        id="wrn10_1.multitask_toy",
        title="A toy.",
        architecture="wrn10_1",
        data=RecipeData(id="org/toy", local=str(data), read=DataArguments(validation_share=0.2)),
        method=MultiTask(tasks=(SimCLR(), Jigsaw(grid=2))),
        training=TrainingArguments(epochs=1, batch_size=16, precision="fp32", augmentation=None),
        **changes,
    )


@pytest.fixture
def toy(tmp_path):
    pictures(60).to_parquet(tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def test_a_source_without_labels_is_measured_by_a_linear_probe(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "evaluate", partial(evaluate, checks=False, curve=None))
    recipe = without_labels(toy, probe=TrainingArguments(max_steps=3, batch_size=8, precision="fp32", validation_attack=ATTACK))
    assert from_dict(to_dict(recipe), KINDS) == recipe
    folder = pretrain(recipe, tmp_path / "model", output_dir=tmp_path / "run", attacks={"PGD-2": ATTACK}, num_images=4)
    card, model = (folder / "README.md").read_text(), load_model(folder)
    sentence = describe_classifier(model.lineage)
    assert "The network learned without labels (MultiTask). Its classifier is a linear probe, trained afterwards" in sentence
    assert "for 3 steps (lr 0.02)" in sentence
    assert sentence in card
    assert sentence in json.loads((folder / "report.json").read_text())["context"]["notes"]
    assert "tasks SimCLR (temperature 0.5, dim 128" in card
    assert "noroozi2016unsupervised" in card
    alone = recipe.create_model(model.num_classes)
    alone.label_names = model.label_names
    splits = load_splits(str(toy), model.image_policy, recipe.data.read)
    train(alone, recipe.method, splits.train, arguments=recipe.training)
    changed = {name for name, tensor in alone.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}
    assert changed == {"backbone.head.fc.weight", "backbone.head.fc.bias"}  # the probe trained nothing else


def test_a_fresh_run_is_measured_anew(toy, tmp_path, monkeypatch):
    """An evaluation that was interrupted is of the weights before."""
    monkeypatch.setattr(pretraining, "evaluate", partial(evaluate, checks=False, curve=None))
    recipe = without_labels(toy, probe=TrainingArguments(max_steps=3, batch_size=8, precision="fp32", validation_attack=ATTACK))
    chosen = {"output_dir": tmp_path / "run", "attacks": {"PGD-2": ATTACK}, "num_images": 4}

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PGD, "search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, tmp_path / "model", **chosen)
    changed = replace(recipe, training=replace(recipe.training, lr=0.01))
    report = read_report(pretrain(changed, tmp_path / "model", **chosen, resume=False))
    assert report is not None
    assert report.is_of(stated_weights(tmp_path / "model"))


def test_without_a_probe_no_accuracy_is_stated(toy, tmp_path):
    folder = pretrain(without_labels(toy), tmp_path / "model", output_dir=tmp_path / "run")
    card = (folder / "README.md").read_text()
    assert "Its classifier is untrained, as MultiTask learns without labels and there was no linear probe" in card
    assert "Not measured." in card
    assert not (folder / "report.json").exists()


def test_a_probe_is_for_methods_without_labels(toy):
    recipe = without_labels(toy, probe=TrainingArguments())
    with pytest.raises(ValueError, match="expected no probe, as FDM trains the classifier itself; leave it out"):
        replace(recipe, method=FDM(num_blocks=2))
    with pytest.raises(ValueError, match=r"expected one or three numbers as mean, one for each channel, got \(0\.5, 0\.5\)"):
        replace(recipe, mean=(0.5, 0.5))


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.75), ("Linf", 4 / 255)])
def test_a_source_is_attacked_as_it_was_trained(norm, eps, toy, tmp_path, monkeypatch):
    measured = {}

    def look(model, data, *, attacks, **kwargs):
        measured.update(attacks)
        raise KeyboardInterrupt

    monkeypatch.setattr("cartl_hub.pretraining.evaluate", look)
    ball = PGD(eps=eps, norm=norm, step_size=eps, steps=1)
    recipe = replace(without_labels(toy), method=AdversarialTraining(attack=ball))
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "model", output_dir=tmp_path / "run")
    assert {(attack.norm, attack.eps) for attack in measured.values()} - {("L2", 0.5)} == {(norm, eps)}


def test_two_processes_train_and_measure_a_source(tmp_path):
    pictures(40).to_parquet(tmp_path / "train.parquet")
    recipe = {
        "id": "wrn10_1.natural_toy",
        "title": "A toy.",
        "license": "mit",
        "architecture": "wrn10_1",
        "data": {"id": "org/toy", "local": str(tmp_path / "train.parquet")},
        "method": {"name": "FineTuning"},
        "training": {"epochs": 1, "batch_size": 16, "validation_attack": None},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cartl_hub.cli"]
    options = ["pretrain", tmp_path / "recipe.yaml", "--folder", tmp_path / "model", "--output", tmp_path / "run"]
    done = subprocess.run(
        [*command, *map(str, options), "--num-images", "4"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert Report.load(tmp_path / "model").num_images == 4
    assert (tmp_path / "model" / "losses.csv").exists()


def test_source_is_trained_measured_and_written(tmp_path):
    DatasetDict(train=pictures(60), test=pictures(12))["train"].to_parquet(tmp_path / "train.parquet")
    recipe = Recipe(
        id="wrn10_1.fdm2_toy",
        title="A toy.",
        architecture="wrn10_1",
        data=RecipeData(id="org/toy", local=str(tmp_path / "train.parquet"), read=DataArguments(validation_share=0.2)),
        method=FDM(num_blocks=2, attack=NFGSM(eps=8 / 255)),
        training=TrainingArguments(epochs=1, batch_size=16, precision="fp32", validation_attack=ATTACK),
        weights="float16",
    )
    folder = pretrain(recipe, tmp_path / "model", output_dir=tmp_path / "run", attacks={"PGD-2": ATTACK})
    model = load_model(folder)
    assert model.lineage["data"]["id"] == "org/toy"
    assert model.stored_as == torch.float16
    assert Report.load(folder).is_of(sha256(folder / "model.safetensors"))
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()
    assert model.lineage["threat_model"] == {"norm": "Linf", "eps": 8 / 255}
    losses = (folder / "losses.csv").read_text().splitlines()
    assert len(losses) == 1 + model.lineage["result"]["steps"]
    assert "A toy." in (folder / "README.md").read_text()
