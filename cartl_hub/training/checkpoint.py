"""Checkpoints that are whole, and one run in a folder at a time."""

import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..weights import content_hash

logger = logging.getLogger(__name__)

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"


class TrainingError(RuntimeError):
    """Training can't go on; the message says what is kept and how to continue."""


class BusyError(TrainingError):
    """Another process works in a folder."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file for this process; the lock ends with the block or with the process, however it dies."""
    with open(path, "a+") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a decoding worker would keep it for a dead run
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise BusyError(
                    f"expected no other run in {path.parent}, got process {file.read().strip() or 'unknown'}, which trains "
                    "there. Wait for it, end it, or use another output_dir."
                ) from error
            except OSError as error:  # a file system without locks
                logger.warning("%s can't be locked (%s): take care that one run at a time uses the folder", path, error)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


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
        TrainingError: If they are not those, to the bit.
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


def read_best(folder: str | Path) -> dict[str, Tensor]:
    """Weights that had the best robust accuracy on validation images, from the folder of a run.

    Raises:
        TrainingError: If there are none.
    """
    return read_checkpoint(Path(folder) / BEST)[0]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
