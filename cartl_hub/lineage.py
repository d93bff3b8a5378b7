"""Lineage: what a model was made from and how."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch

from . import __version__
from .batchnorm import BatchNormPolicy
from .config import to_dict
from .methods import Method
from .training import Result, TrainingArguments


def lineage(
    *,
    method: Method,
    arguments: TrainingArguments,
    result: Result | None,
    data: Mapping[str, Any],
    bn: BatchNormPolicy | None = None,
    source: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Record of a training run, as JSON for the model's config.

    Args:
        method: Training method.
        arguments: Training arguments.
        result: Result of the training loop; None before training.
        data: Description of the training data.
        bn: Batch-norm policy of a transfer.
        source: Id and revision of the source of a transfer.
        notes: Decisions made on the data.
    """
    attack = getattr(method, "attack", None)
    return {
        "source": None if source is None else dict(source),
        "data": dict(data),
        "method": to_dict(method),
        "threat_model": None if attack is None else {"norm": attack.norm, "eps": attack.eps},
        **({} if bn is None else {"batch_norm": to_dict(bn)}),
        "arguments": to_dict(arguments),
        "result": None if result is None else _summary(result),
        "notes": list(notes),
        "versions": {
            "cartl_hub": __version__,
            "torch": str(torch.__version__),
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def _summary(result: Result) -> dict[str, Any]:
    kept = {key: value for key, value in vars(result).items() if key not in ("validations", "best")}
    return kept | {"best_validation": None if result.best is None else vars(result.best)}
