"""Checkpoints that are whole."""

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from ..weights import content_hash
from .fingerprint import differences

logger = logging.getLogger(__name__)

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"


class TrainingError(RuntimeError):
    """Training can't continue; the message says what is kept and how to resume."""


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a safetensors file so that a reader sees the old one or the new one, whenever this process dies."""
    temporary = path.with_suffix(".partial")
    # memory formats are the loader's business; tensors that share memory would be refused
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(record)
    try:
        save_file(tensors, temporary, {"cartl_hub": json.dumps({"record": text, "hash": content_hash(tensors, text)})})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            temporary.unlink()
        kept = f"the {path.name} of an earlier step is kept" if path.exists() else f"there is no earlier {path.name}"
        raise TrainingError(
            f"expected to write {path}, got an error ({error}); {kept}. Is the disk full? Mend it and train with resume=True."
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record that :func:`write_checkpoint` wrote.

    Raises:
        TrainingError: If they are not identical, to the bit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = json.loads(file.metadata()["cartl_hub"])
        if content_hash(tensors, written["record"]) != written["hash"]:
            raise ValueError("its content is not what was written")
        return tensors, json.loads(written["record"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"expected {path} as the run wrote it, got a missing or damaged file ({error}). Put a copy there, or remove "
            f"{path.with_name(CHECKPOINT)} to start again."
        ) from error


def read_fitting_checkpoint(
    path: Path, fingerprint: Mapping[str, Any], num_steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint that a run may resume from.

    Args:
        path: Path of the checkpoint.
        fingerprint: Fingerprint of the run.
        num_steps: Number of steps of the run.

    Raises:
        TrainingError: As :func:`read_checkpoint`.
        ValueError: If the checkpoint belongs to another run; the message names what differs.
    """
    tensors, record = read_checkpoint(path)
    saved = {"normalisation": fingerprint.get("normalisation")} | record["fingerprint"]  # which older runs don't state
    different = [key for key in fingerprint if saved.get(key) != fingerprint[key]]
    if fingerprint["weights"] == record["end_weights"]:
        different = [key for key in different if key != "weights"]
    if different:
        pairs = "; ".join(line for key in different for line in differences(key, saved.get(key), fingerprint[key]))
        raise ValueError(
            f"expected the arguments with which {path} was begun, got others ({pairs}). Use the same ones, or another "
            "output_dir, or begin anew with resume=False (in the shell --output, --fresh)."
        )
    if record["progress"]["step"] > num_steps:
        raise ValueError(
            f"expected a run of at most {num_steps} steps in {path}, got one at step {record['progress']['step']}. Use another "
            "output_dir."
        )
    return tensors, record


def read_best(folder: str | Path) -> dict[str, Tensor]:
    """Weights that had the best robust accuracy on validation images, from the folder of a run.

    Raises:
        TrainingError: If there are none.
    """
    return read_checkpoint(Path(folder) / BEST)[0]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and numbers that an optimizer holds, each named after its parameter's number and its own name."""
    entries = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in entries.items() if name not in tensors}


def load_optimizer_state(optimizer: Optimizer, entries: Mapping[str, Any]) -> None:
    """Load what :func:`optimizer_state` returned; learning rates and the like stay those of the optimizer."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in entries.items():
        index, _, entry = name.partition(".")
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
