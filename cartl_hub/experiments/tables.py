"""The tables of CARTL (Chen et al., ICML 2021) and of self-supervised transfer (Jaiswal and Fan, 2021), as cells to run and the
papers' figures to compare with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ..attacks import FGSM, Attack
from ..batchnorm import BatchNormPolicy
from ..methods import NEFT, AdversarialTraining, FineTuning, LwF, Method
from .cell import UNTRAINED, Cell, paper_attacks
from .plan import FROZEN, Pair, Plan

NAMES = ("cases", "ablation", "bn", "targets", "datasize", "ssl")
METHODS = ("LwF", "TL", "CARTL")  # that are compared on other targets and on fewer images
LWF_WEIGHT = 0.005  # of the authors' code

Figures = Mapping[int, tuple[float, float]]  # the paper's case -> clean and PGD-100 accuracy, in %

CASES: dict[str, Figures] = {  # CIFAR-100 -> CIFAR-10, WRN-34-10
    "AT + TL": {4: (83.22, 25.23), 6: (86.92, 25.38), 8: (90.82, 18.54)},
    "AT + NEFT": {4: (83.72, 26.29), 6: (86.87, 27.95), 8: (90.92, 29.97)},
    "FDM + NEFT": {4: (85.51, 28.47), 6: (87.79, 30.94), 8: (91.30, 29.34)},
}
ABLATION: dict[tuple[float, float], Figures] = {  # weight of FDM per batch mean, beta
    (0.64, 0.4): CASES["FDM + NEFT"],
    (0.64, 1.0): {4: (85.41, 25.75), 6: (87.66, 25.97), 8: (91.71, 17.62)},
    (0.64, 0.6): {4: (85.47, 27.14), 6: (88.07, 27.64), 8: (91.10, 21.60)},
    (1.28, 0.4): {4: (85.64, 28.40), 6: (87.96, 29.60), 8: (91.55, 27.47)},
}
BATCH_NORM: dict[tuple[str, str], tuple[float, float]] = {  # case 8; statistics of the extractor, affine maps of the sub-model
    ("target", "trained"): (91.17, 14.36),
    ("source", "trained"): (90.86, 14.89),
    ("target", "frozen"): (90.70, 17.41),
    ("source", "frozen"): (90.84, 18.54),
}
TARGETS: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("cifar100", "svhn"): {"LwF": (85.90, 6.67), "TL": (92.83, 17.64), "CARTL": (93.96, 22.21)},
    ("cifar100", "gtsrb"): {"LwF": (70.34, 15.85), "TL": (80.40, 30.25), "CARTL": (83.07, 47.34)},
    ("cifar10", "svhn"): {"LwF": (94.32, 4.68), "TL": (94.86, 11.52), "CARTL": (94.76, 21.65)},
    ("gtsrb", "svhn"): {"LwF": (81.80, 1.08), "TL": (93.91, 6.08), "CARTL": (94.07, 15.26)},
}
SHARES: dict[float, tuple[tuple[int, int], tuple[int, int]]] = {  # clean, and clean with adversarial images: accuracy, under FGSM
    0.01: ((58, 26), (49, 29)),
    0.1: ((61, 32), (60, 36)),
    0.3: ((63, 33), (62, 38)),
    1.0: ((63, 35), (62, 40)),
}
SUPERVISED = ((68, 23), (66, 36))
PRETEXTS = {"rotation": 25, "jigsaw": 29, "simclr": 38}  # under FGSM, 30% of the labels, with adversarial images


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        label: Source and method.
        cells: Cells by column, one for each seed; a column may be missing.
        paper: The paper's entry by column: which one, clean and PGD-100 accuracy in %.
    """

    label: str
    cells: Mapping[str, tuple[Cell, ...]]
    paper: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, to be confirmed or not: robust accuracy of one row is above that of another.

    Args:
        text: The claim in words.
        better: Label of the row said to be better.
        worse: Label of the row said to be worse.
    """

    text: str
    better: str
    worse: str


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        name: Name of the table, as for ``cartl-hub reproduce``.
        title: Title, with the sources and the target.
        columns: Headings of the columns.
        rows: Rows of the table.
        claims: Claims of the paper about the rows.
        notes: Remarks that a reader must know.
        attack: Attack whose accuracy is shown between clean and worst case; the claims are about the worst case.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    attack: str = "PGD-100"

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cells in row.cells.values() for cell in cells]


def make_tables(plan: Plan, names: Sequence[str] = NAMES) -> list[Table]:
    """Tables of a plan.

    Raises:
        ValueError: On an unknown name.
    """
    makers = dict(zip(NAMES, (_cases, _ablation, _batch_norm, _targets, _data_size, _self_supervised), strict=True))
    if unknown := [name for name in names if name not in makers]:
        raise ValueError(f"expected tables among {', '.join(NAMES)}, got {', '.join(unknown)}.")
    return [table for name in names for table in makers[name](plan)]


def _cases(plan: Plan) -> list[Table]:
    beta, columns = plan.betas[0], _columns(plan)

    def row(label: str, source: str | None, neft: bool) -> Row:
        """Row from one source, or with None from the FDM source split at its own k."""
        methods = {k: NEFT(num_blocks=k, beta=beta) if neft else FineTuning(num_blocks=k) for k in plan.cases}
        cells = {k: plan.cells(plan.source(source or plan.split_at(k)), method) for k, method in methods.items()}
        paper = CASES.get("FDM + NEFT" if source is None and neft else label, {})
        return Row(label, _by_column(plan, cells), _beside(plan, paper))

    rows = [row("FDM + TL", None, False), row("FDM + NEFT", None, True)]
    for source in plan.sources:
        rows += [row(f"{_objective(source)} + TL", source, False), row(f"{_objective(source)} + NEFT", source, True)]
    labels = [row.label for row in rows]
    claims = [
        Claim(f"NEFT is more robust than TL from {name}", f"{name} + NEFT", f"{name} + TL")
        for name in ("FDM", *(_objective(source) for source in plan.sources if source != "natural"))
    ]
    if "AT + NEFT" in labels:
        claims.append(Claim("FDM sources transfer more robustly than AT sources under NEFT", "FDM + NEFT", "AT + NEFT"))
    notes = (
        "TL: the last k blocks are fine-tuned on clean images. FDM: the source split before the last k blocks; a source with "
        "another split is named with it.",
    )
    return [Table("cases", f"Cases: {_title(plan)}", columns, tuple(rows), tuple(claims), notes)]


def _ablation(plan: Plan) -> list[Table]:
    settings = [(plan.fdm_weights[0], beta) for beta in plan.betas]
    settings += [(weight, plan.betas[0]) for weight in plan.fdm_weights[1:]]
    rows = []
    for weight, beta in settings:
        cells = {k: plan.cells(plan.source(plan.split_at(k, weight)), NEFT(num_blocks=k, beta=beta)) for k in plan.cases}
        paper = ABLATION.get((weight, beta), {})
        rows.append(Row(f"FDM {weight:g} + NEFT {beta:g}", _by_column(plan, cells), _beside(plan, paper)))
    first, last = plan.betas[0], plan.betas[-1]
    weight = plan.fdm_weights[0]
    claims = (
        ()
        if len(plan.betas) == 1
        else (
            Claim(
                f"beta {first:g} keeps more robustness than beta {last:g}",
                f"FDM {weight:g} + NEFT {first:g}",
                f"FDM {weight:g} + NEFT {last:g}",
            ),
        )
    )
    for source in plan.sources:
        for beta in plan.betas:
            cells = {k: plan.cells(plan.source(source), NEFT(num_blocks=k, beta=beta)) for k in plan.cases}
            rows.append(Row(f"{_objective(source)} + NEFT {beta:g}", _by_column(plan, cells)))
    lwf = [
        Row(
            f"{_objective(source)} + LwF",
            {f"{weight:g}": plan.cells(plan.source(source), LwF(weight=weight)) for weight in plan.lwf_weights},
        )
        for source in plan.sources
    ]
    return [
        Table("ablation", f"NEFT's beta and FDM's weight: {_title(plan)}", _columns(plan), tuple(rows), claims),
        Table("ablation", f"LwF's weight: {_title(plan)}", tuple(f"{weight:g}" for weight in plan.lwf_weights), tuple(lwf)),
    ]


def _batch_norm(plan: Plan) -> list[Table]:
    tables = []
    for source in plan.sources:
        rows = []
        for (statistics, affine), paper in BATCH_NORM.items():
            policy = BatchNormPolicy(extractor_statistics=statistics, submodel_affine=affine)  # type: ignore[arg-type]
            cells = {k: plan.cells(plan.source(source), FineTuning(num_blocks=k), bn=policy) for k in plan.cases}
            beside = _beside(plan, {8: paper} if source == "at" else {})
            label = f"{_objective(source)}: {statistics} statistics, {affine} affine"
            rows.append(Row(label, _by_column(plan, cells), beside))
        claims = (
            Claim("reusing the source's statistics helps, affine maps trained", rows[1].label, rows[0].label),
            Claim("reusing the source's statistics helps, affine maps frozen", rows[3].label, rows[2].label),
            Claim("freezing the affine maps helps, source's statistics", rows[3].label, rows[1].label),
        )
        title = f"Batch norm in TL from {_objective(source)}: {_title(plan)}"
        tables.append(Table("bn", title, _columns(plan), tuple(rows), claims))
    return tables


def _targets(plan: Plan) -> list[Table]:
    if not plan.pairs:
        return []
    columns = {pair: f"{pair.source_data} -> {_target(pair)}, k = {pair.num_blocks}" for pair in plan.pairs}
    tables = []
    for place, (title, at_k) in enumerate(_origins(plan)):
        rows = []
        for name in METHODS:
            cells, paper = {}, {}
            for pair, column in columns.items():
                objective, method = at_k(pair.num_blocks)[name]
                source, epochs = plan.source(objective, pair.source_data), None
                if pair.training is not None and isinstance(method, LwF):  # which has a training of its own
                    epochs = pair.training.epochs
                cells[column] = plan.cells(source, method, target=pair.target, epochs=epochs, training=pair.training)
                figures = TARGETS.get((pair.source_data, _target(pair)))
                if figures and not place:  # the paper's sources are those of the first table
                    paper[column] = _paper_text("paper", figures[name])
            rows.append(Row(name, cells, paper))
        claims = tuple(Claim(f"CARTL is more robust than {name}", "CARTL", name) for name in ("TL", "LwF"))
        tables.append(Table("targets", f"Targets, {title}: {plan.network}", tuple(columns.values()), tuple(rows), claims))
    return tables


def _data_size(plan: Plan) -> list[Table]:
    if not plan.data_sizes:
        return []
    k, tables = plan.data_size_blocks, []
    for title, at_k in _origins(plan):
        rows = []
        for name in METHODS:
            objective, method = at_k(k)[name]
            cells = {}
            for number in plan.data_sizes:
                target = replace(plan.target, read=replace(plan.target.read, train_images=number))
                cells[f"{number:,}"] = plan.cells(plan.source(objective), method, target=target, epochs=plan.data_size_epochs)
            rows.append(Row(name, cells))
        claims = tuple(
            Claim(f"CARTL is more robust than {name}, whatever the number of images", "CARTL", name) for name in ("TL", "LwF")
        )
        columns = tuple(f"{number:,}" for number in plan.data_sizes)
        tables.append(
            Table("datasize", f"Number of target images, k = {k}, {title}: {_title(plan)}", columns, tuple(rows), claims)
        )
    return tables


def _origins(plan: Plan) -> list[tuple[str, Callable[[int], dict[str, tuple[str, Method]]]]]:
    """Origins of the compared methods: a title, and from the number of blocks the source's objective and the method."""

    def methods(source: str, cartl: str | None, k: int) -> dict[str, tuple[str, Method]]:
        neft = NEFT(num_blocks=k, beta=plan.betas[0])
        found = (
            (source, LwF(weight=LWF_WEIGHT)),
            (source, FineTuning(num_blocks=k)),
            (cartl or plan.split_at(k), neft),
        )
        return dict(zip(METHODS, found, strict=True))

    own = "LwF and TL from the AT source, CARTL from the FDM source split at its k"
    others = [source for source in plan.sources if source != "at"]
    return [
        (own, partial(methods, "at", None)),
        *((f"all from {_objective(source)}", partial(methods, source, source)) for source in others),
    ]


