"""Transfer from a robust source at several depths: vanilla freezing beside NEFT, with paired intervals.

python benchmarks/transfer.py --data ../shared/data/cifar10 --num-blocks 4 6 --output benchmarks/results/transfer.json

Each cell goes on where it was interrupted. The arguments are fixed beforehand; validation images choose nothing here, and the
last weights are measured on the whole test split.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from cartl_hub import NEFT, PGD, BatchNormPolicy, DataArguments, FineTuning, RobustFineTuner, Schedule, TrainingArguments
from cartl_hub.config import to_dict
from cartl_hub.report import paired_bootstrap

EPS = 8 / 255
PGD_20 = PGD(eps=EPS, step_size=2 / 255, steps=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="wrn16_2.fdm4_cifar100")
    parser.add_argument("--data", default="../shared/data/cifar10")
    parser.add_argument("--num-blocks", type=int, nargs="+", default=[4, 6])
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
    rows, verdicts = [], {}
    for k in options.num_blocks:
        for method in (FineTuning(num_blocks=k), NEFT(num_blocks=k, beta=options.beta)):
            name = f"{type(method).__name__.lower()}{k}"
            tuner = RobustFineTuner(
                options.source,
                options.data,
                method=method,
                bn=policy,
                arguments=arguments,
                data_arguments=DataArguments(validation_share=0.02),
                output_dir=options.runs / name,
            )
            result = tuner.train()
            report = tuner.evaluate(attacks={"PGD-20": PGD_20}, num_images=options.num_images, curve=None)
            tuner.save()
            verdicts[name] = report.verdicts.correct
            rows.append(
                {
                    "num_blocks": k,
                    "method": to_dict(method),
                    "clean": [report.clean.accuracy, *report.clean.interval],
                    "pgd20": [report.attacks["PGD-20"].accuracy, *report.attacks["PGD-20"].interval],
                    "minutes": result.seconds / 60,
                    "precision": result.precision,
                    "num_images": report.num_images,
                    "environment": report.environment,
                }
            )
            print(f"k={k} {type(method).__name__}: clean {report.clean}, PGD-20 {report.attacks['PGD-20']}")
        difference = {
            attack: paired_bootstrap(verdicts[f"neft{k}"][attack], verdicts[f"finetuning{k}"][attack])
            for attack in ("clean", "PGD-20")
        }
        rows.append({"num_blocks": k, "neft_minus_vanilla": difference})
        for attack, (middle, low, high) in difference.items():
            interval = f"95 % paired interval {100 * low:+.2f} to {100 * high:+.2f}"
            print(f"k={k} NEFT - vanilla, {attack}: {100 * middle:+.2f} points, {interval}")
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "source": options.source,
        "data": options.data,
        "seed": arguments.seed,
        "arguments": to_dict(arguments),
        "batch_norm": to_dict(policy),
        "attack": to_dict(PGD_20),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
