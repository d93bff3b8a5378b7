"""One cell of a table: a source transferred to a target, and what was measured of it."""

import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attacks import APGDT, PGD, Attack
from ..batchnorm import BatchNormPolicy
from ..config import to_dict
from ..data import ImageData
from ..evaluation.clean import classified_correctly
from ..files import write_file
from ..finetuner import RobustFineTuner, Source, open_source
from ..loading import Splits
from ..methods import Method
from ..models import create_model
from ..processes import environment
from ..ranges import check_whole
from ..recipe import RecipeData
from ..report import Accuracy, Report
from ..sampling import stratified_sample
from ..training import TrainingArguments, read_best
from ..weights import weights_sha256

WORST = "worst case"
UNTRAINED = "untrained:"  # before timm's name of a network that is trained from the start
FREE = ("checkpoint_every", "checkpoint_minutes", "log_with", "precision")  # these are no part of what a cell is


class ExperimentError(RuntimeError):
    """Cells could not be run; the message says which and why."""


def paper_attacks(eps: float = 8 / 255) -> dict[str, Attack]:
    """PGD-20, CARTL's PGD-100, and APGD-T of 30 steps for each of 3 targets, which makes the worst case; Linf."""
    pgd = {f"PGD-{steps}": PGD(eps=eps, step_size=eps / 4, steps=steps) for steps in (20, 100)}
    return {**pgd, "APGD-T": APGDT(eps=eps, steps=30, num_targets=3)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A transfer, and how it is measured.

    Args:
        source: Bundled id, Hub id, model folder, or name of a timm model; "untrained:" and such a name for a network with random
            weights, drawn from the seed.
        target: Data to fine-tune on and to measure on.
        method: Transfer method.
        bn: Batch-norm policy.
        training: Training arguments; their seed is the cell's. Not with ``load_best``: last and best weights are measured apart.
        attacks: Attacks by name; with none, clean accuracy alone is measured.
        num_images: Number of test images, stratified, the same in every cell; all by default.
        best: Measure the best weights by validation too, if there was more than one validation.

    Raises:
        ValueError: On ``load_best``, or a number out of range.
    """

    source: str
    target: RecipeData
    method: Method
    bn: BatchNormPolicy
    training: TrainingArguments
    attacks: dict[str, Attack] = field(default_factory=paper_attacks)
    num_images: int | None = None
    best: bool = True

    def __post_init__(self) -> None:
        if self.training.load_best:
            raise ValueError("expected load_best=False in a cell, which measures the last weights and the best ones apart.")
        if self.num_images is not None:
            check_whole("num_images", self.num_images, (">=", 1))

    def to_json(self) -> dict[str, Any]:
        """Everything that changes the outcome, as JSON: not where the data are, nor how often a checkpoint is written."""
        content = to_dict(self)
        content["target"].pop("local")
        for name in _free(self.training):
            content["training"].pop(name)
        return json.loads(json.dumps(content))

    def agrees(self, content: Mapping[str, Any]) -> bool:
        """Whether a result's ``cell`` is this one, as far as both state it."""
        own = self.to_json()
        return content.get("attacks", own["attacks"]).keys() == own["attacks"].keys() and _agree(content, own)

    @property
    def setting(self) -> str:
        """Method and batch-norm policy, with non-default values, and number of training images, in readable form."""
        stated, read = _stated(self.method), self.target.read
        both = {**stated, **_stated(self.bn)}
        options = [f"{key}={value}" for key, value in both.items() if key != "name" and not isinstance(value, dict)]
        number = f", {read.train_images} images" if read.train_images else f", {read.train_share:.0%}" if read.train_share else ""
        return f"{stated['name']}({', '.join(options)}){number}"

    @property
    def title(self) -> str:
        """Readable title of the cell."""
        return f"{self.source} -> {self.target.id.rpartition('/')[2]}: {self.setting}, seed {self.training.seed}"

    @property
    def key(self) -> str:
        """Name for files: readable and unique to the cell; an option that is added to the package changes none."""
        stated = _stated(replace(self, target=replace(self.target, local=None), training=_essential(self.training)))
        digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:10]
        return "-".join((_word(self.source), *self._parts, f"seed{self.training.seed}", digest))

    @property
    def model_name(self) -> str:
        """Name of the resulting model: the source's and what was done with it, e.g. "wrn16_2.fdm4_cifar100-neft4-cifar10"."""
        return "-".join((_word(Path(self.source.removeprefix(UNTRAINED)).name), *self._parts))

    @property
    def _parts(self) -> tuple[str, str]:
        """Method and target, for names."""
        return self.method.tag, _word(self.target.id.rpartition("/")[2])


