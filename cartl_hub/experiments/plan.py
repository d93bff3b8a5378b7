"""Plan of what the tables are run on, in one YAML file."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from ..attacks import Attack
from ..batchnorm import BatchNormPolicy
from ..config import from_dict, read_yaml
from ..methods import LwF, Method
from ..ranges import check_number, check_whole
from ..recipe import KINDS, RecipeData
from ..training import Schedule, TrainingArguments
from .cell import Cell, paper_attacks

FROZEN = BatchNormPolicy(extractor_statistics="source", submodel_affine="frozen")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A transfer in the table of targets.

    Args:
        source_data: Last part of the sources' ids, e.g. "cifar100".
        target: Data of the target.
        num_blocks: Number of blocks to train, and split of the FDM source.
        training: Training arguments, by default those of the plan; for LwF only the epochs. The seed is replaced.
    """

    source_data: str
    target: RecipeData
    num_blocks: int
    training: TrainingArguments | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Plan of what the tables are run on. Sources are named ``{prefix}{network}.{objective}_{source_data}``.

    Args:
        network: First part of the sources' ids, e.g. "wrn16_2".
        source_data: Last part of the sources' ids, e.g. "cifar100".
        target: Data of all tables except that of targets.
        prefix: Prefix for the location of the sources, e.g. "my_org/" on the Hub or "models/"; "" for bundled ones.
        cases: Numbers k of blocks that are trained.
        paper_cases: The paper's cases to compare with, in the same order; those of another network, so analogues.
        sources: Objectives of sources that are used at every k, regardless of their split, e.g. "at", "fdm4".
        seeds: Seeds of training; one cell for each.
        betas: Betas of NEFT in the ablation; the first is used in the other tables.
        fdm_weights: Weights of FDM sources in the ablation; the first is used in the other tables.
        lwf_weights: Weights of LwF in the ablation; LwF in the other tables uses 0.005.
        data_sizes: Numbers of target images.
        data_size_blocks: Number of blocks that are trained with few images.
        data_size_epochs: Number of passes over few images, with one validation at the end.
        pairs: Rows of the table of targets.
        pretexts: Objectives of sources that learned without labels; the first is used in the table of label shares.
        label_shares: Shares of the target's labels, in (0, 1].
        probe_blocks: Number of blocks that are trained on such a source; the authors train the classifier alone.
        probe_epochs: Number of passes over a share, with one validation at the end.
        training: Training arguments; the seed is replaced.
        lwf_training: Training arguments of LwF, which CARTL and its authors train without augmentation.
        num_images: Number of test images, stratified; all by default.
    """

    network: str
    source_data: str
    target: RecipeData
    prefix: str = ""
    cases: tuple[int, ...] = (4, 6, 8)
    paper_cases: tuple[int, ...] = (4, 6, 8)
    sources: tuple[str, ...] = ("at",)
    seeds: tuple[int, ...] = (0,)
    betas: tuple[float, ...] = (0.4, 0.6, 1.0)
    fdm_weights: tuple[float, ...] = (0.64, 1.28)
    lwf_weights: tuple[float, ...] = (0.1, 0.01, 0.005, 0.001)
    data_sizes: tuple[int, ...] = ()
    data_size_blocks: int = 4
    data_size_epochs: int = 100
    pairs: tuple[Pair, ...] = ()
    pretexts: tuple[str, ...] = ()
    label_shares: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0)
    probe_blocks: int = 1
    probe_epochs: int = 50
    training: TrainingArguments = field(default_factory=TrainingArguments)
    lwf_training: TrainingArguments = field(
        default_factory=lambda: TrainingArguments(
            lr=1e-3, weight_decay=2e-4, nesterov=False, schedule=Schedule(warmup=0.0, decay="constant"), augmentation=None
        )
    )
    num_images: int | None = None

    def __post_init__(self) -> None:
        needed = ("cases", "sources", "seeds", "betas", "fdm_weights", "lwf_weights", "label_shares")
        for name in needed:
            if not getattr(self, name):
                raise ValueError(f"expected at least one entry in {name}, got none.")
        for name in (*needed, "data_sizes", "pretexts"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"expected different entries in {name}, got {values}.")
        for seed in self.seeds:
            check_whole("each of seeds", seed, (">=", 0))
        for share in self.label_shares:
            check_number("each of label_shares", share, (">", 0), ("<=", 1))
        if self.num_images is not None:
            check_whole("num_images", self.num_images, (">=", 1))
        if len(self.cases) != len(self.paper_cases):
            raise ValueError(f"expected one of paper_cases for each of cases {self.cases}, got {self.paper_cases}.")
        for number in (*self.cases, *self.data_sizes, self.data_size_blocks, self.data_size_epochs):
            check_whole("each of cases, data_sizes, data_size_blocks and data_size_epochs", number, (">=", 1))

    def source(self, objective: str, source_data: str | None = None) -> str:
        return f"{self.prefix}{self.network}.{objective}_{source_data or self.source_data}"

    def split_at(self, num_blocks: int, weight: float | None = None) -> str:
        """Objective of the FDM source split before the last ``num_blocks`` blocks."""
        return f"fdm{num_blocks}" + ("" if weight in (None, self.fdm_weights[0]) else f"w{weight:g}")

    def cells(
        self,
        source: str,
        method: Method,
        *,
        bn: BatchNormPolicy = FROZEN,
        target: RecipeData | None = None,
        epochs: int | None = None,
        attacks: dict[str, Attack] | None = None,
        training: TrainingArguments | None = None,
    ) -> tuple[Cell, ...]:
        """A cell for each seed; with ``epochs``, trained for that many and validated at the end. LwF has its own training."""
        lwf = isinstance(method, LwF)
        training = self.lwf_training if lwf else training or self.training
        if epochs is not None:
            training = replace(training, epochs=epochs, validate_every=epochs)
        return tuple(
            Cell(
                source=source,
                target=target or self.target,
                method=method,
                bn=BatchNormPolicy() if lwf else bn,
                training=replace(training, seed=seed),
                attacks=attacks or paper_attacks(),
                num_images=self.num_images,
            )
            for seed in self.seeds
        )


def load_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        ValueError: If the file isn't a plan; the message names the entry.
    """
    content = read_yaml(Path(path))
    try:
        return from_dict(content, KINDS | {"Plan": Plan, "Pair": Pair}, default="Plan")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
