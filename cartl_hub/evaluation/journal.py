"""Finished batches of an evaluation on disk: a process that is killed loses no more than the batch it was in.

A folder holds ``identity.json``, which says what is evaluated, one safetensors file for each finished batch of a stage, and one
JSON file for each finished check. All processes of an evaluation share it. It is kept when all is done, so that a report that
could not be written costs nothing; then another evaluation may take its place.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from ..files import locked, write_file
from ..processes import gather, rank_and_world
from ..weights import content_hash
from .verdict import NEIGHBOUR_CHANGE

logger = logging.getLogger(__name__)

IDENTITY, LOCK = "identity.json", "evaluation.lock"
CHECKSUM = "sha256"
FINISHED = "finished"  # in the identity of an evaluation of which nothing is left to do
OWN = ("*.safetensors", "check.*.json")


@dataclass(frozen=True, eq=False)
class Entry:
    """Outcome of one batch of one stage.

    Args:
        positions: Positions of its images, int64 [B].
        predicted: Class predicted in the end, int64 [B].
        broken: Whether that is wrong, bool [B].
        rejected: Number of images that the attack moved out of [0, 1] or the ball.
        passes: Number of images that went through the model.
        seconds: Seconds spent on the batch.
        elapsed: Seconds of the whole evaluation up to here, over all runs that resumed it.
    """

    positions: Tensor
    predicted: Tensor
    broken: Tensor
    rejected: int
    passes: int
    seconds: float
    elapsed: float


class Journal:
    """Entries and checks that were there when the folder was opened, and a place for new ones.

    Args:
        durable: Whether files must outlive the process.
    """

    def __init__(self, folder: Path, durable: bool):
        self.folder, self.durable = folder, durable
        self.finished = False  # nothing is left to resume
        self.entries: dict[str, list[Entry]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self.entries.setdefault(path.name.partition(".")[0], []).append(_read(path))
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                logger.warning("%s is damaged (%s); its images are attacked again.", path, error)
        self.checks: dict[str, dict[str, Any]] = {}
        for path in folder.glob("check.*.json"):
            try:
                content = json.loads(path.read_bytes())
                found = {key: content[key] for key in ("check", "passes", "elapsed")}
                _verify(content.get(CHECKSUM), _digest(found, {}))
                self.checks[path.name.split(".")[1]] = found
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s is damaged (%s); the check is made again.", path, error)

    def write(self, stage: str, entry: Entry, at: Tensor | None = None, images: Tensor | None = None) -> None:
        """Keep an entry, and adversarial images [M, C, H, W] with their positions [M]."""
        tensors = {"positions": entry.positions, "predicted": entry.predicted, "broken": entry.broken}
        if at is not None and images is not None:
            tensors |= {"at": at, "images": images.cpu().contiguous()}
        figures = {key: getattr(entry, key) for key in ("rejected", "passes", "seconds", "elapsed")}
        metadata = {"figures": json.dumps(figures), CHECKSUM: _digest(figures, tensors)}
        self._write(self._path(stage, entry), serialise(tensors, metadata))

    def write_check(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(self.folder / f"check.{name}.json", json.dumps({**content, CHECKSUM: _digest(content, {})}).encode())

    def images(self, stage: str, entries: Sequence[Entry], positions: Tensor) -> Tensor:
        """The adversarial images at these positions: [B] -> [B, C, H, W]."""
        found: dict[int, Tensor] = {}
        wanted = set(positions.tolist())
        for entry in entries:
            if not torch.isin(entry.positions, positions).any():
                continue
            with safe_open(self._path(stage, entry), "pt") as file:
                images = file.get_slice("images")
                for row, position in enumerate(file.get_tensor("at").tolist()):
                    if position in wanted:
                        found[position] = images[row : row + 1]
        if missing := wanted - found.keys():
            raise ValueError(
                f"expected the adversarial images of {stage} in {self.folder}, got none of {len(missing)} of them: files are "
                "damaged; remove the folder and evaluate again."
            )
        return torch.cat([found[position] for position in positions.tolist()])

    def thin_out(self, stage: str, entries: Sequence[Entry], kept: Tensor) -> None:
        """Discard adversarial images, except those at some positions."""
        for entry in entries:
            with safe_open(self._path(stage, entry), "pt") as file:
                at = file.get_tensor("at")
                rows = torch.isin(at, kept)
                images = None if rows.all() else file.get_tensor("images")
            if images is not None:
                self.write(stage, entry, at[rows], images[rows])

    def _write(self, path: Path, content: bytes) -> None:
        write_file(path, content, durable=self.durable)

    def _path(self, stage: str, entry: Entry) -> Path:
        return self.folder / f"{stage}.{int(entry.positions[0]):012d}.safetensors"


def _read(path: Path) -> Entry:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        figures = json.loads(metadata["figures"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    _verify(metadata.get(CHECKSUM), _digest(figures, tensors))
    return Entry(**{name: tensors[name] for name in ("positions", "predicted", "broken")}, **figures)


def _digest(figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash of the content of an entry or a check."""
    return content_hash(tensors, json.dumps(figures, sort_keys=True))