@dataclass(frozen=True, eq=False)
class Measured:
    """Verdicts on the test images, of the weights at one step.

    Args:
        step: Number of training steps done.
        verdicts: Mapping from "clean", each attack, and "worst case" to bool [N], True where the image is classified correctly.
        worst_case: Names of the attacks that make the worst case, those in the first threat model; None for all.
    """

    step: int
    verdicts: dict[str, np.ndarray]
    worst_case: tuple[str, ...] | None = None

    def accuracy(self, name: str) -> Accuracy:
        verdict = self.verdicts[name]
        return Accuracy(int(verdict.sum()), len(verdict))

    @classmethod
    def of(cls, report: Report, step: int) -> "Measured":
        names = tuple(report.robust.attacks) if len(report.worst_case) > 1 else None
        return cls(step, report.verdicts.correct | {WORST: report.standing(report.threat)}, names)

    def to_json(self) -> dict[str, Any]:
        """Counts for readers, bits for paired comparisons."""
        num_images = len(self.verdicts["clean"])
        return {
            "step": self.step,
            "num_images": num_images,
            **({} if self.worst_case is None else {"worst_case": list(self.worst_case)}),
            "correct": {name: int(verdict.sum()) for name, verdict in self.verdicts.items()},
            "verdicts": {
                name: base64.b64encode(np.packbits(verdict).tobytes()).decode() for name, verdict in self.verdicts.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Measured":
        """Verdicts from what :meth:`to_json` wrote.

        Raises:
            ValueError: If counts and verdicts don't agree.
        """
        num_images, verdicts = content["num_images"], {}
        for name, text in content["verdicts"].items():
            bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
            if len(bits) != -(-num_images // 8):
                raise ValueError(f"expected verdicts on {num_images} images for {name}, got {len(bits)} bytes of them.")
            verdicts[name] = np.unpackbits(bits, count=num_images).astype(bool)
            if int(verdicts[name].sum()) != content["correct"][name]:
                raise ValueError(
                    f"expected {content['correct'][name]} correct verdicts for {name}, as the count says, got "
                    f"{int(verdicts[name].sum())}; run the cell again."
                )
        worst, worst_case = verdicts.get(WORST, verdicts["clean"]), content.get("worst_case")
        names = list(verdicts) if worst_case is None else ["clean", *worst_case]
        if any((worst & ~verdicts[name]).any() for name in names):
            raise ValueError("expected a worst case of which every image withstands every attack.")
        return cls(content["step"], verdicts, None if worst_case is None else tuple(worst_case))


@dataclass(frozen=True, eq=False)
class CellResult:
    """Result of one cell.

    Args:
        cell: Content of :meth:`Cell.to_json`.
        last: Verdicts for the weights after the last step, as the papers report.
        best: Verdicts for the best weights by robust accuracy on validation images; None if there was no choice.
        source: Id, weights' hash and training method of the source.
        data: Number and index hash of the training images, of the validation images and of the test images.
        validations: Step and accuracies on validation images.
        made: Record of command, commit, hash of the names and sizes of the target's files, hardware, precision and seconds of
            training, and the environment of the evaluation of the last weights: versions, hardware, seconds, date.
    """

    cell: dict[str, Any]
    last: Measured
    best: Measured | None
    source: dict[str, Any]
    data: dict[str, Any]
    validations: list[dict[str, Any]]
    made: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        measured = {"last": self.last.to_json(), "best": None if self.best is None else self.best.to_json()}
        kept = ("cell", "source", "data", "validations", "made")
        return {"format": 1, **{name: getattr(self, name) for name in kept}, **measured}

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "CellResult":
        """A result from its file.

        Raises:
            ValueError: If it can't be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != 1:
                raise ValueError("expected format 1; upgrade cartl_hub.")
            last, best = Measured.from_json(content.pop("last")), content.pop("best")
            for part, names in (
                ("data", ("train", "test")),
                ("made", ("command", "device", "precision")),
                ("cell", ("training",)),
            ):
                if missing := [name for name in names if name not in content[part]]:
                    raise ValueError(f"expected {', '.join(missing)} in {part}.")
            return cls(last=last, best=None if best is None else Measured.from_json(best), **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected the result of a cell in {path}: {error!r}.") from error


def run_cell(
    cell: Cell,
    folder: Path,
    *,
    source: Source | None = None,
    splits: Splits | None = None,
    keep: bool = True,
    command: str | None = None,
) -> CellResult:
    """Train and measure one cell; an interrupted run is resumed.

    Args:
        cell: Cell to run.
        folder: Folder for its checkpoints, finished batches and the model.
        source: The cell's source, if it is already open; it is trained in place.
        splits: The target, if it is already loaded.
        keep: Write the model with its card and report into ``folder / "model"``.
        command: Command that reproduces this run, for the record.
    """
    target, source = cell.target, source or open_source_of(cell)
    command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    origin = {
        "id": cell.source,
        "weights_sha256": weights_sha256(source.model),
        "method": source.model.lineage.get("method"),
    }
    tuner = RobustFineTuner(
        source,
        splits if splits is not None else target.location,
        method=cell.method,
        bn=cell.bn,
        arguments=cell.training,
        data_arguments=None if splits is not None else replace(target.read, id=target.id),
        output_dir=folder,
        name=cell.model_name,
    )
    test = tuner.splits.test
    if cell.num_images is not None and isinstance(test, ImageData) and cell.num_images < len(test):
        tuner.splits = replace(tuner.splits, test=test.subset(stratified_sample(test.labels, cell.num_images, 0)))
    result = tuner.train()
    step = result.best.step if result.weights == "best" and result.best is not None else result.steps  # a run that overfitted
    last, evaluated = _measure(cell, tuner, step, folder / "evaluation.last", command)
    measured_weights = weights_sha256(tuner.model)
    if keep:
        tuner.save()
    best = None
    if cell.best and result.best is not None and len(result.validations) > 1:
        best = last
        if result.best.step != step:
            tuner.model.load_state_dict(read_best(folder))
            best, _ = _measure(cell, tuner, result.best.step, folder / "evaluation.best", command)
    splits, shown = tuner.splits, ("num_images", "index_hash", "fingerprint", "split")
    return CellResult(
        cell=cell.to_json(),
        last=last,
        best=best,
        source=origin,
        data={
            name: {key: part.description[key] for key in shown if key in part.description}
            for name, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
        },
        validations=[asdict(found) for found in result.validations],
        made={
            "command": command,
            "commit": code_commit(),
            "files": files_hash(target.location),
            "weights_sha256": measured_weights,
            "device": result.device,
            "precision": result.precision,
            "training_seconds": round(result.seconds, 1),
            "evaluation": evaluated,
        },
    )


def _measure(cell: Cell, tuner: RobustFineTuner, step: int, resume: Path, command: str) -> tuple[Measured, dict[str, Any]]:
    """Verdicts for the weights that the tuner holds, and the environment in which they were computed."""
    if cell.attacks:
        options: dict[str, Any] = {"curve": None, "checks": False, "resume": resume, "context": {"command": command}}
        report = tuner.evaluate(attacks=cell.attacks, num_images=cell.num_images, **options)
        return Measured.of(report, step), report.environment
    begin = time.perf_counter()
    correct = classified_correctly(tuner.model, tuner.splits.test)[: cell.num_images]
    device = next(tuner.model.parameters()).device
    return Measured(step, {"clean": correct}), environment(device, time.perf_counter() - begin)


def open_source_of(cell: Cell) -> Source:
    """Source that a cell starts from."""
    if not cell.source.startswith(UNTRAINED):
        return open_source(cell.source)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cell.training.seed)
        return open_source(create_model(cell.source.removeprefix(UNTRAINED)))


def _word(text: str) -> str:
    """Text as a word for file names."""
    return re.sub(r"[^\w.]+", "_", text)


def files_hash(location: str) -> str | None:
    """Hash of the names and sizes of a folder's files, or of a file's; None for data that aren't on this machine."""
    path = Path(location)
    if not path.exists():
        return None
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    listed = [(str(item.relative_to(path)), item.stat().st_size) for item in found if item.is_file()]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _essential(training: TrainingArguments) -> TrainingArguments:
    """Training arguments with defaults for everything that is not part of a cell."""
    defaults: dict[str, Any] = {entry.name: entry.default for entry in fields(training) if entry.name in _free(training)}
    return replace(training, **defaults)


def _free(training: TrainingArguments) -> tuple[str, ...]:
    exact = training.cache is None or (training.cache.views is None and training.cache.dtype == "fp32")
    return (*FREE, "cache") if exact else FREE


def _stated(value: Any) -> Any:
    """JSON of a choice without the fields that have their default."""
    if is_dataclass(value) and not isinstance(value, type):
        defaults = {entry.name: _default(entry) for entry in fields(value) if entry.repr}
        changed = {name: getattr(value, name) for name, default in defaults.items() if getattr(value, name) != default}
        return {"name": type(value).__name__} | {name: _stated(item) for name, item in changed.items()}
    if isinstance(value, Mapping):
        return {name: _stated(item) for name, item in value.items()}
    return [_stated(item) for item in value] if isinstance(value, (list, tuple)) else value


def _default(entry: Field) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _agree(there: Any, here: Any) -> bool:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return all(_agree(there[name], here[name]) for name in there.keys() & here.keys())
    return there == here


def code_commit(folder: Path = Path(__file__).parents[1]) -> str | None:
    """Commit of the checkout that a folder of code is part of, with "+" if its files have changed; None outside of one, as
    where it was installed into somebody's project."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", "."):
            return None
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return None
