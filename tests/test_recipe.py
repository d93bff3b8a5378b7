from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from test_finetuner import pictures

from cartl_hub import FDM, NFGSM, PGD, DataArguments, Recipe, Report, TrainingArguments, load_model, load_recipe, pretrain
from cartl_hub.config import from_dict, to_dict
from cartl_hub.files import sha256
from cartl_hub.recipe import KINDS, RecipeData

CARDS = Path(__file__).parent.parent / "model_cards"
ATTACK = PGD(eps=8 / 255, step_size=4 / 255, steps=2)


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/recipe.yaml")), ids=lambda path: path.parent.name)
def test_committed_recipes_are_recipes(path):
    recipe = load_recipe(path)
    assert recipe.id == path.parent.name
    assert recipe.id.startswith(recipe.architecture + ".")
    assert from_dict(to_dict(recipe), KINDS) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: [", "expected YAML in"),
        ("id: x", "Recipe can't be made: "),
        ("trainig: {}", r"Recipe has no 'trainig' \(did you mean 'training'\?\)"),
        ("method: {name: FDN}", r"unknown name 'FDN' \(did you mean 'FDM'\?\)"),
        ("method: {name: FDM, num_blocks: four}", "num_blocks: Input should be a valid integer"),
        ("[1, 2]", "expected a mapping"),
    ],
)
def test_what_is_no_recipe(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path)


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