def _target(pair: Pair) -> str:
    return pair.target.id.rpartition("/")[2]


def _self_supervised(plan: Plan) -> list[Table]:
    if not plan.pretexts:
        return []
    attacks: dict[str, Attack] = {"FGSM": FGSM(eps=8 / 255)} | paper_attacks()
    attacks.pop("PGD-100")
    columns = ("clean images", "adversarial images added")

    def row(label: str, source: str, share: float, blocks: int | None, paper: Sequence[str] = ()) -> Row:
        target = replace(plan.target, read=replace(plan.target.read, train_share=None if share == 1 else share))
        methods: tuple[Method, ...] = (
            FineTuning(num_blocks=blocks),
            AdversarialTraining(attack=FGSM(eps=8 / 255), adversarial_share=1.0, num_blocks=blocks),
        )
        bn = BatchNormPolicy() if blocks is None else FROZEN  # a network that is trained whole needs its affine maps
        cells = {
            column: plan.cells(source, method, bn=bn, target=target, epochs=plan.probe_epochs, attacks=attacks)
            for column, method in zip(columns, methods, strict=True)
        }
        return Row(label, cells, dict(zip(columns, paper, strict=False)))

    def paper(figures: Sequence[tuple[int, int]]) -> list[str]:
        return ["paper: {} / {}".format(*pair) for pair in figures] if _papers_data(plan) else []

    first, shares = plan.source(plan.pretexts[0]), sorted(plan.label_shares)
    most = shares[-1]
    rows = [row("supervised, from the start", f"{UNTRAINED}{plan.network}", most, None, paper(SUPERVISED))]
    for share in shares:
        rows.append(row(f"{share:.0%} of the labels", first, share, plan.probe_blocks, paper(SHARES.get(share, ()))))
    claims = (
        Claim(f"without labels first is more robust than supervised, {most:.0%} of the labels", rows[-1].label, rows[0].label),
        *([Claim("more labels make it more robust", rows[-1].label, rows[1].label)] if len(shares) > 1 else []),
    )
    tasks, share = [], 0.3 if 0.3 in shares else most  # 0.3 is the paper's
    for task in plan.pretexts:
        found = row(task, plan.source(task), share, plan.probe_blocks)
        stated = task in PRETEXTS and share == 0.3 and _papers_data(plan)
        figure = {columns[1]: f"paper: {PRETEXTS[task]} under FGSM"} if stated else {}
        tasks.append(replace(found, paper=figure))
    notes = ("Adversarial images: FGSM at 8/255, one added for each image.",)
    return [
        Table("ssl", f"Labels, after {plan.pretexts[0]}: {_title(plan)}", columns, tuple(rows), claims, notes, "FGSM"),
        Table("ssl", f"Pretext tasks, {share:.0%} of the labels: {_title(plan)}", columns, tuple(tasks), (), notes, "FGSM"),
    ]


