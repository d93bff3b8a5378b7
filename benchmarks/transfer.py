"""Transfer from a robust source at several depths: vanilla freezing beside NEFT, with paired intervals.

python benchmarks/transfer.py --data ../shared/data/cifar10 --num-blocks 4 6 --seeds 0 1 --output benchmarks/results/transfer.json

Each cell goes on where it was interrupted, and the rows of other depths and seeds in the output stay. The arguments are fixed
beforehand; validation images choose nothing here, and the last weights are measured on the whole test split.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from cartl_hub import NEFT, PGD, BatchNormPolicy, DataArguments, FineTuning, Report, RobustFineTuner, Schedule, TrainingArguments
from cartl_hub.config import to_dict
from cartl_hub.report import paired_bootstrap

EPS = 8 / 255
PGD_20 = PGD(eps=EPS, step_size=2 / 255, steps=20)
NAMES = ("clean", "PGD-20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="wrn16_2.fdm4_cifar100")
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--beta", type=float, default=0.4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--num-images", type=int, help="test images; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/transfer.json"))
    options = parser.parse_args()

    arguments = TrainingArguments(
        epochs=options.epochs, lr=0.02, schedule=Schedule(warmup=0.1, decay="linear"), validate_every=options.epochs
    )
    policy = BatchNormPolicy(extractor_statistics="source", submodel_affine="frozen")
    rows = []
    for k, seed in product(options.num_blocks, options.seeds):
        verdicts: dict[str, dict[str, np.ndarray]] = {}
        for method in (FineTuning(num_blocks=k), NEFT(num_blocks=k, beta=options.beta)):
            name = type(method).__name__
            tuner = RobustFineTuner(
                options.source,
                options.data,
                method=method,
                bn=policy,
                arguments=replace(arguments, seed=seed),
                data_arguments=DataArguments(validation_share=0.02),
                output_dir=options.runs / f"{name.lower()}{k}_seed{seed}",
            )
            result = tuner.train()
            report = measured(tuner, options.num_images)
            verdicts[name] = report.verdicts.correct
            rows.append(
                {
                    "num_blocks": k,
                    "seed": seed,
                    "method": to_dict(method),
                    "clean": [report.clean.accuracy, *report.clean.interval],
                    "pgd20": [report.attacks["PGD-20"].accuracy, *report.attacks["PGD-20"].interval],
                    "minutes": round(result.seconds / 60, 1),
                    "precision": result.precision,
                    "num_images": report.num_images,
                    "command": shlex.join(["python", *sys.argv]),
                    "environment": report.environment,
                }
            )
            print(f"k={k} seed={seed} {name}: clean {report.clean}, PGD-20 {report.attacks['PGD-20']}")
        difference = {attack: paired_bootstrap(verdicts["NEFT"][attack], verdicts["FineTuning"][attack]) for attack in NAMES}
        rows.append({"num_blocks": k, "seed": seed, "neft_minus_vanilla": difference})
        for attack, (middle, low, high) in difference.items():
            interval = f"95 % paired interval {100 * low:+.2f} to {100 * high:+.2f}"
            print(f"k={k} seed={seed} NEFT - vanilla, {attack}: {100 * middle:+.2f} points, {interval}")
    shared = {
        "source": options.source,
        "data": options.data,
        "arguments": to_dict(arguments),
        "batch_norm": to_dict(policy),
        "attack": to_dict(PGD_20),
    }
    kept = other_rows(options.output, shared, set(product(options.num_blocks, options.seeds)))
    rows = sorted(kept + rows, key=lambda row: (row["num_blocks"], row["seed"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(shared | {"rows": rows}, indent=1) + "\n")


def other_rows(path: Path, shared: dict, cells: set[tuple[int, int]]) -> list[dict]:
    """Rows of an earlier call with the same arguments, of other depths and seeds."""
    saved = json.loads(path.read_text()) if path.exists() else {}
    if {key: saved.get(key) for key in shared} != json.loads(json.dumps(shared)):
        return []
    return [row for row in saved["rows"] if (row["num_blocks"], row["seed"]) not in cells]


def measured(tuner: RobustFineTuner, num_images: int | None) -> Report:
    """The report of a cell, from its folder where it has been measured."""
    folder = tuner.output_dir / "model"
    if (folder / "report.json").exists():
        report = Report.load(folder)
        if num_images is None or report.num_images == num_images:
            return report
    report = tuner.evaluate(attacks={"PGD-20": PGD_20}, num_images=num_images, curve=None, checks=False)
    tuner.save()
    return report


if __name__ == "__main__":
    main()
