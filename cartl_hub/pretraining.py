"""Trains a source model from a recipe."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .attacks import Attack
from .card import describe_classifier, render_card
from .config import to_dict
from .evaluation import default_attacks, evaluate
from .folder import save_model
from .images import ImagePolicy
from .lineage import lineage
from .methods import FineTuning
from .processes import is_main_process, remove_folder
from .recipe import Recipe
from .training import train
from .weights import round_weights


def pretrain(
    recipe: Recipe,
    folder: str | Path,
    *,
    output_dir: str | Path | None = None,
    attacks: Mapping[str, Attack] | None = None,
    num_images: int | None = None,
    command: str | None = None,
    resume: bool = True,
) -> Path:
    """Train a source, measure it on the test split and write its folder; an interrupted run is resumed.

    A source trained without labels gets its classifier from the recipe's linear probe; without a probe it is not measured.

    Args:
        recipe: Recipe of the source to train.
        folder: Folder for the model.
        output_dir: Folder for checkpoints and logs; by default ``runs/`` and the recipe's id.
        attacks: Attacks of the report; :func:`cartl_hub.default_attacks` by default, in the norm and radius of the training
            attack.
        num_images: Number of test images for the report; all by default.
        command: Command that reproduces this run, for card and report.
        resume: Resume the run in ``output_dir``. If False, start over: its checkpoints are removed.
    """
    output_dir = Path(output_dir) if output_dir is not None else Path("runs") / recipe.id
    policy = ImagePolicy(size=_input_size(recipe), mode="L" if len(recipe.mean) == 1 else "RGB")
    splits = recipe.data.load(policy)
    if recipe.probe is not None:
        recipe.probe.num_steps(splits.train)  # what can't be counted is an error before the long training
    model = recipe.create_model(len(splits.label_names))
    model.image_policy, model.label_names = policy, splits.label_names
    result = train(
        model,
        recipe.method,
        splits.train,
        validation=splits.validation,
        arguments=recipe.training,
        output_dir=output_dir,
        resume=resume,
    )
    classifier: dict[str, Any] = {} if recipe.method.uses_labels else {"classifier": "untrained"}
    if recipe.probe is not None:
        probed = train(
            model,
            FineTuning(num_blocks=1),
            splits.train,
            validation=splits.validation,
            arguments=recipe.probe,
            output_dir=output_dir / "probe",
            resume=resume,
        )
        classifier = {"classifier": "linear probe", "probe": {"arguments": to_dict(recipe.probe), "steps": probed.steps}}
    round_weights(model, getattr(torch, recipe.weights))
    data = splits.train.description | {"id": recipe.data.id, "license": recipe.data.license}
    record = lineage(method=recipe.method, arguments=recipe.training, result=result, data=data, notes=splits.notes)
    model.lineage = (
        record
        | classifier
        | {
            "name": recipe.id,
            "tag": recipe.id.partition(".")[2],
            "title": recipe.title,
            "license": recipe.license,
            "command": command,
            "remarks": list(recipe.remarks),
        }
    )
    model_folder = save_model(model, folder, card=render_card(model))
    if is_main_process():
        shutil.copyfile(output_dir / "losses.csv", model_folder / "losses.csv")
    if classifier.get("classifier") == "untrained":
        return model_folder
    splits.test.description |= {"id": recipe.data.id}
    context: dict[str, Any] = {
        "id": recipe.id,
        "command": command,
        "notes": [*splits.notes, *filter(None, [describe_classifier(model.lineage)])],
    }
    if not resume:
        remove_folder(output_dir / "evaluation")  # of the weights before
    threat = record["threat_model"]
    if attacks is None and threat is not None:
        attacks = default_attacks(threat["eps"], norm=threat["norm"])
    report = evaluate(
        model, splits.test, attacks=attacks, num_images=num_images, context=context, resume=output_dir / "evaluation"
    )
    return save_model(model, folder, report=report, card=render_card(model, report=report))


def _input_size(recipe: Recipe) -> tuple[int, int]:
    """Input size of the architecture, as its config states it."""
    import timm

    config = timm.get_pretrained_cfg(recipe.architecture)
    if config is None:
        raise ValueError(f"expected the name of a timm model as the recipe's architecture, got {recipe.architecture!r}.")
    _, height, width = config.input_size
    return height, width