def _papers_data(plan: Plan) -> bool:
    """Whether the plan uses the data of the papers' tables."""
    return (plan.source_data, plan.target.id.rpartition("/")[2]) == ("cifar100", "cifar10")


def _objective(source: str) -> str:
    """Words for the objective in a source's id."""
    if source.startswith("fdm"):
        return f"FDM split at {source.removeprefix('fdm')}"
    return source.upper() if source == "at" else source


def _title(plan: Plan) -> str:
    return f"{plan.source_data} -> {plan.target.id.rpartition('/')[2]}, {plan.network}"


def _columns(plan: Plan) -> tuple[str, ...]:
    return tuple(f"k = {k}" for k in plan.cases)


def _by_column(plan: Plan, cells: Mapping[int, tuple[Cell, ...]]) -> dict[str, tuple[Cell, ...]]:
    return {f"k = {k}": cells[k] for k in plan.cases}


def _beside(plan: Plan, figures: Figures) -> dict[str, str]:
    """The paper's figures in the columns that they are compared with."""
    if not _papers_data(plan):
        return {}
    pairs = zip(plan.cases, plan.paper_cases, strict=True)
    return {f"k = {k}": _paper_text(f"paper's case {theirs}", figures[theirs]) for k, theirs in pairs if theirs in figures}


def _paper_text(which: str, figures: tuple[float, float]) -> str:
    return "{}: {:.2f} / {:.2f}".format(which, *figures)