def _verify(stated: str | None, found: str) -> None:
    """Raise unless the hash is the stated one; files of earlier versions state none."""
    if stated not in (None, found):
        raise ValueError("its content has another hash than it states")


@contextmanager
def open_journal(folder: str | Path | None, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal in ``folder``, created if there is none; without a folder, a temporary one.

    Raises:
        ValueError: If the folder holds something else, another evaluation, or isn't shared by all processes.
    """
    main = rank_and_world()[0] == 0
    begin_again = folder is not None and refuse_other(folder, identity)
    path = Path(tempfile.mkdtemp(prefix="cartl_hub_") if folder is None and main else folder or "")
    path = gather(path)[0]
    with ExitStack() as stack:
        if main:
            path.mkdir(parents=True, exist_ok=True)
            if folder is None:
                stack.callback(shutil.rmtree, path, ignore_errors=True)
            else:
                stack.enter_context(locked(path / LOCK))
            for pattern in OWN if begin_again else ():
                for other in path.glob(pattern):
                    other.unlink(missing_ok=True)
            for partial in (partial for pattern in (*OWN, IDENTITY) for partial in path.glob(f"{pattern}*.partial")):
                partial.unlink()
            write_file(path / IDENTITY, json.dumps(identity, indent=2))
        gather(None)
        if not (path / IDENTITY).exists():
            raise ValueError(
                f"expected the folder {path} of the main process, which this process doesn't see; pass resume= with a folder "
                "that all machines share."
            )
        journal = Journal(path, durable=folder is not None)
        gather(None)  # nobody writes before everybody has read
        yield journal
        gather(None)  # nothing is finished before everybody is done
        if main and journal.finished and folder is not None:
            write_file(path / IDENTITY, json.dumps({**identity, FINISHED: True}, indent=2))


def refuse_other(folder: str | Path, identity: Mapping[str, Any]) -> bool:
    """Raise ValueError if ``folder`` holds anything but an evaluation in which all of ``identity`` is the same, or one that is
    finished; return whether it is such another one, whose files may go."""
    folder = Path(folder)
    try:
        there = dict(json.loads((folder / IDENTITY).read_bytes()))
    except FileNotFoundError:
        if folder.exists() and any(path.name != LOCK and not path.name.endswith(".partial") for path in folder.iterdir()):
            raise ValueError(
                f"expected an empty folder, or that of an evaluation, to resume from; got {folder} with other files."
            ) from None
        return False
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"expected {IDENTITY} of an evaluation in {folder}, got a damaged one ({error}).") from error
    now = json.loads(json.dumps(identity))
    other = [key for key, value in now.items() if not _same(there.get(key), value, tolerant=key == "logits")]
    if other and not there.get(FINISHED):
        raise ValueError(
            f"expected the folder of this evaluation to resume from, got {folder} with one of another: {', '.join(other)} "
            "differ. Use another folder, or the same model, data and settings."
        )
    return bool(other)


def _same(there: Any, now: Any, tolerant: bool) -> bool:
    """Whether they are equal, or for logits, equal up to the rounding of other kernels."""
    if not tolerant or there is None or now is None:
        return there == now
    a, b = torch.tensor(there), torch.tensor(now)
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=0, atol=NEIGHBOUR_CHANGE * float(b.max() - b.min())))
