import json
from pathlib import Path

import pytest

from cartl_hub.attacks import NFGSM, PGD
from cartl_hub.config import from_dict, to_dict, with_changes
from cartl_hub.methods import FDM, NEFT
from cartl_hub.recipe import KINDS, RecipeData
from cartl_hub.training import Schedule, TrainingArguments

PGD_7 = {"name": "PGD", "eps": "8/255", "step_size": " 2 / 255", "steps": 7}


@pytest.mark.parametrize(
    "choice",
    [
        NFGSM(eps=8 / 255),
        FDM(num_blocks=4, attack=PGD(eps=0.5, step_size=0.1, steps=3, norm="L2")),
        NEFT(num_blocks=2, sigma="operator", convex_residual=True),
        TrainingArguments(schedule=Schedule(decay="steps", milestones=(0.4, 0.7)), augmentation=None, ema=0.99),
        RecipeData(id="a/b", local="c/d"),
    ],
    ids=lambda choice: type(choice).__name__,
)
def test_round_trip_through_json(choice):
    assert from_dict(json.loads(json.dumps(to_dict(choice))), KINDS) == choice


def test_what_is_no_choice():
    assert to_dict({"a": (Path("b/c"), None, 1.5)}) == {"a": ["b/c", None, 1.5]}


def test_fractions_are_numbers_where_numbers_are_expected():
    assert from_dict(PGD_7, KINDS) == PGD(eps=8 / 255, step_size=2 / 255, steps=7)
    schedule = {"name": "Schedule", "decay": "steps", "milestones": ["1/2", 0.75]}
    assert from_dict(schedule, KINDS) == Schedule(decay="steps", milestones=(0.5, 0.75))
    assert from_dict({"name": "RecipeData", "id": "1/2", "local": "3/4"}, KINDS) == RecipeData(id="1/2", local="3/4")


def test_nested():
    expected = FDM(num_blocks=4, attack=PGD(eps=8 / 255, step_size=2 / 255, steps=7))
    assert from_dict({"name": "FDM", "num_blocks": 4, "attack": PGD_7}, KINDS) == expected
    assert from_dict({"schedule": {"warmup": 0.3}}, KINDS, default="TrainingArguments").schedule == Schedule(warmup=0.3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("NEFT", "expected a mapping with a name, one of .*; got 'NEFT'"),
        ({"num_blocks": 2}, "the name is missing; expected one of .*FDM"),
        ({"name": "NEFFT"}, r"unknown name 'NEFFT' \(did you mean 'NEFT'\?\); expected one of .*FDM"),
        ({"name": ["NEFT"]}, r"unknown name \['NEFT'\].*; expected one of"),
        ({"name": "NEFT", "num_block": 2}, r"NEFT has no 'num_block' \(did you mean 'num_blocks'\?\); it has num_blocks, beta"),
        ({"name": "NEFT"}, "NEFT can't be made: num_blocks: Field required"),
        ({"name": "NEFT", "num_blocks": "four"}, "NEFT can't be made: num_blocks: Input should be a valid integer"),
        ({"name": "NEFT", "num_blocks": True}, "NEFT can't be made: num_blocks: expected no boolean, got true"),
        ({"name": "NEFT", "num_blocks": 2, "beta": "1/0"}, "NEFT can't be made: beta: Input should be a valid number"),
        ({"name": "NEFT", "num_blocks": 2, "beta": -1}, "NEFT can't be made: NEFT: beta must be > 0, got -1"),
        ({"name": "NEFT", "num_blocks": 2, "sigma": "svd"}, "NEFT can't be made: sigma: Input should be 'kernel' or 'operator'"),
        ({"name": "FDM", "num_blocks": 2, "attack": "PGD"}, "FDM can't be made: attack: Input should be"),
        ({"name": "FDM", "num_blocks": 2, "attack": {"eps": 0.1}}, "attack: the name is missing; expected one of .*FGSM"),
        ({"name": "FDM", "num_blocks": 2, "attack": {"name": "NEFT"}}, "attack: unknown name 'NEFT'; expected one of .*FGSM"),
        (
            {"name": "FDM", "num_blocks": 2, "attack": PGD_7 | {"step": 1}},
            r"attack: PGD has no 'step' \(did you mean 'steps'\?\)",
        ),
        (
            {"name": "TrainingArguments", "schedule": {"decay": "sine"}},
            "schedule: Schedule can't be made: decay: Input should be",
        ),
    ],
)
def test_what_cannot_be_made(config, message):
    with pytest.raises(ValueError, match=message):
        from_dict(config, KINDS)


def test_with_changes():
    before = TrainingArguments(epochs=3, schedule=Schedule(warmup=0.3))
    after = with_changes(before, {"schedule.decay": "cosine", "validation_attack.eps": "4/255", "lr": 0.5}, KINDS)
    attack = PGD(eps=4 / 255, step_size=2 / 255, steps=10)
    expected = TrainingArguments(epochs=3, schedule=Schedule(warmup=0.3, decay="cosine"), validation_attack=attack, lr=0.5)
    assert after == expected
    assert with_changes(before, {}, KINDS) == before
    with pytest.raises(ValueError, match=r"TrainingArguments has no 'lr.peak': 'lr' holds no other settings"):
        with_changes(before, {"lr.peak": 1}, KINDS)
    with pytest.raises(ValueError, match=r"schedule: Schedule has no 'warm'"):
        with_changes(before, {"schedule.warm": 1}, KINDS)
