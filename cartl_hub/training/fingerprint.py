"""Fingerprint: what a run must have in common with the one that it resumes."""

import json
from typing import Any

from ..batchnorm import BatchNormPolicy
from ..config import to_dict
from ..data import Data, ImageData
from ..methods import Method
from ..models import Classifier
from ..weights import content_hash
from .arguments import TrainingArguments


def fingerprint(
    method: Method,
    bn: BatchNormPolicy,
    arguments: TrainingArguments,
    data: Data,
    validation: ImageData | None,
    model: Classifier,
) -> dict[str, Any]:
    """Fingerprint of a run, as JSON."""
    free: tuple[str, ...] = ("checkpoint_every", "checkpoint_minutes", "log_with")  # these change nothing in the weights
    if arguments.cache is None or (arguments.cache.views is None and arguments.cache.dtype == "fp32"):
        free += ("cache",)
    chosen = {key: value for key, value in to_dict(arguments).items() if key not in free}
    return json.loads(
        json.dumps(
            {
                "method": to_dict(method),
                "bn": to_dict(bn),
                "arguments": chosen,
                "architecture": [model.architecture, model.num_classes, model.model_args],
                "normalisation": [model.mean.flatten().tolist(), model.std.flatten().tolist()],
                "data": data.fingerprint() if isinstance(data, ImageData) else data.description.get("fingerprint"),
                "validation": None if validation is None else validation.fingerprint(),
                "weights": content_hash(model.state_dict()),
            }
        )
    )


def differences(key: str, then: Any, now: Any) -> list[str]:
    """Differences, with the entries of a mapping told apart."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [line for name in names for line in differences(f"{key}.{name}", then.get(name), now.get(name))]
    return [f"{key}: then {then}, now {now}"]
