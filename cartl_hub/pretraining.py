"""From a recipe to a source model in its folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .attacks import Attack
from .card import render_card
from .evaluation import evaluate
from .folder import save_model
from .images import ImagePolicy
from .lineage import lineage
from .loading import load_splits
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
) -> Path:
    """Train a source, measure it on the test split, write its folder; goes on where it was interrupted.

    Args:
        recipe: What to train.
        folder: Where the model goes.
        output_dir: Where checkpoints and logs go; by default ``runs/`` and the recipe's id.
        attacks: For the report; those of :func:`cartl_hub.evaluate` by default.
        num_images: Test images of the report; all by default.
        command: That ran this, for card and report.
    """
    output_dir = Path(output_dir) if output_dir is not None else Path("runs") / recipe.id
    data_arguments = recipe.data.read
    policy = ImagePolicy(size=_input_size(recipe), mode="L" if len(recipe.mean) == 1 else "RGB")
    splits = load_splits(recipe.data.location, policy, data_arguments)
    model = recipe.create_model(len(splits.label_names))
    model.image_policy, model.label_names = policy, splits.label_names
    result = train(
        model,
        recipe.method,
        splits.train,
        validation=splits.validation,
        arguments=recipe.training,
        output_dir=output_dir,
        resume=True,
    )
    round_weights(model, getattr(torch, recipe.weights))
    data = splits.train.description | {"id": recipe.data.id, "licence": recipe.data.licence}
    record = lineage(method=recipe.method, arguments=recipe.training, result=result, data=data, notes=splits.notes)
    model.lineage = record | {
        "name": recipe.id,
        "tag": recipe.id.partition(".")[2],
        "title": recipe.title,
        "licence": recipe.licence,
        "command": command,
        "remarks": list(recipe.remarks),
    }
    model_folder = save_model(model, folder, card=render_card(model))
    shutil.copyfile(output_dir / "losses.csv", model_folder / "losses.csv")
    splits.test.description |= {"id": recipe.data.id}
    context: dict[str, Any] = {
        "id": recipe.id,
        "command": command,
        "notes": list(splits.notes),
    }
    report = evaluate(model, splits.test, attacks=attacks, num_images=num_images, context=context)
    return save_model(model, folder, report=report, card=render_card(model, report=report))


def _input_size(recipe: Recipe) -> tuple[int, int]:
    """Of the architecture, as its config states it."""
    import timm

    config = timm.get_pretrained_cfg(recipe.architecture)
    if config is None:
        raise ValueError(f"expected the name of a timm model as the recipe's architecture, got {recipe.architecture!r}.")
    _, height, width = config.input_size
    return height, width
